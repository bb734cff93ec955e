//! [`Network`]: a family of backbones, implemented by its config.

use std::fmt::Debug;

use tch::Tensor;

use super::hooks::{BlockPass, Hooks};
use super::weights::Weights;
use super::{BackboneConfig, Stream};
use crate::error::Result;
use crate::seam::Layer;

/// The image sizes that a backbone accepts, in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ImageSize {
    /// Only this height and width.
    Fixed(i64, i64),
    /// Every height and width of at least this many pixels.
    From(i64),
}

impl ImageSize {
    /// Returns whether images of this height and width are accepted.
    pub fn accepts(self, (height, width): (i64, i64)) -> bool {
        match self {
            ImageSize::Fixed(h, w) => (height, width) == (h, w),
            ImageSize::From(side) => height >= side && width >= side,
        }
    }

    /// Describes the shape of a batch for error messages.
    pub(super) fn describe(self) -> String {
        match self {
            ImageSize::Fixed(height, width) => format!("[B, 3, {height}, {width}]"),
            ImageSize::From(side) => format!("[B, 3, H, W] with H and W from {side} on"),
        }
    }
}

/// A family of backbones: its config creates the layers and runs the forward pass over them.
///
/// If you implement it for a config of your own, [`Frozen`](super::Frozen) of that config is a
/// [`Backbone`](super::Backbone) with all features: random weights, weights from a file, other
/// dtypes, int8, digests, merging, cheap clones. The example `own_backbone` shows one in a single
/// file.
///
/// The functions are only called on a valid config, with the layers of the same config.
pub trait Network: BackboneConfig + Clone + Send {
    /// Name of the family.
    const FAMILY: &'static str;

    /// The layers with their weights: [`Linear`](super::Linear), [`Norm`](super::Norm)
    /// and the like, whose `Clone` shares the weights.
    type Layers: Clone + Debug + Send;

    /// Creates the layers of a valid config. They get their weights by name from `weights`.
    ///
    /// The number of weights must equal `num_params` of the shape; otherwise building the backbone
    /// fails. The same config must always request the same names and shapes in the same order. This
    /// is the order of [`Backbone::named_weights`](super::Backbone::named_weights) and of the
    /// digest.
    ///
    /// # Errors
    /// The errors of `weights`.
    fn layers(&self, weights: &mut Weights) -> Result<Self::Layers>;

    /// Returns the number of blocks.
    fn num_blocks(&self) -> usize;

    /// See [`Backbone::embed`](super::Backbone::embed).
    ///
    /// # Errors
    /// The errors of the layers and of the method.
    fn embed(&self, layers: &Self::Layers, images: &Tensor, hooks: &Hooks) -> Result<Stream>;

    /// See [`Backbone::block`](super::Backbone::block).
    ///
    /// The frozen layers draw no random numbers of their own: only then do kept prefixes and features
    /// that are computed once equal those of a whole pass. Drop path is drawn by `pass`.
    ///
    /// # Errors
    /// The errors of the layers and of the method.
    fn block(&self, layers: &Self::Layers, stream: Stream, pass: &BlockPass) -> Result<Stream>;

    /// See [`Backbone::pool`](super::Backbone::pool).
    ///
    /// # Errors
    /// The errors of the layers and of the method.
    fn pool(&self, layers: &Self::Layers, stream: Stream, hooks: &Hooks) -> Result<Tensor>;

    /// See [`Backbone::patch_map`](super::Backbone::patch_map).
    ///
    /// # Errors
    /// The errors of the layers and of the method.
    fn patch_map(&self, layers: &Self::Layers, stream: Stream, hooks: &Hooks) -> Result<Tensor>;

    /// Returns the width of the features.
    fn feature_dim(&self) -> i64;

    /// Returns the image sizes that the backbone accepts.
    fn image_size(&self) -> ImageSize;

    /// Returns the name before `.weight` and `.bias` of a layer that the shape lists. Methods are
    /// folded into these weights. [`Backbone::merge`](super::Backbone::merge) returns an error if a
    /// listed layer has no name.
    fn layer_name(&self, _layer: Layer) -> Option<String> {
        None
    }

    /// Records that `layer` and the same layer of other blocks have a bias, which a method added
    /// when it was folded in. A config whose layers all have a bias does not need to implement it.
    fn add_bias(&mut self, _layer: Layer) {}

    /// See [`Backbone::is_read`](super::Backbone::is_read).
    fn is_read(&self, _name: &str) -> bool {
        true
    }

    /// See [`Backbone::choices`](super::Backbone::choices).
    fn choices(&self) -> String;
}
