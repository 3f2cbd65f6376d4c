//! Streams and events. Work is done when it is given; a captured stream keeps it instead.

use std::ffi::{c_int, c_uint, c_void};
use std::time::Instant;

use super::graph::{Graph, Node};
use super::{Driver, Handle, driver_calls, error, lock, store};

/// A stream.
#[derive(Default)]
pub struct Stream {
    priority: c_int,
    flags: c_uint,
    /// Work captured so far, while capturing.
    pub capture: Option<Vec<Node>>,
}

/// Does work now, or adds it to the capture of the stream.
pub fn enqueue(d: &Driver, stream: Handle, work: impl Fn(&Driver) -> u32 + Send + Sync + 'static) -> u32 {
    if let Some(capture) = lock(&d.streams).get_mut(&(stream as usize)).and_then(|s| s.capture.as_mut()) {
        capture.push(std::sync::Arc::new(work));
        return error::SUCCESS;
    }
    work(d)
}

fn known(d: &Driver, stream: Handle) -> bool {
    // 0, 1 and 2 are the default streams.
    stream as usize <= 2 || lock(&d.streams).contains_key(&(stream as usize))
}

fn elapsed(d: &Driver, milliseconds: *mut f32, start: Handle, end: Handle) -> u32 {
    let events = lock(&d.events);
    match (events.get(&(start as usize)), events.get(&(end as usize))) {
        (Some(Some(a)), Some(Some(b))) => {
            let signed = if b >= a { (*b - *a).as_secs_f32() } else { -(*a - *b).as_secs_f32() };
            // SAFETY: see the module.
            unsafe { store(milliseconds, signed * 1e3) }
        }
        (Some(_), Some(_)) => error::NOT_READY,
        _ => error::INVALID_HANDLE,
    }
}

fn create(d: &Driver, stream: *mut Handle, flags: c_uint, priority: c_int) -> u32 {
    let handle = d.handle();
    lock(&d.streams).insert(handle, Stream { priority, flags, capture: None });
    // SAFETY: see the module.
    unsafe { store(stream, handle as Handle) }
}

driver_calls! { lookup:
    fn cuStreamCreate(stream: *mut Handle, flags: c_uint) |d| { create(d, stream, flags, 0) }
    fn cuStreamCreateWithPriority(stream: *mut Handle, flags: c_uint, priority: c_int) |d| { create(d, stream, flags, priority) }
    fn cuStreamDestroy_v2(stream: Handle) |d| {
        if lock(&d.streams).remove(&(stream as usize)).is_some() { error::SUCCESS } else { error::INVALID_HANDLE }
    }
    fn cuStreamSynchronize(stream: Handle) |d| { if known(d, stream) { d.sticky() } else { error::INVALID_HANDLE } }
    fn cuStreamQuery(stream: Handle) |d| { if known(d, stream) { d.sticky() } else { error::INVALID_HANDLE } }
    fn cuStreamGetPriority(stream: Handle, priority: *mut c_int) |d| {
        store(priority, lock(&d.streams).get(&(stream as usize)).map_or(0, |s| s.priority))
    }
    fn cuStreamGetFlags(stream: Handle, flags: *mut c_uint) |d| {
        store(flags, lock(&d.streams).get(&(stream as usize)).map_or(0, |s| s.flags))
    }
    fn cuStreamWaitEvent(stream: Handle, event: Handle, _flags: c_uint) |d| {
        let event = lock(&d.events).contains_key(&(event as usize));
        if known(d, stream) && event { error::SUCCESS } else { error::INVALID_HANDLE }
    }
    fn cuStreamBeginCapture_v2(stream: Handle, _mode: c_uint) |d| {
        let mut streams = lock(&d.streams);
        match streams.get_mut(&(stream as usize)) {
            Some(s) if s.capture.is_none() => {
                s.capture = Some(Vec::new());
                error::SUCCESS
            }
            Some(_) => error::STREAM_CAPTURE_INVALIDATED,
            None => error::INVALID_HANDLE,
        }
    }
    fn cuStreamEndCapture(stream: Handle, graph: *mut Handle) |d| {
        let nodes = lock(&d.streams).get_mut(&(stream as usize)).and_then(|s| s.capture.take());
        let Some(nodes) = nodes else { return error::INVALID_HANDLE };
        let handle = d.handle();
        lock(&d.graphs).insert(handle, Graph { nodes });
        store(graph, handle as Handle)
    }
    fn cuStreamIsCapturing(stream: Handle, status: *mut c_uint) |d| {
        let capturing = lock(&d.streams).get(&(stream as usize)).is_some_and(|s| s.capture.is_some());
        store(status, c_uint::from(capturing))
    }
    fn cuLaunchHostFunc(stream: Handle, f: Option<unsafe extern "C" fn(*mut c_void)>, data: *mut c_void) |d| {
        let Some(f) = f else { return error::INVALID_VALUE };
        let data = data as usize;
        enqueue(d, stream, move |_| {
            // SAFETY: the caller's function with the caller's data.
            unsafe { f(data as *mut c_void) };
            error::SUCCESS
        })
    }
    fn cuEventCreate(event: *mut Handle, _flags: c_uint) |d| {
        let handle = d.handle();
        lock(&d.events).insert(handle, None);
        store(event, handle as Handle)
    }
    fn cuEventDestroy_v2(event: Handle) |d| {
        if lock(&d.events).remove(&(event as usize)).is_some() { error::SUCCESS } else { error::INVALID_HANDLE }
    }
    fn cuEventRecord(event: Handle, stream: Handle) |d| {
        if !known(d, stream) || !lock(&d.events).contains_key(&(event as usize)) {
            return error::INVALID_HANDLE;
        }
        let event = event as usize;
        enqueue(d, stream, move |d| {
            if let Some(time) = lock(&d.events).get_mut(&event) {
                *time = Some(Instant::now());
            }
            error::SUCCESS
        })
    }
    fn cuEventRecordWithFlags(event: Handle, stream: Handle, _flags: c_uint) |_d| { cuEventRecord(event, stream) }
    fn cuEventQuery(event: Handle) |d| { if lock(&d.events).contains_key(&(event as usize)) { d.sticky() } else { error::INVALID_HANDLE } }
    fn cuEventSynchronize(event: Handle) |d| { if lock(&d.events).contains_key(&(event as usize)) { d.sticky() } else { error::INVALID_HANDLE } }
    fn cuEventElapsedTime(milliseconds: *mut f32, start: Handle, end: Handle) |d| { elapsed(d, milliseconds, start, end) }
    fn cuEventElapsedTime_v2(milliseconds: *mut f32, start: Handle, end: Handle) |d| { elapsed(d, milliseconds, start, end) }
}
