//! The way back from a bottleneck into the residual stream.

use tch::Tensor;

use super::params::Params;
use crate::error::Result;
use crate::nn::{Branch, Init};

/// The factor s on what a branch adds.
#[derive(Debug)]
pub(super) enum Scale {
    /// One number that is not trained.
    Fixed(f64),
    /// A trained factor per channel, `[C]`: the learned scaling of Adapter+ (Steitz and Roth,
    /// "Adapters Strike Back", CVPR 2024).
    PerChannel(Tensor),
}

/// `s * (hidden W^T + b)`, `[.., h] -> [.., C]`, which starts at zero.
#[derive(Debug)]
pub(super) struct UpProjection {
    pub(super) weight: Tensor,
    pub(super) bias: Tensor,
    pub(super) scale: Scale,
}

impl UpProjection {
    /// Weights `{name}.weight [C, h]` and `{name}.bias [C]`, zero, and `scale [C]`, every
    /// channel at `scale`, if `channel_scale`.
    pub(super) fn new(
        params: &mut Params,
        name: &str,
        (c, h): (i64, i64),
        scale: f64,
        channel_scale: bool,
    ) -> Result<Self> {
        let zero = Init::Constant(0.0);
        Ok(UpProjection {
            weight: params.get(format_args!("{name}.weight"), &[c, h], zero)?,
            bias: params.get(format_args!("{name}.bias"), &[c], zero)?,
            scale: match channel_scale {
                false => Scale::Fixed(scale),
                true => Scale::PerChannel(params.get("scale", &[c], Init::Constant(scale))?),
            },
        })
    }

    /// Number of weights.
    pub(super) fn num_params(c: i64, h: i64, channel_scale: bool) -> i64 {
        c * h + c + if channel_scale { c } else { 0 }
    }

    /// `[.., h] -> [.., C]`.
    pub(super) fn forward(&self, hidden: &Tensor) -> Result<Tensor> {
        let x = hidden.f_linear(&self.weight, Some(&self.bias))?;
        Ok(match &self.scale {
            Scale::Fixed(1.0) => x,
            Scale::Fixed(scale) => x.f_mul_scalar(*scale)?,
            Scale::PerChannel(scale) => x.f_mul(scale)?,
        })
    }

    /// Adds [`UpProjection::forward`] of the kept samples' `hidden`, `[K, T, h]`, into
    /// `residual`, `[B, T, C]`.
    pub(super) fn add_into(
        &self,
        residual: &Tensor,
        hidden: &Tensor,
        branch: &Branch,
    ) -> Result<Tensor> {
        match branch {
            Branch::All => add_product(residual, hidden, &self.weight, &self.bias, &self.scale),
            Branch::Kept { index, scale } => {
                let mut output = hidden.f_linear(&self.weight, Some(&self.bias))?;
                let output = match &self.scale {
                    Scale::Fixed(own) => output.f_mul_scalar_(own * scale)?,
                    Scale::PerChannel(own) => output.f_mul(own)?.f_mul_scalar_(*scale)?,
                };
                Ok(residual.f_index_add(0, index, &output)?)
            }
        }
    }
}

/// `residual + s * (hidden W^T + b)` without a pass of its own over `[B, T, C]` for the bias, the
/// scale and the sum: one product accumulates into the residual stream.
pub(super) fn add_product(
    residual: &Tensor,
    hidden: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    scale: &Scale,
) -> Result<Tensor> {
    // [B * T, h + 1] x [h + 1, C]: a column of ones carries the bias.
    let (hidden, flat) = (hidden.f_flatten(0, 1)?, residual.f_flatten(0, 1)?);
    let ones = hidden.f_new_ones([hidden.size()[0], 1], (hidden.kind(), hidden.device()))?;
    let left = Tensor::f_cat(&[&hidden, &ones], 1)?;
    // s goes into the small matrix, where it costs nothing.
    let right = Tensor::f_cat(&[weight, &bias.f_unsqueeze(1)?], 1)?;
    let right = match scale {
        Scale::Fixed(scale) => right.f_mul_scalar(*scale)?,
        Scale::PerChannel(scale) => right.f_mul(&scale.f_unsqueeze(1)?)?,
    };
    let sum = flat.f_addmm(&left, &right.f_transpose(0, 1)?)?;
    Ok(sum.f_reshape(residual.size())?)
}
