//! Settings of the C library's allocator, and of the kernel's pages.

/// Asks glibc to keep freed memory for the next training step. The setting applies to the whole
/// process; call this function once, early in `main`. With another C library it does nothing.
///
/// By default glibc returns freed blocks of the size of activations to the kernel, and every step
/// requests them again page by page. For the forward and backward pass of one bypass this costs two
/// fifths of the time. With this setting the process keeps its peak memory until it ends.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: `mallopt` sets two limits of the allocator, which may be set at any time.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, libc::c_int::MAX);
        libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX);
    }
}

/// Has the kernel back fresh memory, which nothing has written to, by one call: left to itself it
/// does so at the first write to each page of 4 KiB, which is more than half of the time to read a
/// checkpoint. Where the kernel cannot (before Linux 5.14), nothing changes.
///
/// Huge pages would be faster still, but not always: where memory is fragmented, the kernel first
/// moves other pages together, and reading a checkpoint then took four times as long.
pub(super) fn populate(memory: &mut [f32]) {
    #[cfg(target_os = "linux")]
    {
        let to_page = memory.as_ptr().cast::<u8>().align_offset(PAGE);
        let Some(inside) = std::mem::size_of_val(memory).checked_sub(to_page) else { return };
        // SAFETY: the pages lie within `memory`. The call changes no content, and its failure
        // changes nothing at all.
        unsafe {
            let start = memory.as_mut_ptr().cast::<u8>().add(to_page);
            libc::madvise(start.cast(), inside / PAGE * PAGE, libc::MADV_POPULATE_WRITE);
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _unchanged = memory;
}

/// The bytes of a page. Where pages are larger, the kernel refuses a start within one.
#[cfg(target_os = "linux")]
const PAGE: usize = 4096;
