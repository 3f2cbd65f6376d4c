//! Executing one warp: fetch, guard, dispatch, and the meeting of groups.

use super::block::{Block, Pause};
use super::warp::{Group, Wait, Warp, lanes};
use crate::checks::{Fault, Kind};
use crate::program::{CompareOut, Op, Pred, Reg, Slot};

/// Backward branches of one group before another that can run gets its turn.
const PATIENCE: u32 = 4096;

/// Pointer to a register's first slot, for reading.
#[inline(always)]
pub fn source(warp: &Warp, constants: &[Slot], reg: Reg) -> *const u32 {
    let (base, index) = if reg.0 & Reg::CONSTANT != 0 {
        (constants.as_ptr(), reg.0 & !Reg::CONSTANT)
    } else {
        (warp.slots.as_ptr(), reg.0)
    };
    base.wrapping_add(index as usize).cast()
}

/// Lanes of a 32-bit register.
#[inline(always)]
pub fn lanes32(warp: &Warp, constants: &[Slot], reg: Reg) -> [u32; 32] {
    // SAFETY: the decoder gives each register a slot of the warp or of the constants.
    unsafe { *source(warp, constants, reg).cast() }
}

/// Lanes of a 64-bit register.
#[inline(always)]
pub fn lanes64(warp: &Warp, constants: &[Slot], reg: Reg) -> [u64; 32] {
    // SAFETY: the decoder gives each 64-bit register two slots.
    unsafe { *source(warp, constants, reg).cast() }
}

/// Writes the active lanes of a 32-bit register.
#[inline(always)]
pub fn set32(warp: &mut Warp, reg: Reg, values: &[u32; 32], mask: u32) {
    let slot = &mut warp.slots[reg.0 as usize].0;
    if mask == u32::MAX {
        *slot = *values;
    } else {
        for i in 0..32 {
            slot[i] = if mask >> i & 1 == 1 { values[i] } else { slot[i] };
        }
    }
}

/// Writes the active lanes of a 64-bit register.
#[inline(always)]
pub fn set64(warp: &mut Warp, reg: Reg, values: &[u64; 32], mask: u32) {
    // SAFETY: the decoder gives each 64-bit register two slots; the slice checks that both exist.
    let slot = unsafe { &mut *warp.slots[reg.0 as usize..][..2].as_mut_ptr().cast::<[u64; 32]>() };
    for i in 0..32 {
        slot[i] = if mask >> i & 1 == 1 { values[i] } else { slot[i] };
    }
}

/// A predicate's lanes, polarity applied; all lanes for [`Pred::NONE`].
#[inline(always)]
pub fn pred(warp: &Warp, p: Pred) -> u32 {
    if p == Pred::NONE {
        return u32::MAX;
    }
    let mask = warp.preds[(p.0 >> 1) as usize];
    if p.0 & 1 == 1 { !mask } else { mask }
}

/// Writes the active lanes of a predicate.
#[inline(always)]
pub fn set_pred(warp: &mut Warp, p: Pred, value: u32, mask: u32) {
    if p != Pred::NONE {
        let old = &mut warp.preds[(p.0 >> 1) as usize];
        *old = *old & !mask | value & mask;
    }
}

/// What a failed test of an mbarrier takes from a turn: others should run to make it succeed.
const FAILED_TEST: i64 = 2000;
/// And from the patience with its group, which must end long before such turns count as a hang: others of the warp may be
/// the ones.
const FAILED_TEST_PATIENCE: u32 = PATIENCE / 64;

impl<'a> Block<'a> {
    /// Runs a warp until no group of it can go on, or its turn is over.
    pub fn run(&mut self, warp: &mut Warp, mut fuel: i64) -> Result<Pause, Fault> {
        let program = self.program();
        let (code, constants) = (&program.code[..], &program.constants[..]);
        let count = self.config().count;
        if warp.active == 0 && !self.next_group(warp)? {
            return Ok(Pause::Waits);
        }
        loop {
            if warp.pc >= warp.stop {
                if warp.pc >= warp.meet {
                    warp.park(Wait::No);
                    warp.schedule();
                }
                if warp.watched && self.watch(warp) {
                    continue;
                }
            }
            let pc = warp.pc;
            let inst = &code[pc as usize];
            let active = if inst.guard == Pred::NONE { warp.active } else { warp.active & pred(warp, inst.guard) };
            self.counters.warp_instructions += 1;
            self.counters.lane_instructions += u64::from(active.count_ones());
            if count {
                let executed = &mut self.counters.executed[pc as usize];
                executed.warps += 1;
                executed.lanes += u64::from(active.count_ones());
            }
            if active == 0 {
                warp.pc += 1;
                continue;
            }
            match &inst.op {
                &Op::Lane { f, d, a, b, c, wide } => {
                    let (a, b, c) =
                        (source(warp, constants, a), source(warp, constants, b), source(warp, constants, c));
                    if active == warp.alive {
                        // Lanes that have exited may be overwritten: nothing reads them again.
                        let d = warp.slots.as_mut_ptr().wrapping_add(d.0 as usize).cast();
                        // SAFETY: the decoder gives registers the slots that `f` expects; equal or disjoint.
                        unsafe { f(d, a, b, c) };
                    } else {
                        let mut out = [Slot([0; 32]); 2];
                        // SAFETY: as above, into a temporary of two slots.
                        unsafe { f(out.as_mut_ptr().cast(), a, b, c) };
                        if wide {
                            // SAFETY: two slots are 32 lanes of 64 bits.
                            set64(warp, d, unsafe { &*out.as_ptr().cast() }, active);
                        } else {
                            set32(warp, d, &out[0].0, active);
                        }
                    }
                    warp.pc += 1;
                }
                Op::Compare { f, a, b, out } => {
                    // SAFETY: the decoder gives registers the slots that `f` expects.
                    let mask = unsafe { f(source(warp, constants, *a), source(warp, constants, *b)) };
                    finish_compare(warp, out, mask, active);
                    warp.pc += 1;
                }
                &Op::Select { d, a, b, p, wide } => {
                    let p = pred(warp, p);
                    if wide {
                        let (a, b) = (lanes64(warp, constants, a), lanes64(warp, constants, b));
                        let out = std::array::from_fn(|i| if p >> i & 1 == 1 { a[i] } else { b[i] });
                        set64(warp, d, &out, active);
                    } else {
                        let (a, b) = (lanes32(warp, constants, a), lanes32(warp, constants, b));
                        let out = std::array::from_fn(|i| if p >> i & 1 == 1 { a[i] } else { b[i] });
                        set32(warp, d, &out, active);
                    }
                    warp.pc += 1;
                }
                &Op::Logic { op, d, a, b } => {
                    let value = op.apply(pred(warp, a), pred(warp, b));
                    set_pred(warp, d, value, active);
                    warp.pc += 1;
                }
                &Op::NonZero { d, a } => {
                    let a = lanes32(warp, constants, a);
                    let value = (0..32).fold(0, |m, i| m | u32::from(a[i] != 0) << i);
                    set_pred(warp, d, value, active);
                    warp.pc += 1;
                }
                &Op::Lop3 { table, d, a, b, c } => {
                    let (a, b, c) =
                        (lanes32(warp, constants, a), lanes32(warp, constants, b), lanes32(warp, constants, c));
                    let out = std::array::from_fn(|i| lop3(table, a[i], b[i], c[i]));
                    set32(warp, d, &out, active);
                    warp.pc += 1;
                }
                &Op::Branch(target) => {
                    self.counters.branches += 1;
                    if active == warp.active {
                        if target <= pc {
                            fuel -= i64::from(pc - target) + 1;
                            warp.pc = target;
                            warp.patience += 1;
                            if warp.patience > PATIENCE && warp.others.iter().any(|g| g.wait == Wait::No) {
                                warp.rotate();
                            }
                            if fuel < 0 {
                                return Ok(Pause::Turn);
                            }
                        } else {
                            warp.pc = target;
                        }
                    } else {
                        self.counters.divergent_branches += 1;
                        warp.others.push(Group { pc: target, mask: active, wait: Wait::No });
                        warp.active &= !active;
                        warp.pc += 1;
                        warp.park(Wait::No);
                        warp.schedule();
                    }
                }
                Op::BranchIndexed { index, targets } => {
                    let index = lanes32(warp, constants, *index);
                    self.split(warp, active, |lane| {
                        targets.get(index[lane as usize] as usize).copied().ok_or_else(|| {
                            Fault::new(
                                Kind::IllegalInstruction,
                                lane,
                                format!("branch index {} beyond the table", index[lane as usize]),
                            )
                        })
                    })?;
                    fuel -= 16;
                }
                Op::Call(call) => {
                    fuel -= 16;
                    self.call(warp, active, call)?;
                    if fuel < 0 && warp.active != 0 {
                        return Ok(Pause::Turn);
                    }
                }
                &Op::Return { function } => self.ret(warp, active, function)?,
                Op::Exit => {
                    self.exit(warp, active);
                    warp.active &= !active;
                    warp.pc += 1;
                    if warp.active == 0 && !self.next_group(warp)? {
                        return Ok(Pause::Waits);
                    }
                }
                Op::Trap => return Err(Fault::new(Kind::Trap, active.trailing_zeros(), "the kernel executed trap")),
                Op::Nop => warp.pc += 1,
                Op::Runtime(call) => {
                    self.runtime(warp, active, call)?;
                    warp.pc += 1;
                }
                &Op::Clock { d, wide } => {
                    let now = self.counters.warp_instructions;
                    if wide {
                        set64(warp, d, &[now; 32], active)
                    } else {
                        set32(warp, d, &[now as u32; 32], active)
                    }
                    self.polled = true;
                    warp.pc += 1;
                }
                &Op::ActiveMask(d) => {
                    set32(warp, d, &[active; 32], active);
                    warp.pc += 1;
                }
                Op::Load(load) => {
                    self.load(warp, load, active)?;
                    warp.pc += 1;
                }
                Op::Store(store) => {
                    self.store(warp, store, active)?;
                    warp.pc += 1;
                }
                Op::Atomic(atomic) => {
                    self.atomic(warp, atomic, active)?;
                    warp.pc += 1;
                }
                Op::CopyLocal(copy) => {
                    let bytes = program.local_bytes as usize;
                    for lane in lanes(active) {
                        let base = lane as usize * bytes;
                        let from = base + copy.from as usize;
                        warp.local.copy_within(from..from + copy.bytes as usize, base + copy.to as usize);
                    }
                    warp.pc += 1;
                }
                Op::IsSpace(is) => {
                    let a = lanes64(warp, constants, is.a);
                    let value = (0..32).fold(0, |m, i| m | u32::from(super::access::is_space(a[i], is.space)) << i);
                    set_pred(warp, is.d, value, active);
                    warp.pc += 1;
                }
                &Op::Fence { beyond_block, proxy } => {
                    self.fenced |= beyond_block;
                    if proxy {
                        warp.clock.fence_proxy();
                    }
                    warp.pc += 1;
                }
                Op::CopyAsync(copy) => {
                    self.copy_async(warp, copy, active)?;
                    warp.pc += 1;
                }
                Op::CommitGroup => {
                    warp.copies.commit(active);
                    warp.pc += 1;
                }
                &Op::WaitGroup(n) => {
                    self.wait_copies(warp, active, n)?;
                    warp.pc += 1;
                }
                Op::Mbarrier(op) => {
                    if self.mbarrier(warp, op, active)? {
                        fuel -= FAILED_TEST;
                        warp.patience += FAILED_TEST_PATIENCE;
                    }
                    warp.pc += 1;
                }
                Op::Bulk(bulk) => {
                    self.bulk(warp, bulk, active)?;
                    warp.pc += 1;
                }
                Op::Barrier(barrier) => {
                    if !self.barrier(warp, barrier, active)? && !self.next_group(warp)? {
                        return Ok(Pause::Waits);
                    }
                }
                &Op::ClusterBarrier { arrive, wait, relaxed } => {
                    if !self.cluster_barrier(warp, arrive, wait, relaxed, active) && !self.next_group(warp)? {
                        return Ok(Pause::Waits);
                    }
                }
                Op::Warp(op) => {
                    if !self.collective(warp, op, active)? && !self.next_group(warp)? {
                        return Ok(Pause::Waits);
                    }
                }
                Op::Matrix(matrix) => {
                    self.matrix(warp, matrix, active)?;
                    warp.pc += 1;
                }
                Op::Mma(mma) => {
                    self.mma(warp, mma, active)?;
                    warp.pc += 1;
                }
                Op::Wgmma(op) => {
                    if !self.wgmma(warp, op, active)? && !self.next_group(warp)? {
                        return Ok(Pause::Waits);
                    }
                }
                &Op::WgmmaSync(op) => {
                    if !self.wgmma_sync(warp, op, active)? && !self.next_group(warp)? {
                        return Ok(Pause::Waits);
                    }
                }
                Op::MapCluster(map) => {
                    self.map_cluster(warp, map, active);
                    warp.pc += 1;
                }
            }
        }
    }

    /// Chooses a group to run. Groups that wait for lanes that have since exited go on here.
    pub fn next_group(&mut self, warp: &mut Warp) -> Result<bool, Fault> {
        loop {
            if warp.schedule() {
                return Ok(true);
            }
            let alive = warp.alive;
            let ready = warp.others.iter().position(|g| match g.wait {
                Wait::Members(mask) => mask & alive & !g.mask == 0,
                Wait::Convergence { .. } => alive & !g.mask == 0,
                _ => false,
            });
            let Some(at) = ready else { return Ok(false) };
            match warp.others[at].wait {
                Wait::Convergence { work, needed } => {
                    let group = warp.others.swap_remove(at);
                    if work != warp.work && needed & !group.mask != 0 {
                        self.divergent_arrival(warp, group);
                    } else {
                        // The others only left: an early exit, which the hardware counts as arrival.
                        warp.others.push(Group { wait: Wait::No, ..group });
                    }
                }
                _ => warp.others[at].wait = Wait::No,
            }
        }
    }
}

#[inline(always)]
fn finish_compare(warp: &mut Warp, out: &CompareOut, mask: u32, active: u32) {
    let (p, q) = match out.with {
        None => (mask, !mask),
        Some((op, with)) => {
            let with = pred(warp, with);
            (op.apply(mask, with), op.apply(!mask, with))
        }
    };
    set_pred(warp, out.p, p, active);
    set_pred(warp, out.q, q, active);
}

#[inline(always)]
fn lop3(table: u8, a: u32, b: u32, c: u32) -> u32 {
    let mut out = 0;
    for bit in 0..8u32 {
        let term = (if bit & 4 != 0 { a } else { !a })
            & (if bit & 2 != 0 { b } else { !b })
            & (if bit & 1 != 0 { c } else { !c });
        out |= if table >> bit & 1 == 1 { term } else { 0 };
    }
    out
}
