//! `mbarrier` objects: phases of arrivals and transaction bytes.
//!
//! The object's state is kept beside shared memory, by address; the 64 bits in shared memory are only marked as written.
//! The state token that `arrive` returns is the number of the phase.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::access::{Region, addresses};
use super::block::Block;
use super::bulk::BulkCopy;
use super::step::{lanes32, lanes64, set_pred, set32, set64};
use super::warp::{Warp, lanes};
use crate::checks::clock::Entries;
use crate::checks::{Fault, Kind};
use crate::program::{Mbarrier, MbarrierOp};
use crate::ptx::types::Space;

/// One object.
#[derive(Debug, Clone, Default)]
pub struct MbarrierState {
    /// Arrivals of a phase.
    pub expected: u32,
    /// Arrivals missing in the present phase.
    pub pending: u32,
    /// Transaction bytes missing in the present phase.
    pub bytes: i64,
    /// Phases completed.
    pub phase: u64,
    /// Clock of all that arrived.
    pub clock: Entries,
    /// Bulk copies that complete here and have not landed.
    pub copies: Vec<BulkCopy>,
}

impl MbarrierState {
    /// Begins the next phase if nothing is missing.
    pub fn settle(&mut self) {
        if self.pending == 0 && self.bytes == 0 && self.expected > 0 {
            self.phase += 1;
            self.pending = self.expected;
        }
    }
}

/// Objects that the blocks of a cluster share, by rank and place in shared memory.
pub type Objects<T> = Arc<Mutex<HashMap<(u32, u32), T>>>;

/// Locks the objects; a panic elsewhere leaves them whole enough to report with.
pub fn lock<T>(objects: &Objects<T>) -> MutexGuard<'_, HashMap<(u32, u32), T>> {
    objects.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Block<'_> {
    /// The key of an object at a lane's address.
    pub fn mbarrier_key(
        &mut self,
        warp: &mut Warp,
        space: Space,
        at: &[u64; 32],
        lane: u32,
    ) -> Result<(u32, u32), Fault> {
        self.aligned(at, 1 << lane, 8)?;
        let span = self.span(warp, space, at, 1 << lane, 8)?;
        let offset = (at[lane as usize] - span.origin) as u32;
        match span.region {
            Region::Shared => Ok((self.cluster_rank(), offset)),
            Region::Peer(rank) => Ok((rank as u32, offset)),
            _ => Err(Fault::at(Kind::InvalidBarrier, lane, at[lane as usize], "an mbarrier must lie in shared memory")),
        }
    }

    /// What the block's barriers wait for, for reports.
    pub fn describe_mbarriers(&self) -> String {
        let barriers = lock(&self.mbarriers);
        let mut open: Vec<_> = barriers.iter().filter(|(_, b)| b.pending < b.expected || b.bytes != 0).collect();
        open.sort_by_key(|(key, _)| **key);
        let describe = |((rank, offset), b): (&(u32, u32), &MbarrierState)| {
            format!(
                "; mbarrier at shared offset {offset:#x} of block {rank} of the cluster, phase {}: {} of {} arrivals and {} \
                 transaction bytes missing",
                b.phase, b.pending, b.expected, b.bytes
            )
        };
        open.into_iter().take(8).map(|(key, b)| describe((key, b))).collect()
    }

    /// `mbarrier.*`, lanes in order; true if it was a test that failed.
    pub fn mbarrier(&mut self, warp: &mut Warp, op: &Mbarrier, active: u32) -> Result<bool, Fault> {
        let constants = &self.program().constants;
        let is_state = matches!(op.op, MbarrierOp::PendingCount | MbarrierOp::Test { parity: false });
        let operand = match op.operand {
            Some(reg) if is_state => lanes64(warp, constants, reg),
            Some(reg) => lanes32(warp, constants, reg).map(u64::from),
            None => [1; 32],
        };
        if op.op == MbarrierOp::PendingCount {
            let out = operand.map(|state| (state >> 32) as u32);
            if let Some(d) = op.dest {
                set32(warp, d, &out, active);
            }
            return Ok(false);
        }
        let at = addresses(warp, constants, &op.address);
        let is_test = matches!(op.op, MbarrierOp::Test { .. });
        let (mut out, mut done) = ([0u64; 32], 0u32);
        let mut before = None;
        for lane in lanes(active) {
            let i = lane as usize;
            // Lanes that ask the same get the same answer.
            if let Some(j) = before.filter(|j: &usize| is_test && (at[*j], operand[*j]) == (at[i], operand[i])) {
                out[i] = out[j];
                done |= (done >> j & 1) << lane;
                continue;
            }
            before = Some(i);
            let key = self.mbarrier_key(warp, op.space, &at, lane)?;
            if op.op == MbarrierOp::Init {
                let count = operand[i] as u32;
                let state = MbarrierState { expected: count, pending: count, ..MbarrierState::default() };
                lock(&self.mbarriers).insert(key, state);
                let own = key.0 == self.cluster_rank();
                if let Some(shadow) = &mut self.shadow
                    && own
                {
                    shadow.initialise(key.1, 8);
                }
                continue;
            }
            if is_test {
                self.polled = true;
                self.land_bulk(key);
            }
            let copies = if let MbarrierOp::ArriveOnCopies { .. } = op.op {
                self.take_all_copies(warp, 1 << lane)
            } else {
                vec![]
            };
            self.land(warp, &copies);
            let barriers = self.mbarriers.clone();
            let mut barriers = lock(&barriers);
            let Some(state) = barriers.get_mut(&key) else {
                let detail = "used before mbarrier.init, or after mbarrier.inval";
                return Err(Fault::at(
                    Kind::InvalidBarrier,
                    lane,
                    crate::memory::layout::SHARED + u64::from(key.1),
                    detail,
                ));
            };
            out[i] = state.phase | u64::from(state.pending) << 32;
            match op.op {
                MbarrierOp::Arrive { drop, expect_bytes } => {
                    let count = if expect_bytes { 1 } else { operand[i] as u32 };
                    if expect_bytes {
                        state.bytes += operand[i] as i64;
                    }
                    if count > state.pending {
                        let detail = format!("{count} arrivals where {} are missing in the phase", state.pending);
                        return Err(Fault::new(Kind::InvalidBarrier, lane, detail));
                    }
                    state.pending -= count;
                    if drop {
                        state.expected -= count.min(state.expected);
                    }
                    warp.clock.release(&mut state.clock);
                    state.settle();
                }
                MbarrierOp::ExpectBytes => state.bytes += operand[i] as i64,
                MbarrierOp::CompleteBytes => {
                    state.bytes -= operand[i] as i64;
                    state.settle();
                }
                MbarrierOp::Test { parity } => {
                    let complete = if parity {
                        state.phase & 1 != operand[i] & 1
                    } else {
                        state.phase > (operand[i] & 0xffff_ffff)
                    };
                    if complete {
                        warp.clock.acquire(&state.clock);
                        done |= 1 << lane;
                    }
                }
                MbarrierOp::ArriveOnCopies { no_increment } => {
                    // Without `.noinc` the pending count rises first, so that this arrival leaves it as it was.
                    if no_increment {
                        state.pending = state.pending.saturating_sub(1);
                    }
                    warp.clock.release(&mut state.clock);
                    state.settle();
                }
                MbarrierOp::Invalidate => {
                    barriers.remove(&key);
                }
                MbarrierOp::Init | MbarrierOp::PendingCount => {}
            }
        }
        if let Some(d) = op.dest {
            set64(warp, d, &out, active);
        }
        set_pred(warp, op.p, done, active);
        // A test that fails changes nothing: a block that does nothing else hangs.
        let failed = is_test && done == 0;
        warp.work += u64::from(!failed);
        Ok(failed)
    }
}
