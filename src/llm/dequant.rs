//! GGUF storage types: block layouts and their float32 values (ggml's `dequantize_row_*`).

use half::{bf16, f16};

/// A tensor type this engine reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GgmlType {
    /// float32.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    Bf16,
    /// 4 bits, scale.
    Q4_0,
    /// 4 bits, scale and minimum.
    Q4_1,
    /// 5 bits, scale.
    Q5_0,
    /// 5 bits, scale and minimum.
    Q5_1,
    /// 8 bits, scale.
    Q8_0,
    /// 4 bits in super-blocks of 256.
    Q4K,
    /// 5 bits in super-blocks of 256.
    Q5K,
    /// 6 bits in super-blocks of 256.
    Q6K,
}

impl GgmlType {
    /// By its number in the file.
    pub fn from_id(id: u32) -> Result<Self, String> {
        use GgmlType::*;
        Ok(match id {
            0 => F32,
            1 => F16,
            30 => Bf16,
            2 => Q4_0,
            3 => Q4_1,
            6 => Q5_0,
            7 => Q5_1,
            8 => Q8_0,
            12 => Q4K,
            13 => Q5K,
            14 => Q6K,
            other => {
                let names = [
                    "Q8_1", "Q2_K", "Q3_K", "Q8_K", "IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S",
                    "IQ2_S", "IQ4_XS",
                ];
                let ids = [9, 10, 11, 15, 16, 17, 18, 19, 20, 21, 22, 23];
                let name = ids.iter().position(|&i| i == other).map_or("unknown", |i| names[i]);
                return Err(format!(
                    "type {other} ({name}) is not supported; supported: F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q4_K Q5_K Q6_K"
                ));
            }
        })
    }

    /// (elements, bytes) of a block.
    pub fn block(self) -> (usize, usize) {
        use GgmlType::*;
        match self {
            F32 => (1, 4),
            F16 | Bf16 => (1, 2),
            Q4_0 => (32, 18),
            Q4_1 => (32, 20),
            Q5_0 => (32, 22),
            Q5_1 => (32, 24),
            Q8_0 => (32, 34),
            Q4K => (256, 144),
            Q5K => (256, 176),
            Q6K => (256, 210),
        }
    }

    /// Decodes whole blocks. `bytes` and `out` hold the same number of them.
    pub fn decode(self, bytes: &[u8], out: &mut [f32]) {
        let (elements, size) = self.block();
        for (block, out) in bytes.chunks_exact(size).zip(out.chunks_exact_mut(elements)) {
            self.decode_block(block, out);
        }
    }

    fn decode_block(self, b: &[u8], out: &mut [f32]) {
        use GgmlType::*;
        let half = |at: usize| f16::from_le_bytes([b[at], b[at + 1]]).to_f32();
        let word = |at: usize| u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]);
        match self {
            F32 => out[0] = f32::from_bits(word(0)),
            F16 => out[0] = half(0),
            Bf16 => out[0] = bf16::from_le_bytes([b[0], b[1]]).to_f32(),
            Q4_0 => {
                let d = half(0);
                nibbles(&b[2..18], |i, q| out[i] = d * (f32::from(q) - 8.0));
            }
            Q4_1 => {
                let (d, m) = (half(0), half(2));
                nibbles(&b[4..20], |i, q| out[i] = d * f32::from(q) + m);
            }
            Q5_0 => {
                let (d, high) = (half(0), word(2));
                nibbles(&b[6..22], |i, q| out[i] = d * (f32::from(q | bit(high, i) << 4) - 16.0));
            }
            Q5_1 => {
                let (d, m, high) = (half(0), half(2), word(4));
                nibbles(&b[8..24], |i, q| out[i] = d * f32::from(q | bit(high, i) << 4) + m);
            }
            Q8_0 => {
                let d = half(0);
                out.iter_mut().zip(&b[2..34]).for_each(|(o, &q)| *o = d * f32::from(q as i8));
            }
            Q4K | Q5K => {
                let (d, d_min) = (half(0), half(2));
                let (high, low) = if self == Q5K { (&b[16..48], &b[48..176]) } else { (&[][..], &b[16..144]) };
                for (j, out) in out.chunks_exact_mut(32).enumerate() {
                    let (scale, min) = scale_and_min(&b[4..16], j);
                    let (scale, min) = (d * f32::from(scale), d_min * f32::from(min));
                    for (l, o) in out.iter_mut().enumerate() {
                        let byte = low[j / 2 * 32 + l];
                        let mut q = if j % 2 == 0 { byte & 15 } else { byte >> 4 };
                        if let Some(h) = high.get(l) {
                            q |= (h >> j & 1) << 4;
                        }
                        *o = scale * f32::from(q) - min;
                    }
                }
            }
            Q6K => {
                let (low, high, scales, d) = (&b[..128], &b[128..192], &b[192..208], half(208));
                for (i, o) in out.iter_mut().enumerate() {
                    // Two halves of 128; in each, four groups of 32 share the bytes of `high`.
                    let (h, group, l) = (i / 128, i % 128 / 32, i % 32);
                    let byte = low[h * 64 + group % 2 * 32 + l];
                    let four = if group < 2 { byte & 15 } else { byte >> 4 };
                    let two = high[h * 32 + l] >> (2 * group) & 3;
                    let q = i16::from(four | two << 4) - 32;
                    *o = d * f32::from(scales[h * 8 + group * 2 + l / 16] as i8) * f32::from(q);
                }
            }
        }
    }
}

/// Sixteen bytes: low nibbles are elements 0..16, high nibbles 16..32.
fn nibbles(bytes: &[u8], mut element: impl FnMut(usize, u8)) {
    for (i, byte) in bytes.iter().enumerate() {
        element(i, byte & 15);
        element(i + 16, byte >> 4);
    }
}

fn bit(word: u32, i: usize) -> u8 {
    (word >> i & 1) as u8
}

/// The j-th 6-bit scale and minimum of a K block's twelve bytes.
fn scale_and_min(s: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        (s[j] & 63, s[j + 4] & 63)
    } else {
        (s[j + 4] & 15 | (s[j - 4] >> 6) << 4, s[j + 4] >> 4 | (s[j] >> 6) << 4)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Blocks of random bytes with their values as gguf-py (an independent implementation) decodes them; made by
    /// `scripts/gguf_blocks.py`.
    #[test]
    fn every_type_decodes_as_the_reference_does() {
        let fixture = include_str!("../../tests/fixtures/gguf/blocks.json");
        let cases: Vec<(u32, String, Vec<f32>)> = serde_json::from_str(fixture).unwrap();
        assert_eq!(cases.len(), 11 * 3);
        for (id, hex, want) in cases {
            let bytes: Vec<u8> =
                (0..hex.len() / 2).map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap()).collect();
            let kind = GgmlType::from_id(id).unwrap();
            let mut got = vec![0.0; want.len()];
            kind.decode(&bytes, &mut got);
            assert_eq!(got, want, "{kind:?}");
        }
    }

    #[test]
    fn unknown_types_are_named() {
        assert!(GgmlType::from_id(10).unwrap_err().contains("Q2_K"));
        assert!(GgmlType::from_id(99).unwrap_err().contains("type 99 (unknown)"));
    }
}
