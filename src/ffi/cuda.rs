//! Loads `libtorch_cuda` before `main`.
//!
//! No program refers to a symbol of libtorch_cuda, so the linker drops the library. If it were
//! linked by force, a program could not start on a machine without the CUDA libraries. Loading the
//! library by name avoids both problems. It has to happen before the first tensor exists, because
//! ATen looks for its CUDA hooks once and keeps the answer.

/// Returns the reason why `Device::Cuda` cannot work in this process, or `None` if the CUDA part of
/// libtorch is loaded.
///
/// With the feature `cuda` on Linux, the reason is the message of the dynamic loader for
/// `libtorch_cuda.so`; it names the missing library. Without the feature `cuda`, the reason is that
/// the feature is off.
///
/// `None` means that the libraries are there, not that there is a GPU; `tch::Cuda::is_available()`
/// tells that.
pub fn cuda_load_error() -> Option<&'static str> {
    imp::error()
}

#[cfg(all(feature = "cuda", target_os = "linux"))]
mod imp {
    use std::ffi::{CStr, CString};
    use std::path::PathBuf;
    use std::sync::OnceLock;

    static ERROR: OnceLock<Option<String>> = OnceLock::new();

    /// The loader calls this function after the constructors of every library that the program is
    /// linked with, and before `main`. `used` keeps it through LTO and in programs that depend on
    /// this crate.
    #[used]
    // SAFETY: `.init_array` is an array of pointers to functions of the C ABI, and `on_load` is
    // one. The loader passes (argc, argv, envp), which a C function may ignore.
    #[unsafe(link_section = ".init_array")]
    static ON_LOAD: extern "C" fn() = on_load;

    extern "C" fn on_load() {
        // A panic must not unwind into the loader; it is reported like any other failure to load.
        let outcome = std::panic::catch_unwind(load);
        let _ =
            ERROR.set(outcome.unwrap_or_else(|_| Some("loading libtorch_cuda panicked".into())));
    }

    pub(super) fn error() -> Option<&'static str> {
        ERROR.get_or_init(load).as_deref()
    }

    /// Loads libtorch_cuda for the life of the process. Returns the loader's message on failure.
    fn load() -> Option<String> {
        let name =
            CString::new(beside_libtorch_cpu().into_os_string().into_encoded_bytes()).ok()?;
        // SAFETY: `name` is a C string that outlives the call. The constructors that run belong to
        // libtorch and would also run if the program were linked with the library.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
        if !handle.is_null() {
            return None;
        }
        // SAFETY: dlerror returns null or a C string that stays valid until the next dl call of
        // this thread. The string is copied before any such call.
        let text = unsafe {
            let text = libc::dlerror();
            if text.is_null() {
                None
            } else {
                Some(CStr::from_ptr(text).to_string_lossy().into_owned())
            }
        };
        Some(text.unwrap_or_else(|| "dlopen failed without a reason".into()))
    }

    /// Returns the path of `libtorch_cuda.so` in the folder that libtorch_cpu was loaded from. If
    /// that folder is unknown, returns the bare file name, for which the loader searches.
    fn beside_libtorch_cpu() -> PathBuf {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
        let cpu = maps.lines().find(|line| line.ends_with("/libtorch_cpu.so"));
        let path = cpu.and_then(|line| line.find('/').map(|start| PathBuf::from(&line[start..])));
        path.map_or_else(|| "libtorch_cuda.so".into(), |p| p.with_file_name("libtorch_cuda.so"))
    }
}

#[cfg(not(all(feature = "cuda", target_os = "linux")))]
mod imp {
    pub(super) fn error() -> Option<&'static str> {
        if cfg!(feature = "cuda") {
            None // On Windows and macOS, libtorch is linked as a whole or has no CUDA part.
        } else {
            Some("convpass was built without its feature `cuda`")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// This test holds on any machine: either the reason names what is missing, or the CUDA part of
    /// libtorch is loaded and works on every GPU that it reports.
    #[test]
    fn cuda_is_loaded_or_the_reason_is_named() {
        let Some(reason) = cuda_load_error() else {
            if !cfg!(feature = "cuda") {
                panic!("no reason without the feature");
            }
            if cfg!(target_os = "linux") {
                let maps = std::fs::read_to_string("/proc/self/maps").expect("a process on Linux");
                assert!(maps.lines().any(|line| line.ends_with("/libtorch_cuda.so")), "not loaded");
            }
            for gpu in 0..tch::Cuda::device_count() as usize {
                let options = (tch::Kind::Float, tch::Device::Cuda(gpu));
                let sum = tch::Tensor::ones([2, 3], options).sum(tch::Kind::Float);
                assert_eq!(f64::try_from(sum).expect("a scalar"), 6.0, "GPU {gpu}");
            }
            return;
        };
        let named = if cfg!(feature = "cuda") { ".so" } else { "feature `cuda`" };
        assert!(reason.contains(named), "{reason}");
        assert!(!tch::Cuda::is_available(), "CUDA works, but the reason is: {reason}");
        assert_eq!(tch::Cuda::device_count(), 0, "GPUs are found, but the reason is: {reason}");
    }

    #[test]
    fn tensors_work_after_a_failed_load() {
        let sum = tch::Tensor::from_slice(&[1f32, 2.0]).sum(tch::Kind::Float);
        assert_eq!(f64::try_from(sum).expect("a scalar"), 3.0);
    }
}
