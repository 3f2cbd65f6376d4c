//! Low-rank adaptation of a linear layer: `y += s · drop(x) Aᵀ Bᵀ` (Hu et al. 2021), as PEFT computes it.
//!
//! The narrow side of every product here is the rank. It is kept as the *rows* of the product (`u` is stored transposed,
//! `[rank, n]`), since a tile of the matrix kernel is 8 rows by 48 columns: the rank fills it, tokens or features stretch.

use rayon::prelude::*;

use super::ROWS_PER_TASK;
use super::gemm::{Dense, Operand, Output, gemm};
use super::simd::per_isa;
use crate::device::ops::Dropout;
use crate::device::profile::{Group, product, span};
use crate::rng::philox4x32_lanes;

/// One pair: `a: [rank, in_features]`, `b: [out_features, rank]`, row-major.
#[derive(Clone, Copy, Debug)]
pub struct Pair<'a> {
    /// A.
    pub a: &'a [f32],
    /// B.
    pub b: &'a [f32],
    /// Rank r.
    pub rank: usize,
    /// `alpha / r`.
    pub scaling: f32,
}

impl Pair<'_> {
    fn out_features(&self) -> usize {
        self.b.len() / self.rank
    }

    fn in_features(&self) -> usize {
        self.a.len() / self.rank
    }
}

/// What is needed to add to the gradients of a [`Pair`].
#[derive(Debug)]
pub struct PairGradient<'a> {
    /// d_A, added to.
    pub a: &'a mut [f32],
    /// d_B, added to.
    pub b: &'a mut [f32],
    /// `u` as [`forward`] saved it, from the first row of the backward on: element (i, t) at `u[i * u_stride + t]`.
    pub u: &'a [f32],
    /// Rows of the forward.
    pub u_stride: usize,
}

/// Dropout of one pair's input for one run of rows.
#[derive(Clone, Copy, Debug)]
pub struct Mask<'a> {
    /// Probability, seed and step.
    pub dropout: Dropout,
    /// Number of the LoRA module in the model.
    pub module: u32,
    /// Number of each row's token within the step.
    pub tokens: &'a [u32],
}

impl Mask<'_> {
    /// `out = mask · x / (1 − p)`, or `out += …`. `x`, `out`: `[n_rows, width]`.
    pub fn apply(&self, x: &[f32], width: usize, out: &mut [f32], accumulate: bool) {
        out.par_chunks_mut(width)
            .zip(x.par_chunks(width))
            .zip(self.tokens)
            .with_min_len(ROWS_PER_TASK)
            .for_each(|((out, x), &token)| drop_row(&self.dropout, self.module, token, x, out, accumulate));
    }
}

per_isa! {
    fn drop_row(dropout: &Dropout, module: u32, token: u32, x: &[f32], out: &mut [f32], accumulate: bool) {
        /// Philox blocks computed side by side.
        const LANES: usize = 32;
        let (threshold, scale) = (dropout.threshold(), dropout.scale());
        let width = x.len();
        let quarter = width.div_ceil(4);
        for block in (0..quarter).step_by(LANES) {
            let words = philox4x32_lanes::<LANES>(dropout.key(), dropout.counter(module, token, block as u32));
            for (j, words) in words.iter().enumerate() {
                let start = (j * quarter + block).min(width);
                let end = (j * quarter + quarter.min(block + LANES)).min(width);
                for ((out, x), &word) in out[start..end].iter_mut().zip(&x[start..end]).zip(words) {
                    let kept = if word < threshold { 0.0 } else { x * scale };
                    *out = if accumulate { *out + kept } else { kept };
                }
            }
        }
    }
}

/// `u = (drop(x) Aᵀ)ᵀ` (saved for backward), `y += s · uᵀ Bᵀ`.
///
/// `x: [n, in]`; `u: [rank, n]`; `y: [n, ≥ out]` with stride `y_stride`. `space` holds the dropped input, `[n, in]`.
pub fn forward(
    pair: Pair,
    x: &[f32],
    mask: Option<Mask>,
    u: &mut [f32],
    y: &mut [f32],
    y_stride: usize,
    space: &mut [f32],
) {
    let (rank, width) = (pair.rank, pair.in_features());
    let n = x.len() / width;
    let _span = span(Group::Adapter, || product(n, rank, width) + product(n, rank, pair.out_features()));
    let x = dropped(mask, x, width, space);
    let x_transposed = Operand::Dense(Dense::transposed(x, width));
    gemm(rank, n, width, Dense::rows(pair.a, width), x_transposed, Output::set(u, n));
    let b = Operand::Dense(Dense::transposed(pair.b, rank));
    gemm(n, pair.out_features(), rank, Dense::transposed(u, n), b, Output::add(y, y_stride).scaled(pair.scaling));
}

/// From `d_y`: `d_B += s · d_yᵀ u`, `d_u = s · d_y B`, `d_A += d_uᵀ drop(x)`, `d_x += mask · (d_u A)`.
///
/// `x: [n, in]`; `d_y: [n, ≥ out]` with stride `d_y_stride`; `gradient: None` when the pair is frozen; `d_x: None` when
/// nothing before it is trained. `space: [n, in]`.
#[allow(clippy::too_many_arguments)] // one operation, its operands
pub fn backward(
    pair: Pair,
    x: &[f32],
    mask: Option<Mask>,
    d_y: &[f32],
    d_y_stride: usize,
    gradient: Option<PairGradient>,
    d_x: Option<&mut [f32]>,
    space: &mut [f32],
) {
    let (rank, width, out_features) = (pair.rank, pair.in_features(), pair.out_features());
    let n = x.len() / width;
    let (trained, passed_on) = (gradient.is_some() as usize, d_x.is_some() as usize);
    let _span = span(Group::Adapter, || {
        product(n, rank, (1 + trained) * out_features) + product(n, rank, (trained + passed_on) * width)
    });
    let mut d_u = vec![0.0; rank * n];
    let d_y_transposed = Operand::Dense(Dense::transposed(d_y, d_y_stride));
    let scaled = Output::set(&mut d_u, n).scaled(pair.scaling);
    gemm(rank, n, out_features, Dense::transposed(pair.b, rank), d_y_transposed, scaled);
    if let Some(g) = gradient {
        let mut d_b = vec![0.0; rank * out_features];
        let scaled = Output::set(&mut d_b, out_features).scaled(pair.scaling);
        let d_y = Operand::Dense(Dense::rows(d_y, d_y_stride));
        gemm(rank, out_features, n, Dense::rows(g.u, g.u_stride), d_y, scaled);
        for (o, row) in g.b.chunks_exact_mut(rank).enumerate() {
            for (i, g) in row.iter_mut().enumerate() {
                *g += d_b[i * out_features + o];
            }
        }
        let x = Operand::Dense(Dense::rows(dropped(mask, x, width, space), width));
        gemm(rank, width, n, Dense::rows(&d_u, n), x, Output::add(g.a, width));
    }
    if let Some(d_x) = d_x {
        let (d_u, a) = (Dense::transposed(&d_u, n), Operand::Dense(Dense::rows(pair.a, width)));
        match mask {
            None => gemm(n, width, rank, d_u, a, Output::add(d_x, width)),
            Some(mask) => {
                let space = &mut space[..n * width];
                gemm(n, width, rank, d_u, a, Output::set(space, width));
                mask.apply(space, width, d_x, true);
            }
        }
    }
}

fn dropped<'a>(mask: Option<Mask>, x: &'a [f32], width: usize, space: &'a mut [f32]) -> &'a [f32] {
    match mask {
        None => x,
        Some(mask) => {
            let space = &mut space[..x.len()];
            mask.apply(x, width, space, false);
            space
        }
    }
}
