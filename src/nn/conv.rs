//! A convolution over a grid.

use tch::Tensor;

use super::stored::widened;
use crate::error::Result;

/// A convolution: weight `[out, in / groups, k, k]`, bias `[out]`. `Clone` shares both tensors.
#[derive(Debug)]
pub struct Conv {
    pub(crate) weight: Tensor,
    pub(crate) bias: Tensor,
    pub(crate) stride: i64,
    pub(crate) padding: i64,
}

impl Conv {
    /// Applies the convolution: `[B, in, H, W] -> [B, out, H', W']`. The number of groups is `in`
    /// divided by the input channels of the weight.
    ///
    /// # Errors
    /// Returns [`Error::Torch`](crate::Error::Torch) if `x` does not fit the weight.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (stride, padding, dilation) = ([self.stride; 2], [self.padding; 2], [1; 2]);
        // libtorch reports the error for an `x` without channels.
        let channels = x.size().get(1).copied().unwrap_or_default();
        let groups = (channels / self.weight.size()[1]).max(1);
        let (weight, bias) = (widened(&self.weight, x)?, widened(&self.bias, x)?);
        Ok(x.f_conv2d(&weight, Some(&bias), stride, padding, dilation, groups)?)
    }
}

impl Clone for Conv {
    fn clone(&self) -> Self {
        let (weight, bias) = (self.weight.shallow_clone(), self.bias.shallow_clone());
        Conv { weight, bias, stride: self.stride, padding: self.padding }
    }
}
