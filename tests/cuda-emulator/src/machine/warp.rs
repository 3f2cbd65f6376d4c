//! A warp: registers, predicates, and the groups into which its lanes have parted.

use super::async_copy::Copies;
use super::bulk::Stores;
use super::warpgroup::Groups;
use crate::checks::clock::Clock;
use crate::program::Slot;

/// Why a group does not run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// It can run.
    No,
    /// At a `.sync` instruction until the lanes of the mask arrive there.
    Members(u32),
    /// At a barrier that the whole warp must reach together; the lanes still expected, and [`Warp::work`] then.
    Convergence {
        /// Lanes that were alive when the group arrived.
        needed: u32,
        /// Work done by the warp until then.
        work: u64,
    },
    /// Arrived at a barrier of the block.
    Barrier(u32),
    /// At `wgmma.wait_group` until the other warps of the warpgroup have issued the same.
    Warpgroup,
    /// Polling; runs again when other warps have run.
    Cluster,
}

/// Lanes at one instruction.
#[derive(Debug, Clone, Copy)]
pub struct Group {
    /// The instruction.
    pub pc: u32,
    /// The lanes.
    pub mask: u32,
    /// Whether and why they wait.
    pub wait: Wait,
}

/// What a lane's recursive call saves of the function that it enters again.
#[derive(Debug, Clone)]
pub struct Frame {
    /// The function.
    pub function: u32,
    /// The lane.
    pub lane: u32,
    /// Its 32-bit registers.
    pub narrow: Vec<u32>,
    /// Its 64-bit registers.
    pub wide: Vec<u64>,
    /// Its predicates.
    pub preds: Vec<bool>,
    /// Its local memory.
    pub local: Vec<u8>,
}

/// A warp.
#[derive(Debug)]
pub struct Warp {
    /// Number in the block.
    pub id: u32,
    /// Register slots.
    pub slots: Vec<Slot>,
    /// Predicates, a bit a lane.
    pub preds: Vec<u32>,
    /// Lanes that exist and have not exited.
    pub alive: u32,
    /// The running group's next instruction.
    pub pc: u32,
    /// The running group's lanes; 0 if none runs.
    pub active: u32,
    /// The other groups.
    pub others: Vec<Group>,
    /// The lowest instruction of another group that can run.
    pub meet: u32,
    /// The same; 0 while each instruction must be looked at first.
    pub stop: u32,
    /// Whether it must.
    pub watched: bool,
    /// Backward branches since the running group was chosen.
    pub patience: u32,
    /// Loads, stores and barriers so far, to tell an early exit from divergent work.
    pub work: u64,
    /// Local memory, lane after lane.
    pub local: Vec<u8>,
    /// Synchronisation clock.
    pub clock: Clock,
    /// Asynchronous copies in flight.
    pub copies: Copies,
    /// Bulk copies to global memory in flight.
    pub stores: Stores,
    /// `wgmma` in flight.
    pub wgmma: Groups,
    /// Saved frames of recursive calls.
    pub frames: Vec<Frame>,
    /// Cluster barrier phases this warp has arrived at.
    pub cluster_phase: u64,
    /// Lanes that have arrived at the next.
    pub cluster_arrived: u32,
}

impl Default for Warp {
    fn default() -> Self {
        Warp {
            id: 0,
            slots: Vec::new(),
            preds: Vec::new(),
            alive: 0,
            pc: 0,
            active: 0,
            others: Vec::new(),
            meet: u32::MAX,
            stop: u32::MAX,
            watched: false,
            patience: 0,
            work: 0,
            local: Vec::new(),
            clock: Clock::new(0, 0),
            copies: Copies::default(),
            stores: Stores::default(),
            wgmma: Groups::default(),
            frames: Vec::new(),
            cluster_phase: 0,
            cluster_arrived: 0,
        }
    }
}

impl Warp {
    /// Puts the running group among the others, at its instruction.
    pub fn park(&mut self, wait: Wait) {
        if self.active != 0 {
            self.others.push(Group { pc: self.pc, mask: self.active, wait });
            self.active = 0;
        }
    }

    /// Chooses the group to run: the one at the lowest instruction, merged with all that can run there. False if none can.
    pub fn schedule(&mut self) -> bool {
        let Some(pc) = self.others.iter().filter(|g| g.wait == Wait::No).map(|g| g.pc).min() else {
            return false;
        };
        self.choose(pc);
        self.patience = 0;
        self.set_meet(self.others.iter().filter(|g| g.wait == Wait::No).map(|g| g.pc).min().unwrap_or(u32::MAX));
        true
    }

    /// Chooses, for fairness to a loop that spins, the group after the running one; it then runs without meeting others.
    pub fn rotate(&mut self) {
        let now = self.pc;
        self.park(Wait::No);
        let ready = || self.others.iter().filter(|g| g.wait == Wait::No).map(|g| g.pc);
        let next = ready().filter(|pc| *pc > now).min().or_else(|| ready().min()).unwrap_or(now);
        self.choose(next);
        self.patience = 0;
        self.set_meet(u32::MAX);
    }

    fn set_meet(&mut self, pc: u32) {
        self.meet = pc;
        self.stop = if self.watched { 0 } else { pc };
    }

    /// Has each instruction looked at before it runs, or no longer.
    pub fn set_watched(&mut self, watched: bool) {
        self.watched = watched;
        self.set_meet(self.meet);
    }

    fn choose(&mut self, pc: u32) {
        self.pc = pc;
        self.others.retain(|g| {
            let here = g.wait == Wait::No && g.pc == pc;
            if here {
                self.active |= g.mask;
            }
            !here
        });
    }

    /// The value of a register's lane in a 32-bit slot.
    pub fn lane(&self, slot: u32, lane: u32) -> u32 {
        self.slots[slot as usize].0[lane as usize]
    }
}

/// The lanes of a mask, lowest first.
pub fn lanes(mut mask: u32) -> impl Iterator<Item = u32> {
    std::iter::from_fn(move || {
        let lane = mask.trailing_zeros();
        mask &= mask.wrapping_sub(1);
        (lane < 32).then_some(lane)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_group_runs_and_groups_that_meet_merge() {
        let mut warp = Warp::default();
        for (pc, mask) in [(9, 1), (4, 2), (4, 8), (7, 16)] {
            warp.others.push(Group { pc, mask, wait: Wait::No });
        }
        assert!(warp.schedule());
        assert_eq!((warp.pc, warp.active, warp.stop), (4, 10, 7));
        warp.rotate();
        assert_eq!((warp.pc, warp.active, warp.stop), (7, 16, u32::MAX));
        assert_eq!(lanes(0b1010_0001).collect::<Vec<_>>(), [0, 5, 7]);
    }
}
