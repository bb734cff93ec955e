//! Random initial values from the crate's own generator. They do not change with the version of
//! libtorch, and drawing them does not advance libtorch's generator.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};

/// The initial values of a weight. Random values come from the crate's own generator, so a seed
/// gives the same values with every version of libtorch.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Init {
    /// Every entry has the same value.
    Constant(f64),
    /// Uniform on `[-bound, bound)`.
    Uniform {
        /// End of the interval.
        bound: f64,
    },
    /// Xavier (Glorot) uniform with gain 1 for a weight `[out, in, ..]`.
    XavierUniform,
    /// Kaiming (He) uniform with `a = sqrt(5)` for a weight `[out, in]`: the bound is `1 /
    /// sqrt(in)`. PyTorch initializes its linear layers this way.
    KaimingUniform,
    /// Normal distribution.
    Normal {
        /// Mean.
        mean: f64,
        /// Standard deviation.
        std: f64,
    },
    /// The identity, for a convolution `[h, h / groups, k, k]` with odd k: the filter of each
    /// channel is one at its centre tap for that channel and zero elsewhere.
    IdentityKernel,
}

/// A seeded source of initial values (ChaCha8).
#[derive(Clone, Debug)]
pub(crate) struct InitRng(ChaCha8Rng);

impl InitRng {
    pub(crate) fn from_seed(seed: i64) -> Self {
        InitRng(ChaCha8Rng::seed_from_u64(seed as u64))
    }

    /// Draws the seed from libtorch's CPU generator, so `tch::manual_seed` determines it.
    pub(crate) fn from_libtorch() -> Result<Self> {
        let seed = Tensor::f_randint(i64::MAX, [1], (Kind::Int64, Device::Cpu))?;
        Ok(InitRng::from_seed(seed.f_int64_value(&[0])?))
    }

    /// Returns a weight of shape `shape` in f32 on the CPU.
    pub(crate) fn draw(&mut self, init: Init, shape: &[i64]) -> Result<Tensor> {
        match init {
            Init::Constant(value) => Ok(Tensor::f_full(shape, value, (Kind::Float, Device::Cpu))?),
            Init::Uniform { bound } => self.uniform(shape, bound),
            Init::XavierUniform => {
                let field = product(&shape[shape.len().min(2)..]);
                let fans = shape.iter().take(2).fold(0, |sum: i64, &side| sum.saturating_add(side));
                let fans = fans.saturating_mul(field);
                self.uniform(shape, (6.0 / fans as f64).sqrt())
            }
            Init::KaimingUniform => {
                let inputs = product(&shape[shape.len().min(1)..]);
                self.uniform(shape, (inputs as f64).sqrt().recip())
            }
            Init::Normal { mean, std } => Ok(self.normal(shape, std)?.f_add_scalar(mean)?),
            Init::IdentityKernel => identity_kernel(shape),
        }
    }

    fn uniform(&mut self, shape: &[i64], bound: f64) -> Result<Tensor> {
        let bound = bound as f32;
        self.fill(shape, |rng| (2.0 * rng.unit() - 1.0) * bound)
    }

    /// Draws from the normal distribution with mean 0 (Box-Muller).
    pub(crate) fn normal(&mut self, shape: &[i64], std: f64) -> Result<Tensor> {
        let std = std as f32;
        let mut spare = None;
        self.fill(shape, |rng| {
            std * spare.take().unwrap_or_else(|| {
                let radius = (-2.0 * (1.0 - rng.unit()).ln()).sqrt();
                let (sin, cos) = (std::f32::consts::TAU * rng.unit()).sin_cos();
                spare = Some(radius * sin);
                radius * cos
            })
        })
    }

    /// Draws from the uniform distribution on `[0, 1)`, in steps of 2^-24.
    fn unit(&mut self) -> f32 {
        (self.0.next_u32() >> 8) as f32 * (-24f32).exp2()
    }

    fn fill(&mut self, shape: &[i64], mut draw: impl FnMut(&mut Self) -> f32) -> Result<Tensor> {
        let count = shape
            .iter()
            .try_fold(1usize, |count, &side| count.checked_mul(usize::try_from(side).ok()?));
        let mut values: Vec<f32> = Vec::new();
        let too_large = || Error::config("shape", "one that fits in memory", format!("{shape:?}"));
        let count = count.ok_or_else(too_large)?;
        values.try_reserve_exact(count).map_err(|_| too_large())?;
        values.extend((0..count).map(|_| draw(self)));
        Ok(Tensor::f_from_slice(&values)?.f_reshape(shape)?)
    }
}

/// Returns [`Init::IdentityKernel`] on the CPU.
pub(crate) fn identity_kernel(shape: &[i64]) -> Result<Tensor> {
    let &[outputs, inputs, rows, cols] = shape else { return Err(no_identity(shape)) };
    if inputs < 1 || outputs % inputs != 0 || rows != cols || rows % 2 == 0 {
        return Err(no_identity(shape));
    }
    let kernel = Tensor::f_zeros(shape, (Kind::Float, Device::Cpu))?;
    let centre = cols / 2;
    let taps = kernel.f_select(3, centre)?.f_select(2, centre)?;
    // Within each group, output i reads input i.
    for group in 0..outputs / inputs {
        let _filled =
            taps.f_narrow(0, group * inputs, inputs)?.f_diagonal(0, 0, 1)?.f_fill_(1.0)?;
    }
    Ok(kernel)
}

fn no_identity(shape: &[i64]) -> Error {
    Error::config("shape", "[h, h / groups, k, k] with odd k", format!("{shape:?}"))
}

fn product(sides: &[i64]) -> i64 {
    sides.iter().fold(1, |product, &side| product.saturating_mul(side))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_repeats_and_moments_fit() {
        let draw = |seed| InitRng::from_seed(seed).normal(&[100, 101], 0.02).unwrap();
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
        assert!((draw(7).std(true).double_value(&[]) - 0.02).abs() < 3e-4);

        let weight = InitRng::from_seed(1).draw(Init::XavierUniform, &[8, 16, 3, 3]).unwrap();
        let bound = (6.0f64 / (24.0 * 9.0)).sqrt();
        assert!(weight.abs().max().double_value(&[]) <= bound);
        assert!((weight.std(true).double_value(&[]) - bound / 3f64.sqrt()).abs() < 0.05 * bound);
    }

    #[test]
    fn an_identity_kernel_leaves_an_image_as_it_is() {
        let kernel = InitRng::from_seed(0).draw(Init::IdentityKernel, &[4, 4, 5, 5]).unwrap();
        let image = Tensor::rand([1, 4, 6, 7], (Kind::Float, Device::Cpu));
        let same = image.conv2d(&kernel, None::<&Tensor>, [1; 2], [2; 2], [1; 2], 1);
        assert_eq!(same, image);
        for groups in [2, 4] {
            let kernel = identity_kernel(&[4, 4 / groups, 3, 3]).unwrap();
            let same = image.conv2d(&kernel, None::<&Tensor>, [1; 2], [1; 2], [1; 2], groups);
            assert_eq!(same, image);
        }
        for shape in [&[4i64, 4, 3][..], &[4, 0, 3, 3], &[4, 3, 3, 3], &[4, 4, 2, 2], &[]] {
            identity_kernel(shape).unwrap_err();
        }
    }
}
