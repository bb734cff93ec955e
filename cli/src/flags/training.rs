//! Flags of a training run.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use convpass::train::{CosineSchedule, Stepped};

/// How long and how fast a run trains.
#[derive(Args, Clone, Default)]
pub struct EpochFlags {
    /// Epochs: passes over the training images [default: 100].
    #[arg(long, value_name = "N", help_heading = "Training")]
    pub epochs: Option<usize>,
    /// Peak learning rate, which a cosine schedule reaches after the warm-up [default: 1e-3].
    #[arg(long, value_name = "RATE", help_heading = "Training")]
    pub lr: Option<f64>,
}

/// The settings of a training run. The published protocol gives what no flag does.
#[derive(Args, Clone, Default)]
pub struct TrainingFlags {
    #[command(flatten)]
    pub length: EpochFlags,
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

    /// The epochs, 100 by default.
    pub fn epochs(&self) -> usize {
        self.length.epochs.unwrap_or(100)
    }

    /// The peak learning rate, 1e-3 by default.
    pub fn lr(&self) -> f64 {
        self.length.lr.unwrap_or(Self::LR)
    }

    /// The weight decay, 1e-4 by default.
    pub fn weight_decay(&self) -> f64 {
        self.weight_decay.unwrap_or(Self::WEIGHT_DECAY)
    }

    /// The published schedule with the values of the flags.
    pub fn cosine(&self) -> CosineSchedule {
        CosineSchedule {
            warmup_epochs: self.warmup_epochs.unwrap_or(default_warmup(self.epochs())),
            stepped: self.schedule.into(),
            ..CosineSchedule::with_lr(self.lr())
        }
    }
}

/// The epochs of warm-up of a run whose flags do not give them.
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
        allow_negative_numbers = true,
        help_heading = "Training"
    )]
    pub seeds: Vec<i64>,
}

/// The adapter that heads come from.
#[derive(Args, Clone, Default)]
pub struct HeadFlag {
    /// Start from the head of this adapter, such as a linear probe: its file, or the folder of its run.
    #[arg(long, value_name = "PATH", help_heading = "Training")]
    pub head: Option<PathBuf>,
}

/// Looks at the test images during a run.
#[derive(Args, Clone, Copy, Default)]
pub struct LooksFlag {
    /// Also test every N epochs, and record the best of these results as best-on-test. The adapter
    /// does not depend on it.
    #[arg(long, value_name = "N", help_heading = "Training")]
    pub also_best_on_test: Option<NonZeroUsize>,
}

/// What a run leaves in its folder.
#[derive(Args, Clone, Copy, Default)]
pub struct LogFlags {
    /// Write an event file for TensorBoard into the folder of the run.
    #[arg(long, help_heading = "Output")]
    pub tensorboard: bool,
    /// Steps after which the state of the run is saved, from which the same command continues; it
    /// is saved after each epoch too. 0 saves nothing.
    #[arg(long, value_name = "N", default_value_t = 50, help_heading = "Output")]
    pub checkpoint_every: usize,
}
