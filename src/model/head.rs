//! The classification head.

use tch::{Device, Kind, Tensor, nn};

use crate::error::{Error, Result};
use crate::nn::{Init, InitRng, Linear, variable};

/// Creates `head.weight [K, C]` and `head.bias [K]`. The weights are uniform with the bound `1 /
/// sqrt(C)`, which is PyTorch's default for a linear layer; the bias is zero.
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

/// Copies the values into the variables of `head`: either both or none. Without a bias value, the
/// bias becomes zero.
pub(super) fn set_head(head: &Linear, weight: &Tensor, bias: Option<&Tensor>) -> Result<()> {
    check("weight", &head.weight, weight)?;
    if let (Some(own), Some(bias)) = (&head.bias, bias) {
        check("bias", own, bias)?;
    }
    tch::no_grad(|| {
        head.weight.shallow_clone().f_copy_(weight)?;
        if let Some(own) = &head.bias {
            let mut own = own.shallow_clone();
            match bias {
                Some(bias) => own.f_copy_(bias)?,
                None => _ = own.f_zero_()?,
            }
        }
        Ok(())
    })
}

fn check(argument: &'static str, own: &Tensor, value: &Tensor) -> Result<()> {
    let expected = format!("a floating-point tensor {:?}", own.size());
    let found = match value.defined() {
        false => "no tensor".to_owned(),
        true if value.size() == own.size() && value.is_floating_point() => return Ok(()),
        true => format!("{:?} {:?}", value.kind(), value.size()),
    };
    Err(Error::Input { argument, expected, found })
}
