//! Seeds for the random numbers of a pass.

use tch::{Device, Kind, Tensor};

use crate::error::Result;
use crate::ffi::Recording;

/// The seed of a training pass. Each block seeds libtorch's generator with its own number, so a
/// block that is computed a second time draws the same dropout and drop path.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Noise {
    seed: i64,
    after: i64,
}

impl Noise {
    /// Creates the noise that `seed` determines.
    pub fn from_seed(seed: i64) -> Self {
        Noise { seed, after: seed_of(seed, 0) }
    }

    /// Draws the seed from libtorch's CPU generator, so `tch::manual_seed` determines it. A pass that
    /// is recorded draws nothing and leaves the generators as they are.
    ///
    /// # Errors
    /// Returns the error that libtorch reports.
    pub fn from_libtorch() -> Result<Self> {
        if Recording::is_active() {
            return Ok(Noise::default());
        }
        let seed = Tensor::f_randint(i64::MAX, [1], (Kind::Int64, Device::Cpu))?;
        Ok(Noise::from_seed(seed.f_int64_value(&[0])?))
    }

    /// Seeds libtorch's generator for a block.
    pub(crate) fn enter(self, block: usize) {
        seed_generators(seed_of(self.seed, 1 + block as u64));
    }

    /// Seeds libtorch's generator so that the next pass draws other numbers. The state is the same
    /// however many blocks were computed twice.
    pub(crate) fn leave(self) {
        seed_generators(self.after);
    }
}

/// Seeds libtorch's generators, which a GPU does not allow while it records a pass.
fn seed_generators(seed: i64) {
    if !Recording::is_active() {
        tch::manual_seed(seed);
    }
}

/// Returns a different seed for each `number` (SplitMix64).
pub(crate) fn seed_of(seed: i64, number: u64) -> i64 {
    let step = number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut z = (seed as u64).wrapping_add(step);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z ^ (z >> 31)) as i64
}
