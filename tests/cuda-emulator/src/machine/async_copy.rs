//! `cp.async`: copies from global to shared memory that land when waited for.
//!
//! By default a copy lands as late as the program allows: at the wait that covers it. A kernel that reads too early then
//! reads old bytes, and the check names the read. Eager landing is the other legal extreme.

use super::access::{Region, addresses};
use super::block::Block;
use super::step::{lanes32, pred};
use super::warp::{Warp, lanes};
use crate::checks::Fault;
use crate::counts::traffic;
use crate::program::CopyAsync;
use crate::ptx::types::Space;

/// One lane's copy.
#[derive(Debug, Clone, Copy)]
pub struct Copy {
    lane: u32,
    /// Shared offset.
    to: u32,
    /// Host address of the source.
    from: *const u8,
    /// Bytes from the source; zeros follow.
    take: u32,
    bytes: u32,
}

// SAFETY: the source lies in an allocation of the launch's snapshot, which outlives the warp.
unsafe impl Send for Copy {}

/// Copies of a warp: groups committed, oldest first, and those not committed yet. Lanes that part keep their own groups:
/// each group tells which lanes it belongs to.
#[derive(Debug, Default)]
pub struct Copies {
    groups: Vec<(u32, Vec<Copy>)>,
    open: Vec<Copy>,
}

impl Copies {
    /// `cp.async.commit_group` of the active lanes.
    pub fn commit(&mut self, active: u32) {
        let (mine, rest) = std::mem::take(&mut self.open).into_iter().partition(|c: &Copy| active >> c.lane & 1 == 1);
        self.open = rest;
        self.groups.push((active, mine));
    }

    /// Copies that have not landed.
    pub fn in_flight(&self) -> usize {
        self.open.len() + self.groups.iter().map(|(_, g)| g.len()).sum::<usize>()
    }

    /// Takes the copies of the active lanes that a wait for all but the last `n` groups covers.
    fn take(&mut self, active: u32, n: u32) -> Vec<Copy> {
        let mut landed = Vec::new();
        if n == u32::MAX {
            // wait_all is commit_group and wait_group 0
            self.commit(active);
            return self.take(active, 0);
        }
        for lane in lanes(active) {
            let mine: Vec<usize> = (0..self.groups.len()).filter(|g| self.groups[*g].0 >> lane & 1 == 1).collect();
            for &g in &mine[..mine.len().saturating_sub(n as usize)] {
                let (mask, copies) = &mut self.groups[g];
                *mask &= !(1 << lane);
                copies.retain(|c| {
                    if c.lane == lane {
                        landed.push(*c);
                    }
                    c.lane != lane
                });
            }
        }
        self.groups.retain(|(mask, _)| *mask != 0);
        landed
    }

    /// The same when all lanes of every group wait together, which is nearly always.
    fn take_together(&mut self, active: u32, n: u32) -> Option<Vec<Copy>> {
        if n == u32::MAX || self.groups.iter().any(|(mask, _)| *mask != active) {
            return None;
        }
        let count = self.groups.len().saturating_sub(n as usize);
        Some(self.groups.drain(..count).flat_map(|(_, copies)| copies).collect())
    }
}

impl Block<'_> {
    /// `cp.async.ca/cg.shared.global`.
    pub fn copy_async(&mut self, warp: &mut Warp, copy: &CopyAsync, active: u32) -> Result<(), Fault> {
        warp.work += 1;
        let constants = &self.program().constants;
        let (to, from) = (addresses(warp, constants, &copy.to), addresses(warp, constants, &copy.from));
        self.aligned(&to, active, copy.bytes)?;
        let take =
            copy.source_bytes.map_or([copy.bytes; 32], |r| lanes32(warp, constants, r).map(|n| n.min(copy.bytes)));
        let ignored = copy.ignore.map_or(0, |p| pred(warp, p));
        let reads = lanes(active).filter(|l| take[*l as usize] > 0 && ignored >> l & 1 == 0).fold(0, |m, l| m | 1 << l);
        self.aligned(&from, reads, copy.bytes)?;
        let mut sources = [std::ptr::null::<u8>(); 32];
        let mut left = reads;
        while left != 0 {
            // Lanes may read fewer bytes than they write: resolve by what is read.
            let leader = left.trailing_zeros() as usize;
            let span = self.span(warp, Space::Global, &from, left, take[leader])?;
            let span = super::access::Span {
                lanes: lanes(span.lanes).filter(|l| take[*l as usize] <= take[leader]).fold(0, |m, l| m | 1 << l),
                ..span
            };
            left &= !span.lanes;
            if self.config().check {
                self.check_read(warp, &span, &from, take[leader], false);
            }
            if self.config().count
                && let Region::Global(_) = span.region
            {
                self.counters.global_loads.requests += 1;
                self.counters.global_loads.bytes += lanes(span.lanes).map(|l| u64::from(take[l as usize])).sum::<u64>();
                self.counters.global_loads.sectors += u64::from(traffic::sectors(&from, span.lanes, take[leader]));
                self.launch.cache(&from, span.lanes, take[leader], false);
            }
            for lane in lanes(span.lanes) {
                sources[lane as usize] = span.host(from[lane as usize], lane);
            }
        }
        let mut left = active;
        let mut copies = Vec::with_capacity(32);
        while left != 0 {
            let span = self.span(warp, Space::Shared, &to, left, copy.bytes)?;
            left &= !span.lanes;
            self.count_access(&span, &to, copy.bytes, true);
            for lane in lanes(span.lanes) {
                let offset = (to[lane as usize] - span.origin) as u32;
                let take = if reads >> lane & 1 == 1 { take[lane as usize] } else { 0 };
                copies.push(Copy { lane, to: offset, from: sources[lane as usize], take, bytes: copy.bytes });
                if let Some(mut shadow) = self.shadow.take() {
                    let found = shadow.begin_copy(&warp.clock, lane, offset, copy.bytes);
                    self.shadow = Some(shadow);
                    if let Some(conflict) = found {
                        self.report_shared(warp, lane, conflict, true);
                    }
                }
            }
        }
        if self.config().eager_copies {
            copies.iter().for_each(|c| self.move_bytes(c));
        }
        warp.copies.open.append(&mut copies);
        Ok(())
    }

    /// `cp.async.wait_group n`, `wait_all`.
    pub fn wait_copies(&mut self, warp: &mut Warp, active: u32, n: u32) -> Result<(), Fault> {
        let landed = match warp.copies.take_together(active, n) {
            Some(landed) => landed,
            None => warp.copies.take(active, n),
        };
        self.land(warp, &landed);
        Ok(())
    }

    /// Copies land and become writes of their threads.
    pub fn land(&mut self, warp: &mut Warp, copies: &[Copy]) {
        for copy in copies {
            if !self.config().eager_copies {
                self.move_bytes(copy);
            }
            if let Some(shadow) = &mut self.shadow {
                shadow.end_copy(&warp.clock, copy.lane, copy.to, copy.bytes);
            }
        }
    }

    /// All copies of the active lanes so far, for an arrival on a barrier when they land.
    pub fn take_all_copies(&mut self, warp: &mut Warp, active: u32) -> Vec<Copy> {
        warp.copies.take(active, u32::MAX)
    }

    /// Copies that nobody waited for land when the warp is gone.
    pub fn copies_at_exit(&mut self, warp: &mut Warp) {
        let landed = warp.copies.take(u32::MAX, u32::MAX);
        for copy in &landed {
            self.move_bytes(copy);
        }
    }

    fn move_bytes(&mut self, copy: &Copy) {
        let to = self.shared_base().wrapping_add(copy.to as usize);
        // SAFETY: both ranges were checked when the copy was issued; shared memory keeps its place for the block's life.
        unsafe {
            if copy.take > 0 {
                to.copy_from(copy.from, copy.take as usize);
            }
            to.add(copy.take as usize).write_bytes(0, (copy.bytes - copy.take) as usize);
        }
    }
}
