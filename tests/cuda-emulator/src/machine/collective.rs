//! Instructions of a warp's lanes together: `bar.warp.sync`, `shfl`, `vote`, `match`, `redux`, `elect`.

use super::block::Block;
use super::step::{lanes32, lanes64, pred, set_pred, set32};
use super::warp::{Group, Wait, Warp, lanes};
use crate::checks::{Fault, Kind};
use crate::program::{ReduceOp, ShuffleMode, VoteMode, WarpKind, WarpOp};
use crate::ptx::types::Type;

impl Block<'_> {
    /// Executes a collective for every set of lanes that is complete; false if the running group must wait.
    pub fn collective(&mut self, warp: &mut Warp, op: &WarpOp, active: u32) -> Result<bool, Fault> {
        let Some(members) = op.members else {
            self.perform(warp, op, active);
            warp.pc += 1;
            return Ok(true);
        };
        let members = lanes32(warp, &self.program().constants, members);
        let alive = warp.alive;
        let first = members[active.trailing_zeros() as usize];
        // Nearly always: one mask, and all its lanes are here.
        if first & alive == active && (0..32).all(|i| active >> i & 1 == 0 || members[i] == first) {
            self.perform(warp, op, active);
            warp.pc += 1;
            return Ok(true);
        }
        // Lanes that came here before and wait are part of the sets.
        let pc = warp.pc;
        let mut here = active;
        warp.others.retain(|g| {
            let waits_here = g.pc == pc && matches!(g.wait, Wait::Members(_));
            if waits_here {
                here |= g.mask;
            }
            !waits_here
        });
        let idle = warp.active & !active;
        if idle != 0 {
            // Lanes whose guard is false pass by.
            warp.others.push(Group { pc: pc + 1, mask: idle, wait: Wait::No });
        }
        warp.active = 0;
        let mut left = here;
        while left != 0 {
            let lane = left.trailing_zeros();
            let mask = members[lane as usize];
            if mask >> lane & 1 == 0 {
                let detail = format!("lane {lane} executes with member mask {mask:#010x}, which does not name it");
                return Err(Fault::new(Kind::BadMemberMask, lane, detail));
            }
            let set = lanes(here).filter(|l| members[*l as usize] == mask).fold(0, |m, l| m | 1 << l);
            left &= !set;
            if mask & alive & !set == 0 {
                self.perform(warp, op, set);
                warp.others.push(Group { pc: pc + 1, mask: set, wait: Wait::No });
            } else {
                warp.others.push(Group { pc, mask: set, wait: Wait::Members(mask) });
            }
        }
        Ok(warp.schedule())
    }

    fn perform(&mut self, warp: &mut Warp, op: &WarpOp, active: u32) {
        let constants = &self.program().constants;
        match op.kind {
            WarpKind::Sync => warp.clock.tick(),
            WarpKind::Shuffle { mode, d, p, a, b, c } => {
                let (a, b, c) = (lanes32(warp, constants, a), lanes32(warp, constants, b), lanes32(warp, constants, c));
                let (mut out, mut valid) = ([0; 32], 0u32);
                for lane in lanes(active) {
                    let i = lane as usize;
                    let (source, ok) = shuffle_source(mode, lane, b[i], c[i]);
                    out[i] = a[source as usize];
                    valid |= u32::from(ok) << lane;
                }
                if let Some(d) = d {
                    set32(warp, d, &out, active);
                }
                set_pred(warp, p, valid, active);
            }
            WarpKind::Vote { mode, d, p, a } => {
                let votes = pred(warp, a) & active;
                if let Some(d) = d {
                    set32(warp, d, &[votes; 32], active);
                }
                let verdict = match mode {
                    VoteMode::All => votes == active,
                    VoteMode::Any => votes != 0,
                    VoteMode::Uniform => votes == active || votes == 0,
                    VoteMode::Ballot => false,
                };
                set_pred(warp, p, if verdict { u32::MAX } else { 0 }, active);
            }
            WarpKind::Match { all, d, p, a, wide } => {
                let a = if wide { lanes64(warp, constants, a) } else { lanes32(warp, constants, a).map(u64::from) };
                let equals =
                    |i: u32| lanes(active).filter(|l| a[*l as usize] == a[i as usize]).fold(0, |m, l| m | 1 << l);
                let first = equals(active.trailing_zeros());
                let same = first == active;
                let mut out = [0; 32];
                for lane in lanes(active) {
                    out[lane as usize] = if !all {
                        equals(lane)
                    } else if same {
                        active
                    } else {
                        0
                    };
                }
                if let Some(d) = d {
                    set32(warp, d, &out, active);
                }
                set_pred(warp, p, if same { u32::MAX } else { 0 }, active);
            }
            WarpKind::Reduce { op, ty, abs, nan, d, a } => {
                let a = lanes32(warp, constants, a);
                let value = reduce(op, ty, abs, nan, lanes(active).map(|l| a[l as usize]));
                set32(warp, d, &[value; 32], active);
            }
            WarpKind::Elect { d, p } => {
                let leader = active.trailing_zeros();
                if let Some(d) = d {
                    set32(warp, d, &[leader; 32], active);
                }
                set_pred(warp, p, 1 << leader, active);
            }
        }
    }
}

/// The lane that a shuffle reads and whether it is in range (manual, "shfl.sync").
fn shuffle_source(mode: ShuffleMode, lane: u32, b: u32, c: u32) -> (u32, bool) {
    let (b, clamp, segment) = (b & 31, c & 31, c >> 8 & 31);
    let max = lane & segment | clamp & !segment;
    let min = lane & segment;
    let (source, ok) = match mode {
        ShuffleMode::Up => (lane.wrapping_sub(b), (lane as i32 - b as i32) >= max as i32),
        ShuffleMode::Down => (lane + b, lane + b <= max),
        ShuffleMode::Butterfly => (lane ^ b, lane ^ b <= max),
        ShuffleMode::Index => {
            let source = min | b & !segment;
            (source, source <= max)
        }
    };
    if ok { (source & 31, true) } else { (lane, false) }
}

fn reduce(op: ReduceOp, ty: Type, abs: bool, nan: bool, values: impl Iterator<Item = u32>) -> u32 {
    if ty == Type::F32 {
        let mut best: Option<f32> = None;
        for value in values {
            let v = f32::from_bits(if abs { value & 0x7fff_ffff } else { value });
            best = Some(match best {
                None => v,
                Some(b) if v.is_nan() || b.is_nan() => {
                    if nan || (v.is_nan() && b.is_nan()) {
                        f32::from_bits(0x7fff_ffff)
                    } else if v.is_nan() {
                        b
                    } else {
                        v
                    }
                }
                Some(b) => {
                    let below = v < b || (v == b && v.is_sign_negative());
                    if below == (op == ReduceOp::Min) { v } else { b }
                }
            });
        }
        return best.unwrap_or(0.0).to_bits();
    }
    let signed = ty == Type::S32;
    values
        .reduce(|a, b| match op {
            ReduceOp::Add => a.wrapping_add(b),
            ReduceOp::And => a & b,
            ReduceOp::Or => a | b,
            ReduceOp::Xor => a ^ b,
            ReduceOp::Min if signed => (a as i32).min(b as i32) as u32,
            ReduceOp::Max if signed => (a as i32).max(b as i32) as u32,
            ReduceOp::Min => a.min(b),
            ReduceOp::Max => a.max(b),
        })
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shuffle_lanes_as_cuda_defines_them() {
        // __shfl_up_sync(width 32): c = 0; __shfl_down/xor/idx: c = 31; width 8: segment mask 0x18.
        assert_eq!(shuffle_source(ShuffleMode::Up, 5, 2, 0), (3, true));
        assert_eq!(shuffle_source(ShuffleMode::Up, 1, 2, 0), (1, false));
        assert_eq!(shuffle_source(ShuffleMode::Down, 30, 1, 31), (31, true));
        assert_eq!(shuffle_source(ShuffleMode::Down, 31, 1, 31), (31, false));
        assert_eq!(shuffle_source(ShuffleMode::Butterfly, 5, 4, 31), (1, true));
        assert_eq!(shuffle_source(ShuffleMode::Index, 5, 40, 31), (8, true));
        assert_eq!(shuffle_source(ShuffleMode::Index, 13, 2, 0x181f), (10, true), "lane 2 of the segment from 8");
        assert_eq!(shuffle_source(ShuffleMode::Down, 14, 4, 0x181f), (14, false), "beyond the segment");
        assert_eq!(shuffle_source(ShuffleMode::Up, 8, 1, 0x1800), (8, false));
    }
}
