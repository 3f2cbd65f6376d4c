//! The shadow of shared memory: for every byte its last writer and reader, for races, uninitialised reads and copies in
//! flight.
//!
//! A stamp packs warp (5 bits), lane (5 bits) and the warp's clock (20 bits) above two flag bits. Two accesses race if one
//! writes, they come from different threads, and the earlier is not ordered before the later ([`Clock`]). One reader is
//! kept; a second concurrent one turns the stamp into "several of clock c", which any unordered writer races with. Writes
//! of equal values by several threads are not reported: the result is the same in every order.

use super::clock::Clock;
use super::finding::Kind;

const IN_FLIGHT: u32 = 1;
const SEVERAL: u32 = 2;

fn stamp(clock: &Clock, lane: u32) -> u32 {
    (clock.now & 0xf_ffff) << 12 | (clock.warp as u32) << 7 | lane << 2
}

fn thread_of(stamp: u32) -> u32 {
    (stamp >> 2) & 0x3ff
}

/// Whether an access with this stamp is ordered before the next of `lane`.
#[inline]
fn ordered(stamp: u32, clock: &Clock, lane: u32) -> bool {
    let (warp, at) = ((stamp >> 7 & 31) as usize, stamp >> 12);
    (warp == clock.warp && stamp >> 2 & 31 == lane) || at <= clock.known[warp]
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
}

/// The shadow of one block's shared memory.
#[derive(Debug)]
pub struct SharedShadow {
    written: Vec<u32>,
    read: Vec<u32>,
}

impl SharedShadow {
    /// A shadow of `bytes` bytes, all uninitialised.
    pub fn new(bytes: usize) -> Self {
        SharedShadow { written: vec![0; bytes], read: vec![0; bytes] }
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
        let mine = stamp(clock, lane);
        let mut conflict = None;
        let mut last = mine;
        for (i, &w) in self.written[range.clone()].iter().enumerate() {
            if w == last {
                continue;
            }
            last = w;
            if conflict.is_none() {
                conflict = self.judge_read(w, clock, lane, offset + i as u32, strong);
            }
        }
        if !strong {
            for r in &mut self.read[range] {
                if *r & !SEVERAL == mine {
                    continue;
                }
                let several = *r & SEVERAL != 0;
                *r = if *r == 0 || ordered(*r, clock, if several { 32 } else { lane }) {
                    mine
                } else if *r >> 7 & 31 == mine >> 7 & 31 {
                    mine | SEVERAL
                } else {
                    // Of two warps' unordered reads the earlier stays: it is the one that a later barrier may miss.
                    *r | SEVERAL
                };
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
        } else if strong || ordered(w, clock, lane) {
            return None;
        } else {
            Kind::SharedRace
        };
        Some(Conflict { kind, offset, other: (w != 0).then(|| thread_of(w)), other_wrote: true })
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
        let mine = stamp(clock, lane);
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
                conflict = Some(Conflict {
                    kind: Kind::AsyncCopyNotWaited,
                    offset: at,
                    other: Some(thread_of(w)),
                    other_wrote: true,
                });
            } else if !strong && w != 0 && !ordered(w, clock, lane) && !same(at) {
                conflict =
                    Some(Conflict { kind: Kind::SharedRace, offset: at, other: Some(thread_of(w)), other_wrote: true });
            } else if !strong && r != 0 {
                let several = r & SEVERAL != 0;
                if !ordered(r, clock, if several { 32 } else { lane }) {
                    let other = (!several).then(|| thread_of(r));
                    conflict = Some(Conflict { kind: Kind::SharedRace, offset: at, other, other_wrote: false });
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
        let mine = stamp(clock, lane);
        self.written[offset as usize..(offset + n) as usize].fill(mine);
    }

    /// Marks bytes as initialised before the kernel (by the hardware, or by a copy whose barrier carries the order).
    pub fn initialise(&mut self, offset: u32, n: u32) {
        // Clock 0 is ordered before everything.
        self.written[offset as usize..(offset + n) as usize].fill(1 << 7 & !IN_FLIGHT);
        self.read[offset as usize..(offset + n) as usize].fill(0);
    }

    /// Begins new clocks: everything so far is ordered before everything to come. For a barrier of the whole block.
    pub fn rebase(&mut self) {
        self.written.iter_mut().filter(|w| **w != 0 && **w & IN_FLIGHT == 0).for_each(|w| *w = 1 << 7);
        self.read.fill(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checks::clock::{Clock, Entries};

    fn barrier(clocks: &mut [Clock]) {
        let mut object: Entries = [0; 32];
        clocks.iter_mut().for_each(|c| c.release(&mut object));
        clocks.iter_mut().for_each(|c| c.acquire(&object));
    }

    #[test]
    fn a_barrier_orders_and_its_absence_does_not() {
        let mut clocks = [Clock::new(0), Clock::new(1)];
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
        let mut clocks = [Clock::new(0), Clock::new(1)];
        let mut shadow = SharedShadow::new(64);
        shadow.write(&clocks[0], 0, 0, 4, false, |_| false);
        barrier(&mut clocks);
        shadow.read(&clocks[1], 5, 0, 4, false);
        shadow.read(&clocks[0], 0, 0, 4, false);
        assert_eq!(shadow.write(&clocks[0], 0, 0, 4, false, |_| false).unwrap().kind, Kind::SharedRace);
    }

    #[test]
    fn lanes_of_a_warp_race_until_they_synchronise() {
        let mut clock = Clock::new(0);
        let mut shadow = SharedShadow::new(64);
        shadow.write(&clock, 1, 0, 4, false, |_| false);
        assert!(shadow.read(&clock, 2, 0, 4, false).is_some());
        clock.tick();
        assert!(shadow.read(&clock, 2, 0, 4, false).is_none());
    }

    #[test]
    fn neighbours_in_a_word_do_not_race() {
        let clock = Clock::new(0);
        let mut shadow = SharedShadow::new(64);
        for lane in 0..32 {
            assert_eq!(shadow.write(&clock, lane, lane * 2, 2, false, |_| false), None);
        }
    }

    #[test]
    fn equal_values_are_no_race_and_unread_bytes_are_uninitialised() {
        let clocks = [Clock::new(0), Clock::new(1)];
        let mut shadow = SharedShadow::new(64);
        shadow.write(&clocks[0], 0, 0, 1, false, |_| true);
        assert_eq!(shadow.write(&clocks[1], 0, 0, 1, false, |_| true), None);
        assert_eq!(shadow.read(&clocks[0], 0, 4, 4, false).unwrap().kind, Kind::UninitializedShared);
    }
}
