//! Graphs: the work of a captured stream, in order, to be run again. Parameters of kernels are those of the capture.

use std::ffi::{c_int, c_uint};
use std::sync::Arc;

use super::stream::enqueue;
use super::{Driver, Handle, driver_calls, error, lock, store};

/// One piece of work.
pub type Node = Arc<dyn Fn(&Driver) -> u32 + Send + Sync>;

/// A graph, or its executable form.
#[derive(Clone, Default)]
pub struct Graph {
    /// The work, in the order of capture.
    pub nodes: Vec<Node>,
    /// It was instantiated: it can be launched.
    pub executable: bool,
}

/// `CUDA_GRAPH_INSTANTIATE_PARAMS`.
#[repr(C)]
pub struct InstantiateParams {
    flags: u64,
    upload: Handle,
    error_node: Handle,
    result: c_int,
}

fn get(d: &Driver, graph: Handle, executable: bool) -> Option<Graph> {
    lock(&d.graphs).get(&(graph as usize)).filter(|g| g.executable == executable).cloned()
}

fn instantiate(d: &Driver, executable: *mut Handle, graph: Handle) -> u32 {
    let Some(copy) = get(d, graph, false) else { return error::INVALID_HANDLE };
    match d.unsafe_in_capture("cuGraphInstantiate") {
        0 => {}
        code => return code,
    }
    let handle = d.handle();
    lock(&d.graphs).insert(handle, Graph { executable: true, ..copy });
    // SAFETY: see the module.
    unsafe { store(executable, handle as Handle) }
}

fn destroy(d: &Driver, graph: Handle, executable: bool) -> u32 {
    if get(d, graph, executable).is_none() {
        return error::INVALID_HANDLE;
    }
    lock(&d.graphs).remove(&(graph as usize));
    error::SUCCESS
}

driver_calls! { lookup:
    fn cuGraphCreate(graph: *mut Handle, _flags: c_uint) |d| {
        let handle = d.handle();
        lock(&d.graphs).insert(handle, Graph::default());
        store(graph, handle as Handle)
    }
    fn cuGraphInstantiateWithFlags(executable: *mut Handle, graph: Handle, _flags: u64) |d| { instantiate(d, executable, graph) }
    fn cuGraphInstantiate_v2(executable: *mut Handle, graph: Handle, _node: *mut Handle, _log: *mut u8, _bytes: usize) |d| { instantiate(d, executable, graph) }
    fn cuGraphInstantiateWithParams(executable: *mut Handle, graph: Handle, params: *mut InstantiateParams) |d| {
        if params.is_null() {
            return error::INVALID_VALUE;
        }
        let code = instantiate(d, executable, graph);
        (*params).error_node = std::ptr::null_mut();
        // CUDA_GRAPH_INSTANTIATE_SUCCESS or _ERROR.
        (*params).result = c_int::from(code != 0);
        code
    }
    fn cuGraphUpload(graph: Handle, _stream: Handle) |d| {
        if get(d, graph, true).is_some() { error::SUCCESS } else { error::INVALID_HANDLE }
    }
    fn cuGraphLaunch(graph: Handle, stream: Handle) |d| {
        let Some(graph) = get(d, graph, true) else { return error::INVALID_HANDLE };
        enqueue(d, stream, "cuGraphLaunch", move |d| {
            graph.nodes.iter().map(|node| node(d)).find(|code| *code != 0).unwrap_or(error::SUCCESS)
        })
    }
    fn cuGraphGetNodes(graph: Handle, nodes: *mut Handle, count: *mut usize) |d| {
        let Some(graph) = get(d, graph, false) else { return error::INVALID_HANDLE };
        if !nodes.is_null() {
            eprintln!("[cuda-emulator] cuGraphGetNodes counts nodes and has no handles of them");
            return error::NOT_SUPPORTED;
        }
        store(count, graph.nodes.len())
    }
    fn cuGraphDestroy(graph: Handle) |d| { destroy(d, graph, false) }
    fn cuGraphExecDestroy(graph: Handle) |d| { destroy(d, graph, true) }
}
