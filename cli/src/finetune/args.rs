//! The command line of `convpass finetune`.

use std::num::{NonZeroU32, NonZeroUsize};
use std::path::PathBuf;

use clap::ValueEnum;
use convpass::PetlConfig;
use convpass::train::{ClassWeights, TrainConfig};
use serde::{Deserialize, Serialize};

use crate::flags::{
    BackboneFlags, DataFlag, ForceFlag, HeadFlag, ImagesFlags, InputFlags, LogFlags, LooksFlag,
    MethodFlags, OrientationFlag, OutFlag, PreparationFlags, SeedFlag, SurveyFlags, ThreadFlags,
    TrainingFlags, data_name,
};
use crate::processes::is_quiet;

/// Finetunes an adapter on your own images or on one task, and tests it once.
///
/// --images is a folder with one folder for each class, a folder that holds train and val or test
/// in this layout, or a list with a path and a label or the name of a class for each image. Images
/// for validation and for the test are drawn from it if it has none, and the lists are written to
/// --out. --task is a folder DATA/TASK in the layout of VTAB-1k: the lists train800.txt, val200.txt,
/// train800val200.txt and test.txt, each with a line `path label` for each image, and optionally
/// classes.txt with a name for each class. --out receives the adapter (adapter.safetensors), the
/// record of the run (run.json) and its log (log.jsonl). Ctrl-C ends the run after the current
/// step. The same command continues it, even after a kill, and the adapter is the same byte for
/// byte. A finished run is never overwritten without --force. Then `convpass predict --adapter OUT
/// PHOTOS` classifies other images.
#[derive(clap::Args, Clone)]
#[command(
    args_override_self = true,
    mut_arg("backbone", |arg| arg.required(true)),
    mut_arg("out", |arg| arg.help(
        "Folder for the results [default: runs/TASK-METHOD; the name of the folder of --images in place of TASK]"
    )),
    mut_arg("batch_size", |arg| arg.help(
        "Images in a batch, at most the number of training images [default: 64; 16 with --images]"
    )),
    mut_arg("epochs", |arg| arg.help(
        "Epochs: passes over the training images [default: 100; 20 with --images]"
    )),
    after_long_help = "Examples:\n  convpass finetune --images photos/ --backbone vit_base_patch16_224.safetensors --out runs/photos\n  convpass finetune --data vtab-1k --task dtd --backbone vit_base_patch16_224.safetensors --out runs/dtd"
)]
pub struct FinetuneArgs {
    #[command(flatten)]
    pub data: DataFlag,
    /// Name of the folder of the task.
    #[arg(long, value_name = "NAME", required_unless_present = "images", help_heading = "Data")]
    pub task: Option<String>,
    #[command(flatten)]
    pub images: ImagesFlags,
    #[command(flatten)]
    pub survey: SurveyFlags,
    #[command(flatten)]
    pub orientation: OrientationFlag,
    #[command(flatten)]
    pub preparation: PreparationFlags,
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
    /// Capture forward and backward of a step in a CUDA graph and replay it in each step: less work
    /// for the CPU, the same result up to rounding. Needs a GPU, --dropout 0 and --drop-path 0.
    #[arg(long, help_heading = "Training")]
    pub cuda_graph: bool,
    /// Images per forward and backward pass, if a batch does not fit in memory: gradients add up
    /// over the parts of a batch before the optimizer's step [default: the whole batch].
    #[arg(long, value_name = "N", help_heading = "Training")]
    pub micro_batch_size: Option<NonZeroUsize>,
    /// Batches per optimizer step, if a larger batch does not fit in memory: the gradients of N
    /// batches add up to that of their mean.
    #[arg(long, value_name = "N", default_value = "1", help_heading = "Training")]
    pub accumulate: NonZeroUsize,
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
    /// Seconds that a process waits for the others, in a run of several processes (torchrun, Slurm;
    /// see docs/scaling.md).
    #[arg(long, value_name = "SECONDS", default_value = "300")]
    pub process_timeout: NonZeroU32,
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
    /// Train on all 1,000 images (with --images: those for training and for validation) and keep
    /// the last epoch.
    Last,
    /// Train on 800 images (those for training) and keep the epoch that is best on the 200
    /// validation images.
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
        let name = || match (&self.images.images, &self.task) {
            (Some(images), _) => data_name(images),
            (None, task) => task.clone().unwrap_or_default(),
        };
        self.out.folder(|| PathBuf::from("runs").join(format!("{}-{method}", name())))
    }

    /// Returns the number of epochs. The published number is for 1,000 images and takes hours on a
    /// CPU.
    pub fn epochs(&self) -> usize {
        match self.training.length.epochs {
            None if self.images.images.is_some() => 20,
            _ => self.training.epochs(),
        }
    }

    /// Returns the batch size for `images` training images.
    pub fn batch_size(&self, images: usize) -> usize {
        let default = if self.images.images.is_some() { 16 } else { 64 };
        let size = self.input.batches.or(default);
        if size > images {
            let batch =
                if self.input.batches.batch_size.is_some() { "--batch-size" } else { "batch size" };
            if !is_quiet() {
                eprintln!(
                    "{batch} {size}: there are {images} training images, so a batch has {images}"
                );
            }
        }
        size.min(images)
    }
}
