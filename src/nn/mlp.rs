//! The MLP sub-layer.

use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::{Linear, quick_gelu};
use crate::error::Result;

/// What the MLP sub-layer computes between its two linear layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum MlpActivation {
    /// The exact (erf) GELU of ViT, DINOv2 and most open_clip models.
    Gelu,
    /// `x * sigmoid(1.702 x)`, of OpenAI's CLIP.
    QuickGelu,
    /// `silu(gate) * value`, of DINOv2 ViT-g: `fc1` packs gate then value, `[2 * mlp_dim, C]`.
    SwiGlu,
}

impl MlpActivation {
    /// How many times `mlp_dim` the first layer is wide.
    pub(crate) fn halves(self) -> i64 {
        if self == MlpActivation::SwiGlu { 2 } else { 1 }
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
    /// What stands between the two linear layers: `[B, T, hidden] -> [B, T, hidden]`, of half the
    /// width for SwiGLU.
    pub(crate) fn activate(&self, x: &Tensor) -> Result<Tensor> {
        Ok(match self.activation {
            MlpActivation::Gelu => x.f_gelu("none")?,
            MlpActivation::QuickGelu => quick_gelu(x)?,
            MlpActivation::SwiGlu => {
                let half = x.size()[2] / 2;
                let (gate, value) = (x.f_narrow(-1, 0, half)?, x.f_narrow(-1, half, half)?);
                gate.f_silu()?.f_mul(&value)?
            }
        })
    }
}
