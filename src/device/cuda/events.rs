//! Timing with the card's own clock.

use cudarc::driver::{result, sys};

use super::context::Cuda;
use super::error::{Attempt, Result};

/// A mark in the stream.
struct Event(sys::CUevent);

impl Event {
    fn new() -> Result<Self> {
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT);
        Ok(Event(event.attempt(|| "making an event".to_owned())?))
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
        let timing = || "timing".to_owned();
        // SAFETY: events and stream live.
        unsafe { result::event::record(start.0, self.stream()) }.attempt(timing)?;
        for _ in 0..runs {
            work()?;
        }
        // SAFETY: as above.
        unsafe { result::event::record(end.0, self.stream()) }.attempt(timing)?;
        self.synchronize()?;
        // SAFETY: both are recorded and passed.
        let milliseconds = unsafe { result::event::elapsed(start.0, end.0) }.attempt(timing)?;
        Ok(f64::from(milliseconds) / 1e3)
    }
}
