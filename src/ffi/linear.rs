//! Linear layers on a CPU by oneDNN, which tch does not bind.

use std::ffi::c_char;
use std::ptr;

use tch::Tensor;
use torch_sys::C_tensor;

use super::autograd::take;
use crate::error::Result;

/// Returns whether this libtorch can compute [`onednn_linear`].
pub(crate) fn has_onednn() -> bool {
    // SAFETY: the function takes nothing and lets no exception through.
    unsafe { convpass_has_onednn() }
}

/// Computes `x W^T + b` by oneDNN: `[.., in] -> [.., out]`. All tensors are f32 on a CPU, and no
/// gradient is tracked. The strides are free, so that `weight` may be a transposed view.
///
/// # Errors
/// Returns the error that libtorch reports.
pub(crate) fn onednn_linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let mut output = Tensor::new();
    let bias = bias.map_or(ptr::null(), Tensor::as_ptr);
    // SAFETY: the tensors outlive the call, which writes to the last one. `bias` may be null.
    take(unsafe {
        convpass_onednn_linear(x.as_ptr(), weight.as_ptr(), bias, output.as_mut_ptr())
    })?;
    Ok(output)
}

unsafe extern "C" {
    fn convpass_has_onednn() -> bool;
    fn convpass_onednn_linear(
        x: *const C_tensor,
        weight: *const C_tensor,
        bias: *const C_tensor,
        output: *mut C_tensor,
    ) -> *mut c_char;
}
