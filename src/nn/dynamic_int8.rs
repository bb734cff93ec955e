//! Linear layers whose weights and activations are both rounded to 8 bits.

use std::cell::Cell;
use std::marker::PhantomData;

use tch::{Device, Kind, Tensor};

use super::stored::widened;
use crate::error::{Error, Result};
use crate::ffi::{PackedInt8, has_int8_products};

/// A guard: while it lives, linear layers with int8 weights round their input to 8 bits as well and
/// multiply integers. This is for evaluation, because the rounded product has no gradient.
#[derive(Debug)]
#[must_use = "the products are rounded until the guard is dropped"]
pub(crate) struct DynamicInt8 {
    /// Makes the guard `!Send`, because the count is that of a thread.
    _thread: PhantomData<*const ()>,
}

thread_local! {
    /// The number of guards of this thread.
    static GUARDS: Cell<usize> = const { Cell::new(0) };
}

impl DynamicInt8 {
    /// Creates a guard for layers on `device`.
    ///
    /// # Errors
    /// [`Error::Config`] if `device` is not a CPU, or one without instructions for int8 products.
    pub(crate) fn enter(device: Device) -> Result<Self> {
        if device != Device::Cpu {
            let expected = "a CPU, for products in int8";
            return Err(Error::config("device", expected, format!("{device:?}")));
        }
        if !has_int8_products() {
            let expected = "a precision of this processor, which has no AVX512-VNNI";
            return Err(Error::config("precision", expected, "int8-dynamic"));
        }
        GUARDS.set(GUARDS.get() + 1);
        Ok(DynamicInt8 { _thread: PhantomData })
    }

    /// Returns whether a guard of this thread is alive.
    pub(crate) fn is_on() -> bool {
        GUARDS.get() > 0
    }
}

impl Drop for DynamicInt8 {
    fn drop(&mut self) {
        GUARDS.set(GUARDS.get() - 1);
    }
}

/// Computes a linear layer with the packed weight: `[.., in] -> [.., out]`, in the dtype of `x`.
///
/// # Errors
/// [`Error::Config`] if `x` needs a gradient; the errors of libtorch.
pub(super) fn rounded_product(
    x: &Tensor,
    packed: &PackedInt8,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    if x.requires_grad() {
        let expected = "a precision with gradients, to train";
        return Err(Error::config("precision", expected, "int8-dynamic"));
    }
    tch::no_grad(|| {
        let x32 = x.f_to_kind(Kind::Float)?;
        // libtorch rounds all rows with one step. Tokens whose values are a hundred times those of
        // others are common, so each row is divided by its largest absolute value first.
        let largest = x32.f_norm_scalaropt_dim(f64::INFINITY, [-1i64], true)?;
        let largest = largest.f_clamp_min(f64::from(f32::MIN_POSITIVE))?;
        let mut divided = x32.f_div(&largest)?;
        if !bool::try_from(largest.f_isfinite()?.f_all()?)? {
            // A NaN would spoil the step of all rows. The row itself gets it back from `largest`.
            divided = divided.f_nan_to_num_(0.0, 0.0, 0.0)?;
        }
        let mut output = packed.product(&divided)?;
        output = match bias {
            Some(bias) => widened(bias, &output)?.f_addcmul(&output, &largest)?,
            None => output.f_mul_(&largest)?,
        };
        Ok(output.f_to_kind(x.kind())?)
    })
}
