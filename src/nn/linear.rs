//! A linear layer.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use tch::{Kind, Tensor};

use super::dynamic_int8::{DynamicInt8, rounded_product};
use super::product::{is_by_onednn, product};
use super::stored::{is_narrower, widened};
use crate::error::Result;
use crate::ffi::{Backward, PackedInt8, attach};

/// A linear layer, `x W^T + b`: weight `[out, in]`, bias `[out]` or none. `Clone` shares the tensors.
#[derive(Debug)]
pub struct Linear {
    pub(crate) weight: Tensor,
    pub(crate) bias: Option<Tensor>,
    /// `[out]`, the factor of each row of an int8 weight; `None` for other dtypes.
    pub(crate) scale: Option<Tensor>,
    /// The first row of the weight within the layer that this one is a part of ([`Linear::rows`]).
    start: i64,
    packed: Arc<Mutex<PackedParts>>,
}

/// The int8 weights for [`DynamicInt8`] of a layer and of its parts, by their first row and the number
/// of rows. Each is packed by the first product that needs it.
type PackedParts = BTreeMap<(i64, i64), Arc<PackedInt8>>;

impl Linear {
    /// Creates a layer. An int8 weight needs the factors of its rows, `scale [out]`.
    pub(crate) fn new(weight: Tensor, bias: Option<Tensor>, scale: Option<Tensor>) -> Self {
        Linear { weight, bias, scale, start: 0, packed: Arc::default() }
    }

    /// Creates a layer whose weight needs no scale.
    pub(crate) fn plain(weight: Tensor, bias: Option<Tensor>) -> Self {
        Linear::new(weight, bias, None)
    }

    /// Applies the layer: `[.., in] -> [.., out]`.
    ///
    /// # Errors
    /// Returns [`Error::Torch`](crate::Error::Torch) if `x` has another width, dtype or device.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if let Some(scale) = self.scale.as_ref().filter(|_| DynamicInt8::is_on()) {
            let packed = self.packed(scale)?;
            return rounded_product(x, &packed, self.bias.as_ref());
        }
        let weight = &self.weight;
        let is_expanded = self.scale.is_some() || is_narrower(weight, x);
        if !weight.requires_grad() && (is_expanded || is_by_onednn(x, weight)?) {
            return self.forward_frozen(x);
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
        let optional = |t: &Option<Tensor>| t.as_ref().map(rows).transpose();
        Ok(Linear {
            weight: rows(&self.weight)?,
            bias: optional(&self.bias)?,
            scale: optional(&self.scale)?,
            start: self.start + start,
            packed: Arc::clone(&self.packed),
        })
    }

    /// Returns the packed int8 weight.
    fn packed(&self, scale: &Tensor) -> Result<Arc<PackedInt8>> {
        let mut parts = self.packed.lock().unwrap_or_else(PoisonError::into_inner);
        let part = (self.start, scale.numel() as i64);
        if let Some(packed) = parts.get(&part) {
            return Ok(Arc::clone(packed));
        }
        let packed = Arc::new(PackedInt8::new(&self.weight, scale)?);
        parts.insert(part, Arc::clone(&packed));
        Ok(packed)
    }

    /// Computes the layer with a weight that is not trained. A weight in int8 or f16 is expanded for
    /// the product, and the expanded copy is freed after it, in forward and in backward.
    ///
    /// libtorch's own product with int8 weights (`_weight_int8pack_mm`) has no gradient. On a CPU it
    /// takes 35 times as long for the rows of a batch of 8 in f32, and 3 times as long in bf16.
    fn forward_frozen(&self, x: &Tensor) -> Result<Tensor> {
        // The bias may be trained although the weight is frozen.
        let (trained, frozen) = match &self.bias {
            Some(bias) if bias.requires_grad() => (Some(bias), None),
            bias => (None, bias.as_ref()),
        };
        let frozen = frozen.map(|bias| widened(bias, x)).transpose()?;
        let mut output = product(x, &self.values(x.kind())?, frozen.as_ref())?;
        if x.requires_grad() {
            let saved: Vec<&Tensor> = [&self.weight].into_iter().chain(&self.scale).collect();
            output = attach(output, &[x], &saved, FrozenProduct)?;
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
        Linear {
            weight: self.weight.shallow_clone(),
            bias: shared(&self.bias),
            scale: shared(&self.scale),
            start: self.start,
            packed: Arc::clone(&self.packed),
        }
    }
}

/// The backward half of [`Linear::forward_frozen`]. It saves the weight and, if there is one, its
/// scale.
struct FrozenProduct;

impl Backward for FrozenProduct {
    fn backward(
        &self,
        saved: &[Tensor],
        gradient: &Tensor,
        _wanted: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let weight = expand(&saved[0], saved.get(1), gradient.kind())?;
        Ok(vec![Some(product(gradient, &weight.f_tr()?, None)?)])
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

    /// Compares with the products in f64 within the error that the rounding of the rows explains, also
    /// where one row has values a thousand times as large.
    #[test]
    fn dynamic_int8_is_the_product_of_rounded_matrices() {
        let Ok(guard) = DynamicInt8::enter(Device::Cpu) else { return refuses_without_vnni() };
        let mut rng = InitRng::from_seed(4);
        let mut normal = |shape: &[i64]| rng.normal(shape, 1.0).unwrap();
        let double = |t: &Tensor| t.to_kind(Kind::Double);
        for (inputs, outputs) in [(16, 24), (768, 100), (3, 1), (65, 7)] {
            let (int8, scale) = quantize(&normal(&[outputs, inputs])).unwrap();
            let bias = normal(&[outputs]);
            let layer = Linear::new(int8, Some(bias.shallow_clone()), Some(scale));
            let x = normal(&[3, 5, inputs]);
            let _large = x.get(1).get(2).f_mul_scalar_(1000.0).unwrap();
            let weight = layer.values(Kind::Double).unwrap();
            let exact = double(&x).linear(&weight, Some(&double(&bias)));
            let found = layer.forward(&x).unwrap();
            assert_eq!((found.kind(), found.size()), (Kind::Float, vec![3, 5, outputs]));
            // 255 steps span at most twice the largest value of a row; values and the zero point are
            // off by half a step each.
            let step = double(&x).abs().amax([-1i64], true) * (2.0 / 255.0);
            let most = step * weight.abs().sum_dim_intlist(1, false, Kind::Double) + 1e-4;
            assert!(
                bool::try_from((double(&found) - &exact).abs().le_tensor(&most).all()).unwrap()
            );
            let half = layer.forward(&x.to_kind(Kind::BFloat16)).unwrap();
            assert_eq!(half.kind(), Kind::BFloat16);
            let rows = layer.rows(0, 1).unwrap().forward(&x).unwrap();
            assert!(rows.allclose(&found.narrow(2, 0, 1), 1e-5, 1e-5, false));
            let zeros = layer.forward(&x.zeros_like()).unwrap();
            assert!(zeros.allclose(&bias.expand_as(&zeros), 0.0, 0.0, false));
            let error = layer.forward(&x.set_requires_grad(true)).unwrap_err();
            assert!(error.to_string().contains("int8-dynamic"), "{error}");
        }
        assert!(DynamicInt8::is_on());
        drop(guard);
        assert!(!DynamicInt8::is_on());
        assert!(DynamicInt8::enter(Device::Cuda(0)).is_err());
    }

    /// The last block computes queries of the first token alone, with a part of the layer in each pass.
    #[test]
    fn each_part_is_packed_once() {
        let Ok(_guard) = DynamicInt8::enter(Device::Cpu) else { return refuses_without_vnni() };
        let mut rng = InitRng::from_seed(6);
        let (int8, scale) = quantize(&rng.normal(&[12, 16], 1.0).unwrap()).unwrap();
        let layer = Linear::new(int8, None, Some(scale));
        let packed = |layer: &Linear| layer.packed(layer.scale.as_ref().unwrap()).unwrap();
        let part = || layer.rows(4, 8).unwrap();
        let (whole, first, inner) =
            (packed(&layer), packed(&part()), packed(&part().rows(2, 6).unwrap()));
        assert!(Arc::ptr_eq(&first, &packed(&part())));
        assert!(Arc::ptr_eq(&whole, &packed(&layer.clone())));
        assert!(Arc::ptr_eq(&inner, &packed(&layer.rows(6, 6).unwrap())));
        assert!(!Arc::ptr_eq(&whole, &first) && !Arc::ptr_eq(&first, &inner));
    }

    /// Integers have no NaN. What is not finite has to stay so, and other rows have to stay as they are.
    #[test]
    fn dynamic_int8_hides_no_nan() {
        let Ok(_guard) = DynamicInt8::enter(Device::Cpu) else { return refuses_without_vnni() };
        let mut rng = InitRng::from_seed(5);
        let mut normal = |shape: &[i64]| rng.normal(shape, 1.0).unwrap();
        let (int8, scale) = quantize(&normal(&[8, 40])).unwrap();
        let layer = Linear::new(int8, None, Some(scale));
        let x = normal(&[4, 40]);
        let clean = layer.forward(&x).unwrap();
        for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            for column in 0..40 {
                let broken = x.copy();
                let _filled = broken.get(2).narrow(0, column, 1).fill_(value);
                let found = layer.forward(&broken).unwrap();
                assert!(!bool::try_from(found.get(2).isfinite().any()).unwrap(), "{value}");
                for row in [0, 1, 3] {
                    assert!(found.get(row).allclose(&clean.get(row), 0.05, 0.2, false), "{value}");
                }
            }
        }
    }

    fn refuses_without_vnni() {
        let error = DynamicInt8::enter(Device::Cpu).unwrap_err();
        assert!(error.to_string().contains("VNNI"), "{error}");
    }

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
        let layer = Linear::new(int8, Some(bias), Some(scale));
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
