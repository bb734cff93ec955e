//! Loops that run on libtorch's threads.

use std::any::Any;
use std::ffi::{c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Mutex, PoisonError};

use super::autograd::take;
use crate::error::Result;

/// Calls `f` with each index in `0..count`, on as many threads as libtorch computes on.
///
/// # Errors
/// Returns the error that libtorch reports.
///
/// # Panics
/// Panics if `f` panics.
pub(crate) fn for_each(count: usize, f: impl Fn(usize) + Sync) -> Result<()> {
    struct Loop<F> {
        f: F,
        panic: Mutex<Option<Box<dyn Any + Send>>>,
    }
    unsafe extern "C" fn call<F: Fn(usize) + Sync>(state: *mut c_void, index: i64) {
        // SAFETY: `state` is the `Loop<F>` below, which outlives the loop and is only read.
        let state = unsafe { &*state.cast::<Loop<F>>() };
        // A panic must not unwind into C++.
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (state.f)(index as usize))) {
            *state.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
        }
    }
    fn start<F: Fn(usize) + Sync>(count: usize, state: &Loop<F>) -> Result<()> {
        let pointer = std::ptr::from_ref(state).cast_mut().cast();
        // SAFETY: `call::<F>` only reads the state, and `F: Sync` allows threads to share it.
        take(unsafe { convpass_for_each(count as i64, call::<F>, pointer) })
    }
    let state = Loop { f, panic: Mutex::new(None) };
    start(count, &state)?;
    match state.panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(panic) => resume_unwind(panic),
        None => Ok(()),
    }
}

unsafe extern "C" {
    fn convpass_for_each(
        count: i64,
        f: unsafe extern "C" fn(*mut c_void, i64),
        state: *mut c_void,
    ) -> *mut c_char;
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn calls_with_each_index_once() {
        let calls: Vec<AtomicUsize> = (0..97).map(|_| AtomicUsize::new(0)).collect();
        for_each(97, |i| _ = calls[i].fetch_add(1, Ordering::Relaxed)).unwrap();
        assert!(calls.iter().all(|calls| calls.load(Ordering::Relaxed) == 1));
        for_each(0, |_| unreachable!()).unwrap();
    }

    #[test]
    fn a_panic_is_the_callers() {
        let outcome = catch_unwind(|| for_each(8, |i| assert_ne!(i, 5)));
        assert!(outcome.is_err());
    }
}
