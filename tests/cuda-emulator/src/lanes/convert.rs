//! `cvt`: integers to integers directly; everything with a float in steps that the decoder chains (to integral, to f64
//! rounded to odd, to the target with the one rounding).

use super::float::by_direction;
use super::integer::by_integer;
use super::{LaneFn, Pair, pick1, pick2};
use crate::numerics::format::{self, bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16, tf32_from_f32};
use crate::numerics::rounding::{self, Rounding};
use crate::ptx::types::Type;

/// Integer to integer, modulo the width or saturating.
pub fn integer(from: Type, to: Type, saturate: bool) -> Option<LaneFn> {
    if saturate {
        return by_integer!(from, F => by_integer!(to, T => pick1(|a: F| (a as i128).clamp(T::MIN as i128, T::MAX as i128) as T))?);
    }
    by_integer!(from, F => by_integer!(to, T => pick1(|a: F| a as T))?)
}

/// A float rounded to an integral value of the same type.
pub fn integral(ty: Type, direction: Rounding) -> Option<LaneFn> {
    Some(match (ty, direction) {
        (Type::F32, Rounding::Nearest) => pick1(|a: f32| a.round_ties_even()),
        (Type::F32, Rounding::Zero) => pick1(|a: f32| a.trunc()),
        (Type::F32, Rounding::Down) => pick1(|a: f32| a.floor()),
        (Type::F32, Rounding::Up) => pick1(|a: f32| a.ceil()),
        (Type::F64, Rounding::Nearest) => pick1(|a: f64| a.round_ties_even()),
        (Type::F64, Rounding::Zero) => pick1(|a: f64| a.trunc()),
        (Type::F64, Rounding::Down) => pick1(|a: f64| a.floor()),
        (Type::F64, Rounding::Up) => pick1(|a: f64| a.ceil()),
        _ => return None,
    })
}

/// An integral float to an integer: out of range saturates, NaN becomes 0.
pub fn float_to_integer(from: Type, to: Type) -> Option<LaneFn> {
    match from {
        Type::F32 => by_integer!(to, T => pick1(|a: f32| a as T)),
        Type::F64 => by_integer!(to, T => pick1(|a: f64| a as T)),
        _ => None,
    }
}

/// An integer to f32 to nearest.
pub fn integer_to_f32(from: Type) -> Option<LaneFn> {
    by_integer!(from, F => pick1(|a: F| a as f32))
}

/// An integer to f64 to nearest (exact up to 32 bits).
pub fn integer_to_f64(from: Type, direction: Rounding) -> Option<LaneFn> {
    by_direction!(direction, M => by_integer!(from, F => pick1(|a: F| directed_f64(a as i128, M))))
}

/// An integer to f64 rounded to odd, for one further rounding.
pub fn integer_to_odd(from: Type) -> Option<LaneFn> {
    by_integer!(from, F => pick1(|a: F| odd_f64(a as i128)))
}

#[inline(always)]
fn directed_f64(value: i128, direction: Rounding) -> f64 {
    let nearest = value as f64;
    let off = value - nearest as i128;
    match direction {
        Rounding::Zero if off != 0 && (off < 0) == (value > 0) => toward_zero(nearest),
        Rounding::Down if off < 0 => nearest.next_down(),
        Rounding::Up if off > 0 => nearest.next_up(),
        _ => nearest,
    }
}

fn toward_zero(value: f64) -> f64 {
    f64::from_bits(value.to_bits() - 1)
}

#[inline(always)]
fn odd_f64(value: i128) -> f64 {
    let cut = directed_f64(value, Rounding::Zero);
    if cut as i128 == value { cut } else { f64::from_bits(cut.to_bits() | 1) }
}

/// Any float type of 8 to 32 bits as f64, exactly.
pub fn widen(from: Type) -> Option<LaneFn> {
    Some(match from {
        Type::F16 => pick1(|a: u16| f64::from(f16_to_f32(a))),
        Type::BF16 => pick1(|a: u16| f64::from(bf16_to_f32(a))),
        Type::F32 => pick1(|a: f32| f64::from(a)),
        Type::E4M3 => pick1(|a: u8| format::E4M3.value(u32::from(a))),
        Type::E5M2 => pick1(|a: u8| format::E5M2.value(u32::from(a))),
        _ => return None,
    })
}

/// An f64 to a narrower float, one rounding.
pub fn narrow(to: Type, direction: Rounding, saturate_finite: bool) -> Option<LaneFn> {
    Some(by_direction!(direction, M => match (to, saturate_finite) {
        (Type::F32, _) => pick1(|a: f64| crate::numerics::approx::canonical(rounding::narrow(a, M))),
        (Type::F16, false) => pick1(|a: f64| format::F16.round(a, M, false) as u16),
        (Type::F16, true) => pick1(|a: f64| format::F16.round(a, M, true) as u16),
        (Type::BF16, false) => pick1(|a: f64| format::BF16.round(a, M, false) as u16),
        (Type::BF16, true) => pick1(|a: f64| format::BF16.round(a, M, true) as u16),
        (Type::E4M3, _) => pick1(|a: f64| format::E4M3.round(a, M, true) as u8),
        (Type::E5M2, _) => pick1(|a: f64| format::E5M2.round(a, M, true) as u8),
        _ => return None,
    }))
}

/// The conversions that kernels use most, in one step.
pub fn direct(from: Type, to: Type) -> Option<LaneFn> {
    Some(match (from, to) {
        (Type::F32, Type::BF16) => pick1(f32_to_bf16),
        (Type::F32, Type::F16) => pick1(f32_to_f16),
        (Type::BF16, Type::F32) => pick1(bf16_to_f32),
        (Type::F16, Type::F32) => pick1(f16_to_f32),
        (Type::F32, Type::F64) => pick1(|a: f32| f64::from(a)),
        (Type::F64, Type::F32) => pick1(|a: f64| crate::numerics::approx::canonical(a as f32)),
        _ => return None,
    })
}

/// Two f32 to a packed pair to nearest: the first operand goes to the high half.
pub fn pack_f32(to: Type) -> Option<LaneFn> {
    Some(match to {
        Type::BF16x2 => pick2(|a: f32, b: f32| Pair(f32_to_bf16(b), f32_to_bf16(a))),
        Type::F16x2 => pick2(|a: f32, b: f32| Pair(f32_to_f16(b), f32_to_f16(a))),
        _ => return None,
    })
}

/// f32 to tf32.
pub fn tf32(direction: Rounding) -> LaneFn {
    match direction {
        Rounding::Away => pick1(|a: f32| tf32_from_f32(a, Rounding::Away)),
        Rounding::Zero => pick1(|a: f32| tf32_from_f32(a, Rounding::Zero)),
        _ => pick1(|a: f32| tf32_from_f32(a, Rounding::Nearest)),
    }
}
