//! Dot products of bytes and halves (`dp4a`, `dp2a`) and packed 16-bit integer arithmetic.

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
