//! The shadow of shared memory: for every byte its last writer and reader, for races, uninitialised reads and copies in
//! flight.
//!
//! A stamp packs the warp's clock (19 bits), warp (5 bits) and lane (5 bits) above three flag bits. Two accesses race if one
//! writes, they come from different threads, and the earlier is not ordered before the later ([`Clock`]). One reader is
//! kept; a second concurrent one turns the stamp into "several of clock c", which any unordered writer races with. Writes
//! of equal values by several threads are not reported: the result is the same in every order. Accesses of another block
//! of the cluster carry that block's rank in place of the lane.

use super::clock::Clock;
use super::finding::Kind;

/// A copy that writes (or reads) the byte has not been waited for.
const IN_FLIGHT: u32 = 1;
/// Of a reader: there are more.
const SEVERAL: u32 = 2;
/// Of a writer: the asynchronous proxy.
const ASYNC: u32 = 2;
/// The lane is a rank: another block of the cluster did it.
const REMOTE: u32 = 4;
const CLOCK_BITS: u32 = 19;
const CLOCK_SHIFT: u32 = 32 - CLOCK_BITS;
/// Before everything.
const CLOCK_ZERO: u32 = 1 << 8;

/// Clock at which stamps must be begun anew ([`SharedShadow::rebase`]).
pub const LAST_CLOCK: u32 = (1 << CLOCK_BITS) - 0x1_0000;

/// The stamp of an access to memory of the block of a rank.
fn stamp(rank: usize, clock: &Clock, lane: u32) -> u32 {
    let lane = if clock.rank == rank { lane << 3 } else { (clock.rank as u32) << 3 | REMOTE };
    clock.now << CLOCK_SHIFT | (clock.warp as u32) << 8 | lane
}

fn warp_of(stamp: u32) -> usize {
    (stamp >> 8 & 31) as usize
}

fn lane_of(stamp: u32) -> u32 {
    stamp >> 3 & 31
}

fn thread_of(stamp: u32) -> u32 {
    stamp >> 3 & 0x3ff
}

/// Whether an access with this stamp to memory of the block of a rank is ordered before the next of `lane`.
#[inline]
fn ordered(stamp: u32, rank: usize, clock: &Clock, lane: u32) -> bool {
    let (warp, at) = (warp_of(stamp), stamp >> CLOCK_SHIFT);
    if stamp & REMOTE != 0 {
        let rank = lane_of(stamp) as usize;
        return rank == clock.rank && warp == clock.warp || at <= clock.known(rank, warp);
    }
    warp == clock.warp && rank == clock.rank && lane_of(stamp) == lane || at <= clock.known(rank, warp)
}

/// The reader to keep of the one before and this one.
#[inline]
fn next_reader(r: u32, mine: u32, rank: usize, clock: &Clock, lane: u32) -> u32 {
    let several = r & SEVERAL != 0;
    if r == 0 || ordered(r, rank, clock, if several { 32 } else { lane }) {
        mine
    } else if warp_of(r) == warp_of(mine) && (r ^ mine) & REMOTE == 0 {
        mine | SEVERAL
    } else {
        // Of two warps' unordered reads the earlier stays: it is the one that a later barrier may miss.
        r | SEVERAL
    }
}

/// What a check found at a byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conflict {
    /// What is wrong.
    pub kind: Kind,
    /// Byte in shared memory.
    pub offset: u32,
    /// The other thread's number in the block, where known.
    pub other: Option<u32>,
    /// The other access was a write.
    pub other_wrote: bool,
    /// Rank of the other thread's block in the cluster.
    pub rank: u32,
}

/// The shadow of one block's shared memory.
#[derive(Debug)]
pub struct SharedShadow {
    written: Vec<u32>,
    read: Vec<u32>,
    rank: usize,
}

impl SharedShadow {
    /// A shadow of `bytes` bytes, all uninitialised.
    pub fn new(bytes: usize) -> Self {
        SharedShadow { written: vec![0; bytes], read: vec![0; bytes], rank: 0 }
    }

    /// Becomes that of the block of a rank.
    pub fn set_rank(&mut self, rank: usize) {
        self.rank = rank;
    }

    fn conflict(&self, kind: Kind, offset: u32, stamp: u32, several: bool, other_wrote: bool) -> Conflict {
        let remote = stamp & REMOTE != 0;
        let other = (stamp != 0 && !several && !remote).then(|| thread_of(stamp));
        Conflict { kind, offset, other, other_wrote, rank: if remote { lane_of(stamp) } else { self.rank as u32 } }
    }

    /// Forgets everything: a new block.
    pub fn clear(&mut self) {
        self.written.fill(0);
        self.read.fill(0);
    }

    /// A read of `n` bytes at `offset`. `strong` reads never race (they are synchronisation themselves).
    #[inline]
    pub fn read(&mut self, clock: &Clock, lane: u32, offset: u32, n: u32, strong: bool) -> Option<Conflict> {
        let range = offset as usize..(offset + n) as usize;
        let mine = stamp(self.rank, clock, lane);
        let mut conflict = None;
        let mut last = mine;
        for (i, &w) in self.written[range.clone()].iter().enumerate() {
            if w == last {
                continue;
            }
            last = w;
            let settled = w & IN_FLIGHT == 0 && w != 0 && (strong || ordered(w, self.rank, clock, lane));
            if !settled && conflict.is_none() {
                conflict = self.judge_read(w, clock, lane, offset + i as u32, strong);
            }
        }
        if !strong {
            let rank = self.rank;
            // Bytes of one access nearly always have one history.
            let (mut last, mut next) = (mine, mine);
            for r in &mut self.read[range] {
                if *r != last {
                    last = *r;
                    let keeps = last & !SEVERAL == mine || last & IN_FLIGHT != 0;
                    next = if keeps { last } else { next_reader(last, mine, rank, clock, lane) };
                }
                *r = next;
            }
        }
        conflict
    }

    #[cold]
    fn judge_read(&self, w: u32, clock: &Clock, lane: u32, offset: u32, strong: bool) -> Option<Conflict> {
        let kind = if w & IN_FLIGHT != 0 {
            Kind::AsyncCopyNotWaited
        } else if w == 0 {
            Kind::UninitializedShared
        } else if strong || ordered(w, self.rank, clock, lane) {
            return None;
        } else {
            Kind::SharedRace
        };
        Some(self.conflict(kind, offset, w, false, true))
    }

    /// A read by the asynchronous proxy: as [`SharedShadow::read`], and what the generic proxy wrote must have passed a
    /// proxy fence.
    pub fn read_async(&mut self, clock: &Clock, lane: u32, offset: u32, n: u32) -> Option<Conflict> {
        if n == 16 && self.read_chunk(clock, lane, offset as usize) {
            return None;
        }
        if let Some(conflict) = self.read(clock, lane, offset, n, false) {
            return Some(conflict);
        }
        let mut last = 0;
        for (i, &w) in self.written[offset as usize..(offset + n) as usize].iter().enumerate() {
            if w == last || w & (ASYNC | IN_FLIGHT) != 0 {
                continue;
            }
            last = w;
            let rank = if w & REMOTE != 0 { lane_of(w) as usize } else { self.rank };
            if w >> CLOCK_SHIFT > clock.fenced(rank, warp_of(w)) {
                return Some(self.conflict(Kind::MissingProxyFence, offset + i as u32, w, false, true));
            }
        }
        None
    }

    /// Reads 16 bytes by the asynchronous proxy; false if they have several histories or a conflict, and nothing was done.
    fn read_chunk(&mut self, clock: &Clock, lane: u32, at: usize) -> bool {
        let (written, read) = (&self.written[at..at + 16], &mut self.read[at..at + 16]);
        let (w, r) = (written[0], read[0]);
        let seen = w & ASYNC != 0 || w & REMOTE == 0 && w >> CLOCK_SHIFT <= clock.fenced(self.rank, warp_of(w));
        if !seen || w == 0 || (w | r) & IN_FLIGHT != 0 || !ordered(w, self.rank, clock, lane) {
            return false;
        }
        if written.iter().any(|x| *x != w) || read.iter().any(|x| *x != r) {
            return false;
        }
        let mine = stamp(self.rank, clock, lane);
        if r & !SEVERAL != mine {
            read.fill(next_reader(r, mine, self.rank, clock, lane));
        }
        true
    }

    /// Marks bytes as the source of a copy that has not been waited for.
    pub fn begin_source(&mut self, clock: &Clock, lane: u32, offset: u32, n: u32) {
        let mine = stamp(self.rank, clock, lane) | IN_FLIGHT;
        self.read[offset as usize..(offset + n) as usize].fill(mine);
    }

    /// The copy has read its source: from now on that is a read of the thread that waited.
    pub fn end_source(&mut self, clock: &Clock, lane: u32, offset: u32, n: u32) {
        let mine = stamp(self.rank, clock, lane);
        for r in &mut self.read[offset as usize..(offset + n) as usize] {
            *r = if *r & IN_FLIGHT != 0 { mine } else { *r };
        }
    }

    /// A write of `n` bytes. `same` tells for a byte whether it keeps its value, which excuses a write-write conflict.
    #[inline]
    pub fn write(
        &mut self,
        clock: &Clock,
        lane: u32,
        offset: u32,
        n: u32,
        strong: bool,
        same: impl Fn(u32) -> bool,
    ) -> Option<Conflict> {
        let range = offset as usize..(offset + n) as usize;
        let mine = stamp(self.rank, clock, lane);
        let mut conflict = None;
        let (mut last_w, mut last_r) = (mine, 0);
        for i in range {
            let (w, r) = (self.written[i], self.read[i]);
            self.written[i] = mine;
            if (w == last_w || w == 0) && (r == last_r || r == 0) {
                continue;
            }
            (last_w, last_r) = (w, r);
            if conflict.is_some() {
                continue;
            }
            let at = i as u32;
            if w & IN_FLIGHT != 0 {
                conflict = Some(self.conflict(Kind::AsyncCopyNotWaited, at, w, false, true));
            } else if r & IN_FLIGHT != 0 {
                conflict = Some(self.conflict(Kind::AsyncCopyNotWaited, at, r, false, false));
            } else if !strong && w != 0 && !ordered(w, self.rank, clock, lane) && !same(at) {
                conflict = Some(self.conflict(Kind::SharedRace, at, w, false, true));
            } else if !strong && r != 0 {
                let several = r & SEVERAL != 0;
                if !ordered(r, self.rank, clock, if several { 32 } else { lane }) {
                    conflict = Some(self.conflict(Kind::SharedRace, at, r, several, false));
                }
            }
        }
        conflict
    }

    /// Marks bytes as the target of a copy that has not been waited for.
    pub fn begin_copy(&mut self, clock: &Clock, lane: u32, offset: u32, n: u32) -> Option<Conflict> {
        let conflict = self.write(clock, lane, offset, n, false, |_| false);
        for w in &mut self.written[offset as usize..(offset + n) as usize] {
            *w |= IN_FLIGHT;
        }
        conflict
    }

    /// A copy has been waited for: from now on it is a write of this thread.
    pub fn end_copy(&mut self, clock: &Clock, lane: u32, offset: u32, n: u32) {
        let mine = stamp(self.rank, clock, lane);
        self.written[offset as usize..(offset + n) as usize].fill(mine);
    }

    /// The same for a copy by the asynchronous proxy, whose writes need no proxy fence to be read by it.
    pub fn end_bulk(&mut self, clock: &Clock, lane: u32, offset: u32, n: u32) {
        let mine = stamp(self.rank, clock, lane) | ASYNC;
        self.written[offset as usize..(offset + n) as usize].fill(mine);
    }

    /// Marks bytes as initialised before the kernel (by the hardware, or by a copy whose barrier carries the order).
    pub fn initialise(&mut self, offset: u32, n: u32) {
        self.written[offset as usize..(offset + n) as usize].fill(CLOCK_ZERO);
        self.read[offset as usize..(offset + n) as usize].fill(0);
    }

    /// Begins new clocks: everything so far is ordered before everything to come. For a barrier of the whole block.
    pub fn rebase(&mut self) {
        self.written.iter_mut().filter(|w| **w != 0 && **w & IN_FLIGHT == 0).for_each(|w| *w = CLOCK_ZERO);
        self.read.fill(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checks::clock::{Clock, Entries};

    fn barrier(clocks: &mut [Clock]) {
        let mut object = Entries::default();
        clocks.iter_mut().for_each(|c| c.release(&mut object));
        clocks.iter_mut().for_each(|c| c.acquire(&object));
    }

    #[test]
    fn a_barrier_orders_and_its_absence_does_not() {
        let mut clocks = [Clock::new(0, 0), Clock::new(0, 1)];
        let mut shadow = SharedShadow::new(64);
        assert_eq!(shadow.write(&clocks[0], 3, 8, 4, false, |_| false), None);
        let found = shadow.read(&clocks[1], 0, 8, 4, false).unwrap();
        assert_eq!((found.kind, found.other), (Kind::SharedRace, Some(3)));
        barrier(&mut clocks);
        assert_eq!(shadow.read(&clocks[1], 0, 8, 4, false), None);
        assert!(!shadow.write(&clocks[0], 3, 8, 4, false, |_| false).unwrap().other_wrote, "write after read");
    }

    #[test]
    fn all_readers_count_not_only_the_last() {
        let mut clocks = [Clock::new(0, 0), Clock::new(0, 1)];
        let mut shadow = SharedShadow::new(64);
        shadow.write(&clocks[0], 0, 0, 4, false, |_| false);
        barrier(&mut clocks);
        shadow.read(&clocks[1], 5, 0, 4, false);
        shadow.read(&clocks[0], 0, 0, 4, false);
        assert_eq!(shadow.write(&clocks[0], 0, 0, 4, false, |_| false).unwrap().kind, Kind::SharedRace);
    }

    #[test]
    fn lanes_of_a_warp_race_until_they_synchronise() {
        let mut clock = Clock::new(0, 0);
        let mut shadow = SharedShadow::new(64);
        shadow.write(&clock, 1, 0, 4, false, |_| false);
        assert!(shadow.read(&clock, 2, 0, 4, false).is_some());
        clock.tick();
        assert!(shadow.read(&clock, 2, 0, 4, false).is_none());
    }

    #[test]
    fn neighbours_in_a_word_do_not_race() {
        let clock = Clock::new(0, 0);
        let mut shadow = SharedShadow::new(64);
        for lane in 0..32 {
            assert_eq!(shadow.write(&clock, lane, lane * 2, 2, false, |_| false), None);
        }
    }

    #[test]
    fn equal_values_are_no_race_and_unread_bytes_are_uninitialised() {
        let clocks = [Clock::new(0, 0), Clock::new(0, 1)];
        let mut shadow = SharedShadow::new(64);
        shadow.write(&clocks[0], 0, 0, 1, false, |_| true);
        assert_eq!(shadow.write(&clocks[1], 0, 0, 1, false, |_| true), None);
        assert_eq!(shadow.read(&clocks[0], 0, 4, 4, false).unwrap().kind, Kind::UninitializedShared);
    }

    #[test]
    fn the_asynchronous_proxy_sees_what_a_proxy_fence_passed() {
        let mut clocks = [Clock::new(0, 0), Clock::new(0, 1)];
        let mut shadow = SharedShadow::new(64);
        shadow.write(&clocks[0], 3, 8, 4, false, |_| false);
        barrier(&mut clocks);
        assert_eq!(shadow.read_async(&clocks[1], 0, 8, 4).unwrap().kind, Kind::MissingProxyFence);
        clocks[0].fence_proxy();
        assert_eq!(shadow.read_async(&clocks[1], 0, 8, 4).unwrap().kind, Kind::MissingProxyFence, "no order yet");
        barrier(&mut clocks);
        assert_eq!(shadow.read_async(&clocks[1], 0, 8, 4), None);
        clocks[1].fence_proxy();
        shadow.write(&clocks[1], 0, 8, 4, false, |_| false);
        assert_eq!(shadow.read_async(&clocks[1], 0, 8, 4).unwrap().kind, Kind::MissingProxyFence, "written after it");
        clocks[1].fence_proxy();
        assert_eq!(shadow.read_async(&clocks[1], 0, 8, 4), None);
        shadow.end_bulk(&clocks[0], 0, 0, 4);
        clocks[0].tick();
        assert_eq!(shadow.read_async(&clocks[0], 0, 0, 4), None, "written by the proxy itself");
    }

    #[test]
    fn blocks_of_a_cluster_race_and_cluster_barriers_order() {
        let mut clocks = [Clock::new(0, 0), Clock::new(1, 0)];
        let mut shadow = SharedShadow::new(64);
        shadow.set_rank(1);
        shadow.write(&clocks[0], 5, 0, 4, false, |_| false);
        let found = shadow.read(&clocks[1], 5, 0, 4, false).unwrap();
        assert_eq!((found.kind, found.rank, found.other), (Kind::SharedRace, 0, None));
        assert_eq!(shadow.read(&clocks[0], 6, 0, 4, false), None, "the same warp");
        barrier(&mut clocks);
        assert_eq!(shadow.write(&clocks[1], 5, 0, 4, false, |_| false), None);
        let found = shadow.write(&clocks[0], 5, 0, 4, false, |_| false).unwrap();
        assert_eq!((found.rank, found.other), (1, Some(5)));
    }

    #[test]
    fn a_source_is_busy_until_its_copy_has_been_waited_for() {
        let mut clock = Clock::new(0, 0);
        let mut shadow = SharedShadow::new(64);
        shadow.write(&clock, 0, 0, 16, false, |_| false);
        shadow.begin_source(&clock, 0, 0, 16);
        clock.tick();
        let found = shadow.write(&clock, 0, 4, 4, false, |_| false).unwrap();
        assert_eq!((found.kind, found.other_wrote), (Kind::AsyncCopyNotWaited, false));
        shadow.end_source(&clock, 0, 0, 16);
        assert_eq!(shadow.write(&clock, 0, 8, 4, false, |_| false), None);
    }
}
