//! The seam: the one trait through which a method acts on a backbone.
//!
//! A backbone calls it at fixed places and knows no method; a method implements the places it
//! needs and knows no backbone.

use std::fmt::Debug;

use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::error::{Error, Result};
use crate::nn::Branch;

/// How tokens lie in a sequence `[B, P + N, C]`: prefix tokens (class, registers, prompts) first,
/// then the patches, row by row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TokenLayout {
    /// P, the number of prefix tokens.
    pub prefix: i64,
    /// Rows and columns of the patch grid; N is their product.
    pub grid: (i64, i64),
}

impl TokenLayout {
    /// N, the number of patches.
    pub fn num_patches(&self) -> i64 {
        self.grid.0.saturating_mul(self.grid.1)
    }

    /// P + N.
    pub fn num_tokens(&self) -> i64 {
        self.prefix.saturating_add(self.num_patches())
    }

    /// Checks that `tokens` is `[B, P + N, embed_dim]`.
    pub(crate) fn check(&self, tokens: &Tensor, embed_dim: i64) -> Result<()> {
        let (rows, cols) = self.grid;
        if self.prefix < 0 || rows < 0 || cols < 0 {
            return Err(Error::Input {
                argument: "layout",
                expected: "no negative number of tokens".into(),
                found: format!("{self:?}"),
            });
        }
        match tokens.size()[..] {
            [_, t, c] if t == self.num_tokens() && c == embed_dim => Ok(()),
            _ => Err(Error::Input {
                argument: "tokens",
                expected: format!(
                    "[B, {}, {embed_dim}] for {} prefix tokens and a grid of {rows}x{cols}",
                    self.num_tokens(),
                    self.prefix
                ),
                found: format!("{:?}", tokens.size()),
            }),
        }
    }
}

/// One of the two sub-layers of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SubLayer {
    /// Multi-head self-attention.
    Attention,
    /// The MLP.
    Mlp,
}

/// A sub-layer of a numbered block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Site {
    /// Index of the block, from 0.
    pub block: usize,
    /// Which of its sub-layers.
    pub sub_layer: SubLayer,
}

/// A layer with weights, as the seam names it; blocks count from 0 through the whole backbone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Layer {
    /// Images `[B, 3, H, W]` to patches `[B, N, C]`, before positions and prefix tokens join.
    PatchEmbed,
    /// The norm between the embedding and the first block.
    PreNorm,
    /// The norm of the patch merging into a stage, from 1 on: four patches side by side, `[.., 4C]`.
    MergeNorm(usize),
    /// The reduction of that patch merging: `[.., 4C]` to the width of the stage.
    Merge(usize),
    /// The norm in front of attention.
    Norm1(usize),
    /// The fused query, key and value projection: `[.., C]` to `[.., 3C]`.
    Qkv(usize),
    /// The queries' third of [`Layer::Qkv`], in a last block that computes the class token alone.
    Q(usize),
    /// The other two thirds of [`Layer::Qkv`], keys then values, in such a block: of all tokens.
    Kv(usize),
    /// The projection after attention.
    Proj(usize),
    /// The norm in front of the MLP.
    Norm2(usize),
    /// The first linear layer of the MLP.
    Fc1(usize),
    /// The second linear layer of the MLP.
    Fc2(usize),
    /// The norm before the features. Its output is `[B, C]` where one token alone is read.
    FinalNorm,
}

impl Layer {
    /// Whether this is a layer norm; the others multiply by a matrix.
    pub fn is_norm(self) -> bool {
        use Layer::*;
        matches!(self, PreNorm | MergeNorm(_) | Norm1(_) | Norm2(_) | FinalNorm)
    }
}

/// The size of a [`Layer`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LayerShape {
    /// Which layer.
    pub layer: Layer,
    /// Inputs of each output: the columns of its matrix, or the width of a norm.
    pub inputs: i64,
    /// Outputs: the rows of its matrix, or the width of a norm.
    pub outputs: i64,
    /// Whether it has a bias.
    pub bias: bool,
}

impl LayerShape {
    /// A layer that multiplies by a matrix `[outputs, inputs]`: a linear layer, the patch embedding.
    pub fn linear(layer: Layer, inputs: i64, outputs: i64, bias: bool) -> Self {
        LayerShape { layer, inputs, outputs, bias }
    }

    /// A layer norm over `dim` channels, with weight and bias.
    pub fn norm(layer: Layer, dim: i64) -> Self {
        LayerShape { layer, inputs: dim, outputs: dim, bias: true }
    }

    /// Number of weights, the bias among them where there is one.
    pub fn num_params(&self) -> i64 {
        let matrix = if self.layer.is_norm() { self.outputs } else { self.inputs * self.outputs };
        matrix + if self.bias { self.outputs } else { 0 }
    }
}

/// Something that a method acts on and not every backbone has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Place {
    /// Pre-norm blocks of attention and MLP, with every place of [`Seam`] around their layers.
    Blocks,
    /// Prefix tokens that attention reads: [`Seam::entering`] may change the layout.
    Prefix,
}

/// What a method has to know of a backbone to make its variables.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BackboneShape {
    /// What people call the family.
    pub family: &'static str,
    /// The places that it lacks, each with the reason, worded as the end of the error that a method
    /// which needs the place gets.
    pub lacks: &'static [(Place, &'static str)],
    /// Width of the tokens in each block, in order.
    pub block_dims: Vec<i64>,
    /// Every layer at which [`Seam::after_layer`] is called, in the order of the forward pass;
    /// [`Layer::Qkv`] stands for its parts too.
    pub layers: Vec<LayerShape>,
    /// Number of weights.
    pub num_params: i64,
    /// Number of weights that the features depend on. CLIP's projection, for one, comes after.
    pub num_feature_params: i64,
}

impl BackboneShape {
    /// A backbone that lacks no place, whose features depend on all of its `num_params` weights.
    pub fn new(
        family: &'static str,
        block_dims: Vec<i64>,
        layers: Vec<LayerShape>,
        num_params: i64,
    ) -> Self {
        let lacks = &[];
        let num_feature_params = num_params;
        BackboneShape { family, lacks, block_dims, layers, num_params, num_feature_params }
    }

    /// The same backbone, which lacks these places, each for the reason beside it.
    pub fn lacking(self, lacks: &'static [(Place, &'static str)]) -> Self {
        BackboneShape { lacks, ..self }
    }

    /// The same backbone, whose features depend on `num_feature_params` of its weights.
    pub fn with_feature_params(self, num_feature_params: i64) -> Self {
        BackboneShape { num_feature_params, ..self }
    }

    /// The size of `layer`, if the backbone has one.
    pub fn layer(&self, layer: Layer) -> Option<LayerShape> {
        self.layers.iter().copied().find(|shape| shape.layer == layer)
    }
}

/// A layer norm over the last dimension.
#[derive(Clone, Copy, Debug)]
pub struct NormOf<'a> {
    /// `[C]`.
    pub weight: &'a Tensor,
    /// `[C]`.
    pub bias: &'a Tensor,
    /// Added to the variance.
    pub eps: f64,
}

/// Where [`Seam::beside`] is called, and what is there to read.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Beside<'a> {
    /// Which sub-layer.
    pub site: Site,
    /// The residual stream as it entered the sub-layer, `[B, T, C]`.
    pub raw: &'a Tensor,
    /// The residual stream after the layer norm: what the sub-layer itself reads.
    pub normed: &'a Tensor,
    /// `Some(norm)` if `normed == norm(raw)`; a method that needs `normed` in backward can then
    /// recompute it from `raw` instead of saving both.
    pub norm: Option<NormOf<'a>>,
    /// How the tokens lie.
    pub layout: &'a TokenLayout,
    /// Which samples of the batch take part (drop path).
    pub branch: &'a Branch,
    /// Whether dropout is on.
    pub train: bool,
}

impl<'a> Beside<'a> {
    /// What is beside the sub-layer at `site`, for a backbone that calls [`Seam::beside`] itself
    /// ([`BlockPass::sub_layer`](crate::backbone::BlockPass::sub_layer) does it otherwise): the
    /// residual stream before and after the norm.
    pub fn new(
        site: Site,
        raw: &'a Tensor,
        normed: &'a Tensor,
        layout: &'a TokenLayout,
        branch: &'a Branch,
        train: bool,
    ) -> Self {
        Beside { site, raw, normed, norm: None, layout, branch, train }
    }
}

/// Weight and bias of a layer, for a method that can be folded into them.
#[derive(Debug)]
pub struct LayerWeights {
    /// `[out, in, ..]`, or `[out]` for a norm.
    pub weight: Tensor,
    /// `[out]`.
    pub bias: Option<Tensor>,
}

/// What a method may do to a backbone's forward pass. Every place defaults to nothing.
///
/// `layout` describes the tokens of that call. In the last block of a backbone that reads its
/// class token alone, the block passes that token alone: one prefix token and an empty grid.
pub trait Seam: Debug + Send {
    /// Entering a block: its tokens `[B, P + N, C]`. A method may add tokens at the end of the
    /// prefix and take its own away again, and says so in the layout that it returns.
    fn entering(
        &self,
        _block: usize,
        tokens: Tensor,
        layout: TokenLayout,
        _train: bool,
    ) -> Result<(Tensor, TokenLayout)> {
        Ok((tokens, layout))
    }

    /// After a linear layer or a norm: its input and its output, `[.., in]` and `[.., out]`, three
    /// dimensions but for the features' norm; [`Layer::Qkv`] may be called on windows. What it
    /// makes of a norm's output is what the sub-layer and [`Seam::beside`] read.
    fn after_layer(
        &self,
        _layer: Layer,
        _input: &Tensor,
        output: Tensor,
        _train: bool,
    ) -> Result<Tensor> {
        Ok(output)
    }

    /// In front of a sub-layer: what it alone reads, `[B', T', C]`, the kept samples' normed
    /// tokens. Attention within windows reads `[B' * windows, tokens of a window, C]`, zero where
    /// a window stands over the edge of the grid.
    fn before_sub_layer(&self, _site: Site, input: Tensor, _train: bool) -> Result<Tensor> {
        Ok(input)
    }

    /// Beside a sub-layer: adds a branch into the residual stream `[B, T, C]`, in which the
    /// sub-layer's own output is already.
    fn beside(&self, _at: &Beside, residual: Tensor) -> Result<Tensor> {
        Ok(residual)
    }

    /// Whether [`Seam::beside`] does anything at `site`; a block draws drop path for it only then.
    fn is_beside(&self, _site: Site) -> bool {
        false
    }

    /// After a sub-layer: its output `[B, T, C]`, before it joins the residual stream.
    fn after_sub_layer(
        &self,
        _site: Site,
        output: Tensor,
        _layout: &TokenLayout,
        _train: bool,
    ) -> Result<Tensor> {
        Ok(output)
    }

    /// Whether all that the method does in evaluation can be folded into the backbone's weights.
    fn can_merge(&self) -> bool {
        false
    }

    /// The weights with which `layer` alone does what it does together with the method; only
    /// called where [`Seam::can_merge`].
    fn merge(&self, _layer: Layer, weights: LayerWeights) -> Result<LayerWeights> {
        Ok(weights)
    }
}

/// The method that does nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoMethod;

impl Seam for NoMethod {
    fn can_merge(&self) -> bool {
        true
    }
}
