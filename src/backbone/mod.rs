//! Frozen backbones. Each runs the seam's places and names no method.
//!
//! # A backbone of your own
//!
//! Another crate adds a family in one of two ways.
//!
//! - Implement [`BackboneConfig`] and [`Network`] for a config. [`Frozen`] of that config is then a
//!   [`Backbone`] with random weights, weights of a file, other dtypes, int8, a digest, merging and
//!   cheap clones. This is the common way, and the example `own_backbone` is one in a file.
//! - Implement [`Backbone`] itself, for a type that holds weights in a way of its own or hands its
//!   calls on to other backbones. The latter hands on [`Backbone::merge`], [`Backbone::to_int8`] and
//!   [`Backbone::is_read`] too, which have defaults.
//!
//! Either way the code of the family is three functions: `embed` makes images into tokens, `block`
//! runs one block, and `pool` makes the last tokens into features. They call the method's places
//! through [`Hooks`] (around layers) and [`BlockPass`] (around sub-layers). `patch_map` is `pool`
//! for dense features. [`Forward`] runs them and does what the crate promises of every backbone:
//! checked images, seeds for each block, drop path by depth, recomputed blocks and kept prefixes.
//!
//! Methods find out through [`BackboneShape`] what there is to act on. A backbone in tokens, whose
//! blocks each have the two sub-layers, lists its blocks' widths and its layers there, and lacks
//! nothing. A layer that the shape lists must be run through [`Hooks`], under the same
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

pub use crate::preprocessing::{Preprocessing, PreprocessingSource, Resampling, ResizeMode};
pub use any::AnyBackbone;
pub(crate) use any::AnyFamily;
pub use clip_text::{ClipText, ClipTextConfig};
pub use convnext::{ConvNeXtConfig, FrozenConvNeXt};
pub use description::Description;
pub use forward::Forward;
pub use frozen::Frozen;
pub use hooks::{BlockPass, Hooks};
pub use network::{ImageSize, Network};
pub use precision::Precision;
pub use swin::{FrozenSwin, SwinConfig};
pub use vit::{FrozenViT, Pooling, ViTConfig};
pub use weights::{WeightSource, Weights};

use crate::error::{Error, Result};
pub use crate::nn::{
    Branch, Conv, DropPath, LayerNorm, Linear, MlpActivation, Noise, PatchEmbed, Weight,
};
use crate::seam::{BackboneShape, NoMethod, Seam, TokenLayout};

/// How a forward pass is run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pass {
    /// Whether dropout and drop path are on.
    pub train: bool,
    /// Drop path rate at the last block, linear over depth from 0; within `0..1`.
    pub drop_path: f64,
    /// Seeds dropout and drop path.
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

/// What flows from block to block.
#[derive(Debug)]
pub struct Stream {
    /// `[B, P + N, C]`; a map `[B, C, H, W]` in a convolutional network.
    pub tokens: Tensor,
    /// How the tokens lie.
    pub layout: TokenLayout,
}

impl Stream {
    /// The patch tokens as a map `[B, C, rows, cols]`, without the prefix tokens (class, registers,
    /// prompts). A map stays as it is.
    ///
    /// # Errors
    /// [`Error::Input`] if the tokens do not lie as the layout says.
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

    /// The same stream; its tokens share memory with this one's.
    pub fn shallow_clone(&self) -> Self {
        Stream { tokens: self.tokens.shallow_clone(), layout: self.layout }
    }
}

/// The shape and the choices of a backbone, without weights.
pub trait BackboneConfig: Debug {
    /// Checks that a model of this shape can exist.
    ///
    /// # Errors
    /// [`Error::Config`] with the first field that is wrong.
    fn validate(&self) -> Result<()>;

    /// What a method can act on, and how many weights there are.
    ///
    /// # Errors
    /// As [`BackboneConfig::validate`].
    fn shape(&self) -> Result<BackboneShape>;
}

/// A pretrained network that methods act on through the seam.
///
/// Its weights are plain tensors outside any `VarStore`; `Clone` shares them. [`Forward`] runs it.
/// The [module's page](self) says how another crate adds one.
pub trait Backbone: Clone + Debug + Send {
    /// Number of blocks.
    fn num_blocks(&self) -> usize;

    /// Images `[B, 3, H, W]`, checked and in [`Backbone::compute_kind`], to what enters block 0.
    ///
    /// # Errors
    /// What the layers and the method return.
    fn embed(&self, images: &Tensor, hooks: &Hooks) -> Result<Stream>;

    /// Block number `pass.block`, which exists, and what stands between it and the block before. It
    /// calls [`BlockPass::enter`] first. The stream it returns has the layout that it entered with,
    /// or that of its own stage.
    ///
    /// # Errors
    /// What the layers and the method return.
    fn block(&self, stream: Stream, pass: &BlockPass) -> Result<Stream>;

    /// What leaves the last block to features `[B, feature_dim]`.
    ///
    /// # Errors
    /// What the layers and the method return.
    fn pool(&self, stream: Stream, hooks: &Hooks) -> Result<Tensor>;

    /// All tokens that leave the last block to dense features `[B, C, rows, cols]`: the final norm,
    /// and then [`Stream::patches`].
    ///
    /// # Errors
    /// What the layers and the method return.
    fn patch_map(&self, stream: Stream, hooks: &Hooks) -> Result<Tensor>;

    /// Width of the features.
    fn feature_dim(&self) -> i64;

    /// The images that it accepts.
    fn image_size(&self) -> ImageSize;

    /// The layers that a method can act on.
    fn shape(&self) -> BackboneShape;

    /// Every weight under its name, in a fixed order.
    fn named_weights(&self) -> &[(String, Tensor)];

    /// The same backbone over the tensors that `replace` gives for its own, by name.
    ///
    /// # Errors
    /// What `replace` returns; [`Error::Input`] if a tensor does not fit in the other's place: of
    /// another shape, without floating-point numbers, or on another device than the rest.
    fn map_weights(&self, replace: &mut dyn FnMut(&str, &Tensor) -> Result<Tensor>)
    -> Result<Self>;

    /// What the forward pass does with the weights, as far as their shapes do not tell (the family,
    /// heads, eps, activation, pooling, image size), in words that never change: it goes into
    /// [`Backbone::digest`].
    fn choices(&self) -> String;

    /// Images `[B, 3, H, W]` to dense features `[B, C, rows, cols]`: the patch tokens after the
    /// last block and the final norm, without prefix tokens; the last map of a ConvNeXt.
    /// [`Forward::forward_patches`] does it with a method.
    ///
    /// # Errors
    /// [`Error::Input`] if the images do not fit; what the layers return.
    fn patch_features(&self, images: &Tensor) -> Result<Tensor> {
        self.forward_patches(images, &NoMethod, Pass::default())
    }

    /// What leaves each of the chosen blocks, which count from 0, for images `[B, 3, H, W]`: all
    /// tokens, before the final norm, in the order of `blocks`. [`Stream::patches`] makes a map of
    /// them, and [`Forward::forward_intermediate`] does it with a method.
    ///
    /// # Errors
    /// [`Error::Config`] for a number that no block has; [`Error::Input`] if the images do not fit.
    fn intermediate(&self, images: &Tensor, blocks: &[usize]) -> Result<Vec<Stream>> {
        self.forward_intermediate(images, blocks, &NoMethod, Pass::default())
    }

    /// Checks that images are `[B, 3, H, W]` of [`Backbone::image_size`], in f32 or the weights'
    /// dtype, and on their device.
    ///
    /// # Errors
    /// [`Error::Input`] if they are not.
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

    /// A backbone that alone does what this one does in evaluation with a `method` that can be
    /// merged ([`Seam::can_merge`]). It shares every weight that does not change.
    ///
    /// # Errors
    /// [`Error::Config`] for a backbone that methods cannot be folded into, which is what this
    /// function returns if it is not implemented.
    fn merge(&self, _method: &dyn Seam) -> Result<Self> {
        let family = self.shape().family;
        Err(Error::config("backbone", "one that a method can be folded into", family))
    }

    /// SHA-256 over every frozen byte and over what the forward pass does with them
    /// ([`Backbone::choices`]), in hex. An adapter file knows its backbone by it.
    ///
    /// # Errors
    /// [`Error::Torch`] if a weight cannot be read.
    fn digest(&self) -> Result<String> {
        digest::digest(&self.choices(), self.named_weights())
    }

    /// Where the weights are.
    fn device(&self) -> Device {
        self.named_weights().first().map_or(Device::Cpu, |(_, weight)| weight.device())
    }

    /// The dtype of the weights, or of those that are not in int8.
    fn kind(&self) -> Kind {
        self.named_weights().first().map_or(Kind::Float, |(_, weight)| weight.kind())
    }

    /// The dtype that a pass computes in, and that trained weights are cast to for it. It is the
    /// dtype of the weights, but f32 beside weights in f16 on a CPU, where products in f16 take ten
    /// times as long. A backbone that computes in f16 there returns f16 here.
    fn compute_kind(&self) -> Kind {
        match (self.kind(), self.device()) {
            (Kind::Half, Device::Cpu) => Kind::Float,
            (kind, _) => kind,
        }
    }

    /// The same backbone with weights in `kind`: f32, bf16, f16 or f64. In bf16 and f16 it needs
    /// half the memory; trained weights beside it stay f32. The digest changes.
    /// [`Backbone::compute_kind`] says what a pass computes in.
    ///
    /// # Errors
    /// [`Error::Config`] for any other kind.
    fn to_kind(&self, kind: Kind) -> Result<Self> {
        match kind {
            Kind::Float | Kind::BFloat16 | Kind::Half | Kind::Double => {
                let mut previous = Kind::Float;
                self.map_weights(&mut |_, weight| {
                    // A weight in int8 stays, and so does its scale, which comes next.
                    let stays = [weight.kind(), previous].contains(&Kind::Int8);
                    previous = weight.kind();
                    Ok(if stays { weight.shallow_clone() } else { weight.f_to_kind(kind)? })
                })
            }
            _ => Err(Error::config("kind", "f32, bf16, f16 or f64", format!("{kind:?}"))),
        }
    }

    /// The same backbone with the weights of its linear layers in int8, rounded to the nearest of
    /// 255 values a row (`NAME.scale` holds their factors): a quarter of the memory of f32. A pass
    /// computes in [`Backbone::compute_kind`], and trained weights beside it stay f32. The digest
    /// changes.
    ///
    /// # Errors
    /// [`Error::Config`] for a backbone without such a form. A direct implementation of this trait
    /// has none unless it implements this function.
    fn to_int8(&self) -> Result<Self> {
        Err(Error::config("kind", "f32, bf16, f16 or f64", "int8"))
    }

    /// Whether any weight is in int8.
    fn is_int8(&self) -> bool {
        self.named_weights().iter().any(|(_, weight)| weight.kind() == Kind::Int8)
    }

    /// Whether the features depend on the weight of that name.
    fn is_read(&self, _name: &str) -> bool {
        true
    }

    /// What the backbone is called, for messages and for adapter files.
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

    /// Number of weights.
    fn num_params(&self) -> usize {
        self.named_weights().iter().map(|(_, weight)| weight.numel()).sum()
    }
}

/// Width between the layers of an MLP beside tokens of width `dim`, rounded down. A ratio that was
/// itself rounded from two whole widths gives the width that it came from.
fn hidden(dim: i64, ratio: f64) -> i64 {
    (dim as f64 * ratio + 1e-6) as i64
}

/// The stage of a block and its number within the stage, for stages of these depths.
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

/// Number of blocks of stages of these depths.
fn total(depths: &[i64]) -> usize {
    depths.iter().filter_map(|&depth| usize::try_from(depth).ok()).fold(0, usize::saturating_add)
}
