//! Formats narrower than f32 as bit patterns: f16, bf16, tf32, e4m3, e5m2; one rounding from an f64 or an integer.

use super::rounding::Rounding;

/// A binary floating-point format of at most 32 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Format {
    /// Bits of the exponent.
    pub exponent_bits: u32,
    /// Bits of the fraction.
    pub fraction_bits: u32,
    /// e4m3: no infinities, one NaN pattern, the top exponent holds numbers.
    pub finite_only: bool,
}

/// IEEE binary16.
pub const F16: Format = Format { exponent_bits: 5, fraction_bits: 10, finite_only: false };
/// bfloat16.
pub const BF16: Format = Format { exponent_bits: 8, fraction_bits: 7, finite_only: false };
/// The tensor cores' 19-bit format (held in the high bits of 32; see [`tf32_from_f32`]).
pub const TF32: Format = Format { exponent_bits: 8, fraction_bits: 10, finite_only: false };
/// OCP FP8 E4M3.
pub const E4M3: Format = Format { exponent_bits: 4, fraction_bits: 3, finite_only: true };
/// OCP FP8 E5M2.
pub const E5M2: Format = Format { exponent_bits: 5, fraction_bits: 2, finite_only: false };

impl Format {
    const fn bias(self) -> i32 {
        (1 << (self.exponent_bits - 1)) - 1
    }
    const fn sign_shift(self) -> u32 {
        self.exponent_bits + self.fraction_bits
    }
    /// The pattern of infinity's magnitude (for e4m3 its NaN).
    const fn top(self) -> u32 {
        if self.finite_only {
            (1 << self.sign_shift()) - 1
        } else {
            ((1 << self.exponent_bits) - 1) << self.fraction_bits
        }
    }
    /// The canonical NaN of NVIDIA's units: all ones below the sign.
    pub const fn nan(self) -> u32 {
        (1 << self.sign_shift()) - 1
    }
    /// The largest finite magnitude.
    pub const fn max(self) -> u32 {
        self.top() - 1
    }

    /// Rounds an f64 once. Overflow gives infinity (or the largest number, by direction); with `saturate` always the
    /// largest number. Formats without infinity saturate.
    pub fn round(self, value: f64, rounding: Rounding, saturate: bool) -> u32 {
        let bits = value.to_bits();
        let negative = bits >> 63 == 1;
        let sign = u32::from(negative) << self.sign_shift();
        if value.is_nan() {
            return self.nan();
        }
        if value.is_infinite() {
            return sign | if saturate || self.finite_only { self.max() } else { self.top() };
        }
        let biased = (bits >> 52 & 0x7ff) as i32;
        let mantissa = if biased == 0 { bits & ((1 << 52) - 1) } else { bits & ((1 << 52) - 1) | 1 << 52 };
        let exponent = biased.max(1) - 1023;
        // The last bit kept, as a power of two.
        let last = (exponent - self.fraction_bits as i32).max(1 - self.bias() - self.fraction_bits as i32);
        let cut = last - (exponent - 52);
        let (kept, half, rest) = if cut > 63 {
            (0, false, mantissa != 0)
        } else {
            let low = mantissa & ((1 << cut) - 1);
            (mantissa >> cut, low >> (cut - 1) & 1 == 1, low & ((1 << (cut - 1)) - 1) != 0)
        };
        let kept = kept as u32 + u32::from(rounding.raises(negative, kept & 1 == 1, half, rest));
        // Biased exponent of a normal number minus one, so that the hidden bit adds the one; carries fall into place.
        let pattern = (((last + self.fraction_bits as i32 + self.bias() - 1) as u32) << self.fraction_bits) + kept;
        if pattern <= self.max() {
            return sign | pattern;
        }
        let away = match rounding {
            Rounding::Nearest | Rounding::Away => true,
            Rounding::Zero => false,
            Rounding::Down => negative,
            Rounding::Up => !negative,
        };
        sign | if away && !saturate && !self.finite_only { self.top() } else { self.max() }
    }

    /// The value of a pattern.
    pub fn value(self, pattern: u32) -> f64 {
        let negative = pattern >> self.sign_shift() & 1 == 1;
        let magnitude = pattern & ((1 << self.sign_shift()) - 1);
        let fraction = magnitude & ((1 << self.fraction_bits) - 1);
        let exponent = (magnitude >> self.fraction_bits) as i32;
        let value = if self.finite_only && magnitude == self.nan() {
            f64::NAN
        } else if !self.finite_only && magnitude >= self.top() {
            if fraction == 0 { f64::INFINITY } else { f64::NAN }
        } else {
            let scale = exponent.max(1) - self.bias() - self.fraction_bits as i32;
            let hidden = if exponent == 0 { 0 } else { 1 << self.fraction_bits };
            f64::from(fraction | hidden) * f64::from_bits(((1023 + scale) as u64) << 52)
        };
        if negative { -value } else { value }
    }
}

/// f32 bits of a bf16 pattern.
#[inline(always)]
pub fn bf16_to_f32(pattern: u16) -> f32 {
    f32::from_bits(u32::from(pattern) << 16)
}

/// bf16 pattern of an f32, to nearest even; NaN becomes 0x7fff.
#[inline(always)]
pub fn f32_to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16;
    if bits & 0x7fff_ffff > 0x7f80_0000 { 0x7fff } else { rounded }
}

/// f32 value of an f16 pattern, by integer steps that vectorise.
#[inline(always)]
pub fn f16_to_f32(pattern: u16) -> f32 {
    let sign = u32::from(pattern & 0x8000) << 16;
    let magnitude = u32::from(pattern & 0x7fff) << 13;
    // Multiplying by 2^112 rebiases normal and subnormal numbers alike; infinities and NaNs are set apart.
    let scaled = (f32::from_bits(magnitude) * f32::from_bits(0x7780_0000)).to_bits();
    let bits = if magnitude >= 0x0f80_0000 { magnitude | 0x7f80_0000 } else { scaled };
    f32::from_bits(bits | sign)
}

/// f16 pattern of an f32, to nearest even; NaN becomes 0x7fff.
#[inline(always)]
pub fn f32_to_f16(value: f32) -> u16 {
    let bits = value.to_bits();
    let sign = (bits >> 16 & 0x8000) as u16;
    let magnitude = bits & 0x7fff_ffff;
    let normal = (magnitude.wrapping_add(0xc800_0000 + 0xfff + (magnitude >> 13 & 1)) >> 13) as u16;
    // Below 2^-14: adding 0.5 lets the adder round at the subnormal unit 2^-24.
    let tiny = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits()) as u16;
    let finite = if magnitude < 0x3880_0000 { tiny } else { normal };
    let large = if magnitude >= 0x477f_f000 { 0x7c00 } else { finite };
    if magnitude > 0x7f80_0000 { 0x7fff } else { large | sign }
}

/// An f32 rounded to tf32 with ties away (`.rna`) or to even (`.rn`), as f32 bits with 13 zero bits at the end.
pub fn tf32_from_f32(value: f32, rounding: Rounding) -> u32 {
    let bits = value.to_bits();
    if value.is_nan() {
        return 0x7fff_ffff;
    }
    let kept = bits >> 13;
    let low = bits & 0x1fff;
    let raised =
        kept + u32::from(rounding.raises(value.is_sign_negative(), kept & 1 == 1, low >> 12 == 1, low & 0xfff != 0));
    if value.is_infinite() { bits } else { raised << 13 }
}
