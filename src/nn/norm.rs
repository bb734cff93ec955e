//! Layer norm.

use tch::Tensor;

use super::stored::widened;
use crate::error::Result;

/// Layer norm over the last dimension. Its weight and bias are `[C]`, and `Clone` shares them.
///
/// `eps` has no default: it differs between model families.
#[derive(Debug)]
pub struct LayerNorm {
    pub(crate) weight: Tensor,
    pub(crate) bias: Tensor,
    pub(crate) eps: f64,
}

impl LayerNorm {
    /// Applies the norm: `[.., C] -> [.., C]`.
    ///
    /// # Errors
    /// Returns [`Error::Torch`](crate::Error::Torch) if `x` has another width or device.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.beside(x)?.apply(x)
    }

    /// Returns the norm in a dtype that libtorch accepts together with the dtype of `x`.
    pub(crate) fn beside(&self, x: &Tensor) -> Result<LayerNorm> {
        let (weight, bias) = (widened(&self.weight, x)?, widened(&self.bias, x)?);
        Ok(LayerNorm { weight, bias, eps: self.eps })
    }

    /// Applies the norm without a conversion; `self` is the result of [`LayerNorm::beside`] for
    /// `x`.
    pub(crate) fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let (shape, cudnn) = (self.weight.size(), false);
        Ok(x.f_layer_norm(shape, Some(&self.weight), Some(&self.bias), self.eps, cudnn)?)
    }
}

impl Clone for LayerNorm {
    fn clone(&self) -> Self {
        let (weight, bias) = (self.weight.shallow_clone(), self.bias.shallow_clone());
        LayerNorm { weight, bias, eps: self.eps }
    }
}
