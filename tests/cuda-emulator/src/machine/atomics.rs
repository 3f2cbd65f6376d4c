//! `atom` and `red`.

use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering::Relaxed};

use super::access::{Region, addresses};
use super::block::Block;
use super::mbarrier::lock;
use super::step::{lanes32, lanes64, set32, set64};
use super::warp::{Warp, lanes};
use crate::checks::Fault;
use crate::numerics::approx::canonical;
use crate::numerics::format::{self, f16_to_f32, f32_to_f16};
use crate::numerics::rounding::{Rounding, add_to_odd};
use crate::program::{Atomic, AtomicOp};
use crate::ptx::types::Type;

impl Block<'_> {
    /// `atom`, `red`: lanes in order, each indivisible against other blocks.
    pub fn atomic(&mut self, warp: &mut Warp, atomic: &Atomic, active: u32) -> Result<(), Fault> {
        warp.work += 1;
        let constants = &self.program().constants;
        let at = addresses(warp, constants, &atomic.address);
        let size = atomic.ty.bytes();
        let bytes = size * atomic.b.len() as u32;
        self.aligned(&at, active, bytes)?;
        self.polled |= !atomic.dest.is_empty();
        let fetch = |warp: &Warp, reg| -> [u64; 32] {
            if size == 8 { lanes64(warp, constants, reg) } else { lanes32(warp, constants, reg).map(u64::from) }
        };
        let operands: Vec<[u64; 32]> = atomic.b.iter().map(|r| fetch(warp, *r)).collect();
        let swap = if atomic.op == AtomicOp::CompareAndSwap { fetch(warp, atomic.c) } else { [0; 32] };
        let mut old = vec![[0u64; 32]; operands.len()];
        let mut left = active;
        while left != 0 {
            let span = self.span(warp, atomic.space, &at, left, bytes)?;
            left &= !span.lanes;
            self.writable(&span, &at)?;
            if self.config().check {
                self.check_read(warp, &span, &at, bytes, true);
                self.check_write(warp, &span, &at, bytes, true, |lane, byte| {
                    // SAFETY: the span's lanes lie inside; an atomic keeps the old byte as far as the check goes.
                    unsafe { *span.host(at[lane as usize], lane).add(byte as usize) }
                });
            }
            match span.region {
                Region::Global(index) => {
                    self.mark_written(index, &span, &at, bytes);
                    self.counters.global_atomics += u64::from(span.lanes.count_ones());
                }
                _ => self.counters.shared_atomics += u64::from(span.lanes.count_ones()),
            }
            for lane in lanes(span.lanes) {
                let i = lane as usize;
                if let Region::Shared | Region::Peer(_) = span.region
                    && self.shadow.is_some()
                    && let Some(key) = self.strong_key(at[i], atomic.space)
                {
                    let mut strong = lock(&self.strong);
                    let object = strong.entry(key).or_default();
                    warp.clock.acquire(object);
                    warp.clock.release(object);
                }
                for (e, operand) in operands.iter().enumerate() {
                    let place = span.host(at[i], lane).wrapping_add(e * size as usize);
                    // SAFETY: inside host memory and aligned, both checked above.
                    old[e][i] = unsafe { update(place, size, |v| apply(atomic.op, atomic.ty, v, operand[i], swap[i])) };
                }
            }
        }
        for (reg, old) in atomic.dest.iter().zip(&old) {
            if size == 8 {
                set64(warp, *reg, old, active);
            } else {
                set32(warp, *reg, &old.map(|v| v as u32), active);
            }
        }
        Ok(())
    }
}

/// Replaces the value at a place; the old one is returned.
///
/// # Safety
/// `place` is valid and aligned for `size` bytes.
pub(super) unsafe fn update(place: *mut u8, size: u32, f: impl Fn(u64) -> u64) -> u64 {
    // SAFETY: the caller's promise. `fetch_update` loops until no other thread came between.
    unsafe {
        match size {
            2 => {
                let cell = AtomicU16::from_ptr(place.cast());
                let (Ok(old) | Err(old)) = cell.fetch_update(Relaxed, Relaxed, |v| Some(f(u64::from(v)) as u16));
                u64::from(old)
            }
            8 => {
                let cell = AtomicU64::from_ptr(place.cast());
                let (Ok(old) | Err(old)) = cell.fetch_update(Relaxed, Relaxed, |v| Some(f(v)));
                old
            }
            _ => {
                let cell = AtomicU32::from_ptr(place.cast());
                let (Ok(old) | Err(old)) = cell.fetch_update(Relaxed, Relaxed, |v| Some(f(u64::from(v)) as u32));
                u64::from(old)
            }
        }
    }
}

/// The new value of one atomic operation on bits.
pub(super) fn apply(op: AtomicOp, ty: Type, old: u64, b: u64, c: u64) -> u64 {
    let (a32, b32) = (old as u32, b as u32);
    match op {
        AtomicOp::Exchange => b,
        AtomicOp::CompareAndSwap => {
            let equal = if ty.bytes() == 8 { old == b } else { old as u32 == b as u32 };
            if equal { c } else { old }
        }
        AtomicOp::And => old & b,
        AtomicOp::Or => old | b,
        AtomicOp::Xor => old ^ b,
        AtomicOp::Increment => u64::from(if a32 >= b32 { 0 } else { a32 + 1 }),
        AtomicOp::Decrement => u64::from(if a32 == 0 || a32 > b32 { b32 } else { a32 - 1 }),
        AtomicOp::Add => add(ty, old, b),
        AtomicOp::Min | AtomicOp::Max => {
            let max = op == AtomicOp::Max;
            let first = match ty {
                Type::S32 => (a32 as i32 > b32 as i32) == max,
                Type::S64 => (old as i64 > b as i64) == max,
                Type::U64 | Type::B64 => (old > b) == max,
                Type::F16x2 | Type::BF16x2 | Type::F16 | Type::BF16 => return packed_extremum(ty, a32, b32, max),
                _ => (a32 > b32) == max,
            };
            if first { old } else { b }
        }
    }
}

fn add(ty: Type, old: u64, b: u64) -> u64 {
    let (a32, b32) = (old as u32, b as u32);
    match ty {
        Type::F32 => u64::from(canonical(f32::from_bits(a32) + f32::from_bits(b32)).to_bits()),
        Type::F64 => (f64::from_bits(old) + f64::from_bits(b)).to_bits(),
        Type::F16 | Type::BF16 => u64::from(add16(ty, old as u16, b as u16)),
        Type::F16x2 | Type::BF16x2 => {
            u64::from(add16(ty, a32 as u16, b32 as u16))
                | u64::from(add16(ty, (a32 >> 16) as u16, (b32 >> 16) as u16)) << 16
        }
        Type::U64 | Type::S64 | Type::B64 => old.wrapping_add(b),
        _ => u64::from(a32.wrapping_add(b32)),
    }
}

fn add16(ty: Type, a: u16, b: u16) -> u16 {
    if matches!(ty, Type::F16 | Type::F16x2) {
        return f32_to_f16(f16_to_f32(a) + f16_to_f32(b));
    }
    let wide = |x: u16| format::BF16.value(u32::from(x));
    format::BF16.round(add_to_odd(wide(a), wide(b)), Rounding::Nearest, false) as u16
}

fn packed_extremum(ty: Type, a: u32, b: u32, max: bool) -> u64 {
    let form = if matches!(ty, Type::F16 | Type::F16x2) { format::F16 } else { format::BF16 };
    let pick = |a: u32, b: u32| -> u32 {
        let (x, y) = (form.value(a & 0xffff), form.value(b & 0xffff));
        if x.is_nan() || (!y.is_nan() && (y > x) == max && y != x) { b & 0xffff } else { a & 0xffff }
    };
    u64::from(pick(a, b) | pick(a >> 16, b >> 16) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_operations_of_the_manual() {
        let u32_op = |op, a: u32, b: u32| apply(op, Type::U32, u64::from(a), u64::from(b), 0) as u32;
        assert_eq!(u32_op(AtomicOp::Increment, 3, 5), 4);
        assert_eq!(u32_op(AtomicOp::Increment, 5, 5), 0);
        assert_eq!(u32_op(AtomicOp::Decrement, 0, 5), 5);
        assert_eq!(u32_op(AtomicOp::Decrement, 9, 5), 5);
        assert_eq!(u32_op(AtomicOp::Add, u32::MAX, 2), 1);
        assert_eq!(apply(AtomicOp::Min, Type::S32, 0xffff_ffff, 1, 0), 0xffff_ffff);
        assert_eq!(apply(AtomicOp::Max, Type::U32, 0xffff_ffff, 1, 0), 0xffff_ffff);
        assert_eq!(apply(AtomicOp::CompareAndSwap, Type::B32, 7, 7, 9), 9);
        assert_eq!(apply(AtomicOp::CompareAndSwap, Type::B32, 8, 7, 9), 8);
        assert_eq!(apply(AtomicOp::Add, Type::BF16x2, 0x3f80_4000, 0x3f80_3f80, 0), 0x4000_4040);
        assert_eq!(apply(AtomicOp::Add, Type::F16x2, 0x3c00_4000, 0x3c00_3c00, 0), 0x4000_4200);
    }
}
