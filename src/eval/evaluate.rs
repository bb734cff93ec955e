//! Top-1 and loss over a dataset.

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

/// Sums over evaluated images.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Images evaluated.
    pub images: usize,
    /// Images whose highest logit is their label's.
    pub correct: usize,
    #[serde(deserialize_with = "number")]
    loss: f64,
}

impl Evaluation {
    /// Share of correct images in percent.
    pub fn top1(&self) -> f64 {
        100.0 * self.correct as f64 / self.images.max(1) as f64
    }

    /// Mean cross entropy.
    pub fn loss(&self) -> f64 {
        self.loss / self.images.max(1) as f64
    }

    /// Counts logits `[B, K]` against labels `[B]`, whose mean cross entropy is `loss`.
    pub(crate) fn add(&mut self, logits: &Tensor, labels: &Tensor, loss: &Tensor) -> Result<()> {
        let hits = logits.f_argmax(-1, false)?.f_eq_tensor(labels)?.f_sum(Kind::Int64)?;
        self.loss += loss.f_double_value(&[])? * labels.numel() as f64;
        self.correct += hits.f_int64_value(&[])? as usize;
        self.images += labels.numel();
        Ok(())
    }
}

/// A number as JSON has it, which writes `null` for one that is none: the loss of a model that
/// diverged.
pub(crate) fn number<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or(f64::NAN))
}

/// Mean cross entropy of logits `[B, K]` against labels `[B]`.
pub(crate) fn cross_entropy(logits: &Tensor, labels: &Tensor) -> Result<Tensor> {
    let (weight, ignored, smoothing) = (None::<&Tensor>, -100, 0.0);
    Ok(logits.f_cross_entropy_loss(labels, weight, Reduction::Mean, ignored, smoothing)?)
}

/// Checks that the head has a row for every label: on a GPU one beyond it ends the process.
pub(crate) fn check_classes<B: Backbone>(
    model: &PetlModel<B>,
    dataset: &ImageDataset,
) -> Result<()> {
    let (classes, needed) = (model.config().num_classes, dataset.num_classes());
    if needed > classes {
        let expected = format!("at least the data's {needed}");
        return Err(Error::config("num_classes", expected, classes));
    }
    Ok(())
}

/// Evaluates `model` on every image of `dataset`, `batch_size` at a time. `watch` is told how many
/// images are done, of how many, and may end the evaluation: the sums are then of those alone.
/// Images of a streamed dataset are decoded while the model works on those before.
///
/// # Errors
/// [`Error::Input`](crate::Error::Input) if the images do not fit the backbone;
/// [`Error::Config`](crate::Error::Config) for a batch size of 0 or labels beyond the head;
/// [`Error::Image`](crate::Error::Image) for an image of a streamed dataset that cannot be decoded.
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

/// As [`evaluate`], on images or on features computed before.
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
