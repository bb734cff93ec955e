//! What the C library does with memory that libtorch frees.

/// Asks glibc to keep freed memory for the next step, in the whole process; call it once, early in
/// `main`. Does nothing with another C library.
///
/// By default glibc hands blocks as large as activations back to the kernel, and each step gets
/// them again page by page: for one bypass forward and backward that is two fifths of the time.
/// The process then stays as large as it once was.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: both are limits of the allocator that may be set at any time.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, libc::c_int::MAX);
        libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX);
    }
}
