//! Packing: operands of any layout and storage type become float32 panels that the micro-kernel streams.
//!
//! A panel is `[k][width]` with width [`MR`] for A and [`NR`] for B, zero-padded. Weights kept as bf16 or f16 are widened
//! here, so no float32 copy of a frozen matrix exists outside the panel in use.

use half::f16;

use super::microkernel::{Isa, MR, NR};

/// Element types that widen to float32 exactly.
pub trait Element: Copy + Send + Sync + 'static {
    /// The value as float32.
    fn widen(self) -> f32;

    /// Eight neighbours widened.
    ///
    /// # Safety
    /// `at` is valid for eight elements; needs AVX2 and F16C.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load8(at: *const Self) -> std::arch::x86_64::__m256;
}

/// Raw bf16 bits.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(transparent)]
pub struct Bf16Bits(pub u16);

/// Raw f16 bits.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(transparent)]
pub struct F16Bits(pub u16);

impl Element for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn load8(at: *const f32) -> std::arch::x86_64::__m256 {
        // SAFETY: eight floats are readable at `at`.
        unsafe { std::arch::x86_64::_mm256_loadu_ps(at) }
    }
}

impl Element for Bf16Bits {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn load8(at: *const Bf16Bits) -> std::arch::x86_64::__m256 {
        use std::arch::x86_64::*;
        // SAFETY: eight 16-bit values are readable at `at`.
        let bits = unsafe { _mm_loadu_si128(at.cast()) };
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(bits)))
    }
}

impl Element for F16Bits {
    #[inline(always)]
    fn widen(self) -> f32 {
        f16::from_bits(self.0).to_f32()
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn load8(at: *const F16Bits) -> std::arch::x86_64::__m256 {
        use std::arch::x86_64::*;
        // SAFETY: eight 16-bit values are readable at `at`.
        _mm256_cvtph_ps(unsafe { _mm_loadu_si128(at.cast()) })
    }
}

/// Writes `rows[j][k]` to `out[k * stride + j]` for the given rows (at most `width`) and zero for the missing ones.
///
/// `rows` hold `kc` elements each; `out` holds `kc * stride` floats.
pub fn pack_rows<T: Element>(isa: Isa, rows: &[&[T]], kc: usize, width: usize, stride: usize, out: &mut [f32]) {
    assert!(rows.len() <= width && width <= stride && out.len() >= kc * stride);
    for (group, out_at) in (0..width).step_by(8).enumerate() {
        let rows = &rows[(8 * group).min(rows.len())..(8 * group + 8).min(rows.len())];
        let mut done = 0;
        #[cfg(target_arch = "x86_64")]
        if isa != Isa::Portable && rows.len() == 8 {
            let rows: [&[T]; 8] = std::array::from_fn(|j| rows[j]);
            assert!(rows.iter().all(|r| r.len() >= kc));
            // SAFETY: the instruction set was detected; rows hold kc elements, out holds kc * stride floats.
            done = unsafe { transpose8(rows, kc, stride, out[out_at..].as_mut_ptr()) };
        }
        for k in done..kc {
            for j in 0..8 {
                out[k * stride + out_at + j] = rows.get(j).map_or(0.0, |r| r[k].widen());
            }
        }
    }
    let _ = isa;
}

/// Writes `rows[k][0..n]` to `out[k * NR ..]`, zero-padded to [`NR`]: B whose rows are the inner dimension.
pub fn pack_columns<'a, T: Element>(isa: Isa, kc: usize, n: usize, row: impl Fn(usize) -> &'a [T], out: &mut [f32]) {
    assert!(n <= NR && out.len() >= kc * NR);
    for k in 0..kc {
        let source = &row(k)[..n];
        let target = &mut out[k * NR..(k + 1) * NR];
        let mut done = 0;
        #[cfg(target_arch = "x86_64")]
        if isa != Isa::Portable {
            // SAFETY: the instruction set was detected; both slices hold n elements.
            done = unsafe { widen8(source, target) };
        }
        for (t, s) in target[done..n].iter_mut().zip(&source[done..]) {
            *t = s.widen();
        }
        target[n..].fill(0.0);
    }
    let _ = isa;
}

/// Copies columns `[k][MR]` of an A whose rows are the inner dimension (A transposed in memory).
pub fn pack_a_columns<'a>(kc: usize, m: usize, row: impl Fn(usize) -> &'a [f32], out: &mut [f32]) {
    for k in 0..kc {
        let target = &mut out[k * MR..(k + 1) * MR];
        target[..m].copy_from_slice(&row(k)[..m]);
        target[m..].fill(0.0);
    }
}

/// # Safety
/// Needs AVX2 and F16C; `out` is at least as long as `source`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c")]
unsafe fn widen8<T: Element>(source: &[T], out: &mut [f32]) -> usize {
    let whole = source.len() / 8 * 8;
    for j in (0..whole).step_by(8) {
        // SAFETY: j + 8 <= len of both.
        unsafe { std::arch::x86_64::_mm256_storeu_ps(out.as_mut_ptr().add(j), T::load8(source.as_ptr().add(j))) };
    }
    whole
}

/// Transposes eight rows in blocks of 8 × 8; returns how many k were done.
///
/// # Safety
/// Needs AVX2 and F16C; rows hold `kc` elements; `out` is valid for `kc` steps of eight floats at `stride`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c")]
unsafe fn transpose8<T: Element>(rows: [&[T]; 8], kc: usize, stride: usize, out: *mut f32) -> usize {
    use std::arch::x86_64::*;
    let whole = kc / 8 * 8;
    for k in (0..whole).step_by(8) {
        // SAFETY: k + 8 <= kc.
        unsafe {
            let r: [__m256; 8] = std::array::from_fn(|j| T::load8(rows[j].as_ptr().add(k)));
            let lo: [__m256; 4] = std::array::from_fn(|j| _mm256_unpacklo_ps(r[2 * j], r[2 * j + 1]));
            let hi: [__m256; 4] = std::array::from_fn(|j| _mm256_unpackhi_ps(r[2 * j], r[2 * j + 1]));
            // quads[q][h]: column q (and q + 4 in the upper half) of rows 4h..4h + 4
            let quads: [[__m256; 2]; 4] = [
                std::array::from_fn(|h| _mm256_shuffle_ps::<0x44>(lo[2 * h], lo[2 * h + 1])),
                std::array::from_fn(|h| _mm256_shuffle_ps::<0xee>(lo[2 * h], lo[2 * h + 1])),
                std::array::from_fn(|h| _mm256_shuffle_ps::<0x44>(hi[2 * h], hi[2 * h + 1])),
                std::array::from_fn(|h| _mm256_shuffle_ps::<0xee>(hi[2 * h], hi[2 * h + 1])),
            ];
            for (q, [low, high]) in quads.into_iter().enumerate() {
                _mm256_storeu_ps(out.add((k + q) * stride), _mm256_permute2f128_ps::<0x20>(low, high));
                _mm256_storeu_ps(out.add((k + q + 4) * stride), _mm256_permute2f128_ps::<0x31>(low, high));
            }
        }
    }
    whole
}
