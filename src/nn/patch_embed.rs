//! The patch embedding.

use tch::Tensor;

use super::stored::widened;
use crate::error::Result;

/// A convolution whose stride equals its kernel size: weight `[C, 3, p, p]`, bias `[C]` or none.
/// `Clone` shares both tensors.
#[derive(Debug)]
pub struct PatchEmbed {
    pub(crate) weight: Tensor,
    pub(crate) bias: Option<Tensor>,
}

impl PatchEmbed {
    /// Cuts images into patches and embeds each one: `[B, 3, H, W] -> [B, N, C]`, row by row.
    ///
    /// # Errors
    /// Returns [`Error::Torch`](crate::Error::Torch) if the images are smaller than a patch, or
    /// have another dtype or device than the weights.
    pub fn forward(&self, images: &Tensor) -> Result<Tensor> {
        let patch = self.weight.size()[2];
        let (stride, padding, dilation, groups) = ([patch; 2], [0; 2], [1; 2], 1);
        let weight = widened(&self.weight, images)?;
        let bias = self.bias.as_ref().map(|bias| widened(bias, images)).transpose()?;
        let x = images.f_conv2d(&weight, bias.as_ref(), stride, padding, dilation, groups)?;
        // [B, C, rows, cols] -> [B, N, C]
        Ok(x.f_flatten(2, 3)?.f_transpose(1, 2)?)
    }
}

impl Clone for PatchEmbed {
    fn clone(&self) -> Self {
        let bias = self.bias.as_ref().map(Tensor::shallow_clone);
        PatchEmbed { weight: self.weight.shallow_clone(), bias }
    }
}
