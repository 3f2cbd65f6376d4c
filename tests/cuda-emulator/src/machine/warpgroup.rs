//! `wgmma` as an asynchronous instruction of a warpgroup: groups in flight, registers that must not be touched meanwhile,
//! and the meeting of the four warps.
//!
//! Each warp multiplies its own 16 rows. By default that happens when its group is waited for. Compilers move accumulators
//! between registers while they are in flight, which is a renaming and not a use: such copies join the group that they
//! depend on.

use std::collections::VecDeque;

use super::block::Block;
use super::step::{lanes32, lanes64, pred, set32};
use super::warp::{Group, Wait, Warp};
use crate::checks::{Fault, Kind};
use crate::program::{Class, Op, Pred, Reg, Wgmma, WgmmaA, WgmmaSync};

/// One step of a group.
#[derive(Debug, Clone, Copy)]
enum Pending {
    Multiply {
        /// The instruction.
        pc: u32,
        descriptors: (u64, u64),
        accumulate: bool,
    },
    Copy {
        d: Reg,
        a: Reg,
        mask: u32,
    },
}

/// A warp's groups, and what its registers are up to.
#[derive(Debug, Default)]
pub struct Groups {
    committed: VecDeque<Vec<Pending>>,
    open: Vec<Pending>,
    /// Steps in flight that write a slot, and that read it.
    uses: Vec<(u16, u16)>,
    /// Slots written by other instructions since the last fence.
    dirty: Vec<bool>,
    fenced: bool,
    /// Multiplications issued.
    issued: u64,
    /// Of them, those that are done.
    done: u64,
}

impl Groups {
    fn writes(&self, reg: Reg) -> bool {
        self.uses.get(reg.0 as usize).is_some_and(|u| u.0 > 0)
    }

    fn reads(&self, reg: Reg) -> bool {
        self.uses.get(reg.0 as usize).is_some_and(|u| u.1 > 0)
    }

    fn is_idle(&self) -> bool {
        self.open.is_empty() && self.committed.is_empty()
    }
}

/// What the four warps of a warpgroup have issued: entries that not all have reached yet.
#[derive(Debug, Default)]
pub struct Warpgroup {
    /// Entries that all four have passed.
    base: u64,
    entries: VecDeque<(u32, (u64, u64), u32)>,
}

impl Block<'_> {
    /// Whether instructions of a warp must be looked at before they run.
    pub fn set_watch(&self, warp: &mut Warp) {
        let late = !self.config().eager_copies;
        let watched = self.program().uses_wgmma && (self.config().check || late && !warp.wgmma.is_idle());
        warp.set_watched(watched);
    }

    /// Looks at the next instruction of a watched warp; true if it was a renaming and has been dealt with.
    pub fn watch(&mut self, warp: &mut Warp) -> bool {
        let inst = &self.program().code[warp.pc as usize];
        let active = if inst.guard == Pred::NONE { warp.active } else { warp.active & pred(warp, inst.guard) };
        if active == 0 || matches!(inst.op, Op::Wgmma(_)) {
            return false;
        }
        let slots = self.program().slots as usize;
        warp.wgmma.uses.resize(slots, (0, 0));
        warp.wgmma.dirty.resize(slots, false);
        let is_constant = |reg: Reg| reg.0 & Reg::CONSTANT != 0;
        if let Op::Lane { d, a, b: Reg::NONE, wide: false, .. } = inst.op
            && inst.class == Class::Move
        {
            let groups = &mut warp.wgmma;
            if groups.writes(a) {
                let copy = Pending::Copy { d, a, mask: active };
                groups.uses[d.0 as usize].0 += 1;
                let program = self.program();
                let writes = |step: &Pending| match step {
                    Pending::Copy { d, .. } => *d == a,
                    Pending::Multiply { pc, .. } => wgmma_at(program, *pc).is_some_and(|op| op.d.contains(&a)),
                };
                let open_writes = groups.open.iter().any(writes);
                let last = groups.committed.iter_mut().rev().find(|group| group.iter().any(writes));
                match last {
                    Some(group) if !open_writes => group.push(copy),
                    _ => groups.open.push(copy),
                }
                if self.config().eager_copies {
                    self.rename(warp, d, a, active);
                }
                self.counters.warp_instructions += 1;
                warp.pc += 1;
                return true;
            }
            if groups.writes(d) || groups.reads(d) {
                self.report_touch(warp, active, true);
            }
            let dirty = !is_constant(a) && warp.wgmma.dirty[a.0 as usize];
            warp.wgmma.dirty[d.0 as usize] = dirty;
            return false;
        }
        let groups = &mut warp.wgmma;
        let (mut read, mut written) = (false, false);
        let Groups { uses, dirty, .. } = groups;
        inst.op.registers(
            |reg| read |= !is_constant(reg) && uses[reg.0 as usize].0 > 0,
            |reg| {
                written |= uses[reg.0 as usize] != (0, 0);
                dirty[reg.0 as usize] = true;
            },
        );
        if read || written {
            self.report_touch(warp, active, written);
        }
        false
    }

    fn report_touch(&mut self, warp: &Warp, active: u32, written: bool) {
        if !self.config().check {
            return;
        }
        let verb = if written { "writes" } else { "reads" };
        let detail = format!("this instruction {verb} a register of a wgmma that has not been waited for (wait_group)");
        self.report(warp, warp.pc, Fault::new(Kind::WgmmaNotWaited, active.trailing_zeros(), detail));
    }

    fn rename(&mut self, warp: &mut Warp, d: Reg, a: Reg, mask: u32) {
        let values = lanes32(warp, &self.program().constants, a);
        set32(warp, d, &values, mask);
    }

    /// All lanes of the warp must execute the instruction together; `Some` if the running group waits for others.
    fn converge(&mut self, warp: &mut Warp, active: u32) -> Result<Option<bool>, Fault> {
        if active == u32::MAX {
            return Ok(None);
        }
        let lane = active.trailing_zeros();
        if warp.alive != u32::MAX {
            return Err(Fault::new(
                Kind::DivergentBarrier,
                lane,
                "wgmma needs all 32 lanes of the warp: some have exited",
            ));
        }
        let pc = warp.pc;
        let idle = warp.active & !active;
        if idle != 0 {
            warp.others.push(Group { pc: pc + 1, mask: idle, wait: Wait::No });
        }
        let mut here = active;
        warp.others.retain(|g| {
            let joins = g.pc == pc && matches!(g.wait, Wait::Members(_));
            here |= if joins { g.mask } else { 0 };
            !joins
        });
        warp.active = here;
        if here == u32::MAX {
            return Ok(None);
        }
        warp.park(Wait::Members(u32::MAX));
        Ok(Some(warp.schedule()))
    }

    /// `wgmma.mma_async`; false if the running group waits.
    pub fn wgmma(&mut self, warp: &mut Warp, op: &Wgmma, active: u32) -> Result<bool, Fault> {
        if let Some(runs) = self.converge(warp, active)? {
            return Ok(runs);
        }
        warp.work += 1;
        let constants = &self.program().constants;
        let slots = self.program().slots as usize;
        warp.wgmma.uses.resize(slots, (0, 0));
        warp.wgmma.dirty.resize(slots, false);
        let uniform = |values: [u64; 32]| {
            let same = values.iter().all(|v| *v == values[0]);
            let detail = "the matrix descriptor differs between lanes of the warp";
            if same { Ok(values[0]) } else { Err(Fault::new(Kind::IllegalInstruction, 0, detail)) }
        };
        let a = match op.a {
            WgmmaA::Descriptor(reg) => uniform(lanes64(warp, constants, reg))?,
            WgmmaA::Registers(_) => 0,
        };
        let descriptors = (a, uniform(lanes64(warp, constants, op.b))?);
        let accumulate = match pred(warp, op.scale_d) {
            0 => false,
            u32::MAX => true,
            _ => return Err(Fault::new(Kind::IllegalInstruction, 0, "scale-d differs between lanes of the warp")),
        };
        self.meet(warp, descriptors)?;
        if self.config().check {
            self.check_registers(warp, op);
        }
        self.read_operands(warp, op, descriptors, true)?;
        self.count_wgmma(warp, op);
        let groups = &mut warp.wgmma;
        op.d.iter().for_each(|r| groups.uses[r.0 as usize].0 += 1);
        op.a_registers().iter().for_each(|r| groups.uses[r.0 as usize].1 += 1);
        groups.open.push(Pending::Multiply { pc: warp.pc, descriptors, accumulate });
        if self.config().eager_copies {
            self.multiply_rows(warp, op, descriptors, accumulate)?;
        }
        self.set_watch(warp);
        warp.pc += 1;
        Ok(true)
    }

    fn check_registers(&mut self, warp: &Warp, op: &Wgmma) {
        let groups = &warp.wgmma;
        let dirty = op.d.iter().chain(op.a_registers()).any(|r| groups.dirty[r.0 as usize]);
        let detail = match (groups.fenced, dirty) {
            (false, _) => Some("no wgmma.fence before the first wgmma.mma_async"),
            (_, true) => Some("registers of this wgmma were written since the last wgmma.fence"),
            _ => None,
        };
        if let Some(detail) = detail {
            self.report(warp, warp.pc, Fault::new(Kind::MissingWgmmaFence, 0, detail));
        }
        if op.a_registers().iter().any(|r| groups.writes(*r)) {
            self.report_touch(warp, u32::MAX, false);
        }
    }

    /// Enters the instruction into what the warpgroup has issued: all four warps must issue the same.
    fn meet(&mut self, warp: &mut Warp, descriptors: (u64, u64)) -> Result<(), Fault> {
        let (at, member) = ((warp.id / 4) as usize, 1 << (warp.id % 4));
        if self.warps.len() < at * 4 + 4 {
            let detail = format!("warp {} is in no whole warpgroup: the block has {} warps", warp.id, self.warps.len());
            return Err(Fault::new(Kind::IllegalInstruction, 0, detail));
        }
        if self.warpgroups.len() <= at {
            self.warpgroups.resize_with(at + 1, Warpgroup::default);
        }
        let program = self.program();
        let group = &mut self.warpgroups[at];
        let index = (warp.wgmma.issued - group.base) as usize;
        warp.wgmma.issued += 1;
        if index == group.entries.len() {
            group.entries.push_back((warp.pc, descriptors, 0));
        }
        let entry = &mut group.entries[index];
        if (entry.0, entry.1) != (warp.pc, descriptors) {
            let line = program.code[entry.0 as usize].line;
            let what = if entry.0 == warp.pc { "with other descriptors" } else { "another" };
            let detail =
                format!("the warps of a warpgroup part: another warp executed {what} wgmma, at PTX line {line}");
            return Err(Fault::new(Kind::DivergentBarrier, 0, detail));
        }
        entry.2 |= member;
        let base = group.base;
        while group.entries.front().is_some_and(|e| e.2 == 15) {
            group.entries.pop_front();
            group.base += 1;
        }
        if group.base > base {
            for other in &mut self.warps[at * 4..at * 4 + 4] {
                for waiting in other.others.iter_mut().filter(|g| g.wait == Wait::Warpgroup) {
                    waiting.wait = Wait::No;
                }
            }
        }
        Ok(())
    }

    /// `wgmma.fence`, `.commit_group`, `.wait_group`; false if the running group waits.
    pub fn wgmma_sync(&mut self, warp: &mut Warp, op: WgmmaSync, active: u32) -> Result<bool, Fault> {
        if let Some(runs) = self.converge(warp, active)? {
            return Ok(runs);
        }
        match op {
            WgmmaSync::Fence => {
                warp.wgmma.fenced = true;
                warp.wgmma.dirty.fill(false);
            }
            WgmmaSync::Commit => {
                let group = std::mem::take(&mut warp.wgmma.open);
                warp.wgmma.committed.push_back(group);
            }
            WgmmaSync::Wait(n) => {
                let lands = warp.wgmma.committed.len().saturating_sub(n as usize);
                let steps = warp.wgmma.committed.iter().take(lands).flatten();
                let multiplies = steps.filter(|s| matches!(s, Pending::Multiply { .. })).count() as u64;
                let passed = self.warpgroups.get((warp.id / 4) as usize).map_or(0, |g| g.base);
                if passed < warp.wgmma.done + multiplies {
                    warp.park(Wait::Warpgroup);
                    return Ok(warp.schedule());
                }
                for _ in 0..lands {
                    for step in warp.wgmma.committed.pop_front().unwrap_or_default() {
                        self.land_step(warp, step)?;
                    }
                }
                warp.work += 1;
                warp.clock.tick();
                self.set_watch(warp);
            }
        }
        warp.pc += 1;
        Ok(true)
    }

    fn land_step(&mut self, warp: &mut Warp, step: Pending) -> Result<(), Fault> {
        let late = !self.config().eager_copies;
        let drop = |count: &mut u16| *count = count.saturating_sub(1);
        match step {
            Pending::Copy { d, a, mask } => {
                if late {
                    self.rename(warp, d, a, mask);
                }
                drop(&mut warp.wgmma.uses[d.0 as usize].0);
            }
            Pending::Multiply { pc, descriptors, accumulate } => {
                let Some(op) = wgmma_at(self.program(), pc) else { return Ok(()) };
                // What was overwritten since the issue is found here.
                self.read_operands(warp, op, descriptors, false)?;
                if late {
                    self.multiply_rows(warp, op, descriptors, accumulate)?;
                }
                op.d.iter().for_each(|r| drop(&mut warp.wgmma.uses[r.0 as usize].0));
                op.a_registers().iter().for_each(|r| drop(&mut warp.wgmma.uses[r.0 as usize].1));
                warp.wgmma.done += 1;
            }
        }
        Ok(())
    }
}

fn wgmma_at(program: &crate::program::Program, pc: u32) -> Option<&Wgmma> {
    match &program.code[pc as usize].op {
        Op::Wgmma(op) => Some(op),
        _ => None,
    }
}
