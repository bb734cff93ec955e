//! Frozen backbones. Each calls the places of a method and depends on no particular method.
//!
//! # A backbone of your own
//!
//! Another crate adds a family in one of two ways.
//!
//! - Implement [`BackboneConfig`] and [`Network`] for a config. [`Frozen`] of that config is then a
//!   [`Backbone`] with random weights, weights from a file, other dtypes, int8, a digest, merging
//!   and cheap clones. This is the common way; the example `own_backbone` shows it in one file.
//! - Implement [`Backbone`] itself, for a type that stores its weights differently or delegates to
//!   other backbones. A type that delegates must also delegate [`Backbone::merge`],
//!   [`Backbone::to_int8`] and [`Backbone::is_read`], which have defaults.
//!
//! In both cases the code of the family is three functions: `embed` turns images into tokens,
//! `block` runs one block, and `pool` turns the last tokens into features. They call the method
//! through [`Hooks`] (around layers) and [`BlockPass`] (around sub-layers). `patch_map` is the
//! counterpart of `pool` for dense features. [`Forward`] runs these functions and adds what every
//! backbone has: checked images, seeds for each block, drop path by depth, recomputed blocks and
//! reusable prefixes.
//!
//! A method learns from [`BackboneShape`] what it can act on. A backbone of tokens whose blocks
//! have both sub-layers lists the widths of its blocks and its layers there, and its list `lacks`
//! is empty. Every layer that the shape lists must be run through [`Hooks`] with the same
//! [`Layer`](crate::seam::Layer).

mod any;
mod block;
mod clip_text;
mod convnext;
mod description;
mod digest;
mod forward;
mod frozen;
mod hooks;
mod merge;
mod network;
mod precision;
mod swin;
mod vit;
mod weights;

use std::fmt::Debug;

use tch::{Device, Kind, Tensor};

pub use crate::preprocessing::{
    Orientation, Preprocessing, PreprocessingSource, Resampling, ResizeMode,
};
pub use any::AnyBackbone;
pub(crate) use any::AnyFamily;
pub use clip_text::{ClipText, ClipTextConfig};
pub use convnext::{ConvNeXtConfig, ConvNeXtNorm, ConvNeXtStem, FrozenConvNeXt};
pub use description::Description;
pub use forward::Forward;
pub use frozen::Frozen;
pub use hooks::{BlockPass, Hooks};
pub use network::{ImageSize, Network};
pub use precision::{Precision, PrecisionGuard};
pub(crate) use swin::MASK_SCORE;
pub use swin::{ContinuousBiasConfig, FrozenSwin, SwinConfig};
pub use vit::{AttentionPooling, FrozenViT, Pooling, ViTConfig};
pub use weights::{WeightSource, Weights};

use crate::error::{Error, Result};
pub use crate::nn::{
    Branch, Conv, DropPath, Linear, MlpActivation, Noise, Norm, NormPlacement, PatchEmbed, Rotary,
    RotaryCoordinates, RotaryPairs, Weight,
};
use crate::seam::{BackboneShape, NoMethod, Seam, TokenLayout};

/// The settings of a forward pass.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pass {
    /// Whether dropout and drop path are on.
    pub train: bool,
    /// Drop path rate at the last block, within `0..1`. It grows linearly with depth from 0.
    pub drop_path: f64,
    /// The seed of dropout and drop path.
    pub noise: Noise,
}

impl Pass {
    fn validate(&self) -> Result<()> {
        if (0.0..1.0).contains(&self.drop_path) {
            return Ok(());
        }
        Err(Error::config("drop_path", "within 0..1", self.drop_path))
    }
}

/// The input or the output of a block.
#[derive(Debug)]
pub struct Stream {
    /// Tokens `[B, P + N, C]`; a map `[B, C, H, W]` in a convolutional network.
    pub tokens: Tensor,
    /// The layout of the tokens.
    pub layout: TokenLayout,
}

impl Stream {
    /// Returns the patch tokens as a map `[B, C, rows, cols]`, without the prefix tokens (class,
    /// registers, prompts). A map is returned unchanged.
    ///
    /// # Errors
    /// [`Error::Input`] if the tokens do not match the layout.
    pub fn patches(&self) -> Result<Tensor> {
        let size = self.tokens.size();
        if size.len() == 4 {
            return Ok(self.tokens.shallow_clone());
        }
        self.layout.check(&self.tokens, size.get(2).copied().unwrap_or_default())?;
        let TokenLayout { prefix, grid: (rows, cols) } = self.layout;
        let patches = self.tokens.f_narrow(1, prefix, self.layout.num_patches())?;
        // [B, N, C] -> [B, C, N] -> [B, C, rows, cols]
        Ok(patches.f_transpose(1, 2)?.f_reshape([size[0], size[2], rows, cols])?)
    }

    /// Returns the same stream. Its tokens share memory with those of this one.
    pub fn shallow_clone(&self) -> Self {
        Stream { tokens: self.tokens.shallow_clone(), layout: self.layout }
    }
}

/// The shape and the settings of a backbone, without weights.
pub trait BackboneConfig: Debug {
    /// Checks that the config is valid.
    ///
    /// # Errors
    /// [`Error::Config`] for the first invalid field.
    fn validate(&self) -> Result<()>;

    /// Returns the layers that a method can act on and the number of weights.
    ///
    /// # Errors
    /// The errors of [`BackboneConfig::validate`].
    fn shape(&self) -> Result<BackboneShape>;
}

/// A pretrained network that a method can act on.
///
/// Its weights are plain tensors outside any `VarStore`; `Clone` shares them. [`Forward`] runs it.
/// The [documentation of the module](self) explains how another crate adds a backbone.
pub trait Backbone: Clone + Debug + Send {
    /// Returns the number of blocks.
    fn num_blocks(&self) -> usize;

    /// Computes the input of block 0 from images `[B, 3, H, W]`. The images have been checked and
    /// are in [`Backbone::compute_kind`].
    ///
    /// # Errors
    /// The errors of the layers and of the method.
    fn embed(&self, images: &Tensor, hooks: &Hooks) -> Result<Stream>;

    /// Runs block `pass.block`, which exists, and any layers between it and the block before. It
    /// must call [`BlockPass::enter`] first. The returned stream has the layout of the entered
    /// stream or of the block's own stage.
    ///
    /// # Errors
    /// The errors of the layers and of the method.
    fn block(&self, stream: Stream, pass: &BlockPass) -> Result<Stream>;

    /// Computes features `[B, feature_dim]` from the output of the last block.
    ///
    /// # Errors
    /// The errors of the layers and of the method.
    fn pool(&self, stream: Stream, hooks: &Hooks) -> Result<Tensor>;

    /// Computes dense features `[B, C, rows, cols]` from all tokens of the last block: the final
    /// norm, then [`Stream::patches`].
    ///
    /// # Errors
    /// The errors of the layers and of the method.
    fn patch_map(&self, stream: Stream, hooks: &Hooks) -> Result<Tensor>;

    /// Returns the width of the features.
    fn feature_dim(&self) -> i64;

    /// Returns the image sizes that the backbone accepts.
    fn image_size(&self) -> ImageSize;

    /// Returns the layers that a method can act on.
    fn shape(&self) -> BackboneShape;

    /// Returns all weights with their names, in a fixed order.
    fn named_weights(&self) -> &[(String, Tensor)];

    /// Returns the same backbone over other weights: `replace` returns a tensor for each name and
    /// weight.
    ///
    /// # Errors
    /// The errors of `replace`; [`Error::Input`] if a tensor has another shape, is not floating
    /// point, or is on another device than the others.
    fn map_weights(&self, replace: &mut dyn FnMut(&str, &Tensor) -> Result<Tensor>)
    -> Result<Self>;

    /// Describes the settings of the forward pass that the shapes of the weights do not show
    /// (family, heads, eps, activation, pooling, image size). The text must never change, because
    /// it is a part of [`Backbone::digest`].
    fn choices(&self) -> String;

    /// Computes dense features `[B, C, rows, cols]` of images `[B, 3, H, W]`: the patch tokens
    /// after the last block and the final norm, without prefix tokens. For a ConvNeXt it is the
    /// last map. [`Forward::forward_patches`] does the same with a method.
    ///
    /// # Errors
    /// [`Error::Input`] if the images do not fit; the errors of the layers.
    fn patch_features(&self, images: &Tensor) -> Result<Tensor> {
        self.forward_patches(images, &NoMethod, Pass::default())
    }

    /// Returns the outputs of the blocks `blocks` for images `[B, 3, H, W]`: all tokens, before the
    /// final norm, in the order of `blocks`. Blocks count from 0. [`Stream::patches`] makes a map
    /// of them. [`Forward::forward_intermediate`] does the same with a method.
    ///
    /// # Errors
    /// [`Error::Config`] if there is no block with one of these numbers; [`Error::Input`] if the
    /// images do not fit.
    fn intermediate(&self, images: &Tensor, blocks: &[usize]) -> Result<Vec<Stream>> {
        self.forward_intermediate(images, blocks, &NoMethod, Pass::default())
    }

    /// Checks that images are `[B, 3, H, W]` with [`Backbone::image_size`], in f32 or the dtype of
    /// the weights, and on the device of the weights.
    ///
    /// # Errors
    /// [`Error::Input`] if the check fails.
    fn check_images(&self, images: &Tensor) -> Result<()> {
        let (size, kind, device) = (self.image_size(), self.kind(), self.device());
        if !images.defined() {
            let (expected, found) = (size.describe(), "no tensor".to_owned());
            return Err(Error::Input { argument: "images", expected, found });
        }
        let shape_fits = matches!(images.size()[..], [_, 3, h, w] if size.accepts((h, w)));
        let kind_fits = [kind, Kind::Float].contains(&images.kind());
        if shape_fits && kind_fits && images.device() == device {
            return Ok(());
        }
        let found = format!("{:?} {:?} on {:?}", images.size(), images.kind(), images.device());
        let expected = format!("{} {kind:?} on {device:?}", size.describe());
        Err(Error::Input { argument: "images", expected, found })
    }

    /// Returns a backbone that alone computes in evaluation mode what this one computes with
    /// `method`, which must be mergeable ([`Seam::can_merge`]). It shares every weight that does
    /// not change.
    ///
    /// # Errors
    /// [`Error::Config`] if methods cannot be folded into this backbone. The default implementation
    /// always returns this error.
    fn merge(&self, _method: &dyn Seam) -> Result<Self> {
        let family = self.shape().family;
        Err(Error::config("backbone", "one that a method can be folded into", family))
    }

    /// Returns the SHA-256, in hex, of all frozen weights and of the settings of the forward pass
    /// ([`Backbone::choices`]). An adapter file identifies its backbone by it.
    ///
    /// # Errors
    /// [`Error::Torch`] if a weight cannot be read.
    fn digest(&self) -> Result<String> {
        digest::digest(&self.choices(), self.named_weights())
    }

    /// Returns the device of the weights.
    fn device(&self) -> Device {
        self.named_weights().first().map_or(Device::Cpu, |(_, weight)| weight.device())
    }

    /// Returns the dtype of the weights; in an int8 backbone, that of the weights that are not
    /// int8.
    fn kind(&self) -> Kind {
        self.named_weights().first().map_or(Kind::Float, |(_, weight)| weight.kind())
    }

    /// Returns the dtype that a pass computes in. Trained weights are cast to it. It is the dtype
    /// of the weights, except for f16 on a CPU: there it is f32, because products in f16 take ten
    /// times as long. A backbone that does compute in f16 on a CPU must return f16 here.
    fn compute_kind(&self) -> Kind {
        match (self.kind(), self.device()) {
            (Kind::Half, Device::Cpu) => Kind::Float,
            (kind, _) => kind,
        }
    }

    /// Returns the same backbone with weights in the dtype `kind`: f32, bf16, f16 or f64. In bf16
    /// and f16 it needs half the memory; trained weights stay f32. The digest changes. A pass
    /// computes in [`Backbone::compute_kind`].
    ///
    /// # Errors
    /// [`Error::Config`] for any other dtype.
    fn to_kind(&self, kind: Kind) -> Result<Self> {
        match kind {
            Kind::Float | Kind::BFloat16 | Kind::Half | Kind::Double => {
                let mut previous = Kind::Float;
                self.map_weights(&mut |_, weight| {
                    // A weight in int8 stays int8, and so its scale, which comes next, stays
                    // unchanged.
                    let stays = [weight.kind(), previous].contains(&Kind::Int8);
                    previous = weight.kind();
                    Ok(if stays { weight.shallow_clone() } else { weight.f_to_kind(kind)? })
                })
            }
            _ => Err(Error::config("kind", "f32, bf16, f16 or f64", format!("{kind:?}"))),
        }
    }

    /// Returns the same backbone with the weights of its linear layers in int8. Each row is rounded
    /// to the nearest of 255 values, and `NAME.scale` holds the factors of the rows. It needs a
    /// quarter of the memory of f32. A pass computes in [`Backbone::compute_kind`], and trained
    /// weights stay f32. The digest changes.
    ///
    /// # Errors
    /// [`Error::Config`] if the backbone does not support int8. The default implementation always
    /// returns this error.
    fn to_int8(&self) -> Result<Self> {
        Err(Error::config("kind", "f32, bf16, f16 or f64", "int8"))
    }

    /// Returns whether any weight is in int8.
    fn is_int8(&self) -> bool {
        self.named_weights().iter().any(|(_, weight)| weight.kind() == Kind::Int8)
    }

    /// Returns whether the features depend on the weight with this name.
    fn is_read(&self, _name: &str) -> bool {
        true
    }

    /// Returns a description of the backbone for messages and adapter files.
    fn describe(&self) -> Description {
        let image_size = match self.image_size() {
            ImageSize::Fixed(height, width) => Some((height, width)),
            ImageSize::From(_) => None,
        };
        Description {
            family: self.shape().family.to_owned(),
            num_params: self.num_params(),
            image_size,
            precision: Precision::of_weights(self),
            ..Description::default()
        }
    }

    /// Returns the number of weights.
    fn num_params(&self) -> usize {
        self.named_weights().iter().map(|(_, weight)| weight.numel()).sum()
    }
}

/// Returns `dim * ratio` rounded down: the width between the layers of an MLP over tokens of width
/// `dim`. A ratio that is the rounded quotient of two integers gives the original width.
fn hidden(dim: i64, ratio: f64) -> i64 {
    (dim as f64 * ratio + 1e-6) as i64
}

/// Returns the stage of a block and its number within the stage. `depths` are the numbers of blocks
/// of the stages.
fn locate(depths: &[i64], block: usize) -> Result<(usize, usize)> {
    let mut within = block;
    for (stage, &depth) in depths.iter().enumerate() {
        match within.checked_sub(usize::try_from(depth).unwrap_or_default()) {
            Some(rest) => within = rest,
            None => return Ok((stage, within)),
        }
    }
    Err(Error::config("block", format!("below {}", total(depths)), block))
}

/// Returns the number of blocks of all stages.
fn total(depths: &[i64]) -> usize {
    depths.iter().filter_map(|&depth| usize::try_from(depth).ok()).fold(0, usize::saturating_add)
}
