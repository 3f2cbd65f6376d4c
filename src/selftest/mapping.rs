//! The mapping forward and backward, at sizes that leave tiles ragged and at sizes at which K is cut into parts.
//!
//! The backward starts from the device's own hidden layer, so that an element whose sign rounding decides is not an error.

use super::floats::Floats;
use super::{Guarded, Outcome, epsilon, limit, random, relative_error};
use crate::device::cuda::mapping::{Mapped, Mapping, Widths};
use crate::device::cuda::{Cuda, Precision, Result};

/// `a: [m, k]` times `b: [n, k]`ᵀ, plus `bias`.
pub(super) fn linear(a: &[f64], b: &[f32], bias: &[f32], k: usize) -> Vec<f64> {
    let row = |a: &[f64]| -> Vec<f64> {
        let column =
            |(b, bias): (&[f32], &f32)| f64::from(*bias) + a.iter().zip(b).map(|(a, &b)| a * f64::from(b)).sum::<f64>();
        b.chunks_exact(k).zip(bias).map(column).collect()
    };
    a.chunks_exact(k).flat_map(row).collect()
}

/// `a: [m, k]` times `b: [k, n]`.
pub(super) fn times(a: &[f64], b: &[f32], k: usize, n: usize) -> Vec<f64> {
    let mut c = vec![0.0; a.len() / k * n];
    for (a, c) in a.chunks_exact(k).zip(c.chunks_exact_mut(n)) {
        for (a, b) in a.iter().zip(b.chunks_exact(n)) {
            c.iter_mut().zip(b).for_each(|(c, &b)| *c += a * f64::from(b));
        }
    }
    c
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| x.into()).collect()
}

/// All cases.
pub fn cases(cuda: &Cuda) -> Result<Vec<Outcome>> {
    let mut outcomes = Vec::new();
    for (n, dim, mid, out) in
        [(1, 8, 16, 8), (5, 20, 12, 28), (64, 64, 128, 64), (67, 64, 200, 136), (130, 72, 640, 72), (33, 16, 1300, 64)]
    {
        outcomes.extend(both_ways(cuda, n, Widths { dim, mid, out })?);
    }
    Ok(outcomes)
}

fn both_ways(cuda: &Cuda, n: usize, widths: Widths) -> Result<Vec<Outcome>> {
    let Widths { dim, mid, out } = widths;
    let draw = |len: usize, seed: u64, scale: f32| -> Vec<f32> {
        random(Precision::F32, len, seed).iter().map(|x| x * scale).collect()
    };
    let lengths = widths.lengths();
    let fans = [dim, dim, mid, mid];
    let host: Vec<Vec<f32>> = (0..4).map(|i| draw(lengths[i], i as u64, 1.0 / (fans[i] as f32).sqrt())).collect();
    let before: Vec<Vec<f32>> = (0..4).map(|i| draw(lengths[i], 10 + i as u64, 1.0)).collect();
    let (x, d_y) = (draw(n * dim, 20, 1.0), draw(n * out, 21, 1.0));
    let filled = |values: &Vec<f32>| Floats::filled(cuda, values);
    let tensors: Vec<Floats> = host.iter().map(filled).collect::<Result<_>>()?;
    let gradients: Vec<Floats> = before.iter().map(filled).collect::<Result<_>>()?;
    let (dx, dd_y) = (filled(&x)?, filled(&d_y)?);
    let new = |len: usize| Floats::new(cuda, len);
    let (activated, floats, d_activated, d_x) = (new(n * mid)?, new(n * out)?, new(n * mid)?, new(n * dim)?);
    // Rows of elements lie at 16-byte boundaries, whatever the width.
    let elements = Guarded::new(cuda, n, out, out.next_multiple_of(8) + 8)?;
    let t: [&_; 4] = std::array::from_fn(|i| &tensors[i].buffer);
    let g: [&_; 4] = std::array::from_fn(|i| &gradients[i].buffer);
    let mapping = Mapping::new(cuda)?;
    let output = Mapped { floats: Some(&floats.buffer), elements: Some(elements.rows()) };
    mapping.forward(cuda, widths, t, n, &dx.buffer, &activated.buffer, output)?;
    let (hidden, inside_hidden) = activated.read(cuda)?;
    mapping.backward(
        cuda,
        widths,
        t,
        n,
        &dx.buffer,
        &activated.buffer,
        &dd_y.buffer,
        g,
        &d_activated.buffer,
        Some(&d_x.buffer),
    )?;

    let shape = format!("n {n} dim {dim} mid {mid} out {out}");
    let mut outcomes = Vec::new();
    let mut push = |what: &str, got: (Vec<f32>, bool), want: &[f64], limit: f64| {
        let (error, case) = (relative_error(&got.0, want), format!("{shape}: {what}"));
        outcomes.push(Outcome { operation: "mapping", case, error, limit, contained: got.1 });
    };
    let f = |terms: usize| limit(Precision::F32, terms);
    let want_hidden: Vec<f64> = linear(&wide(&x), &host[0], &host[1], dim).iter().map(|h| h.max(0.0)).collect();
    push("hidden", (hidden.clone(), inside_hidden), &want_hidden, f(dim));
    let want = linear(&want_hidden, &host[2], &host[3], mid);
    push("output", floats.read(cuda)?, &want, f(dim) + f(mid));
    push("elements", elements.read(cuda)?, &want, 2.0 * epsilon(cuda.precision()) + f(dim) + f(mid));

    let d_mid: Vec<f64> = times(&wide(&d_y), &host[2], out, mid)
        .iter()
        .zip(&hidden)
        .map(|(d, &a)| if a > 0.0 { *d } else { 0.0 })
        .collect();
    push("d_x", d_x.read(cuda)?, &times(&d_mid, &host[0], mid, dim), f(out) + f(mid));
    // Gradients of the parameters are added to what was there.
    let transposed =
        |d: &[f64], width: usize| -> Vec<f64> { (0..width * n).map(|i| d[i % n * width + i / n]).collect() };
    let d_y = wide(&d_y);
    for (first, d, width, input, n_in, terms) in
        [(0, &d_mid, mid, &x, dim, f(out) + f(n)), (2, &d_y, out, &hidden, mid, f(n))]
    {
        let d = transposed(d, width);
        let weight = times(&d, input, n, n_in);
        let bias: Vec<f64> = d.chunks_exact(n).map(|d| d.iter().sum()).collect();
        for (i, sum) in [(first, weight), (first + 1, bias)] {
            let want: Vec<f64> = sum.iter().zip(&before[i]).map(|(s, &b)| s + f64::from(b)).collect();
            push(["d_W1", "d_b1", "d_W2", "d_b2"][i], gradients[i].read(cuda)?, &want, terms);
        }
    }
    Ok(outcomes)
}
