//! The classification head.

use tch::{Device, Kind, Tensor, nn};

use crate::error::Result;
use crate::nn::{Init, InitRng, Linear, variable};

/// Creates `head.weight [K, C]` and `head.bias [K]`: uniform weights with bound `1 / sqrt(C)`,
/// which is PyTorch's default for a linear layer, and a bias of zero.
pub(super) fn head(
    vs: &nn::Path,
    feature_dim: i64,
    num_classes: i64,
    rng: &mut InitRng,
) -> Result<Linear> {
    let bound = (feature_dim as f64).sqrt().recip();
    let weight = rng.draw(Init::Uniform { bound }, &[num_classes, feature_dim])?;
    let bias = Tensor::f_zeros([num_classes], (Kind::Float, Device::Cpu))?;
    let weight = variable(vs, "head.weight", &weight)?;
    Ok(Linear::plain(weight, Some(variable(vs, "head.bias", &bias)?)))
}
