//! A frozen backbone of whatever family its file is of.
#![allow(dead_code, reason = "each example that shares this file uses a part of it")]

use std::path::Path;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use convpass::{
    Backbone, Error, FrozenConvNeXt, FrozenSwin, FrozenViT, MlpActivation, Normalization,
    SwinConfig, ViTConfig,
};
use tch::{Cuda, Device};

use crate::precision::Precision;

/// A backbone, the size of its images, and the normalization that its family was trained with.
pub struct Opened<B> {
    pub backbone: B,
    pub image_size: (i64, i64),
    pub normalization: Normalization,
}

/// What is done with a backbone, of whatever type it is.
pub trait Visit {
    type Output;
    fn visit<B: Backbone>(self, opened: Opened<B>) -> Result<Self::Output>;
}

/// What a backbone's file may not tell.
#[derive(Args, Clone, Copy, Default)]
pub struct Untold {
    /// Attention heads, where the checkpoint's width does not tell them.
    #[arg(long)]
    pub heads: Option<i64>,
    /// The activation of a ViT's MLPs, where the names in the file tell another: LAION's towers under Hugging Face's
    /// names are gelu.
    #[arg(long, value_enum)]
    pub activation: Option<Activation>,
    /// Image height and width; the position table is resized to it [default: that of the run at hand, else the
    /// checkpoint's].
    #[arg(long)]
    pub image_size: Option<i64>,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Activation {
    Gelu,
    QuickGelu,
}

impl Untold {
    /// The flags that say the same.
    pub fn flags(&self) -> Vec<String> {
        let activation = self.activation.map(|activation| match activation {
            Activation::Gelu => "gelu".to_owned(),
            Activation::QuickGelu => "quick_gelu".to_owned(),
        });
        let number = |number: Option<i64>| number.map(|number| number.to_string());
        let flags = [
            ("--heads", number(self.heads)),
            ("--activation", activation),
            ("--image-size", number(self.image_size)),
        ];
        let said = flags.into_iter().filter_map(|(flag, value)| Some([flag.to_owned(), value?]));
        said.flatten().collect()
    }
}

impl From<Activation> for MlpActivation {
    fn from(activation: Activation) -> Self {
        match activation {
            Activation::Gelu => MlpActivation::Gelu,
            Activation::QuickGelu => MlpActivation::QuickGelu,
        }
    }
}

/// Where a backbone is, and how it is opened.
pub struct Source<'a> {
    pub file: &'a Path,
    pub untold: Untold,
    pub processor: Processor,
    pub precision: Precision,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub enum Processor {
    Cpu,
    Cuda,
}

impl Processor {
    /// That of a flag which asks for the GPU.
    pub fn of(cuda: bool) -> Self {
        if cuda { Processor::Cuda } else { Processor::Cpu }
    }

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

impl Source<'_> {
    /// Opens the backbone for `visit`.
    pub fn open<V: Visit>(&self, visit: V) -> Result<V::Output> {
        let (file, device) = (self.file, self.processor.device()?);
        let side = self.untold.image_size.map(|side| (side, side));
        let mut vit = match ViTConfig::infer(file) {
            Err(Error::OtherBackbone { .. }) => return self.open_other(visit, device),
            config => config?,
        };
        vit.num_heads = self.untold.heads.unwrap_or(vit.num_heads);
        vit.activation = self.untold.activation.map_or(vit.activation, MlpActivation::from);
        vit.image_size = side.unwrap_or(vit.image_size);
        visit.visit(Opened {
            backbone: self.precision.convert(FrozenViT::open_with(file, &vit, device)?)?,
            image_size: vit.image_size,
            normalization: match vit.pre_norm {
                true => Normalization::Clip,
                false => Normalization::ImageNet,
            },
        })
    }

    fn open_other<V: Visit>(&self, visit: V, device: Device) -> Result<V::Output> {
        let Untold { heads, activation, image_size } = self.untold;
        let side = image_size.map(|side| (side, side));
        if heads.is_some() || activation.is_some() {
            bail!("{}: --heads and --activation are for plain ViTs", self.file.display());
        }
        let normalization = Normalization::ImageNet;
        if let Ok(mut swin) = SwinConfig::infer(self.file) {
            swin.image_size = side.unwrap_or(swin.image_size);
            let image_size = swin.image_size;
            let backbone = FrozenSwin::open_with(self.file, &swin, device)?;
            let backbone = self.precision.convert(backbone)?;
            return visit.visit(Opened { backbone, image_size, normalization });
        }
        // A convolutional network tells no size.
        let image_size = side.unwrap_or((224, 224));
        let backbone = self.precision.convert(FrozenConvNeXt::open(self.file, device)?)?;
        visit.visit(Opened { backbone, image_size, normalization })
    }
}
