//! The command line, and what a protocol says where it is silent.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{Parser, ValueEnum};
use convpass::{Augment, CosineSchedule, Method, Normalization, TrainConfig};

use super::backbone::Untold;
use super::method::parse_method;
use super::precision::Precision;
use super::targets::{Target, parse_target};

/// Trains on a few images of each class, and measures on the test images and on other sets of the classes.
#[derive(Parser)]
#[command(version, args_override_self = true)]
pub struct Args {
    /// Training images: a folder with a folder for each class, or a list.
    #[arg(long)]
    pub data: PathBuf,
    /// Test images, likewise.
    #[arg(long)]
    pub test: PathBuf,
    /// Another set of the same classes, or of some of them.
    #[arg(long = "target", value_name = "NAME=IMAGES[:CLASSES]", value_parser = parse_target)]
    pub targets: Vec<Target>,
    /// Names of the classes, one a line, in the order of the labels [default: for folders in the order of their names].
    #[arg(long)]
    pub classes: Option<PathBuf>,
    /// What the data is called in the records [default: the name of its folder].
    #[arg(long)]
    pub name: Option<String>,
    /// Checkpoint of a ViT, CLIP tower, DINOv2, Swin or ConvNeXt; the README lists the formats.
    #[arg(long)]
    pub backbone: PathBuf,
    #[command(flatten)]
    pub untold: Untold,
    /// How the frozen backbone is kept and computed with; what is trained is f32 all the same.
    #[arg(long, value_enum, default_value_t = Precision::F32)]
    pub precision: Precision,
    /// Adapter whose head the runs start from, its rows in the order of the labels, or the folder of its run, or the
    /// --out of another call: each run then from its own.
    #[arg(long)]
    pub head: Option<PathBuf>,
    /// The paper's settings, for what no flag says.
    #[arg(long, value_enum, default_value_t = Protocol::FewShot)]
    pub protocol: Protocol,
    /// Images of each class [default: 1,2,4,8,16; for domain generalization 16].
    #[arg(long, value_delimiter = ',')]
    pub shots: Option<Vec<NonZeroUsize>>,
    #[arg(long, value_delimiter = ',', default_value = "0,1,2")]
    pub seeds: Vec<i64>,
    /// Take what there is of a class with fewer images.
    #[arg(long)]
    pub at_most: bool,
    /// A method's name, for its defaults, or its config as JSON: {"name": "lora", "rank": 4}.
    #[arg(long, value_parser = parse_method, default_value = "conv_bypass")]
    pub method: Method,
    /// How training images are changed [default: the protocol's].
    #[arg(long, value_enum)]
    pub augment: Option<Augmentation>,
    /// What the shorter side of test images becomes before the centre is cut out [default: 8/7 of the input's; for
    /// domain generalization the input's].
    #[arg(long, value_name = "PIXELS")]
    pub test_resize: Option<i64>,
    /// [default: 100; for domain generalization 50].
    #[arg(long)]
    pub epochs: Option<usize>,
    /// Epochs of warm-up [default: a tenth of the epochs, at least 1; for domain generalization 0].
    #[arg(long)]
    pub warmup_epochs: Option<usize>,
    /// [default: 5e-3, down to 1e-5; for domain generalization 1e-5, down to 1e-7].
    #[arg(long)]
    pub lr: Option<f64>,
    /// [default: 1e-4; for domain generalization 0].
    #[arg(long)]
    pub weight_decay: Option<f64>,
    /// Images a step; all of them where there are fewer.
    #[arg(long, default_value_t = 64)]
    pub batch_size: usize,
    /// imagenet, half, unit or clip [default: clip for a CLIP tower, else imagenet].
    #[arg(long)]
    pub normalization: Option<Normalization>,
    /// Run on the first CUDA device.
    #[arg(long)]
    pub cuda: bool,
    /// Write an event file for TensorBoard for each run too.
    #[arg(long)]
    pub tensorboard: bool,
    #[arg(long)]
    pub out: PathBuf,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Protocol {
    FewShot,
    DomainGeneralization,
}

#[derive(Clone, Copy, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Augmentation {
    /// Colour jitter and RandAugment.
    FewShot,
    /// Random resized crop and flip.
    DomainGeneralization,
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
    pub fn train_config(&self, seed: i64, images: usize, by_family: Normalization) -> TrainConfig {
        let epochs = self.epochs.unwrap_or(self.by_protocol(100, 50));
        let lr = self.lr.unwrap_or(self.by_protocol(5e-3, 1e-5));
        let schedule = CosineSchedule::with_lr(lr);
        let augment = self
            .augment
            .unwrap_or(self.by_protocol(Augmentation::FewShot, Augmentation::DomainGeneralization));
        TrainConfig {
            epochs,
            batch_size: self.batch_size.min(images),
            schedule: CosineSchedule {
                min_lr: self.by_protocol(schedule.min_lr, lr / 100.0),
                warmup_epochs: self
                    .warmup_epochs
                    .unwrap_or(self.by_protocol((epochs / 10).max(1), 0)),
                ..schedule
            },
            weight_decay: self.weight_decay.unwrap_or(self.by_protocol(1e-4, 0.0)),
            normalization: self.normalization.unwrap_or(by_family),
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
