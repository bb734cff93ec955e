//! Multi-head self-attention in three steps: projection, position, attention.
//!
//! The first step creates [`Projected`]. The code that holds the projection does it and calls the
//! seam after it. The second step adds positions: it rotates queries and keys, or returns a bias for
//! the scores between the tokens of a window or of an image, or does nothing. The third step is softmax attention.

use tch::Tensor;

use super::cosine::normalized;
use super::{GridBias, Linear, RotaryTable, Weight, WindowBias, self_attention};
use crate::error::Result;

/// Multi-head self-attention. The weight of the projection `qkv` is `[3C, C]`: queries, then keys,
/// then values.
///
/// A checkpoint with three separate projections is stored as this one layer, because three
/// projections equal one over their stacked rows. A part without a bias gets a bias of zeros. So
/// every method acts on one layer, whatever the file contains.
#[derive(Clone, Debug)]
pub(crate) struct Attention {
    pub(crate) qkv: Linear,
    pub(crate) proj: Linear,
    pub(crate) num_heads: i64,
    /// Whether a token attends only to itself and to the tokens before it.
    pub(crate) causal: bool,
    /// The logarithm of the factor of each head, `[heads, 1, 1]`, if the scores are cosines times
    /// this factor; `None` if they are scaled dot products.
    pub(crate) logit_scale: Option<Weight>,
    /// Position information that attention adds to what the embedding put into the tokens.
    pub(crate) positions: Positions,
}

/// How attention uses the positions of tokens.
#[derive(Clone, Debug)]
pub(crate) enum Positions {
    /// Attention adds nothing; the tokens hold their positions already, if the model uses any.
    InTokens,
    /// Tokens attend within windows, with a learned bias for each offset between two tokens.
    Windows(WindowBias),
    /// Attention is global, with a learned bias for each offset between two tokens.
    Grid(GridBias),
    /// Queries and keys of patches are rotated by angles that depend on their place in the grid.
    Rotary(RotaryTable),
}

/// Queries, keys and values before they are split into heads.
pub(crate) enum Projected {
    /// `[B, T, 3C]`.
    Fused(Tensor),
    /// `[B, count, C]` and `[B, T, 2C]`: fewer queries than keys, and the keys and values.
    Split(Tensor, Tensor),
}

impl Attention {
    /// Returns the windows within which tokens attend, or `None` if attention is global.
    pub(crate) fn windows(&self) -> Option<&WindowBias> {
        match &self.positions {
            Positions::InTokens | Positions::Grid(_) | Positions::Rotary(_) => None,
            Positions::Windows(bias) => Some(bias),
        }
    }

    /// Computes everything between the two projections: `[B, T, C]`, or `[B, count, C]` for fewer
    /// queries. `batch` is the number of images; an image may consist of several sequences
    /// (windows). The patches follow `prefix` other tokens.
    pub(crate) fn mix(&self, projected: &Projected, batch: i64, prefix: i64) -> Result<Tensor> {
        let rotated = match &self.positions {
            Positions::Rotary(table) => Some(table.place(projected, prefix)?),
            _ => None,
        };
        let projected = rotated.as_ref().unwrap_or(projected);
        let bias = self.bias(projected, batch, prefix)?;
        if let (None, false, Projected::Fused(qkv)) = (&bias, self.causal, projected)
            && self.logit_scale.is_none()
            && self_attention::can_attend(qkv)
        {
            return self_attention::attend(qkv, self.num_heads);
        }
        let [q, k, v] = self.split(projected)?;
        self.attend(&q, &k, &v, bias.as_ref())
    }

    /// Returns the bias that positions add to the scores, if any.
    fn bias(&self, projected: &Projected, batch: i64, prefix: i64) -> Result<Option<Tensor>> {
        let bias = match (&self.positions, projected) {
            (Positions::Windows(bias), Projected::Fused(qkv)) => bias.for_batch(batch, qkv)?,
            (Positions::Grid(bias), Projected::Fused(x) | Projected::Split(x, _)) => {
                bias.for_queries(x.size()[1], prefix, x)?
            }
            _ => return Ok(None),
        };
        Ok(Some(bias))
    }

    /// Returns queries, keys and values, each `[B, heads, T, C / heads]`.
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

    /// Computes softmax attention; `bias`, `[B or 1, heads, queries, T]`, is added to the scores.
    fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let unit = match &self.logit_scale {
            Some(logit_scale) => Some(normalized(q, k, logit_scale)?),
            None => None,
        };
        let ((q, k), scale) = match &unit {
            Some((q, k)) => ((q, k), Some(1.0)),
            None => ((q, k), None),
        };
        let (dropout, causal, grouped) = (0.0, self.causal, false);
        let x =
            Tensor::f_scaled_dot_product_attention(q, k, v, bias, dropout, causal, scale, grouped)?;
        // [B, heads, T, d] -> [B, T, C]
        Ok(x.f_transpose(1, 2)?.f_flatten(2, 3)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::InitRng;
    use tch::Kind;

    /// Compares three separate projections, the keys' without a bias, with the fused one over their
    /// rows.
    #[test]
    fn separate_projections_are_rows_of_the_fused_one() {
        let (c, heads) = (8, 2);
        let mut rng = InitRng::from_seed(3);
        let mut normal = |shape: &[i64]| rng.normal(shape, 1.0).unwrap();
        let parts: Vec<Linear> = [true, false, true]
            .map(|bias| Linear::plain(normal(&[c, c]), bias.then(|| normal(&[c]))))
            .into();
        let weights: Vec<_> = parts.iter().map(|part| &part.weight).collect();
        let zeros = Tensor::zeros([c], (Kind::Float, tch::Device::Cpu));
        let biases: Vec<_> = parts.iter().map(|p| p.bias.as_ref().unwrap_or(&zeros)).collect();
        let attention = Attention {
            qkv: Linear::plain(Tensor::cat(&weights, 0), Some(Tensor::cat(&biases, 0))),
            proj: Linear::plain(normal(&[c, c]), None),
            num_heads: heads,
            causal: false,
            logit_scale: None,
            positions: Positions::InTokens,
        };
        let x = normal(&[3, 5, c]);
        let fused = Projected::Fused(attention.qkv.forward(&x).unwrap());
        let found = attention.mix(&fused, 3, 1).unwrap();

        let [q, k, v] = [0, 1, 2].map(|part: usize| {
            parts[part].forward(&x).unwrap().view([3, 5, heads, c / heads]).transpose(1, 2)
        });
        let scores = q.matmul(&k.transpose(2, 3)) / ((c / heads) as f64).sqrt();
        let naive = scores.softmax(-1, Kind::Float).matmul(&v).transpose(1, 2).reshape([3, 5, c]);
        assert!(found.allclose(&naive, 1e-5, 1e-5, false));

        // The same for the queries of the first token only.
        let first = attention.qkv.rows(0, c).unwrap().forward(&x.narrow(1, 0, 1)).unwrap();
        let rest = attention.qkv.rows(c, 2 * c).unwrap().forward(&x).unwrap();
        let first = attention.mix(&Projected::Split(first, rest), 3, 1).unwrap();
        assert!(first.allclose(&naive.narrow(1, 0, 1), 1e-5, 1e-5, false));
    }
}
