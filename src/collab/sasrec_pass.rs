//! SASRec's layers, forward and backward, over one chunk of rows on one thread.
//!
//! PARITY: as officially, layer norm is on the queries alone and the residual goes onto the normalised queries; the mask is causal
//! only, so the padding before a history is attended to. Padded positions hold zeros before every block, so all of a row's are one
//! key and one value (the biases), weighted by their number: a row is one padding token and its items, and nothing is computed for
//! the rest. In the last block only the last position asks.

use super::layers::{NormPass, add, factors, layer_norm, layer_norm_backward, linear, linear_backward, scale, sum};
use super::real::{Matrix, Real};
use crate::device::ops::Dropout;

/// Tensors before those of the blocks: item and position tables.
const BEFORE: usize = 2;
/// Tensors of a block: norm, in_proj, out_proj, norm, conv1, conv2, each weight and bias.
const PER_BLOCK: usize = 12;

/// Histories of a chunk's rows as tokens: a padding token, then the most recent items, oldest first.
#[derive(Debug)]
pub struct Chunk {
    /// Item of every token; 0 is padding.
    pub ids: Vec<u32>,
    /// First token of every row, and the end.
    starts: Vec<usize>,
}

impl Chunk {
    /// At most `max_length` items a row, by `known` where an id is beyond the table.
    pub fn new<'s>(histories: impl Iterator<Item = &'s [u32]>, max_length: usize, known: impl Fn(u32) -> u32) -> Self {
        let (mut ids, mut starts) = (Vec::new(), vec![0]);
        for history in histories {
            ids.push(0);
            ids.extend(history[history.len().saturating_sub(max_length)..].iter().map(|&id| known(id)));
            starts.push(ids.len());
        }
        Chunk { ids, starts }
    }

    /// The last token of every row.
    fn lasts(&self) -> impl Iterator<Item = usize> {
        self.starts[1..].iter().map(|end| end - 1)
    }
}

/// The model as the layers see it.
#[derive(Debug)]
pub struct SasRecPass<'a, T> {
    pub dim: usize,
    pub heads: usize,
    pub max_length: usize,
    pub weights: &'a [Vec<T>],
}

/// What [`SasRecPass::forward`] keeps for the way back.
#[derive(Debug)]
pub struct Forward<T> {
    /// `[rows, dim]`.
    pub states: Vec<T>,
    factors: Vec<T>,
    blocks: Vec<BlockPass<T>>,
    last: NormPass<T>,
}

#[derive(Debug)]
struct BlockPass<T> {
    /// Input, `[tokens, dim]`.
    x: Vec<T>,
    /// What asks: input rows, normalised, and projected.
    norm1: NormPass<T>,
    h: Vec<T>,
    q: Vec<T>,
    /// `[tokens, 2 dim]`.
    kv: Vec<T>,
    /// Attention weights before dropout, and what that multiplied them with; of each row and head `[queries, tokens]`.
    weights: Vec<T>,
    factors: Vec<T>,
    context: Vec<T>,
    norm2: NormPass<T>,
    f: Vec<T>,
    u: Vec<T>,
    inner: Vec<T>,
    outer: Vec<T>,
}

/// Queries and keys of one row under one head.
struct Part {
    /// First query row, and how many.
    q: usize,
    n_q: usize,
    /// First token, and how many.
    k: usize,
    n_k: usize,
    /// Where the head begins in a row of queries.
    head: usize,
    /// Where the weights are.
    w: usize,
    /// Padded positions.
    pads: usize,
}

impl<T: Real> SasRecPass<'_, T> {
    fn block<'w>(&self, weights: &'w [Vec<T>], b: usize) -> &'w [Vec<T>] {
        &weights[BEFORE + b * PER_BLOCK..][..PER_BLOCK]
    }

    fn blocks(&self) -> usize {
        (self.weights.len() - BEFORE - 2) / PER_BLOCK
    }

    /// The position of a token of a row that ends at token `end`: the window is padded on the left.
    fn position(&self, token: usize, end: usize) -> usize {
        self.max_length - (end - token)
    }

    /// The states of a chunk's rows. `number`: of the chunk within its step, for dropout.
    pub fn forward(&self, chunk: &Chunk, dropout: Option<Dropout>, number: usize) -> Forward<T> {
        let (d, root) = (self.dim, T::from_wide((self.dim as f64).sqrt()));
        let mut x = vec![T::default(); chunk.ids.len() * d];
        for row in chunk.starts.windows(2) {
            for token in row[0] + 1..row[1] {
                let item = &self.weights[0][chunk.ids[token] as usize * d..][..d];
                let position = &self.weights[1][self.position(token, row[1]) * d..][..d];
                let x = &mut x[token * d..][..d];
                x.iter_mut().zip(item).zip(position).for_each(|((x, &i), &p)| *x = root * i + p);
            }
        }
        let embedding = factors(dropout, number, 0, x.len());
        scale(&mut x, &embedding);
        let mut blocks = Vec::new();
        for b in 0..self.blocks() {
            let (pass, y) = self.block_forward(b, chunk, x, dropout, number);
            blocks.push(pass);
            x = y;
        }
        let [weight, bias] = [2, 1].map(|i| &self.weights[self.weights.len() - i]);
        let (states, last) = layer_norm(&x, weight, bias);
        Forward { states, factors: embedding, blocks, last }
    }

    /// Every row under every head. In the last block only the last token of a row asks.
    fn parts(&self, chunk: &Chunk, last: bool) -> Vec<Part> {
        let (mut parts, mut w) = (Vec::new(), 0);
        for (row, span) in chunk.starts.windows(2).enumerate() {
            let n_k = span[1] - span[0];
            let (q, n_q) = if last { (row, 1) } else { (span[0], n_k) };
            for head in 0..self.heads {
                let head = head * self.dim / self.heads;
                parts.push(Part { q, n_q, k: span[0], n_k, head, w, pads: self.max_length + 1 - n_k });
                w += n_q * n_k;
            }
        }
        parts
    }

    fn block_forward(
        &self,
        b: usize,
        chunk: &Chunk,
        x: Vec<T>,
        dropout: Option<Dropout>,
        number: usize,
    ) -> (BlockPass<T>, Vec<T>) {
        let d = self.dim;
        let last = b + 1 == self.blocks();
        let [norm1_w, norm1_b, in_w, in_b, out_w, out_b, norm2_w, norm2_b, w1, b1, w2, b2] =
            std::array::from_fn(|i| &self.block(self.weights, b)[i][..]);
        let asking = if last { select(&x, chunk.lasts(), d) } else { x.clone() };
        let (h, norm1) = layer_norm(&asking, norm1_w, norm1_b);
        let q = linear(true, &h, &in_w[..d * d], &in_b[..d]);
        let kv = linear(true, &x, &in_w[d * d..], &in_b[d..]);
        let parts = self.parts(chunk, last);
        let site = 4 * (b + 1);
        let factors_of = |site: usize, n: usize| factors(dropout, number, site, n);
        let attention = self.attention_factors(&parts, dropout, number, site);
        let (weights, context) = self.attend(&parts, &q, &kv, &attention);
        let mut a = linear(true, &context, out_w, out_b);
        add(&h, &mut a);
        let (f, norm2) = layer_norm(&a, norm2_w, norm2_b);
        let mut u = linear(true, &f, w1, b1);
        let inner = factors_of(site + 2, u.len());
        scale(&mut u, &inner);
        u.iter_mut().for_each(|u| *u = if *u > T::default() { *u } else { T::default() });
        let mut y = linear(true, &u, w2, b2);
        let outer = factors_of(site + 3, y.len());
        scale(&mut y, &outer);
        add(&f, &mut y);
        self.clear_pads(chunk, last, &mut y);
        (BlockPass { x, norm1, h, q, kv, weights, factors: attention, context, norm2, f, u, inner, outer }, y)
    }

    /// Zeros where a query row is padding.
    fn clear_pads(&self, chunk: &Chunk, last: bool, rows: &mut [T]) {
        let d = self.dim;
        for (row, span) in chunk.starts.windows(2).enumerate() {
            if !last {
                rows[span[0] * d..][..d].fill(T::default());
            } else if span[1] - span[0] == 1 {
                rows[row * d..][..d].fill(T::default());
            }
        }
    }

    /// What dropout multiplies attention weights with. Each of a row's padded positions is dropped on its own, so the one token that
    /// stands for all of them has the mean of theirs.
    fn attention_factors(&self, parts: &[Part], dropout: Option<Dropout>, chunk: usize, site: usize) -> Vec<T> {
        let n = parts.last().map_or(0, |p| p.w + p.n_q * p.n_k);
        let mut out = factors(dropout, chunk, site, n);
        if out.is_empty() {
            return out;
        }
        let pads: Vec<T> = factors(dropout, chunk, site + 1, parts.iter().map(|p| p.n_q * p.pads).sum());
        let mut pads = &pads[..];
        for p in parts.iter().filter(|p| p.pads > 0) {
            let share = T::from_wide(1.0 / p.pads as f64);
            for query in 0..p.n_q {
                let (here, rest) = pads.split_at(p.pads);
                out[p.w + query * p.n_k] = sum(here.len(), |i| here[i]) * share;
                pads = rest;
            }
        }
        out
    }

    /// Attention weights before dropout, and the sums of values.
    fn attend(&self, parts: &[Part], q: &[T], kv: &[T], factors: &[T]) -> (Vec<T>, Vec<T>) {
        let (d, dh) = (self.dim, self.dim / self.heads);
        let root = T::from_wide((dh as f64).recip().sqrt());
        let mut weights = vec![T::default(); parts.last().map_or(0, |p| p.w + p.n_q * p.n_k)];
        let mut context = vec![T::default(); q.len()];
        let mut dropped = Vec::new();
        for p in parts {
            let w = &mut weights[p.w..][..p.n_q * p.n_k];
            let queries = Matrix::rows(&q[p.q * d + p.head..], d);
            let keys = Matrix::transposed(&kv[p.k * 2 * d + p.head..], 2 * d);
            T::product(true, [p.n_q, p.n_k, dh], queries, keys, false, w, p.n_k);
            for (query, w) in w.chunks_exact_mut(p.n_k).enumerate() {
                let (seen, unseen) = w.split_at_mut(p.n_k - p.n_q + query + 1);
                softmax(seen, root, T::from_wide(p.pads as f64));
                unseen.fill(T::default());
            }
            dropped.clear();
            dropped.extend_from_slice(w);
            if !factors.is_empty() {
                scale(&mut dropped, &factors[p.w..]);
            }
            let values = Matrix::rows(&kv[(p.k * 2 + 1) * d + p.head..], 2 * d);
            let context = &mut context[p.q * d + p.head..];
            T::product(true, [p.n_q, dh, p.n_k], Matrix::rows(&dropped, p.n_k), values, false, context, d);
        }
        (weights, context)
    }

    /// Gradients of q and kv from that of the context.
    fn attend_backward(&self, parts: &[Part], pass: &BlockPass<T>, d_context: &[T]) -> (Vec<T>, Vec<T>) {
        let (d, dh) = (self.dim, self.dim / self.heads);
        let root = T::from_wide((dh as f64).recip().sqrt());
        let (mut d_q, mut d_kv) = (vec![T::default(); pass.q.len()], vec![T::default(); pass.kv.len()]);
        let (mut dropped, mut d_w) = (Vec::new(), Vec::new());
        for p in parts {
            let n = p.n_q * p.n_k;
            let w = &pass.weights[p.w..][..n];
            let factors = if pass.factors.is_empty() { &[][..] } else { &pass.factors[p.w..][..n] };
            dropped.clear();
            dropped.extend_from_slice(w);
            scale(&mut dropped, factors);
            let d_context = Matrix::rows(&d_context[p.q * d + p.head..], d);
            let values = Matrix::transposed(&pass.kv[(p.k * 2 + 1) * d + p.head..], 2 * d);
            d_w.resize(n, T::default());
            T::product(true, [p.n_q, p.n_k, dh], d_context, values, false, &mut d_w, p.n_k);
            let d_values = &mut d_kv[(p.k * 2 + 1) * d + p.head..];
            T::product(
                true,
                [p.n_k, dh, p.n_q],
                Matrix::transposed(&dropped, p.n_k),
                d_context,
                false,
                d_values,
                2 * d,
            );
            scale(&mut d_w, factors);
            for (w, d_w) in w.chunks_exact(p.n_k).zip(d_w.chunks_exact_mut(p.n_k)) {
                let mean = sum(p.n_k, |i| w[i] * d_w[i]);
                d_w.iter_mut().zip(w).for_each(|(d, &w)| *d = w * (*d - mean) * root);
            }
            let keys = Matrix::rows(&pass.kv[p.k * 2 * d + p.head..], 2 * d);
            let queries = Matrix::rows(&pass.q[p.q * d + p.head..], d);
            T::product(
                true,
                [p.n_q, dh, p.n_k],
                Matrix::rows(&d_w, p.n_k),
                keys,
                false,
                &mut d_q[p.q * d + p.head..],
                d,
            );
            let d_keys = &mut d_kv[p.k * 2 * d + p.head..];
            T::product(true, [p.n_k, dh, p.n_q], Matrix::transposed(&d_w, p.n_k), queries, false, d_keys, 2 * d);
        }
        (d_q, d_kv)
    }

    /// Adds to `gradient` (all tensors but the item table) what `d_states` makes of it; returns the gradient of every token's item
    /// embedding, before the factor √dim.
    pub fn backward(&self, chunk: &Chunk, forward: &Forward<T>, d_states: &[T], gradient: &mut [Vec<T>]) -> Vec<T> {
        let d = self.dim;
        let n = gradient.len();
        let (rest, [d_weight, d_bias]) = gradient.split_last_chunk_mut().expect("the last norm");
        let mut d_x = layer_norm_backward(&forward.last, &self.weights[n - 2], d_states, d_weight, d_bias);
        for (b, pass) in forward.blocks.iter().enumerate().rev() {
            d_x = self.block_backward(b, chunk, pass, d_x, &mut rest[BEFORE + b * PER_BLOCK..][..PER_BLOCK]);
        }
        self.clear_pads(chunk, false, &mut d_x);
        scale(&mut d_x, &forward.factors);
        for row in chunk.starts.windows(2) {
            for token in row[0] + 1..row[1] {
                add(&d_x[token * d..][..d], &mut rest[1][self.position(token, row[1]) * d..][..d]);
            }
        }
        d_x
    }

    fn block_backward(
        &self,
        b: usize,
        chunk: &Chunk,
        pass: &BlockPass<T>,
        mut d_f: Vec<T>,
        gradient: &mut [Vec<T>],
    ) -> Vec<T> {
        let d = self.dim;
        let last = b + 1 == self.blocks();
        let [norm1_w, _, in_w, _, out_w, _, norm2_w, _, w1, _, w2, _] =
            std::array::from_fn(|i| &self.block(self.weights, b)[i][..]);
        let Ok([d_norm1_w, d_norm1_b, d_in_w, d_in_b, d_out_w, d_out_b, d_norm2_w, d_norm2_b, d_w1, d_b1, d_w2, d_b2]) =
            <&mut [Vec<T>; PER_BLOCK]>::try_from(gradient)
        else {
            unreachable!("a block has {PER_BLOCK} tensors")
        };
        self.clear_pads(chunk, last, &mut d_f);
        let mut d_y = d_f.clone();
        scale(&mut d_y, &pass.outer);
        let mut d_u = linear_backward(true, &pass.u, w2, &d_y, d_w2, d_b2);
        d_u.iter_mut().zip(&pass.u).for_each(|(d, &u)| *d = if u > T::default() { *d } else { T::default() });
        scale(&mut d_u, &pass.inner);
        add(&linear_backward(true, &pass.f, w1, &d_u, d_w1, d_b1), &mut d_f);
        let mut d_h = layer_norm_backward(&pass.norm2, norm2_w, &d_f, d_norm2_w, d_norm2_b);
        let d_context = linear_backward(true, &pass.context, out_w, &d_h, d_out_w, d_out_b);
        let (d_q, d_kv) = self.attend_backward(&self.parts(chunk, last), pass, &d_context);
        let ((d_wq, d_wkv), (d_bq, d_bkv)) = (d_in_w.split_at_mut(d * d), d_in_b.split_at_mut(d));
        add(&linear_backward(true, &pass.h, &in_w[..d * d], &d_q, d_wq, d_bq), &mut d_h);
        let d_asking = layer_norm_backward(&pass.norm1, norm1_w, &d_h, d_norm1_w, d_norm1_b);
        let mut d_x = linear_backward(true, &pass.x, &in_w[d * d..], &d_kv, d_wkv, d_bkv);
        if last {
            chunk.lasts().zip(d_asking.chunks_exact(d)).for_each(|(token, row)| add(row, &mut d_x[token * d..][..d]));
        } else {
            add(&d_asking, &mut d_x);
        }
        d_x
    }
}

fn select<T: Real>(x: &[T], rows: impl Iterator<Item = usize>, d: usize) -> Vec<T> {
    rows.flat_map(|r| &x[r * d..][..d]).copied().collect()
}

/// Softmax of `scores · root`, the first of which stands for `pads` equal ones and gets their sum (none: zero).
fn softmax<T: Real>(scores: &mut [T], root: T, pads: T) {
    let zero = T::default();
    let first = usize::from(pads <= zero);
    if first == scores.len() {
        scores.fill(zero);
        return;
    }
    let most = scores[first..].iter().fold(scores[first], |m, &s| if s > m { s } else { m });
    scores.iter_mut().for_each(|s| *s = ((*s - most) * root).exp());
    scores[0] = if first == 1 { zero } else { scores[0] * pads };
    let total = T::from_wide(1.0) / scores.iter().fold(zero, |a, &s| a + s);
    scores.iter_mut().for_each(|s| *s *= total);
}
