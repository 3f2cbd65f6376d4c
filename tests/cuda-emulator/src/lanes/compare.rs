//! Comparisons of `setp` and `set`.

use super::{CompareFn, pick_mask};
use crate::numerics::format::{bf16_to_f32, f16_to_f32};
use crate::ptx::types::Type;

use super::float::flushed;
use super::integer::by_integer;

macro_rules! floats {
    ($op:expr, |$a:ident: $t:ty| $to:expr) => {{
        macro_rules! cmp {
            ($x:ident, $y:ident => $e:expr) => {
                pick_mask(|x: $t, y: $t| {
                    let $x = {
                        let $a = x;
                        $to
                    };
                    let $y = {
                        let $a = y;
                        $to
                    };
                    $e
                })
            };
        }
        Some(match $op {
            "eq" => cmp!(a, b => a == b),
            "ne" => cmp!(a, b => a != b && !a.is_nan() && !b.is_nan()),
            "lt" => cmp!(a, b => a < b),
            "le" => cmp!(a, b => a <= b),
            "gt" => cmp!(a, b => a > b),
            "ge" => cmp!(a, b => a >= b),
            "equ" => cmp!(a, b => a == b || a.is_nan() || b.is_nan()),
            "neu" => cmp!(a, b => a != b),
            "ltu" => cmp!(a, b => !(a >= b)),
            "leu" => cmp!(a, b => !(a > b)),
            "gtu" => cmp!(a, b => !(a <= b)),
            "geu" => cmp!(a, b => !(a < b)),
            "num" => cmp!(a, b => !a.is_nan() && !b.is_nan()),
            "nan" => cmp!(a, b => a.is_nan() || b.is_nan()),
            _ => return None,
        })
    }};
}

/// The comparison of an operator and type.
#[allow(clippy::neg_cmp_op_on_partial_ord)]
pub fn pick(op: &str, ty: Type, ftz: bool) -> Option<CompareFn> {
    match ty {
        Type::F32 if ftz => floats!(op, |a: f32| flushed(a)),
        Type::F32 => floats!(op, |a: f32| a),
        Type::F64 => floats!(op, |a: f64| a),
        Type::F16 if ftz => floats!(op, |a: u16| f16_to_f32(if a & 0x7c00 == 0 { a & 0x8000 } else { a })),
        Type::F16 => floats!(op, |a: u16| f16_to_f32(a)),
        Type::BF16 => floats!(op, |a: u16| bf16_to_f32(a)),
        _ => {
            // lo, ls, hi, hs are the unsigned spellings.
            let op = match op {
                "lo" => "lt",
                "ls" => "le",
                "hi" => "gt",
                "hs" => "ge",
                other => other,
            };
            match op {
                "eq" => by_integer!(ty, T => pick_mask(|a: T, b: T| a == b)),
                "ne" => by_integer!(ty, T => pick_mask(|a: T, b: T| a != b)),
                "lt" => by_integer!(ty, T => pick_mask(|a: T, b: T| a < b)),
                "le" => by_integer!(ty, T => pick_mask(|a: T, b: T| a <= b)),
                "gt" => by_integer!(ty, T => pick_mask(|a: T, b: T| a > b)),
                "ge" => by_integer!(ty, T => pick_mask(|a: T, b: T| a >= b)),
                _ => None,
            }
        }
    }
}
