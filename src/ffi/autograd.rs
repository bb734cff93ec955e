//! Operations whose gradient this crate computes itself.

use std::ffi::{CStr, CString, c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;

use tch::Tensor;
use torch_sys::C_tensor;

use crate::error::Result;

/// The backward half of an operation on tensors.
pub(crate) trait Backward: Send + 'static {
    /// Returns the gradient of each input, in the order in which [`attach`] received the inputs,
    /// from the gradient of the output. The gradient of an input that is not `wanted` may be
    /// `None`. `saved` holds the tensors that [`attach`] received as `saved`.
    fn backward(
        &self,
        saved: &[Tensor],
        gradient: &Tensor,
        wanted: &[bool],
    ) -> Result<Vec<Option<Tensor>>>;
}

/// Makes `output` the result of an operation on `inputs` whose gradient `backward` computes.
/// `output` has to be computed without gradient tracking, and it may not be one of the inputs.
///
/// libtorch frees `saved` when it frees the tensors that its own operations save. Backward fails if
/// one of them was written to in between. There is no second derivative.
///
/// # Errors
/// Returns the error that libtorch reports.
pub(crate) fn attach<B: Backward>(
    output: Tensor,
    inputs: &[&Tensor],
    saved: &[&Tensor],
    backward: B,
) -> Result<Tensor> {
    let mut output = output;
    let pointers = |list: &[&Tensor]| list.iter().map(|t| t.as_ptr()).collect::<Vec<_>>();
    let (inputs, saved) = (pointers(inputs), pointers(saved));
    let state = Box::into_raw(Box::new(backward)).cast();
    // SAFETY: the tensors outlive the call, which copies what it keeps of them. `state` is a
    // `Box<B>`. From here on the node owns it and passes it only to `call::<B>` and, once, to
    // `discard::<B>`.
    let message = unsafe {
        convpass_node(
            output.as_mut_ptr(),
            inputs.as_ptr(),
            inputs.len(),
            saved.as_ptr(),
            saved.len(),
            state,
            call::<B>,
            discard::<B>,
        )
    };
    take(message).map(|()| output)
}

/// Returns whether `a` is the same tensor as `b` and was not written to since it was created.
pub(crate) fn untouched(a: &Tensor, b: &Tensor) -> bool {
    // SAFETY: both pointers come from live tensors.
    unsafe { convpass_untouched(a.as_ptr(), b.as_ptr()) }
}

/// Takes the gradient of a leaf away. The next backward pass then leaves its own gradient in place
/// of adding it to one of zeros.
#[cfg(feature = "train")]
pub(crate) fn clear_gradient(leaf: &Tensor) -> Result<()> {
    // SAFETY: the pointer comes from a live tensor.
    take(unsafe { convpass_clear_gradient(leaf.as_ptr()) })
}

/// Converts the return value of a function of `torch.cpp` into a result and frees the message.
pub(super) fn take(message: *mut c_char) -> Result<()> {
    if message.is_null() {
        return Ok(());
    }
    // SAFETY: a message is a C string from `strdup`, and this side frees it.
    let text = unsafe {
        let text = CStr::from_ptr(message).to_string_lossy().into_owned();
        libc::free(message.cast());
        text
    };
    Err(tch::TchError::Torch(text).into())
}

type Call = unsafe extern "C" fn(
    *mut c_void,
    *const *mut C_tensor,
    usize,
    *mut C_tensor,
    *const bool,
    *mut *mut C_tensor,
    usize,
) -> *mut c_char;

unsafe extern "C" {
    fn convpass_node(
        output: *mut C_tensor,
        inputs: *const *const C_tensor,
        num_inputs: usize,
        saved: *const *const C_tensor,
        num_saved: usize,
        state: *mut c_void,
        backward: Call,
        drop: unsafe extern "C" fn(*mut c_void),
    ) -> *mut c_char;
    #[cfg(feature = "train")]
    fn convpass_clear_gradient(leaf: *const C_tensor) -> *mut c_char;
    fn convpass_untouched(a: *const C_tensor, b: *const C_tensor) -> bool;
}

unsafe extern "C" fn discard<B>(state: *mut c_void) {
    // SAFETY: `attach` made `state` from a `Box<B>`, and the node drops it once. A panic during the
    // drop must not unwind into C++.
    let boxed = unsafe { Box::from_raw(state.cast::<B>()) };
    let _ = catch_unwind(AssertUnwindSafe(|| drop(boxed)));
}

unsafe extern "C" fn call<B: Backward>(
    state: *mut c_void,
    saved: *const *mut C_tensor,
    num_saved: usize,
    gradient: *mut C_tensor,
    wanted: *const bool,
    gradients: *mut *mut C_tensor,
    num_inputs: usize,
) -> *mut c_char {
    let run = || -> Result<()> {
        // SAFETY: the node passes its own state, arrays of these lengths, and tensors that outlive
        // the call. This side may write to `gradients`.
        let (state, saved, gradient, wanted, gradients) = unsafe {
            let saved = std::slice::from_raw_parts(saved, num_saved);
            (
                &*state.cast::<B>(),
                saved.iter().map(|&t| Tensor::clone_from_ptr(t)).collect::<Vec<_>>(),
                Tensor::clone_from_ptr(gradient),
                std::slice::from_raw_parts(wanted, num_inputs),
                std::slice::from_raw_parts_mut(gradients, num_inputs),
            )
        };
        for (slot, result) in gradients.iter_mut().zip(state.backward(&saved, &gradient, wanted)?) {
            *slot = result.map_or(ptr::null_mut(), into_ptr);
        }
        Ok(())
    };
    let message = match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(())) => return ptr::null_mut(),
        Ok(Err(error)) => error.to_string(),
        Err(_) => "the gradient of an operation panicked".to_owned(),
    };
    let text = CString::new(message.replace('\0', " ")).unwrap_or_default();
    // SAFETY: `text` is a C string; C++ frees the copy.
    unsafe { libc::strdup(text.as_ptr()) }
}

/// Returns the tensor's pointer; C++ deletes the tensor.
fn into_ptr(tensor: Tensor) -> *mut C_tensor {
    std::mem::ManuallyDrop::new(tensor).as_mut_ptr()
}
