//! Integer arithmetic: add, sub, mul, mad, div, rem, min, max, abs, neg, sad, shifts, and the carry chain.

use super::{LaneFn, pick1, pick2, pick3};
use crate::ptx::types::Type;

/// Evaluates an expression with `$t` naming the Rust type of a PTX integer type.
macro_rules! by_integer {
    ($ty:expr, $t:ident => $e:expr) => {
        match $ty {
            Type::U8 | Type::B8 => {
                type $t = u8;
                Some($e)
            }
            Type::S8 => {
                type $t = i8;
                Some($e)
            }
            Type::U16 | Type::B16 => {
                type $t = u16;
                Some($e)
            }
            Type::S16 => {
                type $t = i16;
                Some($e)
            }
            Type::U32 | Type::B32 => {
                type $t = u32;
                Some($e)
            }
            Type::S32 => {
                type $t = i32;
                Some($e)
            }
            Type::U64 | Type::B64 => {
                type $t = u64;
                Some($e)
            }
            Type::S64 => {
                type $t = i64;
                Some($e)
            }
            _ => None,
        }
    };
}
pub(crate) use by_integer;

/// The same with the type of twice the width as well.
macro_rules! by_wide {
    ($ty:expr, ($t:ident, $w:ident) => $e:expr) => {
        match $ty {
            Type::U16 => {
                type $t = u16;
                type $w = u32;
                Some($e)
            }
            Type::S16 => {
                type $t = i16;
                type $w = i32;
                Some($e)
            }
            Type::U32 => {
                type $t = u32;
                type $w = u64;
                Some($e)
            }
            Type::S32 => {
                type $t = i32;
                type $w = i64;
                Some($e)
            }
            Type::U64 => {
                type $t = u64;
                type $w = u128;
                Some($e)
            }
            Type::S64 => {
                type $t = i64;
                type $w = i128;
                Some($e)
            }
            _ => None,
        }
    };
}

/// Two-operand arithmetic that keeps the type. Division by zero gives all ones and remainder by zero the dividend, as
/// NVIDIA's hardware does; the PTX manual leaves both open.
pub fn binary(op: &str, ty: Type) -> Option<LaneFn> {
    match op {
        "add" => by_integer!(ty, T => pick2(|a: T, b: T| a.wrapping_add(b))),
        "sub" => by_integer!(ty, T => pick2(|a: T, b: T| a.wrapping_sub(b))),
        "mul.lo" => by_integer!(ty, T => pick2(|a: T, b: T| a.wrapping_mul(b))),
        "min" => by_integer!(ty, T => pick2(|a: T, b: T| a.min(b))),
        "max" => by_integer!(ty, T => pick2(|a: T, b: T| a.max(b))),
        "div" => by_integer!(ty, T => pick2(|a: T, b: T| if b == 0 { !0 } else { a.wrapping_div(b) })),
        "rem" => by_integer!(ty, T => pick2(|a: T, b: T| if b == 0 { a } else { a.wrapping_rem(b) })),
        "mul.hi" => by_wide!(ty, (T, W) => pick2(|a: T, b: T| ((a as W * b as W) >> T::BITS) as T)),
        "add.sat" if ty == Type::S32 => Some(pick2(|a: i32, b: i32| a.saturating_add(b))),
        "sub.sat" if ty == Type::S32 => Some(pick2(|a: i32, b: i32| a.saturating_sub(b))),
        "mul24.lo" => match ty {
            Type::U32 => Some(pick2(|a: u32, b: u32| (a & 0xff_ffff).wrapping_mul(b & 0xff_ffff))),
            Type::S32 => Some(pick2(|a: i32, b: i32| (a << 8 >> 8).wrapping_mul(b << 8 >> 8))),
            _ => None,
        },
        // Bits 47..16 of the 48-bit product.
        "mul24.hi" => match ty {
            Type::U32 => {
                Some(pick2(|a: u32, b: u32| ((u64::from(a & 0xff_ffff) * u64::from(b & 0xff_ffff)) >> 16) as u32))
            }
            Type::S32 => Some(pick2(|a: i32, b: i32| ((i64::from(a << 8 >> 8) * i64::from(b << 8 >> 8)) >> 16) as i32)),
            _ => None,
        },
        _ => None,
    }
}

/// `mul.wide`: the product in twice the width.
pub fn mul_wide(ty: Type) -> Option<LaneFn> {
    match ty {
        Type::U16 => Some(pick2(|a: u16, b: u16| u32::from(a) * u32::from(b))),
        Type::S16 => Some(pick2(|a: i16, b: i16| i32::from(a) * i32::from(b))),
        Type::U32 => Some(pick2(|a: u32, b: u32| u64::from(a) * u64::from(b))),
        Type::S32 => Some(pick2(|a: i32, b: i32| i64::from(a) * i64::from(b))),
        _ => None,
    }
}

/// `mad.wide`: the product in twice the width plus an addend of that width.
pub fn mad_wide(ty: Type) -> Option<LaneFn> {
    match ty {
        Type::U16 => Some(pick3(|a: u16, b: u16, c: u32| (u32::from(a) * u32::from(b)).wrapping_add(c))),
        Type::S16 => Some(pick3(|a: i16, b: i16, c: i32| (i32::from(a) * i32::from(b)).wrapping_add(c))),
        Type::U32 => Some(pick3(|a: u32, b: u32, c: u64| (u64::from(a) * u64::from(b)).wrapping_add(c))),
        Type::S32 => Some(pick3(|a: i32, b: i32, c: i64| (i64::from(a) * i64::from(b)).wrapping_add(c))),
        _ => None,
    }
}

/// Three-operand arithmetic that keeps the type.
pub fn ternary(op: &str, ty: Type) -> Option<LaneFn> {
    match op {
        "mad.lo" => by_integer!(ty, T => pick3(|a: T, b: T, c: T| a.wrapping_mul(b).wrapping_add(c))),
        "mad.hi" => {
            by_wide!(ty, (T, W) => pick3(|a: T, b: T, c: T| (((a as W * b as W) >> T::BITS) as T).wrapping_add(c)))
        }
        "mad.hi.sat" if ty == Type::S32 => {
            Some(pick3(|a: i32, b: i32, c: i32| (((i64::from(a) * i64::from(b)) >> 32) as i32).saturating_add(c)))
        }
        "sad" => {
            by_integer!(ty, T => pick3(|a: T, b: T, c: T| if a < b { b.wrapping_sub(a) } else { a.wrapping_sub(b) }.wrapping_add(c)))
        }
        _ => None,
    }
}

/// One-operand arithmetic.
pub fn unary(op: &str, ty: Type) -> Option<LaneFn> {
    match (op, ty) {
        ("abs", Type::S16) => Some(pick1(|a: i16| a.wrapping_abs())),
        ("abs", Type::S32) => Some(pick1(|a: i32| a.wrapping_abs())),
        ("abs", Type::S64) => Some(pick1(|a: i64| a.wrapping_abs())),
        ("neg", Type::S16) => Some(pick1(|a: i16| a.wrapping_neg())),
        ("neg", Type::S32) => Some(pick1(|a: i32| a.wrapping_neg())),
        ("neg", Type::S64) => Some(pick1(|a: i64| a.wrapping_neg())),
        _ => None,
    }
}

/// `shl` and `shr`: amounts beyond the width are clamped to it.
pub fn shift(op: &str, ty: Type) -> Option<LaneFn> {
    match op {
        "shl" => by_integer!(ty, T => pick2(|a: T, n: u32| if n >= T::BITS { 0 } else { a << (n & (T::BITS - 1)) })),
        "shr" => by_integer!(ty, T => pick2(|a: T, n: u32| {
            // Twice, because a shift by the whole width is none to Rust: what is left is 0 or the sign.
            let last = T::BITS - 1;
            if n >= T::BITS { a >> last >> 1 } else { a >> (n & last) }
        })),
        _ => None,
    }
}

/// `a + b + carry`, carry 0 or 1.
pub fn add_carry(wide: bool) -> LaneFn {
    if wide {
        pick3(|a: u64, b: u64, c: u32| a.wrapping_add(b).wrapping_add(u64::from(c)))
    } else {
        pick3(|a: u32, b: u32, c: u32| a.wrapping_add(b).wrapping_add(c))
    }
}

/// The carry out of `a + b + carry`.
pub fn add_carry_out(wide: bool) -> LaneFn {
    if wide {
        pick3(|a: u64, b: u64, c: u32| ((u128::from(a) + u128::from(b) + u128::from(c)) >> 64) as u32)
    } else {
        pick3(|a: u32, b: u32, c: u32| ((u64::from(a) + u64::from(b) + u64::from(c)) >> 32) as u32)
    }
}

/// `a + !b + carry`, carry 0 or 1: `a - b`, less one without the carry.
pub fn sub_carry(wide: bool) -> LaneFn {
    if wide {
        pick3(|a: u64, b: u64, c: u32| a.wrapping_add(!b).wrapping_add(u64::from(c)))
    } else {
        pick3(|a: u32, b: u32, c: u32| a.wrapping_add(!b).wrapping_add(c))
    }
}

/// The carry out of `a + !b + carry`: 1 where nothing is borrowed.
pub fn sub_carry_out(wide: bool) -> LaneFn {
    if wide {
        pick3(|a: u64, b: u64, c: u32| ((u128::from(a) + u128::from(!b) + u128::from(c)) >> 64) as u32)
    } else {
        pick3(|a: u32, b: u32, c: u32| ((u64::from(a) + u64::from(!b) + u64::from(c)) >> 32) as u32)
    }
}
