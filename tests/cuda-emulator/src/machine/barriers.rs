//! Barriers of the block (`bar`, `barrier`) and of the cluster.
//!
//! A warp has arrived when all its live lanes have; lanes that exited count as arrived, as on the hardware since Volta.

use super::block::Block;
use super::mbarrier::lock;
use super::step::{lanes32, pred, set_pred, set32};
use super::warp::{Group, Wait, Warp};
use crate::checks::clock::{Clock, Entries};
use crate::checks::shared_race::LAST_CLOCK;
use crate::checks::{Fault, Kind};
use crate::program::{Barrier, BarrierOp, Op, Pred};

/// The state of one of the block's sixteen barriers.
#[derive(Debug, Clone, Default)]
pub struct NamedBarrier {
    /// Lanes that arrived, by warp.
    arrived: [u32; 32],
    /// Warps with an arrival.
    warps: u32,
    /// Warps awaited; 0 for all of the block.
    expected: u32,
    /// Clock of what arrived.
    clock: Entries,
    /// Lanes whose predicate was true, and all that gave one.
    votes: (u32, u32),
}

impl Block<'_> {
    /// `bar.*`; false if the running group now waits.
    pub fn barrier(&mut self, warp: &mut Warp, barrier: &Barrier, active: u32) -> Result<bool, Fault> {
        let constants = &self.program().constants;
        let lane = active.trailing_zeros();
        let id = lanes32(warp, constants, barrier.id)[lane as usize];
        if id > 15 {
            return Err(Fault::new(Kind::IllegalInstruction, lane, format!("barrier {id}: there are 16")));
        }
        let expected = match barrier.count {
            Some(reg) => {
                let threads = lanes32(warp, constants, reg)[lane as usize];
                if !threads.is_multiple_of(32) || threads == 0 {
                    let detail =
                        format!("a barrier of {threads} threads: the count must be a multiple of the warp size");
                    return Err(Fault::new(Kind::IllegalInstruction, lane, detail));
                }
                threads / 32
            }
            None => 0,
        };
        let idle = warp.active & !active;
        if barrier.aligned && active != warp.alive {
            // Lanes that passed the guard arrive, the rest passes by; if lanes are elsewhere, wait for them first.
            if idle != 0 {
                warp.others.push(Group { pc: warp.pc + 1, mask: idle, wait: Wait::No });
            }
            let pc = warp.pc;
            let mut mask = active;
            warp.others.retain(|g| {
                let joins = g.pc == pc && matches!(g.wait, Wait::Convergence { .. });
                if joins {
                    mask |= g.mask;
                }
                !joins
            });
            warp.active = 0;
            if mask != warp.alive {
                let wait = Wait::Convergence { needed: warp.alive, work: warp.work };
                warp.others.push(Group { pc, mask, wait });
                return Ok(warp.schedule());
            }
            warp.active = mask;
            return Ok(self.arrive(warp, barrier, id, expected, mask));
        }
        if idle != 0 {
            warp.others.push(Group { pc: warp.pc + 1, mask: idle, wait: Wait::No });
            warp.active = active;
        }
        Ok(self.arrive(warp, barrier, id, expected, active))
    }

    /// Lanes arrive at a barrier although others of their warp are elsewhere: a finding, then as they are.
    pub fn divergent_arrival(&mut self, warp: &mut Warp, group: Group) {
        let program = self.program();
        let Op::Barrier(barrier) = &program.code[group.pc as usize].op else {
            warp.others.push(Group { wait: Wait::No, ..group });
            return;
        };
        let elsewhere: Vec<String> = warp
            .others
            .iter()
            .map(|g| format!("lanes {:#010x} at PTX line {}", g.mask, program.code[g.pc as usize].line))
            .collect();
        let elsewhere = if elsewhere.is_empty() { "the others have exited".to_string() } else { elsewhere.join(", ") };
        let detail = format!("only lanes {:#010x} of the warp reach it; {elsewhere}", group.mask);
        let lane = group.mask.trailing_zeros();
        self.report(warp, group.pc, Fault::new(Kind::DivergentBarrier, lane, detail));
        let id = lanes32(warp, &program.constants, barrier.id)[lane as usize] & 15;
        warp.park(Wait::No);
        (warp.pc, warp.active) = (group.pc, group.mask);
        // What the others do no longer counts: this warp has arrived.
        self.barriers[id as usize].arrived[warp.id as usize] |= warp.alive;
        if self.arrive(warp, barrier, id, 0, group.mask) {
            warp.park(Wait::No);
        }
    }

    fn arrive(&mut self, warp: &mut Warp, barrier: &Barrier, id: u32, expected: u32, mask: u32) -> bool {
        warp.work += 1;
        let state = &mut self.barriers[id as usize];
        state.arrived[warp.id as usize] |= mask;
        state.warps |= 1 << warp.id;
        state.expected = state.expected.max(expected);
        if matches!(barrier.op, BarrierOp::Popc | BarrierOp::And | BarrierOp::Or) {
            let votes = pred(warp, barrier.input) & mask;
            state.votes.0 += votes.count_ones();
            state.votes.1 += mask.count_ones();
        }
        warp.clock.release(&mut state.clock);
        if barrier.op == BarrierOp::Arrive {
            warp.pc += 1;
            return true;
        }
        warp.park(Wait::Barrier(id));
        false
    }

    /// Opens every barrier that all awaited warps have reached. True if any opened.
    pub fn complete_barriers(&mut self) -> bool {
        let mut any = false;
        for id in 0..16 {
            if self.barriers[id].warps == 0 {
                continue;
            }
            let state = &self.barriers[id];
            let (mut arrived, mut gone, mut partial) = (0, 0, false);
            for (warp, lanes) in self.warps.iter().zip(state.arrived) {
                if warp.alive == 0 {
                    gone += u32::from(lanes == 0);
                    arrived += u32::from(lanes != 0);
                } else if lanes & warp.alive == warp.alive {
                    arrived += 1;
                } else {
                    partial |= lanes != 0;
                }
            }
            let all = self.warps.len() as u32;
            let open = if state.expected == 0 { arrived + gone == all } else { arrived >= state.expected && !partial };
            if !open {
                continue;
            }
            any = true;
            let state = std::mem::take(&mut self.barriers[id]);
            self.counters.barriers += 1;
            for i in 0..self.warps.len() {
                let mut warp = std::mem::take(&mut self.warps[i]);
                self.leave(&mut warp, id as u32, &state);
                self.warps[i] = warp;
            }
            if state.expected == 0 && self.warps.iter().any(|w| w.clock.now > LAST_CLOCK) {
                self.rebase();
            }
        }
        any
    }

    /// Begins new clocks at a barrier of the whole block, unless copies or other blocks still carry old ones.
    fn rebase(&mut self) {
        let in_flight = self.warps.iter().any(|w| w.copies.in_flight() > 0)
            || lock(&self.mbarriers).values().any(|b| !b.copies.is_empty());
        if in_flight || !self.peers.is_empty() {
            return;
        }
        if let Some(shadow) = &mut self.shadow {
            shadow.rebase();
        }
        lock(&self.strong).clear();
        lock(&self.mbarriers).values_mut().for_each(|b| b.clock = Entries::default());
        for warp in &mut self.warps {
            warp.clock = Clock::new(0, warp.id as usize);
        }
    }

    fn leave(&self, warp: &mut Warp, id: u32, state: &NamedBarrier) {
        let program = self.program();
        let waiting = warp.others.iter().filter(|g| g.wait == Wait::Barrier(id)).copied().collect::<Vec<_>>();
        if waiting.is_empty() {
            return;
        }
        warp.clock.acquire(&state.clock);
        for group in &waiting {
            if let Op::Barrier(barrier) = &program.code[group.pc as usize].op {
                let (yes, all) = state.votes;
                let verdict = if barrier.op == BarrierOp::And { yes == all } else { yes > 0 };
                if barrier.p != Pred::NONE {
                    set_pred(warp, barrier.p, if verdict { u32::MAX } else { 0 }, group.mask);
                }
                if let Some(d) = barrier.d {
                    set32(warp, d, &[yes; 32], group.mask);
                }
            }
        }
        for group in warp.others.iter_mut().filter(|g| g.wait == Wait::Barrier(id)) {
            group.wait = Wait::No;
            group.pc += 1;
        }
    }

    /// `barrier.cluster.arrive` and `.wait`; false if the running group waits.
    pub fn cluster_barrier(&mut self, warp: &mut Warp, arrive: bool, wait: bool, relaxed: bool, active: u32) -> bool {
        let idle = warp.active & !active;
        if idle != 0 {
            warp.others.push(Group { pc: warp.pc + 1, mask: idle, wait: Wait::No });
            warp.active = active;
        }
        if arrive {
            warp.work += 1;
            if !relaxed {
                warp.clock.release(&mut self.cluster_clock);
            }
            warp.cluster_arrived |= active;
            if warp.cluster_arrived & warp.alive == warp.alive {
                warp.cluster_arrived = 0;
                warp.cluster_phase += 1;
            }
        }
        if wait && self.cluster_open < warp.cluster_phase + u64::from(warp.cluster_arrived != 0) {
            warp.park(Wait::Cluster);
            return warp.schedule();
        }
        if wait {
            warp.clock.acquire(&self.cluster_clock);
            warp.clock.tick();
        }
        warp.pc += 1;
        true
    }

    /// Whether every live warp has arrived at the cluster barrier's phase.
    pub fn cluster_ready(&self, phase: u64) -> bool {
        self.warps.iter().all(|w| w.alive == 0 || w.cluster_phase > phase)
    }

    /// Opens the cluster barrier's phase, with what all blocks brought to it, for this block's waiting warps.
    pub fn open_cluster(&mut self, clock: &Entries) {
        self.cluster_open += 1;
        self.cluster_clock.join(clock);
        for warp in &mut self.warps {
            let mut waited = false;
            for group in warp.others.iter_mut().filter(|g| g.wait == Wait::Cluster) {
                group.wait = Wait::No;
                group.pc += 1;
                waited = true;
            }
            if waited {
                warp.clock.acquire(clock);
                warp.clock.tick();
            }
        }
    }
}
