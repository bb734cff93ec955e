//! libtorch's linear layer with weights and activations in int8, which tch does not bind.

use std::ffi::{c_char, c_void};
use std::ptr::{self, NonNull};

use tch::{TchError, Tensor};
use torch_sys::C_tensor;

use super::autograd::take;
use crate::error::Result;

/// A weight in int8 in the order in which libtorch's product reads it.
#[derive(Debug)]
pub(crate) struct PackedInt8(NonNull<c_void>);

// SAFETY: libtorch only reads a packed weight, and it counts its owners atomically.
unsafe impl Send for PackedInt8 {}
// SAFETY: as above.
unsafe impl Sync for PackedInt8 {}

impl PackedInt8 {
    /// Packs `weight [out, in]`, int8 on a CPU, whose rows have the factors `scale [out]`.
    ///
    /// # Errors
    /// Returns the error that libtorch reports.
    pub(crate) fn new(weight: &Tensor, scale: &Tensor) -> Result<Self> {
        let mut packed = ptr::null_mut();
        // SAFETY: the tensors outlive the call, which copies their values and writes to `packed`.
        take(unsafe { convpass_int8_pack(weight.as_ptr(), scale.as_ptr(), &raw mut packed) })?;
        let nothing = || TchError::Torch("libtorch packed no weight".to_owned());
        Ok(PackedInt8(NonNull::new(packed).ok_or_else(nothing)?))
    }

    /// Computes `x W^T`: `[.., in] -> [.., out]`, both f32 on a CPU. `x` is rounded to 256 values
    /// between the smallest and the largest of all its values.
    ///
    /// # Errors
    /// Returns the error that libtorch reports.
    pub(crate) fn product(&self, x: &Tensor) -> Result<Tensor> {
        let mut output = Tensor::new();
        // SAFETY: `self` and the tensors outlive the call, which writes to the last one.
        take(unsafe { convpass_int8_linear(self.0.as_ptr(), x.as_ptr(), output.as_mut_ptr()) })?;
        Ok(output)
    }
}

impl Drop for PackedInt8 {
    fn drop(&mut self) {
        // SAFETY: the pointer comes from `convpass_int8_pack` and is dropped once.
        unsafe { convpass_int8_drop(self.0.as_ptr()) }
    }
}

unsafe extern "C" {
    fn convpass_int8_pack(
        weight: *const C_tensor,
        scale: *const C_tensor,
        packed: *mut *mut c_void,
    ) -> *mut c_char;
    fn convpass_int8_linear(
        packed: *const c_void,
        x: *const C_tensor,
        output: *mut C_tensor,
    ) -> *mut c_char;
    fn convpass_int8_drop(packed: *mut c_void);
}
