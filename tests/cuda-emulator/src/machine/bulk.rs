//! `cp.async.bulk`: copies of whole ranges by the copy engine, completing on an `mbarrier` or in a bulk group.

use super::access::{Region, Span, addresses};
use super::block::Block;
use super::mbarrier::lock;
use super::step::lanes32;
use super::warp::{Warp, lanes};
use crate::checks::{Fault, Kind};
use crate::program::{Address, Bulk, BulkOp};
use crate::ptx::types::Space;

/// A copy to shared memory that completes on a barrier.
#[derive(Debug, Clone)]
pub struct BulkCopy {
    /// The bytes, read when the copy was issued.
    data: Vec<u8>,
    /// Host address of the destination.
    to: *mut u8,
    /// Offset in this block's shared memory, if it is this block's.
    offset: Option<u32>,
    /// The issuing thread's clock and lane, for the shadow.
    clock: crate::checks::clock::Clock,
    lane: u32,
}

// SAFETY: the destination is shared memory of a block of the same cluster, run by the same thread.
unsafe impl Send for BulkCopy {}

impl Block<'_> {
    /// `cp.async.bulk.*`.
    pub fn bulk(&mut self, warp: &mut Warp, op: &Bulk, active: u32) -> Result<(), Fault> {
        warp.work += 1;
        let sizes = lanes32(warp, &self.program().constants, op.bytes);
        for lane in lanes(active) {
            let bytes = sizes[lane as usize];
            match op.op {
                // Stores to global memory have been done when issued.
                BulkOp::Commit | BulkOp::Wait(_) | BulkOp::Prefetch => continue,
                _ if !bytes.is_multiple_of(16) => {
                    let detail = format!("a bulk copy of {bytes} bytes: the size must be a multiple of 16");
                    return Err(Fault::new(Kind::Misaligned, lane, detail));
                }
                BulkOp::ToGlobal => {
                    let data = self.read_range(warp, Space::Shared, &op.from, lane, bytes)?;
                    let (span, at) = self.range(warp, Space::Global, &op.to, lane, bytes)?;
                    self.writable(&span, &at)?;
                    if self.config().check {
                        self.check_write(warp, &span, &at, bytes, false, |_, byte| data[byte as usize]);
                    } else if let Region::Global(index) = span.region {
                        self.mark_written(index, &span, &at, bytes);
                    }
                    self.count_access(&span, &at, bytes, true);
                    let to = span.host(at[lane as usize], lane);
                    // SAFETY: `range` checked `bytes` bytes there.
                    unsafe { to.copy_from(data.as_ptr(), bytes as usize) };
                }
                BulkOp::ToShared | BulkOp::ToCluster => {
                    let from = if op.op == BulkOp::ToShared { Space::Global } else { Space::Shared };
                    let data = self.read_range(warp, from, &op.from, lane, bytes)?;
                    let (span, at) = self.range(warp, Space::SharedCluster, &op.to, lane, bytes)?;
                    let to = span.host(at[lane as usize], lane);
                    let offset = (span.region == Region::Shared).then(|| (at[lane as usize] - span.origin) as u32);
                    self.count_access(&span, &at, bytes, true);
                    let copy = BulkCopy { data, to, offset, clock: warp.clock.clone(), lane };
                    self.issue(warp, op, lane, copy)?;
                }
                BulkOp::TensorToShared | BulkOp::TensorToGlobal => {
                    return Err(Fault::new(Kind::IllegalInstruction, lane, "tensor maps are not supported"));
                }
            }
        }
        Ok(())
    }

    fn issue(&mut self, warp: &mut Warp, op: &Bulk, lane: u32, copy: BulkCopy) -> Result<(), Fault> {
        let Some(barrier) = &op.barrier else {
            return Err(Fault::new(Kind::InvalidBarrier, lane, "a bulk copy to shared memory needs an mbarrier"));
        };
        let key = self.mbarrier_key(warp, Space::SharedCluster, barrier, lane)?;
        if let (Some(offset), Some(mut shadow)) = (copy.offset, self.shadow.take()) {
            let found = shadow.begin_copy(&warp.clock, lane, offset, copy.data.len() as u32);
            self.shadow = Some(shadow);
            if let Some(conflict) = found {
                self.report_shared(warp, lane, conflict, true);
            }
        }
        let barriers = self.mbarriers.clone();
        let mut barriers = lock(&barriers);
        let Some(state) = barriers.get_mut(&key) else {
            return Err(Fault::new(
                Kind::InvalidBarrier,
                lane,
                "a bulk copy completes on an mbarrier that was never initialised",
            ));
        };
        warp.clock.release(&mut state.clock);
        state.copies.push(copy);
        drop(barriers);
        if self.config().eager_copies {
            self.land_bulk(key);
        }
        Ok(())
    }

    /// Lands all copies that complete on a barrier: someone waits for them.
    pub fn land_bulk(&mut self, key: (u32, u32)) {
        let barriers = self.mbarriers.clone();
        let mut barriers = lock(&barriers);
        let Some(state) = barriers.get_mut(&key) else { return };
        for copy in std::mem::take(&mut state.copies) {
            // SAFETY: the destination range was checked when the copy was issued; shared memory stays in place.
            unsafe { copy.to.copy_from(copy.data.as_ptr(), copy.data.len()) };
            if let (Some(offset), Some(shadow)) = (copy.offset, &mut self.shadow) {
                shadow.end_copy(&copy.clock, copy.lane, offset, copy.data.len() as u32);
            }
            state.bytes -= copy.data.len() as i64;
        }
        state.settle();
    }

    fn range(
        &mut self,
        warp: &mut Warp,
        space: Space,
        address: &Address,
        lane: u32,
        bytes: u32,
    ) -> Result<(Span, [u64; 32]), Fault> {
        let at = addresses(warp, &self.program().constants, address);
        self.aligned(&at, 1 << lane, 16)?;
        Ok((self.span(warp, space, &at, 1 << lane, bytes)?, at))
    }

    fn read_range(
        &mut self,
        warp: &mut Warp,
        space: Space,
        address: &Address,
        lane: u32,
        bytes: u32,
    ) -> Result<Vec<u8>, Fault> {
        let (span, at) = self.range(warp, space, address, lane, bytes)?;
        if self.config().check {
            self.check_read(warp, &span, &at, bytes, false);
        }
        self.count_access(&span, &at, bytes, false);
        let from = span.host(at[lane as usize], lane);
        // SAFETY: `range` checked `bytes` bytes there.
        Ok(unsafe { std::slice::from_raw_parts(from, bytes as usize) }.to_vec())
    }
}
