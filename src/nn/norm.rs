//! The norms of tokens.

use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::stored::widened;
use crate::error::Result;

/// Where the norms of a block are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormPlacement {
    /// Before each sub-layer (pre-norm): `x + f(norm(x))`.
    #[default]
    Before,
    /// After each sub-layer, within the residual branch (post-norm): `x + norm(f(x))`, as in Swin
    /// V2 and timm's `vit_*_rpn_*`.
    After,
}

impl NormPlacement {
    /// Returns whether the norms are before the sub-layers.
    pub(crate) fn is_before(&self) -> bool {
        *self == NormPlacement::Before
    }

    /// Brings the layers of sub-layers of three layers, each listed with its norm first, into the
    /// order of the forward pass.
    pub(crate) fn order<T>(self, layers: &mut [T]) {
        if self == NormPlacement::After {
            layers.chunks_mut(3).for_each(|sub_layer| sub_layer.rotate_left(1));
        }
    }
}

/// A norm over the last dimension: a layer norm, or an RMS norm, which does not subtract the mean.
/// The weight and the bias, if there is one, are `[C]`, and `Clone` shares them.
///
/// `eps` has no default: it differs between model families.
#[derive(Debug)]
pub struct Norm {
    pub(crate) weight: Tensor,
    pub(crate) bias: Option<Tensor>,
    pub(crate) eps: f64,
    /// Whether it is an RMS norm.
    pub(crate) rms: bool,
}

/// What the norms of a model have in common.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NormKind {
    pub(crate) eps: f64,
    /// Whether they are RMS norms instead of layer norms.
    pub(crate) rms: bool,
    /// Whether they have a bias.
    pub(crate) bias: bool,
}

impl NormKind {
    /// Returns the kind of layer norms with a bias.
    pub(crate) fn layer_norm(eps: f64) -> Self {
        NormKind { eps, rms: false, bias: true }
    }
}

impl Norm {
    /// Applies the norm: `[.., C] -> [.., C]`.
    ///
    /// # Errors
    /// Returns [`Error::Torch`](crate::Error::Torch) if `x` has another width or device.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.beside(x)?.apply(x)
    }

    /// Returns the norm in a dtype that libtorch accepts together with the dtype of `x`.
    pub(crate) fn beside(&self, x: &Tensor) -> Result<Norm> {
        let weight = widened(&self.weight, x)?;
        let bias = self.bias.as_ref().map(|bias| widened(bias, x)).transpose()?;
        Ok(Norm { weight, bias, eps: self.eps, rms: self.rms })
    }

    /// Applies the norm without a conversion; `self` is the result of [`Norm::beside`] for `x`.
    pub(crate) fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let (shape, weight, cudnn) = (self.weight.size(), Some(&self.weight), false);
        if !self.rms {
            return Ok(x.f_layer_norm(shape, weight, self.bias.as_ref(), self.eps, cudnn)?);
        }
        let x = x.f_rms_norm(shape, weight, Some(self.eps))?;
        match &self.bias {
            Some(bias) => Ok(x.f_add(bias)?),
            None => Ok(x),
        }
    }
}

impl Clone for Norm {
    fn clone(&self) -> Self {
        let bias = self.bias.as_ref().map(Tensor::shallow_clone);
        Norm { weight: self.weight.shallow_clone(), bias, eps: self.eps, rms: self.rms }
    }
}
