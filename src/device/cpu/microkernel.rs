//! The innermost loops of the matrix product: one 8 × 48 tile of C from one packed panel of A and one of B.
//!
//! Panels are `[k][MR]` and `[k][NR]`, float32, zero-padded. Every element of C is one chain of fused multiply-adds over
//! k in rising order, whatever the instruction set and whatever the tile's size, so a result does not depend on how the
//! product was cut into tiles: a row's value is the same alone and in a batch, on one thread and on many.

/// Rows of a tile (and of a packed panel of A).
pub const MR: usize = 8;
/// Columns of a tile (and of a packed panel of B).
pub const NR: usize = 48;

/// What happens to a finished tile: `C = alpha * acc` or `C = C + alpha * acc`.
#[derive(Clone, Copy, Debug)]
pub struct Store {
    /// Scale of the product.
    pub alpha: f32,
    /// Add to what C holds.
    pub accumulate: bool,
}

/// A micro-kernel: `(kc, a_panel, b_panel, c, ldc, rows ≤ MR, cols ≤ NR, store)`.
pub type Kernel = unsafe fn(usize, *const f32, *const f32, *mut f32, usize, usize, usize, Store);

/// Instruction set the kernels and the packing use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// AVX-512F (with AVX2, FMA and F16C).
    Avx512,
    /// AVX2, FMA, F16C.
    Avx2,
    /// Plain Rust.
    Portable,
}

impl Isa {
    /// The best this machine has.
    pub fn detect() -> Isa {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            if avx2 && is_x86_feature_detected!("f16c") {
                return if is_x86_feature_detected!("avx512f") { Isa::Avx512 } else { Isa::Avx2 };
            }
        }
        Isa::Portable
    }

    /// The micro-kernel of this instruction set.
    pub fn kernel(self) -> Kernel {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => x86::tile_avx512,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => x86::tile_avx2,
            _ => tile_portable,
        }
    }
}

/// # Safety
/// Panels hold `kc` steps; `c` is valid for `rows` rows of `cols` floats at stride `ldc`.
#[allow(clippy::too_many_arguments)] // the fixed signature of a kernel
unsafe fn tile_portable(
    kc: usize,
    a: *const f32,
    b: *const f32,
    c: *mut f32,
    ldc: usize,
    rows: usize,
    cols: usize,
    store: Store,
) {
    let mut acc = [[0.0f32; NR]; MR];
    for k in 0..kc {
        // SAFETY: panels hold kc steps of MR and NR floats.
        let (a, b) =
            unsafe { (std::slice::from_raw_parts(a.add(k * MR), MR), std::slice::from_raw_parts(b.add(k * NR), NR)) };
        for (acc, &a) in acc.iter_mut().zip(a) {
            for (acc, &b) in acc.iter_mut().zip(b) {
                *acc += a * b;
            }
        }
    }
    for (r, acc) in acc.iter().enumerate().take(rows) {
        // SAFETY: row r of C holds at least cols floats.
        let row = unsafe { std::slice::from_raw_parts_mut(c.add(r * ldc), cols) };
        for (c, &acc) in row.iter_mut().zip(acc) {
            *c = if store.accumulate { *c + store.alpha * acc } else { store.alpha * acc };
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{MR, NR, Store};
    use std::arch::x86_64::*;

    /// # Safety
    /// See [`super::tile_portable`]; needs AVX-512F.
    #[allow(clippy::too_many_arguments)]
    pub unsafe fn tile_avx512(
        kc: usize,
        a: *const f32,
        b: *const f32,
        c: *mut f32,
        ldc: usize,
        rows: usize,
        cols: usize,
        store: Store,
    ) {
        // SAFETY: passed on from the caller.
        unsafe {
            match rows {
                1 => avx512::<1>(kc, a, b, c, ldc, cols, store),
                2 => avx512::<2>(kc, a, b, c, ldc, cols, store),
                3 => avx512::<3>(kc, a, b, c, ldc, cols, store),
                4 => avx512::<4>(kc, a, b, c, ldc, cols, store),
                5 => avx512::<5>(kc, a, b, c, ldc, cols, store),
                6 => avx512::<6>(kc, a, b, c, ldc, cols, store),
                7 => avx512::<7>(kc, a, b, c, ldc, cols, store),
                _ => avx512::<MR>(kc, a, b, c, ldc, cols, store),
            }
        }
    }

    #[target_feature(enable = "avx512f")]
    unsafe fn avx512<const M: usize>(
        kc: usize,
        mut a: *const f32,
        mut b: *const f32,
        c: *mut f32,
        ldc: usize,
        cols: usize,
        store: Store,
    ) {
        // SAFETY: panels hold kc steps; masks keep the accesses to C inside `cols`.
        unsafe {
            let mut acc = [[_mm512_setzero_ps(); 3]; M];
            for _ in 0..kc {
                let bk = [_mm512_loadu_ps(b), _mm512_loadu_ps(b.add(16)), _mm512_loadu_ps(b.add(32))];
                for (r, acc) in acc.iter_mut().enumerate() {
                    let ak = _mm512_set1_ps(*a.add(r));
                    acc[0] = _mm512_fmadd_ps(ak, bk[0], acc[0]);
                    acc[1] = _mm512_fmadd_ps(ak, bk[1], acc[1]);
                    acc[2] = _mm512_fmadd_ps(ak, bk[2], acc[2]);
                }
                a = a.add(MR);
                b = b.add(NR);
            }
            let alpha = _mm512_set1_ps(store.alpha);
            for (r, acc) in acc.iter().enumerate() {
                for (j, &acc) in acc.iter().enumerate() {
                    let lanes = cols.saturating_sub(16 * j).min(16);
                    if lanes == 0 {
                        break;
                    }
                    let mask = (0xffff_u32 >> (16 - lanes)) as __mmask16;
                    let at = c.add(r * ldc + 16 * j);
                    let value = if store.accumulate {
                        _mm512_fmadd_ps(alpha, acc, _mm512_maskz_loadu_ps(mask, at))
                    } else {
                        _mm512_mul_ps(alpha, acc)
                    };
                    _mm512_mask_storeu_ps(at, mask, value);
                }
            }
        }
    }

    /// # Safety
    /// See [`super::tile_portable`]; needs AVX2 and FMA.
    #[allow(clippy::too_many_arguments)]
    pub unsafe fn tile_avx2(
        kc: usize,
        a: *const f32,
        b: *const f32,
        c: *mut f32,
        ldc: usize,
        rows: usize,
        cols: usize,
        store: Store,
    ) {
        // The tile is computed as up to four 4 × 24 pieces, which is what sixteen registers hold.
        for r in (0..rows).step_by(4) {
            for j in (0..cols).step_by(24) {
                // SAFETY: the piece lies inside the tile.
                unsafe {
                    avx2(kc, a.add(r), b.add(j), c.add(r * ldc + j), ldc, (rows - r).min(4), (cols - j).min(24), store);
                }
            }
        }
    }

    #[target_feature(enable = "avx2,fma")]
    #[allow(clippy::too_many_arguments)]
    unsafe fn avx2(
        kc: usize,
        mut a: *const f32,
        mut b: *const f32,
        c: *mut f32,
        ldc: usize,
        rows: usize,
        cols: usize,
        store: Store,
    ) {
        // SAFETY: panels hold kc steps; a piece that is not whole goes through `edge`.
        unsafe {
            let mut acc = [[_mm256_setzero_ps(); 3]; 4];
            for _ in 0..kc {
                let bk = [_mm256_loadu_ps(b), _mm256_loadu_ps(b.add(8)), _mm256_loadu_ps(b.add(16))];
                for (r, acc) in acc.iter_mut().enumerate() {
                    let ak = _mm256_broadcast_ss(&*a.add(r));
                    acc[0] = _mm256_fmadd_ps(ak, bk[0], acc[0]);
                    acc[1] = _mm256_fmadd_ps(ak, bk[1], acc[1]);
                    acc[2] = _mm256_fmadd_ps(ak, bk[2], acc[2]);
                }
                a = a.add(MR);
                b = b.add(NR);
            }
            let alpha = _mm256_set1_ps(store.alpha);
            let mut edge = [0.0f32; 24];
            for (r, acc) in acc.iter().enumerate().take(rows) {
                let row = c.add(r * ldc);
                let at = if cols == 24 {
                    row
                } else {
                    std::ptr::copy_nonoverlapping(row, edge.as_mut_ptr(), cols);
                    edge.as_mut_ptr()
                };
                for (j, &acc) in acc.iter().enumerate() {
                    let value = if store.accumulate {
                        _mm256_fmadd_ps(alpha, acc, _mm256_loadu_ps(at.add(8 * j)))
                    } else {
                        _mm256_mul_ps(alpha, acc)
                    };
                    _mm256_storeu_ps(at.add(8 * j), value);
                }
                if cols != 24 {
                    std::ptr::copy_nonoverlapping(edge.as_ptr(), row, cols);
                }
            }
        }
    }
}
