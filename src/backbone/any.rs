//! [`AnyBackbone`]: a backbone whose family is known when a program runs.

use std::sync::Arc;

use tch::{Device, Kind, Tensor};

use super::{
    Backbone, BlockPass, Description, Forward, FrozenConvNeXt, FrozenSwin, FrozenViT, Hooks,
    ImageSize, Orientation, Pass, Precision, Preprocessing, PreprocessingSource, Resampling,
    ResizeMode, Stream,
};
use crate::error::Result;
use crate::preprocessing::{CLIP, HALF, IMAGENET};
use crate::seam::{BackboneShape, NoMethod, Seam};

/// The usual image side for a network that accepts images of any size.
const USUAL_SIDE: i64 = 224;

/// A frozen backbone of any family, with the preprocessing that it was trained with.
///
/// [`AnyBackbone::open`](#method.open) opens a checkpoint. `Clone` shares the weights.
#[derive(Clone, Debug)]
pub struct AnyBackbone {
    family: AnyFamily,
    preprocessing: Arc<Preprocessing>,
    precision: Precision,
    /// File name of the checkpoint.
    file: Option<String>,
}

/// A backbone of one of the supported families.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "a program holds few backbones")]
pub(crate) enum AnyFamily {
    ViT(FrozenViT),
    Swin(FrozenSwin),
    ConvNeXt(FrozenConvNeXt),
}

/// Evaluates an expression on the backbone of any family.
macro_rules! each {
    ($family:expr, $backbone:ident => $value:expr) => {
        match $family {
            AnyFamily::ViT($backbone) => $value,
            AnyFamily::Swin($backbone) => $value,
            AnyFamily::ConvNeXt($backbone) => $value,
        }
    };
}

/// Makes a backbone of the same family from a fallible expression.
macro_rules! map_each {
    ($family:expr, $backbone:ident => $value:expr) => {
        match $family {
            AnyFamily::ViT($backbone) => $value.map(AnyFamily::ViT),
            AnyFamily::Swin($backbone) => $value.map(AnyFamily::Swin),
            AnyFamily::ConvNeXt($backbone) => $value.map(AnyFamily::ConvNeXt),
        }
    };
}

impl AnyFamily {
    /// Returns the usual preprocessing of this family. Images are squashed to the size that the
    /// backbone accepts. A ViT with attention pooling (SigLIP, Perception Encoder) uses 0.5 for mean
    /// and standard deviation, one with a norm before its blocks and EVA-02 those of CLIP; every other backbone uses those of ImageNet.
    pub(crate) fn usual_preprocessing(&self) -> Preprocessing {
        let (name, image_size, (mean, std)) = match self {
            AnyFamily::ViT(vit) if vit.config().patch_norm => {
                ("AIMv2", vit.config().image_size, CLIP)
            }
            AnyFamily::ViT(vit) if vit.config().relative_bias => {
                ("BEiT", vit.config().image_size, HALF)
            }
            AnyFamily::ViT(vit) if vit.config().attention_pool.is_some() => {
                ("ViT with attention pooling", vit.config().image_size, HALF)
            }
            AnyFamily::ViT(vit) if vit.config().pre_norm => {
                ("CLIP tower", vit.config().image_size, CLIP)
            }
            AnyFamily::ViT(vit) if vit.config().rotary.is_some() && vit.config().pos_embed => {
                ("EVA-02", vit.config().image_size, CLIP)
            }
            AnyFamily::ViT(vit) => ("ViT", vit.config().image_size, IMAGENET),
            AnyFamily::Swin(swin) => ("Swin", swin.config().image_size, IMAGENET),
            AnyFamily::ConvNeXt(_) => ("ConvNeXt", (USUAL_SIDE, USUAL_SIDE), IMAGENET),
        };
        Preprocessing {
            image_size,
            resize: ResizeMode::Squash,
            interpolation: Resampling::Bicubic,
            mean,
            std,
            orientation: Orientation::default(),
            source: PreprocessingSource::Family(name.to_owned()),
        }
    }
}

impl AnyBackbone {
    pub(crate) fn new(
        family: AnyFamily,
        preprocessing: Preprocessing,
        precision: Precision,
        file: Option<String>,
    ) -> Self {
        AnyBackbone { family, preprocessing: Arc::new(preprocessing), precision, file }
    }

    /// Returns the name of the family: `ViT`, `Swin` or `ConvNeXt`.
    pub fn family(&self) -> &'static str {
        self.shape().family
    }

    /// Returns the preprocessing of the images: size, resize, interpolation, mean and standard
    /// deviation. [`Preprocessing::source`] gives their origin.
    pub fn preprocessing(&self) -> &Preprocessing {
        &self.preprocessing
    }

    /// Returns the precision of the weights and of the products with them. Passes must run under
    /// [`Precision::guard`] with [`Precision::AutocastBf16`] and [`Precision::Int8Dynamic`].
    pub fn precision(&self) -> Precision {
        match self.precision {
            opened if opened.needs_guard() => opened,
            opened => Precision::of_weights(self).unwrap_or(opened),
        }
    }

    /// Computes features `[B, C]` of images `[B, 3, H, W]`, pooled according to the config, in the
    /// precision that was chosen when the backbone was opened.
    ///
    /// # Errors
    /// [`Error::Input`](crate::Error::Input) if the images do not fit the backbone.
    pub fn features(&self, images: &Tensor) -> Result<Tensor> {
        let _guard = self.precision.guard(self.device())?;
        self.forward(images, &NoMethod, Pass::default())
    }

    /// Computes dense features `[B, C, rows, cols]` of images `[B, 3, H, W]`: the patch tokens
    /// after the final norm. For a ConvNeXt it is the last map.
    ///
    /// # Errors
    /// [`Error::Input`](crate::Error::Input) if the images do not fit the backbone.
    pub fn patch_features(&self, images: &Tensor) -> Result<Tensor> {
        Backbone::patch_features(self, images)
    }

    /// Returns the backbone as a ViT; `None` if it is of another family.
    pub fn as_vit(&self) -> Option<&FrozenViT> {
        match &self.family {
            AnyFamily::ViT(vit) => Some(vit),
            _ => None,
        }
    }

    /// Returns the backbone as a Swin; `None` if it is of another family.
    pub fn as_swin(&self) -> Option<&FrozenSwin> {
        match &self.family {
            AnyFamily::Swin(swin) => Some(swin),
            _ => None,
        }
    }

    /// Returns the backbone as a ConvNeXt; `None` if it is of another family.
    pub fn as_conv_next(&self) -> Option<&FrozenConvNeXt> {
        match &self.family {
            AnyFamily::ConvNeXt(conv_next) => Some(conv_next),
            _ => None,
        }
    }

    /// Returns a copy of this value with another backbone of the same family.
    fn with(&self, family: AnyFamily) -> Self {
        AnyBackbone { family, ..self.clone() }
    }
}

impl From<AnyFamily> for AnyBackbone {
    fn from(family: AnyFamily) -> Self {
        let preprocessing = family.usual_preprocessing();
        let precision = each!(&family, backbone => Precision::of_weights(backbone));
        AnyBackbone::new(family, preprocessing, precision.unwrap_or_default(), None)
    }
}

impl From<FrozenViT> for AnyBackbone {
    fn from(vit: FrozenViT) -> Self {
        AnyFamily::ViT(vit).into()
    }
}

impl From<FrozenSwin> for AnyBackbone {
    fn from(swin: FrozenSwin) -> Self {
        AnyFamily::Swin(swin).into()
    }
}

impl From<FrozenConvNeXt> for AnyBackbone {
    fn from(conv_next: FrozenConvNeXt) -> Self {
        AnyFamily::ConvNeXt(conv_next).into()
    }
}

impl Backbone for AnyBackbone {
    fn num_blocks(&self) -> usize {
        each!(&self.family, backbone => backbone.num_blocks())
    }

    fn embed(&self, images: &Tensor, hooks: &Hooks) -> Result<Stream> {
        each!(&self.family, backbone => backbone.embed(images, hooks))
    }

    fn block(&self, stream: Stream, pass: &BlockPass) -> Result<Stream> {
        each!(&self.family, backbone => backbone.block(stream, pass))
    }

    fn pool(&self, stream: Stream, hooks: &Hooks) -> Result<Tensor> {
        each!(&self.family, backbone => backbone.pool(stream, hooks))
    }

    fn patch_map(&self, stream: Stream, hooks: &Hooks) -> Result<Tensor> {
        each!(&self.family, backbone => backbone.patch_map(stream, hooks))
    }

    fn image_size(&self) -> ImageSize {
        each!(&self.family, backbone => Backbone::image_size(backbone))
    }

    fn choices(&self) -> String {
        each!(&self.family, backbone => Backbone::choices(backbone))
    }

    fn feature_dim(&self) -> i64 {
        each!(&self.family, backbone => backbone.feature_dim())
    }

    fn shape(&self) -> BackboneShape {
        each!(&self.family, backbone => backbone.shape())
    }

    fn named_weights(&self) -> &[(String, Tensor)] {
        each!(&self.family, backbone => backbone.named_weights())
    }

    fn map_weights(
        &self,
        replace: &mut dyn FnMut(&str, &Tensor) -> Result<Tensor>,
    ) -> Result<Self> {
        let family = map_each!(&self.family, backbone => backbone.map_weights(replace))?;
        Ok(self.with(family))
    }

    fn merge(&self, method: &dyn Seam) -> Result<Self> {
        let family = map_each!(&self.family, backbone => backbone.merge(method))?;
        Ok(self.with(family))
    }

    fn digest(&self) -> Result<String> {
        each!(&self.family, backbone => Backbone::digest(backbone))
    }

    fn device(&self) -> Device {
        each!(&self.family, backbone => backbone.device())
    }

    fn compute_kind(&self) -> Kind {
        each!(&self.family, backbone => backbone.compute_kind())
    }

    fn to_int8(&self) -> Result<Self> {
        let family = map_each!(&self.family, backbone => backbone.to_int8())?;
        Ok(self.with(family))
    }

    fn is_read(&self, name: &str) -> bool {
        each!(&self.family, backbone => backbone.is_read(name))
    }

    fn describe(&self) -> Description {
        Description {
            file: self.file.clone(),
            precision: Some(self.precision()),
            preprocessing: Some((*self.preprocessing).clone()),
            ..each!(&self.family, backbone => backbone.describe())
        }
    }
}
