//! Multi-head self-attention in three steps: project, place, attend.
//!
//! The first step is [`Projected`], made by whoever holds the projection and calls the seam after
//! it. The second tells tokens apart by where they are: today it is a bias on the scores between
//! the tokens of a window, or nothing. The third is softmax attention.

use tch::Tensor;

use super::{Linear, WindowBias, self_attention};
use crate::error::Result;

/// Self-attention. The projection `qkv` is `[3C, C]`: queries first, then keys, then values.
///
/// A file with three separate projections is read into the fused one, and a part without a bias
/// (the keys of some families) has zeros there, so that every method acts on one layer.
#[derive(Clone, Debug)]
pub(crate) struct Attention {
    pub(crate) qkv: Linear,
    pub(crate) proj: Linear,
    pub(crate) num_heads: i64,
    /// Whether a token attends to itself and those before it alone.
    pub(crate) causal: bool,
    /// What tells the tokens apart by their place, beside what the embedding added to them.
    pub(crate) positions: Positions,
}

/// How attention knows where tokens are.
#[derive(Clone, Debug)]
pub(crate) enum Positions {
    /// It does not: positions are in the tokens already, if anywhere.
    InTokens,
    /// Tokens attend within windows, with a learned bias for each offset between two of them.
    Windows(WindowBias),
}

/// Queries, keys and values before they are split into heads.
pub(crate) enum Projected {
    /// `[B, T, 3C]`.
    Fused(Tensor),
    /// Fewer queries than keys: `[B, count, C]`, and keys and values `[B, T, 2C]`.
    Split(Tensor, Tensor),
}

impl Attention {
    /// The windows that tokens attend within, if they do.
    pub(crate) fn windows(&self) -> Option<&WindowBias> {
        match &self.positions {
            Positions::InTokens => None,
            Positions::Windows(bias) => Some(bias),
        }
    }

    /// Everything between the two projections: `[B, T, C]`, or `[B, count, C]` for fewer queries.
    /// `batch` is the number of images, each of which may be several sequences (windows).
    pub(crate) fn mix(&self, projected: &Projected, batch: i64) -> Result<Tensor> {
        let bias = self.place(projected, batch)?;
        if let (None, false, Projected::Fused(qkv)) = (&bias, self.causal, projected) {
            if self_attention::can_attend(qkv) {
                return self_attention::attend(qkv, self.num_heads);
            }
        }
        let [q, k, v] = self.split(projected)?;
        self.attend(&q, &k, &v, bias.as_ref())
    }

    /// What the places of the tokens add to the scores.
    fn place(&self, projected: &Projected, batch: i64) -> Result<Option<Tensor>> {
        match (&self.positions, projected) {
            (Positions::Windows(bias), Projected::Fused(qkv)) => {
                Ok(Some(bias.for_batch(batch, qkv)?))
            }
            _ => Ok(None),
        }
    }

    /// Queries, keys and values, each `[B, heads, T, C / heads]`.
    fn split(&self, projected: &Projected) -> Result<[Tensor; 3]> {
        let c = self.proj.weight.size()[1];
        let part = |x: &Tensor, index: i64| x.f_narrow(-1, index * c, c);
        let parts = match projected {
            Projected::Fused(qkv) => [part(qkv, 0)?, part(qkv, 1)?, part(qkv, 2)?],
            Projected::Split(q, kv) => [q.shallow_clone(), part(kv, 0)?, part(kv, 1)?],
        };
        let heads = |x: &Tensor| x.f_unflatten(-1, [self.num_heads, -1])?.f_transpose(1, 2);
        Ok([heads(&parts[0])?, heads(&parts[1])?, heads(&parts[2])?])
    }

    /// Softmax attention; `bias`, `[B or 1, heads, T, T]`, is added to the scores.
    fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let (dropout, causal, scale, grouped) = (0.0, self.causal, None::<f64>, false);
        let x =
            Tensor::f_scaled_dot_product_attention(q, k, v, bias, dropout, causal, scale, grouped)?;
        // [B, heads, T, d] -> [B, T, C]
        Ok(x.f_transpose(1, 2)?.f_flatten(2, 3)?)
    }
}
