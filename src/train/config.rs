//! A run's hyper-parameters.

use serde::{Deserialize, Serialize};

use super::schedule::CosineSchedule;
use crate::data::{Augment, Normalization};
use crate::eval::PrefixCache;

/// Which epoch's weights a run ends with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Selection {
    /// The last epoch's.
    #[default]
    LastEpoch,
    /// The first of those with the best top-1 on the validation images. There is no selection on
    /// the test set here.
    BestOnValidation,
}

/// A run's hyper-parameters; the default is the paper's for VTAB-1k, with the normalization of
/// the published code.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    /// Passes over the training images.
    pub epochs: usize,
    /// Images per optimizer step. A last partial batch is dropped.
    pub batch_size: usize,
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
    /// The learning rate over the run.
    pub schedule: CosineSchedule,
    /// AdamW's decoupled weight decay.
    pub weight_decay: f64,
    /// What the pixels become.
    pub normalization: Normalization,
    /// Seed of the order of the images, dropout and drop path.
    pub seed: i64,
    /// How training images are changed at each pass; those of validation never are. Excludes
    /// `prefix`.
    pub augment: Option<Augment>,
    /// Which epoch's weights the run ends with.
    pub selection: Selection,
    /// Epochs from one pass over the validation images to the next; the last epoch has one.
    pub validate_every: usize,
    /// Whether each block is computed again in the backward pass
    /// ([`PetlModel::backward_recomputed`](crate::PetlModel::backward_recomputed)): less memory,
    /// more time, the same gradients.
    pub recompute: bool,
    /// Where what the frozen blocks in front make of each image is kept, so that it is computed
    /// once; `None` to compute it in every step. There are such blocks where a method leaves out
    /// the first ones ([`PetlModel::frozen_blocks`](crate::PetlModel::frozen_blocks)).
    pub prefix: Option<PrefixCache>,
}

impl Default for TrainConfig {
    fn default() -> Self {
        TrainConfig {
            epochs: 100,
            batch_size: 64,
            micro_batch_size: None,
            max_grad_norm: None,
            schedule: CosineSchedule::default(),
            weight_decay: 1e-4,
            normalization: Normalization::ImageNet,
            seed: 0,
            augment: None,
            selection: Selection::LastEpoch,
            validate_every: 1,
            recompute: false,
            prefix: None,
        }
    }
}
