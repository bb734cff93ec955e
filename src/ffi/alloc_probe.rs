//! A global allocator for the unit tests that remembers the largest request of a thread.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

struct Probe;

thread_local! {
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

fn note(size: usize) {
    // Fails only while the thread ends, when nobody asks any more.
    let _ = LARGEST.try_with(|largest| largest.set(largest.get().max(size)));
}

// SAFETY: every call is passed on to the system allocator with its arguments as they came.
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

/// The largest single allocation that `f` asks for on this thread, in bytes, and its result.
pub(crate) fn largest_allocation<T>(f: impl FnOnce() -> T) -> (usize, T) {
    LARGEST.set(0);
    let result = f();
    (LARGEST.get(), result)
}
