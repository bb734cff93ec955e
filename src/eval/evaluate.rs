//! Evaluation of a model on a dataset.

use std::ops::ControlFlow;

use tch::Tensor;

#[cfg(feature = "train")]
use super::inputs::Inputs;
use super::metrics::Evaluation;
use super::subset::evaluate_indices;
#[cfg(feature = "train")]
use super::team::Team;
use crate::backbone::Backbone;
use crate::data::{BatchConfig, ImageDataset, Normalization, Order, PartialBatch};
use crate::error::{Error, Result};
use crate::model::PetlModel;

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
    let indices = (0..dataset.len()).collect();
    evaluate_images(model, dataset, normalization, batch_size, indices, watch)
}

/// Evaluates `model` like [`evaluate`], each process of `group` on a part of the images. Every
/// process returns the result over all images. The counts are exact; the loss is summed in another
/// order.
///
/// `watch` is called with the numbers of images of this process. If it returns `Break` in any
/// process, the result of all of them covers fewer images than the dataset has.
///
/// # Errors
/// The errors of [`evaluate`]; [`Error::Distributed`] if a process does not take part.
#[cfg(all(feature = "distributed", feature = "train"))]
pub fn evaluate_in<B: Backbone>(
    group: &crate::distributed::ProcessGroup,
    model: &PetlModel<B>,
    dataset: &ImageDataset,
    normalization: Normalization,
    batch_size: usize,
    watch: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
) -> Result<Evaluation> {
    let team = Team::new(Some(group));
    let indices = team.share(dataset.len()).collect();
    let own = evaluate_images(model, dataset, normalization, batch_size, indices, watch)?;
    own.over(team)
}

fn evaluate_images<B: Backbone>(
    model: &PetlModel<B>,
    dataset: &ImageDataset,
    normalization: Normalization,
    batch_size: usize,
    indices: Vec<usize>,
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
    evaluate_indices(logits, dataset, None, config, indices, watch)
}

/// Evaluates `model` like [`evaluate`], on images or on tokens or features computed earlier; each
/// process of `team` on a part of them.
#[cfg(feature = "train")]
pub(crate) fn evaluate_inputs<B: Backbone>(
    model: &PetlModel<B>,
    inputs: &Inputs,
    config: BatchConfig,
    team: Team,
    watch: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
) -> Result<Evaluation> {
    let mut sum = Evaluation::default();
    let indices: Vec<usize> = team.share(inputs.len()).collect();
    let count = indices.len();
    for batch in inputs.batches(config, indices)? {
        let (batch, labels) = batch?;
        let logits = tch::no_grad(|| inputs.logits(model, &batch, false))?;
        sum.add(&logits, &labels)?;
        if watch(sum.images, count).is_break() {
            break;
        }
    }
    sum.over(team)
}
