//! The Yes head: both losses, with and without an adapter, training and scoring, logits far from zero.

use super::floats::Floats;
use super::norm::{backward, forward};
use super::{Guarded, Outcome, add_adapter, columns, epsilon, limit, random, relative_error, round, transposed};
use crate::device::cuda::head::{Head, HeadTraining, HeadWeights};
use crate::device::cuda::lora::Adapter;
use crate::device::cuda::{Cuda, Precision, Result};

const EPS: f32 = 0.03;

/// Logits of normed rows: y · (yes − no).
pub(super) fn logits(x: &[f64], w: &[f64], answer: &[f64]) -> Vec<f64> {
    let y = forward(x, w, f64::from(EPS));
    y.chunks_exact(w.len()).map(|y| y.iter().zip(answer).map(|(y, a)| y * a).sum()).collect()
}

/// log(1 + e^z) − label z, and σ(z) − label, exact where they are tiny too.
pub(super) fn loss(z: f64, label: f64) -> (f64, f64) {
    let sigmoid = |z: f64| 1.0 / (1.0 + (-z).exp());
    let derivative = (1.0 - label) * sigmoid(z) - label * sigmoid(-z);
    (z.max(0.0) - label * z + (-z.abs()).exp().ln_1p(), derivative)
}

/// The gradient of `Σ weight · loss` with respect to x.
pub(super) fn gradient(x: &[f64], w: &[f64], answer: &[f64], labels: &[f64], weights: &[f64]) -> Vec<f64> {
    let z = logits(x, w, answer);
    let d_z = z.iter().zip(labels).zip(weights).map(|((z, l), weight)| weight * loss(*z, *l).1);
    let d_y: Vec<f64> = d_z.flat_map(|d_z| answer.iter().map(move |a| d_z * a)).collect();
    backward(x, w, f64::from(EPS), &d_y)
}

/// All cases.
pub fn cases(cuda: &Cuda) -> Result<Vec<Outcome>> {
    let head = Head::new(cuda)?;
    let mut outcomes = Vec::new();
    for (n, width) in [(1, 8), (5, 72), (4, 576), (2, 2056), (2, 8192)] {
        for rank in [0, 8, 40, 64] {
            for no in [false, true] {
                // At the last size of logit e^z is beyond float32.
                for size in [1.0, 30.0, 200.0] {
                    outcomes.extend(case(cuda, &head, [n, width, rank], no, size, true)?);
                }
                outcomes.extend(case(cuda, &head, [n, width, rank], no, 1.0, false)?);
            }
        }
    }
    Ok(outcomes)
}

/// `size`: about how large logits are. Rows of [x | something else | u].
fn case(
    cuda: &Cuda,
    head: &Head,
    [n, width, rank]: [usize; 3],
    no: bool,
    size: f32,
    training: bool,
) -> Result<Vec<Outcome>> {
    let p = cuda.precision();
    let (first_u, total) = (width + 8, width + 8 + rank);
    let (rows, w, b) = (random(p, n * total, 1), random(p, width, 2), random(p, width * rank, 3));
    let answers: Vec<f32> =
        random(p, 2 * width, 4).iter().map(|a| round(p, a * size / (width as f32).sqrt())).collect();
    let (yes_row, no_row) = answers.split_at(width);
    let labels: Vec<f32> = (0..n).map(|i| (i % 2) as f32).collect();
    // A row of weight 0 fills a batch up.
    let weights: Vec<f32> = (0..n).map(|i| [0.125, 0.25, 0.0][i % 3]).collect();

    let d_rows = Guarded::filled(cuda, n, total, total + 8, &rows)?;
    let d_w = Guarded::filled(cuda, 1, width, width, &w)?;
    let (d_yes, d_no) =
        (Guarded::filled(cuda, 1, width, width, yes_row)?, Guarded::filled(cuda, 1, width, width, no_row)?);
    let d_b = Guarded::filled(cuda, rank, width, width, &transposed(&b, rank))?;
    let (scores, losses) = (Floats::new(cuda, n)?, Floats::new(cuda, n)?);
    let (d_labels, d_weights) = (Floats::filled(cuda, &labels)?, Floats::filled(cuda, &weights)?);
    let (d_x, y) = (Guarded::new(cuda, n, width, width + 16)?, Guarded::new(cuda, n, width, width)?);
    let head_weights = HeadWeights {
        norm: d_w.rows().address,
        yes: d_yes.rows().address,
        no: if no { d_no.rows().address } else { 0 },
        eps: EPS,
    };
    let lora = (rank > 0).then(|| Adapter::new(first_u, rank, d_b.rows().address));
    let trained = training.then(|| HeadTraining {
        labels: &d_labels.buffer,
        weights: &d_weights.buffer,
        losses: &losses.buffer,
        d_x: d_x.rows(),
    });
    // Scoring gives the normed states too.
    let normed = (!training).then(|| y.rows());
    head.run(cuda, head_weights, d_rows.rows(), width, lora, &scores.buffer, normed, trained)?;

    let (left, mut contained) = d_rows.read(cuda)?;
    let beside = if rank > 0 { width } else { 0 };
    contained &= columns(&left, total, beside, total - beside) == columns(&rows, total, beside, total - beside);
    let written: Vec<f32> = left.chunks_exact(total).flat_map(|row| row[..width].to_vec()).collect();
    let mut outcomes = Vec::new();
    let mut record = |what: &str, error: f64, limit: f64, inside: bool| {
        let answer = if no { "yes - no" } else { "yes" };
        let case = format!("{what} of {answer} n {n} width {width} rank {rank} logits about {size}");
        outcomes.push(Outcome { operation: "yes_head", case, error, limit, contained: contained && inside });
    };
    if rank > 0 {
        let mut x = columns(&rows, total, 0, width);
        add_adapter(&mut x, width, &columns(&rows, total, first_u, rank), &columns(&b, rank, 0, rank));
        record("x", relative_error(&written, &x), limit(p, rank), true);
    }
    // From x as it was stored on, so that results in float32 are held to its limits.
    let (x, w) = (columns(&written, width, 0, width), columns(&w, width, 0, width));
    let answer: Vec<f64> =
        (0..width).map(|c| f64::from(yes_row[c]) - if no { f64::from(no_row[c]) } else { 0.0 }).collect();
    let z = logits(&x, &w, &answer);
    let sum = limit(Precision::F32, width);
    let (got, inside) = scores.read(cuda)?;
    record("score", relative_error(&got, &z), sum, inside);
    if !training {
        let (got, inside) = y.read(cuda)?;
        // Naive: x · r is rounded before it meets w.
        record("y", relative_error(&got, &forward(&x, &w, f64::from(EPS))), limit(p, width) + 2.0 * epsilon(p), inside);
        return Ok(outcomes);
    }
    // Loss and gradient go with e^−|z| where the answer is right: relative errors there are absolute errors of z.
    let moved = sum * z.iter().fold(1.0f64, |m, z| m.max(z.abs()));
    let labels: Vec<f64> = labels.iter().map(|l| f64::from(*l)).collect();
    let (got, inside) = losses.read(cuda)?;
    let want: Vec<f64> = z.iter().zip(&labels).map(|(z, l)| loss(*z, *l).0).collect();
    record("loss", relative_error(&got, &want), moved, inside);
    let (got, inside) = d_x.read(cuda)?;
    let weights: Vec<f64> = weights.iter().map(|w| f64::from(*w)).collect();
    let want = gradient(&x, &w, &answer, &labels, &weights);
    record("d_x", relative_error(&got, &want), limit(p, width) + moved, inside);
    Ok(outcomes)
}

#[cfg(test)]
mod tests {
    use super::super::{assert_close, columns, differences, random};
    use crate::device::cuda::Precision;

    #[test]
    fn the_oracles_gradient_is_that_of_its_loss() {
        let [x, w, answer] = [1, 2, 3].map(|seed| columns(&random(Precision::F32, 24, seed), 24, 0, 24));
        let (w, answer, labels, weights) = (&w[..8], &answer[..8], [0.0, 1.0, 1.0], [0.125, 0.5, 0.0]);
        let total = |x: &[f64]| {
            let z = super::logits(x, w, answer);
            z.iter().zip(labels).zip(weights).map(|((z, l), w)| w * super::loss(*z, l).0).sum::<f64>()
        };
        assert_close(&super::gradient(&x, w, answer, &labels, &weights), &differences(total, &x));
    }
}
