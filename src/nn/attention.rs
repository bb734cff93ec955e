//! Multi-head self-attention.

use tch::Tensor;

use super::{Linear, self_attention};
use crate::error::Result;

/// Self-attention with a fused projection: `qkv` is `[3C, C]`, queries first, then keys, values.
#[derive(Debug)]
pub(crate) struct Attention {
    pub(crate) qkv: Linear,
    pub(crate) proj: Linear,
    pub(crate) num_heads: i64,
    /// Whether a token attends to itself and those before it alone; goes with no bias.
    pub(crate) causal: bool,
}

impl Attention {
    /// Everything between the two projections, from the output of `qkv`:
    /// `[B, T, 3C] -> [B, T, C]`; `bias`, `[B or 1, heads, T, T]`, is added to the scores.
    pub(crate) fn mix(&self, qkv: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        if bias.is_none() && !self.causal && self_attention::can_attend(qkv) {
            return self_attention::attend(qkv, self.num_heads);
        }
        let c = self.proj.weight.size()[1];
        let part = |index: i64| qkv.f_narrow(-1, index * c, c);
        self.attend(&part(0)?, &part(1)?, &part(2)?, bias)
    }

    /// [`Attention::mix`] for fewer queries: `q` is `[B, count, C]`, `kv` is `[B, T, 2C]`.
    pub(crate) fn mix_split(&self, q: &Tensor, kv: &Tensor) -> Result<Tensor> {
        let c = self.proj.weight.size()[1];
        self.attend(q, &kv.f_narrow(-1, 0, c)?, &kv.f_narrow(-1, c, c)?, None)
    }

    /// `[B, T, C] -> [B, heads, T, C / heads]`.
    fn split_heads(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.f_unflatten(-1, [self.num_heads, -1])?.f_transpose(1, 2)?)
    }

    fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let (q, k, v) = (self.split_heads(q)?, self.split_heads(k)?, self.split_heads(v)?);
        let (dropout, scale, grouped) = (0.0, None::<f64>, false);
        let causal = self.causal;
        let x = Tensor::f_scaled_dot_product_attention(
            &q, &k, &v, bias, dropout, causal, scale, grouped,
        )?;
        // [B, heads, T, d] -> [B, T, C]
        Ok(x.f_transpose(1, 2)?.f_flatten(2, 3)?)
    }
}
