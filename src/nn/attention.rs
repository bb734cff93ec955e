//! Multi-head self-attention.

use tch::Tensor;

use super::Linear;
use crate::error::Result;

/// Self-attention with a fused projection: `qkv` is `[3C, C]`, queries first, then keys, values.
#[derive(Debug)]
pub(crate) struct Attention {
    pub(crate) qkv: Linear,
    pub(crate) proj: Linear,
    pub(crate) num_heads: i64,
}

impl Attention {
    /// `[B, T, C] -> [B, T, C]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut qkv = self.qkv.forward(x)?.f_chunk(3, -1)?.into_iter();
        let mut next = || self.split_heads(&qkv.next().unwrap_or_default());
        let (q, k, v) = (next()?, next()?, next()?);
        self.attend(&q, &k, &v)
    }

    /// The first `count` tokens of [`Attention::forward`]: queries, softmax and projection for
    /// those alone, `[B, T, C] -> [B, count, C]`.
    pub(crate) fn forward_first(&self, x: &Tensor, count: i64) -> Result<Tensor> {
        let c = self.proj.weight.size()[0];
        let q = self.qkv.rows(0, c)?.forward(&x.f_narrow(1, 0, count)?)?;
        let mut kv = self.qkv.rows(c, 2 * c)?.forward(x)?.f_chunk(2, -1)?.into_iter();
        let mut next = || self.split_heads(&kv.next().unwrap_or_default());
        let (k, v) = (next()?, next()?);
        self.attend(&self.split_heads(&q)?, &k, &v)
    }

    /// `[B, T, C] -> [B, heads, T, C / heads]`.
    fn split_heads(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.f_unflatten(-1, [self.num_heads, -1])?.f_transpose(1, 2)?)
    }

    fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (dropout, causal, scale, grouped) = (0.0, false, None::<f64>, false);
        let x = Tensor::f_scaled_dot_product_attention(
            q,
            k,
            v,
            None::<&Tensor>,
            dropout,
            causal,
            scale,
            grouped,
        )?;
        // [B, heads, T, d] -> [B, T, C]
        self.proj.forward(&x.f_transpose(1, 2)?.f_flatten(2, 3)?)
    }
}
