//! [`Network`]: a family of backbones as a config that layers can be made from.

use std::fmt::Debug;

use tch::Tensor;

use super::hooks::{BlockPass, Hooks};
use super::weights::Weights;
use super::{BackboneConfig, Stream};
use crate::error::Result;
use crate::seam::Layer;

/// Which heights and widths of images a backbone accepts, in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ImageSize {
    /// This height and width alone.
    Fixed(i64, i64),
    /// Every height and width of at least this many pixels.
    From(i64),
}

impl ImageSize {
    /// Whether images of this height and width are accepted.
    pub fn accepts(self, (height, width): (i64, i64)) -> bool {
        match self {
            ImageSize::Fixed(h, w) => (height, width) == (h, w),
            ImageSize::From(side) => height >= side && width >= side,
        }
    }

    /// The shape of a batch, for errors.
    pub(super) fn describe(self) -> String {
        match self {
            ImageSize::Fixed(height, width) => format!("[B, 3, {height}, {width}]"),
            ImageSize::From(side) => format!("[B, 3, H, W] with H and W from {side} on"),
        }
    }
}

/// A family of backbones: a config that layers can be made from, and the forward pass over them.
///
/// Implement it for a config of your own, and [`Frozen`](super::Frozen) of that config is a
/// [`Backbone`](super::Backbone) with everything that a backbone does: random weights, weights of a
/// file, other dtypes, int8, digests, merging, cheap clones. The example `own_backbone` is one in
/// a file.
///
/// The functions are only called with the layers of the same config, which is a valid one.
pub trait Network: BackboneConfig + Clone + Send {
    /// What people call the family.
    const FAMILY: &'static str;

    /// The layers over their weights: [`Linear`](super::Linear), [`LayerNorm`](super::LayerNorm)
    /// and the like, whose `Clone` shares the weights.
    type Layers: Clone + Debug + Send;

    /// Makes the layers of a valid config from the weights under their names.
    ///
    /// They are as many as the shape says (`num_params`), or the backbone is not built. The same
    /// config asks for the same names and shapes in the same order, always: it is the
    /// order of [`Backbone::named_weights`](super::Backbone::named_weights) and of the digest.
    ///
    /// # Errors
    /// What `weights` returns.
    fn layers(&self, weights: &mut Weights) -> Result<Self::Layers>;

    /// Number of blocks.
    fn num_blocks(&self) -> usize;

    /// See [`Backbone::embed`](super::Backbone::embed).
    ///
    /// # Errors
    /// What the layers and the method return.
    fn embed(&self, layers: &Self::Layers, images: &Tensor, hooks: &Hooks) -> Result<Stream>;

    /// See [`Backbone::block`](super::Backbone::block).
    ///
    /// # Errors
    /// What the layers and the method return.
    fn block(&self, layers: &Self::Layers, stream: Stream, pass: &BlockPass) -> Result<Stream>;

    /// See [`Backbone::pool`](super::Backbone::pool).
    ///
    /// # Errors
    /// What the layers and the method return.
    fn pool(&self, layers: &Self::Layers, stream: Stream, hooks: &Hooks) -> Result<Tensor>;

    /// See [`Backbone::patch_map`](super::Backbone::patch_map).
    ///
    /// # Errors
    /// What the layers and the method return.
    fn patch_map(&self, layers: &Self::Layers, stream: Stream, hooks: &Hooks) -> Result<Tensor>;

    /// Width of the features.
    fn feature_dim(&self) -> i64;

    /// The images that it accepts.
    fn image_size(&self) -> ImageSize;

    /// The name in front of `.weight` and `.bias` of a layer that the shape lists. Methods are
    /// folded into these weights; where a listed layer has no name,
    /// [`Backbone::merge`](super::Backbone::merge) is an error.
    fn layer_name(&self, _layer: Layer) -> Option<String> {
        None
    }

    /// Says that `layer`, and those like it, has a bias from here on: one that a method adds when
    /// it is folded in. A config whose layers all have a bias has nothing to do.
    fn add_bias(&mut self, _layer: Layer) {}

    /// See [`Backbone::is_read`](super::Backbone::is_read).
    fn is_read(&self, _name: &str) -> bool {
        true
    }

    /// See [`Backbone::choices`](super::Backbone::choices).
    fn choices(&self) -> String;
}
