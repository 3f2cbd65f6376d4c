//! Attention over packed segments: grouped heads, a shared prefix seen in full, an own range seen causally.
//!
//! `S = q kᵀ / √d`, `P = softmax(S)` over what a query may see, `o = P v`; the log-sum-exp of every query is saved, and
//! backward computes P again from it: `d_v = Pᵀ d_o`, `d_S = P · (d_o vᵀ − rowsum(d_o · o))`, `d_q = d_S k / √d`,
//! `d_k = d_Sᵀ q / √d` (Dao et al. 2022, without the tiling over keys, which prompts of a few hundred tokens do not need).

use std::cell::Cell;

use rayon::prelude::*;

use super::gemm::{Dense, Operand, Output, gemm_serial};
use super::shared::SharedMut;
use super::simd::{exp, per_isa, sum_lanes};
use crate::device::ops::{HeadShape, Segment};
use crate::device::profile::{Group, product, span};

/// Queries handled at once: bounds the score buffer, and skips the keys that a block cannot see.
const Q_BLOCK: usize = 96;

thread_local! {
    static SCORES: Cell<(Vec<f32>, Vec<f32>)> = const { Cell::new((Vec::new(), Vec::new())) };
}

/// A block of one segment's queries and the keys it sees.
struct Block {
    /// First query row, in the query buffer.
    q: usize,
    /// Queries.
    n_q: usize,
    /// Own keys that the last query of the block sees; the first query sees `own - n_q + 1`.
    own: usize,
}

fn blocks(s: &Segment) -> impl Iterator<Item = Block> + '_ {
    let hidden = s.kv.len() - s.q.len();
    (0..s.q.len()).step_by(Q_BLOCK).map(move |at| {
        let n_q = Q_BLOCK.min(s.q.len() - at);
        Block { q: s.q.start + at, n_q, own: hidden + at + n_q }
    })
}

/// `out: [n_q, q_width]` and `lse: [n_q, n_heads]` from `q: [n_q, q_width]` and `kv: [n_kv, 2 · kv_width]` (k, then v).
pub fn attention(shape: HeadShape, segments: &[Segment], q: &[f32], kv: &[f32], out: &mut [f32], lse: &mut [f32]) {
    let _span = span(Group::Attention, || 2.0 * work(shape, segments, |_| true));
    let (d, q_width, kv_width) = (shape.head_dim, shape.q_width(), shape.kv_width());
    let (kv_stride, group) = (2 * kv_width, shape.n_heads / shape.n_kv_heads);
    let scale = 1.0 / (d as f32).sqrt();
    let (out, lse) = (SharedMut::new(out), SharedMut::new(lse));
    tasks(segments, shape.n_heads).into_par_iter().with_max_len(1).for_each(|(s, head)| {
        let s = &segments[s];
        let (mut scores, spare) = SCORES.take();
        let k_at = (head / group) * d;
        let v_at = kv_width + k_at;
        for block in blocks(s) {
            let n_keys = s.prefix.len() + block.own;
            let scores = sized(&mut scores, block.n_q * n_keys);
            score_block(d, q_width, kv_stride, s, &block, &q[head * d..], &kv[k_at..], scale, scores);
            let mut sums = [0.0f32; Q_BLOCK];
            for (i, row) in scores.chunks_exact_mut(n_keys).enumerate() {
                let (visible, hidden) = row.split_at_mut(n_keys - (block.n_q - 1 - i));
                let (max, sum) = softmax_row(visible);
                hidden.fill(0.0);
                sums[i] = sum;
                // SAFETY: row (query, head) belongs to this task alone.
                unsafe { *lse.at((block.q + i) * shape.n_heads + head) = max + sum.ln() };
            }
            let at = block.q * q_width + head * d;
            // SAFETY: this head's columns of these query rows belong to this task alone.
            unsafe {
                value_block(d, q_width, kv_stride, s, &block, scores, &kv[v_at..], out.from(at), 1.0);
                for (i, sum) in sums[..block.n_q].iter().enumerate() {
                    let r = 1.0 / sum;
                    out.slice(at + i * q_width, d).iter_mut().for_each(|o| *o *= r);
                }
            }
        }
        SCORES.set((scores, spare));
    });
}

/// Gradients of [`attention`]. `d_q` is set; `d_kv: [n_kv − first, 2 · kv_width]` is added to, for key/value rows from `first`
/// on (earlier rows are frozen: no gradient is computed for them). All query rows take part.
#[allow(clippy::too_many_arguments)] // one operation, its operands
pub fn attention_backward(
    shape: HeadShape,
    segments: &[Segment],
    q: &[f32],
    kv: &[f32],
    out: &[f32],
    lse: &[f32],
    d_out: &[f32],
    first: usize,
    d_q: &mut [f32],
    d_kv: &mut [f32],
) {
    let _span = span(Group::Attention, || {
        3.0 * work(shape, segments, |_| true) + 2.0 * work(shape, segments, |key| key >= first)
    });
    let (d, q_width, kv_width) = (shape.head_dim, shape.q_width(), shape.kv_width());
    let (kv_stride, group) = (2 * kv_width, shape.n_heads / shape.n_kv_heads);
    let scale = 1.0 / (d as f32).sqrt();
    let (d_q, d_kv) = (SharedMut::new(d_q), SharedMut::new(d_kv));
    let families = families(segments, first);
    tasks(&families, shape.n_kv_heads).into_par_iter().with_max_len(1).for_each(|(family, kv_head)| {
        let (mut scores, mut d_scores) = SCORES.take();
        let (k_at, v_at) = (kv_head * d, kv_width + kv_head * d);
        for &s in &families[family] {
            let s = &segments[s];
            for head in kv_head * group..(kv_head + 1) * group {
                for block in blocks(s) {
                    let n_keys = s.prefix.len() + block.own;
                    let p = sized(&mut scores, block.n_q * n_keys);
                    let d_s = sized(&mut d_scores, block.n_q * n_keys);
                    let rows = block.q * q_width + head * d..;
                    let d_o = &d_out[rows.clone()];
                    score_block(d, q_width, kv_stride, s, &block, &q[head * d..], &kv[k_at..], scale, p);
                    // d_P = d_o vᵀ
                    score_block(d, q_width, kv_stride, s, &block, &d_out[head * d..], &kv[v_at..], 1.0, d_s);
                    for i in 0..block.n_q {
                        let visible = n_keys - (block.n_q - 1 - i);
                        let lse = lse[(block.q + i) * shape.n_heads + head];
                        let o = &out[(block.q + i) * q_width + head * d..][..d];
                        let delta = sum_lanes(d, |j| o[j] * d_o[i * q_width + j]);
                        let (p, p_hidden) = p[i * n_keys..][..n_keys].split_at_mut(visible);
                        let (d_s, d_hidden) = d_s[i * n_keys..][..n_keys].split_at_mut(visible);
                        softmax_backward_row(p, d_s, lse, delta);
                        p_hidden.fill(0.0);
                        d_hidden.fill(0.0);
                    }
                    // SAFETY: this head's columns of these query rows belong to this task alone.
                    unsafe {
                        value_block(d, q_width, kv_stride, s, &block, d_s, &kv[k_at..], d_q.from(rows.start), scale);
                    }
                    let n_prefix = s.prefix.len();
                    for (keys, at) in [(s.prefix.clone(), 0), (s.kv.start..s.kv.start + block.own, n_prefix)] {
                        if keys.is_empty() || keys.start < first {
                            continue;
                        }
                        for (rows, weights, column, alpha) in [(q, &*d_s, k_at, scale), (d_out, &*p, v_at, 1.0)] {
                            let target = d_kv.from((keys.start - first) * kv_stride + column);
                            // SAFETY: these columns of these key rows are written by this task alone: all segments that
                            // read a row with a gradient are in one family.
                            let add = unsafe { Output::shared(target, kv_stride, true) }.scaled(alpha);
                            let weights = Dense::transposed(&weights[at..], n_keys);
                            let rows = Operand::Dense(Dense::rows(&rows[block.q * q_width + head * d..], q_width));
                            gemm_serial(keys.len(), d, block.n_q, weights, rows, add);
                        }
                    }
                }
            }
        }
        SCORES.set((scores, d_scores));
    });
}

/// Arithmetic of one product between queries and keys, as it is done: whole blocks, the runs of keys that `counted` tells by their
/// first row.
fn work(shape: HeadShape, segments: &[Segment], counted: impl Fn(usize) -> bool) -> f64 {
    let of = |s: &Segment| -> f64 {
        let run = |first: usize, len: usize| if counted(first) { len } else { 0 };
        let block =
            |b: Block| product(b.n_q, shape.head_dim, run(s.prefix.start, s.prefix.len()) + run(s.kv.start, b.own));
        blocks(s).map(block).sum()
    };
    shape.n_heads as f64 * segments.iter().map(of).sum::<f64>()
}

/// (list index, head) for every list entry and head.
fn tasks<T>(list: &[T], n_heads: usize) -> Vec<(usize, usize)> {
    (0..list.len()).flat_map(|s| (0..n_heads).map(move |h| (s, h))).collect()
}

/// Segments grouped so that every key row with a gradient is read from inside one group only: a prefix with a gradient
/// together with all its readers, in order.
fn families(segments: &[Segment], first: usize) -> Vec<Vec<usize>> {
    let mut families: Vec<Vec<usize>> = Vec::new();
    let mut family_of_prefix: Vec<(usize, usize)> = Vec::new();
    for (i, s) in segments.iter().enumerate() {
        if s.q.is_empty() {
            continue;
        }
        let shared = if s.prefix.is_empty() { s.kv.start } else { s.prefix.start };
        let has_gradient = s.prefix.is_empty() || s.prefix.start >= first;
        match family_of_prefix.iter().find(|&&(start, _)| has_gradient && start == shared) {
            Some(&(_, family)) => families[family].push(i),
            None => {
                if has_gradient {
                    family_of_prefix.push((shared, families.len()));
                }
                families.push(vec![i]);
            }
        }
    }
    families
}

/// `scores[n_q, n_keys] = scale · rows · keysᵀ` for the prefix and the visible own keys. `rows`, `keys` start at the head's column.
#[allow(clippy::too_many_arguments)]
fn score_block(
    d: usize,
    q_stride: usize,
    kv_stride: usize,
    s: &Segment,
    block: &Block,
    rows: &[f32],
    keys: &[f32],
    scale: f32,
    scores: &mut [f32],
) {
    let n_keys = s.prefix.len() + block.own;
    let rows = Dense::rows(&rows[block.q * q_stride..], q_stride);
    for (start, len, at) in [(s.prefix.start, s.prefix.len(), 0), (s.kv.start, block.own, s.prefix.len())] {
        if len > 0 {
            let keys = Operand::Dense(Dense::transposed(&keys[start * kv_stride..], kv_stride));
            gemm_serial(block.n_q, len, d, rows, keys, Output::set(&mut scores[at..], n_keys).scaled(scale));
        }
    }
}

/// `out[n_q, d] = alpha · weights · values` over the prefix and the visible own rows. `values`, `out` start at the head's
/// column.
///
/// # Safety
/// No other task touches the `n_q` rows of `d` elements at `out`.
#[allow(clippy::too_many_arguments)]
unsafe fn value_block(
    d: usize,
    q_stride: usize,
    kv_stride: usize,
    s: &Segment,
    block: &Block,
    weights: &[f32],
    values: &[f32],
    out: SharedMut<f32>,
    alpha: f32,
) {
    let n_keys = s.prefix.len() + block.own;
    let mut accumulate = false;
    for (start, len, at) in [(s.prefix.start, s.prefix.len(), 0), (s.kv.start, block.own, s.prefix.len())] {
        if len > 0 {
            let values = Operand::Dense(Dense::rows(&values[start * kv_stride..], kv_stride));
            // SAFETY: promised by the caller.
            let c = unsafe { Output::shared(out.from(0), q_stride, accumulate) }.scaled(alpha);
            gemm_serial(block.n_q, d, len, Dense::rows(&weights[at..], n_keys), values, c);
            accumulate = true;
        }
    }
}

per_isa! {
    /// Replaces scores by `exp(s − max)`; returns max and sum.
    fn softmax_row(row: &mut [f32]) -> (f32, f32) {
        let mut lanes = [f32::NEG_INFINITY; 16];
        let mut chunks = row.chunks_exact(16);
        for chunk in &mut chunks {
            for (lane, &s) in lanes.iter_mut().zip(chunk) {
                *lane = if s > *lane { s } else { *lane };
            }
        }
        let max = lanes.iter().chain(chunks.remainder()).fold(f32::NEG_INFINITY, |a, &b| a.max(b));
        for s in row.iter_mut() {
            *s = exp(*s - max);
        }
        (max, sum_lanes(row.len(), |i| row[i]))
    }
}

per_isa! {
    /// Scores become probabilities, `d_p` becomes the gradient of the scores.
    fn softmax_backward_row(scores: &mut [f32], d_p: &mut [f32], lse: f32, delta: f32) {
        for (s, d) in scores.iter_mut().zip(d_p) {
            let p = exp(*s - lse);
            *s = p;
            *d = p * (*d - delta);
        }
    }
}

fn sized(space: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if space.len() < len {
        space.resize(len, 0.0);
    }
    &mut space[..len]
}
