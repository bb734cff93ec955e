//! Opening a backbone of whatever family its checkpoint is.

use std::path::Path;

use tch::Device;

use super::{TensorFile, beside};
use crate::backbone::{
    AnyBackbone, AnyFamily, FrozenConvNeXt, FrozenSwin, FrozenViT, MlpActivation, Network, Pooling,
    Precision, Preprocessing, PreprocessingSource, ResizeMode, SwinConfig, ViTConfig,
};
use crate::error::{Error, Result};

/// What the caller says about a checkpoint; the checkpoint tells the rest.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OpenOptions {
    /// Attention heads of a ViT.
    pub num_heads: Option<i64>,
    /// The activation of a ViT's MLPs.
    pub activation: Option<MlpActivation>,
    /// Which tokens of a ViT become its features.
    pub pooling: Option<Pooling>,
    /// Height and width of the images in pixels. A position table is resized to it.
    pub image_size: Option<(i64, i64)>,
    /// The precision of the weights; f32 if it is `None`.
    pub precision: Option<Precision>,
}

impl AnyBackbone {
    /// Opens a checkpoint on `device`, in f32: a file, a folder that holds one (with Hugging Face's
    /// or timm's `config.json`, or without), or an index of shards. The family, the layout of the
    /// names and the container are recognized by content.
    ///
    /// # Errors
    /// As [`TensorFile::open`]; [`Error::UnknownFormat`] if the tensors are named as by no family
    /// that is supported; [`Error::MissingTensor`], [`Error::ShapeMismatch`] and
    /// [`Error::UnexpectedTensors`] with the names in the file; [`Error::FileField`] if a file beside
    /// the weights has a field that is not supported.
    pub fn open(source: impl AsRef<Path>, device: Device) -> Result<Self> {
        Self::open_with(source, &OpenOptions::default(), device)
    }

    /// Opens a checkpoint as [`AnyBackbone::open`] does, with what the caller says about it.
    ///
    /// # Errors
    /// As [`AnyBackbone::open`]; [`Error::Config`] if an option does not apply to the checkpoint's
    /// family, or gives no model.
    pub fn open_with(
        source: impl AsRef<Path>,
        options: &OpenOptions,
        device: Device,
    ) -> Result<Self> {
        let source = source.as_ref();
        let family = match ViTConfig::infer(source) {
            Ok(told) => open_vit(source, told, options, device)?,
            Err(Error::OtherBackbone { found, .. }) if found == SwinConfig::FAMILY => {
                open_swin(source, options, device)?
            }
            Err(Error::OtherBackbone { .. }) => open_conv_next(source, options, device)?,
            Err(error) => return Err(error),
        };
        let precision = options.precision.unwrap_or_default();
        let family = match family {
            AnyFamily::ViT(vit) => AnyFamily::ViT(precision.convert(vit)?),
            AnyFamily::Swin(swin) => AnyFamily::Swin(precision.convert(swin)?),
            AnyFamily::ConvNeXt(net) => AnyFamily::ConvNeXt(precision.convert(net)?),
        };
        let preprocessing = preprocessing(source, &family, options)?;
        let file = source.file_name().map(|name| name.to_string_lossy().into_owned());
        Ok(AnyBackbone::new(family, preprocessing, precision, file))
    }
}

fn open_vit(
    source: &Path,
    mut config: ViTConfig,
    options: &OpenOptions,
    device: Device,
) -> Result<AnyFamily> {
    config.num_heads = options.num_heads.unwrap_or(config.num_heads);
    config.activation = options.activation.unwrap_or(config.activation);
    config.pooling = options.pooling.unwrap_or(config.pooling);
    config.image_size = options.image_size.unwrap_or(config.image_size);
    FrozenViT::open_with(source, &config, device).map(AnyFamily::ViT)
}

fn open_swin(source: &Path, options: &OpenOptions, device: Device) -> Result<AnyFamily> {
    options.refuse_for_vit("Swin")?;
    let mut config = SwinConfig::infer(source)?;
    config.image_size = options.image_size.unwrap_or(config.image_size);
    FrozenSwin::open_with(source, &config, device).map(AnyFamily::Swin)
}

fn open_conv_next(source: &Path, options: &OpenOptions, device: Device) -> Result<AnyFamily> {
    options.refuse_for_vit("ConvNeXt")?;
    FrozenConvNeXt::open(source, device).map(AnyFamily::ConvNeXt)
}

impl OpenOptions {
    /// Refuses what can be said about a ViT alone.
    fn refuse_for_vit(&self, family: &str) -> Result<()> {
        let said = [
            ("num_heads", self.num_heads.map(|heads| heads.to_string())),
            ("activation", self.activation.map(|activation| format!("{activation:?}"))),
            ("pooling", self.pooling.map(|pooling| format!("{pooling:?}"))),
        ];
        match said.into_iter().find_map(|(field, value)| Some((field, value?))) {
            Some((field, value)) => {
                let expected = format!("absent for a {family}, whose file tells it");
                Err(Error::config(field, expected, value).in_config("OpenOptions"))
            }
            None => Ok(()),
        }
    }
}

/// The preprocessing that the files beside the weights give, else the family's usual one, at the
/// caller's image size.
fn preprocessing(
    source: &Path,
    family: &AnyFamily,
    options: &OpenOptions,
) -> Result<Preprocessing> {
    let usual = family.usual_preprocessing();
    let checkpoint = TensorFile::open(source)?.path().to_path_buf();
    let mut found = beside::preprocessing(&checkpoint, &usual)?.unwrap_or(usual);
    if let (AnyFamily::ConvNeXt(_), Some(size)) = (family, options.image_size) {
        let side = |(height, width): (i64, i64)| height.min(width).max(1) as f64;
        if let ResizeMode::CenterCrop { shorter_side } = &mut found.resize {
            let grown = side(size) / side(found.image_size);
            *shorter_side = (*shorter_side as f64 * grown).round() as i64;
        }
        found.image_size = size;
        found.source = PreprocessingSource::Caller;
    }
    Ok(found)
}
