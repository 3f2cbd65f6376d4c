//! Directed rounding, without touching the processor's rounding mode.
//!
//! f32 results come from an f64 that was rounded to odd: with 53 ≥ 24 + 2 bits the second rounding is then exact in every
//! direction (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd").
//! f64 results come from integer arithmetic on the exact product and sum.

/// A rounding direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rounding {
    /// To nearest, ties to even (`.rn`).
    Nearest,
    /// Toward zero (`.rz`).
    Zero,
    /// Toward minus infinity (`.rm`).
    Down,
    /// Toward plus infinity (`.rp`).
    Up,
    /// To nearest, ties away from zero (`.rna`).
    Away,
}

impl Rounding {
    /// Whether a magnitude is raised to the next, given its sign, its last bit, and what was cut off: `half` is the first
    /// bit cut, `rest` whether any further bit was set.
    #[inline(always)]
    pub fn raises(self, negative: bool, odd: bool, half: bool, rest: bool) -> bool {
        match self {
            Rounding::Nearest => half && (rest || odd),
            Rounding::Zero => false,
            Rounding::Down => negative && (half || rest),
            Rounding::Up => !negative && (half || rest),
            Rounding::Away => half,
        }
    }
}

/// `sum` rounded to odd, where `exact = sum + error`.
#[inline]
fn to_odd(sum: f64, error: f64) -> f64 {
    if error == 0.0 || error.is_nan() || !sum.is_finite() || sum.to_bits() & 1 == 1 {
        return sum;
    }
    // The exact value lies between `sum` and its neighbour toward the error; the odd one of the two is that neighbour.
    let toward_zero = (error < 0.0) == (sum > 0.0);
    f64::from_bits(if toward_zero { sum.to_bits() - 1 } else { sum.to_bits() + 1 })
}

/// `a + b` rounded to odd in f64.
#[inline]
pub fn add_to_odd(a: f64, b: f64) -> f64 {
    let sum = a + b;
    let b_part = sum - a;
    let error = (a - (sum - b_part)) + (b - b_part);
    to_odd(sum, error)
}

/// `a * b + c` of f32 values, rounded once.
pub fn fma32(a: f32, b: f32, c: f32, rounding: Rounding) -> f32 {
    let (product, c) = (f64::from(a) * f64::from(b), f64::from(c));
    if !product.is_finite() || !c.is_finite() {
        return (product + c) as f32;
    }
    if product == 0.0 && c == 0.0 || product == -c {
        // Exact zeros: the sign is that of both terms, or by the direction.
        if product == 0.0 && product.is_sign_negative() == c.is_sign_negative() {
            return product as f32;
        }
        return if rounding == Rounding::Down { -0.0 } else { 0.0 };
    }
    narrow(add_to_odd(product, c), rounding)
}

/// `a + b` of f32 values.
pub fn add32(a: f32, b: f32, rounding: Rounding) -> f32 {
    fma32(a, 1.0, b, rounding)
}

/// `a * b` of f32 values.
pub fn mul32(a: f32, b: f32, rounding: Rounding) -> f32 {
    narrow(f64::from(a) * f64::from(b), rounding)
}

/// `a / b` of f32 values.
pub fn div32(a: f32, b: f32, rounding: Rounding) -> f32 {
    let (a, b) = (f64::from(a), f64::from(b));
    let quotient = a / b;
    if quotient == 0.0 || !quotient.is_finite() || b.is_infinite() {
        return quotient as f32;
    }
    let residual = (-quotient).mul_add(b, a);
    narrow(to_odd(quotient, if b < 0.0 { -residual } else { residual }), rounding)
}

/// Square root of an f32 value.
pub fn sqrt32(a: f32, rounding: Rounding) -> f32 {
    let a = f64::from(a);
    let root = a.sqrt();
    if root == 0.0 || !root.is_finite() {
        return root as f32;
    }
    narrow(to_odd(root, (-root).mul_add(root, a)), rounding)
}

/// An f64 as f32, in the given direction.
pub fn narrow(value: f64, rounding: Rounding) -> f32 {
    let nearest = value as f32;
    if rounding == Rounding::Nearest || value.is_nan() || value.is_infinite() || f64::from(nearest) == value {
        return nearest;
    }
    let above = f64::from(nearest) > value;
    let want_below = match rounding {
        Rounding::Zero => value > 0.0,
        Rounding::Down => true,
        _ => false,
    };
    match (above, want_below) {
        (true, true) => nearest.next_down(),
        (false, false) => nearest.next_up(),
        _ => nearest,
    }
}

/// Sign, exponent of the last bit, and mantissa of a finite nonzero f64.
fn parts(value: f64) -> (bool, i32, u64) {
    let bits = value.to_bits();
    let biased = (bits >> 52 & 0x7ff) as i32;
    let fraction = bits & ((1 << 52) - 1);
    if biased == 0 { (bits >> 63 == 1, -1074, fraction) } else { (bits >> 63 == 1, biased - 1075, fraction | 1 << 52) }
}

/// Rounds `magnitude * 2^exponent` (plus something below it if `sticky`) to f64.
fn assemble(negative: bool, exponent: i32, magnitude: u128, sticky: bool, rounding: Rounding) -> f64 {
    let top = 127 - magnitude.leading_zeros() as i32;
    // The last bit kept: 53 bits, or the subnormal unit.
    let last = (top + exponent - 52).max(-1074);
    let cut = last - exponent;
    let (kept, half, rest) = if cut <= 0 {
        ((magnitude << -cut) as u64, false, sticky)
    } else if cut > 127 {
        (0, false, true)
    } else {
        let low = magnitude & ((1 << cut) - 1);
        let half = low >> (cut - 1) & 1 == 1;
        ((magnitude >> cut) as u64, half, low & ((1 << (cut - 1)) - 1) != 0 || sticky)
    };
    let raised = kept + u64::from(rounding.raises(negative, kept & 1 == 1, half, rest));
    let (kept, last) = if raised >> 53 == 1 { (raised >> 1, last + 1) } else { (raised, last) };
    let bits = if kept >> 52 == 0 {
        kept
    } else if last + 1075 >= 0x7ff {
        let infinite = match rounding {
            Rounding::Nearest | Rounding::Away => true,
            Rounding::Zero => false,
            Rounding::Down => negative,
            Rounding::Up => !negative,
        };
        if infinite { 0x7ff << 52 } else { (0x7ff << 52) - 1 }
    } else {
        ((last + 1075) as u64) << 52 | (kept & ((1 << 52) - 1))
    };
    f64::from_bits(bits | u64::from(negative) << 63)
}

/// `a * b + c` of f64 values, rounded once in the given direction.
pub fn fma64(a: f64, b: f64, c: f64, rounding: Rounding) -> f64 {
    let nearest = a.mul_add(b, c);
    let product_zero = a == 0.0 || b == 0.0;
    if rounding == Rounding::Nearest || !a.is_finite() || !b.is_finite() || !c.is_finite() {
        return nearest;
    }
    if product_zero {
        let product = a * b;
        return if c != 0.0 || product.is_sign_negative() == c.is_sign_negative() {
            c
        } else if rounding == Rounding::Down {
            -0.0
        } else {
            0.0
        };
    }
    let ((sa, ea, ma), (sb, eb, mb)) = (parts(a), parts(b));
    let (mut sign, mut exponent, mut sum) = (sa != sb, ea + eb, u128::from(ma) * u128::from(mb));
    let mut sticky = false;
    if c != 0.0 {
        let (sc, ec, mc) = parts(c);
        let mut addend = u128::from(mc);
        // Line both up at 126 bits, the larger first; what falls off the smaller is only known to be there.
        let (up, uc) = (sum.leading_zeros() as i32 - 2, addend.leading_zeros() as i32 - 2);
        let (top_p, top_c) = (exponent - up, ec - uc);
        let common = if 126 + top_p >= 126 + top_c { top_p } else { top_c };
        sum <<= up;
        addend <<= uc;
        for (value, at) in [(&mut sum, top_p), (&mut addend, top_c)] {
            let shift = common - at;
            if shift > 0 {
                let lost = if shift > 127 { *value } else { *value & ((1u128 << shift) - 1) };
                *value = if shift > 127 { 0 } else { *value >> shift };
                sticky |= lost != 0;
                // A value below the cut counts as an odd last bit, so that a difference rounds to the right side.
                *value |= u128::from(lost != 0);
            }
        }
        exponent = common;
        if sign == sc {
            sum += addend;
        } else if sum >= addend {
            sum -= addend;
        } else {
            sum = addend - sum;
            sign = sc;
        }
    }
    if sum == 0 {
        return if rounding == Rounding::Down { -0.0 } else { 0.0 };
    }
    assemble(sign, exponent, sum, sticky, rounding)
}

/// `a / b` of f64 values.
pub fn div64(a: f64, b: f64, rounding: Rounding) -> f64 {
    let nearest = a / b;
    if rounding == Rounding::Nearest || a == 0.0 || b == 0.0 || !a.is_finite() || !b.is_finite() {
        return nearest;
    }
    let ((sa, ea, ma), (sb, eb, mb)) = (parts(a), parts(b));
    // 64 quotient bits at least: both mantissas normalised to 53 bits first.
    let (la, lb) = (ma.leading_zeros() - 11, mb.leading_zeros() - 11);
    let (numerator, divisor) = (u128::from(ma << la) << 64, u128::from(mb << lb));
    let exponent = ea - la as i32 - 64 - (eb - lb as i32);
    assemble(sa != sb, exponent, numerator / divisor, numerator % divisor != 0, rounding)
}

/// Square root of an f64 value.
pub fn sqrt64(a: f64, rounding: Rounding) -> f64 {
    let nearest = a.sqrt();
    if rounding == Rounding::Nearest || a.is_nan() || a <= 0.0 || a.is_infinite() {
        return nearest;
    }
    let residual = (-nearest).mul_add(nearest, a);
    let nearest_is_above = residual < 0.0;
    match rounding {
        Rounding::Zero | Rounding::Down if nearest_is_above => nearest.next_down(),
        Rounding::Up if residual > 0.0 => nearest.next_up(),
        _ => nearest,
    }
}
