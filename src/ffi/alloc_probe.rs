//! A global allocator for the unit tests. It records the largest allocation that a thread requests.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

struct Probe;

thread_local! {
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

fn note(size: usize) {
    // The access fails only while the thread ends. Nothing reads the value after that.
    let _ = LARGEST.try_with(|largest| largest.set(largest.get().max(size)));
}

// SAFETY: every call goes to the system allocator with its arguments unchanged.
unsafe impl GlobalAlloc for Probe {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        note(size);
        unsafe { System.realloc(ptr, layout, size) }
    }
}

#[global_allocator]
static PROBE: Probe = Probe;

/// Runs `f`; returns the size in bytes of the largest single allocation that `f` requests on this
/// thread, and the result of `f`.
pub(crate) fn largest_allocation<T>(f: impl FnOnce() -> T) -> (usize, T) {
    LARGEST.set(0);
    let result = f();
    (LARGEST.get(), result)
}
