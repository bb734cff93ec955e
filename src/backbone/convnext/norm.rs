//! The norm over the channels of a ConvNeXt.

use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::ConvNeXtConfig;
use crate::backbone::Weights;
use crate::error::Result;
use crate::nn::{Norm, Weight};

/// The norm of a [`ConvNeXtConfig`], over the channels at each position.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ConvNeXtNorm {
    /// The layer norm, with weight and bias.
    #[default]
    Layer,
    /// The RMS norm, with a weight: `x / sqrt(mean(x^2) + eps)`.
    Rms,
    /// Division by the standard deviation, with a weight and without subtraction of the mean:
    /// `x / sqrt(var(x) + eps)` with the unbiased variance. timm calls it `simplenorm`.
    Deviation,
}

impl ConvNeXtNorm {
    pub(super) fn is_layer(&self) -> bool {
        *self == ConvNeXtNorm::Layer
    }

    /// Returns the number of weights of a norm over `dim` channels.
    pub(super) fn num_params(self, dim: i64) -> i64 {
        if self == ConvNeXtNorm::Layer { 2 * dim } else { dim }
    }
}

/// A norm over the channels with its weights.
#[derive(Clone, Debug)]
pub(super) enum ChannelNorm {
    Usual(Norm),
    Deviation { weight: Weight, eps: f64 },
}

impl ChannelNorm {
    /// Builds the norm `name` over `dim` channels.
    pub(super) fn build(
        config: &ConvNeXtConfig,
        name: &str,
        dim: i64,
        eps: f64,
        weights: &mut Weights,
    ) -> Result<Self> {
        Ok(match config.norm {
            ConvNeXtNorm::Layer => ChannelNorm::Usual(weights.norm(name, dim, eps)?),
            ConvNeXtNorm::Rms => ChannelNorm::Usual(weights.rms_norm(name, dim, eps)?),
            ConvNeXtNorm::Deviation => {
                let weight = weights.get(&format!("{name}.weight"), &[dim])?;
                ChannelNorm::Deviation { weight, eps }
            }
        })
    }

    /// Applies the norm over the last dimension: `[.., C] -> [.., C]`.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            ChannelNorm::Usual(norm) => norm.forward(x),
            ChannelNorm::Deviation { weight, eps } => {
                let variance = x.f_var_dim(Some([-1i64].as_slice()), true, true)?;
                let scale = variance.f_add_scalar(*eps)?.f_rsqrt()?;
                Ok(x.f_mul(&scale)?.f_mul(&weight.beside(x)?)?)
            }
        }
    }

    /// Applies the norm over the channels of `[B, C, H, W]`.
    pub(super) fn forward_map(&self, x: &Tensor) -> Result<Tensor> {
        Ok(self.forward(&x.f_permute([0, 2, 3, 1])?)?.f_permute([0, 3, 1, 2])?)
    }
}
