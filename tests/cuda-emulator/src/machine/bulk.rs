//! `cp.async.bulk`: copies of whole ranges and of boxes of tensors by the copy engine.
//!
//! Copies to shared memory complete on an `mbarrier`: by default they land when somebody tests it. Copies to global memory
//! complete in bulk groups of their thread: by default their source is read when the group is waited for.

use std::sync::atomic::Ordering;

use super::access::{Region, Span, addresses};
use super::atomics;
use super::block::Block;
use super::mbarrier::lock;
use super::step::lanes32;
use super::warp::{Warp, lanes};
use crate::checks::clock::Clock;
use crate::checks::{Fault, Kind};
use crate::program::{Address, AtomicOp, Bulk, BulkOp};
use crate::ptx::types::{Space, Type};

/// A copy to shared memory that completes on a barrier.
#[derive(Debug, Clone)]
pub struct BulkCopy {
    /// The bytes, read when the copy was issued.
    data: Vec<u8>,
    /// Host address of the destination.
    to: *mut u8,
    /// The destination's block.
    region: Region,
    /// Offset in its shared memory.
    offset: u32,
    /// The issuing thread's clock and lane, for the shadow.
    clock: Clock,
    lane: u32,
}

// SAFETY: the destination is shared memory of a block of the same cluster, run by the same thread.
unsafe impl Send for BulkCopy {}

/// A range of shared memory and where it goes.
#[derive(Debug, Clone, Copy)]
pub struct Piece {
    /// Offset in shared memory.
    pub from: u32,
    /// Host address of the destination.
    pub to: *mut u8,
    /// Bytes.
    pub bytes: u32,
}

/// A copy to global memory that has not been waited for.
#[derive(Debug, Clone)]
pub struct BulkStore {
    lane: u32,
    pieces: Vec<Piece>,
    reduce: Option<(AtomicOp, Type)>,
}

// SAFETY: the destinations lie in allocations of the launch's snapshot, which outlives the warp.
unsafe impl Send for BulkStore {}

/// Copies of a warp's threads to global memory: groups committed, oldest first, each of one lane, and those not committed.
#[derive(Debug, Default)]
pub struct Stores {
    groups: Vec<(u32, Vec<BulkStore>)>,
    open: Vec<BulkStore>,
}

impl Stores {
    fn commit(&mut self, lane: u32) {
        let (mine, rest) = std::mem::take(&mut self.open).into_iter().partition(|s: &BulkStore| s.lane == lane);
        self.open = rest;
        self.groups.push((lane, mine));
    }

    /// Takes the copies of all but the last `n` groups of a lane.
    fn take(&mut self, lane: u32, n: u32) -> Vec<BulkStore> {
        let mut left = self.groups.iter().filter(|(l, _)| *l == lane).count().saturating_sub(n as usize);
        let mut taken = Vec::new();
        self.groups.retain_mut(|(l, stores)| {
            let goes = *l == lane && left > 0;
            if goes {
                left -= 1;
                taken.append(stores);
            }
            !goes
        });
        taken
    }

    fn take_all(&mut self) -> Vec<BulkStore> {
        let groups = std::mem::take(&mut self.groups);
        groups.into_iter().flat_map(|(_, g)| g).chain(std::mem::take(&mut self.open)).collect()
    }

    /// Whether nothing is in flight.
    pub fn is_empty(&self) -> bool {
        self.open.is_empty() && self.groups.iter().all(|(_, g)| g.is_empty())
    }
}

impl Block<'_> {
    /// `cp.async.bulk.*`.
    pub fn bulk(&mut self, warp: &mut Warp, op: &Bulk, active: u32) -> Result<(), Fault> {
        warp.work += 1;
        for lane in lanes(active) {
            match op.op {
                BulkOp::Prefetch => {}
                BulkOp::Commit => warp.stores.commit(lane),
                BulkOp::Wait(n) => {
                    for store in warp.stores.take(lane, n) {
                        self.finish_store(warp, &store);
                    }
                }
                BulkOp::ToGlobal => self.store_bulk(warp, op, lane)?,
                BulkOp::ToShared | BulkOp::ToCluster => self.load_bulk(warp, op, lane)?,
            }
        }
        Ok(())
    }

    /// Bytes of a plain copy.
    fn size(&self, warp: &Warp, op: &Bulk, lane: u32) -> Result<u32, Fault> {
        let bytes = lanes32(warp, &self.program().constants, op.bytes)[lane as usize];
        if !bytes.is_multiple_of(16) {
            let detail = format!("a bulk copy of {bytes} bytes: the size must be a multiple of 16");
            return Err(Fault::new(Kind::Misaligned, lane, detail));
        }
        Ok(bytes)
    }

    fn load_bulk(&mut self, warp: &mut Warp, op: &Bulk, lane: u32) -> Result<(), Fault> {
        let Some(barrier) = &op.barrier else {
            return Err(Fault::new(Kind::InvalidBarrier, lane, "a bulk copy to shared memory needs an mbarrier"));
        };
        // Chunks of the destination: offset from its start, and the bytes.
        let (bytes, align, chunks) = if let Some(tensor) = &op.tensor {
            let map = self.tensor_map(warp, tensor, lane)?;
            let at = addresses(warp, &self.program().constants, &op.to)[lane as usize];
            (map.rows() * map.pitch(), 128, self.read_box(warp, &map, tensor, lane, at as u32)?)
        } else {
            let bytes = self.size(warp, op, lane)?;
            let from = if op.op == BulkOp::ToShared { Space::Global } else { Space::Shared };
            (bytes, 16, vec![(0, self.read_range(warp, from, &op.from, lane, bytes)?)])
        };
        let (span, at) = self.range(warp, Space::SharedCluster, &op.to, lane, bytes, align)?;
        let offset = (at[lane as usize] - span.origin) as u32;
        let barrier_at = addresses(warp, &self.program().constants, barrier);
        let key = self.mbarrier_key(warp, Space::SharedCluster, &barrier_at, lane)?;
        self.count_bulk_shared(chunks.iter().map(|(_, data)| data.len() as u64).sum());
        let own = self.cluster_rank();
        let targets = match op.multicast {
            None => vec![(span.region, key.0)],
            Some(mask) => {
                let mask = lanes32(warp, &self.program().constants, mask)[lane as usize] & 0xffff;
                lanes(mask).map(|r| (if r == own { Region::Shared } else { Region::Peer(r as usize) }, r)).collect()
            }
        };
        for (region, barrier_rank) in targets {
            let base = match region {
                Region::Peer(rank) => match self.peers.get(rank) {
                    Some(peer) if peer.gone.load(Ordering::Relaxed) => {
                        let detail = format!("a multicast to the cluster's block {rank}, which has exited");
                        return Err(Fault::new(Kind::UseAfterFree, lane, detail));
                    }
                    Some(peer) if offset + bytes <= peer.bytes => peer.base,
                    _ => {
                        let detail = format!("a multicast to block {rank} of a cluster of {}", self.peers.len().max(1));
                        return Err(Fault::new(Kind::OutOfBounds, lane, detail));
                    }
                },
                _ => self.shared_base(),
            };
            for (start, data) in &chunks {
                let copy = BulkCopy {
                    data: data.clone(),
                    to: base.wrapping_add((offset + start) as usize),
                    region,
                    offset: offset + start,
                    clock: warp.clock.clone(),
                    lane,
                };
                self.issue(warp, (barrier_rank, key.1), lane, copy)?;
            }
        }
        Ok(())
    }

    fn issue(&mut self, warp: &mut Warp, key: (u32, u32), lane: u32, copy: BulkCopy) -> Result<(), Fault> {
        let bytes = copy.data.len() as u32;
        let found =
            self.shadow_of(copy.region).and_then(|shadow| shadow.begin_copy(&warp.clock, lane, copy.offset, bytes));
        if let Some(conflict) = found {
            self.report_shared(warp, lane, conflict, true);
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
        if state.copies.is_empty() {
            return;
        }
        for copy in std::mem::take(&mut state.copies) {
            // SAFETY: the destination range was checked when the copy was issued; shared memory stays in place.
            unsafe { copy.to.copy_from(copy.data.as_ptr(), copy.data.len()) };
            if let Some(shadow) = self.shadow_of(copy.region) {
                shadow.end_bulk(&copy.clock, copy.lane, copy.offset, copy.data.len() as u32);
            }
            state.bytes -= copy.data.len() as i64;
        }
        state.settle();
    }

    fn store_bulk(&mut self, warp: &mut Warp, op: &Bulk, lane: u32) -> Result<(), Fault> {
        let (pieces, ty) = if let Some(tensor) = &op.tensor {
            let map = self.tensor_map(warp, tensor, lane)?;
            let (span, at) = self.range(warp, Space::SharedCluster, &op.to, lane, map.rows() * map.pitch(), 128)?;
            if span.region != Region::Shared {
                return Err(Fault::at(Kind::OutOfBounds, lane, at[lane as usize], "the source must be this block's"));
            }
            let from = (at[lane as usize] - span.origin) as u32;
            (
                self.write_box(warp, &map, tensor, lane, from, op.reduce.is_some())?,
                super::tensor_copy::element_type(&map),
            )
        } else {
            let bytes = self.size(warp, op, lane)?;
            let (span, at) = self.range(warp, Space::Shared, &op.from, lane, bytes, 16)?;
            let from = (at[lane as usize] - span.origin) as u32;
            let (span, at) = self.range(warp, Space::Global, &op.to, lane, bytes, 16)?;
            let to = self.global_target(warp, &span, &at, bytes, op.reduce.is_some())?;
            self.count_access(&span, &at, bytes, true);
            (vec![Piece { from, to, bytes }], Type::B32)
        };
        self.count_bulk_shared(pieces.iter().map(|p| u64::from(p.bytes)).sum());
        let mut found = None;
        if let Some(shadow) = &mut self.shadow {
            for piece in &pieces {
                found = found.or(shadow.read_async(&warp.clock, lane, piece.from, piece.bytes));
                shadow.begin_source(&warp.clock, lane, piece.from, piece.bytes);
            }
        }
        if let Some(conflict) = found {
            self.report_shared(warp, lane, conflict, false);
        }
        let store = BulkStore { lane, pieces, reduce: op.reduce.map(|(op, named)| (op, named.unwrap_or(ty))) };
        if self.config().eager_copies {
            self.move_store(&store);
        }
        warp.stores.open.push(store);
        Ok(())
    }

    /// The host address of a range that a bulk copy writes or updates.
    pub fn global_target(
        &mut self,
        warp: &Warp,
        span: &Span,
        at: &[u64; 32],
        bytes: u32,
        update: bool,
    ) -> Result<*mut u8, Fault> {
        self.writable(span, at)?;
        if self.config().check {
            if update {
                self.check_read(warp, span, at, bytes, true);
            }
            self.check_write(warp, span, at, bytes, update, |_, _| 0);
        } else if let Region::Global(index) = span.region {
            self.mark_written(index, span, at, bytes);
        }
        let lane = span.lanes.trailing_zeros();
        Ok(span.host(at[lane as usize], lane))
    }

    /// A store whose group has been waited for.
    fn finish_store(&mut self, warp: &Warp, store: &BulkStore) {
        if !self.config().eager_copies {
            self.move_store(store);
        }
        if let Some(shadow) = &mut self.shadow {
            for piece in &store.pieces {
                shadow.end_source(&warp.clock, store.lane, piece.from, piece.bytes);
            }
        }
    }

    fn move_store(&mut self, store: &BulkStore) {
        for piece in &store.pieces {
            let from = self.shared_base().wrapping_add(piece.from as usize);
            match store.reduce {
                // SAFETY: both ranges were checked when the copy was issued.
                None => unsafe { piece.to.copy_from(from, piece.bytes as usize) },
                Some((op, ty)) => {
                    let size = ty.bytes();
                    for at in (0..piece.bytes as usize).step_by(size as usize) {
                        let mut b = [0u8; 8];
                        // SAFETY: as above; places are multiples of the element's size.
                        unsafe {
                            b.as_mut_ptr().copy_from(from.add(at), size as usize);
                            let b = u64::from_le_bytes(b);
                            atomics::update(piece.to.add(at), size, |old| atomics::apply(op, ty, old, b, 0));
                        }
                    }
                }
            }
        }
    }

    /// Stores that their threads did not wait for before the warp ended: shared memory may be gone before it is read.
    pub fn stores_at_exit(&mut self, warp: &mut Warp) {
        if warp.stores.is_empty() {
            return;
        }
        let stores = warp.stores.take_all();
        for store in &stores {
            self.finish_store(warp, store);
        }
        let detail =
            "the thread exits with bulk copies whose source may not have been read: cp.async.bulk.wait_group.read";
        self.report(warp, warp.pc, Fault::new(Kind::AsyncCopyNotWaited, stores[0].lane, detail));
    }

    /// Counts shared memory that the copy engine or the tensor core moves, 128 bytes a pass.
    pub fn count_bulk_shared(&mut self, bytes: u64) {
        if self.config().count {
            self.counters.shared_passes += bytes.div_ceil(128);
            self.counters.shared_passes_least += bytes.div_ceil(128);
            self.counters.shared_bytes += bytes;
        }
    }

    fn range(
        &mut self,
        warp: &mut Warp,
        space: Space,
        address: &Address,
        lane: u32,
        bytes: u32,
        align: u32,
    ) -> Result<(Span, [u64; 32]), Fault> {
        let at = addresses(warp, &self.program().constants, address);
        self.aligned(&at, 1 << lane, align)?;
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
        let (span, at) = self.range(warp, space, address, lane, bytes, 16)?;
        if span.region == Region::Shared {
            let offset = (at[lane as usize] - span.origin) as u32;
            let found = self.shadow.as_mut().and_then(|s| s.read_async(&warp.clock, lane, offset, bytes));
            if let Some(conflict) = found {
                self.report_shared(warp, lane, conflict, false);
            }
        } else {
            if self.config().check {
                self.check_read(warp, &span, &at, bytes, false);
            }
            self.count_access(&span, &at, bytes, false);
        }
        let from = span.host(at[lane as usize], lane);
        // SAFETY: `range` checked `bytes` bytes there.
        Ok(unsafe { std::slice::from_raw_parts(from, bytes as usize) }.to_vec())
    }
}
