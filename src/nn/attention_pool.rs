//! Attention pooling: one learned query attends to all tokens (SigLIP's "MAP head", Lee et al.,
//! arXiv 1810.00825; AIMv2).

use tch::Tensor;

use super::{Linear, Mlp, Norm, Weight};
use crate::error::Result;

/// Attention of a learned token to all others, mostly followed by an MLP with a residual
/// connection.
#[derive(Clone, Debug)]
pub(crate) struct AttentionPool {
    /// `[1, 1, C]`, the token before its projection to a query.
    pub(crate) latent: Weight,
    /// Queries, then keys, then values. Without the rows of queries, the token itself is the query.
    pub(crate) qkv: Linear,
    pub(crate) proj: Linear,
    pub(crate) mlp: Option<(Norm, Mlp)>,
    pub(crate) num_heads: i64,
}

impl AttentionPool {
    /// Computes `[B, T, C] -> [B, C]`.
    pub(crate) fn forward(&self, tokens: &Tensor) -> Result<Tensor> {
        let (batch, c) = (tokens.size()[0], self.latent.size()[2]);
        let heads = |x: &Tensor| x.f_unflatten(-1, [self.num_heads, -1])?.f_transpose(1, 2);
        let first = self.qkv.weight.size()[0] - 2 * c;
        let mut q = self.latent.beside(tokens)?;
        if first > 0 {
            q = self.qkv.rows(0, first)?.forward(&q)?;
        }
        let q = q.f_expand([batch, -1, -1], false)?;
        let kv = self.qkv.rows(first, 2 * c)?.forward(tokens)?;
        let (k, v) = (kv.f_narrow(-1, 0, c)?, kv.f_narrow(-1, c, c)?);
        let (dropout, causal, mask, scale, grouped) =
            (0.0, false, None::<&Tensor>, None::<f64>, false);
        let (q, k, v) = (heads(&q)?, heads(&k)?, heads(&v)?);
        let x = Tensor::f_scaled_dot_product_attention(
            &q, &k, &v, mask, dropout, causal, scale, grouped,
        )?;
        // [B, heads, 1, d] -> [B, 1, C]
        let x = self.proj.forward(&x.f_transpose(1, 2)?.f_flatten(2, 3)?)?;
        let Some((norm, mlp)) = &self.mlp else { return Ok(x.f_squeeze_dim(1)?) };
        let hidden = mlp.fc1.forward(&norm.forward(&x)?)?;
        let output = mlp.fc2.forward(&mlp.activate(&hidden)?)?;
        Ok(x.f_add(&output)?.f_squeeze_dim(1)?)
    }
}
