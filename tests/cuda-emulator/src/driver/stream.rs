//! Streams and events. Work is done when it is given; a captured stream ([`super::capture`]) keeps it instead.

use std::ffi::{c_int, c_uint, c_void};
use std::time::Instant;

use super::capture::Capture;
use super::{Driver, Handle, driver_calls, error, lock, store};

/// A stream.
#[derive(Default)]
pub struct Stream {
    priority: c_int,
    pub(super) flags: c_uint,
    /// Work captured so far, while capturing.
    pub capture: Option<Capture>,
}

/// What an event marks.
#[derive(Clone, Copy, Default)]
pub enum Mark {
    /// Nothing yet.
    #[default]
    Unset,
    /// A moment.
    At(Instant),
    /// A place in the capture of a stream: of no meaning outside.
    Captured(usize),
}

/// Does the work of call `name` now, or adds it to the capture of the stream.
pub fn enqueue(d: &Driver, stream: Handle, name: &str, work: impl Fn(&Driver) -> u32 + Send + Sync + 'static) -> u32 {
    if let Some(capture) = lock(&d.streams).get_mut(&(stream as usize)).and_then(|s| s.capture.as_mut()) {
        return capture.push(std::sync::Arc::new(work));
    }
    if stream as usize <= 1 {
        let code = d.legacy_in_capture(name);
        if code != 0 {
            return code;
        }
    }
    work(d)
}

/// The answer of a call that waits for a stream or asks for its state.
fn passed(d: &Driver, stream: Handle, name: &str) -> u32 {
    if !known(d, stream) {
        return error::INVALID_HANDLE;
    }
    match d.waits_in_capture(name, stream) {
        0 => d.sticky(),
        code => code,
    }
}

/// The same for an event.
fn happened(d: &Driver, event: Handle, name: &str) -> u32 {
    let Some(mark) = lock(&d.events).get(&(event as usize)).copied() else { return error::INVALID_HANDLE };
    if matches!(mark, Mark::Captured(_)) {
        eprintln!("[cuda-emulator] {name}: the event was recorded in a capture and marks no moment");
        return error::CAPTURED_EVENT;
    }
    match d.unsafe_in_capture(name) {
        0 => d.sticky(),
        code => code,
    }
}

/// Marks where a stream is. In a capture, only an external record (`CU_EVENT_RECORD_EXTERNAL`) is work of the graph.
fn record(d: &Driver, event: Handle, stream: Handle, external: bool) -> u32 {
    let event = event as usize;
    if !known(d, stream) || !lock(&d.events).contains_key(&event) {
        return error::INVALID_HANDLE;
    }
    if d.is_captured(stream) && !external {
        lock(&d.events).insert(event, Mark::Captured(stream as usize));
        return error::SUCCESS;
    }
    enqueue(d, stream, "cuEventRecord", move |d| {
        if let Some(mark) = lock(&d.events).get_mut(&event) {
            *mark = Mark::At(Instant::now());
        }
        error::SUCCESS
    })
}

fn wait(d: &Driver, stream: Handle, event: Handle) -> u32 {
    let mark = lock(&d.events).get(&(event as usize)).copied();
    match mark {
        Some(_) if !known(d, stream) => error::INVALID_HANDLE,
        None => error::INVALID_HANDLE,
        Some(Mark::Captured(of)) if of == stream as usize => error::SUCCESS,
        Some(Mark::Captured(_)) => {
            eprintln!("[cuda-emulator] cuStreamWaitEvent: captures that fork into a second stream are not supported");
            error::NOT_SUPPORTED
        }
        Some(Mark::At(_)) => d.isolates_in_capture("cuStreamWaitEvent", stream),
        Some(Mark::Unset) => error::SUCCESS,
    }
}

fn known(d: &Driver, stream: Handle) -> bool {
    // 0, 1 and 2 are the default streams.
    stream as usize <= 2 || lock(&d.streams).contains_key(&(stream as usize))
}

fn elapsed(d: &Driver, milliseconds: *mut f32, start: Handle, end: Handle) -> u32 {
    let events = lock(&d.events);
    match (events.get(&(start as usize)), events.get(&(end as usize))) {
        (Some(Mark::At(a)), Some(Mark::At(b))) => {
            let signed = if b >= a { (*b - *a).as_secs_f32() } else { -(*a - *b).as_secs_f32() };
            // SAFETY: see the module.
            unsafe { store(milliseconds, signed * 1e3) }
        }
        (Some(Mark::Captured(_)), _) | (_, Some(Mark::Captured(_))) => error::CAPTURED_EVENT,
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
    fn cuStreamSynchronize(stream: Handle) |d| { passed(d, stream, "cuStreamSynchronize") }
    fn cuStreamQuery(stream: Handle) |d| { passed(d, stream, "cuStreamQuery") }
    fn cuStreamGetPriority(stream: Handle, priority: *mut c_int) |d| {
        store(priority, lock(&d.streams).get(&(stream as usize)).map_or(0, |s| s.priority))
    }
    fn cuStreamGetFlags(stream: Handle, flags: *mut c_uint) |d| {
        store(flags, lock(&d.streams).get(&(stream as usize)).map_or(0, |s| s.flags))
    }
    fn cuStreamWaitEvent(stream: Handle, event: Handle, _flags: c_uint) |d| { wait(d, stream, event) }
    fn cuLaunchHostFunc(stream: Handle, f: Option<unsafe extern "C" fn(*mut c_void)>, data: *mut c_void) |d| {
        let Some(f) = f else { return error::INVALID_VALUE };
        let data = data as usize;
        enqueue(d, stream, "cuLaunchHostFunc", move |_| {
            // SAFETY: the caller's function with the caller's data.
            unsafe { f(data as *mut c_void) };
            error::SUCCESS
        })
    }
    fn cuEventCreate(event: *mut Handle, _flags: c_uint) |d| {
        let handle = d.handle();
        lock(&d.events).insert(handle, Mark::Unset);
        store(event, handle as Handle)
    }
    fn cuEventDestroy_v2(event: Handle) |d| {
        if lock(&d.events).remove(&(event as usize)).is_some() { error::SUCCESS } else { error::INVALID_HANDLE }
    }
    fn cuEventRecord(event: Handle, stream: Handle) |d| { record(d, event, stream, false) }
    fn cuEventRecordWithFlags(event: Handle, stream: Handle, flags: c_uint) |d| { record(d, event, stream, flags & 1 != 0) }
    fn cuEventQuery(event: Handle) |d| { happened(d, event, "cuEventQuery") }
    fn cuEventSynchronize(event: Handle) |d| { happened(d, event, "cuEventSynchronize") }
    fn cuEventElapsedTime(milliseconds: *mut f32, start: Handle, end: Handle) |d| { elapsed(d, milliseconds, start, end) }
    fn cuEventElapsedTime_v2(milliseconds: *mut f32, start: Handle, end: Handle) |d| { elapsed(d, milliseconds, start, end) }
}
