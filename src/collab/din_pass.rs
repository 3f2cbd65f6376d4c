//! DIN's layers, forward and backward, over one batch on all threads.
//!
//! The mean and variance of [`super::dice`] are over the whole batch, so it is not cut into chunks. Histories are not padded: the
//! attention unit, and the statistics inside it, see items only.

use rayon::prelude::*;

use super::dice::{DicePass, dice, dice_backward};
use super::layers::{add, factors, linear, linear_backward, scale};
use super::mf::gather;
use super::real::Real;
use crate::device::ops::Dropout;

/// Widths of the attention unit's layers and of the MLP's.
pub const ATTENTION: [usize; 2] = [64, 16];
/// See [`ATTENTION`].
pub const MLP: [usize; 2] = [200, 80];

/// Trained tensors, in the order of the model's weights: three tables; weight, bias and Dice's alpha of each layer.
pub const N_TRAINED: usize = 18;
const USER: usize = 0;
const ITEM: usize = 1;
const HISTORY: usize = 2;
const ATT1: usize = 3;
const ATT1_ALPHA: usize = 5;
const ATT2: usize = 6;
const ATT3: usize = 8;
const MLP1: usize = 10;
const MLP1_ALPHA: usize = 12;
const MLP2: usize = 13;
const MLP2_ALPHA: usize = 15;
const MLP3: usize = 16;
/// Running mean and variance of each Dice: of the attention unit, of the MLP's two.
const RUNNING: [usize; 3] = [N_TRAINED, N_TRAINED + 2, N_TRAINED + 4];

/// Rows of a task.
const ROWS: usize = 32;

/// Rows as ids of the tables.
#[derive(Debug, Default)]
pub struct DinBatch {
    pub users: Vec<u32>,
    pub items: Vec<u32>,
    /// The most recent items of every row, oldest first, and where each row's begin (one more than rows).
    pub history: Vec<u32>,
    pub starts: Vec<usize>,
}

impl DinBatch {
    fn n(&self) -> usize {
        self.items.len()
    }

    /// The row of every history item.
    fn rows(&self) -> Vec<usize> {
        self.starts.windows(2).enumerate().flat_map(|(row, span)| vec![row; span[1] - span[0]]).collect()
    }
}

/// What [`forward`] keeps.
#[derive(Debug)]
pub struct Forward<T> {
    /// `[rows, 3 width]`: item, pooled history, user. CoLLM's user vector.
    pub joined: Vec<T>,
    /// `[rows]`.
    pub logits: Vec<T>,
    /// Of every history item: `[q, h, q − h, q h]`.
    features: Vec<T>,
    attention: DicePass<T>,
    a1: Vec<T>,
    a2: Vec<T>,
    /// Weight of every history item.
    weights: Vec<T>,
    hidden: [DicePass<T>; 2],
    /// Outputs of the MLP's hidden layers, after dropout, and what that multiplied them with.
    outputs: [Vec<T>; 2],
    dropped: [Vec<T>; 2],
}

/// Row `id` of a table.
fn row<T>(table: &[T], id: u32, width: usize) -> &[T] {
    &table[id as usize * width..][..width]
}

/// `training`: Dice takes the batch's own mean and variance, and `dropout` acts.
pub fn forward<T: Real>(
    weights: &[Vec<T>],
    width: usize,
    batch: &DinBatch,
    training: bool,
    dropout: Option<Dropout>,
) -> Forward<T> {
    let n = batch.n();
    let layer = |x: &[T], at: usize| linear(false, x, &weights[at], &weights[at + 1]);
    let active = |z: Vec<T>, alpha: usize, running: usize| {
        let running = RUNNING[running];
        dice(z, &weights[alpha], (!training).then(|| [&weights[running][..], &weights[running + 1]]))
    };
    let row_of = batch.rows();
    let mut features = vec![T::default(); row_of.len() * 4 * width];
    features.par_chunks_mut(4 * width).enumerate().with_min_len(ROWS).for_each(|(t, out)| {
        let q = row(&weights[ITEM], batch.items[row_of[t]], width);
        let h = row(&weights[HISTORY], batch.history[t], width);
        for i in 0..width {
            (out[i], out[width + i], out[2 * width + i], out[3 * width + i]) = (q[i], h[i], q[i] - h[i], q[i] * h[i]);
        }
    });
    let (a1, attention) = active(layer(&features, ATT1), ATT1_ALPHA, 0);
    let a2 = layer(&a1, ATT2);
    let unit = layer(&a2, ATT3);
    let mut joined = vec![T::default(); n * 3 * width];
    joined.par_chunks_mut(3 * width).enumerate().with_min_len(ROWS).for_each(|(r, out)| {
        out[..width].copy_from_slice(row(&weights[ITEM], batch.items[r], width));
        out[2 * width..].copy_from_slice(row(&weights[USER], batch.users[r], width));
        let span = batch.starts[r]..batch.starts[r + 1];
        for (&id, &weight) in batch.history[span.clone()].iter().zip(&unit[span]) {
            let h = row(&weights[HISTORY], id, width);
            out[width..2 * width].iter_mut().zip(h).for_each(|(p, &h)| *p += weight * h);
        }
    });
    let (mut y1, hidden1) = active(layer(&joined, MLP1), MLP1_ALPHA, 1);
    let dropped1 = factors(dropout, 0, 0, y1.len());
    scale(&mut y1, &dropped1);
    let (mut y2, hidden2) = active(layer(&y1, MLP2), MLP2_ALPHA, 2);
    let dropped2 = factors(dropout, 0, 1, y2.len());
    scale(&mut y2, &dropped2);
    let logits = layer(&y2, MLP3);
    Forward {
        joined,
        logits,
        features,
        attention,
        a1,
        a2,
        weights: unit,
        hidden: [hidden1, hidden2],
        outputs: [y1, y2],
        dropped: [dropped1, dropped2],
    }
}

impl<T: Real> Forward<T> {
    /// Lets the running means and variances follow the batch.
    pub fn follow(&self, weights: &mut [Vec<T>]) {
        for (pass, at) in [&self.attention, &self.hidden[0], &self.hidden[1]].into_iter().zip(RUNNING) {
            let (means, variances) = weights[at..].split_at_mut(1);
            pass.follow(&mut means[0], &mut variances[0]);
        }
    }

    /// Overwrites the trained tensors of `gradient` from `d_logits`.
    pub fn backward(
        &self,
        weights: &[Vec<T>],
        width: usize,
        batch: &DinBatch,
        d_logits: &[T],
        gradient: &mut [Vec<T>],
    ) {
        gradient[..N_TRAINED].iter_mut().for_each(|g| g.fill(T::default()));
        let mut layer_backward = |x: &[T], at: usize, d_y: &[T]| {
            let (d_w, d_b) = gradient[at..].split_at_mut(1);
            linear_backward(false, x, &weights[at], d_y, &mut d_w[0], &mut d_b[0])
        };
        let mut d_alphas = [ATT1_ALPHA, MLP1_ALPHA, MLP2_ALPHA].map(|at| vec![T::default(); weights[at].len()]);
        let [d_att1, d_mlp1, d_mlp2] = &mut d_alphas;
        let mut d = layer_backward(&self.outputs[1], MLP3, d_logits);
        scale(&mut d, &self.dropped[1]);
        let d = dice_backward(&self.hidden[1], &weights[MLP2_ALPHA], &d, d_mlp2);
        let mut d = layer_backward(&self.outputs[0], MLP2, &d);
        scale(&mut d, &self.dropped[0]);
        let d = dice_backward(&self.hidden[0], &weights[MLP1_ALPHA], &d, d_mlp1);
        let d_joined = layer_backward(&self.joined, MLP1, &d);
        let row_of = batch.rows();
        let pooled = |t: usize| &d_joined[(3 * row_of[t] + 1) * width..][..width];
        let history = |t: usize| row(&weights[HISTORY], batch.history[t], width);
        let d_unit: Vec<T> = (0..row_of.len())
            .into_par_iter()
            .with_min_len(ROWS)
            .map(|t| super::mf::dot(pooled(t), history(t)))
            .collect();
        let d = layer_backward(&self.a2, ATT3, &d_unit);
        let d = layer_backward(&self.a1, ATT2, &d);
        let d = dice_backward(&self.attention, &weights[ATT1_ALPHA], &d, d_att1);
        let d_features = layer_backward(&self.features, ATT1, &d);
        for (at, d_alpha) in [ATT1_ALPHA, MLP1_ALPHA, MLP2_ALPHA].into_iter().zip(d_alphas) {
            gradient[at] = d_alpha;
        }
        // Of h: from its features and as a summand of the pooled history. Of q: the sum over its history, and as an input of the MLP.
        let mut d_history = vec![T::default(); row_of.len() * width];
        d_history.par_chunks_mut(width).enumerate().with_min_len(ROWS).for_each(|(t, out)| {
            let d = &d_features[t * 4 * width..][..4 * width];
            let (q, pooled) = (row(&weights[ITEM], batch.items[row_of[t]], width), pooled(t));
            for i in 0..width {
                out[i] = d[width + i] - d[2 * width + i] + d[3 * width + i] * q[i] + self.weights[t] * pooled[i];
            }
        });
        let mut d_items = vec![T::default(); batch.n() * width];
        d_items.par_chunks_mut(width).enumerate().with_min_len(ROWS).for_each(|(r, out)| {
            add(&d_joined[3 * r * width..][..width], out);
            for t in batch.starts[r]..batch.starts[r + 1] {
                let (d, h) = (&d_features[t * 4 * width..][..4 * width], history(t));
                for i in 0..width {
                    out[i] += d[i] + d[2 * width + i] + d[3 * width + i] * h[i];
                }
            }
        });
        let one = T::from_wide(1.0);
        let user = |r: u32| (one, &d_joined[(3 * r as usize + 2) * width..][..width]);
        gather(&mut gradient[USER], width, &batch.users, user);
        gather(&mut gradient[ITEM], width, &batch.items, |r| (one, row(&d_items, r, width)));
        gather(&mut gradient[HISTORY], width, &batch.history, |t| (one, row(&d_history, t, width)));
    }
}
