//! Products with frozen weights in f32 on a CPU, and the library that computes them.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};
use crate::ffi::autocast::Autocast;
use crate::ffi::{has_onednn, is_amd_with_avx512, onednn_linear};

/// The library that computes frozen linear layers in f32 on a CPU. libtorch contains both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ProductLibrary {
    /// The BLAS that libtorch was built with, which is MKL in the builds of PyTorch for x86.
    Blas,
    /// oneDNN.
    OneDnn,
}

/// The library of this process, once it was asked for or selected.
static LIBRARY: Mutex<Option<ProductLibrary>> = Mutex::new(None);

impl ProductLibrary {
    /// Returns the library that this process uses.
    ///
    /// Unless [`ProductLibrary::select`] was called, this is oneDNN on processors of AMD with
    /// AVX-512 and the BLAS on all others. On such an EPYC a ViT-B/16 took 0.74 to 0.94 of the time
    /// that it takes with MKL (docs/performance.md).
    pub fn current() -> Self {
        *Self::of_process().get_or_insert_with(|| {
            let is_faster = is_amd_with_avx512() && has_onednn();
            if is_faster { ProductLibrary::OneDnn } else { ProductLibrary::Blas }
        })
    }

    /// Makes the whole process use this library. The results of the two differ by rounding, so call
    /// this function once, early in `main`.
    ///
    /// # Errors
    /// Returns [`Error::Config`] for oneDNN if this libtorch was built without it.
    pub fn select(self) -> Result<()> {
        if self == ProductLibrary::OneDnn && !has_onednn() {
            let found = "a libtorch without oneDNN";
            return Err(Error::config("product_library", "a library of this libtorch", found));
        }
        *Self::of_process() = Some(self);
        Ok(())
    }

    fn of_process() -> MutexGuard<'static, Option<ProductLibrary>> {
        LIBRARY.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns whether [`product`] computes `x W^T` by oneDNN. Under autocast it does not, because only
/// libtorch's own operators are cast. Widths that do not match are left to libtorch, whose message
/// names them.
pub(super) fn is_by_onednn(x: &Tensor, weight: &Tensor) -> Result<bool> {
    let fits = |t: &Tensor| t.kind() == Kind::Float && t.device() == Device::Cpu;
    Ok(fits(x)
        && fits(weight)
        && x.size().last() == weight.size().last()
        && ProductLibrary::current() == ProductLibrary::OneDnn
        && Autocast::kind(Device::Cpu)?.is_none())
}

/// Computes `x W^T + b` without tracking gradients: `[.., in] -> [.., out]`.
pub(super) fn product(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    tch::no_grad(|| {
        if is_by_onednn(x, weight)? {
            return onednn_linear(x, weight, bias);
        }
        Ok(x.f_linear(weight, bias)?)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::InitRng;

    /// Compares both libraries with the product in f64, also for a weight that is a transposed view
    /// and for rows that are not contiguous.
    #[test]
    fn onednn_is_as_exact_as_the_blas() {
        if !has_onednn() {
            assert!(ProductLibrary::OneDnn.select().is_err());
            return;
        }
        let mut rng = InitRng::from_seed(2);
        let mut normal = |shape: &[i64]| rng.normal(shape, 1.0).unwrap();
        for (rows, inputs, outputs) in [(1, 1, 1), (5, 3, 7), (197, 64, 33), (40, 768, 100)] {
            let weight = normal(&[outputs, inputs]);
            let bias = normal(&[outputs]);
            let turned = weight.tr().contiguous().tr();
            let x = normal(&[2, rows + 1, inputs]).narrow(1, 0, rows);
            for (weight, bias) in [(&weight, Some(&bias)), (&turned, None)] {
                let double = |t: &Tensor| t.to_kind(Kind::Double);
                let exact = double(&x).linear(&double(weight), bias.map(double).as_ref());
                let gap = |y: Tensor| (double(&y) - &exact).abs().max().double_value(&[]);
                let found = onednn_linear(&x, weight, bias).unwrap();
                assert_eq!(found.size(), [2, rows, outputs]);
                let (found, blas) = (gap(found), gap(x.linear(weight, bias)));
                assert!(found <= 2.0 * blas + 1e-6, "{rows} {inputs} {outputs}: {found} {blas}");
            }
        }
        let empty = Tensor::zeros([0, 4, 6], (Kind::Float, Device::Cpu));
        let weight = normal(&[8, 6]);
        assert_eq!(onednn_linear(&empty, &weight, None).unwrap().size(), [0, 4, 8]);
        assert!(product(&normal(&[3, 6]), &normal(&[8, 5]), None).is_err());
    }
}
