//! The hyper-parameters of a plan's runs.

use serde::{Deserialize, Serialize};

use convpass::data::Normalization;
use convpass::train::{CosineSchedule, Stepped, TrainConfig};

/// Hyper-parameters, as far as they are given: a method's over a plan's over the paper's for
/// VTAB-1k.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RunSettings {
    /// Passes over the training images.
    pub epochs: Option<usize>,
    /// Images a step.
    pub batch_size: Option<usize>,
    /// The learning rate after warm-up.
    pub lr: Option<f64>,
    /// Epochs of warm-up; a tenth of the epochs, at least 1, where nothing says.
    pub warmup_epochs: Option<usize>,
    /// When the learning rate changes.
    pub stepped: Option<Stepped>,
    /// AdamW's decoupled weight decay.
    pub weight_decay: Option<f64>,
    /// Drop path rate at the last block; 0.1 where nothing says, for a linear probe 0.
    pub drop_path: Option<f64>,
    /// What the pixels become.
    pub normalization: Option<Normalization>,
}

impl RunSettings {
    /// These, and `base`'s where there is none.
    pub fn over(&self, base: &RunSettings) -> RunSettings {
        RunSettings {
            epochs: self.epochs.or(base.epochs),
            batch_size: self.batch_size.or(base.batch_size),
            lr: self.lr.or(base.lr),
            warmup_epochs: self.warmup_epochs.or(base.warmup_epochs),
            stepped: self.stepped.or(base.stepped),
            weight_decay: self.weight_decay.or(base.weight_decay),
            drop_path: self.drop_path.or(base.drop_path),
            normalization: self.normalization.or(base.normalization),
        }
    }

    /// A run's config, which keeps the last epoch.
    pub(super) fn train_config(&self, seed: i64) -> TrainConfig {
        let paper = TrainConfig::default();
        let epochs = self.epochs.unwrap_or(paper.epochs);
        TrainConfig {
            epochs,
            batch_size: self.batch_size.unwrap_or(paper.batch_size),
            schedule: CosineSchedule {
                lr: self.lr.unwrap_or(paper.schedule.lr),
                warmup_epochs: self.warmup_epochs.unwrap_or((epochs / 10).max(1)),
                stepped: self.stepped.unwrap_or(paper.schedule.stepped),
                ..paper.schedule
            },
            weight_decay: self.weight_decay.unwrap_or(paper.weight_decay),
            normalization: self.normalization.unwrap_or(paper.normalization),
            seed,
            ..paper
        }
    }
}
