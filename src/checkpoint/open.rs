//! Opens a backbone of any family.

use std::path::Path;

use tch::Device;

use super::choice::Unsettled;
use super::folder::checkpoint_in;
use super::load::infer_unsettled;
use super::{LoadReport, beside};
use crate::backbone::{
    AnyBackbone, AnyFamily, ConvNeXtConfig, ConvNeXtNorm, FrozenConvNeXt, FrozenSwin, FrozenViT,
    MlpActivation, Network, NormPlacement, Pooling, Precision, Preprocessing, PreprocessingSource,
    ResizeMode, SwinConfig, ViTConfig,
};
use crate::error::{Error, Result};

/// Settings of the caller for opening a checkpoint. The checkpoint determines each value that is
/// `None`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OpenOptions {
    /// Number of attention heads of a ViT.
    pub num_heads: Option<i64>,
    /// Epsilon of the layer norms of a ViT or a ConvNeXt.
    pub norm_eps: Option<f64>,
    /// Activation of the MLPs of a ViT or a ConvNeXt.
    pub activation: Option<MlpActivation>,
    /// How the tokens of a ViT become its features.
    pub pooling: Option<Pooling>,
    /// Whether the layer norms of a ViT are before or after its sub-layers.
    pub norm_placement: Option<NormPlacement>,
    /// The norm of a ConvNeXt whose norms have no bias.
    pub norm: Option<ConvNeXtNorm>,
    /// Height and width of the images in pixels. The position table is resized to fit.
    pub image_size: Option<(i64, i64)>,
    /// Rows and columns of the windows of every stage of a Swin.
    pub window_size: Option<(i64, i64)>,
    /// Sides of the square windows in the pretraining of a Swin V2, one for each stage or one for
    /// all. Zero stands for a window that is the same as now.
    pub pretrained_window_sizes: Option<Vec<i64>>,
    /// Precision of the weights; f32 if `None`.
    pub precision: Option<Precision>,
}

impl AnyBackbone {
    /// Opens a checkpoint on `device`, in f32. `source` is a file, a folder that holds one
    /// checkpoint, or an index of shards. A `config.json` of Hugging Face or timm and an
    /// `open_clip_config.json` beside the weights are read if they exist. The content determines
    /// the family, the naming scheme and the container.
    ///
    /// # Errors
    /// The errors of [`TensorFile::open`](crate::checkpoint::TensorFile::open);
    /// [`Error::UnknownFormat`] if the tensor names match no supported family; [`Error::MissingTensor`], [`Error::ShapeMismatch`] and
    /// [`Error::UnexpectedTensors`], which use the names in the file; [`Error::FileField`] if a
    /// field of a file beside the weights is not supported; [`Error::Unsettled`] if nothing tells a
    /// setting, although models with different values exist; [`Error::NotFinite`] if a weight is
    /// NaN or infinite.
    pub fn open(source: impl AsRef<Path>, device: Device) -> Result<Self> {
        Self::open_with(source, &OpenOptions::default(), device)
    }

    /// Opens a checkpoint as [`AnyBackbone::open`] does, with the settings of the caller.
    ///
    /// # Errors
    /// The errors of [`AnyBackbone::open`]; [`Error::Config`] if an option does not apply to the
    /// family of the checkpoint, or makes the config invalid.
    pub fn open_with(
        source: impl AsRef<Path>,
        options: &OpenOptions,
        device: Device,
    ) -> Result<Self> {
        Ok(Self::open_reported(source, options, device)?.0)
    }

    /// Opens a checkpoint as [`AnyBackbone::open_with`] does. The report says for each tensor of
    /// the file whether it was applied or skipped, and for each setting that no tensor shows where
    /// its value comes from.
    ///
    /// # Errors
    /// The errors of [`AnyBackbone::open_with`].
    pub fn open_reported(
        source: impl AsRef<Path>,
        options: &OpenOptions,
        device: Device,
    ) -> Result<(Self, LoadReport)> {
        let source = source.as_ref();
        let (family, report) = match infer_unsettled(source) {
            Ok((told, unsettled)) => open_vit(source, told, &unsettled, options, device)?,
            Err(Error::OtherBackbone { found, .. }) if found == SwinConfig::FAMILY => {
                open_swin(source, options, device)?
            }
            Err(Error::OtherBackbone { found, .. }) if found == ConvNeXtConfig::FAMILY => {
                open_conv_next(source, options, device)?
            }
            Err(Error::OtherBackbone { file, found, .. }) => {
                return Err(Error::OtherBackbone { file, expected: "backbone of images", found });
            }
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
        Ok((AnyBackbone::new(family, preprocessing, precision, file), report))
    }
}

fn open_vit(
    source: &Path,
    mut config: ViTConfig,
    unsettled: &[Unsettled],
    options: &OpenOptions,
    device: Device,
) -> Result<(AnyFamily, LoadReport)> {
    options.refuse("ViT", &["window_size", "pretrained_window_sizes", "norm"])?;
    options.settle(unsettled, source)?;
    config.num_heads = options.num_heads.unwrap_or(config.num_heads);
    config.norm_eps = options.norm_eps.unwrap_or(config.norm_eps);
    config.activation = options.activation.unwrap_or(config.activation);
    config.pooling = options.pooling.unwrap_or(config.pooling);
    config.norm_placement = options.norm_placement.unwrap_or(config.norm_placement);
    config.image_size = options.image_size.unwrap_or(config.image_size);
    let (vit, report) = FrozenViT::open_reported(source, Some(&config), device)?;
    Ok((AnyFamily::ViT(vit), report))
}

fn open_swin(
    source: &Path,
    options: &OpenOptions,
    device: Device,
) -> Result<(AnyFamily, LoadReport)> {
    let others = ["num_heads", "norm_eps", "activation", "pooling", "norm_placement", "norm"];
    options.refuse("Swin", &others)?;
    let (mut config, unsettled) = infer_unsettled::<SwinConfig>(source)?;
    options.settle(&unsettled, source)?;
    config.image_size = options.image_size.unwrap_or(config.image_size);
    if let Some(window) = options.window_size {
        config.window_sizes.fill(window);
    }
    match (&mut config.continuous_bias, &options.pretrained_window_sizes) {
        (Some(bias), Some(sides)) => {
            bias.pretrained_window_sizes = match sides[..] {
                [side] => vec![(side, side); config.depths.len()],
                _ => sides.iter().map(|&side| (side, side)).collect(),
            };
        }
        (None, Some(_)) => options.refuse("Swin of version 1", &["pretrained_window_sizes"])?,
        (_, None) => {}
    }
    // Windows that neither the file nor the caller tells are an error of opening without a config.
    let told = !config.window_sizes.contains(&(0, 0));
    let (swin, report) = FrozenSwin::open_reported(source, told.then_some(&config), device)?;
    Ok((AnyFamily::Swin(swin), report))
}

fn open_conv_next(
    source: &Path,
    options: &OpenOptions,
    device: Device,
) -> Result<(AnyFamily, LoadReport)> {
    let others =
        ["num_heads", "pooling", "norm_placement", "window_size", "pretrained_window_sizes"];
    options.refuse("ConvNeXt", &others)?;
    let (mut config, unsettled) = infer_unsettled::<ConvNeXtConfig>(source)?;
    options.settle(&unsettled, source)?;
    if config.norm == ConvNeXtNorm::Layer {
        options.refuse("ConvNeXt whose norms have biases", &["norm"])?;
    }
    config.norm = options.norm.unwrap_or(config.norm);
    config.norm_eps = options.norm_eps.unwrap_or(config.norm_eps);
    config.activation = options.activation.unwrap_or(config.activation);
    let (net, report) = FrozenConvNeXt::open_reported(source, Some(&config), device)?;
    Ok((AnyFamily::ConvNeXt(net), report))
}

impl OpenOptions {
    /// Returns the options that are given, each with its value.
    fn given(&self) -> impl Iterator<Item = (&'static str, String)> {
        let window = self.window_size.map(|window| format!("{window:?}"));
        let pretrained = self.pretrained_window_sizes.as_ref().map(|sides| format!("{sides:?}"));
        let options = [
            ("window_size", window),
            ("pretrained_window_sizes", pretrained),
            ("norm_placement", self.norm_placement.map(|place| format!("{place:?}"))),
            ("norm", self.norm.map(|norm| format!("{norm:?}"))),
            ("image_size", self.image_size.map(|size| format!("{size:?}"))),
            ("num_heads", self.num_heads.map(|heads| heads.to_string())),
            ("norm_eps", self.norm_eps.map(|eps| eps.to_string())),
            ("activation", self.activation.map(|activation| format!("{activation:?}"))),
            ("image_size", self.image_size.map(|size| format!("{size:?}"))),
            ("pooling", self.pooling.map(|pooling| format!("{pooling:?}"))),
        ];
        options.into_iter().filter_map(|(field, value)| Some((field, value?)))
    }

    /// Returns whether the option `field` is given.
    fn give(&self, field: &str) -> bool {
        self.given().any(|(given, _)| given == field)
    }

    /// Checks that the options give each setting that nothing else tells.
    ///
    /// # Errors
    /// [`Error::Unsettled`] for the first setting that they do not give.
    fn settle(&self, unsettled: &[Unsettled], source: &Path) -> Result<()> {
        match unsettled.iter().find(|setting| !self.give(setting.field)) {
            Some(unsettled) => Err(unsettled.error(&checkpoint_in(source)?)),
            None => Ok(()),
        }
    }

    /// Refuses the options `fields`, which do not apply to a backbone of `family`.
    fn refuse(&self, family: &str, fields: &[&str]) -> Result<()> {
        match self.given().find(|(field, _)| fields.contains(field)) {
            Some((field, value)) => {
                let expected = format!("`None` for a {family}, whose checkpoint determines it");
                Err(Error::config(field, expected, value).in_config("OpenOptions"))
            }
            None => Ok(()),
        }
    }
}

/// Returns the preprocessing that the files beside the weights state, or else the usual one of the
/// family. It uses the image size of the caller.
fn preprocessing(
    source: &Path,
    family: &AnyFamily,
    options: &OpenOptions,
) -> Result<Preprocessing> {
    let usual = family.usual_preprocessing();
    let mut found = beside::preprocessing(&checkpoint_in(source)?, &usual)?.unwrap_or(usual);
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
