//! `wgmma.mma_async`: matrices in shared memory by their descriptors, and the product of a warp's 16 rows.
//!
//! Layouts are the canonical ones of the PTX manual ("Shared Memory Matrix Layout"), in chunks of 16 bytes. K-major: eight
//! rows of a pattern, the next eight `stride` on; without swizzle the second chunk of a row lies `leading` on. MN-major:
//! eight k of a pattern as wide as the swizzle; with swizzle `leading` goes to the next MN and `stride` to the next eight
//! k, without it the other way round.

use super::block::Block;
use super::mma::{element, elements};
use super::step::{lanes32, set32};
use super::warp::Warp;
use crate::checks::{Fault, Kind};
use crate::counts::card::TensorKind;
use crate::memory::layout;
use crate::memory::tensor_map::Swizzle;
use crate::numerics::approx::canonical;
use crate::numerics::format::{self, bf16_to_f32, f16_to_f32, f32_to_f16};
use crate::numerics::tensor::{Accumulation, accumulate};
use crate::program::{Wgmma, WgmmaA};
use crate::ptx::types::Type;

/// Deepest: 32 bytes of 8-bit elements.
const MAX_K: usize = 32;

/// A matrix descriptor.
#[derive(Debug, Clone, Copy)]
struct Descriptor {
    start: u32,
    leading: u32,
    stride: u32,
    /// Where the swizzle's pattern begins, in units of 128 bytes.
    origin: u32,
    swizzle: Swizzle,
}

impl Descriptor {
    fn new(bits: u64) -> Self {
        let field = |at: u32| (bits >> at & 0x3fff) as u32 * 16;
        let swizzle = match bits >> 62 {
            0 => Swizzle::None,
            1 => Swizzle::B128,
            2 => Swizzle::B64,
            _ => Swizzle::B32,
        };
        Descriptor { start: field(0), leading: field(16), stride: field(32), origin: (bits >> 49 & 7) as u32, swizzle }
    }

    /// Shared address of chunk 0 or 1 of a row of a K-major matrix.
    fn k_major(&self, row: u32, chunk: u32) -> u32 {
        let (pitch, next) = match self.swizzle {
            Swizzle::None => (16, self.leading),
            swizzle => (swizzle.span(), 16),
        };
        self.swizzle.apply(self.start + row / 8 * self.stride + row % 8 * pitch + chunk * next, self.origin)
    }

    /// Shared address of the elements 8 c to 8 c + 7 of M or N at a k, of an MN-major matrix of 16-bit elements.
    fn mn_major(&self, c: u32, k: u32) -> u32 {
        let span = self.swizzle.span();
        let wide = span / 16;
        let (mn, eight) = match self.swizzle {
            Swizzle::None => (self.stride, self.leading),
            _ => (self.leading, self.stride),
        };
        self.swizzle.apply(self.start + c % wide * 16 + c / wide * mn + k % 8 * span + k / 8 * eight, self.origin)
    }
}

/// The 16-byte chunks of `rows` rows from `first` on, in order: by row and half, or by eight rows and k.
fn chunks(bits: u64, first: u32, rows: u32, transposed: bool) -> impl Iterator<Item = u32> {
    let descriptor = Descriptor::new(bits);
    let (count, inner) = if transposed { (rows / 8, 16) } else { (rows, 2) };
    let first = if transposed { first / 8 } else { first };
    (0..count * inner).map(move |i| {
        let (outer, inner) = (first + i / inner, i % inner);
        if transposed { descriptor.mn_major(outer, inner) } else { descriptor.k_major(outer, inner) }
    })
}

/// The elements of a chunk.
fn values(chunk: [u8; 16], ty: Type) -> [f64; 16] {
    let half = |i: usize| u16::from_le_bytes([chunk[2 * i], chunk[2 * i + 1]]);
    let word = |i: usize| u32::from(half(2 * i)) | u32::from(half(2 * i + 1)) << 16;
    match ty {
        Type::BF16 => std::array::from_fn(|i| if i < 8 { f64::from(bf16_to_f32(half(i))) } else { 0.0 }),
        Type::F16 => std::array::from_fn(|i| if i < 8 { f64::from(f16_to_f32(half(i))) } else { 0.0 }),
        Type::TF32 => {
            std::array::from_fn(|i| if i < 4 { f64::from(f32::from_bits(word(i) & 0xffff_e000)) } else { 0.0 })
        }
        Type::S8 => chunk.map(|v| f64::from(v as i8)),
        Type::U8 => chunk.map(f64::from),
        Type::E4M3 => chunk.map(|v| format::E4M3.value(u32::from(v))),
        _ => chunk.map(|v| format::E5M2.value(u32::from(v))),
    }
}

/// A by rows, B in panels of eight columns.
struct Operands {
    a: [[f64; MAX_K]; 16],
    b: Vec<[[f64; 8]; MAX_K]>,
}

impl Block<'_> {
    /// Checks that both operands lie in shared memory; with checks, enters the reads of the asynchronous proxy.
    pub fn read_operands(
        &mut self,
        warp: &Warp,
        op: &Wgmma,
        descriptors: (u64, u64),
        issue: bool,
    ) -> Result<(), Fault> {
        let first = warp.id % 4 * 16;
        let a = matches!(op.a, WgmmaA::Descriptor(_)).then(|| chunks(descriptors.0, first, 16, op.transposed.0));
        let all = a.into_iter().flatten().chain(chunks(descriptors.1, 0, op.n as u32, op.transposed.1));
        let mut found = None;
        for at in all {
            if at + 16 > self.shared_bytes {
                let detail = format!("a matrix descriptor reaches beyond shared memory of {} bytes", self.shared_bytes);
                return Err(Fault::at(Kind::OutOfBounds, 0, layout::SHARED + u64::from(at), detail));
            }
            if let Some(shadow) = &mut self.shadow {
                found = found.or(shadow.read_async(&warp.clock, 0, at, 16));
            } else if !issue {
                break;
            }
        }
        if let Some(conflict) = found {
            self.report_shared(warp, 0, conflict, false);
        }
        Ok(())
    }

    /// Counts flops and what the warpgroup reads of shared memory: B once for all four warps.
    pub fn count_wgmma(&mut self, warp: &Warp, op: &Wgmma) {
        let flops = 2 * 16 * (op.n * op.k) as u64;
        let kind = match op.a_type {
            Type::TF32 => TensorKind::Tf32,
            Type::F16 | Type::BF16 => TensorKind::Sixteen,
            _ => TensorKind::Int8,
        };
        self.counters.tensor_flops += flops;
        self.counters.tensor_by_kind[kind as usize] += flops;
        let a = if matches!(op.a, WgmmaA::Descriptor(_)) { 16 * 32 } else { 0 };
        let b = if warp.id.is_multiple_of(4) { op.n as u64 * 32 } else { 0 };
        self.count_bulk_shared(a + b);
    }

    fn chunk(&mut self, at: u32) -> [u8; 16] {
        // SAFETY: `read_operands` checked 16 bytes at every chunk.
        unsafe { self.shared_base().add(at as usize).cast::<[u8; 16]>().read() }
    }

    fn operands(&mut self, warp: &Warp, op: &Wgmma, descriptors: (u64, u64)) -> Operands {
        let mut all = Operands { a: [[0.0; MAX_K]; 16], b: vec![[[0.0; 8]; MAX_K]; op.n / 8] };
        let half = op.k / 2;
        match &op.a {
            WgmmaA::Registers(registers) => {
                let per = elements(op.a_type);
                for (i, reg) in registers.iter().enumerate() {
                    for e in 0..per {
                        let values = element(warp, &self.program().constants, *reg, op.a_type, e);
                        for (lane, value) in values.into_iter().enumerate() {
                            all.a[8 * (i % 2) + lane / 4][4 * per * (i / 2) + lane % 4 * per + e] = value;
                        }
                    }
                }
            }
            WgmmaA::Descriptor(_) => {
                for (i, at) in chunks(descriptors.0, warp.id % 4 * 16, 16, op.transposed.0).enumerate() {
                    let values = values(self.chunk(at), op.a_type);
                    if op.transposed.0 {
                        (0..8).for_each(|e| all.a[i / 16 * 8 + e][i % 16] = values[e]);
                    } else {
                        all.a[i / 2][i % 2 * half..][..half].copy_from_slice(&values[..half]);
                    }
                }
            }
        }
        for (i, at) in chunks(descriptors.1, 0, op.n as u32, op.transposed.1).enumerate() {
            let values = values(self.chunk(at), op.b_type);
            if op.transposed.1 {
                all.b[i / 16][i % 16].copy_from_slice(&values[..8]);
            } else {
                let (column, k) = (i / 2, i % 2 * half);
                (0..half).for_each(|e| all.b[column / 8][k + e][column % 8] = values[e]);
            }
        }
        if op.negate.0 != op.negate.1 {
            all.a.as_flattened_mut().iter_mut().for_each(|v| *v = -*v);
        }
        all
    }

    /// The warp's rows of the product, to its registers.
    pub fn multiply_rows(
        &mut self,
        warp: &mut Warp,
        op: &Wgmma,
        descriptors: (u64, u64),
        add: bool,
    ) -> Result<(), Fault> {
        let operands = self.operands(warp, op, descriptors);
        let constants = &self.program().constants;
        let model = self.config().accumulation;
        // Registers of a panel of eight columns: rows g and g + 8; two of them each when there are pairs in a register.
        let per = if op.d_type == Type::F16 { 2 } else { 4 };
        for (panel, b) in operands.b.iter().enumerate() {
            let registers = &op.d[panel * per..panel * per + per];
            let old: Vec<[u32; 32]> = registers.iter().map(|r| lanes32(warp, constants, *r)).collect();
            let place = |row: usize, column: usize| (row % 8 * 4 + column / 2, row / 8, column % 2);
            let read = |row: usize, column: usize| {
                let (lane, i, j) = place(row, column);
                if !add {
                    0
                } else if per == 4 {
                    old[i * 2 + j][lane]
                } else {
                    old[i][lane] >> (16 * j) & 0xffff
                }
            };
            let mut new = [[0u32; 32]; 4];
            let mut write = |row: usize, column: usize, value: u32| {
                let (lane, i, j) = place(row, column);
                if per == 4 {
                    new[i * 2 + j][lane] = value;
                } else {
                    new[i][lane] |= value << (16 * j);
                }
            };
            if model == Accumulation::Exact || op.d_type == Type::S32 {
                let sums = sums(&operands.a, b, op.k);
                for (row, sums) in sums.iter().enumerate() {
                    for (column, sum) in sums.iter().enumerate() {
                        let old = read(row, column);
                        write(row, column, finish(op, *sum, old));
                    }
                }
            } else {
                let block = if op.a_type == Type::TF32 { 4 } else { 8 };
                for (row, column) in (0..16).flat_map(|row| (0..8).map(move |column| (row, column))) {
                    let products: [f64; MAX_K] = std::array::from_fn(|i| operands.a[row][i] * b[i][column]);
                    let old = read(row, column);
                    let old = if per == 4 { f32::from_bits(old) } else { f16_to_f32(old as u16) };
                    let sum = accumulate(model, &products[..op.k], old, block);
                    write(row, column, if per == 4 { sum.to_bits() } else { u32::from(f32_to_f16(sum)) });
                }
            }
            for (reg, values) in registers.iter().zip(&new) {
                set32(warp, *reg, values, u32::MAX);
            }
        }
        Ok(())
    }
}

/// A sum of products and the accumulator, rounded once.
fn finish(op: &Wgmma, sum: f64, old: u32) -> u32 {
    match op.d_type {
        Type::S32 => {
            let sum = sum as i64 + i64::from(old as i32);
            if op.saturate { sum.clamp(i64::from(i32::MIN), i64::from(i32::MAX)) as u32 } else { sum as u32 }
        }
        Type::F16 => u32::from(f32_to_f16(canonical((sum + f64::from(f16_to_f32(old as u16))) as f32))),
        _ => canonical((sum + f64::from(f32::from_bits(old))) as f32).to_bits(),
    }
}

fn sums(a: &[[f64; MAX_K]; 16], b: &[[f64; 8]; MAX_K], k: usize) -> [[f64; 8]; 16] {
    #[cfg(target_arch = "x86_64")]
    if crate::lanes::has_avx2() {
        // SAFETY: the processor has AVX2 and FMA, asked just above.
        return unsafe { sums_avx2(a, b, k) };
    }
    plain_sums(a, b, k)
}

/// # Safety
/// The processor has AVX2 and FMA.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn sums_avx2(a: &[[f64; MAX_K]; 16], b: &[[f64; 8]; MAX_K], k: usize) -> [[f64; 8]; 16] {
    plain_sums(a, b, k)
}

/// Products are exact in f64, sums rounded there.
#[inline(always)]
fn plain_sums(a: &[[f64; MAX_K]; 16], b: &[[f64; 8]; MAX_K], k: usize) -> [[f64; 8]; 16] {
    let mut sums = [[0f64; 8]; 16];
    for (row, sum) in sums.iter_mut().enumerate() {
        for i in 0..k {
            let value = a[row][i];
            for n in 0..8 {
                sum[n] += value * b[i][n];
            }
        }
    }
    sums
}
