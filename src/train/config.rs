//! The hyper-parameters of a run.

use serde::{Deserialize, Serialize};

use super::loss::ClassWeights;
use super::schedule::CosineSchedule;
use crate::data::{Augment, Normalization};
use crate::eval::PrefixCache;

/// The epoch whose weights the model holds after a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Selection {
    /// The last epoch.
    #[default]
    LastEpoch,
    /// The epoch with the best top-1 accuracy on the validation images; the first one of several
    /// that are equal.
    BestOnValidation,
}

/// The hyper-parameters of a run. The default is the protocol of the paper for VTAB-1k with the
/// normalization of the published code.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    /// Number of passes over the training images.
    pub epochs: usize,
    /// Images of a batch, in all processes of a run together. A last partial batch is dropped.
    pub batch_size: usize,
    /// Batches per optimizer step: the gradient of a step is that of the mean loss over the images
    /// of so many batches. The last step of an epoch has those that are left.
    #[serde(skip_serializing_if = "is_one")]
    pub accumulate: usize,
    /// Images per forward and backward pass, if a batch is too large for the memory: the gradients
    /// of the parts of a batch are accumulated before the optimizer step. `None` runs the whole
    /// batch at once. The gradients are the same up to rounding; dropout and drop path draw other
    /// numbers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub micro_batch_size: Option<usize>,
    /// The largest joint L2 norm of the gradients; larger ones are scaled down to it
    /// ([`clip_grad_norm`](crate::train::clip_grad_norm)). `None` leaves them as they are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_grad_norm: Option<f64>,
    /// The weight of each class in the loss.
    #[serde(skip_serializing_if = "ClassWeights::is_equal")]
    pub class_weights: ClassWeights,
    /// The part of the target that is spread over all classes instead of the label, in `0..1`.
    #[serde(skip_serializing_if = "is_zero")]
    pub label_smoothing: f64,
    /// The learning rate over the run.
    pub schedule: CosineSchedule,
    /// The learning rate of the head divided by that of the method: in each step the head has the
    /// rate of the schedule times this factor. 1 gives all trainables the same rate, and 0 keeps
    /// the head as it is.
    #[serde(skip_serializing_if = "is_one")]
    pub head_lr_factor: f64,
    /// The decoupled weight decay of AdamW.
    pub weight_decay: f64,
    /// The mean and the standard deviation that pixels are normalized with.
    pub normalization: Normalization,
    /// Seed of the order of the images, dropout and drop path.
    pub seed: i64,
    /// The random changes of the training images in each pass. Validation images are not changed.
    /// Cannot be combined with `prefix`.
    pub augment: Option<Augment>,
    /// The epoch whose weights the model holds after the run.
    pub selection: Selection,
    /// Number of epochs between two passes over the validation images. There is always a pass after
    /// the last epoch.
    pub validate_every: usize,
    /// Whether each block is computed again in the backward pass
    /// ([`PetlModel::backward_recomputed`](crate::PetlModel::backward_recomputed)): less memory,
    /// more time, the same gradients.
    pub recompute: bool,
    /// Whether forward and backward of a step are captured once in a CUDA graph and replayed in every
    /// step, so that a GPU is not asked for each operator. The weights are those without it up to
    /// rounding.
    ///
    /// It needs a CUDA device, a model that draws nothing (no dropout, no drop path), one process,
    /// one pass in each step (`accumulate` 1, no `micro_batch_size`) and no `recompute`. The memory
    /// of a pass stays allocated until the end of the run. The first replays are compared with
    /// passes without a graph ([`Error::CaptureDiffers`](crate::Error::CaptureDiffers)).
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub cuda_graph: bool,
    /// Keeps the output of the first blocks for each image, if the method does not act on them
    /// ([`PetlModel::frozen_blocks`](crate::PetlModel::frozen_blocks)), so that it is computed
    /// once. `None` computes it in every step.
    pub prefix: Option<PrefixCache>,
}

impl Default for TrainConfig {
    fn default() -> Self {
        TrainConfig {
            epochs: 100,
            batch_size: 64,
            accumulate: 1,
            micro_batch_size: None,
            max_grad_norm: None,
            class_weights: ClassWeights::Equal,
            label_smoothing: 0.0,
            schedule: CosineSchedule::default(),
            head_lr_factor: 1.0,
            weight_decay: 1e-4,
            normalization: Normalization::ImageNet,
            seed: 0,
            augment: None,
            selection: Selection::LastEpoch,
            validate_every: 1,
            recompute: false,
            cuda_graph: false,
            prefix: None,
        }
    }
}

fn is_zero(value: &f64) -> bool {
    *value == 0.0
}

fn is_one<T: From<u8> + PartialEq>(value: &T) -> bool {
    *value == T::from(1)
}
