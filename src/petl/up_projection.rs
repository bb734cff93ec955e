//! The projection from a bottleneck back into the residual stream.

use tch::Tensor;

use super::params::Params;
use crate::error::Result;
use crate::nn::{Branch, Init};

/// The factor s of a branch.
#[derive(Debug)]
pub(super) enum Scale {
    /// One value that is not trained.
    Fixed(f64),
    /// A trained factor per channel, `[C]`: the learned scaling of Adapter+ (Steitz and Roth,
    /// "Adapters Strike Back", CVPR 2024).
    PerChannel(Tensor),
}

/// The projection `s * (hidden W^T + b)`, `[.., h] -> [.., C]`. Its output starts at zero.
#[derive(Debug)]
pub(super) struct UpProjection {
    pub(super) weight: Tensor,
    pub(super) bias: Tensor,
    pub(super) scale: Scale,
}

impl UpProjection {
    /// Creates the weights `{name}.weight [C, h]` and `{name}.bias [C]`, which start at zero. If
    /// `channel_scale`, also creates `scale [C]`, which starts at `scale` in every channel.
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
            scale: if channel_scale {
                Scale::PerChannel(params.get("scale", &[c], Init::Constant(scale))?)
            } else {
                Scale::Fixed(scale)
            },
        })
    }

    /// Computes the projection: `[.., h] -> [.., C]`.
    pub(super) fn forward(&self, hidden: &Tensor) -> Result<Tensor> {
        let x = hidden.f_linear(&self.weight, Some(&self.bias))?;
        Ok(match &self.scale {
            Scale::Fixed(1.0) => x,
            Scale::Fixed(scale) => x.f_mul_scalar(*scale)?,
            Scale::PerChannel(scale) => x.f_mul(scale)?,
        })
    }

    /// Adds the projection of `hidden`, `[K, T, h]`, which holds the kept samples, to `residual`,
    /// `[B, T, C]`.
    pub(super) fn add_into(
        &self,
        residual: &Tensor,
        hidden: &Tensor,
        branch: &Branch,
    ) -> Result<Tensor> {
        add_product(residual, hidden, &self.weight, &self.bias, &self.scale, branch)
    }
}

/// The number of columns of the left factor in [`add_product`] is a multiple of this. On a CPU,
/// products of 8 or 9 columns take up to ten times as long as those of 16. On a GPU, products in
/// bf16 need a multiple of 8 to be fast.
const ALIGNMENT: i64 = 8;

/// Returns `residual + s * (hidden W^T + b)` for the kept samples. One matrix product accumulates
/// into the residual stream, so the bias, the scale, drop path and the sum do not need separate
/// passes over `[B, T, C]`.
pub(super) fn add_product(
    residual: &Tensor,
    hidden: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    scale: &Scale,
    branch: &Branch,
) -> Result<Tensor> {
    // [B * T, k] x [k, C]. The k columns are the h columns of `hidden`, one column of ones for the
    // bias, and zeros.
    let (h, c) = (weight.size()[1], weight.size()[0]);
    let padding = (-h - 1).rem_euclid(ALIGNMENT);
    let tail = hidden.f_new_zeros([padding + 1], (hidden.kind(), hidden.device()))?;
    let _one = tail.f_narrow(0, 0, 1)?.f_fill_(1.0)?;
    let (samples, tokens) = (hidden.size()[0], hidden.size()[1]);
    let left = Tensor::f_cat(&[hidden, &tail.f_expand([samples, tokens, -1], false)?], 2)?;
    let left = branch.spread(&left, residual.size()[0])?;
    // The matrix is stored row by row, because its gradient is computed fastest this way. It
    // includes s, because scaling this small matrix costs nothing.
    let zeros = bias.f_new_zeros([padding, c], (bias.kind(), bias.device()))?;
    let right = Tensor::f_cat(&[&weight.f_transpose(0, 1)?, &bias.f_unsqueeze(0)?, &zeros], 0)?;
    let right = match scale {
        Scale::Fixed(scale) => right.f_mul_scalar(scale * branch.scale())?,
        Scale::PerChannel(scale) => right.f_mul(scale)?.f_mul_scalar(branch.scale())?,
    };
    let sum = residual.f_flatten(0, 1)?.f_addmm(&left.f_flatten(0, 1)?, &right)?;
    Ok(sum.f_reshape(residual.size())?)
}
