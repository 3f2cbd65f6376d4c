//! Graphs: work that was given to the stream once, collected, and run again with one call.
//!
//! The host's part of a pass (checks, parameters, a driver call a kernel) is done when the work is collected; later runs cost one
//! call. A graph holds the addresses and numbers of that moment: whatever changes from run to run lies in buffers that stay where
//! they are. [`Cuda::allocations`] tells when some may have moved.

use std::sync::Arc;

use cudarc::driver::{CudaContext, result, sys};

use super::context::Cuda;
use super::error::{Attempt, Error, Result};

/// Work as the stream took it.
#[derive(Debug)]
pub struct Collected {
    graph: sys::CUgraph,
    nodes: usize,
}

/// Work that can be run again.
#[derive(Debug)]
pub struct Graph {
    context: Arc<CudaContext>,
    executable: sys::CUgraphExec,
    nodes: usize,
}

// SAFETY: a handle is a number to the driver; it is used by one thread at a time.
unsafe impl Send for Graph {}
// SAFETY: as above.
unsafe impl Sync for Graph {}

impl Cuda {
    /// Collects the work that `work` gives to the stream, instead of doing it. `work` must neither allocate nor copy from or to the
    /// host nor wait.
    pub fn collect<E: From<Error>>(
        &self,
        work: impl FnOnce() -> std::result::Result<(), E>,
    ) -> std::result::Result<Collected, E> {
        self.bind()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives as long as `self`.
        unsafe { result::stream::begin_capture(self.stream(), mode) }
            .attempt(|| "beginning to collect a graph".to_owned())?;
        let done = work();
        // In any case: the stream would take no other work.
        // SAFETY: as above; this thread began.
        let graph = unsafe { result::stream::end_capture(self.stream()) };
        let collected = graph.map(|graph| Collected { graph, nodes: 0 });
        done?;
        let mut collected = collected.attempt(|| "collecting a graph".to_owned())?;
        // SAFETY: without an array of handles, the call counts only.
        unsafe { sys::cuGraphGetNodes(collected.graph, std::ptr::null_mut(), &mut collected.nodes) }
            .result()
            .attempt(|| "counting a graph's kernels".to_owned())?;
        Ok(collected)
    }

    /// Makes collected work ready to be run.
    pub fn instantiate(&self, collected: Collected) -> Result<Graph> {
        self.bind()?;
        // SAFETY: the graph is whole.
        let executable = unsafe { result::graph::instantiate(collected.graph, sys::CUgraphInstantiate_flags(0)) };
        let executable = executable.attempt(|| format!("making a graph of {} kernels", collected.nodes))?;
        Ok(Graph { context: self.context().clone(), executable, nodes: collected.nodes })
    }

    /// Gives the work of a graph to the stream.
    ///
    /// # Safety
    /// The memory that the work names lives until the stream has passed it: see [`Cuda::allocations`].
    pub unsafe fn run(&self, graph: &Graph) -> Result<()> {
        self.bind()?;
        // SAFETY: the caller's promise; the executable lives.
        unsafe { result::graph::launch(graph.executable, self.stream()) }
            .attempt(|| format!("launching a graph of {} kernels", graph.nodes))
    }
}

impl Collected {
    /// Kernels, copies and fills.
    pub fn nodes(&self) -> usize {
        self.nodes
    }
}

impl Drop for Collected {
    fn drop(&mut self) {
        // SAFETY: made by `collect`; what was instantiated from it does not need it.
        let _ = unsafe { result::graph::destroy(self.graph) };
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: made by `instantiate`; the driver keeps it until the stream has passed it.
            let _ = unsafe { result::graph::exec_destroy(self.executable) };
        }
    }
}
