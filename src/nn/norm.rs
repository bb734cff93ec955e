//! Layer norm.

use tch::{Kind, Tensor};

use crate::error::Result;

/// Layer norm over the last dimension. `eps` has no default: it differs between model families.
#[derive(Debug)]
pub(crate) struct LayerNorm {
    pub(crate) weight: Tensor,
    pub(crate) bias: Tensor,
    pub(crate) eps: f64,
}

impl LayerNorm {
    /// `[.., C] -> [.., C]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let LayerNorm { weight, bias, eps } = self.beside(x)?;
        Ok(x.f_layer_norm(weight.size(), Some(&weight), Some(&bias), eps, false)?)
    }

    /// The norm in numbers that libtorch takes beside those of `x`: those of `x`, or f32.
    pub(crate) fn beside(&self, x: &Tensor) -> Result<LayerNorm> {
        let wide = |t: &Tensor| match t.kind() == Kind::Half && x.kind() != Kind::Half {
            true => t.f_to_kind(Kind::Float),
            false => Ok(t.shallow_clone()),
        };
        Ok(LayerNorm { weight: wide(&self.weight)?, bias: wide(&self.bias)?, eps: self.eps })
    }
}
