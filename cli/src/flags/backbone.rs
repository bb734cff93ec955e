//! The flags of a backbone, and opening a backbone with them.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use convpass::backbone::{MlpActivation, PreprocessingSource, Resampling, ResizeMode};
use convpass::data::Normalization;
use convpass::{AnyBackbone, OpenOptions, Precision, Preprocessing};
use tch::{Cuda, Device};

/// The checkpoint, the settings that a checkpoint may lack, the precision and the device.
#[derive(Args, Clone, Default)]
pub struct BackboneFlags {
    /// Checkpoint of the frozen backbone (ViT, CLIP, DINOv2, Swin or ConvNeXt): a file, a folder
    /// that holds one, or hf:OWNER/NAME on the Hugging Face hub.
    #[arg(long, value_name = "PATH", help_heading = "Backbone")]
    pub backbone: Option<PathBuf>,
    /// Attention heads of a ViT, if the checkpoint does not say how many [default: one for
    /// every 64 channels].
    #[arg(long, value_name = "N", help_heading = "Backbone")]
    pub heads: Option<i64>,
    /// Activation of the MLPs of a ViT, if the checkpoint does not say which [default: that of its
    /// family].
    #[arg(long, value_enum, value_name = "NAME", help_heading = "Backbone")]
    pub activation: Option<ActivationFlag>,
    /// Height and width of the images in pixels; the position table is resized to it [default:
    /// those of the checkpoint].
    #[arg(long, value_name = "PIXELS", help_heading = "Backbone")]
    pub image_size: Option<i64>,
    /// Dtype of the frozen weights: f32, bf16, f16, int8, or autocast-bf16 for f32 weights whose
    /// products are computed in bf16 [default: f32].
    #[arg(long, value_name = "DTYPE", help_heading = "Backbone")]
    pub precision: Option<Precision>,
    /// Device that computes.
    #[arg(long, value_enum, default_value_t = Processor::Cpu, help_heading = "Backbone")]
    pub device: Processor,
}

/// An activation of the MLPs.
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

/// A device that computes.
#[derive(Clone, Copy, Default, PartialEq, ValueEnum)]
pub enum Processor {
    /// The CPU.
    #[default]
    Cpu,
    /// The first GPU; needs a build with the feature `cuda`.
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
    /// Returns the checkpoint, for a subcommand that requires `--backbone`.
    pub fn checkpoint(&self) -> Result<&Path> {
        self.backbone.as_deref().context("--backbone is needed")
    }

    /// Returns the precision, f32 by default.
    pub fn precision(&self) -> Precision {
        self.precision.unwrap_or_default()
    }

    /// Opens the checkpoint `file`.
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

    /// Returns the arguments that give another process of this program the same flags, without
    /// `--backbone`.
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
        let given = flags.into_iter().filter_map(|(flag, value)| Some([flag.to_owned(), value?]));
        given.flatten().collect()
    }
}

/// An opened backbone.
#[derive(Clone)]
pub struct Opened {
    pub backbone: AnyBackbone,
}

impl Opened {
    /// Returns the height and width of the backbone's images in pixels.
    pub fn image_size(&self) -> (i64, i64) {
        self.backbone.preprocessing().image_size
    }

    /// Returns how a run prepares its images. With `shorter_side` an image keeps its aspect ratio
    /// and its centre is cut out; without it the image is squashed to the image size.
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

    /// Returns `flag`, or without it the normalization that the backbone was trained with.
    ///
    /// # Errors
    /// If `flag` is `None` and the mean and std of the backbone are those of no [`Normalization`].
    pub fn normalization(&self, flag: Option<Normalization>) -> Result<Normalization> {
        let preprocessing = self.backbone.preprocessing();
        flag.or_else(|| Normalization::of(preprocessing)).with_context(|| {
            format!(
                "--normalization is needed: {} says mean {:?} and std {:?}, which are not those of \
                 imagenet, half, unit or clip",
                preprocessing.source, preprocessing.mean, preprocessing.std
            )
        })
    }
}

/// Writes the bundled backbone into `folder` and returns its file. Runs use it if `--backbone` is
/// not given.
pub fn bundled_backbone(folder: &Path) -> Result<PathBuf> {
    let file = folder.join("vit_fashion_mnist.safetensors");
    std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    convpass::data::bundled::write_backbone(&file)?;
    Ok(file)
}
