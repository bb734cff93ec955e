//! Groups of flags that several subcommands share: each flag is declared here once.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use convpass::backbone::{MlpActivation, PreprocessingSource, Resampling, ResizeMode};
use convpass::data::Normalization;
use convpass::petl::{ConvBypassConfig, ConvInit, Placement, SubLayers};
use convpass::train::{CosineSchedule, Stepped};
use convpass::{AnyBackbone, OpenOptions, Precision, Preprocessing};
use tch::{Cuda, Device};

use crate::plan::published_choice;

/// The checkpoint, where a command cannot do without one.
#[derive(Args, Clone)]
pub struct BackboneFile {
    /// Checkpoint of a ViT, CLIP tower, DINOv2, Swin or ConvNeXt: a file, or a folder that holds one.
    #[arg(long)]
    pub backbone: PathBuf,
}

/// What a checkpoint may not tell, and how the backbone is kept.
#[derive(Args, Clone, Default)]
pub struct BackboneFlags {
    /// Attention heads, if the checkpoint does not tell them.
    #[arg(long, value_name = "N", help_heading = "Backbone")]
    pub heads: Option<i64>,
    /// The activation of a ViT's MLPs, if the checkpoint does not tell it.
    #[arg(long, value_enum, help_heading = "Backbone")]
    pub activation: Option<ActivationFlag>,
    /// Height and width of the images in pixels; the position table is resized [default: the run's, else the checkpoint's].
    #[arg(long, value_name = "PIXELS", help_heading = "Backbone")]
    pub image_size: Option<i64>,
    /// Dtype of the frozen weights: f32, bf16, f16, int8 or autocast-bf16 [default: the run's, else f32].
    #[arg(long, help_heading = "Backbone")]
    pub precision: Option<Precision>,
    /// Where to compute.
    #[arg(long, value_enum, default_value_t = Processor::Cpu, help_heading = "Backbone")]
    pub device: Processor,
}

/// The activations that a checkpoint may not tell apart.
#[derive(Clone, Copy, PartialEq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum ActivationFlag {
    /// The exact GELU.
    Gelu,
    /// x * sigmoid(1.702 x), of OpenAI's CLIP.
    QuickGelu,
}

impl From<ActivationFlag> for MlpActivation {
    fn from(activation: ActivationFlag) -> Self {
        match activation {
            ActivationFlag::Gelu => MlpActivation::Gelu,
            ActivationFlag::QuickGelu => MlpActivation::QuickGelu,
        }
    }
}

/// Where to compute.
#[derive(Clone, Copy, Default, PartialEq, ValueEnum)]
pub enum Processor {
    /// On the processor.
    #[default]
    Cpu,
    /// On the first GPU.
    Cuda,
}

impl Processor {
    pub fn device(self) -> Result<Device> {
        match self {
            Processor::Cpu => Ok(Device::Cpu),
            Processor::Cuda if Cuda::is_available() => Ok(Device::Cuda(0)),
            Processor::Cuda => {
                let reason = convpass::cuda_load_error().unwrap_or("libtorch finds none");
                bail!("no CUDA device: {reason}")
            }
        }
    }
}

impl BackboneFlags {
    pub fn precision(&self) -> Precision {
        self.precision.unwrap_or_default()
    }

    /// Opens the checkpoint.
    pub fn open(&self, file: &Path) -> Result<Opened> {
        let options = OpenOptions {
            num_heads: self.heads,
            activation: self.activation.map(MlpActivation::from),
            image_size: self.image_size.map(|side| (side, side)),
            precision: self.precision,
            ..OpenOptions::default()
        };
        let backbone = AnyBackbone::open_with(file, &options, self.device.device()?)?;
        Ok(Opened { backbone })
    }

    /// The flags that say the same, for a process of this program.
    pub fn repeated(&self) -> Vec<String> {
        let value = |name: Option<clap::builder::PossibleValue>| {
            name.map(|value| value.get_name().to_owned())
        };
        let number = |number: Option<i64>| number.map(|number| number.to_string());
        let flags = [
            ("--heads", number(self.heads)),
            ("--activation", value(self.activation.and_then(|a| a.to_possible_value()))),
            ("--image-size", number(self.image_size)),
            ("--precision", self.precision.map(|precision| precision.to_string())),
            ("--device", value(self.device.to_possible_value())),
        ];
        let said = flags.into_iter().filter_map(|(flag, value)| Some([flag.to_owned(), value?]));
        said.flatten().collect()
    }
}

/// A backbone that was opened.
#[derive(Clone)]
pub struct Opened {
    pub backbone: AnyBackbone,
}

impl Opened {
    /// Height and width of its images in pixels.
    pub fn image_size(&self) -> (i64, i64) {
        self.backbone.preprocessing().image_size
    }

    /// How images are prepared in a run: squashed, or the centre of what keeps its aspect ratio.
    pub fn preprocessing(
        &self,
        normalization: Normalization,
        shorter_side: Option<i64>,
    ) -> Preprocessing {
        let resize = match shorter_side {
            Some(shorter_side) => ResizeMode::CenterCrop { shorter_side },
            None => ResizeMode::Squash,
        };
        let mut preprocessing = self.backbone.preprocessing().clone();
        if preprocessing.resize != resize || preprocessing.interpolation != Resampling::Bicubic {
            preprocessing.source = PreprocessingSource::Caller;
        }
        preprocessing.resize = resize;
        preprocessing.interpolation = Resampling::Bicubic;
        preprocessing.with_normalization(normalization)
    }

    /// The flag's normalization, else the one that the backbone was trained with.
    pub fn normalization(&self, flag: Option<Normalization>) -> Result<Normalization> {
        let preprocessing = self.backbone.preprocessing();
        flag.or_else(|| Normalization::of(preprocessing)).with_context(|| {
            format!(
                "--normalization is needed: {} says mean {:?} and std {:?}, which is none of \
                 imagenet, half, unit and clip",
                preprocessing.source, preprocessing.mean, preprocessing.std
            )
        })
    }
}

/// The settings of a training run. What is not given is the protocol's.
#[derive(Args, Clone, Default)]
pub struct TrainingFlags {
    /// Passes over the training images [default: 100; domain generalization 50].
    #[arg(long, value_name = "N", help_heading = "Training")]
    pub epochs: Option<usize>,
    /// Epochs of warm-up [default: a tenth of the epochs, at least 1; domain generalization 0].
    #[arg(long, value_name = "N", help_heading = "Training")]
    pub warmup_epochs: Option<usize>,
    /// When the learning rate changes.
    #[arg(long, value_enum, default_value_t = Stepping::Epoch, help_heading = "Training")]
    pub schedule: Stepping,
    /// Images a step.
    #[arg(long, value_name = "N", default_value_t = 64, help_heading = "Training")]
    pub batch_size: usize,
    /// Peak learning rate [default: 1e-3; few-shot 5e-3; domain generalization 1e-5].
    #[arg(long, value_name = "RATE", help_heading = "Training")]
    pub lr: Option<f64>,
    /// AdamW's weight decay [default: 1e-4; domain generalization 0].
    #[arg(long, value_name = "RATE", help_heading = "Training")]
    pub weight_decay: Option<f64>,
    /// Drop path rate at the last block, linear over depth from 0 [default: 0.1; a linear probe 0].
    #[arg(long, value_name = "RATE", help_heading = "Training")]
    pub drop_path: Option<f64>,
    /// Mean and deviation of the pixels: imagenet, half, unit or clip [default: the backbone's].
    #[arg(long, help_heading = "Training")]
    pub normalization: Option<Normalization>,
}

/// When the learning rate changes.
#[derive(Clone, Copy, Default, ValueEnum)]
pub enum Stepping {
    /// Once after each epoch, as the published code does.
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
    pub const EPOCHS: usize = 100;
    pub const LR: f64 = 1e-3;
    pub const WEIGHT_DECAY: f64 = 1e-4;

    pub fn epochs(&self) -> usize {
        self.epochs.unwrap_or(Self::EPOCHS)
    }

    /// Epochs of warm-up in a run of so many.
    pub fn warmup(&self, epochs: usize) -> usize {
        self.warmup_epochs.unwrap_or((epochs / 10).max(1))
    }

    /// The published schedule with what the flags say.
    pub fn cosine(&self) -> CosineSchedule {
        CosineSchedule {
            warmup_epochs: self.warmup(self.epochs()),
            stepped: self.schedule.into(),
            ..CosineSchedule::with_lr(self.lr.unwrap_or(Self::LR))
        }
    }
}

/// The choices of a Convpass.
#[derive(Args, Clone)]
pub struct BypassFlags {
    /// h, the bottleneck dim of the bypass.
    #[arg(
        long = "bottleneck-dim",
        visible_alias = "h",
        value_name = "N",
        default_value_t = 8,
        help_heading = "Convpass"
    )]
    pub bottleneck_dim: i64,
    /// s, the factor on the bypass [default: the task's published one, else 1].
    #[arg(long, value_name = "S", help_heading = "Convpass")]
    pub scale: Option<f64>,
    /// How the 3x3 convolution starts [default: the task's published one, else identity].
    #[arg(long, value_enum, help_heading = "Convpass")]
    pub init: Option<InitFlag>,
    /// Which sub-layers get a bypass.
    #[arg(long, value_enum, default_value_t = Where::Both, help_heading = "Convpass")]
    pub sub_layers: Where,
    /// Put the bypass after the sub-layer instead of beside it.
    #[arg(long, help_heading = "Convpass")]
    pub sequential: bool,
    /// Side of the convolution's kernel, odd.
    #[arg(long, value_name = "N", default_value_t = 3, help_heading = "Convpass")]
    pub kernel_size: i64,
    /// Dropout rate in the bypass.
    #[arg(long, value_name = "RATE", default_value_t = 0.1, help_heading = "Convpass")]
    pub dropout: f64,
}

/// How the 3x3 convolution starts.
#[derive(Clone, Copy, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum InitFlag {
    /// One at the centre, so that a token passes as it is.
    Identity,
    /// Xavier uniform.
    #[value(aliases = ["xavier", "xavier-uniform"])]
    XavierUniform,
}

/// Which sub-layers get a bypass.
#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub enum Where {
    /// Attention and MLP.
    Both,
    /// Attention alone.
    Attention,
    /// The MLP alone.
    Mlp,
}

impl BypassFlags {
    /// The config that the flags say, with the published s and init of a VTAB-1k task where they say
    /// nothing.
    pub fn config(&self, task: &str) -> ConvBypassConfig {
        let sub_layers = match self.sub_layers {
            Where::Both => SubLayers::Both,
            Where::Attention => SubLayers::Attention,
            Where::Mlp => SubLayers::Mlp,
        };
        let (scale, init) = published_choice(task, sub_layers).unwrap_or((1.0, ConvInit::Identity));
        ConvBypassConfig {
            bottleneck_dim: self.bottleneck_dim,
            kernel_size: self.kernel_size,
            scale: self.scale.unwrap_or(scale),
            dropout: self.dropout,
            conv_init: match self.init {
                Some(InitFlag::Identity) => ConvInit::Identity,
                Some(InitFlag::XavierUniform) => ConvInit::XavierUniform,
                None => init,
            },
            sub_layers,
            placement: if self.sequential { Placement::Sequential } else { Placement::Parallel },
        }
    }
}

/// What a run leaves in its folder.
#[derive(Args, Clone, Default)]
pub struct LogFlags {
    /// Write an event file for TensorBoard too.
    #[arg(long, help_heading = "Output")]
    pub tensorboard: bool,
    /// Steps after which the state of a run is written, and after each epoch; 0: never.
    #[arg(long, value_name = "N", default_value_t = 50, help_heading = "Output")]
    pub checkpoint_every: usize,
}

/// Threads of the computation.
#[derive(Args, Clone, Copy, Default)]
pub struct ThreadFlags {
    /// Threads of libtorch [default: all cores].
    #[arg(long, value_name = "N")]
    pub threads: Option<NonZeroUsize>,
}

impl ThreadFlags {
    /// Applies the flag to this process.
    pub fn apply(self) -> Result<()> {
        if let Some(threads) = self.threads {
            tch::set_num_threads(i32::try_from(threads.get()).context("--threads")?);
        }
        Ok(())
    }
}

/// The backbone that comes with this program: what is run on where no `--backbone` is given.
pub fn bundled_backbone(folder: &Path) -> Result<PathBuf> {
    let file = folder.join("vit_fashion_mnist.safetensors");
    std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    convpass::data::bundled::write_backbone(&file)?;
    Ok(file)
}
