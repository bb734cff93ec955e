//! libtorch's AdamW in one kernel for all weights.

use std::ffi::c_char;

use tch::{TchError, Tensor};
use torch_sys::C_tensor;

use super::autograd::take;
use crate::error::Result;

/// A weight, its gradient, and the moving averages of the gradient and of its square.
pub(crate) type FusedSlot<'a> = [&'a Tensor; 4];

/// The numbers of a step of AdamW.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AdamWStep {
    pub(crate) lr: f64,
    pub(crate) betas: (f64, f64),
    pub(crate) weight_decay: f64,
    pub(crate) eps: f64,
}

/// Updates the weights of all `slots`. `number` is a tensor `[]` in f32 on the device of the
/// weights, which holds the number of the step, from 1.
pub(crate) fn fused_adamw(slots: &[FusedSlot], number: &Tensor, step: &AdamWStep) -> Result<()> {
    if slots.iter().flatten().any(|tensor| !tensor.defined()) {
        return Err(TchError::Torch("a weight of the optimizer is undefined".to_owned()).into());
    }
    let pointers = |index: usize| slots.iter().map(|slot| slot[index].as_ptr()).collect::<Vec<_>>();
    let [weights, gradients, means, squares] = [0, 1, 2, 3].map(pointers);
    // SAFETY: the tensors outlive the call, each array has the length of `slots`, and all other
    // arguments are plain values.
    take(unsafe {
        convpass_fused_adamw(
            weights.as_ptr(),
            gradients.as_ptr(),
            means.as_ptr(),
            squares.as_ptr(),
            slots.len(),
            number.as_ptr(),
            step.lr,
            step.betas.0,
            step.betas.1,
            step.weight_decay,
            step.eps,
        )
    })
}

unsafe extern "C" {
    fn convpass_fused_adamw(
        weights: *const *const C_tensor,
        gradients: *const *const C_tensor,
        means: *const *const C_tensor,
        squares: *const *const C_tensor,
        count: usize,
        number: *const C_tensor,
        lr: f64,
        beta1: f64,
        beta2: f64,
        weight_decay: f64,
        eps: f64,
    ) -> *mut c_char;
}
