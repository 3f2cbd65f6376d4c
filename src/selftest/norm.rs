//! RMSNorm: forward with and without an adapter, again from saved factors, and backward.

use super::floats::Floats;
use super::{Guarded, Outcome, add_adapter, columns, epsilon, limit, random, relative_error, transposed};
use crate::device::cuda::lora::Adapter;
use crate::device::cuda::norm::Norm;
use crate::device::cuda::{Cuda, Result};

/// Large enough that leaving it out shows.
pub(super) const EPS: f32 = 0.03;

/// 1 / sqrt(mean(x²) + eps) of each row.
pub(super) fn factors(x: &[f64], width: usize, eps: f64) -> Vec<f64> {
    x.chunks_exact(width).map(|x| 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / width as f64 + eps).sqrt()).collect()
}

/// h = x · r · w.
pub(super) fn forward(x: &[f64], w: &[f64], eps: f64) -> Vec<f64> {
    let r = factors(x, w.len(), eps);
    x.chunks_exact(w.len()).zip(r).flat_map(|(x, r)| x.iter().zip(w).map(move |(x, w)| x * r * w)).collect()
}

/// d_x = r (g − x r² mean(g · x)), g = d_h · w.
pub(super) fn backward(x: &[f64], w: &[f64], eps: f64, d_h: &[f64]) -> Vec<f64> {
    let width = w.len();
    let mut d_x = Vec::with_capacity(x.len());
    for ((x, d_h), r) in x.chunks_exact(width).zip(d_h.chunks_exact(width)).zip(factors(x, width, eps)) {
        let g: Vec<f64> = d_h.iter().zip(w).map(|(d, w)| d * w).collect();
        let mean = g.iter().zip(x).map(|(g, x)| g * x).sum::<f64>() / width as f64;
        d_x.extend(g.iter().zip(x).map(|(g, x)| r * (g - x * r * r * mean)));
    }
    d_x
}

/// All cases.
pub fn cases(cuda: &Cuda) -> Result<Vec<Outcome>> {
    let norm = Norm::new(cuda)?;
    let mut outcomes = Vec::new();
    for (n, width) in [(1, 8), (3, 72), (7, 576), (2, 2056), (1, 4104), (2, 8192)] {
        for rank in [0, 8, 16, 40, 64] {
            outcomes.push(forwards(cuda, &norm, n, width, rank)?);
        }
        outcomes.push(backwards(cuda, &norm, n, width)?);
    }
    Ok(outcomes)
}

/// Rows of [x | something else | u], as a product leaves them.
fn forwards(cuda: &Cuda, norm: &Norm, n: usize, width: usize, rank: usize) -> Result<Outcome> {
    let p = cuda.precision();
    let (first_u, total) = (width + 8, width + 8 + rank);
    let (rows, w, b) = (random(p, n * total, 1), random(p, width, 2), random(p, width * rank, 3));
    let d_rows = Guarded::filled(cuda, n, total, total + 8, &rows)?;
    let d_w = Guarded::filled(cuda, 1, width, width, &w)?;
    let d_b = Guarded::filled(cuda, rank, width, width, &transposed(&b, rank))?;
    let (h, again) = (Guarded::new(cuda, n, width, width + 16)?, Guarded::new(cuda, n, width, width)?);
    let inv_rms = Floats::new(cuda, n)?;
    let lora = (rank > 0).then(|| Adapter::new(first_u, rank, d_b.rows().address));
    let weight = d_w.rows().address;
    norm.forward(cuda, d_rows.rows(), weight, EPS, h.rows(), &inv_rms.buffer, lora)?;
    norm.saved(cuda, d_rows.rows(), weight, again.rows(), inv_rms.buffer.address())?;

    let mut x = columns(&rows, total, 0, width);
    if rank > 0 {
        add_adapter(&mut x, width, &columns(&rows, total, first_u, rank), &columns(&b, rank, 0, rank));
    }
    let w = columns(&w, width, 0, width);
    let (left, inside) = d_rows.read(cuda)?;
    let left_x: Vec<f32> = left.chunks_exact(total).flat_map(|r| r[..width].to_vec()).collect();
    // Whatever lies beside x stays as it was, and without an adapter so does x.
    let beside = if rank > 0 { width } else { 0 };
    let kept = columns(&left, total, beside, total - beside) == columns(&rows, total, beside, total - beside);
    let ((r, r_inside), (h, h_inside)) = (inv_rms.read(cuda)?, h.read(cuda)?);
    let (again, again_inside) = again.read(cuda)?;
    let mut error = relative_error(&left_x, &x);
    error = error.max(relative_error(&r, &factors(&x, width, f64::from(EPS))));
    error = error.max(relative_error(&h, &forward(&x, &w, f64::from(EPS))));
    // From the same x and factors, the same bits.
    if h != again {
        error = f64::INFINITY;
    }
    // Naive: x with its adapter, x · r and the product with w are rounded.
    let roundings = if rank > 0 { 2.0 } else { 1.0 };
    let limit = limit(p, width + rank) + 2.0 * roundings * epsilon(p);
    let contained = inside && kept && r_inside && h_inside && again_inside;
    Ok(Outcome {
        operation: "rms_norm",
        case: format!("forward n {n} width {width} rank {rank}"),
        error,
        limit,
        contained,
    })
}

fn backwards(cuda: &Cuda, norm: &Norm, n: usize, width: usize) -> Result<Outcome> {
    let p = cuda.precision();
    let (x, w) = (random(p, n * width, 4), random(p, width, 5));
    let (d_h, d_x) = (random(p, n * width, 6), random(p, n * width, 7));
    let wide = |values: &[f32]| columns(values, width, 0, width);
    let factors: Vec<f32> = factors(&wide(&x), width, f64::from(EPS)).iter().map(|r| *r as f32).collect();
    let inv_rms = Floats::filled(cuda, &factors)?;
    let dd_x = Guarded::filled(cuda, n, width, width + 24, &d_x)?;
    let (dx, dh) =
        (Guarded::filled(cuda, n, width, width + 8, &x)?, Guarded::filled(cuda, n, width, width + 16, &d_h)?);
    let dw = Guarded::filled(cuda, 1, width, width, &w)?;
    norm.backward(cuda, dx.rows(), dw.rows().address, inv_rms.buffer.address(), dh.rows(), dd_x.rows())?;
    let mut want = backward(&wide(&x), &wide(&w), f64::from(EPS), &wide(&d_h));
    want.iter_mut().zip(&d_x).for_each(|(w, d)| *w += f64::from(*d));
    let (got, contained) = dd_x.read(cuda)?;
    let error = relative_error(&got, &want);
    // One rounding, of the sum.
    let limit = limit(p, width);
    Ok(Outcome { operation: "rms_norm", case: format!("backward n {n} width {width}"), error, limit, contained })
}

#[cfg(test)]
mod tests {
    use super::super::{assert_close, columns, differences, random};
    use crate::device::cuda::Precision;

    #[test]
    fn the_oracles_gradient_is_that_of_its_forward() {
        let [x, w, d_h] = [1, 2, 3].map(|seed| columns(&random(Precision::F32, 24, seed), 24, 0, 24));
        let w = &w[..8];
        let loss = |x: &[f64]| super::forward(x, w, 0.03).iter().zip(&d_h).map(|(h, d)| h * d).sum::<f64>();
        assert_close(&super::backward(&x, w, 0.03, &d_h), &differences(loss, &x));
    }
}
