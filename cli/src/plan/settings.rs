//! The hyper-parameters of a plan's runs.

use serde::{Deserialize, Serialize};

use convpass::data::Normalization;
use convpass::train::{CosineSchedule, Stepped, TrainConfig};

/// Optional hyper-parameters. The value of a method overrides the value of the plan, which
/// overrides the paper's value for VTAB-1k.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RunSettings {
    /// Passes over the training images.
    pub epochs: Option<usize>,
    /// Images in a batch.
    pub batch_size: Option<usize>,
    /// The learning rate after warm-up.
    pub lr: Option<f64>,
    /// The learning rate of the head after warm-up; by default `lr`.
    pub head_lr: Option<f64>,
    /// Epochs of warm-up; by default a tenth of the epochs, at least 1.
    pub warmup_epochs: Option<usize>,
    /// When the learning rate changes.
    pub stepped: Option<Stepped>,
    /// AdamW's decoupled weight decay.
    pub weight_decay: Option<f64>,
    /// Drop path rate of the last block; by default 0.1, or 0 for a linear probe.
    pub drop_path: Option<f64>,
    /// Mean and standard deviation that pixels are normalized with.
    pub normalization: Option<Normalization>,
}

impl RunSettings {
    /// Returns these settings, with the values of `base` for those that are not given.
    pub fn over(&self, base: &RunSettings) -> RunSettings {
        RunSettings {
            epochs: self.epochs.or(base.epochs),
            batch_size: self.batch_size.or(base.batch_size),
            lr: self.lr.or(base.lr),
            head_lr: self.head_lr.or(base.head_lr),
            warmup_epochs: self.warmup_epochs.or(base.warmup_epochs),
            stepped: self.stepped.or(base.stepped),
            weight_decay: self.weight_decay.or(base.weight_decay),
            drop_path: self.drop_path.or(base.drop_path),
            normalization: self.normalization.or(base.normalization),
        }
    }

    /// Returns the config of a run that keeps the weights of the last epoch.
    pub(super) fn train_config(&self, seed: i64) -> TrainConfig {
        let paper = TrainConfig::default();
        let epochs = self.epochs.unwrap_or(paper.epochs);
        let lr = self.lr.unwrap_or(paper.schedule.lr);
        TrainConfig {
            epochs,
            batch_size: self.batch_size.unwrap_or(paper.batch_size),
            schedule: CosineSchedule {
                lr,
                warmup_epochs: self.warmup_epochs.unwrap_or((epochs / 10).max(1)),
                stepped: self.stepped.unwrap_or(paper.schedule.stepped),
                ..paper.schedule
            },
            head_lr_factor: self.head_lr.map_or(paper.head_lr_factor, |head_lr| head_lr / lr),
            weight_decay: self.weight_decay.unwrap_or(paper.weight_decay),
            normalization: self.normalization.unwrap_or(paper.normalization),
            seed,
            ..paper
        }
    }
}
