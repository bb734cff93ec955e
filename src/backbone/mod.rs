//! Frozen backbones. Each runs the seam's places and names no method.

mod any;
mod block;
mod clip_text;
mod convnext;
mod description;
mod digest;
mod frozen;
mod merge;
mod precision;
mod preprocessing;
mod swin;
mod vit;
mod weights;

use std::fmt::Debug;

use tch::{Device, Kind, Tensor};

pub use any::AnyBackbone;
pub(crate) use any::AnyFamily;
pub use clip_text::{ClipText, ClipTextConfig};
pub use convnext::{ConvNeXtConfig, FrozenConvNeXt};
pub use description::Description;
pub use frozen::{Frozen, Network};
pub use precision::Precision;
pub use preprocessing::{Preprocessing, PreprocessingSource, Resampling, ResizeMode};
pub use swin::{FrozenSwin, SwinConfig};
pub use vit::{FrozenViT, Pooling, ViTConfig};

use crate::error::{Error, Result};
pub use crate::nn::MlpActivation;
use crate::nn::Noise;
use crate::seam::{BackboneShape, Seam, TokenLayout};

/// How a forward pass is run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pass {
    /// Whether dropout and drop path are on.
    pub train: bool,
    /// Drop path rate at the last block, linear over depth from 0.
    pub drop_path: f64,
    /// Seeds dropout and drop path.
    pub noise: Noise,
}

/// What flows from block to block.
#[derive(Debug)]
pub struct Stream {
    /// `[B, P + N, C]`; a map `[B, C, H, W]` in a convolutional network.
    pub tokens: Tensor,
    /// How the tokens lie.
    pub layout: TokenLayout,
}

/// The shape and the choices of a backbone, without weights.
pub trait BackboneConfig: Debug {
    /// Checks that a model of this shape can exist.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) with the first field that is wrong.
    fn validate(&self) -> Result<()>;

    /// The layers of a valid config that a method can act on.
    fn shape(&self) -> BackboneShape;
}

/// A pretrained network that methods act on through the seam.
///
/// Its weights are plain tensors outside any `VarStore`; `Clone` shares them.
pub trait Backbone: Clone + Debug + Send {
    /// Images `[B, 3, H, W]` to features `[B, feature_dim]`, with `method` at its places.
    ///
    /// # Errors
    /// [`Error::Input`] if the images do not fit.
    fn forward(&self, images: &Tensor, method: &dyn Seam, pass: Pass) -> Result<Tensor> {
        self.forward_from(0, self.embed(images, method, pass)?, method, pass)
    }

    /// The rest of [`Backbone::forward`], from what enters a block on.
    ///
    /// # Errors
    /// What libtorch says.
    fn forward_from(
        &self,
        block: usize,
        stream: Stream,
        method: &dyn Seam,
        pass: Pass,
    ) -> Result<Tensor> {
        let stream = (block..self.num_blocks())
            .try_fold(stream, |stream, block| self.run_block(block, stream, method, pass))?;
        self.pool(stream, method, pass)
    }

    /// Number of blocks.
    fn num_blocks(&self) -> usize;

    /// The first part of [`Backbone::forward`]: images to what enters block 0.
    ///
    /// # Errors
    /// [`Error::Input`] if the images do not fit.
    fn embed(&self, images: &Tensor, method: &dyn Seam, pass: Pass) -> Result<Stream>;

    /// One block of it, and what stands between that and the one before. In training it starts
    /// libtorch's generator anew, from `pass.noise` and the block's number.
    ///
    /// # Errors
    /// What libtorch says.
    fn run_block(
        &self,
        block: usize,
        stream: Stream,
        method: &dyn Seam,
        pass: Pass,
    ) -> Result<Stream>;

    /// The last part of it: what leaves the last block to features.
    ///
    /// # Errors
    /// What libtorch says.
    fn pool(&self, stream: Stream, method: &dyn Seam, pass: Pass) -> Result<Tensor>;

    /// Width of the features.
    fn feature_dim(&self) -> i64;

    /// The layers that a method can act on.
    fn shape(&self) -> BackboneShape;

    /// Every weight under its name, in a fixed order.
    fn named_weights(&self) -> &[(String, Tensor)];

    /// The same backbone over the tensors that `replace` gives for its own, by name.
    fn map_weights(&self, replace: &mut dyn FnMut(&str, &Tensor) -> Result<Tensor>)
    -> Result<Self>;

    /// A backbone that alone does what this one does in evaluation with a `method` that can be
    /// merged ([`Seam::can_merge`]). It shares every weight that does not change.
    fn merge(&self, method: &dyn Seam) -> Result<Self>;

    /// SHA-256 over every frozen byte and over what the forward pass does with them, in hex.
    fn digest(&self) -> Result<String>;

    /// Where the weights are.
    fn device(&self) -> Device;

    /// The kind of the weights, those in int8 apart.
    fn kind(&self) -> Kind {
        self.named_weights().first().map_or(Kind::Float, |(_, weight)| weight.kind())
    }

    /// The kind that a pass computes in, and takes what is trained in: that of the weights, but f32
    /// beside weights in f16 on a CPU, where products in f16 take ten times as long. A backbone that
    /// computes in its weights' kind all the same says so here.
    fn compute_kind(&self) -> Kind {
        match (self.kind(), self.device()) {
            (Kind::Half, Device::Cpu) => Kind::Float,
            (kind, _) => kind,
        }
    }

    /// The same backbone with weights of `kind`: f32, bf16, f16 or f64. In bf16 and f16 it takes
    /// half the memory; what is trained beside it stays f32. The digest is another one. For what a
    /// pass computes in see [`Backbone::compute_kind`].
    ///
    /// # Errors
    /// [`Error::Config`] for any other kind.
    fn to_kind(&self, kind: Kind) -> Result<Self> {
        match kind {
            Kind::Float | Kind::BFloat16 | Kind::Half | Kind::Double => {
                let mut previous = Kind::Float;
                self.map_weights(&mut |_, weight| {
                    // What is in int8 stays, and so does its scale, which comes next.
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
    /// computes in [`Backbone::compute_kind`], and what is trained beside it stays f32. The digest is
    /// another one.
    ///
    /// # Errors
    /// [`Error::Config`] for a backbone that has no such form, as another crate's may have none.
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
        Description {
            family: self.shape().family.to_owned(),
            num_params: self.num_params(),
            precision: Precision::of_weights(self),
            ..Description::default()
        }
    }

    /// Number of weights.
    fn num_params(&self) -> usize {
        self.named_weights().iter().map(|(_, weight)| weight.numel()).sum()
    }
}

/// Width between the layers of an MLP beside tokens of width `dim`: what is not whole is cut off, a
/// ratio of two whole widths, which may be rounded, apart.
fn hidden(dim: i64, ratio: f64) -> i64 {
    (dim as f64 * ratio + 1e-6) as i64
}

/// The stage of a block and its number within, for stages of these depths; the block is one of
/// theirs.
fn locate(depths: &[i64], block: usize) -> (usize, usize) {
    let (mut stage, mut within) = (0, block);
    while within >= depths[stage] as usize {
        within -= depths[stage] as usize;
        stage += 1;
    }
    (stage, within)
}
