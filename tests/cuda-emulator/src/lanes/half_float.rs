//! f16 and bf16 arithmetic, scalar and packed in pairs.
//!
//! Sums and products are computed in f32 or f64, wide enough that the one rounding to 16 bits is the correct one; bf16
//! fma adds in f64 rounded to odd, because a bf16 product can lie 2^100 above the addend that breaks its tie.

use super::{LaneFn, Pair, pick1, pick2, pick3};
use crate::numerics::format::{self, bf16_to_f32, f16_to_f32, f32_to_f16};
use crate::numerics::rounding::{Rounding, add_to_odd};
use crate::ptx::types::Type;

/// Which 16-bit format, and whether two are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Half {
    /// bf16 rather than f16.
    pub is_bf16: bool,
    /// Two in 32 bits.
    pub packed: bool,
}

impl Half {
    /// The half format of a type, if it is one.
    pub fn of(ty: Type) -> Option<Self> {
        Some(match ty {
            Type::F16 => Half { is_bf16: false, packed: false },
            Type::F16x2 => Half { is_bf16: false, packed: true },
            Type::BF16 => Half { is_bf16: true, packed: false },
            Type::BF16x2 => Half { is_bf16: true, packed: true },
            _ => return None,
        })
    }
}

macro_rules! each1 {
    ($half:expr, $f16:expr, $bf16:expr) => {
        match ($half.is_bf16, $half.packed) {
            (false, false) => pick1(|a: u16| $f16(a)),
            (false, true) => pick1(|a: Pair| Pair($f16(a.0), $f16(a.1))),
            (true, false) => pick1(|a: u16| $bf16(a)),
            (true, true) => pick1(|a: Pair| Pair($bf16(a.0), $bf16(a.1))),
        }
    };
}
macro_rules! each2 {
    ($half:expr, $f16:expr, $bf16:expr) => {
        match ($half.is_bf16, $half.packed) {
            (false, false) => pick2(|a: u16, b: u16| $f16(a, b)),
            (false, true) => pick2(|a: Pair, b: Pair| Pair($f16(a.0, b.0), $f16(a.1, b.1))),
            (true, false) => pick2(|a: u16, b: u16| $bf16(a, b)),
            (true, true) => pick2(|a: Pair, b: Pair| Pair($bf16(a.0, b.0), $bf16(a.1, b.1))),
        }
    };
}

macro_rules! in_f32 {
    ($name:ident, $from:ident, $to:ident, |$a:ident, $b:ident| $e:expr) => {
        #[inline(always)]
        fn $name(a: u16, b: u16) -> u16 {
            let ($a, $b) = ($from(a), $from(b));
            $to($e)
        }
    };
}
in_f32!(add_f16, f16_to_f32, f32_to_f16, |a, b| a + b);
in_f32!(sub_f16, f16_to_f32, f32_to_f16, |a, b| a - b);
in_f32!(mul_f16, f16_to_f32, f32_to_f16, |a, b| a * b);

/// bf16 values reach f32's whole range: sums of them need f64 and rounding to odd.
#[inline(always)]
fn narrow_bf16(value: f64) -> u16 {
    format::BF16.round(value, Rounding::Nearest, false) as u16
}
#[inline(always)]
fn wide_bf16(pattern: u16) -> f64 {
    f64::from(bf16_to_f32(pattern))
}
#[inline(always)]
fn add_bf16(a: u16, b: u16) -> u16 {
    narrow_bf16(add_to_odd(wide_bf16(a), wide_bf16(b)))
}
#[inline(always)]
fn sub_bf16(a: u16, b: u16) -> u16 {
    narrow_bf16(add_to_odd(wide_bf16(a), -wide_bf16(b)))
}
#[inline(always)]
fn mul_bf16(a: u16, b: u16) -> u16 {
    narrow_bf16(wide_bf16(a) * wide_bf16(b))
}
#[inline(always)]
fn fma_bf16(a: u16, b: u16, c: u16) -> u16 {
    narrow_bf16(add_to_odd(wide_bf16(a) * wide_bf16(b), wide_bf16(c)))
}
#[inline(always)]
fn fma_f16(a: u16, b: u16, c: u16) -> u16 {
    let wide = |x: u16| f64::from(f16_to_f32(x));
    format::F16.round(wide(a) * wide(b) + wide(c), Rounding::Nearest, false) as u16
}

/// add, sub, mul.
pub fn binary(op: &str, half: Half) -> Option<LaneFn> {
    Some(match op {
        "add" => each2!(half, add_f16, add_bf16),
        "sub" => each2!(half, sub_f16, sub_bf16),
        "mul" => each2!(half, mul_f16, mul_bf16),
        _ => return None,
    })
}

/// fma.
pub fn fma(half: Half) -> LaneFn {
    match (half.is_bf16, half.packed) {
        (false, false) => pick3(fma_f16),
        (false, true) => pick3(|a: Pair, b: Pair, c: Pair| Pair(fma_f16(a.0, b.0, c.0), fma_f16(a.1, b.1, c.1))),
        (true, false) => pick3(fma_bf16),
        (true, true) => pick3(|a: Pair, b: Pair, c: Pair| Pair(fma_bf16(a.0, b.0, c.0), fma_bf16(a.1, b.1, c.1))),
    }
}

/// Magnitude above infinity's: NaN.
#[inline(always)]
fn is_nan<const INF: u16>(a: u16) -> bool {
    a & 0x7fff > INF
}

/// Ordered key: the patterns of numbers compare as the numbers, -0 below +0.
#[inline(always)]
fn key(a: u16) -> i16 {
    let a = a as i16;
    a ^ ((a >> 15) & 0x7fff)
}

#[inline(always)]
fn extremum<const INF: u16, const MAX: bool, const NAN: bool>(a: u16, b: u16) -> u16 {
    match (is_nan::<INF>(a), is_nan::<INF>(b)) {
        (true, true) => 0x7fff,
        (true, false) => {
            if NAN {
                0x7fff
            } else {
                b
            }
        }
        (false, true) => {
            if NAN {
                0x7fff
            } else {
                a
            }
        }
        (false, false) => {
            if (key(a) > key(b)) == MAX {
                a
            } else {
                b
            }
        }
    }
}

#[inline(always)]
fn xor_sign<const INF: u16, const MAX: bool, const NAN: bool>(a: u16, b: u16) -> u16 {
    extremum::<INF, MAX, NAN>(a & 0x7fff, b & 0x7fff) & 0x7fff | (a ^ b) & 0x8000
}

const INF16: u16 = 0x7c00;
const INFB: u16 = 0x7f80;

/// min and max: -0 below +0; NaN loses, or wins with `.NaN`; `.xorsign.abs` compares magnitudes.
pub fn min_max(max: bool, nan: bool, xorsign: bool, half: Half) -> LaneFn {
    match (max, nan, xorsign) {
        (false, false, false) => each2!(half, extremum::<INF16, false, false>, extremum::<INFB, false, false>),
        (true, false, false) => each2!(half, extremum::<INF16, true, false>, extremum::<INFB, true, false>),
        (false, true, false) => each2!(half, extremum::<INF16, false, true>, extremum::<INFB, false, true>),
        (true, true, false) => each2!(half, extremum::<INF16, true, true>, extremum::<INFB, true, true>),
        (false, false, true) => each2!(half, xor_sign::<INF16, false, false>, xor_sign::<INFB, false, false>),
        (true, false, true) => each2!(half, xor_sign::<INF16, true, false>, xor_sign::<INFB, true, false>),
        (false, true, true) => each2!(half, xor_sign::<INF16, false, true>, xor_sign::<INFB, false, true>),
        (true, true, true) => each2!(half, xor_sign::<INF16, true, true>, xor_sign::<INFB, true, true>),
    }
}

/// abs, neg: bits only.
pub fn sign(op: &str, half: Half) -> Option<LaneFn> {
    #[inline(always)]
    fn abs(a: u16) -> u16 {
        a & 0x7fff
    }
    #[inline(always)]
    fn neg(a: u16) -> u16 {
        a ^ 0x8000
    }
    Some(match op {
        "abs" => each1!(half, abs, abs),
        "neg" => each1!(half, neg, neg),
        _ => return None,
    })
}

/// `ex2.approx` and `tanh.approx`.
pub fn approximate(op: &str, half: Half) -> Option<LaneFn> {
    #[inline(always)]
    fn through(a: u16, is_bf16: bool, f: fn(f64) -> f64) -> u16 {
        let (wide, format) =
            if is_bf16 { (wide_bf16(a), format::BF16) } else { (f64::from(f16_to_f32(a)), format::F16) };
        format.round(f(wide), Rounding::Nearest, false) as u16
    }
    Some(match op {
        "ex2" => each1!(half, |a| through(a, false, f64::exp2), |a| through(a, true, f64::exp2)),
        "tanh" => each1!(half, |a| through(a, false, f64::tanh), |a| through(a, true, f64::tanh)),
        _ => return None,
    })
}

/// `.ftz`: f16 subnormals as zero of their sign. bf16 keeps its subnormals in every instruction that says `.ftz` of f16
/// only; where bf16 may say it (`ex2`), the same rule holds.
pub fn flush(half: Half) -> LaneFn {
    #[inline(always)]
    fn f16(a: u16) -> u16 {
        if a & 0x7c00 == 0 { a & 0x8000 } else { a }
    }
    #[inline(always)]
    fn bf16(a: u16) -> u16 {
        if a & 0x7f80 == 0 { a & 0x8000 } else { a }
    }
    each1!(half, f16, bf16)
}

/// `.sat`: clamped to [0, 1], NaN becomes +0.
pub fn saturate(half: Half) -> LaneFn {
    #[inline(always)]
    fn clamp<const INF: u16, const ONE: u16>(a: u16) -> u16 {
        if a & 0x8000 != 0 || is_nan::<INF>(a) { 0 } else { a.min(ONE) }
    }
    each1!(half, clamp::<INF16, 0x3c00>, clamp::<INFB, 0x3f80>)
}

/// `.relu`: negative becomes +0, NaN becomes the canonical NaN.
pub fn relu(half: Half) -> LaneFn {
    #[inline(always)]
    fn clamp<const INF: u16>(a: u16) -> u16 {
        if is_nan::<INF>(a) {
            0x7fff
        } else if a & 0x8000 != 0 {
            0
        } else {
            a
        }
    }
    each1!(half, clamp::<INF16>, clamp::<INFB>)
}
