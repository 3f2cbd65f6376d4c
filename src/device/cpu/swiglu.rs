//! SwiGLU: `y = silu(g) · u`, where gate and up lie side by side in one row, `[g | u]`.

use rayon::prelude::*;

use super::ROWS_PER_TASK;
use super::simd::{exp, per_isa};
use crate::device::profile::{Group, span};

/// `y[t, i] = silu(gu[t, i]) · gu[t, width + i]`; `gu: [n_rows, 2 · width]`, `y: [n_rows, width]`.
pub fn swiglu(gu: &[f32], y: &mut [f32], width: usize) {
    let _span = span(Group::Elementwise, || 0.0);
    y.par_chunks_mut(width).zip(gu.par_chunks(2 * width)).with_min_len(ROWS_PER_TASK).for_each(|(y, gu)| {
        let (g, u) = gu.split_at(width);
        row(g, u, y);
    });
}

/// From `d_y: [n_rows, width]`: `d_gu[t] = [d_y · u · silu'(g) | d_y · silu(g)]`, `silu'(g) = σ (1 + g (1 − σ))`.
pub fn swiglu_backward(gu: &[f32], d_y: &[f32], d_gu: &mut [f32], width: usize) {
    let _span = span(Group::Elementwise, || 0.0);
    d_gu.par_chunks_mut(2 * width)
        .zip(gu.par_chunks(2 * width))
        .zip(d_y.par_chunks(width))
        .with_min_len(ROWS_PER_TASK)
        .for_each(|((d_gu, gu), d_y)| {
            let (g, u) = gu.split_at(width);
            let (d_g, d_u) = d_gu.split_at_mut(width);
            backward_row(g, u, d_y, d_g, d_u);
        });
}

/// 1 / (1 + e⁻ˣ)
#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

per_isa! {
    fn row(g: &[f32], u: &[f32], y: &mut [f32]) {
        for ((y, &g), u) in y.iter_mut().zip(g).zip(u) {
            *y = g * sigmoid(g) * u;
        }
    }
}

per_isa! {
    fn backward_row(g: &[f32], u: &[f32], d_y: &[f32], d_g: &mut [f32], d_u: &mut [f32]) {
        for ((((&g, &u), &d_y), d_g), d_u) in g.iter().zip(u).zip(d_y).zip(d_g).zip(d_u) {
            let s = sigmoid(g);
            *d_g = d_y * u * s * (1.0 + g * (1.0 - s));
            *d_u = d_y * g * s;
        }
    }
}
