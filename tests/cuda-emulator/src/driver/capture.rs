//! Stream capture: work that is collected instead of done, and what a driver refuses meanwhile.
//!
//! A refused call answers with the driver's code, says on stderr which rule it broke, and breaks the capture: the work collected is
//! lost and `cuStreamEndCapture` returns `STREAM_CAPTURE_INVALIDATED`. So a capture that would fail on a card fails here.
//! Captures that fork into a second stream by events are not supported.

use std::cell::Cell;
use std::ffi::{c_int, c_uint};
use std::thread::ThreadId;

use super::graph::{Graph, Node};
use super::stream::Stream;
use super::{Driver, Handle, driver_calls, error, lock, store};

/// `CU_STREAM_NON_BLOCKING`.
const NON_BLOCKING: c_uint = 1;

/// `CUstreamCaptureMode`: whom a capture keeps from calls that could disturb it.
const GLOBAL: c_uint = 0;
const RELAXED: c_uint = 2;

thread_local! {
    /// What this thread asked for with `cuThreadExchangeStreamCaptureMode`.
    static MODE: Cell<c_uint> = const { Cell::new(GLOBAL) };
}

/// A capture in progress.
pub struct Capture {
    mode: c_uint,
    thread: ThreadId,
    nodes: Vec<Node>,
    broken: bool,
}

impl Capture {
    /// Adds work.
    pub fn push(&mut self, node: Node) -> u32 {
        if self.broken {
            return error::STREAM_CAPTURE_INVALIDATED;
        }
        self.nodes.push(node);
        error::SUCCESS
    }

    /// Whether the calling thread must make no potentially unsafe call while this goes on.
    fn forbids(&self) -> bool {
        if self.thread == std::thread::current().id() {
            self.mode != RELAXED && MODE.get() != RELAXED
        } else {
            self.mode == GLOBAL && MODE.get() == GLOBAL
        }
    }
}

impl Driver {
    /// Breaks the captures that `disturbed` picks, if any, and returns `code` for them.
    fn refuse(&self, call: &str, rule: &str, code: u32, disturbed: impl Fn(&usize, &Stream, &Capture) -> bool) -> u32 {
        let mut answer = error::SUCCESS;
        for (handle, stream) in lock(&self.streams).iter_mut() {
            let hit = stream.capture.as_ref().is_some_and(|c| disturbed(handle, stream, c));
            if let Some(capture) = stream.capture.as_mut().filter(|_| hit) {
                capture.broken = true;
                answer = code;
            }
        }
        if answer != error::SUCCESS {
            eprintln!("[cuda-emulator] {call} while a stream is captured: {rule}");
        }
        answer
    }

    /// A call that a driver cannot do without disturbing captures: allocation, loading, synchronous copies, questions about
    /// events. 0 if it may go on.
    pub fn unsafe_in_capture(&self, call: &str) -> u32 {
        let rule = "the mode of the capture forbids calls that may wait for it";
        self.refuse(call, rule, error::STREAM_CAPTURE_UNSUPPORTED, |_, _, c| c.forbids())
    }

    /// Work for the legacy stream, which waits for all blocking streams. 0 if it may go on.
    pub fn legacy_in_capture(&self, call: &str) -> u32 {
        let rule = "the legacy stream would wait for the captured one";
        self.refuse(call, rule, error::STREAM_CAPTURE_IMPLICIT, |_, s, _| s.flags & NON_BLOCKING == 0)
    }

    /// A synchronous copy or fill: it goes through the legacy stream, and waits.
    pub fn synchronous_in_capture(&self, call: &str) -> u32 {
        match self.legacy_in_capture(call) {
            0 => self.unsafe_in_capture(call),
            code => code,
        }
    }

    /// A wait for, or a question about, a stream. 0 if it is not captured.
    pub fn waits_in_capture(&self, call: &str, stream: Handle) -> u32 {
        let rule = "it can be neither waited for nor asked";
        self.refuse(call, rule, error::STREAM_CAPTURE_UNSUPPORTED, |h, _, _| *h == stream as usize)
    }

    /// A wait for everything in the context. 0 if nothing is captured.
    pub fn context_waits_in_capture(&self, call: &str) -> u32 {
        self.refuse(call, "its context cannot be waited for", error::STREAM_CAPTURE_UNSUPPORTED, |_, _, _| true)
    }

    /// A captured stream that is to wait for work outside of its capture. 0 if it is not captured.
    pub fn isolates_in_capture(&self, call: &str, stream: Handle) -> u32 {
        let rule = "it cannot depend on work before the capture";
        self.refuse(call, rule, error::STREAM_CAPTURE_ISOLATION, |h, _, _| *h == stream as usize)
    }

    /// Whether a stream is captured.
    pub fn is_captured(&self, stream: Handle) -> bool {
        lock(&self.streams).get(&(stream as usize)).is_some_and(|s| s.capture.is_some())
    }
}

driver_calls! { lookup:
    fn cuStreamBeginCapture_v2(stream: Handle, mode: c_uint) |d| {
        if mode > RELAXED {
            return error::INVALID_VALUE;
        }
        if stream as usize <= 1 {
            eprintln!("[cuda-emulator] cuStreamBeginCapture: the legacy stream cannot be captured");
            return error::STREAM_CAPTURE_UNSUPPORTED;
        }
        match lock(&d.streams).get_mut(&(stream as usize)) {
            Some(s) if s.capture.is_none() => {
                s.capture = Some(Capture { mode, thread: std::thread::current().id(), nodes: Vec::new(), broken: false });
                error::SUCCESS
            }
            Some(_) => error::ILLEGAL_STATE,
            None => error::INVALID_HANDLE,
        }
    }
    fn cuStreamEndCapture(stream: Handle, graph: *mut Handle) |d| {
        let capture = {
            let mut streams = lock(&d.streams);
            let Some(s) = streams.get_mut(&(stream as usize)) else { return error::INVALID_HANDLE };
            match &s.capture {
                None => return error::ILLEGAL_STATE,
                Some(c) if c.mode != RELAXED && c.thread != std::thread::current().id() => return error::STREAM_CAPTURE_WRONG_THREAD,
                Some(_) => s.capture.take(),
            }
        };
        match capture {
            Some(Capture { nodes, broken: false, .. }) => {
                let handle = d.handle();
                lock(&d.graphs).insert(handle, Graph { nodes, executable: false });
                store(graph, handle as Handle)
            }
            _ => {
                store(graph, std::ptr::null_mut());
                error::STREAM_CAPTURE_INVALIDATED
            }
        }
    }
    fn cuStreamIsCapturing(stream: Handle, status: *mut c_uint) |d| {
        let streams = lock(&d.streams);
        let capture = streams.get(&(stream as usize)).and_then(|s| s.capture.as_ref());
        store(status, capture.map_or(0, |c| if c.broken { 2 } else { 1 }))
    }
    fn cuThreadExchangeStreamCaptureMode(mode: *mut c_int) |_d| {
        if mode.is_null() || !(0..=RELAXED as c_int).contains(&*mode) {
            return error::INVALID_VALUE;
        }
        let before = MODE.replace(*mode as c_uint);
        store(mode, before as c_int)
    }
}
