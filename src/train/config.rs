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
    /// Images a step; a last partial batch is dropped.
    pub batch_size: usize,
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
