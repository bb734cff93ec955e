//! A linear layer.

use tch::Tensor;

use crate::error::Result;

/// `x W^T + b`, weight `[out, in]`, bias `[out]`.
#[derive(Debug)]
pub(crate) struct Linear {
    pub(crate) weight: Tensor,
    pub(crate) bias: Option<Tensor>,
}

impl Linear {
    /// `[.., in] -> [.., out]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.f_linear(&self.weight, self.bias.as_ref())?)
    }

    /// The layer that computes the outputs `start..start + len` only.
    pub(crate) fn rows(&self, start: i64, len: i64) -> Result<Linear> {
        let bias = self.bias.as_ref().map(|b| b.f_narrow(0, start, len)).transpose()?;
        Ok(Linear { weight: self.weight.f_narrow(0, start, len)?, bias })
    }
}
