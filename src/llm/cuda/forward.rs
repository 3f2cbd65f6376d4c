//! The blocks' forward pass.

use std::ops::Range;

use super::adapter::Product;
use super::model::{Linear, Model};
use super::workspace::{Side, Workspace};
use crate::device::cuda::gemm::{Epilogue, Masks, Stack, Weight};
use crate::device::cuda::rope::Part;
use crate::device::cuda::{Rows, memory::Elements};
use crate::llm::Error;
use crate::llm::model::Tap;
use crate::llm::peft::Target;

impl Model {
    pub(super) fn linear(&self, l: usize, product: Product) -> &Linear {
        let layer = &self.layers[l];
        match product {
            Product::Qkv => &layer.qkv,
            Product::O => &layer.o,
            Product::GateUp => &layer.gate_up,
            Product::Down => &layer.down,
        }
    }

    pub(super) fn view(&self, buffer: &Elements, rows: usize, columns: usize) -> Rows {
        Rows::new(buffer, self.precision(), rows, columns)
    }

    /// Places of a product's adapters whose target is among `targets`.
    pub(super) fn pairs(&self, w: &Workspace, l: usize, product: Product, targets: &[Target]) -> Range<usize> {
        let Some(adapter) = w.lora() else { return 0..0 };
        let places: Vec<usize> = targets.iter().filter_map(|&t| adapter.group(l, product).place(t)).collect();
        places.first().map_or(0..0, |&first| first..first + places.len())
    }

    /// `y = [x Wᵀ + bias + addend | u of each pair]` for rows `weights` of a product's weight and the given pairs.
    #[allow(clippy::too_many_arguments)] // one product, its operands
    fn product(
        &self,
        w: &Workspace,
        l: usize,
        product: Product,
        weights: Range<usize>,
        pairs: Range<usize>,
        side: Side,
        x: Rows,
        y: Rows,
        addend: Option<Rows>,
    ) -> Result<(), Error> {
        let linear = self.linear(l, product);
        let bias = linear.bias(self.precision(), weights.start);
        let columns = weights.len();
        let weight = linear.rows(self.precision()).rows(weights.start, columns);
        let mut stack = Stack { weight, adapters: None };
        let (mut masked, mut masks) = (Vec::new(), None);
        if let Some(adapter) = w.lora().filter(|_| !pairs.is_empty()) {
            stack.adapters = adapter.a(&self.cuda, l, product, pairs.start, pairs.len());
            let group = &adapter.group(l, product).pairs[pairs];
            let targets: Vec<_> = group.iter().map(|p| (p.target, p.in_features)).collect();
            let addresses = w.masks(self, l, &targets, side, 0, x.rows)?;
            masked = adapter.masked(columns, &addresses);
        }
        if let Some(dropout) = w.dropout.as_ref().filter(|_| !masked.is_empty()) {
            masks = Some(Masks { adapters: &masked, width: x.columns, scale: dropout.scale() });
        }
        let epilogue = Epilogue::Plain { bias, addend, masks };
        Ok(self.ops.gemm.run(&self.cuda, x, stack, Weight::Transposed, y, epilogue)?)
    }

    /// Leaves the output of the last block in `w.last_x`. `tap` sees each block's input (after the adapter that belongs to it).
    pub(super) fn forward(&self, w: &Workspace, save: bool, mut tap: Option<&mut Tap>) -> Result<(), Error> {
        self.ops.rows.splice(&self.cuda, &w.sources, self.embed(), &w.vectors, w.x(self, 0))?;
        for l in 0..self.layers.len() {
            self.block_forward(w, l, save, false)?;
            if let Some(tap) = tap.as_mut() {
                let (rows, x) = (self.view(&w.x_q, w.n_prompts, self.config.hidden_size), w.x(self, l));
                self.ops.rows.gather(&self.cuda, &w.last_rows, x.columns(0, rows.columns), rows)?;
                tap(&w.read(self, rows)?);
            }
        }
        Ok(())
    }

    /// From `x(l)` to `x(l + 1)` (of the last block, to `last_x`). `again`: only the activations in between, from an input that
    /// already holds the adapter's part of the product before it.
    pub(super) fn block_forward(&self, w: &Workspace, l: usize, save: bool, again: bool) -> Result<(), Error> {
        let (cuda, config, heads, ops) = (&self.cuda, &self.config, self.heads(), &self.ops);
        let (layer, s) = (&self.layers[l], w.saved(l));
        let last = l + 1 == self.layers.len();
        let side = if last { Side::Last } else { Side::All };
        let (n, n_q) = (w.n, if last { w.n_prompts } else { w.n });
        let (hidden, inter) = (config.hidden_size, config.intermediate_size);
        let (q_width, kv_width) = (heads.q_width(), heads.kv_width());
        let positions = w.positions.address();

        let x = w.x(self, l);
        let h = self.view(&w.h, n, hidden);
        let down_before = if l > 0 && !again { w.down_adapter(self, l - 1) } else { None };
        ops.norm.forward(
            cuda,
            x,
            layer.input_norm.address(),
            config.rms_norm_eps as f32,
            h,
            &s.inv_rms,
            down_before,
        )?;

        let adapter = |target: Target, column: usize| w.lora()?.adapter(l, Product::Qkv, target, column);
        let padded = w.lora().map_or(0, |a| a.padded);
        let (q, k, v);
        if last {
            let q_pairs = self.pairs(w, l, Product::Qkv, &[Target::Q]);
            let kv_pairs = self.pairs(w, l, Product::Qkv, &[Target::K, Target::V]);
            let kv = self.view(&s.qkv, n, 2 * kv_width + kv_pairs.len() * padded);
            let weights = q_width..q_width + 2 * kv_width;
            self.product(w, l, Product::Qkv, weights, kv_pairs.clone(), Side::All, h, kv, None)?;
            let u_v = 2 * kv_width + (kv_pairs.len().saturating_sub(1)) * padded;
            let parts = [
                Part::turned(0, heads.n_kv_heads, adapter(Target::K, 2 * kv_width)),
                Part::plain(kv_width, heads.n_kv_heads, adapter(Target::V, u_v)),
            ];
            ops.rope.forward(cuda, kv, positions, &parts)?;
            let h_q = self.view(&w.h_q, n_q, hidden);
            ops.rows.gather(cuda, &w.last_rows, h, h_q)?;
            let q_rows = self.view(&w.q_last, n_q, q_width + q_pairs.len() * padded);
            self.product(w, l, Product::Qkv, 0..q_width, q_pairs, Side::Last, h_q, q_rows, None)?;
            let part = Part::turned(0, heads.n_heads, adapter(Target::Q, q_width));
            ops.rope.forward(cuda, q_rows, w.q_positions.address(), &[part])?;
            (q, k, v) = (q_rows.columns(0, q_width), kv.columns(0, kv_width), kv.columns(kv_width, kv_width));
        } else {
            let pairs = self.pairs(w, l, Product::Qkv, Product::Qkv.targets());
            let out = q_width + 2 * kv_width;
            let qkv = self.view(&s.qkv, n, out + pairs.len() * padded);
            self.product(w, l, Product::Qkv, 0..out, pairs, Side::All, h, qkv, None)?;
            ops.rope.forward(cuda, qkv, positions, &self.qkv_parts(w, l))?;
            q = qkv.columns(0, q_width);
            (k, v) = (qkv.columns(q_width, kv_width), qkv.columns(q_width + kv_width, kv_width));
        }
        let attn = self.view(&s.attn, n_q, q_width);
        let tables = if last { &w.tables_last } else { &w.tables };
        ops.attention.forward(cuda, heads, tables, q, k, v, attn, &s.lse)?;

        let residual = if last {
            let x_q = self.view(&w.x_q, n_q, hidden);
            ops.rows.gather(cuda, &w.last_rows, x.columns(0, hidden), x_q)?;
            x_q
        } else {
            x.columns(0, hidden)
        };
        let mid = self.view(&s.mid, n_q, hidden + w.tail(l, Product::O));
        let pairs = self.pairs(w, l, Product::O, Product::O.targets());
        self.product(w, l, Product::O, 0..hidden, pairs, side, attn, mid, Some(residual))?;
        let h = h.rows(0, n_q);
        let o = w.lora().and_then(|a| a.adapter(l, Product::O, Target::O, hidden));
        ops.norm.forward(cuda, mid, layer.post_norm.address(), config.rms_norm_eps as f32, h, &s.mid_inv_rms, o)?;

        let gate_up = self.view(&s.gate_up, n_q, 2 * inter + w.tail(l, Product::GateUp));
        let act = self.view(w.act(l), n_q, inter);
        match w.lora().and_then(|a| a.gate_up(l, 2 * inter)) {
            None => {
                let linear = &layer.gate_up;
                let epilogue = Epilogue::Swiglu { bias: linear.bias(self.precision(), 0), act, keep: save };
                ops.gemm.run(cuda, h, linear.rows(self.precision()), Weight::Transposed, gate_up, epilogue)?;
            }
            Some(adapter) => {
                let pairs = self.pairs(w, l, Product::GateUp, Product::GateUp.targets());
                self.product(w, l, Product::GateUp, 0..2 * inter, pairs, side, h, gate_up, None)?;
                ops.lora.swiglu(cuda, gate_up, act, adapter)?;
            }
        }
        if again {
            return Ok(());
        }
        let out = if last { w.last_x(self) } else { w.x(self, l + 1) };
        let pairs = self.pairs(w, l, Product::Down, Product::Down.targets());
        self.product(w, l, Product::Down, 0..hidden, pairs, side, act, out, Some(mid.columns(0, hidden)))
    }

    /// q, k, v side by side, and the places of their u behind them.
    pub(super) fn qkv_parts(&self, w: &Workspace, l: usize) -> [Part; 3] {
        let heads = self.heads();
        let (q_width, kv_width) = (heads.q_width(), heads.kv_width());
        let lora = |target: Target| {
            let adapter = w.lora()?;
            let place = adapter.group(l, Product::Qkv).place(target)?;
            adapter.adapter(l, Product::Qkv, target, q_width + 2 * kv_width + place * adapter.padded)
        };
        [
            Part::turned(0, heads.n_heads, lora(Target::Q)),
            Part::turned(q_width, heads.n_kv_heads, lora(Target::K)),
            Part::plain(q_width + kv_width, heads.n_kv_heads, lora(Target::V)),
        ]
    }
}
