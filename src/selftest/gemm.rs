//! Matrix products with each epilogue, tile shape, raggedness and mask; the same through cuBLASLt, where a card's choice lets it in.

use super::{Guarded, Outcome, epsilon, limit, random, relative_error, round};
use crate::device::cuda::gemm::{Epilogue, Gemm, Masked, Masks, Stack, Weight};
use crate::device::cuda::mask::{Mask, Numbers, mask_words};
use crate::device::cuda::memory::to_elements;
use crate::device::cuda::{Buffer, Cuda, GemmChoice, Result};
use crate::device::ops::Dropout;
use crate::rng::philox4x32;

/// `a: [m, k]` times `b: [n, k]` (transposed) or `[k, n]`.
pub(super) fn product(a: &[f32], b: &[f32], m: usize, n: usize, k: usize, way: Weight) -> Vec<f64> {
    let mut c = vec![0.0; m * n];
    for (a, c) in a.chunks_exact(k).zip(c.chunks_exact_mut(n)) {
        for (j, c) in c.iter_mut().enumerate() {
            *c = (0..k)
                .map(|i| {
                    f64::from(a[i]) * f64::from(if way == Weight::Transposed { b[j * k + i] } else { b[i * n + j] })
                })
                .sum();
        }
    }
    c
}

/// Factor of element (token, feature): the definition in [`Dropout`], one Philox word at a time.
pub(super) fn factor(d: &Dropout, module: u32, token: u32, feature: usize, width: usize) -> f64 {
    let quarter = width.div_ceil(4);
    let words = philox4x32(d.key(), d.counter(module, token, (feature % quarter) as u32));
    if words[feature / quarter] < d.threshold() { 0.0 } else { f64::from(d.scale()) }
}

pub(super) fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// Derivatives of silu(gate) · up with respect to gate and up.
fn silu_product_backward(gate: f64, up: f64) -> [f64; 2] {
    let s = 1.0 / (1.0 + (-gate).exp());
    [up * s * (1.0 + gate * (1.0 - s)), silu(gate)]
}

/// All cases.
pub fn cases(cuda: &Cuda) -> Result<Vec<Outcome>> {
    let mut gemm = Gemm::new(cuda)?;
    let mut outcomes = Vec::new();
    // Blocks that stay walk several tiles each.
    gemm.resident = 2;
    for shape in 0..gemm.shapes() {
        gemm.force = Some(shape);
        every_case(cuda, &gemm, &mut outcomes)?;
    }
    if gemm.has_cublaslt() {
        outcomes.extend(cublaslt_cases(cuda)?);
    }
    Ok(outcomes)
}

/// All cases by cuBLASLt, as far as it can; the card must have been opened with a choice that lets it in.
pub fn cublaslt_cases(cuda: &Cuda) -> Result<Vec<Outcome>> {
    let mut gemm = Gemm::new(cuda)?;
    gemm.choice = GemmChoice::CublasLt;
    let mut outcomes = Vec::new();
    every_case(cuda, &gemm, &mut outcomes)?;
    outcomes.iter_mut().for_each(|o| (o.case, o.operation) = (format!("{}: {}", o.operation, o.case), "gemm cuBLASLt"));
    Ok(outcomes)
}

fn every_case(cuda: &Cuda, gemm: &Gemm, outcomes: &mut Vec<Outcome>) -> Result<()> {
    for way in [Weight::Transposed, Weight::Plain] {
        for (m, n, k) in [(1, 8, 8), (7, 72, 40), (63, 64, 64), (65, 136, 72), (257, 200, 104), (1100, 24, 16)] {
            for full in [false, true] {
                outcomes.push(plain(cuda, gemm, way, m, n, k, full)?);
            }
            outcomes.push(swiglu(cuda, gemm, way, m, n, k)?);
        }
        for (m, n, tail, k) in [(70, 72, 16, 40), (150, 264, 136, 200)] {
            outcomes.push(stacked(cuda, gemm, way, m, n, tail, k)?);
        }
        for (m, width, rank) in [(33, 72, 8), (70, 200, 16), (5, 64, 40)] {
            outcomes.push(masked(cuda, gemm, way, m, width, rank)?);
        }
    }
    Ok(())
}

fn plain(cuda: &Cuda, gemm: &Gemm, way: Weight, m: usize, n: usize, k: usize, full: bool) -> Result<Outcome> {
    let p = cuda.precision();
    let (a, b) = (random(p, m * k, 1), random(p, n * k, 2));
    let (bias, addend) = (random(p, n, 3), random(p, m * n, 4));
    let mut want = product(&a, &b, m, n, k, way);
    let da = Guarded::filled(cuda, m, k, k + 8, &a)?;
    let (b_rows, b_columns) = if way == Weight::Transposed { (n, k) } else { (k, n) };
    let db = Guarded::filled(cuda, b_rows, b_columns, b_columns + 16, &b)?;
    // The addend is C itself: a residual stream is added to in place.
    let dc = Guarded::filled(cuda, m, n, n + 8, &addend)?;
    let d_bias = Buffer::from_host(cuda, &to_elements(p, &bias), "bias")?;
    let mut epilogue = Epilogue::NONE;
    if full {
        want.iter_mut().enumerate().for_each(|(i, w)| *w += f64::from(bias[i % n]) + f64::from(addend[i]));
        epilogue = Epilogue::Plain { bias: d_bias.address(), addend: Some(dc.rows()), masks: None };
    }
    gemm.run(cuda, da.rows(), db.rows(), way, dc.rows(), epilogue)?;
    let (got, contained) = dc.read(cuda)?;
    let case = format!("{way:?} m {m} n {n} k {k}{}", if full { " + bias + residual" } else { "" });
    Ok(Outcome { operation: "gemm", case, error: relative_error(&got, &want), limit: limit(p, k), contained })
}

/// W and the adapters' A apart, no dropout: `n` and `tail` are their rows, `k` their width. Bias and residual in the forward go
/// to W's columns alone.
fn stacked(cuda: &Cuda, gemm: &Gemm, way: Weight, m: usize, n: usize, tail: usize, k: usize) -> Result<Outcome> {
    let p = cuda.precision();
    let b = random(p, (n + tail) * k, 10);
    let dw = Guarded::filled(cuda, n, k, k + 8, &b[..n * k])?;
    let da = Guarded::filled(cuda, tail, k, k, &b[n * k..])?;
    let stack = Stack { weight: dw.rows(), adapters: Some(da.rows()) };
    let (inner, outer) = if way == Weight::Transposed { (k, n + tail) } else { (n + tail, k) };
    let added = if way == Weight::Transposed { n } else { k };
    let x = random(p, m * inner, 11);
    let (bias, addend) = (random(p, added, 12), random(p, m * added, 13));
    let dx = Guarded::filled(cuda, m, inner, inner, &x)?;
    let d_addend = Guarded::filled(cuda, m, added, added, &addend)?;
    let d_bias = Buffer::from_host(cuda, &to_elements(p, &bias), "bias")?;
    let dc = Guarded::new(cuda, m, outer, outer)?;
    let epilogue = Epilogue::Plain { bias: d_bias.address(), addend: Some(d_addend.rows()), masks: None };
    gemm.run(cuda, dx.rows(), stack, way, dc.rows(), epilogue)?;
    let mut want = product(&x, &b, m, outer, inner, way);
    for (want, addend) in want.chunks_exact_mut(outer).zip(addend.chunks_exact(added)) {
        for ((want, addend), bias) in want.iter_mut().zip(addend).zip(&bias) {
            *want += f64::from(*addend) + f64::from(*bias);
        }
    }
    let (got, contained) = dc.read(cuda)?;
    let case = format!("{way:?} m {m} rows {n} + {tail} width {k}");
    let error = relative_error(&got, &want);
    Ok(Outcome { operation: "gemm stack", case, error, limit: limit(p, inner), contained })
}

/// Forward: gate and up in turn from x [m, k]. Backward: d_act = d_y W, then through SwiGLU.
fn swiglu(cuda: &Cuda, gemm: &Gemm, way: Weight, m: usize, n: usize, k: usize) -> Result<Outcome> {
    let p = cuda.precision();
    let scale = 1.0 / (k as f32).sqrt();
    let a: Vec<f32> = random(p, m * k, 5).iter().map(|x| round(p, x * scale)).collect();
    let da = Guarded::filled(cuda, m, k, k, &a)?;
    if way == Weight::Transposed {
        let n = n.next_multiple_of(16);
        let b = random(p, n * k, 6);
        let db = Guarded::filled(cuda, n, k, k, &b)?;
        let (dc, act) = (Guarded::new(cuda, m, n, n)?, Guarded::new(cuda, m, n / 2, n / 2 + 8)?);
        gemm.run(
            cuda,
            da.rows(),
            db.rows(),
            way,
            dc.rows(),
            Epilogue::Swiglu { bias: 0, act: act.rows(), keep: true },
        )?;
        let gate_up = product(&a, &b, m, n, k, way);
        let want: Vec<f64> = gate_up.chunks_exact(2).map(|gu| silu(gu[0]) * gu[1]).collect();
        let ((kept, inside), (got, contained)) = (dc.read(cuda)?, act.read(cuda)?);
        let error = relative_error(&got, &want).max(relative_error(&kept, &gate_up));
        // Naive: gate and up are rounded, then their product is.
        let limit = 2.0 * (3.0 * epsilon(p) + limit(p, k));
        let case = format!("forward m {m} n {n} k {k}");
        return Ok(Outcome { operation: "gemm swiglu", case, error, limit, contained: contained && inside });
    }
    let b = random(p, n * k, 6);
    let db = Guarded::filled(cuda, k, n, n, &b)?;
    let gate_up = random(p, m * 2 * n, 7);
    let saved = Guarded::filled(cuda, m, 2 * n, 2 * n + 8, &gate_up)?;
    let dc = Guarded::new(cuda, m, 2 * n, 2 * n)?;
    gemm.run(
        cuda,
        da.rows(),
        db.rows(),
        way,
        dc.rows(),
        Epilogue::SwigluBackward { gate_up: saved.rows(), masks: None },
    )?;
    let d_act = product(&a, &b, m, n, k, way);
    let want: Vec<f64> = d_act
        .iter()
        .zip(gate_up.chunks_exact(2))
        .flat_map(|(d, gu)| silu_product_backward(f64::from(gu[0]), f64::from(gu[1])).map(|partial| d * partial))
        .collect();
    let (got, contained) = dc.read(cuda)?;
    let case = format!("backward m {m} n {n} k {k}");
    let limit = 2.0 * (epsilon(p) + limit(p, k));
    Ok(Outcome { operation: "gemm swiglu", case, error: relative_error(&got, &want), limit, contained })
}

/// Two adapters with dropout after a plain part, as in [q | k | v | u_q | u_v]; W and the adapters lie apart.
fn masked(cuda: &Cuda, gemm: &Gemm, way: Weight, m: usize, width: usize, rank: usize) -> Result<Outcome> {
    let p = cuda.precision();
    let dropout = Dropout { p: 0.3, seed: 77, step: 5 };
    let plain = 88;
    let n_out = plain + 2 * rank;
    let tokens: Vec<u32> = (0..m as u32).map(|t| 3 * t + 1).collect();
    let d_tokens = Buffer::from_host(cuda, &tokens, "tokens")?;
    let (mask, numbers) = (Mask::new(cuda)?, Numbers::upload(cuda, &dropout)?);
    let masks: [Buffer<u32>; 2] =
        [Buffer::new(cuda, m * mask_words(width), "mask")?, Buffer::new(cuda, m * mask_words(width), "mask")?];
    let modules = [4, 9];
    for (out, module) in masks.iter().zip(modules) {
        mask.run(cuda, &numbers, module, &d_tokens, 0, m, width, out)?;
    }
    let adapters = [
        Masked { first: plain, count: rank, mask: masks[0].address() },
        Masked { first: plain + rank, count: rank, mask: masks[1].address() },
    ];
    let applied = Some(Masks { adapters: &adapters, width, scale: dropout.scale() });
    let module_of = |column: usize| column.checked_sub(plain).map(|c| modules[c / rank]);
    let weight = random(p, n_out * width, 8);
    let dw = Guarded::filled(cuda, plain, width, width, &weight[..plain * width])?;
    let da = Guarded::filled(cuda, 2 * rank, width, width + 8, &weight[plain * width..])?;
    let stack = Stack { weight: dw.rows(), adapters: Some(da.rows()) };
    let epilogue = Epilogue::Plain { bias: 0, addend: None, masks: applied };
    // The factor of x[row, feature] on its way to column `column`.
    let scale_of = |column: usize, row: usize, feature: usize| {
        module_of(column).map_or(1.0, |module| factor(&dropout, module, tokens[row], feature, width))
    };
    let (got, contained, want, terms) = if way == Weight::Transposed {
        let x = random(p, m * width, 9);
        let dx = Guarded::filled(cuda, m, width, width, &x)?;
        let dc = Guarded::new(cuda, m, n_out, n_out)?;
        gemm.run(cuda, dx.rows(), stack, way, dc.rows(), epilogue)?;
        let mut want = vec![0.0; m * n_out];
        for (i, want) in want.iter_mut().enumerate() {
            let (row, column) = (i / n_out, i % n_out);
            *want = (0..width)
                .map(|f| {
                    f64::from(x[row * width + f]) * scale_of(column, row, f) * f64::from(weight[column * width + f])
                })
                .sum();
        }
        let (got, contained) = dc.read(cuda)?;
        (got, contained, want, width)
    } else {
        let d_y = random(p, m * n_out, 9);
        let dy = Guarded::filled(cuda, m, n_out, n_out, &d_y)?;
        let dc = Guarded::new(cuda, m, width, width)?;
        gemm.run(cuda, dy.rows(), stack, way, dc.rows(), epilogue)?;
        let mut want = vec![0.0; m * width];
        for (i, want) in want.iter_mut().enumerate() {
            let (row, f) = (i / width, i % width);
            *want = (0..n_out)
                .map(|c| f64::from(d_y[row * n_out + c]) * f64::from(weight[c * width + f]) * scale_of(c, row, f))
                .sum();
        }
        let (got, contained) = dc.read(cuda)?;
        (got, contained, want, n_out)
    };
    let case = format!("{way:?} m {m} width {width} rank {rank}");
    let error = relative_error(&got, &want);
    Ok(Outcome { operation: "gemm dropout", case, error, limit: limit(p, terms), contained })
}

#[cfg(test)]
mod tests {
    use super::super::{assert_close, differences};

    #[test]
    fn the_oracles_derivatives_are_those_of_its_product() {
        for (gate, up) in [(0.0, 1.5), (1.3, -0.7), (-4.0, 2.0), (9.0, 0.1)] {
            let want = differences(|x| super::silu(x[0]) * x[1], &[gate, up]);
            assert_close(&super::silu_product_backward(gate, up), &want);
        }
    }
}
