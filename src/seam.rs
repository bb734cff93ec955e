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
            return Err(Error::config("layout", "no negative count", format!("{self:?}")));
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

/// What a method may do to a backbone's forward pass. Every place defaults to nothing.
///
/// `layout` describes the tokens of that call. In the last block of a backbone that reads its
/// class token alone, the block passes that token alone: one prefix token and an empty grid.
pub trait Seam: Debug + Send {
    /// Beside a sub-layer: adds a branch over its normed input `[B, T, C]` into the residual
    /// stream of the same shape. `branch` says which samples of the batch take part (drop path).
    fn beside(
        &self,
        _site: Site,
        _normed: &Tensor,
        residual: Tensor,
        _layout: &TokenLayout,
        _branch: &Branch,
        _train: bool,
    ) -> Result<Tensor> {
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
}

/// The method that does nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoMethod;

impl Seam for NoMethod {}
