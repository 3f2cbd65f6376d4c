//! Dot products of bytes and halves (`dp4a`, `dp2a`), packed 16-bit integer arithmetic, and the SIMD video instructions.

use super::{LaneFn, Pair, pick2, pick3};
use crate::ptx::types::Type;

#[inline(always)]
fn byte(word: u32, n: u32, signed: bool) -> i32 {
    let value = (word >> (n * 8)) as u8;
    if signed { i32::from(value as i8) } else { i32::from(value) }
}

#[inline(always)]
fn dot4(a: u32, b: u32, c: u32, sa: bool, sb: bool) -> u32 {
    let mut sum = c;
    for n in 0..4 {
        sum = sum.wrapping_add((byte(a, n, sa) * byte(b, n, sb)) as u32);
    }
    sum
}

#[inline(always)]
fn dot2(a: u32, b: u32, c: u32, sa: bool, sb: bool, high: bool) -> u32 {
    let half = |n: u32| if sa { i32::from((a >> (n * 16)) as u16 as i16) } else { i32::from((a >> (n * 16)) as u16) };
    let first = if high { 2 } else { 0 };
    let products = [half(0).wrapping_mul(byte(b, first, sb)), half(1).wrapping_mul(byte(b, first + 1, sb))];
    c.wrapping_add(products[0] as u32).wrapping_add(products[1] as u32)
}

/// `dp4a` with the signs of its two operand types.
pub fn dp4a(a: Type, b: Type) -> Option<LaneFn> {
    Some(match (a, b) {
        (Type::U32, Type::U32) => pick3(|a: u32, b: u32, c: u32| dot4(a, b, c, false, false)),
        (Type::U32, Type::S32) => pick3(|a: u32, b: u32, c: u32| dot4(a, b, c, false, true)),
        (Type::S32, Type::U32) => pick3(|a: u32, b: u32, c: u32| dot4(a, b, c, true, false)),
        (Type::S32, Type::S32) => pick3(|a: u32, b: u32, c: u32| dot4(a, b, c, true, true)),
        _ => return None,
    })
}

/// `dp2a.lo` and `dp2a.hi`.
pub fn dp2a(a: Type, b: Type, high: bool) -> Option<LaneFn> {
    Some(match (a, b, high) {
        (Type::U32, Type::U32, false) => pick3(|a: u32, b: u32, c: u32| dot2(a, b, c, false, false, false)),
        (Type::U32, Type::S32, false) => pick3(|a: u32, b: u32, c: u32| dot2(a, b, c, false, true, false)),
        (Type::S32, Type::U32, false) => pick3(|a: u32, b: u32, c: u32| dot2(a, b, c, true, false, false)),
        (Type::S32, Type::S32, false) => pick3(|a: u32, b: u32, c: u32| dot2(a, b, c, true, true, false)),
        (Type::U32, Type::U32, true) => pick3(|a: u32, b: u32, c: u32| dot2(a, b, c, false, false, true)),
        (Type::U32, Type::S32, true) => pick3(|a: u32, b: u32, c: u32| dot2(a, b, c, false, true, true)),
        (Type::S32, Type::U32, true) => pick3(|a: u32, b: u32, c: u32| dot2(a, b, c, true, false, true)),
        (Type::S32, Type::S32, true) => pick3(|a: u32, b: u32, c: u32| dot2(a, b, c, true, true, true)),
        _ => return None,
    })
}

/// add, min, max of `u16x2` and `s16x2`.
pub fn packed(op: &str, ty: Type) -> Option<LaneFn> {
    Some(match (op, ty) {
        ("add", _) => pick2(|a: Pair, b: Pair| Pair(a.0.wrapping_add(b.0), a.1.wrapping_add(b.1))),
        ("min", Type::U16x2) => pick2(|a: Pair, b: Pair| Pair(a.0.min(b.0), a.1.min(b.1))),
        ("max", Type::U16x2) => pick2(|a: Pair, b: Pair| Pair(a.0.max(b.0), a.1.max(b.1))),
        ("min", Type::S16x2) => {
            pick2(|a: Pair, b: Pair| Pair((a.0 as i16).min(b.0 as i16) as u16, (a.1 as i16).min(b.1 as i16) as u16))
        }
        ("max", Type::S16x2) => {
            pick2(|a: Pair, b: Pair| Pair((a.0 as i16).max(b.0 as i16) as u16, (a.1 as i16).max(b.1 as i16) as u16))
        }
        _ => return None,
    })
}

/// What a SIMD video instruction (`vadd4`, `vabsdiff2`, ...) does, for its lane function to read from a register.
#[derive(Debug, Clone, Copy)]
pub struct Simd {
    /// Index in [`SIMD_OPS`].
    pub op: u32,
    /// Elements are bytes, four a register; else halves.
    pub bytes: bool,
    /// Signs of `a`, `b` and the result.
    pub signed: [bool; 3],
    /// Clamp to the range of the result's elements.
    pub saturate: bool,
    /// The results of all elements are summed.
    pub sum: bool,
}

/// The operations of [`Simd`] by name.
pub const SIMD_OPS: [&str; 6] = ["vadd", "vsub", "vavrg", "vabsdiff", "vmin", "vmax"];

impl Simd {
    /// As bits.
    pub fn bits(self) -> u32 {
        let flags = [self.bytes, self.signed[0], self.signed[1], self.signed[2], self.saturate, self.sum];
        self.op | flags.iter().enumerate().map(|(n, f)| u32::from(*f) << (8 + n)).sum::<u32>()
    }
}

/// A SIMD video instruction of `a` and `b`; the third operand is [`Simd::bits`].
pub fn simd() -> LaneFn {
    pick3(|a: u32, b: u32, control: u32| {
        let flag = |n: u32| control >> (8 + n) & 1 == 1;
        let width = if flag(0) { 8 } else { 16 };
        let element = |word: u32, n: u32, signed: bool| {
            let up = word << (32 - width * (n + 1));
            if signed { i64::from(up as i32 >> (32 - width)) } else { i64::from(up >> (32 - width)) }
        };
        let low = if flag(3) { -(1i64 << (width - 1)) } else { 0 };
        let high = low + (1i64 << width) - 1;
        let (mut joined, mut sum) = (0u32, 0i64);
        for n in 0..32 / width {
            let (x, y) = (element(a, n, flag(1)), element(b, n, flag(2)));
            let mut value = match control & 255 {
                0 => x + y,
                1 => x - y,
                // The average rounds away from zero.
                2 => (x + y + i64::from(x + y >= 0)) >> 1,
                3 => (x - y).abs(),
                4 => x.min(y),
                _ => x.max(y),
            };
            if flag(4) {
                value = value.clamp(low, high);
            }
            let bits = value as u32 & ((1 << width) - 1);
            joined |= bits << (n * width);
            sum += element(bits, 0, flag(3));
        }
        if flag(5) { sum as u32 } else { joined }
    })
}
