//! Top-1 accuracy and loss of a model over a dataset.

use std::ops::ControlFlow;

use serde::{Deserialize, Deserializer, Serialize};
use tch::{Kind, Reduction, Tensor};

#[cfg(feature = "train")]
use super::inputs::Inputs;
use super::subset::evaluate_logits;
use crate::backbone::Backbone;
use crate::data::{BatchConfig, ImageDataset, Normalization, Order, PartialBatch};
use crate::error::{Error, Result};
use crate::model::PetlModel;

/// The result of an evaluation: counts and the summed loss over the evaluated images.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// The number of evaluated images.
    pub images: usize,
    /// The number of images whose highest logit is that of their label.
    pub correct: usize,
    #[serde(deserialize_with = "number")]
    loss: f64,
}

impl Evaluation {
    /// Returns the top-1 accuracy in percent.
    pub fn top1(&self) -> f64 {
        100.0 * self.correct as f64 / self.images.max(1) as f64
    }

    /// Returns the mean cross entropy.
    pub fn loss(&self) -> f64 {
        self.loss / self.images.max(1) as f64
    }

    /// Adds a batch with logits `[B, K]` and labels `[B]`. `loss` is the mean cross entropy of the
    /// batch.
    pub(crate) fn add(&mut self, logits: &Tensor, labels: &Tensor, loss: &Tensor) -> Result<()> {
        let hits = logits.f_argmax(-1, false)?.f_eq_tensor(labels)?.f_sum(Kind::Int64)?;
        self.loss += loss.f_double_value(&[])? * labels.numel() as f64;
        self.correct += hits.f_int64_value(&[])? as usize;
        self.images += labels.numel();
        Ok(())
    }
}

/// Deserializes a number and reads `null` as NaN. JSON has no NaN and writes the loss of a diverged
/// model as `null`.
pub(crate) fn number<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or(f64::NAN))
}

/// Returns the mean cross entropy of logits `[B, K]` and labels `[B]`.
pub(crate) fn cross_entropy(logits: &Tensor, labels: &Tensor) -> Result<Tensor> {
    let (weight, ignored, smoothing) = (None::<&Tensor>, -100, 0.0);
    Ok(logits.f_cross_entropy_loss(labels, weight, Reduction::Mean, ignored, smoothing)?)
}

/// Checks that the head has a row for every label. On a GPU, a label beyond the head ends the
/// process.
pub(crate) fn check_classes<B: Backbone>(
    model: &PetlModel<B>,
    dataset: &ImageDataset,
) -> Result<()> {
    let (classes, needed) = (model.config().num_classes, dataset.num_classes());
    if needed > classes {
        let expected = format!("at least {needed}, the number of classes of the data");
        return Err(Error::config("num_classes", expected, classes));
    }
    Ok(())
}

/// Evaluates `model` on every image of `dataset`, in batches of `batch_size`.
///
/// After each batch, `watch` is called with the number of evaluated images and the number of all
/// images. If it returns `Break`, the evaluation ends and the result covers the images evaluated so
/// far. The images of a streamed dataset are decoded while the model works on earlier batches.
///
/// # Errors
/// [`Error::Input`](crate::Error::Input) if the images do not fit the backbone;
/// [`Error::Config`](crate::Error::Config) if the batch size is 0 or the dataset has more classes
/// than the head; [`Error::Image`](crate::Error::Image) if an image of a streamed dataset cannot be
/// decoded.
pub fn evaluate<B: Backbone>(
    model: &PetlModel<B>,
    dataset: &ImageDataset,
    normalization: Normalization,
    batch_size: usize,
    watch: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
) -> Result<Evaluation> {
    check_classes(model, dataset)?;
    let config = BatchConfig {
        batch_size,
        partial: PartialBatch::Keep,
        order: Order::Sequential,
        normalization,
        device: model.var_store().device(),
    };
    let logits = &mut |images: &Tensor| model.forward(images, false);
    evaluate_logits(logits, dataset, None, config, watch)
}

/// Evaluates `model` like [`evaluate`], on images or on tokens or features computed earlier.
#[cfg(feature = "train")]
pub(crate) fn evaluate_inputs<B: Backbone>(
    model: &PetlModel<B>,
    inputs: &Inputs,
    config: BatchConfig,
    watch: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
) -> Result<Evaluation> {
    let mut sum = Evaluation::default();
    for batch in inputs.batches(config)? {
        let (batch, labels) = batch?;
        let logits = tch::no_grad(|| inputs.logits(model, &batch, false))?;
        sum.add(&logits, &labels, &cross_entropy(&logits, &labels)?)?;
        if watch(sum.images, inputs.len()).is_break() {
            break;
        }
    }
    Ok(sum)
}
