//! A frozen backbone of whatever family its file is of.
#![allow(dead_code, reason = "each example that shares this file uses a part of it")]

use std::path::Path;

use anyhow::{Result, bail};
use clap::ValueEnum;
use convpass::{
    Backbone, Error, FrozenConvNeXt, FrozenSwin, FrozenViT, Normalization, SwinConfig, ViTConfig,
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

/// Where a backbone is, and what its file may not tell.
pub struct Source<'a> {
    pub file: &'a Path,
    pub heads: Option<i64>,
    pub image_size: Option<i64>,
    pub processor: Processor,
    pub precision: Precision,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub enum Processor {
    Cpu,
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

impl Source<'_> {
    /// Opens the backbone for `visit`.
    pub fn open<V: Visit>(&self, visit: V) -> Result<V::Output> {
        let (file, device) = (self.file, self.processor.device()?);
        let side = self.image_size.map(|side| (side, side));
        let mut vit = match ViTConfig::infer(file) {
            Err(Error::OtherBackbone { .. }) => return self.open_other(visit, device),
            config => config?,
        };
        vit.num_heads = self.heads.unwrap_or(vit.num_heads);
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
        let side = self.image_size.map(|side| (side, side));
        if self.heads.is_some() {
            bail!("{}: --heads is for plain ViTs", self.file.display());
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
