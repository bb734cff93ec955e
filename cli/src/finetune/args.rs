//! The command line of `convpass finetune`.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::ValueEnum;
use convpass::PetlConfig;
use convpass::train::{ClassWeights, TrainConfig};
use serde::{Deserialize, Serialize};

use crate::flags::{
    BackboneFlags, DataFlag, ForceFlag, HeadFlag, InputFlags, LogFlags, LooksFlag, MethodFlags,
    OutFlag, SeedFlag, ThreadFlags, TrainingFlags,
};

/// Finetunes an adapter on one task and tests it once.
///
/// The task is a folder DATA/TASK in the layout of VTAB-1k: the lists train800.txt, val200.txt,
/// train800val200.txt and test.txt, each with a line `path label` for each image, and optionally
/// classes.txt with a name for each class. --out receives the adapter (adapter.safetensors), the
/// record of the run (run.json) and its log (log.jsonl). Ctrl-C ends the run after the current
/// step. The same command continues it, even after a kill, and the adapter is the same byte for
/// byte. A finished run is never overwritten without --force.
#[derive(clap::Args, Clone)]
#[command(
    args_override_self = true,
    mut_arg("backbone", |arg| arg.required(true)),
    mut_arg("out", |arg| arg.help("Folder for the results [default: runs/TASK-METHOD]")),
    after_long_help = "Example:\n  convpass finetune --data vtab-1k --task dtd --backbone vit_base_patch16_224.safetensors --out runs/dtd"
)]
pub struct FinetuneArgs {
    #[command(flatten)]
    pub data: DataFlag,
    /// Name of the folder of the task.
    #[arg(long, value_name = "NAME", help_heading = "Data")]
    pub task: String,
    #[command(flatten)]
    pub input: InputFlags,
    #[command(flatten)]
    pub backbone: BackboneFlags,
    #[command(flatten)]
    pub method: MethodFlags,
    #[command(flatten)]
    pub training: TrainingFlags,
    /// Images to train on, and weights to keep.
    #[arg(
        long,
        value_enum,
        value_name = "HOW",
        default_value_t = Select::Last,
        help_heading = "Training"
    )]
    pub select: Select,
    #[command(flatten)]
    pub looks: LooksFlag,
    #[command(flatten)]
    pub head: HeadFlag,
    #[command(flatten)]
    pub seed: SeedFlag,
    /// Compute the frozen blocks in front of the first bypass once for each image, and keep their
    /// output in `memory` or in a folder.
    #[arg(long, value_name = "memory|DIR", help_heading = "Training")]
    pub keep_prefix: Option<String>,
    /// Compute each block again in the backward pass: less memory, more time, the same result.
    #[arg(long, help_heading = "Training")]
    pub recompute: bool,
    /// Images per forward and backward pass, if a batch does not fit in memory: gradients add up
    /// over the parts of a batch before the optimizer's step [default: the whole batch].
    #[arg(long, value_name = "N", help_heading = "Training")]
    pub micro_batch_size: Option<NonZeroUsize>,
    /// Largest norm of the gradients; larger ones are scaled down to it [default: no limit].
    #[arg(long, value_name = "NORM", help_heading = "Training")]
    pub max_grad_norm: Option<f64>,
    /// Weight of the classes in the loss: equal, or balanced, where each class has the same weight
    /// in sum, whatever the number of its images.
    #[arg(
        long,
        value_enum,
        value_name = "HOW",
        default_value_t = ClassWeighting::Equal,
        help_heading = "Training"
    )]
    pub class_weights: ClassWeighting,
    /// Part of the target that is spread over all classes instead of the label, from 0 to 1.
    #[arg(long, value_name = "PART", default_value_t = 0.0, help_heading = "Training")]
    pub label_smoothing: f64,
    #[command(flatten)]
    pub out: OutFlag,
    #[command(flatten)]
    pub force: ForceFlag,
    #[command(flatten)]
    pub logs: LogFlags,
    #[command(flatten)]
    pub threads: ThreadFlags,
    /// The configs of a run of a sweep, as JSON. They replace all flags for the same settings.
    #[arg(long, hide = true, value_parser = parse_spec)]
    pub spec: Option<RunSpec>,
}

/// The configs of a run, as in its record.
#[derive(Clone, Serialize, Deserialize)]
pub struct RunSpec {
    pub model: PetlConfig,
    pub train: TrainConfig,
}

fn parse_spec(text: &str) -> Result<RunSpec, String> {
    serde_json::from_str(text).map_err(|e| e.to_string())
}

/// The images that a run trains on, and the weights that it keeps.
#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub enum Select {
    /// Train on all 1,000 images and keep the last epoch.
    Last,
    /// Train on 800 images and keep the epoch that is best on the 200 validation images.
    Val,
    /// Train on 800 images, measure the last epoch on the 200, and never look at the test images.
    Trial,
}

/// The weight of the classes in the loss.
#[derive(Clone, Copy, Default, PartialEq, ValueEnum)]
pub enum ClassWeighting {
    /// Every image has the same weight.
    #[default]
    Equal,
    /// Every class has the same weight in sum.
    Balanced,
}

impl From<ClassWeighting> for ClassWeights {
    fn from(weighting: ClassWeighting) -> Self {
        match weighting {
            ClassWeighting::Equal => ClassWeights::Equal,
            ClassWeighting::Balanced => ClassWeights::Balanced,
        }
    }
}

impl FinetuneArgs {
    /// Returns the folder of the results.
    pub fn folder(&self, method: &str) -> PathBuf {
        self.out.folder(|| PathBuf::from("runs").join(format!("{}-{method}", self.task)))
    }
}
