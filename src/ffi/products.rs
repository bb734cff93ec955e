//! Products, sums and the gradient of a convolution. tch binds them without the factors, or not.

use std::ffi::c_char;

use tch::Tensor;
use torch_sys::C_tensor;

use super::autograd::take;
use crate::error::Result;

/// Returns the gradients of `input [B, i, rows, cols]` and of the odd, square `kernel [o, i, k, k]`
/// of a convolution with zeros around the image, from that of its output `[B, o, rows, cols]`.
///
/// # Errors
/// Returns the error that libtorch reports.
pub(crate) fn convolution_backward(
    gradient: &Tensor,
    input: &Tensor,
    kernel: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let (mut of_input, mut of_kernel) = (Tensor::new(), Tensor::new());
    // SAFETY: the tensors outlive the call, which writes to the last two.
    take(unsafe {
        convpass_convolution_backward(
            gradient.as_ptr(),
            input.as_ptr(),
            kernel.as_ptr(),
            of_input.as_mut_ptr(),
            of_kernel.as_mut_ptr(),
        )
    })?;
    Ok((of_input, of_kernel))
}

/// Computes `out = beta * x + alpha * a b` for matrices, or for batches of matrices. `x` is
/// broadcast; it may be `out` itself. If `beta` is 0, the values of `x` are not read.
///
/// # Errors
/// Returns the error that libtorch reports.
pub(crate) fn add_product(
    out: &Tensor,
    (beta, x): (f64, &Tensor),
    alpha: f64,
    a: &Tensor,
    b: &Tensor,
) -> Result<()> {
    let [out, x, a, b] = [out, x, a, b].map(Tensor::as_ptr);
    // SAFETY: the tensors outlive the call; C++ checks that they are defined and fit.
    take(unsafe { convpass_add_product(out, x, a, b, beta, alpha) })
}

/// Computes `out = a + alpha * b`. `b` is broadcast.
///
/// # Errors
/// Returns the error that libtorch reports.
pub(crate) fn add_scaled(out: &Tensor, a: &Tensor, alpha: f64, b: &Tensor) -> Result<()> {
    let [out, a, b] = [out, a, b].map(Tensor::as_ptr);
    // SAFETY: as in `add_product`.
    take(unsafe { convpass_add_scaled(out, a, b, alpha) })
}

unsafe extern "C" {
    fn convpass_convolution_backward(
        gradient: *const C_tensor,
        input: *const C_tensor,
        kernel: *const C_tensor,
        of_input: *mut C_tensor,
        of_kernel: *mut C_tensor,
    ) -> *mut c_char;
    fn convpass_add_product(
        out: *const C_tensor,
        x: *const C_tensor,
        a: *const C_tensor,
        b: *const C_tensor,
        beta: f64,
        alpha: f64,
    ) -> *mut c_char;
    fn convpass_add_scaled(
        out: *const C_tensor,
        a: *const C_tensor,
        b: *const C_tensor,
        alpha: f64,
    ) -> *mut c_char;
}
