//! f32 and f64 arithmetic. Results that are NaN are NVIDIA's canonical NaN in f32.
//!
//! To nearest, the common operations exist with `.ftz` and `.sat` built in; for the rest the decoder puts [`flush`] and
//! [`saturate`] before and after.

use super::{LaneFn, pick1, pick2, pick3};
use crate::numerics::approx::{self, canonical};
use crate::numerics::rounding::{self, Rounding};
use crate::ptx::types::Type;

/// A subnormal as zero of its sign.
#[inline(always)]
pub fn flushed(x: f32) -> f32 {
    let bits = x.to_bits();
    if bits & 0x7f80_0000 == 0 { f32::from_bits(bits & 0x8000_0000) } else { x }
}

/// Clamped to [0, 1]; NaN becomes +0.
#[inline(always)]
pub fn saturated(x: f32) -> f32 {
    if x >= 1.0 {
        1.0
    } else if x > 0.0 {
        x
    } else {
        0.0
    }
}

macro_rules! flagged2 {
    ($ftz:expr, $sat:expr, |$a:ident, $b:ident| $e:expr) => {
        match ($ftz, $sat) {
            (false, false) => pick2(|$a: f32, $b: f32| canonical($e)),
            (false, true) => pick2(|$a: f32, $b: f32| saturated($e)),
            (true, false) => pick2(|$a: f32, $b: f32| {
                let ($a, $b) = (flushed($a), flushed($b));
                flushed(canonical($e))
            }),
            (true, true) => pick2(|$a: f32, $b: f32| {
                let ($a, $b) = (flushed($a), flushed($b));
                flushed(saturated($e))
            }),
        }
    };
}

/// add, sub, mul of f32 to nearest.
pub fn binary32(op: &str, ftz: bool, sat: bool) -> Option<LaneFn> {
    Some(match op {
        "add" => flagged2!(ftz, sat, |a, b| a + b),
        "sub" => flagged2!(ftz, sat, |a, b| a - b),
        "mul" => flagged2!(ftz, sat, |a, b| a * b),
        _ => return None,
    })
}

/// fma of f32 to nearest.
pub fn fma32(ftz: bool, sat: bool) -> LaneFn {
    match (ftz, sat) {
        (false, false) => pick3(|a: f32, b: f32, c: f32| canonical(a.mul_add(b, c))),
        (false, true) => pick3(|a: f32, b: f32, c: f32| saturated(a.mul_add(b, c))),
        (true, false) => pick3(|a: f32, b: f32, c: f32| flushed(canonical(flushed(a).mul_add(flushed(b), flushed(c))))),
        (true, true) => pick3(|a: f32, b: f32, c: f32| flushed(saturated(flushed(a).mul_add(flushed(b), flushed(c))))),
    }
}

macro_rules! by_direction {
    ($rounding:expr, $mode:ident => $e:expr) => {
        match $rounding {
            Rounding::Zero => {
                const $mode: Rounding = Rounding::Zero;
                $e
            }
            Rounding::Down => {
                const $mode: Rounding = Rounding::Down;
                $e
            }
            Rounding::Up => {
                const $mode: Rounding = Rounding::Up;
                $e
            }
            _ => {
                const $mode: Rounding = Rounding::Nearest;
                $e
            }
        }
    };
}
pub(crate) use by_direction;

/// add, sub, mul, div, fma, sqrt, rcp of f32 in any direction, without `.ftz` and `.sat`.
pub fn rounded32(op: &str, direction: Rounding) -> Option<LaneFn> {
    Some(by_direction!(direction, M => match op {
        "add" => pick2(|a: f32, b: f32| canonical(rounding::add32(a, b, M))),
        "sub" => pick2(|a: f32, b: f32| canonical(rounding::add32(a, -b, M))),
        "mul" => pick2(|a: f32, b: f32| canonical(rounding::mul32(a, b, M))),
        "div" => pick2(|a: f32, b: f32| canonical(rounding::div32(a, b, M))),
        "fma" => pick3(|a: f32, b: f32, c: f32| canonical(rounding::fma32(a, b, c, M))),
        "sqrt" => pick1(|a: f32| canonical(rounding::sqrt32(a, M))),
        "rcp" => pick1(|a: f32| canonical(rounding::div32(1.0, a, M))),
        _ => return None,
    }))
}

/// The same of f64.
pub fn rounded64(op: &str, direction: Rounding) -> Option<LaneFn> {
    Some(match (op, direction) {
        ("add", Rounding::Nearest) => pick2(|a: f64, b: f64| a + b),
        ("sub", Rounding::Nearest) => pick2(|a: f64, b: f64| a - b),
        ("mul", Rounding::Nearest) => pick2(|a: f64, b: f64| a * b),
        ("fma", Rounding::Nearest) => pick3(|a: f64, b: f64, c: f64| a.mul_add(b, c)),
        _ => by_direction!(direction, M => match op {
            "add" => pick2(|a: f64, b: f64| rounding::fma64(a, 1.0, b, M)),
            "sub" => pick2(|a: f64, b: f64| rounding::fma64(a, 1.0, -b, M)),
            "mul" => pick2(|a: f64, b: f64| rounding::fma64(a, b, if a.is_sign_negative() != b.is_sign_negative() { -0.0 } else { 0.0 }, M)),
            "div" => pick2(|a: f64, b: f64| rounding::div64(a, b, M)),
            "fma" => pick3(|a: f64, b: f64, c: f64| rounding::fma64(a, b, c, M)),
            "sqrt" => pick1(|a: f64| rounding::sqrt64(a, M)),
            "rcp" => pick1(|a: f64| rounding::div64(1.0, a, M)),
            _ => return None,
        }),
    })
}

#[inline(always)]
fn min32(a: f32, b: f32) -> f32 {
    if a.is_nan() {
        canonical(b)
    } else if b.is_nan() || a < b || (a == b && a.is_sign_negative()) {
        a
    } else {
        b
    }
}

#[inline(always)]
fn max32(a: f32, b: f32) -> f32 {
    if a.is_nan() {
        canonical(b)
    } else if b.is_nan() || a > b || (a == b && a.is_sign_positive()) {
        a
    } else {
        b
    }
}

#[inline(always)]
fn nan_or(a: f32, b: f32, value: f32) -> f32 {
    if a.is_nan() || b.is_nan() { f32::from_bits(0x7fff_ffff) } else { value }
}

/// min and max of f32: -0 below +0; NaN loses, or wins with `.NaN`; `.xorsign.abs` compares magnitudes.
pub fn extremum32(max: bool, nan: bool, xorsign: bool) -> LaneFn {
    #[inline(always)]
    fn xor_sign(a: f32, b: f32, magnitude: f32) -> f32 {
        f32::from_bits(magnitude.to_bits() & 0x7fff_ffff | (a.to_bits() ^ b.to_bits()) & 0x8000_0000)
    }
    match (max, nan, xorsign) {
        (false, false, false) => pick2(min32),
        (true, false, false) => pick2(max32),
        (false, true, false) => pick2(|a: f32, b: f32| nan_or(a, b, min32(a, b))),
        (true, true, false) => pick2(|a: f32, b: f32| nan_or(a, b, max32(a, b))),
        (false, false, true) => pick2(|a: f32, b: f32| xor_sign(a, b, min32(a.abs(), b.abs()))),
        (true, false, true) => pick2(|a: f32, b: f32| xor_sign(a, b, max32(a.abs(), b.abs()))),
        (false, true, true) => pick2(|a: f32, b: f32| nan_or(a, b, xor_sign(a, b, min32(a.abs(), b.abs())))),
        (true, true, true) => pick2(|a: f32, b: f32| nan_or(a, b, xor_sign(a, b, max32(a.abs(), b.abs())))),
    }
}

/// min and max of f64.
pub fn extremum64(max: bool) -> LaneFn {
    if max {
        pick2(|a: f64, b: f64| if a.is_nan() || b > a || (a == b && b.is_sign_positive()) { b } else { a })
    } else {
        pick2(|a: f64, b: f64| if a.is_nan() || b < a || (a == b && b.is_sign_negative()) { b } else { a })
    }
}

/// abs, neg, copysign.
pub fn sign(op: &str, ty: Type) -> Option<LaneFn> {
    Some(match (op, ty) {
        ("abs", Type::F32) => pick1(|a: u32| a & 0x7fff_ffff),
        ("neg", Type::F32) => pick1(|a: u32| a ^ 0x8000_0000),
        ("copysign", Type::F32) => pick2(|a: u32, b: u32| a & 0x8000_0000 | b & 0x7fff_ffff),
        ("abs", Type::F64) => pick1(|a: u64| a & !(1 << 63)),
        ("neg", Type::F64) => pick1(|a: u64| a ^ 1 << 63),
        ("copysign", Type::F64) => pick2(|a: u64, b: u64| a & 1 << 63 | b & !(1 << 63)),
        _ => return None,
    })
}

/// `testp`: 1 or 0 in each lane.
pub fn classify(class: &str, wide: bool) -> Option<LaneFn> {
    macro_rules! test {
        ($f:ident) => {
            if wide { pick1(|a: f64| u32::from(a.$f())) } else { pick1(|a: f32| u32::from(a.$f())) }
        };
    }
    Some(match class {
        "finite" => test!(is_finite),
        "infinite" => test!(is_infinite),
        "notanumber" => test!(is_nan),
        "subnormal" => test!(is_subnormal),
        "normal" => test!(is_normal),
        "number" if wide => pick1(|a: f64| u32::from(!a.is_nan())),
        "number" => pick1(|a: f32| u32::from(!a.is_nan())),
        _ => return None,
    })
}

/// The `.approx` functions of f32.
pub fn approximate(op: &str) -> Option<LaneFn> {
    Some(match op {
        "ex2" => pick1(approx::exp2),
        "lg2" => pick1(approx::log2),
        "rsqrt" => pick1(approx::rsqrt),
        "rcp" => pick1(approx::rcp),
        "sqrt" => pick1(approx::sqrt),
        "sin" => pick1(approx::sin),
        "cos" => pick1(approx::cos),
        "tanh" => pick1(approx::tanh),
        "div" => pick2(approx::div_narrow),
        "div.full" => pick2(approx::div),
        _ => return None,
    })
}

/// `rcp.approx.ftz.f64`, `rsqrt.approx.ftz.f64` and `rsqrt.approx.f64`.
pub fn approximate64(op: &str, ftz: bool) -> Option<LaneFn> {
    Some(match (op, ftz) {
        ("rcp", true) => pick1(approx::rcp_ftz_f64),
        ("rsqrt", true) => pick1(approx::rsqrt_ftz_f64),
        ("rsqrt", false) => pick1(|a: f64| 1.0 / a.sqrt()),
        _ => return None,
    })
}

/// `.ftz` on one operand or result.
pub fn flush() -> LaneFn {
    pick1(flushed)
}

/// `.sat` on a result.
pub fn saturate(wide: bool) -> LaneFn {
    if wide {
        pick1(|a: f64| {
            if a >= 1.0 {
                1.0
            } else if a > 0.0 {
                a
            } else {
                0.0
            }
        })
    } else {
        pick1(saturated)
    }
}

/// `.relu` on an f32 result: negative becomes +0, NaN stays.
pub fn relu() -> LaneFn {
    pick1(|a: f32| if a <= 0.0 { 0.0 } else { canonical(a) })
}
