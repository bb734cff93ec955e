//! The command line, and what a protocol says where it is silent.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::ValueEnum;
use convpass::Method;
use convpass::data::{Augment, Normalization};
use convpass::train::{CosineSchedule, TrainConfig};

use crate::flags::{BackboneFile, BackboneFlags, LogFlags, ThreadFlags, TrainingFlags};
use crate::targets::{Target, parse_target};

/// Trains on a few images of each class, for several counts and seeds, and reports the mean.
///
/// Training and test images are folders with a folder for each class, or lists with a line
/// `path label` for each image. Every run leaves a folder with its adapter and record in --out,
/// and results.csv holds all figures. A run that is there is not run again.
#[derive(clap::Args, Clone)]
#[command(
    args_override_self = true,
    after_long_help = "Examples:\n  convpass few-shot --data pets/train --test pets/test --backbone vit_base_patch16_224.safetensors --out runs/pets\n  convpass few-shot --protocol domain_generalization --head head.safetensors --data imagenet/train --test imagenet/val --target sketch=sketch --backbone CLIP.safetensors --out runs/dg"
)]
pub struct Args {
    /// Training images: a folder with a folder for each class, or a list.
    #[arg(long)]
    pub data: PathBuf,
    /// Test images: a folder with a folder for each class, or a list.
    #[arg(long)]
    pub test: PathBuf,
    /// Another set of the same classes, or of some of them, to measure on.
    #[arg(long = "target", value_name = "NAME=IMAGES[:CLASSES]", value_parser = parse_target)]
    pub targets: Vec<Target>,
    /// Names of the classes, one a line, in the order of the labels [default: the folders' names, sorted].
    #[arg(long, value_name = "FILE")]
    pub classes: Option<PathBuf>,
    /// What the data is called in the records [default: the name of its folder].
    #[arg(long)]
    pub name: Option<String>,
    /// Adapter whose head the runs start from, the folder of its run, or the --out of another call,
    /// in which case each run starts from its own.
    #[arg(long, value_name = "PATH")]
    pub head: Option<PathBuf>,
    /// The paper's settings, for what no flag says.
    #[arg(long, value_enum, default_value_t = Protocol::FewShot)]
    pub protocol: Protocol,
    /// Images of each class [default: 1,2,4,8,16; domain generalization 16].
    #[arg(long, value_delimiter = ',')]
    pub shots: Option<Vec<NonZeroUsize>>,
    /// Seeds of the draws, and of the runs on them.
    #[arg(long, value_delimiter = ',', default_value = "0,1,2", allow_negative_numbers = true)]
    pub seeds: Vec<i64>,
    /// Take all images of a class that has fewer.
    #[arg(long)]
    pub at_most: bool,
    /// Name of a method, for its defaults, or its config as JSON: {"name": "lora", "rank": 4}.
    #[arg(long, default_value = "convpass")]
    pub method: Method,
    /// How training images are changed [default: the protocol's].
    #[arg(long, value_enum)]
    pub augment: Option<Augmentation>,
    /// Pixels of the shorter side of a test image before its centre is cut out [default: 8/7 of the
    /// input's side; domain generalization the input's side].
    #[arg(long, value_name = "PIXELS")]
    pub test_resize: Option<i64>,
    /// Folder for the runs and results.csv.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    #[command(flatten)]
    pub file: BackboneFile,
    #[command(flatten)]
    pub backbone: BackboneFlags,
    #[command(flatten)]
    pub training: TrainingFlags,
    #[command(flatten)]
    pub logs: LogFlags,
    #[command(flatten)]
    pub threads: ThreadFlags,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Protocol {
    /// A few images of each class.
    FewShot,
    /// 16 images of each class, measured on other domains.
    DomainGeneralization,
}

#[derive(Clone, Copy, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Augmentation {
    /// Colour jitter and RandAugment.
    FewShot,
    /// Random resized crop and flip.
    DomainGeneralization,
    /// As they are.
    None,
}

impl Args {
    /// The first for few-shot learning, the second for domain generalization.
    fn by_protocol<T>(&self, few_shot: T, generalization: T) -> T {
        match self.protocol {
            Protocol::FewShot => few_shot,
            Protocol::DomainGeneralization => generalization,
        }
    }

    pub fn shots(&self) -> Vec<usize> {
        let default = || self.by_protocol(vec![1, 2, 4, 8, 16], vec![16]);
        let said = |shots: &Vec<NonZeroUsize>| shots.iter().map(|shots| shots.get()).collect();
        self.shots.as_ref().map_or_else(default, said)
    }

    /// What the shorter side of a test image becomes, where `side` is the input's.
    pub fn test_resize(&self, side: i64) -> i64 {
        self.test_resize.unwrap_or(self.by_protocol(side * 8 / 7, side))
    }

    /// What the data is called: the folder that holds the list, or the images, and where that is called `train` the
    /// one around it.
    pub fn data_name(&self) -> String {
        let name = || {
            let data = self.data.canonicalize().ok()?;
            let mut folder = if data.is_dir() { data.as_path() } else { data.parent()? };
            if folder.ends_with("train") {
                folder = folder.parent()?;
            }
            folder.file_name()?.to_str().map(str::to_owned)
        };
        self.name.clone().or_else(name).unwrap_or_else(|| self.data.display().to_string())
    }

    /// The settings of a run on so many images.
    pub fn train_config(
        &self,
        seed: i64,
        images: usize,
        normalization: Normalization,
    ) -> TrainConfig {
        let flags = &self.training;
        let epochs = flags.epochs.unwrap_or(self.by_protocol(100, 50));
        let lr = flags.lr.unwrap_or(self.by_protocol(5e-3, 1e-5));
        let schedule = CosineSchedule::with_lr(lr);
        let augment = self
            .augment
            .unwrap_or(self.by_protocol(Augmentation::FewShot, Augmentation::DomainGeneralization));
        TrainConfig {
            epochs,
            batch_size: flags.batch_size.min(images),
            schedule: CosineSchedule {
                min_lr: self.by_protocol(schedule.min_lr, lr / 100.0),
                warmup_epochs: flags
                    .warmup_epochs
                    .unwrap_or(self.by_protocol((epochs / 10).max(1), 0)),
                stepped: flags.schedule.into(),
                ..schedule
            },
            weight_decay: flags.weight_decay.unwrap_or(self.by_protocol(1e-4, 0.0)),
            normalization,
            seed,
            augment: match augment {
                Augmentation::FewShot => Some(Augment::few_shot()),
                Augmentation::DomainGeneralization => Some(Augment::domain_generalization()),
                Augmentation::None => None,
            },
            ..TrainConfig::default()
        }
    }
}
