//! The seam: the trait [`Seam`], through which a method acts on a backbone.
//!
//! A backbone calls the seam at fixed places and does not know the method. A method implements the
//! places that it needs and does not know the backbone.

use std::fmt::Debug;

use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::error::{Error, Result};
use crate::nn::Branch;

/// The order of tokens in a sequence `[B, P + N, C]`: first the prefix tokens (class, registers,
/// prompts), then the patches, row by row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TokenLayout {
    /// P, the number of prefix tokens.
    pub prefix: i64,
    /// Rows and columns of the patch grid; N is their product.
    pub grid: (i64, i64),
}

impl TokenLayout {
    /// Returns N, the number of patches.
    pub fn num_patches(&self) -> i64 {
        self.grid.0.saturating_mul(self.grid.1)
    }

    /// Returns P + N, the number of tokens.
    pub fn num_tokens(&self) -> i64 {
        self.prefix.saturating_add(self.num_patches())
    }

    /// Checks that `tokens` is `[B, P + N, embed_dim]`.
    pub(crate) fn check(&self, tokens: &Tensor, embed_dim: i64) -> Result<()> {
        let (rows, cols) = self.grid;
        if self.prefix < 0 || rows < 0 || cols < 0 {
            return Err(Error::Input {
                argument: "layout",
                expected: "no negative size".into(),
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

/// One sub-layer of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Site {
    /// Index of the block, from 0.
    pub block: usize,
    /// The sub-layer within the block.
    pub sub_layer: SubLayer,
}

/// A layer with weights. Blocks count from 0 through the whole backbone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Layer {
    /// The patch embedding, from images `[B, 3, H, W]` to patches `[B, N, C]`, before position
    /// embeddings and prefix tokens are added.
    PatchEmbed,
    /// The norm between the embedding and the first block.
    PreNorm,
    /// The norm of the patch merging at the start of a stage, from stage 1 on: before the linear
    /// layer, where its input `[.., 4C]` holds the channels of four patches, or after it.
    MergeNorm(usize),
    /// The linear layer of that patch merging: `[.., 4C]` to the embedding dim of the stage.
    Merge(usize),
    /// The norm of the attention sub-layer: before it, or after it in a post-norm block.
    Norm1(usize),
    /// The fused query, key and value projection: `[.., C]` to `[.., 3C]`.
    Qkv(usize),
    /// The query third of [`Layer::Qkv`], in a last block that computes only the class token.
    Q(usize),
    /// The key and value thirds of [`Layer::Qkv`] in such a block, keys first, for all tokens.
    Kv(usize),
    /// The projection after attention.
    Proj(usize),
    /// The norm of the MLP sub-layer: before it, or after it in a post-norm block.
    Norm2(usize),
    /// The first linear layer of the MLP.
    Fc1(usize),
    /// The second linear layer of the MLP.
    Fc2(usize),
    /// The norm before the features. Its output is `[B, C]` if the backbone reads only one token.
    FinalNorm,
}

impl Layer {
    /// Returns whether this layer is a layer norm. Every other layer multiplies by a matrix.
    pub fn is_norm(self) -> bool {
        use Layer::*;
        matches!(self, PreNorm | MergeNorm(_) | Norm1(_) | Norm2(_) | FinalNorm)
    }
}

/// The size of a [`Layer`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LayerShape {
    /// The layer.
    pub layer: Layer,
    /// Number of inputs of each output: the columns of the matrix, or the width of a norm.
    pub inputs: i64,
    /// Number of outputs: the rows of the matrix, or the width of a norm.
    pub outputs: i64,
    /// Whether the layer has a bias.
    pub bias: bool,
}

impl LayerShape {
    /// Describes a layer that multiplies by a matrix `[outputs, inputs]`, such as a linear layer or
    /// the patch embedding.
    pub fn linear(layer: Layer, inputs: i64, outputs: i64, bias: bool) -> Self {
        LayerShape { layer, inputs, outputs, bias }
    }

    /// Describes a layer norm over `dim` channels, with weight and bias.
    pub fn norm(layer: Layer, dim: i64) -> Self {
        LayerShape { layer, inputs: dim, outputs: dim, bias: true }
    }

    /// Returns the number of weights, including the bias if the layer has one.
    pub fn num_params(&self) -> i64 {
        let matrix = if self.layer.is_norm() { self.outputs } else { self.inputs * self.outputs };
        matrix + if self.bias { self.outputs } else { 0 }
    }
}

/// A part of a backbone that some methods need and some backbones do not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Place {
    /// Blocks of attention and MLP that call every place of [`Seam`] around their layers.
    Blocks,
    /// Prefix tokens that attention reads. [`Seam::entering`] may change the layout.
    Prefix,
}

/// The properties of a backbone from which a method creates its variables.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BackboneShape {
    /// The usual name of the backbone family.
    pub family: &'static str,
    /// The places that the backbone does not have, each with a reason. The reason is the end of the
    /// error message for a method that needs the place.
    pub lacks: &'static [(Place, &'static str)],
    /// Embedding dim of each block, in order.
    pub block_dims: Vec<i64>,
    /// Every layer at which the backbone calls [`Seam::after_layer`], in the order of the forward
    /// pass. [`Layer::Qkv`] also stands for its parts. A bias or a norm that is not listed cannot be
    /// trained by BitFit or by the layer norm method.
    pub layers: Vec<LayerShape>,
    /// Number of biases that the features depend on and that belong to no layer of `layers`, such as
    /// those of an attention pooling. Only methods that train weights of the backbone itself act on
    /// them.
    pub other_biases: i64,
    /// Number of weights of norms, biases included, that the features depend on and that belong to
    /// no layer of `layers`.
    pub other_norms: i64,
    /// Number of weights.
    pub num_params: i64,
    /// Number of weights that the features depend on. For example, CLIP's projection comes after
    /// the features.
    pub num_feature_params: i64,
}

impl BackboneShape {
    /// Creates the shape of a backbone that has every place and whose features depend on all of its
    /// `num_params` weights.
    pub fn new(
        family: &'static str,
        block_dims: Vec<i64>,
        layers: Vec<LayerShape>,
        num_params: i64,
    ) -> Self {
        let lacks = &[];
        let num_feature_params = num_params;
        BackboneShape {
            family,
            lacks,
            block_dims,
            layers,
            other_biases: 0,
            other_norms: 0,
            num_params,
            num_feature_params,
        }
    }

    /// Returns the shape without the places in `lacks`, each with its reason.
    pub fn lacking(self, lacks: &'static [(Place, &'static str)]) -> Self {
        BackboneShape { lacks, ..self }
    }

    /// Returns the shape with `num_feature_params` weights that the features depend on.
    pub fn with_feature_params(self, num_feature_params: i64) -> Self {
        BackboneShape { num_feature_params, ..self }
    }

    /// Returns the size of `layer`, or `None` if the backbone does not have this layer.
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

/// The arguments of [`Seam::beside`].
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Beside<'a> {
    /// The sub-layer.
    pub site: Site,
    /// The residual stream before the sub-layer, `[B, T, C]`.
    pub raw: &'a Tensor,
    /// The input of the sub-layer: the norm of `raw`, or `raw` itself in a post-norm block.
    pub normed: &'a Tensor,
    /// `Some(norm)` if `normed == norm(raw)`; a method that needs `normed` in backward can then
    /// recompute it from `raw` instead of saving both.
    pub norm: Option<NormOf<'a>>,
    /// The order of the tokens.
    pub layout: &'a TokenLayout,
    /// The samples of the batch that the branch is computed for (drop path).
    pub branch: &'a Branch,
    /// Whether dropout is on.
    pub train: bool,
}

impl<'a> Beside<'a> {
    /// Creates the arguments from the residual stream before (`raw`) and after (`normed`) the norm,
    /// which are the same in a post-norm block.
    /// Only a backbone that calls [`Seam::beside`] itself needs this function;
    /// [`BlockPass::sub_layer`](crate::backbone::BlockPass::sub_layer) calls it for the others.
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

/// Weight and bias of a layer, into which a method can be merged.
#[derive(Debug)]
pub struct LayerWeights {
    /// `[out, in, ..]`, or `[out]` for a norm.
    pub weight: Tensor,
    /// `[out]`.
    pub bias: Option<Tensor>,
}

/// The changes that a method makes to a backbone's forward pass. By default every place changes
/// nothing.
///
/// `layout` describes the tokens of that call. In the last block of a backbone that reads only its
/// class token, the block passes only that token, with a layout of one prefix token and an empty
/// grid.
pub trait Seam: Debug + Send {
    /// Called with the tokens `[B, P + N, C]` that enter a block. Returns the tokens and their
    /// layout. A method may append tokens to the prefix and remove its own tokens again; it then
    /// returns the changed layout. Only one method of a `Method::Compose` can do
    /// so, because it takes the last tokens of the prefix for its own.
    fn entering(
        &self,
        _block: usize,
        tokens: Tensor,
        layout: TokenLayout,
        _train: bool,
    ) -> Result<(Tensor, TokenLayout)> {
        Ok((tokens, layout))
    }

    /// Called after a linear layer or a norm with its input `[.., in]` and its output `[.., out]`.
    /// Returns the output to use.
    ///
    /// Both have three dimensions, except at the norm of the features. [`Layer::Qkv`] may be called
    /// on windows. The sub-layer and [`Seam::beside`] read what this function returns for the
    /// output of a norm before the sub-layer.
    fn after_layer(
        &self,
        _layer: Layer,
        _input: &Tensor,
        output: Tensor,
        _train: bool,
    ) -> Result<Tensor> {
        Ok(output)
    }

    /// Called before a sub-layer with its input `[B', T', C]`: the normed tokens of the kept
    /// samples, or the tokens themselves in a post-norm block. Returns the input to use, which only the sub-layer reads.
    ///
    /// The input of attention within windows is `[B' * windows, tokens of a window, C]`. It is zero
    /// where a window extends beyond the edge of the grid.
    fn before_sub_layer(&self, _site: Site, input: Tensor, _train: bool) -> Result<Tensor> {
        Ok(input)
    }

    /// Called with the residual stream `[B, T, C]` after the output of the sub-layer is added to
    /// it. Returns the stream plus the output of the method's parallel branch.
    fn beside(&self, _at: &Beside, residual: Tensor) -> Result<Tensor> {
        Ok(residual)
    }

    /// Returns whether [`Seam::beside`] does anything at `site`. Only then does a block draw drop
    /// path for the branch.
    fn is_beside(&self, _site: Site) -> bool {
        false
    }

    /// Called after a sub-layer with its output `[B, T, C]`, before it is added to the residual
    /// stream. In a post-norm block it is the output of the norm. Returns the output to use.
    fn after_sub_layer(
        &self,
        _site: Site,
        output: Tensor,
        _layout: &TokenLayout,
        _train: bool,
    ) -> Result<Tensor> {
        Ok(output)
    }

    /// Returns whether everything that the method does in evaluation can be merged into the
    /// backbone's weights.
    fn can_merge(&self) -> bool {
        false
    }

    /// Returns weights with which `layer` alone computes what `layer` and the method compute
    /// together. It is only called if [`Seam::can_merge`] returns true.
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
