//! CUDA graphs: operators of a GPU that are recorded once and launched together.

pub(crate) use imp::CudaGraph;

#[cfg(all(feature = "cuda", target_os = "linux"))]
mod imp {
    use std::ffi::{CStr, c_char};
    use std::ptr::{self, NonNull};

    use tch::TchError;

    use crate::error::Result;
    use crate::ffi::autograd::take;
    use crate::ffi::cuda::cuda_load_error;

    /// A graph of one GPU, and a stream of its own on which it is recorded.
    ///
    /// The graph keeps the memory of what it records, and the addresses of the tensors that were
    /// there before: the caller keeps these alive until the last replay.
    ///
    /// It is `!Send`, because streams are current for a thread.
    #[derive(Debug)]
    pub(crate) struct CudaGraph(NonNull<RawGraph>);

    /// `Graph` in `cuda_graph.cpp`.
    #[repr(C)]
    struct RawGraph {
        _opaque: [u8; 0],
    }

    impl CudaGraph {
        /// Returns the reason why this process has no CUDA graphs, or `None` if libtorch_cuda is
        /// loaded and has them. It says nothing about a GPU.
        pub(crate) fn lacks() -> Option<String> {
            if let Some(reason) = cuda_load_error() {
                return Some(reason.to_owned());
            }
            // SAFETY: the call returns null or a C string that lives as long as the process.
            let name = unsafe {
                let name = convpass_cuda_graph_lacks();
                (!name.is_null()).then(|| CStr::from_ptr(name))
            };
            name.map(|name| format!("a libtorch_cuda without {}", name.to_string_lossy()))
        }

        /// Creates an empty graph for the GPU `gpu`.
        pub(crate) fn new(gpu: usize) -> Result<Self> {
            let mut graph = ptr::null_mut();
            // SAFETY: the call writes a pointer to `graph` if it succeeds.
            take(unsafe { convpass_cuda_graph_new(gpu as i64, &mut graph) })?;
            let nothing = || TchError::Torch("libtorch made no graph".to_owned());
            Ok(CudaGraph(NonNull::new(graph).ok_or_else(nothing)?))
        }

        /// Runs `work` on the stream of the graph, and waits until the GPU has done it.
        pub(crate) fn aside(&mut self, work: impl FnOnce() -> Result<()>) -> Result<()> {
            let entered = Entered::new(self)?;
            let done = work();
            done.and(entered.leave())
        }

        /// Records what `work` does on the GPU, which does not do it yet. A graph records once.
        ///
        /// # Errors
        /// The error of `work`; the error of libtorch, also if `work` waits for the GPU.
        pub(crate) fn capture(&mut self, work: impl FnOnce() -> Result<()>) -> Result<()> {
            let mut entered = Entered::new(self)?;
            entered.begin()?;
            let done = work();
            // The error of `work` is the cause of those that follow.
            done.and(entered.end()).and(entered.leave())
        }

        /// Lets the GPU do on the current stream what was recorded.
        pub(crate) fn replay(&mut self) -> Result<()> {
            // SAFETY: `self` owns the graph.
            take(unsafe { convpass_cuda_graph_replay(self.0.as_ptr()) })
        }
    }

    impl Drop for CudaGraph {
        fn drop(&mut self) {
            // SAFETY: `self` owns the graph and does not use it again.
            unsafe { convpass_cuda_graph_free(self.0.as_ptr()) }
        }
    }

    /// The stream of a graph is the current one, and the graph may be recording. Both end as the
    /// guard is dropped, also after an error or a panic.
    struct Entered<'g> {
        graph: &'g CudaGraph,
        is_recording: bool,
        is_left: bool,
    }

    impl<'g> Entered<'g> {
        fn new(graph: &'g mut CudaGraph) -> Result<Self> {
            // SAFETY: `graph` owns what it points to.
            take(unsafe { convpass_cuda_graph_enter(graph.0.as_ptr()) })?;
            Ok(Entered { graph, is_recording: false, is_left: false })
        }

        fn begin(&mut self) -> Result<()> {
            // SAFETY: the guard borrows the graph.
            take(unsafe { convpass_cuda_graph_begin(self.graph.0.as_ptr()) })?;
            self.is_recording = true;
            Ok(())
        }

        fn end(&mut self) -> Result<()> {
            if !std::mem::take(&mut self.is_recording) {
                return Ok(());
            }
            // SAFETY: the guard borrows the graph.
            take(unsafe { convpass_cuda_graph_end(self.graph.0.as_ptr()) })
        }

        fn leave(mut self) -> Result<()> {
            self.is_left = true;
            // SAFETY: the guard borrows the graph.
            take(unsafe { convpass_cuda_graph_leave(self.graph.0.as_ptr()) })
        }
    }

    impl Drop for Entered<'_> {
        fn drop(&mut self) {
            // An error or a panic is under way, and `drop` cannot report a second one.
            let _ended = self.end();
            if !self.is_left {
                // SAFETY: the guard borrows the graph.
                let _left = take(unsafe { convpass_cuda_graph_leave(self.graph.0.as_ptr()) });
            }
        }
    }

    unsafe extern "C" {
        fn convpass_cuda_graph_lacks() -> *const c_char;
        fn convpass_cuda_graph_new(gpu: i64, out: *mut *mut RawGraph) -> *mut c_char;
        fn convpass_cuda_graph_enter(graph: *mut RawGraph) -> *mut c_char;
        fn convpass_cuda_graph_leave(graph: *mut RawGraph) -> *mut c_char;
        fn convpass_cuda_graph_begin(graph: *mut RawGraph) -> *mut c_char;
        fn convpass_cuda_graph_end(graph: *mut RawGraph) -> *mut c_char;
        fn convpass_cuda_graph_replay(graph: *mut RawGraph) -> *mut c_char;
        fn convpass_cuda_graph_free(graph: *mut RawGraph);
    }
}

#[cfg(not(all(feature = "cuda", target_os = "linux")))]
mod imp {
    use crate::error::{Error, Result};
    use crate::ffi::cuda::cuda_load_error;

    /// Graphs are reached on Linux with the feature `cuda`; there is no value of this type elsewhere.
    #[derive(Debug)]
    pub(crate) enum CudaGraph {}

    impl CudaGraph {
        pub(crate) fn lacks() -> Option<String> {
            Some(cuda_load_error().unwrap_or("a system that is not Linux").to_owned())
        }

        pub(crate) fn new(_gpu: usize) -> Result<Self> {
            let found = Self::lacks().unwrap_or_default();
            Err(Error::config("cuda_graph", "false without CUDA graphs", found))
        }

        pub(crate) fn aside(&mut self, _work: impl FnOnce() -> Result<()>) -> Result<()> {
            match *self {}
        }

        pub(crate) fn capture(&mut self, _work: impl FnOnce() -> Result<()>) -> Result<()> {
            match *self {}
        }

        pub(crate) fn replay(&mut self) -> Result<()> {
            match *self {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// This test holds on any machine: it names what is missing, or every function of the graph is
    /// found and called as far as the GPUs allow.
    #[test]
    fn a_graph_is_made_where_libtorch_has_a_gpu_and_refused_elsewhere() {
        let lacks = CudaGraph::lacks();
        let made = CudaGraph::new(0);
        match lacks {
            Some(reason) => {
                assert!(!reason.is_empty());
                assert!(made.is_err());
            }
            None => assert_eq!(made.is_ok(), tch::Cuda::is_available(), "{made:?}"),
        }
    }
}
