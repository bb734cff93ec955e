//! A convolution over a grid.

use tch::Tensor;

use super::stored::widened;
use crate::error::Result;

/// Weight `[out, in / groups, k, k]`, bias `[out]`.
#[derive(Debug)]
pub(crate) struct Conv {
    pub(crate) weight: Tensor,
    pub(crate) bias: Tensor,
    pub(crate) stride: i64,
    pub(crate) padding: i64,
}

impl Conv {
    /// `[B, in, H, W] -> [B, out, H', W']`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (stride, padding, dilation) = ([self.stride; 2], [self.padding; 2], [1; 2]);
        let groups = x.size()[1] / self.weight.size()[1];
        let (weight, bias) = (widened(&self.weight, x)?, widened(&self.bias, x)?);
        Ok(x.f_conv2d(&weight, Some(&bias), stride, padding, dilation, groups)?)
    }
}
