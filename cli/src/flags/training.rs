//! Flags of a training run.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use convpass::train::{CosineSchedule, Stepped};

/// The epochs and the learning rate of a run.
#[derive(Args, Clone, Default)]
pub struct EpochFlags {
    /// Epochs: passes over the training images [default: 100].
    #[arg(long, value_name = "N", help_heading = "Training")]
    pub epochs: Option<usize>,
    /// Peak learning rate, which a cosine schedule reaches after the warm-up [default: 1e-3].
    #[arg(long, value_name = "RATE", help_heading = "Training")]
    pub lr: Option<f64>,
}

/// The settings of a training run. The defaults are those of the published protocol.
#[derive(Args, Clone, Default)]
pub struct TrainingFlags {
    #[command(flatten)]
    pub length: EpochFlags,
    /// Peak learning rate of the head, which follows the same schedule [default: that of --lr].
    #[arg(long, value_name = "RATE", help_heading = "Training")]
    pub head_lr: Option<f64>,
    /// Epochs of warm-up at the start [default: a tenth of the epochs, at least 1].
    #[arg(long, value_name = "N", help_heading = "Training")]
    pub warmup_epochs: Option<usize>,
    /// When the learning rate changes.
    #[arg(
        long,
        value_enum,
        value_name = "WHEN",
        default_value_t = Stepping::Epoch,
        help_heading = "Training"
    )]
    pub schedule: Stepping,
    /// Weight decay of AdamW [default: 1e-4].
    #[arg(long, value_name = "RATE", help_heading = "Training")]
    pub weight_decay: Option<f64>,
    /// Drop path rate of the last block; it grows linearly with depth from 0 [default: 0.1, or 0
    /// for a linear probe].
    #[arg(long, value_name = "RATE", help_heading = "Training")]
    pub drop_path: Option<f64>,
}

/// When the learning rate changes.
#[derive(Clone, Copy, Default, ValueEnum)]
pub enum Stepping {
    /// After each epoch, as in the published code.
    #[default]
    Epoch,
    /// At each step.
    Step,
}

impl From<Stepping> for Stepped {
    fn from(stepping: Stepping) -> Self {
        match stepping {
            Stepping::Epoch => Stepped::AfterEpoch,
            Stepping::Step => Stepped::EachStep,
        }
    }
}

impl TrainingFlags {
    pub const LR: f64 = 1e-3;
    pub const WEIGHT_DECAY: f64 = 1e-4;

    /// Returns the number of epochs, 100 by default.
    pub fn epochs(&self) -> usize {
        self.length.epochs.unwrap_or(100)
    }

    /// Returns the peak learning rate, 1e-3 by default.
    pub fn lr(&self) -> f64 {
        self.length.lr.unwrap_or(Self::LR)
    }

    /// Returns the rate of the head divided by `lr`, 1 by default.
    pub fn head_lr_factor(&self, lr: f64) -> f64 {
        self.head_lr.map_or(1.0, |head_lr| head_lr / lr)
    }

    /// Returns the weight decay, 1e-4 by default.
    pub fn weight_decay(&self) -> f64 {
        self.weight_decay.unwrap_or(Self::WEIGHT_DECAY)
    }

    /// Returns the published schedule with the values of the flags, for a run of `epochs`. If the run
    /// is too short to come near the rate that was asked for, this is said.
    pub fn cosine(&self, epochs: usize) -> CosineSchedule {
        let schedule = CosineSchedule {
            warmup_epochs: self.warmup_epochs.unwrap_or(default_warmup(epochs)),
            stepped: self.schedule.into(),
            ..CosineSchedule::with_lr(self.lr())
        };
        let highest = highest_rate(&schedule, epochs);
        if highest < schedule.lr / 2.0 {
            eprintln!(
                "warning: within {epochs} epochs the learning rate reaches {highest:.1e} of the \
                 {:.1e} asked for, so that little is learned; use more --epochs, fewer \
                 --warmup-epochs, or --schedule step",
                schedule.lr
            );
        }
        schedule
    }
}

/// Returns the highest learning rate of a run.
fn highest_rate(schedule: &CosineSchedule, epochs: usize) -> f64 {
    /// More steps than this change the highest rate of an epoch by less than a hundredth.
    const STEPS: usize = 100;
    let rates = (0..epochs)
        .flat_map(|epoch| [0, STEPS - 1].map(|step| schedule.lr(epoch, step, epochs, STEPS)));
    rates.fold(0.0, f64::max)
}

/// Returns the default number of warm-up epochs: a tenth of `epochs`, at least 1.
pub fn default_warmup(epochs: usize) -> usize {
    (epochs / 10).max(1)
}

/// The seed of one run.
#[derive(Args, Clone, Copy)]
pub struct SeedFlag {
    /// Seed of everything that is random: initial weights, order of the images, dropout.
    #[arg(
        long,
        value_name = "N",
        default_value_t = 42,
        allow_negative_numbers = true,
        help_heading = "Training"
    )]
    pub seed: i64,
}

/// The seeds of several runs.
#[derive(Args, Clone)]
pub struct SeedsFlag {
    /// Seeds, separated by commas: one run for each.
    #[arg(
        long,
        value_name = "N,..",
        value_delimiter = ',',
        default_value = "0,1,2",
        allow_hyphen_values = true,
        help_heading = "Training"
    )]
    pub seeds: Vec<i64>,
}

/// The adapter whose head a run starts from.
#[derive(Args, Clone, Default)]
pub struct HeadFlag {
    /// Start from the head of this adapter, such as a linear probe: its file, or the folder of its
    /// run.
    #[arg(long, value_name = "PATH", help_heading = "Training")]
    pub head: Option<PathBuf>,
}

/// Tests during a run.
#[derive(Args, Clone, Copy, Default)]
pub struct LooksFlag {
    /// Also test every N epochs, and record the best of these results as best-on-test. The adapter
    /// does not depend on it.
    #[arg(long, value_name = "N", help_heading = "Training")]
    pub also_best_on_test: Option<NonZeroUsize>,
}

/// Optional files in the folder of a run.
#[derive(Args, Clone, Copy, Default)]
pub struct LogFlags {
    /// Write an event file for TensorBoard into the folder of the run.
    #[arg(long, help_heading = "Output")]
    pub tensorboard: bool,
    /// Save the state of the run every N steps and after each epoch, so that the same command can
    /// continue it. 0 saves nothing.
    #[arg(long, value_name = "N", default_value_t = 50, help_heading = "Output")]
    pub checkpoint_every: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_run_with_a_rate_for_each_epoch_stays_at_the_first_rate_of_the_warm_up() {
        let of = |stepped, epochs| {
            let warmup_epochs = default_warmup(epochs);
            let schedule = CosineSchedule { warmup_epochs, stepped, ..CosineSchedule::default() };
            highest_rate(&schedule, epochs)
        };
        assert!(of(Stepped::AfterEpoch, 2) < 1e-5 && of(Stepped::AfterEpoch, 0) == 0.0);
        assert!(of(Stepped::AfterEpoch, 4) > 5e-4 && of(Stepped::EachStep, 1) > 9e-4);
    }
}
