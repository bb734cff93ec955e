//! The MLP sub-layer.

use tch::Tensor;

use super::{Linear, quick_gelu};
use crate::error::Result;

/// What stands between the two linear layers.
#[derive(Clone, Copy, Debug)]
pub(crate) enum MlpKind {
    /// Exact (erf) GELU.
    Gelu,
    /// `x * sigmoid(1.702 x)`.
    QuickGelu,
    /// `silu(gate) * value`, the two halves of the first layer's output.
    SwiGlu,
}

/// Two linear layers with an activation between them.
#[derive(Debug)]
pub(crate) struct Mlp {
    pub(crate) fc1: Linear,
    pub(crate) fc2: Linear,
    pub(crate) kind: MlpKind,
}

impl Mlp {
    /// What stands between the two linear layers: `[B, T, hidden] -> [B, T, hidden]`, of half the
    /// width for SwiGLU.
    pub(crate) fn activate(&self, x: &Tensor) -> Result<Tensor> {
        Ok(match self.kind {
            MlpKind::Gelu => x.f_gelu("none")?,
            MlpKind::QuickGelu => quick_gelu(x)?,
            MlpKind::SwiGlu => {
                let half = x.size()[2] / 2;
                let (gate, value) = (x.f_narrow(-1, 0, half)?, x.f_narrow(-1, half, half)?);
                gate.f_silu()?.f_mul(&value)?
            }
        })
    }
}
