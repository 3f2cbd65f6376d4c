//! The Yes head: one or two vocabulary logits at the last position, and the loss on them.

use super::simd::sum_lanes;
use crate::device::ops::{Loss, bce_with_logits};
use crate::device::profile::{Group, product, span};
use crate::llm::weights::WeightMatrix;

/// The vocabulary rows the answer is read from, widened to float32.
#[derive(Clone, Debug)]
pub struct AnswerRows {
    yes: Vec<f32>,
    no: Vec<f32>,
}

impl AnswerRows {
    /// Rows `yes_id` and `no_id` of the output embedding.
    pub fn new(head: &WeightMatrix, yes_id: u32, no_id: u32) -> Self {
        let row = |id: u32| {
            let mut row = vec![0.0; head.cols()];
            head.read_row(id as usize, &mut row);
            row
        };
        AnswerRows { yes: row(yes_id), no: row(no_id) }
    }

    /// `score[i] = y[i] · yes`, or `y[i] · (yes − no)` for the softmax over both. `y: [n, hidden]`, after the final norm.
    pub fn scores(&self, y: &[f32], loss: Loss) -> Vec<f32> {
        let _span = span(Group::Head, || product(y.len(), 1, loss.rows()));
        let hidden = self.yes.len();
        y.chunks_exact(hidden)
            .map(|y| {
                let dot = |w: &[f32]| sum_lanes(hidden, |i| y[i] * w[i]);
                match loss {
                    Loss::YesLogitBce => dot(&self.yes),
                    Loss::YesNoSoftmax => dot(&self.yes) - dot(&self.no),
                }
            })
            .collect()
    }

    /// `d_y[i] = d_score[i] · (yes)` or `· (yes − no)`.
    pub fn backward(&self, d_scores: &[f32], loss: Loss, d_y: &mut [f32]) {
        let _span = span(Group::Head, || product(d_y.len(), 1, loss.rows()));
        let hidden = self.yes.len();
        for (d_y, &d) in d_y.chunks_exact_mut(hidden).zip(d_scores) {
            for (i, d_y) in d_y.iter_mut().enumerate() {
                let w = match loss {
                    Loss::YesLogitBce => self.yes[i],
                    Loss::YesNoSoftmax => self.yes[i] - self.no[i],
                };
                *d_y = d * w;
            }
        }
    }
}

/// Sum of the rows' losses, and `d_score[i] = d(loss_i)/d(score_i) · weight`.
///
/// The caller passes `weight = 1 / rows of the whole step`, so micro-batches add up to the mean.
pub fn bce(scores: &[f32], labels: &[f32], weight: f32, d_scores: &mut [f32]) -> f64 {
    let mut sum = 0.0;
    for ((&z, &label), d) in scores.iter().zip(labels).zip(d_scores) {
        let (loss, gradient) = bce_with_logits(f64::from(z), f64::from(label));
        sum += loss;
        *d = gradient as f32 * weight;
    }
    sum
}
