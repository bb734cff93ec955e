//! The flags of a backbone, and opening a backbone with them.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use convpass::backbone::{
    ConvNeXtNorm, MlpActivation, NormPlacement, Pooling, PreprocessingSource, Resampling,
    ResizeMode,
};
use convpass::checkpoint::{LoadReport, SettingSource};
use convpass::data::Normalization;
use convpass::{AnyBackbone, OpenOptions, Precision, Preprocessing};
use tch::{Cuda, Device};

use super::Size;
use crate::processes::{is_quiet, local_rank};

/// The checkpoint, the settings that a checkpoint may lack, the precision and the device.
#[derive(Args, Clone, Default)]
pub struct BackboneFlags {
    /// Checkpoint of the frozen backbone (ViT, CLIP, DINOv2, Swin or ConvNeXt): a file, a folder
    /// that holds one, or hf:OWNER/NAME on the Hugging Face hub.
    #[arg(long, value_name = "PATH", help_heading = "Backbone")]
    pub backbone: Option<PathBuf>,
    /// Attention heads of a ViT, if the checkpoint does not say how many [default: those of its
    /// config.json, or of the known model of its width, or one for every 64 channels].
    #[arg(long, value_name = "N", help_heading = "Backbone")]
    pub heads: Option<i64>,
    /// Epsilon of the layer norms of a ViT or a ConvNeXt, if the checkpoint does not say it
    /// [default: that of its config.json, or of its family].
    #[arg(long, value_name = "EPS", help_heading = "Backbone")]
    pub eps: Option<f64>,
    /// Activation of the MLPs of a ViT, if the checkpoint does not say which [default: that of its
    /// config.json, or of its family].
    #[arg(long, value_enum, value_name = "NAME", help_heading = "Backbone")]
    pub activation: Option<ActivationFlag>,
    /// How the tokens of a ViT become its features, if the checkpoint does not say it [default: as
    /// its config.json says, or as its tensors show].
    #[arg(long, value_enum, value_name = "NAME", help_heading = "Backbone")]
    pub pooling: Option<PoolingFlag>,
    /// Whether the layer norms of a ViT are before or after its sub-layers, if the checkpoint does
    /// not say it [default: as its config.json says, or before].
    #[arg(long, value_enum, value_name = "PLACE", help_heading = "Backbone")]
    pub norm_placement: Option<NormPlacementFlag>,
    /// The norm of a ConvNeXt whose norms have no bias, if the checkpoint does not say which
    /// [default: as its config.json says, or that of the known model of its widths].
    #[arg(long, value_enum, value_name = "NAME", help_heading = "Backbone")]
    pub norm: Option<NormFlag>,
    /// Height and width of the images in pixels, one number for both or HxW; the position table is
    /// resized to it [default: those of the checkpoint].
    #[arg(long, value_name = "PIXELS", help_heading = "Backbone")]
    pub image_size: Option<Size>,
    /// Rows and columns of the windows of a Swin, one number for both or HxW, if the checkpoint does
    /// not say it or for a larger image [default: those of the checkpoint].
    #[arg(long, value_name = "PATCHES", help_heading = "Backbone")]
    pub window_size: Option<Size>,
    /// Sides of the windows in the pretraining of a Swin V2, one for each stage or one for all, if
    /// the checkpoint does not say it; 0 stands for the windows themselves [default: those of the
    /// checkpoint].
    #[arg(long, value_name = "PATCHES,..", value_delimiter = ',', help_heading = "Backbone")]
    pub pretrained_windows: Option<Vec<i64>>,
    /// Dtype of the frozen weights: f32, bf16, f16, int8, autocast-bf16 for f32 weights whose products
    /// are computed in bf16, or int8-dynamic for products in int8, which evaluate and do not train
    /// [default: f32].
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
    /// GELU with the tanh approximation, of SigLIP.
    GeluTanh,
    /// x * sigmoid(1.702 x), of OpenAI's CLIP.
    QuickGelu,
    /// max(x, 0).
    Relu,
    /// x * sigmoid(x).
    Silu,
}

/// The place of the norms.
#[derive(Clone, Copy, PartialEq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum NormPlacementFlag {
    /// Before each sub-layer, as in most models.
    Before,
    /// After each sub-layer, as in timm's vit_*_rpn_*.
    After,
}

impl From<NormPlacementFlag> for NormPlacement {
    fn from(place: NormPlacementFlag) -> Self {
        match place {
            NormPlacementFlag::Before => NormPlacement::Before,
            NormPlacementFlag::After => NormPlacement::After,
        }
    }
}

/// A norm without bias.
#[derive(Clone, Copy, PartialEq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum NormFlag {
    /// The RMS norm.
    Rms,
    /// Division by the standard deviation, which timm calls simplenorm.
    Deviation,
}

impl From<NormFlag> for ConvNeXtNorm {
    fn from(norm: NormFlag) -> Self {
        match norm {
            NormFlag::Rms => ConvNeXtNorm::Rms,
            NormFlag::Deviation => ConvNeXtNorm::Deviation,
        }
    }
}

/// A pooling of the tokens.
#[derive(Clone, Copy, PartialEq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum PoolingFlag {
    /// The class token, after the final norm.
    ClassToken,
    /// The mean of the patch tokens, after the final norm.
    Average,
    /// The mean of the patch tokens, then the final norm.
    AverageThenNorm,
    /// The class token beside the mean of the patch tokens, both after the final norm.
    ClassTokenAndAverage,
}

impl From<PoolingFlag> for Pooling {
    fn from(pooling: PoolingFlag) -> Self {
        match pooling {
            PoolingFlag::ClassToken => Pooling::ClassToken,
            PoolingFlag::Average => Pooling::Average,
            PoolingFlag::AverageThenNorm => Pooling::AverageThenNorm,
            PoolingFlag::ClassTokenAndAverage => Pooling::ClassTokenAndAverage,
        }
    }
}

impl From<ActivationFlag> for MlpActivation {
    fn from(activation: ActivationFlag) -> Self {
        match activation {
            ActivationFlag::Gelu => MlpActivation::Gelu,
            ActivationFlag::GeluTanh => MlpActivation::GeluTanh,
            ActivationFlag::Relu => MlpActivation::Relu,
            ActivationFlag::Silu => MlpActivation::Silu,
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
    /// The first GPU, or that of this process in a run of several; needs a build with the feature
    /// `cuda`.
    Cuda,
}

impl Processor {
    pub fn device(self) -> Result<Device> {
        match self {
            Processor::Cpu => Ok(Device::Cpu),
            Processor::Cuda if Cuda::is_available() => Ok(Device::Cuda(local_rank())),
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

    /// Opens the checkpoint `file`. A setting that had to be assumed is printed as a warning.
    pub fn open(&self, file: &Path) -> Result<Opened> {
        let (opened, report) = self.open_reported(file)?;
        for setting in &report.settings {
            if let (SettingSource::Assumed(_), false) = (&setting.source, is_quiet()) {
                eprintln!("convpass: {}: {setting}", file.display());
            }
        }
        Ok(opened)
    }

    /// Opens the checkpoint `file` and returns the report of its load.
    pub fn open_reported(&self, file: &Path) -> Result<(Opened, LoadReport)> {
        let options = OpenOptions {
            num_heads: self.heads,
            norm_eps: self.eps,
            activation: self.activation.map(MlpActivation::from),
            pooling: self.pooling.map(Pooling::from),
            norm_placement: self.norm_placement.map(NormPlacement::from),
            norm: self.norm.map(ConvNeXtNorm::from),
            image_size: self.image_size.map(Size::pair),
            window_size: self.window_size.map(Size::pair),
            pretrained_window_sizes: self.pretrained_windows.clone(),
            precision: self.precision,
        };
        let device = self.device.device()?;
        let (backbone, report) = AnyBackbone::open_reported(file, &options, device)?;
        Ok((Opened { backbone }, report))
    }

    /// Returns the arguments that give another process of this program the same flags, without
    /// `--backbone`.
    pub fn repeated(&self) -> Vec<String> {
        let value = |name: Option<clap::builder::PossibleValue>| {
            name.map(|value| value.get_name().to_owned())
        };
        let size = |size: Option<Size>| size.map(|size| size.to_string());
        let windows = self
            .pretrained_windows
            .as_ref()
            .map(|sides| sides.iter().map(|side| side.to_string()).collect::<Vec<_>>().join(","));
        let flags = [
            ("--heads", self.heads.map(|heads| heads.to_string())),
            ("--eps", self.eps.map(|eps| eps.to_string())),
            ("--activation", value(self.activation.and_then(|a| a.to_possible_value()))),
            ("--pooling", value(self.pooling.and_then(|pooling| pooling.to_possible_value()))),
            (
                "--norm-placement",
                value(self.norm_placement.and_then(|place| place.to_possible_value())),
            ),
            ("--norm", value(self.norm.and_then(|norm| norm.to_possible_value()))),
            ("--image-size", size(self.image_size)),
            ("--window-size", size(self.window_size)),
            ("--pretrained-windows", windows),
            ("--precision", self.precision.map(|precision| precision.to_string())),
            ("--device", value(self.device.to_possible_value())),
        ];
        let given = flags.into_iter().filter_map(|(flag, value)| Some([flag.to_owned(), value?]));
        given.flatten().collect()
    }
}

/// Help of `--backbone` where a run may tell it.
pub const OF_RUN_BACKBONE: &str = "Checkpoint of the frozen backbone: a file, or a folder that holds one [default: the one that run.json names]";
/// Help of `--image-size` where a run may tell it.
pub const OF_RUN_SIZE: &str =
    "Height and width of the images in pixels [default: those of the run]";

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
        self.resized(resize, Resampling::Bicubic).with_normalization(normalization)
    }

    /// Returns the preprocessing of the backbone with this resize. If that is not the backbone's own,
    /// its source is the caller.
    pub fn resized(&self, resize: ResizeMode, interpolation: Resampling) -> Preprocessing {
        let known = self.backbone.preprocessing().clone();
        if (known.resize, known.interpolation) == (resize, interpolation) {
            return known;
        }
        Preprocessing { resize, interpolation, source: PreprocessingSource::Caller, ..known }
    }

    /// Returns `flag`, or without it the normalization that the backbone was trained with.
    pub fn normalization(&self, flag: Option<Normalization>) -> Normalization {
        flag.unwrap_or_else(|| Normalization::of(self.backbone.preprocessing()))
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
