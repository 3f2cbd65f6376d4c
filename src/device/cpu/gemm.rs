//! The matrix product: `C = alpha · A B` or `C += alpha · A B`, float32 arithmetic.
//!
//! A and C are float32; B is float32 or a frozen weight in its file's own type ([`FrozenMatrix`], f32, f16 or bf16), read
//! as it is (`x W`) or transposed (`x Wᵀ`). Both operands are packed into panels once per product, then tiles of C are
//! computed in parallel. Which thread computes a tile, and how C is cut, does not change a bit of the result
//! (`microkernel.rs`).

use std::cell::Cell;

use rayon::prelude::*;

use super::microkernel::{Isa, MR, NR, Store};
use super::pack::{Bf16Bits, Element, F16Bits, pack_a_columns, pack_columns, pack_rows};
use super::shared::SharedMut;
use crate::llm::weights::WeightMatrix;

/// Inner dimension handled before C is touched again: a panel of B is then 96 KiB and stays in the L2 cache.
/// Fixed, because it decides the order of additions.
const KC: usize = 512;
/// Rows of C in one task.
const M_TASK: usize = 96;
/// Floats of packed B at once (16 MiB): the last-level cache holds it, and memory stays bounded for large matrices.
const B_FLOATS: usize = 4 << 20;
/// Products smaller than this (multiply-adds) are not worth waking another thread.
const PARALLEL_FROM: usize = 1 << 19;

/// Runs an expression with the weight's elements in their own type.
macro_rules! with_elements {
    ($part:expr, $data:ident => $body:expr) => {
        if let Some($data) = $part.as_f32() {
            $body
        } else if let Some(bits) = $part.as_bf16() {
            let $data: &[Bf16Bits] = bytemuck::cast_slice(bits);
            $body
        } else if let Some(bits) = $part.as_f16() {
            let $data: &[F16Bits] = bytemuck::cast_slice(bits);
            $body
        }
    };
}

/// A float32 operand with a stride, row-major (`Rows`) or the transpose of a row-major matrix (`Columns`).
#[derive(Clone, Copy, Debug)]
pub enum Dense<'a> {
    /// Element (i, j) is `data[i * stride + j]`.
    Rows {
        /// The elements.
        data: &'a [f32],
        /// Distance between rows.
        stride: usize,
    },
    /// Element (i, j) is `data[j * stride + i]`.
    Columns {
        /// The elements.
        data: &'a [f32],
        /// Distance between columns.
        stride: usize,
    },
}

impl<'a> Dense<'a> {
    /// A row-major matrix.
    pub fn rows(data: &'a [f32], stride: usize) -> Self {
        Dense::Rows { data, stride }
    }

    /// The transpose of a row-major matrix.
    pub fn transposed(data: &'a [f32], stride: usize) -> Self {
        Dense::Columns { data, stride }
    }

    fn check(&self, rows: usize, cols: usize, name: &str) {
        let (outer, inner, data, stride) = match *self {
            Dense::Rows { data, stride } => (rows, cols, data, stride),
            Dense::Columns { data, stride } => (cols, rows, data, stride),
        };
        let needed = if outer == 0 || inner == 0 { 0 } else { (outer - 1) * stride + inner };
        assert!(
            inner <= stride.max(inner) && needed <= data.len(),
            "{name}: {rows} x {cols} needs {needed} floats, stride {stride}, has {}",
            data.len()
        );
    }
}

/// A frozen weight `[out_features, in_features]`, possibly several matrices below one another (q over k over v).
#[derive(Clone, Debug)]
pub struct FrozenMatrix {
    parts: Vec<WeightMatrix>,
    out_features: usize,
    in_features: usize,
}

impl FrozenMatrix {
    /// Stacks matrices of the same width and type. Panics if there is none or they differ: a loader's error by then.
    pub fn stack(parts: Vec<WeightMatrix>) -> Self {
        let in_features = parts[0].cols();
        assert!(parts.iter().all(|p| p.cols() == in_features), "stacked weights differ in width");
        let out_features = parts.iter().map(WeightMatrix::rows).sum();
        FrozenMatrix { parts, out_features, in_features }
    }

    /// Rows.
    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// Columns.
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// One of the stacked matrices, to be replaced by another of its shape.
    pub fn part_mut(&mut self, part: usize) -> &mut WeightMatrix {
        &mut self.parts[part]
    }

    /// The part that holds row `r`, and the row's number there.
    fn locate(&self, mut r: usize) -> (&WeightMatrix, usize) {
        for part in &self.parts {
            if r < part.rows() {
                return (part, r);
            }
            r -= part.rows();
        }
        unreachable!("row {r} beyond a matrix of {} rows", self.out_features)
    }
}

/// The right operand.
#[derive(Clone, Copy, Debug)]
pub enum Operand<'a> {
    /// Float32 with strides.
    Dense(Dense<'a>),
    /// `Wᵀ`: K = in_features, N = out_features (the forward direction).
    Transposed(&'a FrozenMatrix),
    /// `W`: K = out_features, N = in_features (the backward direction).
    Weight(&'a FrozenMatrix),
}

impl Operand<'_> {
    fn check(&self, k: usize, n: usize) {
        match self {
            Operand::Dense(d) => d.check(k, n, "B"),
            Operand::Transposed(w) => assert_eq!((k, n), (w.in_features, w.out_features), "B = transposed weight"),
            Operand::Weight(w) => assert_eq!((k, n), (w.out_features, w.in_features), "B = weight"),
        }
    }

    /// Packs columns `n0..n0 + cols` over all k into a panel `[k][NR]`.
    fn pack_panel(&self, isa: Isa, k: usize, n0: usize, cols: usize, out: &mut [f32]) {
        match *self {
            Operand::Dense(Dense::Rows { data, stride }) => {
                pack_columns(isa, k, cols, |r| &data[r * stride + n0..], out);
            }
            Operand::Dense(Dense::Columns { data, stride }) => {
                let rows: [&[f32]; NR] =
                    std::array::from_fn(|j| if j < cols { &data[(n0 + j) * stride..][..k] } else { &[] });
                pack_rows(isa, &rows[..cols], k, NR, NR, out);
            }
            Operand::Transposed(w) => {
                let (part, first) = w.locate(n0);
                if first + cols <= part.rows() {
                    pack_weight_rows(isa, part, first, k, cols, out);
                } else {
                    // A panel over the seam of two stacked matrices: element by element, rare and small.
                    let mut row = vec![0.0; k];
                    out[..k * NR].fill(0.0);
                    for j in 0..cols {
                        let (part, r) = w.locate(n0 + j);
                        part.read_row(r, &mut row);
                        for (k, &v) in row.iter().enumerate() {
                            out[k * NR + j] = v;
                        }
                    }
                }
            }
            Operand::Weight(w) => {
                let mut done = 0;
                for part in &w.parts {
                    let rows = part.rows();
                    pack_weight_columns(isa, part, rows, n0, cols, &mut out[done * NR..]);
                    done += rows;
                }
            }
        }
    }
}

fn pack_weight_rows(isa: Isa, part: &WeightMatrix, first: usize, k: usize, cols: usize, out: &mut [f32]) {
    fn go<T: Element>(isa: Isa, data: &[T], width: usize, first: usize, k: usize, cols: usize, out: &mut [f32]) {
        let rows: [&[T]; NR] =
            std::array::from_fn(|j| if j < cols { &data[(first + j) * width..][..k] } else { &data[..0] });
        pack_rows(isa, &rows[..cols], k, NR, NR, out);
    }
    let width = part.cols();
    with_elements!(part, data => go(isa, data, width, first, k, cols, out));
}

fn pack_weight_columns(isa: Isa, part: &WeightMatrix, rows: usize, n0: usize, cols: usize, out: &mut [f32]) {
    let width = part.cols();
    with_elements!(part, data => pack_columns(isa, rows, cols, |r| &data[r * width + n0..], out));
}

/// C: row-major with a stride.
#[derive(Debug)]
pub struct Output<'a> {
    data: SharedMut<'a, f32>,
    stride: usize,
    accumulate: bool,
    alpha: f32,
}

impl<'a> Output<'a> {
    /// `C = A B`.
    pub fn set(data: &'a mut [f32], stride: usize) -> Self {
        Output { data: SharedMut::new(data), stride, accumulate: false, alpha: 1.0 }
    }

    /// `C += A B`.
    pub fn add(data: &'a mut [f32], stride: usize) -> Self {
        Output { accumulate: true, ..Output::set(data, stride) }
    }

    /// C inside a buffer that other tasks write too.
    ///
    /// # Safety
    /// No other task touches the elements of C (the rest of the buffer may be in use).
    pub(super) unsafe fn shared(data: SharedMut<'a, f32>, stride: usize, accumulate: bool) -> Self {
        Output { data, stride, accumulate, alpha: 1.0 }
    }

    /// The product scaled by `alpha`.
    pub fn scaled(mut self, alpha: f32) -> Self {
        self.alpha = alpha;
        self
    }
}

thread_local! {
    /// Packing space, kept between products. Taken out while in use: a thread that waits inside one product may be
    /// given part of another.
    static SPACE: Cell<(Vec<f32>, Vec<f32>)> = const { Cell::new((Vec::new(), Vec::new())) };
}

/// `C[m, n] = alpha · A[m, k] B[k, n]`, or added to C, on all threads when it is worth it.
///
/// Panics if a slice is too short for its shape: shapes come from the model's configuration, checked when it was loaded.
pub fn gemm(m: usize, n: usize, k: usize, a: Dense, b: Operand, c: Output) {
    let parallel = m.saturating_mul(n).saturating_mul(k) >= PARALLEL_FROM;
    gemm_with(Isa::detect(), parallel, m, n, k, a, b, c);
}

/// [`gemm`] on the calling thread: for products inside a task (attention heads).
pub fn gemm_serial(m: usize, n: usize, k: usize, a: Dense, b: Operand, c: Output) {
    gemm_with(Isa::detect(), false, m, n, k, a, b, c);
}

#[allow(clippy::too_many_arguments)] // the textbook signature, and tests choose the instruction set
pub(super) fn gemm_with(isa: Isa, parallel: bool, m: usize, n: usize, k: usize, a: Dense, b: Operand, c: Output) {
    if m == 0 || n == 0 {
        return;
    }
    a.check(m, k, "A");
    b.check(k, n);
    assert!(
        n <= c.stride && (m - 1) * c.stride + n <= c.data.len(),
        "C: {m} x {n}, stride {}, has {}",
        c.stride,
        c.data.len()
    );
    let kernel = isa.kernel();
    let store = Store { alpha: c.alpha, accumulate: c.accumulate };
    let (mut space_a, mut space_b) = SPACE.take();

    let m_panels = m.div_ceil(MR);
    // B is packed in groups of columns so that the packed group is bounded.
    let group = (B_FLOATS / (k.max(1) * NR)).max(1) * NR;
    let a_len = m_panels * MR * k;
    let b_len = group.min(n.div_ceil(NR) * NR) * k;
    grow(&mut space_a, a_len);
    grow(&mut space_b, b_len);
    let (packed_a, packed_b) = (&mut space_a[..a_len], &mut space_b[..b_len]);

    let pack_a = |(panel, out): (usize, &mut [f32])| {
        let rows = (m - panel * MR).min(MR);
        match a {
            Dense::Rows { data, stride } => {
                let rows: [&[f32]; MR] =
                    std::array::from_fn(|r| if r < rows { &data[(panel * MR + r) * stride..][..k] } else { &[] });
                let present = rows.iter().filter(|r| r.len() == k).count();
                pack_rows(isa, &rows[..if k == 0 { 0 } else { present }], k, MR, MR, out);
            }
            Dense::Columns { data, stride } => pack_a_columns(k, rows, |r| &data[r * stride + panel * MR..], out),
        }
    };
    if k > 0 {
        if parallel {
            packed_a.par_chunks_mut(MR * k).enumerate().with_min_len(4).for_each(pack_a);
        } else {
            packed_a.chunks_mut(MR * k).enumerate().for_each(pack_a);
        }
    }

    for n0 in (0..n).step_by(group) {
        let cols = group.min(n - n0);
        let n_panels = cols.div_ceil(NR);
        let packed_b = &mut packed_b[..n_panels * NR * k];
        let pack_b = |(panel, out): (usize, &mut [f32])| {
            let at = n0 + panel * NR;
            b.pack_panel(isa, k, at, (n - at).min(NR), out);
        };
        if k > 0 {
            if parallel {
                packed_b.par_chunks_mut(NR * k).enumerate().for_each(pack_b);
            } else {
                packed_b.chunks_mut(NR * k).enumerate().for_each(pack_b);
            }
        }
        let (packed_a, packed_b) = (&*packed_a, &*packed_b);
        let m_tasks = m.div_ceil(M_TASK);
        // Enough tasks to keep the threads evenly busy, few enough that a task's panels of A stay in cache.
        let panels_per_task =
            if parallel { n_panels.div_ceil((16usize).div_ceil(m_tasks)).clamp(1, 8) } else { n_panels };
        let n_tasks = n_panels.div_ceil(panels_per_task);
        let task = |t: usize| {
            let (mt, nt) = (t / n_tasks, t % n_tasks);
            let rows = mt * M_TASK..((mt + 1) * M_TASK).min(m);
            let panels = nt * panels_per_task..((nt + 1) * panels_per_task).min(n_panels);
            let mut k0 = 0;
            loop {
                let kc = KC.min(k - k0);
                let store = Store { accumulate: store.accumulate || k0 > 0, ..store };
                for panel in panels.clone() {
                    let at = n0 + panel * NR;
                    for r in rows.clone().step_by(MR) {
                        // SAFETY: panel offsets lie inside the packed buffers; the tile lies inside C (checked above),
                        // and no two tasks share a tile.
                        unsafe {
                            kernel(
                                kc,
                                packed_a.as_ptr().add(r * k + k0 * MR),
                                packed_b.as_ptr().add(panel * NR * k + k0 * NR),
                                c.data.at(r * c.stride + at),
                                c.stride,
                                (m - r).min(MR),
                                (n - at).min(NR),
                                store,
                            );
                        }
                    }
                }
                k0 += kc;
                if k0 >= k {
                    break;
                }
            }
        };
        if parallel {
            (0..m_tasks * n_tasks).into_par_iter().with_max_len(1).for_each(task);
        } else {
            (0..m_tasks * n_tasks).for_each(task);
        }
    }
    SPACE.set((space_a, space_b));
}

fn grow(space: &mut Vec<f32>, len: usize) {
    if space.len() < len {
        space.resize(len, 0.0);
    }
}

#[cfg(test)]
#[path = "gemm_tests.rs"]
mod tests;
