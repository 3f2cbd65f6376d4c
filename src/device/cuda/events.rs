//! Marks in the stream, and timing with the card's own clock.

use cudarc::driver::{result, sys};

use super::context::Cuda;
use super::error::{Attempt, Result};

/// A mark in the stream.
#[derive(Debug)]
pub(super) struct Event(sys::CUevent);

// SAFETY: a handle is a number to the driver, which may be used from any thread.
unsafe impl Send for Event {}

impl Event {
    /// Not recorded yet.
    pub fn new() -> Result<Self> {
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT);
        Ok(Event(event.attempt(|| "making an event".to_owned())?))
    }

    /// Puts it behind all work given so far.
    pub fn record(&self, cuda: &Cuda) -> Result<()> {
        // SAFETY: event and stream live.
        unsafe { result::event::record(self.0, cuda.stream()) }.attempt(|| "recording an event".to_owned())
    }

    /// Waits until the stream has passed it.
    pub fn wait(&self) -> Result<()> {
        // SAFETY: the event lives.
        unsafe { result::event::synchronize(self.0) }.attempt(|| "running the kernels".to_owned())
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by `new`; the driver keeps it until the stream has passed it.
        let _ = unsafe { result::event::destroy(self.0) };
    }
}

impl Cuda {
    /// Seconds that the work given by `runs` calls takes, one after the other, by the card's clock.
    pub fn seconds(&self, runs: usize, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
        self.bind()?;
        let (start, end) = (Event::new()?, Event::new()?);
        start.record(self)?;
        for _ in 0..runs {
            work()?;
        }
        end.record(self)?;
        self.synchronize()?;
        // SAFETY: both are recorded and passed.
        let milliseconds = unsafe { result::event::elapsed(start.0, end.0) }.attempt(|| "timing".to_owned())?;
        Ok(f64::from(milliseconds) / 1e3)
    }
}
