//! Two linear layers with a bottleneck between them, which Adapter and AdaptFormer use.

use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::params::Params;
use super::up_projection::UpProjection;
use crate::error::Result;
use crate::nn::{Branch, Init, Linear, dropout, quick_gelu};

/// The activation of a bottleneck.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BottleneckActivation {
    /// The exact (erf) GELU.
    Gelu,
    /// `x * sigmoid(1.702 x)`.
    QuickGelu,
    /// `max(x, 0)`.
    Relu,
}

/// The branch `s * (dropout(act(x W_down + b_down)) W_up + b_up)`. W_up and both biases start at
/// zero.
#[derive(Debug)]
pub(super) struct Bottleneck {
    down: Linear,
    activation: BottleneckActivation,
    dropout: f64,
    up: UpProjection,
}

/// The properties of a [`Bottleneck`].
pub(super) struct Options<'a> {
    pub(super) names: (&'a str, &'a str),
    /// Initial values of the first matrix.
    pub(super) down_init: Init,
    pub(super) activation: BottleneckActivation,
    pub(super) dropout: f64,
    pub(super) scale: f64,
    pub(super) channel_scale: bool,
}

impl Bottleneck {
    /// Creates the two layers under `options.names`, and `scale` if `channel_scale` is set, for
    /// tokens of width `c`.
    pub(super) fn new(params: &mut Params, (c, h): (i64, i64), options: &Options) -> Result<Self> {
        let (down, up) = options.names;
        Ok(Bottleneck {
            down: params.linear(down, [h, c], options.down_init)?,
            activation: options.activation,
            dropout: options.dropout,
            up: UpProjection::new(params, up, (c, h), options.scale, options.channel_scale)?,
        })
    }

    /// Adds the output for the kept samples of `x` to `residual`; both are `[B, T, C]`.
    pub(super) fn add_into(
        &self,
        residual: &Tensor,
        x: &Tensor,
        branch: &Branch,
        train: bool,
    ) -> Result<Tensor> {
        let x = self.down.forward(&branch.select(x)?)?;
        let x = match self.activation {
            BottleneckActivation::Gelu => x.f_gelu("none")?,
            BottleneckActivation::QuickGelu => quick_gelu(&x)?,
            BottleneckActivation::Relu => x.f_relu()?,
        };
        let drop = train && self.dropout > 0.0;
        let x = if drop { dropout(&x, self.dropout)? } else { x };
        self.up.add_into(residual, &x, branch)
    }
}
