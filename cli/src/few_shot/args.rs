//! The command line of `convpass few-shot`, and the defaults of each protocol.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::ValueEnum;
use convpass::data::{Augment, Normalization};
use convpass::train::{CosineSchedule, TrainConfig};

use super::rates::Rates;
use crate::failure::Usage;
use crate::flags::{
    BackboneFlags, ClassFlag, ForceFlag, HeadFlag, InputFlags, LogFlags, MethodFlags,
    OrientationFlag, OutFlag, SeedsFlag, SurveyFlags, TargetFlags, ThreadFlags, TrainingFlags,
    data_name, default_warmup,
};

/// Trains on a few images of each class, for several counts and seeds, and reports the mean.
///
/// Training and test images are folders with one folder for each class, or lists with a line `path
/// label` for each image. --out receives a folder with the adapter and the record of each run, and
/// results.csv. The same command continues after a stop: finished runs are skipped. --select chooses
/// the learning rates without validation images, or lets models with different rates vote.
#[derive(clap::Args, Clone)]
#[command(
    args_override_self = true,
    mut_arg("backbone", |arg| arg.required(true)),
    mut_arg("seeds", |arg| arg.help("Seeds, separated by commas: one draw of images and one run for each")),
    mut_arg("head", |arg| arg.help(
        "Start from the head of this adapter: its file, the folder of its run, or the --out of another few-shot call, in which case each run starts from the run of its own count and seed"
    )),
    mut_arg("classes", |arg| arg.help(
        "Text file with the name of one class on each line, in the order of the labels [default: the names of the folders, sorted]"
    )),
    mut_arg("epochs", |arg| arg.help(
        "Epochs: passes over the training images [default: 100; 50 for domain_generalization]"
    )),
    mut_arg("lr", |arg| arg.help(
        "Peak learning rate, which a cosine schedule reaches after the warm-up [default: 5e-3; 1e-5 for domain_generalization]"
    )),
    mut_arg("warmup_epochs", |arg| arg.help(
        "Epochs of warm-up at the start [default: a tenth of the epochs, at least 1; 0 for domain_generalization]"
    )),
    mut_arg("weight_decay", |arg| arg.help(
        "Weight decay of AdamW [default: 1e-4; 0 for domain_generalization]"
    )),
    mut_arg("out", |arg| arg.help("Folder for the results [default: runs/NAME-METHOD-few-shot]")),
    after_long_help = "Examples:\n  convpass few-shot --data pets/train --test pets/test --backbone vit_base_patch16_224.safetensors --out runs/pets\n  convpass few-shot --select ensemble --shots 4 --data pets/train --test pets/test --backbone vit_base_patch16_224.safetensors --lr 2e-3 --head-lr 1e-2 --out runs/pets-ensemble\n  convpass few-shot --protocol domain_generalization --head head.safetensors --data imagenet/train --test imagenet/val --target sketch=sketch --backbone CLIP.safetensors --out runs/dg"
)]
pub struct FewShotArgs {
    /// Published settings, which apply to everything that no flag sets.
    #[arg(long, value_enum, value_name = "NAME", default_value_t = Protocol::FewShot)]
    pub protocol: Protocol,
    #[command(flatten)]
    pub threads: ThreadFlags,
    /// Training images: a folder with one folder for each class, or a list.
    #[arg(long, value_name = "IMAGES", help_heading = "Data")]
    pub data: PathBuf,
    /// Test images: a folder with one folder for each class, or a list.
    #[arg(long, value_name = "IMAGES", help_heading = "Data")]
    pub test: PathBuf,
    #[command(flatten)]
    pub targets: TargetFlags,
    #[command(flatten)]
    pub classes: ClassFlag,
    /// Name of the data in the records [default: the name of its folder].
    #[arg(long, help_heading = "Data")]
    pub name: Option<String>,
    /// Numbers of training images of each class, separated by commas; every seed runs with each
    /// [default: 1,2,4,8,16; 16 for domain_generalization].
    #[arg(long, value_name = "N,..", value_delimiter = ',', help_heading = "Data")]
    pub shots: Option<Vec<NonZeroUsize>>,
    /// Use all images of a class that has fewer than asked for; without this flag such a class is
    /// an error.
    #[arg(long, help_heading = "Data")]
    pub at_most: bool,
    /// Augmentation of the training images [default: the one of the protocol].
    #[arg(long, value_enum, value_name = "NAME", help_heading = "Data")]
    pub augment: Option<Augmentation>,
    /// Pixels that the shorter side of a test image is resized to before its centre is cut out
    /// [default: 8/7 of the image size; the image size for domain_generalization].
    #[arg(long, value_name = "PIXELS", help_heading = "Data")]
    pub test_resize: Option<i64>,
    #[command(flatten)]
    pub input: InputFlags,
    #[command(flatten)]
    pub orientation: OrientationFlag,
    #[command(flatten)]
    pub survey: SurveyFlags,
    #[command(flatten)]
    pub backbone: BackboneFlags,
    #[command(flatten)]
    pub method: MethodFlags,
    #[command(flatten)]
    pub training: TrainingFlags,
    /// How the learning rates are chosen, and what answers; the test images are never looked at for
    /// it.
    #[arg(
        long,
        value_enum,
        value_name = "HOW",
        default_value_t = Select::Fixed,
        help_heading = "Training"
    )]
    pub select: Select,
    /// Folds of --select cross-validation [default: 5, or the images of the smallest class if they
    /// are fewer].
    #[arg(long, value_name = "N", help_heading = "Training")]
    pub folds: Option<NonZeroUsize>,
    #[command(flatten)]
    pub head: HeadFlag,
    #[command(flatten)]
    pub seeds: SeedsFlag,
    #[command(flatten)]
    pub out: OutFlag,
    #[command(flatten)]
    pub force: ForceFlag,
    #[command(flatten)]
    pub logs: LogFlags,
}

/// The published settings of an experiment.
#[derive(Clone, Copy, PartialEq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Protocol {
    /// A few images of each class.
    FewShot,
    /// 16 images of each class, measured on other domains.
    DomainGeneralization,
}

/// How the learning rates of a run are chosen without validation images.
#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub enum Select {
    /// The rates are those of --lr and --head-lr.
    Fixed,
    /// Each pair of rates of a grid around --lr and --head-lr (each divided by 5, as it is, and
    /// times 5) is trained on all folds of the training images but one, and measured on that fold.
    /// The pair that is right most often is then trained on all training images.
    CrossValidation,
    /// Each pair of rates of the same grid is trained on all training images, and the answer is the
    /// class that most of the models predict (FewTrans, arXiv 2603.00478). Ties go to the first
    /// class.
    Ensemble,
}

/// An augmentation of training images.
#[derive(Clone, Copy, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Augmentation {
    /// Colour jitter and RandAugment.
    FewShot,
    /// Random resized crop and horizontal flip.
    DomainGeneralization,
    /// No augmentation.
    None,
}

impl FewShotArgs {
    /// Returns the first value for few-shot learning and the second for domain generalization.
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

    /// Returns the shorter side of a resized test image in pixels. `side` is the side of the
    /// model's images.
    pub fn test_resize(&self, side: i64) -> i64 {
        self.test_resize.unwrap_or(self.by_protocol(side * 8 / 7, side))
    }

    /// Checks the flags that belong together.
    ///
    /// # Errors
    /// [`Usage`] for flags that would have no effect, or rates that have no grid.
    pub fn check(&self) -> Result<(), Usage> {
        if self.folds.is_some() && self.select != Select::CrossValidation {
            return Err(Usage("--folds needs --select cross-validation".to_owned()));
        }
        let Rates { lr, head_lr } = self.rates();
        if self.select != Select::Fixed && !(lr > 0.0 && head_lr > 0.0) {
            let select = "--select cross-validation and --select ensemble";
            return Err(Usage(format!("{select} need --lr and --head-lr above 0")));
        }
        Ok(())
    }

    /// Returns the folder of the results.
    pub fn folder(&self, method: &str) -> PathBuf {
        let default = || format!("{}-{method}-few-shot", self.data_name());
        self.out.folder(|| PathBuf::from("runs").join(default()))
    }

    /// Returns the name of the data: `--name`, else the name of the folder of images or of the
    /// folder that holds the list. If that name is `train`, it is the name of the parent folder.
    pub fn data_name(&self) -> String {
        self.name.clone().unwrap_or_else(|| data_name(&self.data))
    }

    /// Returns the rates of the flags.
    pub fn rates(&self) -> Rates {
        let lr = self.training.length.lr.unwrap_or(self.by_protocol(5e-3, 1e-5));
        Rates { lr, head_lr: self.training.head_lr.unwrap_or(lr) }
    }

    /// Returns the settings of a run on `images` training images with `rates`.
    pub fn train_config(
        &self,
        seed: i64,
        images: usize,
        normalization: Normalization,
        rates: Rates,
    ) -> TrainConfig {
        let (flags, lr) = (&self.training, rates.lr);
        let epochs = flags.length.epochs.unwrap_or(self.by_protocol(100, 50));
        let schedule = CosineSchedule::with_lr(lr);
        let augment = self
            .augment
            .unwrap_or(self.by_protocol(Augmentation::FewShot, Augmentation::DomainGeneralization));
        TrainConfig {
            epochs,
            batch_size: self.input.batch_size().min(images),
            schedule: CosineSchedule {
                min_lr: self.by_protocol(schedule.min_lr, lr / 100.0),
                warmup_epochs: flags
                    .warmup_epochs
                    .unwrap_or(self.by_protocol(default_warmup(epochs), 0)),
                stepped: flags.schedule.into(),
                ..schedule
            },
            head_lr_factor: rates.head_lr_factor(),
            weight_decay: flags
                .weight_decay
                .unwrap_or(self.by_protocol(TrainingFlags::WEIGHT_DECAY, 0.0)),
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
