//! Weights at 8, 4, 2 or 1 bit. All tensors share one codebook; each tensor has its own mean and
//! standard deviation (Jie, Wang and Deng, "Revisiting the Parameter Efficiency of Adapters from
//! the Perspective of Precision Redundancy", arXiv 2307.16867).

use std::sync::OnceLock;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::params::Params;
use super::petl_method::{ActsFrom, PetlMethod, json};
use super::{ConvBypassConfig, Method};
use crate::error::{Error, Result};
use crate::ffi::send;
use crate::nn::identity_kernel;
use crate::seam::{BackboneShape, Place, Seam};

/// Another method whose weights are trained to be stored at few bits.
///
/// Each pass replaces a weight by `std * level + mean`. The level is the one nearest to the weight
/// after its tensor is normalized by its mean and (population) standard deviation. The gradient
/// passes unchanged to the weight (straight-through estimator).
///
/// The levels have the least mean square error on a normal distribution (Lloyd and Max), because
/// the paper assumes that trained adapter weights are normal. A kernel that starts as the identity
/// is coded as its difference from the identity. The head stays in f32.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LowBitConfig {
    /// Bits per weight: 1, 2, 4 or 8.
    pub bits: i64,
    /// The method whose weights are stored at few bits. It may not train weights of the backbone.
    pub method: Box<Method>,
}

impl Default for LowBitConfig {
    fn default() -> Self {
        let method = Box::new(Method::ConvBypass(ConvBypassConfig::default()));
        LowBitConfig { bits: 1, method }
    }
}

impl LowBitConfig {
    /// Checks the bits and the method.
    ///
    /// # Errors
    /// Returns [`Error::Config`] for the first invalid field.
    pub fn validate(&self) -> Result<()> {
        self.check().map_err(|error| error.in_config("LowBitConfig"))
    }

    fn check(&self) -> Result<()> {
        if ![1, 2, 4, 8].contains(&self.bits) {
            return Err(Error::config("bits", "1, 2, 4 or 8", self.bits));
        }
        if !self.method.inner().can_be_low_bit() {
            let expected = "a method that trains only its own weights, in f32";
            return Err(Error::config("method", expected, self.method.name()));
        }
        self.method.validate()
    }
}

impl PetlMethod for LowBitConfig {
    fn name(&self) -> &'static str {
        "low_bit"
    }

    fn config(&self) -> Value {
        json(self)
    }

    fn validate(&self) -> Result<()> {
        self.validate()
    }

    /// `build` checks the needs of the inner method.
    fn needs(&self) -> &[Place] {
        &[]
    }

    fn starts_as_identity(&self) -> bool {
        self.method.starts_as_identity()
    }

    fn acts_from(&self, shape: &BackboneShape) -> ActsFrom {
        self.method.inner().acts_from(shape)
    }

    fn build(&self, params: &mut Params, shape: &BackboneShape) -> Result<Box<dyn Seam>> {
        self.method.build_over(&mut params.quantized(self.bits), shape)
    }

    fn can_be_low_bit(&self) -> bool {
        false
    }

    fn folds_beside_others(&self) -> bool {
        self.method.inner().folds_beside_others()
    }
}

/// The coding of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Coding {
    /// Bits per weight: 1, 2, 4 or 8.
    pub(crate) bits: i64,
    /// Whether the difference from an identity kernel is coded. Without this, a few ones among
    /// zeros would be far from a normal distribution.
    pub(crate) around_identity: bool,
}

/// A tensor as indices into the codebook.
#[derive(Debug)]
pub(crate) struct Coded {
    /// Mean of the tensor, `[]`, in f32.
    pub(crate) mean: Tensor,
    /// Population standard deviation of the tensor, `[]`, in f32.
    pub(crate) std: Tensor,
    /// Index of each weight's level, in the shape of the tensor, i64.
    pub(crate) codes: Tensor,
}

impl Coding {
    /// Returns the bytes that a file needs for a tensor of `count` weights: codes, mean and
    /// standard deviation.
    pub(crate) fn stored_bytes(self, count: i64) -> i64 {
        self.code_bytes(count).saturating_add(8)
    }

    /// Returns the bytes of the codes of `count` weights.
    pub(crate) fn code_bytes(self, count: i64) -> i64 {
        count.saturating_mul(self.bits).saturating_add(7) / 8
    }

    /// Codes each weight as its nearest level. A weight halfway between two levels gets the lower
    /// one.
    pub(crate) fn code(self, weight: &Tensor) -> Result<Coded> {
        let weight = weight.f_detach()?.f_to_kind(Kind::Float)?;
        let weight = match self.base(&weight)? {
            Some(base) => weight.f_sub(&base)?,
            None => weight,
        };
        let mean = weight.f_mean(Kind::Float)?;
        let centred = weight.f_sub(&mean)?;
        let std = centred.f_square()?.f_mean(Kind::Float)?.f_sqrt()?;
        // Every level of a constant tensor has the same value, the mean.
        let normed = centred.f_div(&std.f_clamp_min(f64::from(f32::MIN_POSITIVE))?)?;
        let levels = levels(self.bits)?;
        let midpoints: Vec<f32> = levels.windows(2).map(|pair| 0.5 * (pair[0] + pair[1])).collect();
        let midpoints = send(&Tensor::f_from_slice(&midpoints)?, weight.device())?;
        let codes = normed.f_contiguous()?.f_bucketize(&midpoints, false, false)?;
        Ok(Coded { mean, std, codes })
    }

    /// Returns `std * level + mean` for each code.
    pub(crate) fn value(self, coded: &Coded) -> Result<Tensor> {
        let levels = send(&Tensor::f_from_slice(levels(self.bits)?)?, coded.codes.device())?;
        let value = levels.f_take(&coded.codes)?.f_mul(&coded.std)?.f_add(&coded.mean)?;
        match self.base(&value)? {
            Some(base) => Ok(value.f_add(&base)?),
            None => Ok(value),
        }
    }

    /// Returns the value of each weight's level. Backward passes its gradient unchanged to the
    /// weight.
    pub(crate) fn straight_through(self, weight: &Tensor) -> Result<Tensor> {
        let value = tch::no_grad(|| self.value(&self.code(weight)?))?;
        // The sum equals `value`, because the added difference is zero.
        Ok(value.f_add(&weight.f_sub(&weight.f_detach()?)?)?)
    }

    /// Returns the tensor that is subtracted before coding, in the shape and on the device of
    /// `weight`.
    fn base(self, weight: &Tensor) -> Result<Option<Tensor>> {
        if self.around_identity {
            Ok(Some(send(&identity_kernel(&weight.size())?, weight.device())?))
        } else {
            Ok(None)
        }
    }
}

/// Returns the `2^bits` levels of the codebook in ascending order.
fn levels(bits: i64) -> Result<&'static [f32]> {
    static LEVELS: [OnceLock<Vec<f32>>; 4] = [const { OnceLock::new() }; 4];
    let slot = match bits {
        1 => &LEVELS[0],
        2 => &LEVELS[1],
        4 => &LEVELS[2],
        8 => &LEVELS[3],
        _ => return Err(Error::config("bits", "1, 2, 4 or 8", bits)),
    };
    match slot.get() {
        Some(levels) => Ok(levels),
        None => {
            let levels = lloyd_max(1 << bits)?;
            Ok(slot.get_or_init(|| levels))
        }
    }
}

/// Computes the `count` levels with the least mean square error on a standard normal distribution.
/// Each level is the mean of its bin.
///
/// The first levels are as dense as the cube root of the density, which is the limit for many
/// levels. Some rounds of Lloyd's iteration follow, and then Newton's method. With many levels,
/// Lloyd's iteration alone is far from the result even after thousands of rounds.
fn lloyd_max(count: i64) -> Result<Vec<f32>> {
    const LLOYD: usize = 10;
    const NEWTON: usize = 10;
    let f64s = (Kind::Double, Device::Cpu);
    let middles = Tensor::f_arange(count, f64s)?.f_add_scalar(0.5)?.f_div_scalar(count)?;
    let mut levels = middles.f_special_ndtri()?.f_mul_scalar(3f64.sqrt())?;
    for round in 0..LLOYD + NEWTON {
        let bins = Bins::between(&levels)?;
        let step = if round < LLOYD {
            bins.excess.f_div(&bins.mass)?
        } else {
            Tensor::f_linalg_solve(&bins.derivatives()?, &bins.excess, true)?
        };
        levels = levels.f_sub(&step)?;
        // The levels are symmetric; this removes rounding errors.
        levels = levels.f_sub(&levels.f_flip([0])?)?.f_mul_scalar(0.5)?;
    }
    let levels = levels.f_to_kind(Kind::Float)?;
    Ok(Vec::<f32>::try_from(&levels)?)
}

/// The bins of a codebook on a standard normal distribution. A bin holds the values nearest to one
/// level.
struct Bins {
    /// `[count]`: the probability of each bin.
    mass: Tensor,
    /// `[count]`: the difference between each level and the mean of its bin, times the mass of the
    /// bin.
    excess: Tensor,
    /// `[count - 1]`: the decrease of a level's excess per unit of increase of the next level.
    slope: Tensor,
}

impl Bins {
    fn between(levels: &Tensor) -> Result<Self> {
        let count = levels.size()[0];
        let (left, right) = (levels.f_narrow(0, 0, count - 1)?, levels.f_narrow(0, 1, count - 1)?);
        let end = Tensor::f_full([1], f64::INFINITY, (Kind::Double, Device::Cpu))?;
        let midpoints = left.f_add(&right)?.f_mul_scalar(0.5)?;
        let edges = Tensor::f_cat(&[&end.f_neg()?, &midpoints, &end], 0)?;
        let density = edges.f_square()?.f_mul_scalar(-0.5)?.f_exp()?;
        let density = density.f_div_scalar(std::f64::consts::TAU.sqrt())?;
        let over_bins = |x: &Tensor| -> Result<Tensor> {
            Ok(x.f_narrow(0, 1, count)?.f_sub(&x.f_narrow(0, 0, count)?)?)
        };
        let mass = over_bins(&edges.f_special_ndtr()?)?;
        // The mean of a bin times its mass equals the decrease of the density over the bin.
        let excess = levels.f_mul(&mass)?.f_add(&over_bins(&density)?)?;
        // A change of a level moves each edge of its bin by half of the change.
        let slope = right.f_sub(&left)?.f_mul_scalar(0.25)?;
        let slope = slope.f_mul(&density.f_narrow(0, 1, count - 1)?)?;
        Ok(Bins { mass, excess, slope })
    }

    /// Returns the derivatives of the excess by the levels, `[count, count]`.
    fn derivatives(&self) -> Result<Tensor> {
        let slope = &self.slope;
        let beside = slope.f_diag_embed(1, -2, -1)?.f_add(&slope.f_diag_embed(-1, -2, -1)?)?;
        let edges = slope.f_constant_pad_nd([1, 0])?.f_add(&slope.f_constant_pad_nd([0, 1])?)?;
        Ok(self.mass.f_sub(&edges)?.f_diag_embed(0, -2, -1)?.f_sub(&beside)?)
    }
}

/// Packs codes into bytes, beginning at the low bits of each byte. `bits` has to divide 8.
pub(crate) fn pack(codes: &[u8], bits: i64) -> Vec<u8> {
    let per_byte = (8 / bits) as usize;
    let byte = |chunk: &[u8]| {
        chunk.iter().enumerate().fold(0, |byte, (i, code)| byte | code << (i as i64 * bits))
    };
    codes.chunks(per_byte).map(byte).collect()
}

/// Returns the first `count` codes from the output of [`pack`].
pub(crate) fn unpack(bytes: &[u8], bits: i64, count: usize) -> Vec<u8> {
    let mask = u8::MAX >> (8 - bits);
    let codes = bytes
        .iter()
        .flat_map(|byte| (0..8).step_by(bits as usize).map(move |shift| byte >> shift & mask));
    codes.take(count).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::{Init, InitRng};

    #[test]
    fn levels_are_the_published_ones() {
        // Max, "Quantizing for minimum distortion" (1960), table I.
        let levels = |bits| levels(bits).unwrap();
        let close = |found: &[f32], expected: &[f32]| {
            found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-3)
        };
        assert!(close(levels(1), &[-0.7980, 0.7980]), "{:?}", levels(1));
        assert!(close(levels(2), &[-1.510, -0.4528, 0.4528, 1.510]), "{:?}", levels(2));
        let upper = [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733];
        assert!(close(&levels(4)[8..], &upper), "{:?}", levels(4));
        let eight = levels(8);
        assert!(eight.len() == 256 && eight.windows(2).all(|pair| pair[0] < pair[1]));
        assert!((eight[255] - 4.603536).abs() < 1e-5, "{}", eight[255]);
        // Each level is the mean of its bin.
        for bits in [1, 2, 4, 8] {
            let levels = Tensor::from_slice(levels(bits)).to_kind(Kind::Double);
            let Bins { mass, excess, .. } = Bins::between(&levels).unwrap();
            let excess = (excess / mass).abs().max().double_value(&[]);
            assert!(excess < 1e-6, "{bits} bits: {excess}");
        }
    }

    #[test]
    fn errors_shrink_with_the_bits() {
        let weight = InitRng::from_seed(1).draw(Init::Normal { mean: 0.3, std: 2.0 }, &[100, 100]);
        let weight = weight.unwrap();
        // Max's distortions have to be multiplied by the variance.
        for (bits, expected) in [(1, 0.3634), (2, 0.1175), (4, 0.009497), (8, 4.2e-5)] {
            let coding = Coding { bits, around_identity: false };
            let value = coding.value(&coding.code(&weight).unwrap()).unwrap();
            let error = (value - &weight).square().mean(Kind::Double).double_value(&[]) / 4.0;
            assert!((error / expected - 1.0).abs() < 0.06, "{bits} bits: {error}");
        }
    }

    #[test]
    fn constant_tensors_stay_and_gradients_go_straight_through() {
        let coding = Coding { bits: 1, around_identity: false };
        for value in [0.0, -3.5] {
            let constant = Tensor::full([7], value, (Kind::Float, Device::Cpu));
            assert_eq!(coding.straight_through(&constant).unwrap(), constant);
        }
        let kernel = identity_kernel(&[3, 3, 5, 5]).unwrap();
        let around = Coding { bits: 1, around_identity: true };
        assert_eq!(around.straight_through(&kernel).unwrap(), kernel);
        let weight = Tensor::from_slice(&[1f32, -2.0, 0.5]).set_requires_grad(true);
        let probe = Tensor::from_slice(&[3f32, 5.0, 7.0]);
        let value = coding.straight_through(&weight).unwrap();
        (value * &probe).sum(Kind::Float).backward();
        assert_eq!(weight.grad(), probe);
    }

    #[test]
    fn codes_come_back_from_their_bytes() {
        for bits in [1i64, 2, 4, 8] {
            for count in [0usize, 1, 7, 8, 9, 100] {
                let code = |i: usize| (i * 37 + 11) as u8 & (u8::MAX >> (8 - bits));
                let codes: Vec<u8> = (0..count).map(code).collect();
                let bytes = pack(&codes, bits);
                let coding = Coding { bits, around_identity: false };
                assert_eq!(bytes.len() as i64, coding.code_bytes(count as i64));
                assert_eq!(unpack(&bytes, bits, count), codes);
            }
        }
    }
}
