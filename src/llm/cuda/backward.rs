//! The blocks' backward pass: the gradient of the residual stream runs from the head to the first row that has one.

use std::ops::Range;

use super::adapter::{Pair, Product};
use super::model::Model;
use super::workspace::{Side, Workspace};
use crate::device::cuda::Rows;
use crate::device::cuda::attention::Backward;
use crate::device::cuda::gemm::{Epilogue, Masks, Stack, Weight};
use crate::device::cuda::lora::GradTarget;
use crate::device::cuda::rope::Part;
use crate::llm::Error;
use crate::llm::peft::Target;

/// What a backward product is stored as.
enum Stored {
    Itself,
    /// Through SwiGLU with the saved gate and up.
    Swiglu(Rows),
}

impl Model {
    /// `d_x = d_y W + Σ mask · (d_u A)` for rows `weights` of a product's weight; `d_y: [n, weights | d_u of each pair]`.
    /// Returns the pairs' places whose masks are now in the workspace.
    #[allow(clippy::too_many_arguments)] // one product, its operands
    fn product_backward(
        &self,
        w: &Workspace,
        l: usize,
        product: Product,
        weights: Range<usize>,
        pairs: Range<usize>,
        addresses: &[u64],
        d_y: Rows,
        d_x: Rows,
        stored: Stored,
    ) -> Result<(), Error> {
        let linear = self.linear(l, product);
        let columns = weights.len();
        let weight = linear.rows(self.precision()).rows(weights.start, columns);
        let mut stack = Stack { weight, adapters: None };
        let mut masked = Vec::new();
        if let Some(adapter) = w.lora().filter(|_| !pairs.is_empty()) {
            stack.adapters = adapter.a(&self.cuda, l, product, pairs.start, pairs.len());
            masked = adapter.masked(columns, addresses);
        }
        let dropout = w.dropout.as_ref().filter(|_| !masked.is_empty());
        let masks = dropout.map(|d| Masks {
            adapters: &masked,
            width: linear.rows(self.precision()).columns,
            scale: d.scale(),
        });
        let epilogue = match stored {
            Stored::Itself => Epilogue::Plain { bias: 0, addend: None, masks },
            Stored::Swiglu(gate_up) => Epilogue::SwigluBackward { gate_up, masks },
        };
        Ok(self.ops.gemm.run(&self.cuda, d_y, stack, Weight::Plain, d_x, epilogue)?)
    }

    /// Masks of some pairs for `rows` rows from `first` on.
    fn pair_masks(
        &self,
        w: &Workspace,
        l: usize,
        pairs: &[Pair],
        side: Side,
        first: usize,
        rows: usize,
    ) -> Result<Vec<u64>, Error> {
        let targets: Vec<_> = pairs.iter().map(|p| (p.target, p.in_features)).collect();
        w.masks(self, l, &targets, side, first, rows)
    }

    /// Gradients of a pair's A and B. `x`: its input; `u`, `d_u`, `d_y`: as the products left them. `mask`: which of the masks in
    /// the workspace is its own.
    #[allow(clippy::too_many_arguments)] // one pair, its operands
    fn pair_gradient(
        &self,
        w: &Workspace,
        pair: &Pair,
        x: Rows,
        mask: usize,
        u: Rows,
        d_u: Rows,
        d_y: Rows,
        in_turn: Option<usize>,
    ) -> Result<(), Error> {
        let Some(adapter) = w.lora() else { return Ok(()) };
        let (cuda, lora) = (&self.cuda, &self.ops.lora);
        let to_a = GradTarget {
            to: adapter.gradients.at(pair.a),
            rank: adapter.rank,
            is_b: false,
            scale: 1.0,
            stride: 1,
            offset: 0,
        };
        // Packed B carries the scaling, so d_u does, and d_A needs no factor.
        lora.gradient(cuda, d_u, x, w.input_mask(mask), &w.partials, &[to_a])?;
        let to_b = GradTarget {
            to: adapter.gradients.at(pair.b),
            is_b: true,
            scale: adapter.scaling,
            stride: if in_turn.is_some() { 2 } else { 1 },
            offset: in_turn.unwrap_or(0),
            ..to_a
        };
        Ok(lora.gradient(cuda, u, d_y, None, &w.partials, &[to_b])?)
    }

    /// From `w.d_x_last` (the head's) to `w.d_x`, adding the adapter's gradients if it is `trained`.
    pub(super) fn backward(&self, w: &Workspace, trained: bool, wants_inputs: bool) -> Result<(), Error> {
        for l in (0..self.layers.len()).rev() {
            // The last block's activations are still there.
            if w.recomputes() && l + 1 < self.layers.len() {
                self.block_forward(w, l, true, true)?;
            }
            self.block_backward(w, l, trained, l > 0 || wants_inputs)?;
        }
        Ok(())
    }

    fn block_backward(&self, w: &Workspace, l: usize, trained: bool, needs_d_x: bool) -> Result<(), Error> {
        let (cuda, heads, ops) = (&self.cuda, self.heads(), &self.ops);
        let (layer, s) = (&self.layers[l], w.saved(l));
        let (hidden, inter) = (self.config.hidden_size, self.config.intermediate_size);
        let (q_width, kv_width) = (heads.q_width(), heads.kv_width());
        let last = l + 1 == self.layers.len();
        let side = if last { Side::Last } else { Side::All };
        // Query-side rows of the forward, the first that has a gradient, and how many have.
        let (rows_q, first_q) = if last { (w.n_prompts, 0) } else { (w.n, w.first) };
        let (n_q, n) = (rows_q - first_q, w.n - w.first);
        let from = |rows: Rows| rows.rows(first_q, n_q);
        let padded = w.lora().map_or(0, |a| a.padded);
        let pairs_of = |product: Product| self.pairs(w, l, product, product.targets());
        let group = |product: Product| w.lora().map_or(&[][..], |a| &a.group(l, product).pairs[..]);
        let d_x = if last { w.d_x_last(self) } else { w.d_x_all(self) };
        // d_x with the columns behind it, where d_u of o and down go.
        let d_x_wide = |tail: usize| Rows { columns: hidden + tail, ..d_x };

        // MLP
        let d_gate_up = self.view(&w.d_gate_up, n_q, 2 * inter + w.tail(l, Product::GateUp));
        let gate_up = from(self.view(&s.gate_up, rows_q, 2 * inter + w.tail(l, Product::GateUp)));
        let d_y = d_x_wide(w.tail(l, Product::Down));
        if let [pair] = group(Product::Down) {
            ops.lora.d_u(cuda, d_x, pair.packed_b, d_y.columns(hidden, padded))?;
        }
        let addresses = self.pair_masks(w, l, group(Product::Down), side, first_q, n_q)?;
        let stored = Stored::Swiglu(gate_up.columns(0, 2 * inter));
        let d_gu = d_gate_up.columns(0, 2 * inter);
        self.product_backward(w, l, Product::Down, 0..hidden, pairs_of(Product::Down), &addresses, d_y, d_gu, stored)?;
        if let ([pair], true) = (group(Product::Down), trained) {
            let act = from(self.view(w.act(l), rows_q, inter));
            let out = if last { w.last_x(self) } else { w.x(self, l + 1).rows(first_q, n_q) };
            let u = out.columns(hidden, padded);
            self.pair_gradient(w, pair, act, 0, u, d_y.columns(hidden, padded), d_x, None)?;
        }
        let count = group(Product::GateUp).len();
        if let Some(pair) = group(Product::GateUp).first() {
            ops.lora.d_u(cuda, d_gu, pair.packed_b, d_gate_up.columns(2 * inter, count * padded))?;
        }
        let addresses = self.pair_masks(w, l, group(Product::GateUp), side, first_q, n_q)?;
        let d_h = self.view(&w.d_h, n_q, hidden);
        let pairs = pairs_of(Product::GateUp);
        self.product_backward(w, l, Product::GateUp, 0..2 * inter, pairs, &addresses, d_gate_up, d_h, Stored::Itself)?;
        let mid = from(self.view(&s.mid, rows_q, hidden + w.tail(l, Product::O)));
        let mid_x = mid.columns(0, hidden);
        let mid_inv_rms = s.mid_inv_rms.at(first_q);
        if trained && count > 0 {
            let h = self.view(&w.h, n_q, hidden);
            ops.norm.saved(cuda, mid_x, layer.post_norm.address(), h, mid_inv_rms)?;
            for (i, pair) in group(Product::GateUp).iter().enumerate() {
                let column = 2 * inter + i * padded;
                let turn = Some(usize::from(pair.target == Target::Up));
                let (u, d_u) = (gate_up.columns(column, padded), d_gate_up.columns(column, padded));
                self.pair_gradient(w, pair, h, i, u, d_u, d_gu, turn)?;
            }
        }
        ops.norm.backward(cuda, mid_x, layer.post_norm.address(), mid_inv_rms, d_h, d_x)?;

        // Attention
        let d_y = d_x_wide(w.tail(l, Product::O));
        if let [pair] = group(Product::O) {
            ops.lora.d_u(cuda, d_x, pair.packed_b, d_y.columns(hidden, padded))?;
        }
        let addresses = self.pair_masks(w, l, group(Product::O), side, first_q, n_q)?;
        let d_attn = self.view(&w.d_attn, n_q, q_width);
        let attn = from(self.view(&s.attn, rows_q, q_width));
        self.product_backward(
            w,
            l,
            Product::O,
            0..hidden,
            pairs_of(Product::O),
            &addresses,
            d_y,
            d_attn,
            Stored::Itself,
        )?;
        if let ([pair], true) = (group(Product::O), trained) {
            let (u, d_u) = (mid.columns(hidden, padded), d_y.columns(hidden, padded));
            self.pair_gradient(w, pair, attn, 0, u, d_u, d_x, None)?;
        }
        let x = w.x(self, l).rows(w.first, n).columns(0, hidden);
        let positions = w.positions.at(w.first);
        let h = self.view(&w.h, n, hidden);
        let inv_rms = s.inv_rms.at(w.first);
        let out = q_width + 2 * kv_width;
        let gradients_of_a = trained && !group(Product::Qkv).is_empty();
        if gradients_of_a {
            ops.norm.saved(cuda, x, layer.input_norm.address(), h, inv_rms)?;
        }
        if !last {
            let qkv = self.view(&s.qkv, w.n, out + w.tail(l, Product::Qkv));
            let d_qkv = self.view(&w.d_qkv, n, out + w.tail(l, Product::Qkv));
            let backward = Backward {
                q: qkv.rows(w.first, n).columns(0, q_width),
                k: qkv.columns(q_width, kv_width),
                v: qkv.columns(q_width + kv_width, kv_width),
                out: attn,
                lse: &s.lse,
                lse_first: w.first,
                d_out: d_attn,
                delta: &w.delta,
                d_q: d_qkv.columns(0, q_width),
                d_k: d_qkv.columns(q_width, kv_width),
                d_v: d_qkv.columns(q_width + kv_width, kv_width),
            };
            ops.attention.backward(cuda, heads, &w.tables, &backward)?;
            ops.rope.backward(cuda, d_qkv, positions, &self.qkv_parts(w, l))?;
            let pairs = group(Product::Qkv);
            let addresses = self.pair_masks(w, l, pairs, Side::All, w.first, n)?;
            if gradients_of_a {
                let u = qkv.rows(w.first, n);
                for (i, pair) in pairs.iter().enumerate() {
                    let (column, width) = self.part_columns(pair.target);
                    let tail = out + i * padded;
                    let (u, d_u) = (u.columns(tail, padded), d_qkv.columns(tail, padded));
                    self.pair_gradient(w, pair, h, i, u, d_u, d_qkv.columns(column, width), None)?;
                }
            }
            if needs_d_x {
                let d_h = self.view(&w.d_h, n, hidden);
                let pairs = pairs_of(Product::Qkv);
                self.product_backward(w, l, Product::Qkv, 0..out, pairs, &addresses, d_qkv, d_h, Stored::Itself)?;
                ops.norm.backward(cuda, x, layer.input_norm.address(), inv_rms, d_h, d_x)?;
            }
            return Ok(());
        }

        // The last block: queries of the last tokens, keys and values of all.
        let q_pairs = self.pairs(w, l, Product::Qkv, &[Target::Q]);
        let kv_pairs = self.pairs(w, l, Product::Qkv, &[Target::K, Target::V]);
        let kv = self.view(&s.qkv, w.n, 2 * kv_width + kv_pairs.len() * padded);
        let d_kv = self.view(&w.d_qkv, n, 2 * kv_width + kv_pairs.len() * padded);
        let q = self.view(&w.q_last, n_q, q_width + q_pairs.len() * padded);
        let d_q = self.view(&w.d_q_last, n_q, q_width + q_pairs.len() * padded);
        let backward = Backward {
            q: q.columns(0, q_width),
            k: kv.columns(0, kv_width),
            v: kv.columns(kv_width, kv_width),
            out: attn,
            lse: &s.lse,
            lse_first: 0,
            d_out: d_attn,
            delta: &w.delta,
            d_q: d_q.columns(0, q_width),
            d_k: d_kv.columns(0, kv_width),
            d_v: d_kv.columns(kv_width, kv_width),
        };
        ops.attention.backward(cuda, heads, &w.tables_last, &backward)?;
        let adapter = |target: Target, column: usize| w.lora()?.adapter(l, Product::Qkv, target, column);
        let u_v = 2 * kv_width + kv_pairs.len().saturating_sub(1) * padded;
        let parts = [
            Part::turned(0, heads.n_kv_heads, adapter(Target::K, 2 * kv_width)),
            Part::plain(kv_width, heads.n_kv_heads, adapter(Target::V, u_v)),
        ];
        ops.rope.backward(cuda, d_kv, positions, &parts)?;
        let part = Part::turned(0, heads.n_heads, adapter(Target::Q, q_width));
        ops.rope.backward(cuda, d_q, w.q_positions.address(), &[part])?;
        let all = group(Product::Qkv);
        let h_q = self.view(&w.h_q, n_q, hidden);
        let addresses = self.pair_masks(w, l, &all[kv_pairs.clone()], Side::All, w.first, n)?;
        if gradients_of_a {
            let u = kv.rows(w.first, n);
            for (i, pair) in all[kv_pairs.clone()].iter().enumerate() {
                let column = if pair.target == Target::K { 0 } else { kv_width };
                let tail = 2 * kv_width + i * padded;
                let (u, d_u) = (u.columns(tail, padded), d_kv.columns(tail, padded));
                self.pair_gradient(w, pair, h, i, u, d_u, d_kv.columns(column, kv_width), None)?;
            }
        }
        let d_x_all = w.d_x_all(self);
        let d_h = self.view(&w.d_h, n, hidden);
        if needs_d_x {
            let weights = q_width..out;
            self.product_backward(w, l, Product::Qkv, weights, kv_pairs, &addresses, d_kv, d_h, Stored::Itself)?;
        }
        let addresses = self.pair_masks(w, l, &all[q_pairs.clone()], Side::Last, 0, n_q)?;
        if let ([pair], true) = (&all[q_pairs.clone()], gradients_of_a) {
            ops.rows.gather(cuda, &w.last_rows_d, h, h_q)?;
            let (u, d_u) = (q.columns(q_width, padded), d_q.columns(q_width, padded));
            self.pair_gradient(w, pair, h_q, 0, u, d_u, d_q.columns(0, q_width), None)?;
        }
        if needs_d_x {
            let d_h_q = h_q;
            self.product_backward(w, l, Product::Qkv, 0..q_width, q_pairs, &addresses, d_q, d_h_q, Stored::Itself)?;
            ops.rows.scatter(cuda, &w.last_rows_d, d_h_q, d_h, true)?;
            ops.rows.zero(cuda, d_x_all)?;
            ops.rows.scatter(cuda, &w.last_rows_d, d_x, d_x_all, false)?;
            ops.norm.backward(cuda, x, layer.input_norm.address(), inv_rms, d_h, d_x_all)?;
        }
        Ok(())
    }

    /// Columns of a target in `[q | k | v]`.
    fn part_columns(&self, target: Target) -> (usize, usize) {
        let (q_width, kv_width) = (self.heads().q_width(), self.heads().kv_width());
        match target {
            Target::Q => (0, q_width),
            Target::K => (q_width, kv_width),
            _ => (q_width + kv_width, kv_width),
        }
    }
}
