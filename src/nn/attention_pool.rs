//! Attention pooling: one learned query attends to all tokens (SigLIP's "MAP head", Lee et al.,
//! arXiv 1810.00825).

use tch::Tensor;

use super::{Linear, Mlp, Norm, Weight};
use crate::error::Result;

/// Attention of a learned token to all others, followed by an MLP with a residual connection.
#[derive(Clone, Debug)]
pub(crate) struct AttentionPool {
    /// `[1, 1, C]`, the token before its projection to a query.
    pub(crate) latent: Weight,
    /// Queries, then keys, then values.
    pub(crate) qkv: Linear,
    pub(crate) proj: Linear,
    pub(crate) norm: Norm,
    pub(crate) mlp: Mlp,
    pub(crate) num_heads: i64,
}

impl AttentionPool {
    /// Computes `[B, T, C] -> [B, C]`.
    pub(crate) fn forward(&self, tokens: &Tensor) -> Result<Tensor> {
        let (batch, c) = (tokens.size()[0], self.latent.size()[2]);
        let heads = |x: &Tensor| x.f_unflatten(-1, [self.num_heads, -1])?.f_transpose(1, 2);
        let (q, kv) = (self.qkv.rows(0, c)?, self.qkv.rows(c, 2 * c)?);
        let q = q.forward(&self.latent.beside(tokens)?)?.f_expand([batch, -1, -1], false)?;
        let kv = kv.forward(tokens)?;
        let (k, v) = (kv.f_narrow(-1, 0, c)?, kv.f_narrow(-1, c, c)?);
        let (dropout, causal, mask, scale, grouped) =
            (0.0, false, None::<&Tensor>, None::<f64>, false);
        let (q, k, v) = (heads(&q)?, heads(&k)?, heads(&v)?);
        let x = Tensor::f_scaled_dot_product_attention(
            &q, &k, &v, mask, dropout, causal, scale, grouped,
        )?;
        // [B, heads, 1, d] -> [B, 1, C]
        let x = self.proj.forward(&x.f_transpose(1, 2)?.f_flatten(2, 3)?)?;
        let hidden = self.mlp.fc1.forward(&self.norm.forward(&x)?)?;
        let output = self.mlp.fc2.forward(&self.mlp.activate(&hidden)?)?;
        Ok(x.f_add(&output)?.f_squeeze_dim(1)?)
    }
}
