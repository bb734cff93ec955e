//! How the tokens of a ViT become one feature vector.

use serde::{Deserialize, Serialize};

use crate::backbone::block::Queries;
use crate::error::{Error, Result};

/// How the tokens become one feature vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Pooling {
    /// The class token, after the final norm.
    ClassToken,
    /// The mean of the patch tokens, without prefix tokens, after the final norm.
    Average,
    /// The mean of the patch tokens, then the final norm (timm's `fc_norm`).
    AverageThenNorm,
    /// The class token beside the mean of the patch tokens, both after the final norm: `[B, 2C]`.
    /// The classifiers of Hugging Face's DINOv2 read it.
    ClassTokenAndAverage,
    /// The mean of the class token and of the distillation token after it, after the final norm
    /// (DeiT).
    ClassAndDistillation,
    /// The final norm, then attention of a learned query to all tokens, then an MLP (SigLIP) or
    /// nothing (AIMv2). The config must have [`ViTConfig::attention_pool`](super::ViTConfig::attention_pool).
    Attention,
}

impl Pooling {
    /// Returns the tokens that pooling reads, which the last block must compute.
    pub(in crate::backbone) fn queries(self) -> Queries {
        match self {
            Pooling::ClassToken => Queries::First(1),
            Pooling::ClassAndDistillation => Queries::First(2),
            Pooling::Average
            | Pooling::AverageThenNorm
            | Pooling::ClassTokenAndAverage
            | Pooling::Attention => Queries::All,
        }
    }

    /// Returns the number of tokens that pooling reads if these are the first ones, and `None` if
    /// it reads all tokens.
    #[cfg(feature = "onnx")]
    pub(crate) fn first_tokens(self) -> Option<i64> {
        match self.queries() {
            Queries::First(count) => Some(count),
            Queries::All => None,
        }
    }

    /// Returns the width of the features for tokens of width `embed_dim`.
    pub(super) fn feature_dim(self, embed_dim: i64) -> i64 {
        match self {
            Pooling::ClassTokenAndAverage => embed_dim.saturating_mul(2),
            _ => embed_dim,
        }
    }

    /// Returns the name in JSON.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Pooling::ClassToken => "class_token",
            Pooling::Average => "average",
            Pooling::AverageThenNorm => "average_then_norm",
            Pooling::ClassTokenAndAverage => "class_token_and_average",
            Pooling::ClassAndDistillation => "class_and_distillation",
            Pooling::Attention => "attention",
        }
    }
}

/// The sizes of an attention pooling: a learned query, attention, and an MLP, if there is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttentionPooling {
    /// Number of attention heads, which divides the embedding dim; as many as in the blocks if
    /// `None`.
    pub num_heads: Option<i64>,
    /// Width between the two linear layers of the MLP. Its activation is that of the blocks. With 0
    /// there is no MLP and no norm, and the learned token is the query without a projection
    /// (AIMv2).
    pub mlp_dim: i64,
    /// Whether the query attends to class and register tokens, too (Perception Encoder). It never
    /// attends to prompts.
    #[serde(default)]
    pub reads_prefix: bool,
}

impl AttentionPooling {
    /// Returns whether the learned token is the query itself, and neither a norm nor an MLP follows.
    pub(super) fn is_bare(&self) -> bool {
        self.mlp_dim == 0
    }

    /// Returns the number of weights for tokens of width `c`. `qkv_bias` is whether the projections
    /// of the blocks have a bias.
    pub(super) fn num_params(&self, c: i64, qkv_bias: bool) -> i64 {
        let squares = c.saturating_mul(c).saturating_mul(if self.is_bare() { 3 } else { 4 });
        let mlp = c.saturating_mul(self.mlp_dim).saturating_mul(2);
        // The learned query and, if there is one, the weight of the norm.
        let vectors = c.saturating_mul(if self.is_bare() { 1 } else { 2 });
        let vectors = vectors.saturating_add(self.num_biases(c, qkv_bias));
        squares.saturating_add(mlp).saturating_add(vectors)
    }

    /// Returns the number of biases for tokens of width `c`: those of queries, keys and values, of
    /// the projection, of the norm and of the MLP.
    pub(super) fn num_biases(&self, c: i64, qkv_bias: bool) -> i64 {
        if self.is_bare() {
            return c.saturating_mul(if qkv_bias { 3 } else { 1 });
        }
        c.saturating_mul(6).saturating_add(self.mlp_dim)
    }

    /// Checks the sizes for tokens of width `c`.
    pub(super) fn check(&self, c: i64, max: i64) -> Result<()> {
        let heads = self.num_heads.unwrap_or(1);
        for (field, value, least) in
            [("attention_pool.num_heads", heads, 1), ("attention_pool.mlp_dim", self.mlp_dim, 0)]
        {
            if !(least..=max).contains(&value) {
                return Err(Error::config(field, format!("within {least}..={max}"), value));
            }
        }
        if c % heads != 0 {
            let expected = format!("a divisor of embed_dim {c}");
            return Err(Error::config("attention_pool.num_heads", expected, heads));
        }
        Ok(())
    }
}
