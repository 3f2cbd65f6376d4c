//! RMSNorm: `y = x · r · w` with `r = 1 / sqrt(mean(x²) + eps)` per row (Zhang & Sennrich 2019; LLaMA's variant).

use rayon::prelude::*;

use super::ROWS_PER_TASK;
use super::simd::{per_isa, sum_lanes};
use crate::device::profile::{Group, span};

/// `y[t, :] = x[t, :] · r[t] · w`; saves `r` in `inv_rms[t]`.
///
/// `x`, `y`: `[n_rows, width]`; `w`: `[width]`; `inv_rms`: `[n_rows]`.
pub fn rms_norm(x: &[f32], w: &[f32], eps: f64, y: &mut [f32], inv_rms: &mut [f32]) {
    let _span = span(Group::Elementwise, || 0.0);
    let width = w.len();
    y.par_chunks_mut(width).zip(x.par_chunks(width)).zip(inv_rms.par_iter_mut()).with_min_len(ROWS_PER_TASK).for_each(
        |((y, x), inv_rms)| {
            let mean = f64::from(dot(x, x)) / width as f64;
            *inv_rms = (1.0 / (mean + eps).sqrt()) as f32;
            scale_row(x, w, *inv_rms, y);
        },
    );
}

/// The forward again from a saved `inv_rms`.
pub fn rms_norm_saved(x: &[f32], w: &[f32], inv_rms: &[f32], y: &mut [f32]) {
    let _span = span(Group::Elementwise, || 0.0);
    let width = w.len();
    y.par_chunks_mut(width)
        .zip(x.par_chunks(width))
        .zip(inv_rms)
        .with_min_len(ROWS_PER_TASK)
        .for_each(|((y, x), &r)| scale_row(x, w, r, y));
}

/// `d_x += r · (g − x · r² · mean(g · x))` with `g = d_y · w`: the gradient joins that of the residual stream.
pub fn rms_norm_backward(x: &[f32], w: &[f32], inv_rms: &[f32], d_y: &[f32], d_x: &mut [f32]) {
    let _span = span(Group::Elementwise, || 0.0);
    let width = w.len();
    d_x.par_chunks_mut(width)
        .zip(x.par_chunks(width))
        .zip(d_y.par_chunks(width))
        .zip(inv_rms)
        .with_min_len(ROWS_PER_TASK)
        .for_each(|(((d_x, x), d_y), &r)| backward_row(x, w, r, d_y, d_x));
}

per_isa! {
    fn dot(x: &[f32], y: &[f32]) -> f32 {
        sum_lanes(x.len().min(y.len()), |i| x[i] * y[i])
    }
}

per_isa! {
    fn scale_row(x: &[f32], w: &[f32], r: f32, y: &mut [f32]) {
        for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
            *y = x * r * w;
        }
    }
}

per_isa! {
    fn backward_row(x: &[f32], w: &[f32], r: f32, d_y: &[f32], d_x: &mut [f32]) {
        let n = w.len();
        let (x, d_y) = (&x[..n], &d_y[..n]);
        let projection = sum_lanes(n, |i| d_y[i] * w[i] * x[i]) / n as f32;
        let factor = r * r * r * projection;
        for (((d_x, x), d_y), w) in d_x.iter_mut().zip(x).zip(d_y).zip(w) {
            *d_x += r * d_y * w - factor * x;
        }
    }
}
