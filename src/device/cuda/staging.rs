//! Page-locked memory that uploads pass through: a copy from it does not hold up the host, so the next batch is made and handed
//! over while the card still computes the one before.
//!
//! Two halves take turns. A half is written again only when the copies out of it are done, which an event tells; it is far larger
//! than a batch, so the host waits only when it is several batches ahead.

use std::ffi::c_void;

use bytemuck::Pod;
use cudarc::driver::result;

use super::context::Cuda;
use super::error::{Attempt, Result};
use super::events::Event;

/// Bytes of a half. Larger uploads go in pieces.
const HALF: usize = 4 << 20;

/// Both halves.
#[derive(Debug)]
pub(super) struct Staging {
    memory: *mut c_void,
    /// After the last copy out of each half.
    copied: [Event; 2],
    current: usize,
    used: usize,
}

// SAFETY: the memory belongs to this object alone.
unsafe impl Send for Staging {}

impl Staging {
    /// Allocates; the context is current.
    fn new() -> Result<Self> {
        let copied = [Event::new()?, Event::new()?];
        // SAFETY: only allocates.
        let memory = unsafe { result::malloc_host(2 * HALF, 0) };
        let memory = memory.attempt(|| format!("allocating {} bytes of page-locked memory", 2 * HALF))?;
        Ok(Staging { memory, copied, current: 0, used: 0 })
    }

    /// The next free bytes, at most `wanted` of them; both halves full, waits for the older one's copies.
    fn next(&mut self, cuda: &Cuda, wanted: usize) -> Result<&mut [u8]> {
        if self.used == HALF {
            self.copied[self.current].record(cuda)?;
            (self.current, self.used) = (1 - self.current, 0);
            // An event that was never recorded counts as passed.
            self.copied[self.current].wait()?;
        }
        let (at, len) = (self.current * HALF + self.used, wanted.min(HALF - self.used));
        self.used += len;
        // SAFETY: within the allocation; no copy out of these bytes is under way: the half's event has passed, and since then they
        // were not handed out. Page-locked memory is zero or was written before.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.memory.cast::<u8>().add(at), len) })
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // SAFETY: allocated by `new`; the stream was waited for.
        let _ = unsafe { result::free_host(self.memory) };
    }
}

impl Cuda {
    /// Copies `values` to device memory at `address`, in the stream's order. They may change as soon as this returns.
    ///
    /// # Safety
    /// The destination holds that many values and lives until the stream has passed the copy.
    pub(super) unsafe fn copy_to_device<T: Pod>(&self, address: u64, values: &[T]) -> Result<()> {
        self.bind()?;
        let mut staging = self.staging();
        let staging = match &mut *staging {
            Some(staging) => staging,
            empty => empty.insert(Staging::new()?),
        };
        let (mut rest, mut to): (&[u8], u64) = (bytemuck::cast_slice(values), address);
        while !rest.is_empty() {
            let piece = staging.next(self, rest.len())?;
            let (now, later) = rest.split_at(piece.len());
            piece.copy_from_slice(now);
            // SAFETY: the caller's promise; the piece is not written again before its copy is done.
            unsafe { result::memcpy_htod_async(to, &*piece, self.stream()) }
                .attempt(|| format!("copying {} bytes to the device", size_of_val(values)))?;
            (rest, to) = (later, to + now.len() as u64);
        }
        Ok(())
    }
}
