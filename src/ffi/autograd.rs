//! Operations whose gradient this crate computes itself.

use std::ffi::{CStr, CString, c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;

use tch::Tensor;
use torch_sys::C_tensor;

use crate::error::{Error, Result};

/// The backward half of an operation on tensors.
pub(crate) trait Backward: Send + 'static {
    /// The gradient of each input, from that of the output, in the order in which
    /// [`attach`] was given them; where one is not `wanted` it may be `None`. `saved` are the
    /// tensors given for it.
    fn backward(
        &self,
        saved: &[Tensor],
        gradient: &Tensor,
        wanted: &[bool],
    ) -> Result<Vec<Option<Tensor>>>;
}

/// Makes `output`, computed without libtorch's keeping track, the result of an operation on
/// `inputs` whose gradient is `backward`'s. It may be none of the inputs.
///
/// libtorch frees `saved` as it frees what its own operations save, and refuses them in backward
/// if they were written into in between. There is no second derivative.
///
/// # Errors
/// What libtorch says.
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
    // `Box<B>`, and the node that owns it from here on gives it to `call::<B>` and `discard::<B>`
    // alone, the latter once.
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

/// Whether `a` is the very tensor `b`, and nothing was written into it since it was made.
pub(crate) fn untouched(a: &Tensor, b: &Tensor) -> bool {
    // SAFETY: both are tensors.
    unsafe { convpass_untouched(a.as_ptr(), b.as_ptr()) }
}

/// What a call of `torch.cpp` returns.
pub(super) fn take(message: *mut c_char) -> Result<()> {
    if message.is_null() {
        return Ok(());
    }
    // SAFETY: a message is a C string from `strdup`, this side's to free.
    let text = unsafe {
        let text = CStr::from_ptr(message).to_string_lossy().into_owned();
        libc::free(message.cast());
        text
    };
    Err(Error::Torch(tch::TchError::Torch(text)))
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
    fn convpass_untouched(a: *const C_tensor, b: *const C_tensor) -> bool;
}

unsafe extern "C" fn discard<B>(state: *mut c_void) {
    // SAFETY: `attach` made it from a `Box<B>`, and the node drops it once. A panic while it is
    // dropped must not unwind into C++.
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
        // SAFETY: the node calls this with its own state, with arrays of these lengths, and with
        // tensors that outlive the call; `gradients` is for this side to write to.
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
    // SAFETY: a C string; C++ frees the copy.
    unsafe { libc::strdup(text.as_ptr()) }
}

/// The tensor's pointer, for C++ to delete.
fn into_ptr(tensor: Tensor) -> *mut C_tensor {
    std::mem::ManuallyDrop::new(tensor).as_mut_ptr()
}
