//! One transformer block, forward and backward, written out.
//!
//! ```text
//! h = norm(x)          q = h Wqᵀ   k, v = h Wkvᵀ      q, k rotated
//! m = x + attention(q, k, v) Woᵀ
//! [g|u] = norm(m) Wguᵀ      y = m + (silu(g) · u) Wdᵀ
//! ```
//!
//! Every product may carry a LoRA pair. Rows before `batch.first_gradient` are computed forward only; of them the keys and
//! values are kept, since later rows attend to them. In the last block ([`Queries::Last`]) only the last token of each
//! prompt is a query.

use crate::device::cpu::attention::{attention, attention_backward};
use crate::device::cpu::copy;
use crate::device::cpu::lora::{self, Mask, Pair, PairGradient};
use crate::device::cpu::norm::{rms_norm, rms_norm_backward, rms_norm_saved};
use crate::device::cpu::rope::{Rotation, rotate};
use crate::device::cpu::swiglu::{swiglu, swiglu_backward};
use crate::device::ops::{Dropout, Segment};
use crate::llm::batch::PackedBatch;
use crate::llm::cpu::Model;
use crate::llm::peft::{LoraTensors, TARGETS, Target};

/// Which rows of a block are queries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Queries {
    /// All rows.
    All,
    /// The last token of each prompt.
    Last,
}

/// Activations that backward reads, rows from `first_gradient` on (query side: of all prompts in the last block).
#[derive(Debug, Default)]
pub(super) struct Saved {
    /// Input of the block, `[n, hidden]`, and 1 / rms of its rows.
    x: Vec<f32>,
    x_inv_rms: Vec<f32>,
    /// Rotated queries, `[n_q, q_width]`.
    q: Vec<f32>,
    /// Rotated keys, then values, of what is given and of *all* rows: `[n_given + n_rows, 2 · kv_width]`.
    kv: Vec<f32>,
    /// Attention output before Wo, `[n_q, q_width]`, and log-sum-exp, `[n_q, n_heads]`.
    attn: Vec<f32>,
    lse: Vec<f32>,
    /// Residual stream between attention and MLP, `[n_q, hidden]`, and 1 / rms of its rows.
    mid: Vec<f32>,
    mid_inv_rms: Vec<f32>,
    /// Gate and up, `[n_q, 2 · intermediate]`.
    gate_up: Vec<f32>,
    /// `u` of each LoRA target, `[rank, rows of the forward]`.
    lora_u: [Vec<f32>; TARGETS.len()],
}

/// Buffers that live within one block.
#[derive(Debug, Default)]
pub(super) struct Space {
    forward: Saved,
    h: Vec<f32>,
    h_q: Vec<f32>,
    act: Vec<f32>,
    dropped: Vec<f32>,
    d_mid: Vec<f32>,
    d_h: Vec<f32>,
    d_h_q: Vec<f32>,
    d_act: Vec<f32>,
    d_gate_up: Vec<f32>,
    d_attn: Vec<f32>,
    d_q: Vec<f32>,
    d_kv: Vec<f32>,
}

/// Where a block's backward adds LoRA gradients, and what it needs to know for it.
pub(super) struct Gradients<'a> {
    pub lora: Option<&'a mut LoraTensors>,
    pub needs_d_x: bool,
    pub adapter: Option<&'a LoraTensors>,
    pub dropout: Option<Dropout>,
}

fn pair(lora: Option<&LoraTensors>, l: usize, target: Target) -> Option<Pair<'_>> {
    let lora = lora?;
    let p = lora.tensors.get(&(l, target))?;
    Some(Pair { a: &p.a, b: &p.b, rank: lora.rank, scaling: lora.scaling() })
}

fn mask(dropout: Option<Dropout>, l: usize, target: Target, tokens: &[u32]) -> Option<Mask<'_>> {
    let module = (l * TARGETS.len() + target as usize) as u32;
    dropout.filter(|d| d.p > 0.0).map(|dropout| Mask { dropout, module, tokens })
}

fn gather<T: Copy>(rows: &[usize], width: usize, from: &[T], to: &mut Vec<T>) {
    to.clear();
    to.extend(rows.iter().flat_map(|r| &from[r * width..][..width]).copied());
}

/// The first `len` elements of a buffer that only grows.
fn sized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

/// Moves rows from `first` on into `saved`: the whole buffer changes hands when it is all of it.
fn keep(space: &mut Vec<f32>, saved: &mut Vec<f32>, first: usize, rows: usize, width: usize) {
    if first == 0 {
        std::mem::swap(space, saved);
    } else {
        saved.clear();
        saved.extend_from_slice(&space[first * width..rows * width]);
    }
}

impl Space {
    /// Rotated keys and values of the last block that ran forward without saving.
    pub fn kv(&self) -> &[f32] {
        &self.forward.kv
    }
}

impl Model {
    /// `x: [n_rows, hidden]` in; out, the block's output for the query rows.
    #[allow(clippy::too_many_arguments)] // what a block reads and writes
    pub(super) fn block_forward(
        &self,
        l: usize,
        batch: &PackedBatch,
        queries: Queries,
        lora: Option<&LoraTensors>,
        dropout: Option<Dropout>,
        x: &mut Vec<f32>,
        saved: Option<&mut Saved>,
        space: &mut Space,
    ) {
        let (config, layer, heads) = (self.config(), &self.layers[l], self.heads());
        let (hidden, inter, n) = (config.hidden_size, config.intermediate_size, batch.n_rows());
        let (q_width, kv_width) = (heads.q_width(), heads.kv_width());
        let all = queries == Queries::All;
        let n_q = if all { n } else { batch.n_prompts() };
        let (mut q_positions, mut q_tokens) = (Vec::new(), Vec::new());
        if !all {
            gather(&batch.last_rows, 1, &batch.positions, &mut q_positions);
            gather(&batch.last_rows, 1, &batch.step_tokens, &mut q_tokens);
        }
        let (positions, tokens) = (&batch.positions, &batch.step_tokens);
        let (q_positions, q_tokens) = if all { (positions, tokens) } else { (&q_positions, &q_tokens) };

        let Space { forward: f, h, h_q, act, dropped, .. } = space;
        let dropped = sized(dropped, n * hidden.max(inter).max(q_width));
        let mut adapt =
            |target: Target, x: &[f32], tokens: &[u32], u: &mut [Vec<f32>; 7], y: &mut [f32], y_stride: usize| {
                if let Some(pair) = pair(lora, l, target) {
                    let u = sized(&mut u[target as usize], pair.rank * tokens.len());
                    lora::forward(pair, x, mask(dropout, l, target, tokens), u, y, y_stride, dropped);
                }
            };

        let h = sized(h, n * hidden);
        rms_norm(x, &layer.input_norm, config.rms_norm_eps, h, sized(&mut f.x_inv_rms, n));
        let n_given = batch.n_given();
        let all_kv = sized(&mut f.kv, (n_given + n) * 2 * kv_width);
        let (given, kv) = all_kv.split_at_mut(n_given * 2 * kv_width);
        batch.read_given(l, 2 * kv_width, given);
        layer.kv.forward(h, kv, false);
        adapt(Target::K, h, tokens, &mut f.lora_u, kv, 2 * kv_width);
        adapt(Target::V, h, tokens, &mut f.lora_u, &mut kv[kv_width..], 2 * kv_width);
        rotate(&self.rope, positions, heads.n_kv_heads, kv, 2 * kv_width, Rotation::Forward);
        let h_q = if all {
            &*h
        } else {
            gather(&batch.last_rows, hidden, h, h_q);
            h_q
        };
        let q = sized(&mut f.q, n_q * q_width);
        layer.q.forward(h_q, q, false);
        adapt(Target::Q, h_q, q_tokens, &mut f.lora_u, q, q_width);
        rotate(&self.rope, q_positions, heads.n_heads, q, q_width, Rotation::Forward);

        let last_segments = if all { Vec::new() } else { batch.last_segments() };
        let segments: &[Segment] = if all { &batch.segments } else { &last_segments };
        let attn = sized(&mut f.attn, n_q * q_width);
        attention(heads, segments, q, all_kv, attn, sized(&mut f.lse, n_q * heads.n_heads));

        let mid = sized(&mut f.mid, n_q * hidden);
        if all {
            copy(x, mid);
        } else {
            for (mid, r) in mid.chunks_exact_mut(hidden).zip(&batch.last_rows) {
                mid.copy_from_slice(&x[r * hidden..][..hidden]);
            }
        }
        layer.o.forward(attn, mid, true);
        adapt(Target::O, attn, q_tokens, &mut f.lora_u, mid, hidden);

        let h = &mut h[..n_q * hidden];
        rms_norm(mid, &layer.post_norm, config.rms_norm_eps, h, sized(&mut f.mid_inv_rms, n_q));
        let gate_up = sized(&mut f.gate_up, n_q * 2 * inter);
        layer.gate_up.forward(h, gate_up, false);
        adapt(Target::Gate, h, q_tokens, &mut f.lora_u, gate_up, 2 * inter);
        adapt(Target::Up, h, q_tokens, &mut f.lora_u, &mut gate_up[inter..], 2 * inter);
        let act = sized(act, n_q * inter);
        swiglu(gate_up, act, inter);

        let first = if all { batch.first_gradient } else { 0 };
        let Some(saved) = saved else {
            x.resize(mid.len(), 0.0);
            copy(mid, x);
            layer.down.forward(act, x, true);
            adapt(Target::Down, act, q_tokens, &mut f.lora_u, x, hidden);
            return;
        };
        keep(x, &mut saved.x, batch.first_gradient, n, hidden);
        x.resize(mid.len(), 0.0);
        copy(mid, x);
        layer.down.forward(act, x, true);
        adapt(Target::Down, act, q_tokens, &mut f.lora_u, x, hidden);
        keep(&mut f.x_inv_rms, &mut saved.x_inv_rms, batch.first_gradient, n, 1);
        keep(&mut f.kv, &mut saved.kv, 0, n_given + n, 2 * kv_width);
        keep(&mut f.q, &mut saved.q, first, n_q, q_width);
        keep(&mut f.attn, &mut saved.attn, first, n_q, q_width);
        keep(&mut f.lse, &mut saved.lse, first, n_q, heads.n_heads);
        keep(&mut f.mid, &mut saved.mid, first, n_q, hidden);
        keep(&mut f.mid_inv_rms, &mut saved.mid_inv_rms, first, n_q, 1);
        keep(&mut f.gate_up, &mut saved.gate_up, first, n_q, 2 * inter);
        std::mem::swap(&mut f.lora_u, &mut saved.lora_u);
    }

    /// `d_x`: in, the gradient of the block's output (query rows with a gradient); out, of its input (rows with a gradient),
    /// unless `gradients.needs_d_x` is false.
    #[allow(clippy::too_many_arguments)] // what a block reads and writes
    pub(super) fn block_backward(
        &self,
        l: usize,
        batch: &PackedBatch,
        queries: Queries,
        saved: &Saved,
        gradients: &mut Gradients,
        d_x: &mut Vec<f32>,
        space: &mut Space,
    ) {
        let (config, layer, heads) = (self.config(), &self.layers[l], self.heads());
        let (hidden, inter) = (config.hidden_size, config.intermediate_size);
        let (q_width, kv_width) = (heads.q_width(), heads.kv_width());
        let (first, all) = (batch.first_gradient, queries == Queries::All);
        let n = batch.n_rows() - first;
        let n_q = if all { n } else { batch.n_prompts() };
        // Rows of the forward on each side, and the first of them that has a gradient: how `lora_u` was saved.
        let (rows, rows_q, first_q) =
            (batch.n_rows(), if all { batch.n_rows() } else { n_q }, if all { first } else { 0 });
        let mut last_rows = Vec::new();
        let mut last_tokens = Vec::new();
        if !all {
            last_rows.extend(batch.last_rows.iter().map(|r| r - first));
            gather(&batch.last_rows, 1, &batch.step_tokens, &mut last_tokens);
        }
        let tokens = &batch.step_tokens[first..];
        let q_tokens = if all { tokens } else { &last_tokens };
        let segments = if all { batch.gradient_segments() } else { batch.last_segments() };

        let Space { h, h_q, act, dropped, d_mid, d_h, d_h_q, d_act, d_gate_up, d_attn, d_q, d_kv, .. } = space;
        let dropped = sized(dropped, n * hidden.max(inter).max(q_width));
        let (adapter, dropout, needs_d_x) = (gradients.adapter, gradients.dropout, gradients.needs_d_x);
        let trains = gradients.lora.is_some();
        let mut adapt = |target: Target, x: &[f32], d_y: &[f32], d_y_stride: usize, d_x: Option<&mut [f32]>| {
            let Some(pair) = pair(adapter, l, target) else { return };
            let query_side = !matches!(target, Target::K | Target::V);
            let (tokens, first, u_stride) =
                if query_side { (q_tokens, first_q, rows_q) } else { (tokens, first, rows) };
            let gradient = gradients.lora.as_deref_mut().and_then(|g| g.tensors.get_mut(&(l, target))).map(|g| {
                PairGradient { a: &mut g.a, b: &mut g.b, u: &saved.lora_u[target as usize][first..], u_stride }
            });
            lora::backward(pair, x, mask(dropout, l, target, tokens), d_y, d_y_stride, gradient, d_x, dropped);
        };
        let trained = |targets: &[Target]| trains && targets.iter().any(|&t| pair(adapter, l, t).is_some());

        // MLP
        let gate_up = &saved.gate_up[..n_q * 2 * inter];
        let mid = &saved.mid[..n_q * hidden];
        let d_act = sized(d_act, n_q * inter);
        layer.down.backward(d_x, d_act, false);
        if pair(adapter, l, Target::Down).is_some() {
            let act = sized(act, n_q * inter);
            swiglu(gate_up, act, inter);
            adapt(Target::Down, act, d_x, hidden, Some(d_act));
        }
        let d_gate_up = sized(d_gate_up, n_q * 2 * inter);
        swiglu_backward(gate_up, d_act, d_gate_up, inter);
        let d_h_mid = sized(d_h, n_q * hidden);
        layer.gate_up.backward(d_gate_up, d_h_mid, false);
        let h_mid = sized(h, n_q * hidden);
        if trained(&[Target::Gate, Target::Up]) {
            rms_norm_saved(mid, &layer.post_norm, &saved.mid_inv_rms[..n_q], h_mid);
        }
        adapt(Target::Gate, h_mid, d_gate_up, 2 * inter, Some(d_h_mid));
        adapt(Target::Up, h_mid, &d_gate_up[inter..], 2 * inter, Some(d_h_mid));
        rms_norm_backward(mid, &layer.post_norm, &saved.mid_inv_rms[..n_q], d_h_mid, d_x);

        // Attention
        let attn = &saved.attn[..n_q * q_width];
        let d_attn = sized(d_attn, n_q * q_width);
        layer.o.backward(d_x, d_attn, false);
        adapt(Target::O, attn, d_x, hidden, Some(d_attn));
        let d_q = sized(d_q, n_q * q_width);
        let d_kv = sized(d_kv, n * 2 * kv_width);
        d_kv.fill(0.0);
        let n_given = batch.n_given();
        let (q, kv) = (&saved.q[..n_q * q_width], &saved.kv[..(n_given + rows) * 2 * kv_width]);
        attention_backward(heads, &segments, q, kv, attn, &saved.lse, d_attn, n_given + first, d_q, d_kv);
        let positions = &batch.positions[first..];
        rotate(&self.rope, positions, heads.n_kv_heads, d_kv, 2 * kv_width, Rotation::Backward);
        if all {
            rotate(&self.rope, positions, heads.n_heads, d_q, q_width, Rotation::Backward);
        } else {
            let mut q_positions = Vec::new();
            gather(&last_rows, 1, positions, &mut q_positions);
            rotate(&self.rope, &q_positions, heads.n_heads, d_q, q_width, Rotation::Backward);
        }

        // Projections
        let x = &saved.x[..n * hidden];
        let h = sized(h, n * hidden);
        if trained(&[Target::Q, Target::K, Target::V]) {
            rms_norm_saved(x, &layer.input_norm, &saved.x_inv_rms[..n], h);
        }
        let h_q = if all {
            &*h
        } else {
            gather(&last_rows, hidden, h, h_q);
            h_q
        };
        if !needs_d_x {
            adapt(Target::K, h, d_kv, 2 * kv_width, None);
            adapt(Target::V, h, &d_kv[kv_width..], 2 * kv_width, None);
            adapt(Target::Q, h_q, d_q, q_width, None);
            return;
        }
        let d_h = sized(d_mid, n * hidden);
        layer.kv.backward(d_kv, d_h, false);
        adapt(Target::K, h, d_kv, 2 * kv_width, Some(d_h));
        adapt(Target::V, h, &d_kv[kv_width..], 2 * kv_width, Some(d_h));
        if all {
            layer.q.backward(d_q, d_h, true);
            adapt(Target::Q, h_q, d_q, q_width, Some(d_h));
        } else {
            let d_h_q = sized(d_h_q, n_q * hidden);
            layer.q.backward(d_q, d_h_q, false);
            adapt(Target::Q, h_q, d_q, q_width, Some(d_h_q));
            let d_last = std::mem::take(d_x);
            d_x.resize(n * hidden, 0.0);
            let rows = last_rows.iter().zip(d_h_q.chunks_exact(hidden)).zip(d_last.chunks_exact(hidden));
            for ((r, d_h_q), d_last) in rows {
                d_h[r * hidden..][..hidden].iter_mut().zip(d_h_q).for_each(|(d, q)| *d += q);
                d_x[r * hidden..][..hidden].copy_from_slice(d_last);
            }
        }
        rms_norm_backward(x, &layer.input_norm, &saved.x_inv_rms[..n], d_h, d_x);
    }
}
