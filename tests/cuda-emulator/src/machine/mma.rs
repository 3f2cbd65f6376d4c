//! `mma.sync`: fragments to matrices, products and sums, and back.
//!
//! The layouts are those of the manual's figures, which all shapes share: with g = lane / 4, t = lane % 4 and E elements a
//! 32-bit register, register i of A holds row g + 8 (i % 2), columns t E + 4 E (i / 2) and following; register i of B holds
//! rows t E + 4 E i and following of column g; C and D hold pairs of columns 2 t of rows g and g + 8.

use super::block::Block;
use super::step::{lanes32, lanes64, set32, set64};
use super::warp::Warp;
use crate::checks::Fault;
use crate::counts::card::TensorKind;
use crate::numerics::approx::canonical;
use crate::numerics::format::{self, bf16_to_f32, f16_to_f32, f32_to_f16};
use crate::numerics::tensor::{Accumulation, accumulate};
use crate::program::{Mma, Reg};
use crate::ptx::types::Type;

/// Deepest shape: m16n8k32 of bytes (k64 of nibbles is not supported).
const MAX_K: usize = 32;

/// A in rows, B in rows, of at most 16×32 and 32×8.
struct Operands {
    a: [[f64; MAX_K]; 16],
    b: [[f64; 8]; MAX_K],
}

impl Block<'_> {
    /// `mma.sync`.
    pub fn mma(&mut self, warp: &mut Warp, mma: &Mma, active: u32) -> Result<(), Fault> {
        let (m, n, k) = mma.shape;
        let flops = 2 * (m * n * k) as u64;
        let kind = match mma.a_type {
            Type::TF32 => TensorKind::Tf32,
            Type::F16 | Type::BF16 => TensorKind::Sixteen,
            Type::F64 => TensorKind::F64,
            _ => TensorKind::Int8,
        };
        self.counters.tensor_flops += flops;
        self.counters.tensor_by_kind[kind as usize] += flops;
        let constants = &self.program().constants;
        let mut operands = Operands { a: [[0.0; MAX_K]; 16], b: [[0.0; 8]; MAX_K] };
        let per = elements(mma.a_type);
        for (i, reg) in mma.a.iter().enumerate() {
            let (row, column) = if m == 8 { (0, 4 * per * i) } else { (8 * (i % 2), 4 * per * (i / 2)) };
            for e in 0..per {
                let values = element(warp, constants, *reg, mma.a_type, e);
                for (lane, value) in values.into_iter().enumerate() {
                    operands.a[row + lane / 4][column + lane % 4 * per + e] = value;
                }
            }
        }
        for (i, reg) in mma.b.iter().enumerate() {
            for e in 0..per {
                let values = element(warp, constants, *reg, mma.b_type, e);
                for (lane, value) in values.into_iter().enumerate() {
                    operands.b[lane % 4 * per + 4 * per * i + e][lane / 4] = value;
                }
            }
        }
        match mma.c_type {
            Type::S32 => integers(warp, constants, mma, &operands, active),
            Type::F64 => doubles(warp, constants, mma, &operands, active),
            Type::F16 => {
                let mut c = [[0f32; 8]; 16];
                for (i, reg) in mma.c.iter().enumerate() {
                    let values = lanes32(warp, constants, *reg);
                    for lane in 0..32 {
                        c[lane / 4 + 8 * i][lane % 4 * 2] = f16_to_f32(values[lane] as u16);
                        c[lane / 4 + 8 * i][lane % 4 * 2 + 1] = f16_to_f32((values[lane] >> 16) as u16);
                    }
                }
                let d = self.multiply(mma, &operands, &c);
                for (i, reg) in mma.d.iter().enumerate() {
                    let half = |lane: usize, j: usize| u32::from(f32_to_f16(d[lane / 4 + 8 * i][lane % 4 * 2 + j]));
                    let out = std::array::from_fn(|lane| half(lane, 0) | half(lane, 1) << 16);
                    set32(warp, *reg, &out, active);
                }
            }
            _ => {
                let mut c = [[0f32; 8]; 16];
                for (i, reg) in mma.c.iter().enumerate() {
                    let values = lanes32(warp, constants, *reg);
                    for lane in 0..32 {
                        c[lane / 4 + 8 * (i / 2)][lane % 4 * 2 + i % 2] = f32::from_bits(values[lane]);
                    }
                }
                let d = self.multiply(mma, &operands, &c);
                for (i, reg) in mma.d.iter().enumerate() {
                    let out = std::array::from_fn(|lane| d[lane / 4 + 8 * (i / 2)][lane % 4 * 2 + i % 2].to_bits());
                    set32(warp, *reg, &out, active);
                }
            }
        }
        Ok(())
    }

    fn multiply(&self, mma: &Mma, operands: &Operands, c: &[[f32; 8]; 16]) -> [[f32; 8]; 16] {
        let (_, _, k) = mma.shape;
        let model = self.config().accumulation;
        if model == Accumulation::Exact {
            #[cfg(target_arch = "x86_64")]
            if crate::lanes::has_avx2() {
                // SAFETY: the processor has AVX2 and FMA, asked just above.
                return unsafe { exact_avx2(operands, c, k) };
            }
            return exact(operands, c, k);
        }
        let block = if mma.a_type == Type::TF32 { 4 } else { 8 };
        let mut d = [[0f32; 8]; 16];
        for (row, d) in d.iter_mut().enumerate() {
            for (column, d) in d.iter_mut().enumerate() {
                let products: [f64; MAX_K] = std::array::from_fn(|i| operands.a[row][i] * operands.b[i][column]);
                *d = accumulate(model, &products[..k], c[row][column], block);
            }
        }
        d
    }
}

/// # Safety
/// The processor has AVX2 and FMA.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn exact_avx2(operands: &Operands, c: &[[f32; 8]; 16], k: usize) -> [[f32; 8]; 16] {
    exact(operands, c, k)
}

/// Products are exact in f64, sums rounded there; one rounding to f32 at the end.
#[inline(always)]
fn exact(operands: &Operands, c: &[[f32; 8]; 16], k: usize) -> [[f32; 8]; 16] {
    let mut d = [[0f32; 8]; 16];
    for row in 0..16 {
        let mut sum = [0f64; 8];
        for i in 0..k {
            let a = operands.a[row][i];
            for (sum, b) in sum.iter_mut().zip(&operands.b[i]) {
                *sum += a * b;
            }
        }
        for n in 0..8 {
            d[row][n] = canonical((sum[n] + f64::from(c[row][n])) as f32);
        }
    }
    d
}

/// Elements a register holds.
pub(super) fn elements(ty: Type) -> usize {
    match ty {
        Type::F16 | Type::BF16 => 2,
        Type::S8 | Type::U8 | Type::E4M3 | Type::E5M2 => 4,
        _ => 1,
    }
}

pub(super) fn element(warp: &Warp, constants: &[crate::program::Slot], reg: Reg, ty: Type, e: usize) -> [f64; 32] {
    if ty == Type::F64 {
        return lanes64(warp, constants, reg).map(f64::from_bits);
    }
    let values = lanes32(warp, constants, reg);
    match ty {
        Type::BF16 => values.map(|v| f64::from(bf16_to_f32((v >> (16 * e)) as u16))),
        Type::F16 => values.map(|v| f64::from(f16_to_f32((v >> (16 * e)) as u16))),
        // The unit reads 19 bits of a tf32 operand and ignores the rest.
        Type::TF32 => values.map(|v| f64::from(f32::from_bits(v & 0xffff_e000))),
        Type::S8 => values.map(|v| f64::from((v >> (8 * e)) as i8)),
        Type::U8 => values.map(|v| f64::from((v >> (8 * e)) as u8)),
        Type::E4M3 => values.map(|v| format::E4M3.value(v >> (8 * e) & 255)),
        Type::E5M2 => values.map(|v| format::E5M2.value(v >> (8 * e) & 255)),
        _ => values.map(|v| f64::from(f32::from_bits(v))),
    }
}

/// Where register i of a C or D fragment of 32-bit or 64-bit elements lies.
fn place(i: usize, lane: usize) -> (usize, usize) {
    (lane / 4 + 8 * (i / 2), lane % 4 * 2 + i % 2)
}

fn integers(warp: &mut Warp, constants: &[crate::program::Slot], mma: &Mma, operands: &Operands, active: u32) {
    let c: Vec<[u32; 32]> = mma.c.iter().map(|r| lanes32(warp, constants, *r)).collect();
    for (i, reg) in mma.d.iter().enumerate() {
        let out = std::array::from_fn(|lane| {
            let (row, column) = place(i, lane);
            // Sums of 32 products of bytes are exact in f64.
            let dot: f64 = (0..mma.shape.2).map(|k| operands.a[row][k] * operands.b[k][column]).sum();
            let sum = dot as i64 + i64::from(c[i][lane] as i32);
            if mma.saturate { sum.clamp(i64::from(i32::MIN), i64::from(i32::MAX)) as u32 } else { sum as u32 }
        });
        set32(warp, *reg, &out, active);
    }
}

fn doubles(warp: &mut Warp, constants: &[crate::program::Slot], mma: &Mma, operands: &Operands, active: u32) {
    let c: Vec<[u64; 32]> = mma.c.iter().map(|r| lanes64(warp, constants, *r)).collect();
    for (i, reg) in mma.d.iter().enumerate() {
        let out = std::array::from_fn(|lane| {
            let (row, column) = place(i, lane);
            let start = f64::from_bits(c[i][lane]);
            (0..mma.shape.2).fold(start, |sum, k| operands.a[row][k].mul_add(operands.b[k][column], sum)).to_bits()
        });
        set64(warp, *reg, &out, active);
    }
}
