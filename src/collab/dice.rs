//! Dice, the activation of DIN (Zhou et al. 2018): `y = z (p + α (1 − p))` with `p = σ(ẑ)`, ẑ being z normalised over the batch,
//! without scale or shift of its own, and α learnt for each column.
//!
//! In training the batch's mean and variance are used and followed by running ones as `torch.nn.BatchNorm1d` does (momentum 0.1,
//! unbiased variance); after training the running ones are used, so a row's score does not depend on its neighbours.

use rayon::prelude::*;

use super::layers::add;
use super::real::Real;

/// Added to the variance.
const EPS: f64 = 1e-9;
/// Share of a batch in the running mean.
const MOMENTUM: f64 = 0.1;
/// Rows of a task, and of a partial sum.
const ROWS: usize = 128;

/// What the way back needs.
#[derive(Debug)]
pub struct DicePass<T> {
    z: Vec<T>,
    /// Normalised.
    z_hat: Vec<T>,
    /// Mean and biased variance that were used.
    mean: Vec<T>,
    variance: Vec<T>,
}

/// Sums over rows, `[width]`: partial sums of [`ROWS`] rows, added in their order. `row` adds what row i contributes.
fn sum_over_rows<T: Real>(n: usize, width: usize, row: impl Fn(usize, &mut [T]) + Sync) -> Vec<T> {
    let part = |first: usize| {
        let mut sum = vec![T::default(); width];
        (first..(first + ROWS).min(n)).for_each(|i| row(i, &mut sum));
        sum
    };
    let starts: Vec<usize> = (0..n).step_by(ROWS).collect();
    let parts: Vec<Vec<T>> = starts.into_par_iter().map(part).collect();
    let mut sum = vec![T::default(); width];
    parts.iter().for_each(|part| add(part, &mut sum));
    sum
}

/// `[rows, width]` in and out, width that of `alpha`. `running`: mean and variance to use instead of the batch's own.
pub fn dice<T: Real>(z: Vec<T>, alpha: &[T], running: Option<[&[T]; 2]>) -> (Vec<T>, DicePass<T>) {
    let width = alpha.len();
    let n = z.len() / width;
    let share = T::from_wide(1.0 / n.max(1) as f64);
    let row = |i: usize| &z[i * width..][..width];
    let [mean, variance] = match running {
        Some(parts) => parts.map(<[T]>::to_vec),
        None => {
            let mut mean = sum_over_rows(n, width, |i, sum| add(row(i), sum));
            mean.iter_mut().for_each(|m| *m *= share);
            let mut variance = sum_over_rows(n, width, |i, sum: &mut [T]| {
                sum.iter_mut().zip(row(i)).zip(&mean).for_each(|((s, &z), &m)| *s += (z - m) * (z - m));
            });
            variance.iter_mut().for_each(|v| *v *= share);
            [mean, variance]
        }
    };
    let inverse = inverse(&variance);
    let (mut z_hat, mut y) = (vec![T::default(); z.len()], vec![T::default(); z.len()]);
    let rows = z_hat.par_chunks_mut(width).zip(y.par_chunks_mut(width)).zip(z.par_chunks(width));
    rows.with_min_len(ROWS).for_each(|((z_hat, y), z)| {
        for c in 0..width {
            z_hat[c] = (z[c] - mean[c]) * inverse[c];
            let p = sigmoid(z_hat[c]);
            y[c] = z[c] * (p + alpha[c] * (T::from_wide(1.0) - p));
        }
    });
    (y, DicePass { z, z_hat, mean, variance })
}

fn inverse<T: Real>(variance: &[T]) -> Vec<T> {
    variance.iter().map(|&v| T::from_wide(1.0) / (v + T::from_wide(EPS)).sqrt()).collect()
}

fn sigmoid<T: Real>(x: T) -> T {
    T::from_wide(1.0) / (T::from_wide(1.0) + (-x).exp())
}

/// Adds the gradient of alpha to `d_alpha` and returns that of z; the batch's own mean and variance were used.
pub fn dice_backward<T: Real>(pass: &DicePass<T>, alpha: &[T], d_y: &[T], d_alpha: &mut [T]) -> Vec<T> {
    let width = alpha.len();
    let n = d_y.len() / width;
    let one = T::from_wide(1.0);
    let inverse = inverse(&pass.variance);
    // Of z itself, and of ẑ.
    let part = |i: usize, c: usize| {
        let at = i * width + c;
        let (z, p) = (pass.z[at], sigmoid(pass.z_hat[at]));
        let d_z = d_y[at] * (p + alpha[c] * (one - p));
        let d_hat = d_y[at] * z * (one - alpha[c]) * p * (one - p);
        (d_z, d_hat, d_y[at] * z * (one - p))
    };
    let sums = sum_over_rows(n, 3 * width, |i, sum: &mut [T]| {
        for c in 0..width {
            let (_, d_hat, d_alpha) = part(i, c);
            sum[c] += d_hat;
            sum[width + c] += d_hat * pass.z_hat[i * width + c];
            sum[2 * width + c] += d_alpha;
        }
    });
    add(&sums[2 * width..], d_alpha);
    let share = T::from_wide(1.0 / n.max(1) as f64);
    let mut d_z = vec![T::default(); d_y.len()];
    d_z.par_chunks_mut(width).enumerate().with_min_len(ROWS).for_each(|(i, d_z)| {
        for (c, d_z) in d_z.iter_mut().enumerate() {
            let (own, d_hat, _) = part(i, c);
            let along = pass.z_hat[i * width + c] * sums[width + c] * share;
            *d_z = own + (d_hat - sums[c] * share - along) * inverse[c];
        }
    });
    d_z
}

impl<T: Real> DicePass<T> {
    /// Lets running mean and variance follow the batch.
    pub fn follow(&self, mean: &mut [T], variance: &mut [T]) {
        let n = self.z.len() / mean.len();
        if n < 2 {
            return; // no variance
        }
        let (new, old) = (T::from_wide(MOMENTUM), T::from_wide(1.0 - MOMENTUM));
        let unbiased = T::from_wide(n as f64 / (n - 1) as f64);
        for c in 0..mean.len() {
            mean[c] = old * mean[c] + new * self.mean[c];
            variance[c] = old * variance[c] + new * unbiased * self.variance[c];
        }
    }
}
