//! Bits: and, or, xor, not, moves, population count, bit fields, permutes, funnel shifts.

use super::{LaneFn, pick1, pick2, pick3};
use crate::ptx::types::Type;

/// `and`, `or`, `xor` of 16, 32 or 64 bits.
pub fn binary(op: &str, wide: bool) -> Option<LaneFn> {
    Some(match (op, wide) {
        ("and", false) => pick2(|a: u32, b: u32| a & b),
        ("or", false) => pick2(|a: u32, b: u32| a | b),
        ("xor", false) => pick2(|a: u32, b: u32| a ^ b),
        ("and", true) => pick2(|a: u64, b: u64| a & b),
        ("or", true) => pick2(|a: u64, b: u64| a | b),
        ("xor", true) => pick2(|a: u64, b: u64| a ^ b),
        _ => return None,
    })
}

/// `mov`.
pub fn copy(wide: bool) -> LaneFn {
    if wide { pick1(|a: u64| a) } else { pick1(|a: u32| a) }
}

/// `not` and `cnot`.
pub fn unary(op: &str, ty: Type) -> Option<LaneFn> {
    Some(match (op, ty.bytes()) {
        ("not", 2) => pick1(|a: u16| !a),
        ("not", 4) => pick1(|a: u32| !a),
        ("not", 8) => pick1(|a: u64| !a),
        ("cnot", 2) => pick1(|a: u16| u16::from(a == 0)),
        ("cnot", 4) => pick1(|a: u32| u32::from(a == 0)),
        ("cnot", 8) => pick1(|a: u64| u64::from(a == 0)),
        ("popc", 4) => pick1(|a: u32| a.count_ones()),
        ("popc", 8) => pick1(|a: u64| a.count_ones()),
        ("clz", 4) => pick1(|a: u32| a.leading_zeros()),
        ("clz", 8) => pick1(|a: u64| a.leading_zeros()),
        ("brev", 4) => pick1(|a: u32| a.reverse_bits()),
        ("brev", 8) => pick1(|a: u64| a.reverse_bits()),
        _ => return None,
    })
}

/// `bfind` and `bfind.shiftamt`: position of the highest bit that differs from the sign, or all ones.
pub fn find_highest(ty: Type, shift_amount: bool) -> Option<LaneFn> {
    macro_rules! find {
        ($a:ident) => {
            if $a == 0 { u32::MAX } else { $a.ilog2() }
        };
    }
    macro_rules! amount {
        ($a:ident) => {
            if $a == 0 { u32::MAX } else { $a.leading_zeros() }
        };
    }
    Some(match (ty, shift_amount) {
        (Type::U32, false) => pick1(|a: u32| find!(a)),
        (Type::U64, false) => pick1(|a: u64| find!(a)),
        (Type::S32, false) => pick1(|a: u32| {
            let a = a ^ ((a as i32) >> 31) as u32;
            find!(a)
        }),
        (Type::S64, false) => pick1(|a: u64| {
            let a = a ^ ((a as i64) >> 63) as u64;
            find!(a)
        }),
        (Type::U32, true) => pick1(|a: u32| amount!(a)),
        (Type::U64, true) => pick1(|a: u64| amount!(a)),
        (Type::S32, true) => pick1(|a: u32| {
            let a = a ^ ((a as i32) >> 31) as u32;
            amount!(a)
        }),
        (Type::S64, true) => pick1(|a: u64| {
            let a = a ^ ((a as i64) >> 63) as u64;
            amount!(a)
        }),
        _ => return None,
    })
}

/// `bfe`: a field of `len` bits from `pos` (bits 7..0 of each), sign-extended for signed types.
pub fn field_extract(ty: Type) -> Option<LaneFn> {
    /// The manual's formula: the sign bit is the field's last, or the word's last if the field passes it.
    #[inline(always)]
    fn extract(a: u64, pos: u32, len: u32, signed: bool, bits: u32) -> u64 {
        let (pos, len) = (pos & 255, len & 255);
        let word = if bits == 32 { a & 0xffff_ffff } else { a };
        let last = (pos + len).wrapping_sub(1).min(bits - 1);
        let negative = signed && len > 0 && word >> last & 1 == 1;
        let shifted = if pos >= bits { 0 } else { word >> pos };
        // Bits of the word that the field has from `pos`.
        let have = len.min(bits.saturating_sub(pos));
        let kept = if have >= 64 { shifted } else { shifted & ((1 << have) - 1) };
        if negative && have < 64 { kept | !0 << have } else { kept }
    }
    Some(match ty {
        Type::U32 => pick3(|a: u32, p: u32, n: u32| extract(u64::from(a), p, n, false, 32) as u32),
        Type::S32 => pick3(|a: u32, p: u32, n: u32| extract(u64::from(a), p, n, true, 32) as u32),
        Type::U64 => pick3(|a: u64, p: u32, n: u32| extract(a, p, n, false, 64)),
        Type::S64 => pick3(|a: u64, p: u32, n: u32| extract(a, p, n, true, 64)),
        _ => return None,
    })
}

/// `pos & 255 | (len & 255) << 8`: both operands of a field in one, for [`field_insert`].
pub fn field_pack() -> LaneFn {
    pick2(|pos: u32, len: u32| pos & 255 | (len & 255) << 8)
}

/// `bfi`: inserts the low bits of a into b; the field comes from [`field_pack`].
pub fn field_insert(wide: bool) -> LaneFn {
    if wide {
        pick3(|a: u64, b: u64, field: u32| {
            let (pos, len) = (field & 255, field >> 8);
            if pos >= 64 {
                return b;
            }
            let mask = (if len >= 64 { !0 } else { (1u64 << len) - 1 }) << pos;
            b & !mask | a << pos & mask
        })
    } else {
        pick3(|a: u32, b: u32, field: u32| {
            let (pos, len) = (field & 255, field >> 8);
            if pos >= 32 {
                return b;
            }
            let mask = (if len >= 32 { !0 } else { (1u32 << len) - 1 }) << pos;
            b & !mask | a << pos & mask
        })
    }
}

/// `bmsk`: `len` ones from bit `pos`, both clamped or taken modulo 32.
pub fn bit_mask(wrap: bool) -> LaneFn {
    #[inline(always)]
    fn mask(pos: u32, len: u32) -> u32 {
        let ones = if len >= 32 { !0 } else { (1u32 << len) - 1 };
        if pos >= 32 { 0 } else { ones << pos }
    }
    if wrap { pick2(|a: u32, b: u32| mask(a & 31, b & 31)) } else { pick2(|a: u32, b: u32| mask(a.min(32), b.min(32))) }
}

/// `szext`: sign- or zero-extends the low n bits.
pub fn extend(signed: bool, wrap: bool) -> LaneFn {
    #[inline(always)]
    fn run(a: u32, n: u32, signed: bool) -> u32 {
        if n >= 32 {
            return a;
        }
        let kept = a & ((1u32 << n) - 1);
        if signed && n > 0 && a >> (n - 1) & 1 == 1 { kept | !0 << n } else { kept }
    }
    match (signed, wrap) {
        (false, false) => pick2(|a: u32, n: u32| run(a, n, false)),
        (false, true) => pick2(|a: u32, n: u32| run(a, n & 31, false)),
        (true, false) => pick2(|a: u32, n: u32| run(a, n, true)),
        (true, true) => pick2(|a: u32, n: u32| run(a, n & 31, true)),
    }
}

/// `fns`: the position of the offset-th set bit of a mask from `base`; operands as the manual has them.
pub fn find_nth() -> LaneFn {
    pick3(|mask: u32, base: u32, offset: i32| {
        if base > 31 {
            return u32::MAX;
        }
        if offset == 0 {
            return if mask >> base & 1 == 1 { base } else { u32::MAX };
        }
        let mut left = offset.unsigned_abs();
        let mut at = base as i32;
        while (0..32).contains(&at) {
            if mask >> at & 1 == 1 {
                left -= 1;
                if left == 0 {
                    return at as u32;
                }
            }
            at += offset.signum();
        }
        u32::MAX
    })
}

/// `shf`: funnel shift of the pair high:low.
pub fn funnel(left: bool, wrap: bool) -> LaneFn {
    match (left, wrap) {
        (true, true) => {
            pick3(|lo: u32, hi: u32, n: u32| ((u64::from(hi) << 32 | u64::from(lo)) << (n & 31) >> 32) as u32)
        }
        (true, false) => {
            pick3(|lo: u32, hi: u32, n: u32| ((u64::from(hi) << 32 | u64::from(lo)) << n.min(32) >> 32) as u32)
        }
        (false, true) => pick3(|lo: u32, hi: u32, n: u32| ((u64::from(hi) << 32 | u64::from(lo)) >> (n & 31)) as u32),
        (false, false) => pick3(|lo: u32, hi: u32, n: u32| ((u64::from(hi) << 32 | u64::from(lo)) >> n.min(32)) as u32),
    }
}

/// `prmt` in its modes: the default selects bytes (bit 3 of a selector copies the byte's sign).
pub fn permute(mode: &str) -> Option<LaneFn> {
    #[inline(always)]
    fn byte(a: u32, b: u32, index: u32) -> u32 {
        ((u64::from(b) << 32 | u64::from(a)) >> ((index & 7) * 8)) as u32 & 255
    }
    #[inline(always)]
    fn gather(a: u32, b: u32, index: [u32; 4]) -> u32 {
        byte(a, b, index[0]) | byte(a, b, index[1]) << 8 | byte(a, b, index[2]) << 16 | byte(a, b, index[3]) << 24
    }
    Some(match mode {
        "" => pick3(|a: u32, b: u32, c: u32| {
            let mut out = 0;
            for i in 0..4 {
                let select = c >> (i * 4) & 15;
                let value = byte(a, b, select & 7);
                let signs = if value & 0x80 != 0 { 255 } else { 0 };
                out |= (if select & 8 != 0 { signs } else { value }) << (i * 8);
            }
            out
        }),
        "f4e" => pick3(|a: u32, b: u32, c: u32| {
            let n = c & 3;
            gather(a, b, [n, n + 1, n + 2, n + 3])
        }),
        "b4e" => pick3(|a: u32, b: u32, c: u32| {
            let n = (c & 3) + 8;
            gather(a, b, [n, n - 1, n - 2, n - 3])
        }),
        "rc8" => pick3(|a: u32, b: u32, c: u32| gather(a, b, [c & 3; 4])),
        "ecl" => pick3(|a: u32, b: u32, c: u32| {
            let n = c & 3;
            gather(a, b, [n, n.max(1), n.max(2), 3])
        }),
        "ecr" => pick3(|a: u32, b: u32, c: u32| {
            let n = c & 3;
            gather(a, b, [0, n.min(1), n.min(2), n])
        }),
        "rc16" => pick3(|a: u32, b: u32, c: u32| {
            let n = (c & 1) * 2;
            gather(a, b, [n, n + 1, n, n + 1])
        }),
        _ => return None,
    })
}

/// `slct` on the sign of an integer or float c: a where c ≥ 0 (not where NaN), else b.
pub fn select_by_sign(wide: bool, float: bool) -> LaneFn {
    match (wide, float) {
        (false, false) => pick3(|a: u32, b: u32, c: i32| if c >= 0 { a } else { b }),
        (true, false) => pick3(|a: u64, b: u64, c: i32| if c >= 0 { a } else { b }),
        (false, true) => pick3(|a: u32, b: u32, c: f32| if c >= 0.0 { a } else { b }),
        (true, true) => pick3(|a: u64, b: u64, c: f32| if c >= 0.0 { a } else { b }),
    }
}

/// Two 32-bit halves as one 64-bit value, low first.
pub fn join64() -> LaneFn {
    pick2(|low: u32, high: u32| u64::from(high) << 32 | u64::from(low))
}

/// The low or high half of a 64-bit value.
pub fn half64(high: bool) -> LaneFn {
    if high { pick1(|a: u64| (a >> 32) as u32) } else { pick1(|a: u64| a as u32) }
}

/// Two 16-bit halves as one 32-bit value, low first.
pub fn join32() -> LaneFn {
    pick2(|low: u16, high: u16| u32::from(high) << 16 | u32::from(low))
}

/// The low or high half of a 32-bit value.
pub fn half32(high: bool) -> LaneFn {
    if high { pick1(|a: u32| (a >> 16) as u16) } else { pick1(|a: u32| a as u16) }
}

/// Two 8-bit parts as one 16-bit value, low first.
pub fn join16() -> LaneFn {
    pick2(|low: u8, high: u8| u16::from(high) << 8 | u16::from(low))
}

/// Byte n of a 32-bit value.
pub fn byte_of(n: usize) -> LaneFn {
    match n {
        0 => pick1(|a: u32| a as u8),
        1 => pick1(|a: u32| (a >> 8) as u8),
        2 => pick1(|a: u32| (a >> 16) as u8),
        _ => pick1(|a: u32| (a >> 24) as u8),
    }
}
