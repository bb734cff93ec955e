//! Layer norm.

use tch::Tensor;

use super::stored::widened;
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
        let (shape, cudnn) = (self.weight.size(), false);
        let (weight, bias) = (widened(&self.weight, x)?, widened(&self.bias, x)?);
        Ok(x.f_layer_norm(shape, Some(&weight), Some(&bias), self.eps, cudnn)?)
    }
}
