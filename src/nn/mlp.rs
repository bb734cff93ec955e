//! The MLP sub-layer.

use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::{Linear, quick_gelu};
use crate::error::Result;

/// The activation between the two linear layers of the MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum MlpActivation {
    /// The exact (erf) GELU of ViT, DINOv2 and most open_clip models.
    Gelu,
    /// GELU with the tanh approximation: `0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`, the
    /// activation of SigLIP.
    GeluTanh,
    /// `x * sigmoid(1.702 x)`, the activation of OpenAI's CLIP.
    QuickGelu,
    /// `max(x, 0)`.
    Relu,
    /// `x * sigmoid(x)`.
    Silu,
    /// `silu(gate) * value`, the activation of DINOv2 ViT-g. The weight of `fc1` is `[2 * mlp_dim,
    /// C]`: first the rows of gate, then those of value.
    SwiGlu,
}

impl MlpActivation {
    /// Returns the output width of the first layer divided by `mlp_dim`.
    pub(crate) fn halves(self) -> i64 {
        if self == MlpActivation::SwiGlu { 2 } else { 1 }
    }

    /// Applies the activation: `[.., hidden] -> [.., hidden]`. SwiGLU halves the width.
    pub(crate) fn apply(self, x: &Tensor) -> Result<Tensor> {
        Ok(match self {
            MlpActivation::Gelu => x.f_gelu("none")?,
            MlpActivation::GeluTanh => x.f_gelu("tanh")?,
            MlpActivation::QuickGelu => quick_gelu(x)?,
            MlpActivation::Relu => x.f_relu()?,
            MlpActivation::Silu => x.f_silu()?,
            MlpActivation::SwiGlu => {
                let half = x.size().last().copied().unwrap_or_default() / 2;
                let (gate, value) = (x.f_narrow(-1, 0, half)?, x.f_narrow(-1, half, half)?);
                gate.f_silu()?.f_mul(&value)?
            }
        })
    }
}

/// Two linear layers with an activation between them.
#[derive(Clone, Debug)]
pub(crate) struct Mlp {
    pub(crate) fc1: Linear,
    pub(crate) fc2: Linear,
    pub(crate) activation: MlpActivation,
}

impl Mlp {
    /// Applies the activation: `[B, T, hidden] -> [B, T, hidden]`. SwiGLU halves the width.
    pub(crate) fn activate(&self, x: &Tensor) -> Result<Tensor> {
        self.activation.apply(x)
    }
}
