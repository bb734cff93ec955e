//! A linear layer.

use tch::{Kind, Tensor};

use super::stored::{is_narrower, widened};
use crate::error::{Error, Result};
use crate::ffi::{Backward, attach};

/// A linear layer, `x W^T + b`: weight `[out, in]`, bias `[out]` or none. `Clone` shares both
/// tensors.
#[derive(Debug)]
pub struct Linear {
    pub(crate) weight: Tensor,
    pub(crate) bias: Option<Tensor>,
    /// `[out]`, the factor of each row of an int8 weight; `None` for other dtypes.
    pub(crate) scale: Option<Tensor>,
}

impl Linear {
    /// Creates a layer whose weight needs no scale.
    pub(crate) fn plain(weight: Tensor, bias: Option<Tensor>) -> Self {
        Linear { weight, bias, scale: None }
    }

    /// Applies the layer: `[.., in] -> [.., out]`.
    ///
    /// # Errors
    /// Returns [`Error::Torch`](crate::Error::Torch) if `x` has another width, dtype or device.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (weight, is_trained) = (&self.weight, self.weight.requires_grad());
        if self.scale.is_some() || is_narrower(weight, x) && !is_trained {
            return self.forward_expanded(x);
        }
        let bias = self.bias.as_ref().map(|bias| widened(bias, x)).transpose()?;
        Ok(x.f_linear(&widened(weight, x)?, bias.as_ref())?)
    }

    /// Returns the weight `[out, in]` in the dtype `kind`, multiplied by the scale if there is one.
    pub(crate) fn values(&self, kind: Kind) -> Result<Tensor> {
        expand(&self.weight, self.scale.as_ref(), kind)
    }

    /// Returns a layer that computes only the outputs `start..start + len`.
    pub(crate) fn rows(&self, start: i64, len: i64) -> Result<Linear> {
        let rows = |t: &Tensor| t.f_narrow(0, start, len);
        Ok(Linear {
            weight: rows(&self.weight)?,
            bias: self.bias.as_ref().map(rows).transpose()?,
            scale: self.scale.as_ref().map(rows).transpose()?,
        })
    }

    /// Expands the weight from int8 or f16 for the product and frees the expanded copy after it, in
    /// forward and in backward. libtorch's own product with int8 weights (`_weight_int8pack_mm`)
    /// has no gradient. On a CPU it takes 35 times as long for the rows of a batch of 8 in f32, and
    /// 3 times as long in bf16.
    fn forward_expanded(&self, x: &Tensor) -> Result<Tensor> {
        // The bias may be trained although the weight is frozen.
        let (trained, frozen) = match &self.bias {
            Some(bias) if bias.requires_grad() => (Some(bias), None),
            bias => (None, bias.as_ref()),
        };
        let mut output = tch::no_grad(|| {
            let weight = self.values(x.kind())?;
            let frozen = frozen.map(|bias| widened(bias, x)).transpose()?;
            Ok::<_, Error>(x.f_linear(&weight, frozen.as_ref())?)
        })?;
        if x.requires_grad() {
            let saved: Vec<&Tensor> = [&self.weight].into_iter().chain(&self.scale).collect();
            output = attach(output, &[x], &saved, ExpandedProduct)?;
        }
        match trained {
            Some(bias) => Ok(output.f_add(bias)?),
            None => Ok(output),
        }
    }
}

impl Clone for Linear {
    fn clone(&self) -> Self {
        let shared = |t: &Option<Tensor>| t.as_ref().map(Tensor::shallow_clone);
        let weight = self.weight.shallow_clone();
        Linear { weight, bias: shared(&self.bias), scale: shared(&self.scale) }
    }
}

/// The backward half of [`Linear::forward_expanded`]. It saves the weight and, if there is one, its
/// scale.
struct ExpandedProduct;

impl Backward for ExpandedProduct {
    fn backward(
        &self,
        saved: &[Tensor],
        gradient: &Tensor,
        _wanted: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let weight = expand(&saved[0], saved.get(1), gradient.kind())?;
        Ok(vec![Some(gradient.f_matmul(&weight)?)])
    }
}

/// Quantizes `weight [out, in]` to int8. Returns the int8 weight and the factor of each of its
/// rows, `[out]` in f32. The largest absolute value of a row becomes 127.
pub(crate) fn quantize(weight: &Tensor) -> Result<(Tensor, Tensor)> {
    let weight = weight.f_detach()?.f_to_kind(Kind::Float)?;
    let scale = weight.f_abs()?.f_amax([1i64], true)?.f_div_scalar(127.0)?;
    // The minimum keeps a row of zeros at zero.
    let divisor = scale.f_clamp_min(f64::from(f32::MIN_POSITIVE))?;
    let rounded = weight.f_div(&divisor)?.f_round()?.f_clamp(-127.0, 127.0)?;
    Ok((rounded.f_to_kind(Kind::Int8)?, scale.f_squeeze_dim(1)?))
}

fn expand(weight: &Tensor, scale: Option<&Tensor>, kind: Kind) -> Result<Tensor> {
    let weight = weight.f_to_kind(kind)?;
    match scale {
        Some(scale) => Ok(weight.f_mul(&scale.f_to_kind(kind)?.f_unsqueeze(1)?)?),
        None => Ok(weight),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::InitRng;
    use tch::Device;

    /// Compares with a plain layer over the weight that the int8 values stand for.
    #[test]
    fn int8_is_the_plain_layer_over_rounded_weights() {
        let mut rng = InitRng::from_seed(3);
        let mut normal = |shape: &[i64]| rng.normal(shape, 1.0).unwrap();
        let (weight, bias) = (normal(&[24, 16]), normal(&[24]));
        let _zeros = weight.get(5).zero_();
        let (int8, scale) = quantize(&weight).unwrap();
        assert_eq!((int8.kind(), int8.size(), scale.size()), (Kind::Int8, vec![24, 16], vec![24]));
        let rounded = expand(&int8, Some(&scale), Kind::Float).unwrap();
        let step = scale.max().double_value(&[]);
        assert!((&rounded - &weight).abs().max().double_value(&[]) <= 0.5001 * step);

        let plain = Linear::plain(rounded, Some(bias.shallow_clone()));
        let layer = Linear { weight: int8, bias: Some(bias), scale: Some(scale) };
        let probe = normal(&[2, 5, 24]);
        let run = |layer: &Linear| {
            let x = Tensor::linspace(-1.0, 1.0, 160, (Kind::Float, Device::Cpu));
            let x = x.view([2, 5, 16]).set_requires_grad(true);
            let y = layer.forward(&x).unwrap();
            (&y * &probe).sum(Kind::Float).backward();
            let rows = layer.rows(8, 8).unwrap().forward(&x).unwrap();
            assert!(rows.allclose(&y.narrow(2, 8, 8), 1e-5, 1e-5, false));
            (y.detach(), x.grad())
        };
        assert_eq!(run(&layer), run(&plain));
    }
}
