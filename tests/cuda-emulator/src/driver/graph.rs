//! Graphs: the work of a captured stream, in order, to be run again.

use std::ffi::{c_int, c_uint};
use std::sync::Arc;

use super::stream::enqueue;
use super::{Driver, Handle, driver_calls, error, lock, store};

/// One piece of work.
pub type Node = Arc<dyn Fn(&Driver) -> u32 + Send + Sync>;

/// A graph, or its executable form: they are the same here.
#[derive(Clone, Default)]
pub struct Graph {
    /// The work, in the order of capture.
    pub nodes: Vec<Node>,
}

fn instantiate(d: &Driver, executable: *mut Handle, graph: Handle) -> u32 {
    let Some(copy) = lock(&d.graphs).get(&(graph as usize)).cloned() else { return error::INVALID_HANDLE };
    let handle = d.handle();
    lock(&d.graphs).insert(handle, copy);
    // SAFETY: see the module.
    unsafe { store(executable, handle as Handle) }
}

fn destroy(d: &Driver, graph: Handle) -> u32 {
    if lock(&d.graphs).remove(&(graph as usize)).is_some() { error::SUCCESS } else { error::INVALID_HANDLE }
}

driver_calls! { lookup:
    fn cuGraphCreate(graph: *mut Handle, _flags: c_uint) |d| {
        let handle = d.handle();
        lock(&d.graphs).insert(handle, Graph::default());
        store(graph, handle as Handle)
    }
    fn cuGraphInstantiateWithFlags(executable: *mut Handle, graph: Handle, _flags: u64) |d| { instantiate(d, executable, graph) }
    fn cuGraphInstantiate_v2(executable: *mut Handle, graph: Handle, _node: *mut Handle, _log: *mut u8, _bytes: usize) |d| { instantiate(d, executable, graph) }
    fn cuGraphUpload(_graph: Handle, _stream: Handle) |_d| { error::SUCCESS }
    fn cuGraphLaunch(graph: Handle, stream: Handle) |d| {
        let Some(graph) = lock(&d.graphs).get(&(graph as usize)).cloned() else { return error::INVALID_HANDLE };
        enqueue(d, stream, move |d| graph.nodes.iter().map(|node| node(d)).find(|code| *code != 0).unwrap_or(error::SUCCESS))
    }
    fn cuGraphGetNodes(graph: Handle, _nodes: *mut Handle, count: *mut usize) |d| {
        match lock(&d.graphs).get(&(graph as usize)) {
            Some(graph) => store(count, graph.nodes.len()),
            None => error::INVALID_HANDLE,
        }
    }
    fn cuGraphDestroy(graph: Handle) |d| { destroy(d, graph) }
    fn cuGraphExecDestroy(graph: Handle) |d| { destroy(d, graph) }
    fn cuThreadExchangeStreamCaptureMode(_mode: *mut c_int) |_d| { error::SUCCESS }
}
