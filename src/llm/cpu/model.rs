//! Frozen weights arranged for the operations, and the passes over a packed batch.

use half::slice::HalfFloatSliceExt;

use crate::device::cpu::gemm::{Dense, FrozenMatrix, Operand, Output, gemm};
use crate::device::cpu::head::{AnswerRows, bce};
use crate::device::cpu::norm::{rms_norm, rms_norm_backward};
use crate::device::cpu::rope::RopeTable;
use crate::device::cpu::splice::{splice, splice_backward};
use crate::device::ops::{Dropout, HeadShape, Loss};
use crate::device::profile::{Group, product, span};
use crate::llm::ModelConfig;
use crate::llm::batch::PackedBatch;
use crate::llm::cpu::block::{Gradients, Queries, Saved, Space};
use crate::llm::model::{Tap, TrainPass};
use crate::llm::peft::{LoraTensors, Target};
use crate::llm::weights::{ModelWeights, WeightMatrix};

/// A frozen linear layer.
#[derive(Clone, Debug)]
pub(super) struct Linear {
    pub weight: FrozenMatrix,
    pub bias: Option<Vec<f32>>,
}

impl Linear {
    fn new(parts: Vec<WeightMatrix>, biases: Vec<Option<Vec<f32>>>) -> Self {
        let bias = biases.iter().any(Option::is_some).then(|| {
            let rows = parts.iter().map(WeightMatrix::rows);
            rows.zip(biases).flat_map(|(n, b)| b.unwrap_or_else(|| vec![0.0; n])).collect()
        });
        Linear { weight: FrozenMatrix::stack(parts), bias }
    }

    /// `y = x Wᵀ + b`, or `y += …`. `x: [n, in]`, `y: [n, out]`.
    pub fn forward(&self, x: &[f32], y: &mut [f32], mut accumulate: bool) {
        let (n_out, n_in) = (self.weight.out_features(), self.weight.in_features());
        let _span = span(Group::Linear, || product(x.len(), n_out, 1));
        if let Some(bias) = &self.bias {
            for y in y.chunks_exact_mut(n_out) {
                for (y, b) in y.iter_mut().zip(bias) {
                    *y = if accumulate { *y + b } else { *b };
                }
            }
            accumulate = true;
        }
        let c = if accumulate { Output::add(y, n_out) } else { Output::set(y, n_out) };
        gemm(x.len() / n_in, n_out, n_in, Dense::rows(x, n_in), Operand::Transposed(&self.weight), c);
    }

    /// `d_x = d_y W`, or `d_x += …`. `d_y: [n, out]`, `d_x: [n, in]`.
    pub fn backward(&self, d_y: &[f32], d_x: &mut [f32], accumulate: bool) {
        let (n_out, n_in) = (self.weight.out_features(), self.weight.in_features());
        let _span = span(Group::Linear, || product(d_y.len(), n_in, 1));
        let w = Operand::Weight(&self.weight);
        let c = if accumulate { Output::add(d_x, n_in) } else { Output::set(d_x, n_in) };
        gemm(d_y.len() / n_out, n_in, n_out, Dense::rows(d_y, n_out), w, c);
    }
}

/// One transformer block's frozen weights.
#[derive(Clone, Debug)]
pub(super) struct Layer {
    pub input_norm: Vec<f32>,
    pub post_norm: Vec<f32>,
    pub q: Linear,
    /// Keys over values.
    pub kv: Linear,
    pub o: Linear,
    /// Gate over up.
    pub gate_up: Linear,
    pub down: Linear,
}

/// A LLaMA-family model, frozen, with the vocabulary rows of the answer.
#[derive(Clone, Debug)]
pub struct Model {
    config: ModelConfig,
    embed: WeightMatrix,
    head: FrozenMatrix,
    pub(super) layers: Vec<Layer>,
    final_norm: Vec<f32>,
    answer: AnswerRows,
    /// Vocabulary rows of Yes and No.
    answer_ids: [u32; 2],
    pub(super) rope: RopeTable,
    fingerprint: String,
}

/// Buffers of the passes, kept from batch to batch so that no step allocates once they have grown.
#[derive(Debug, Default)]
pub struct Workspace {
    space: Space,
    saved: Vec<Saved>,
    x: Vec<f32>,
    y: Vec<f32>,
    inv_rms: Vec<f32>,
}

impl Model {
    /// Arranges loaded weights. `yes_id`, `no_id`: vocabulary rows of the answer; `n_positions`: longest prompt to come.
    pub fn new(weights: ModelWeights, yes_id: u32, no_id: u32, n_positions: usize) -> Self {
        let config = weights.config;
        let layers = weights.layers.into_iter().map(|l| {
            let [q, k, v, o, gate, up, down] = l.biases;
            Layer {
                input_norm: l.input_norm,
                post_norm: l.post_norm,
                q: Linear::new(vec![l.q], vec![q]),
                kv: Linear::new(vec![l.k, l.v], vec![k, v]),
                o: Linear::new(vec![l.o], vec![o]),
                gate_up: Linear::new(vec![l.gate, l.up], vec![gate, up]),
                down: Linear::new(vec![l.down], vec![down]),
            }
        });
        let head = weights.lm_head.unwrap_or_else(|| weights.embed_tokens.clone());
        Model {
            layers: layers.collect(),
            answer: AnswerRows::new(&head, yes_id, no_id),
            answer_ids: [yes_id, no_id],
            head: FrozenMatrix::stack(vec![head]),
            embed: weights.embed_tokens,
            final_norm: weights.final_norm,
            rope: RopeTable::new(&config.inv_freq(), n_positions),
            fingerprint: weights.fingerprint,
            config,
        }
    }

    /// The architecture.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Identifies the weights.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    pub(super) fn heads(&self) -> HeadShape {
        let c = &self.config;
        HeadShape { n_heads: c.n_heads, n_kv_heads: c.n_kv_heads, head_dim: c.head_dim }
    }

    /// The score of each prompt: the logit that `loss` is taken on. No gradients, nothing saved.
    pub fn scores(
        &self,
        lora: Option<&LoraTensors>,
        batch: &PackedBatch,
        vectors: &[f32],
        loss: Loss,
        workspace: &mut Workspace,
    ) -> Vec<f32> {
        self.hidden(lora, batch, vectors, workspace, None);
        self.answers(batch, &workspace.y, loss).0
    }

    /// Final hidden states (after the last norm) of each prompt's last token, `[n_prompts, hidden]`. `tap` is given the last
    /// tokens' residual stream: the embeddings, then the output of each block. Of all rows for a batch of every position.
    pub fn hidden<'w>(
        &self,
        lora: Option<&LoraTensors>,
        batch: &PackedBatch,
        vectors: &[f32],
        workspace: &'w mut Workspace,
        tap: Option<Tap>,
    ) -> &'w [f32] {
        self.forward(lora, None, batch, vectors, workspace, false, tap);
        &workspace.y
    }

    /// The packed input rows, `[n_rows, hidden]`: embeddings with the vectors spliced in.
    pub fn inputs(&self, batch: &PackedBatch, vectors: &[f32]) -> Vec<f32> {
        let mut x = vec![0.0; batch.n_rows() * self.config.hidden_size];
        splice(&batch.sources, &self.embed, vectors, &mut x);
        x
    }

    /// All vocabulary logits of hidden states `y: [n, hidden]`: `[n, vocab_size]`.
    pub fn logits(&self, y: &[f32]) -> Vec<f32> {
        let (hidden, vocab) = (self.config.hidden_size, self.config.vocab_size);
        let _span = span(Group::Head, || product(y.len(), vocab, 1));
        let mut logits = vec![0.0; y.len() / hidden * vocab];
        let head = Operand::Transposed(&self.head);
        gemm(y.len() / hidden, vocab, hidden, Dense::rows(y, hidden), head, Output::set(&mut logits, vocab));
        logits
    }

    /// The scores from normed states `y`, and all logits where the batch wants them.
    fn answers(&self, batch: &PackedBatch, y: &[f32], loss: Loss) -> (Vec<f32>, Vec<f32>) {
        if !batch.every_position {
            return (self.answer.scores(y, loss), Vec::new());
        }
        let (logits, vocab) = (self.logits(y), self.config.vocab_size);
        let [yes, no] = self.answer_ids.map(|id| id as usize);
        let score = |&r: &usize| match (loss, &logits[r * vocab..][..vocab]) {
            (Loss::YesLogitBce, row) => row[yes],
            (Loss::YesNoSoftmax, row) => row[yes] - row[no],
        };
        (batch.last_rows.iter().map(score).collect(), logits)
    }

    /// Gradient of `y` from that of the scores; `logits` as [`Self::answers`] gave them, overwritten.
    fn answers_backward(&self, batch: &PackedBatch, d_scores: &[f32], loss: Loss, logits: &mut [f32], y: &mut [f32]) {
        if !batch.every_position {
            return self.answer.backward(d_scores, loss, y);
        }
        /// Rows of a product: bounds the space that it packs its left side into.
        const ROWS: usize = 1024;
        let (hidden, vocab) = (self.config.hidden_size, self.config.vocab_size);
        let _span = span(Group::Head, || product(logits.len(), hidden, 1));
        logits.fill(0.0);
        let [yes, no] = self.answer_ids.map(|id| id as usize);
        for (&r, &d) in batch.last_rows.iter().zip(d_scores) {
            logits[r * vocab + yes] = d;
            if loss == Loss::YesNoSoftmax {
                logits[r * vocab + no] = -d;
            }
        }
        for (d, y) in logits.chunks(ROWS * vocab).zip(y.chunks_mut(ROWS * hidden)) {
            let head = Operand::Weight(&self.head);
            gemm(d.len() / vocab, hidden, vocab, Dense::rows(d, vocab), head, Output::set(y, hidden));
        }
    }

    /// Forward and backward over one (micro-)batch. Returns the scores and the sum of the rows' losses.
    pub fn train_pass(&self, mut pass: TrainPass, workspace: &mut Workspace) -> (Vec<f32>, f64) {
        let hidden = self.config.hidden_size;
        self.forward(pass.lora, pass.dropout, pass.batch, pass.vectors, workspace, true, None);
        let (scores, mut logits) = self.answers(pass.batch, &workspace.y, pass.loss);
        let mut d_scores = vec![0.0; scores.len()];
        let loss = bce(&scores, pass.labels, pass.weight, &mut d_scores);

        let Workspace { space, saved, x, y, inv_rms } = workspace;
        self.answers_backward(pass.batch, &d_scores, pass.loss, &mut logits, y);
        drop(logits);
        let mut d_x = vec![0.0; x.len()];
        rms_norm_backward(x, &self.final_norm, inv_rms, y, &mut d_x);
        let wants_inputs = pass.d_vectors.is_some() || pass.d_inputs.is_some();
        for (l, saved) in saved.iter().enumerate().rev() {
            let mut gradients = Gradients {
                lora: pass.d_lora.as_deref_mut(),
                needs_d_x: l > 0 || wants_inputs,
                adapter: pass.lora,
                dropout: pass.dropout,
            };
            self.block_backward(l, pass.batch, self.queries(l, pass.batch), saved, &mut gradients, &mut d_x, space);
        }
        if let Some(d_vectors) = pass.d_vectors {
            splice_backward(&pass.batch.sources[pass.batch.first_gradient..], &d_x, hidden, d_vectors);
        }
        if let Some(d_inputs) = pass.d_inputs {
            *d_inputs = d_x;
        }
        (scores, loss)
    }

    /// Rotated keys and values of the rows of a batch in every block, rounded to f16: `[n_layers][n_rows, 2 · kv_width]`.
    pub fn keys_values(
        &self,
        lora: Option<&LoraTensors>,
        batch: &PackedBatch,
        workspace: &mut Workspace,
    ) -> Vec<Vec<half::f16>> {
        let (n, width) = (batch.n_rows(), 2 * self.heads().kv_width());
        let x = &mut workspace.x;
        x.resize(n * self.config.hidden_size, 0.0);
        splice(&batch.sources, &self.embed, &[], x);
        let layers = 0..self.layers.len();
        let rounded = layers.map(|l| {
            self.block_forward(l, batch, self.queries(l, batch), lora, None, x, None, &mut workspace.space);
            // Clamped: f16 ends at 65504, and an infinity would make all that attends to it useless.
            let limit = half::f16::MAX.to_f32();
            let kv: Vec<f32> = workspace.space.kv()[..n * width].iter().map(|v| v.clamp(-limit, limit)).collect();
            let mut rounded = vec![half::f16::ZERO; kv.len()];
            rounded.convert_from_f32_slice(&kv);
            rounded
        });
        rounded.collect()
    }

    /// The same model with an adapter in its weights: `W + scaling · B A`, added in float32, of the adapted matrices only. The others
    /// stay where they are.
    pub fn merged(&self, lora: &LoraTensors) -> Model {
        let mut model = self.clone();
        for (&(l, target), pair) in &lora.tensors {
            let layer = &mut model.layers[l];
            let (linear, part) = match target {
                Target::Q => (&mut layer.q, 0),
                Target::K => (&mut layer.kv, 0),
                Target::V => (&mut layer.kv, 1),
                Target::O => (&mut layer.o, 0),
                Target::Gate => (&mut layer.gate_up, 0),
                Target::Up => (&mut layer.gate_up, 1),
                Target::Down => (&mut layer.down, 0),
            };
            let part = linear.weight.part_mut(part);
            let (rows, cols) = (part.rows(), part.cols());
            let mut sum = part.to_f32();
            let (b, a) = (Dense::rows(&pair.b, lora.rank), Operand::Dense(Dense::rows(&pair.a, cols)));
            gemm(rows, cols, lora.rank, b, a, Output::add(&mut sum, cols).scaled(lora.scaling()));
            *part = WeightMatrix::from_f32(rows, cols, sum);
        }
        model.fingerprint = format!("{}+{}", self.fingerprint, lora.fingerprint());
        model
    }

    fn queries(&self, l: usize, batch: &PackedBatch) -> Queries {
        if l + 1 == self.layers.len() && !batch.every_position { Queries::Last } else { Queries::All }
    }

    /// Leaves the last tokens' residual stream in `x`, its norm in `inv_rms`, the normed states in `y`.
    #[allow(clippy::too_many_arguments)] // the union of what the passes need
    fn forward(
        &self,
        lora: Option<&LoraTensors>,
        dropout: Option<Dropout>,
        batch: &PackedBatch,
        vectors: &[f32],
        workspace: &mut Workspace,
        save: bool,
        mut tap: Option<Tap>,
    ) {
        let hidden = self.config.hidden_size;
        let Workspace { space, saved, x, y, inv_rms } = workspace;
        saved.resize_with(self.layers.len(), Saved::default);
        x.resize(batch.n_rows() * hidden, 0.0);
        splice(&batch.sources, &self.embed, vectors, x);
        let mut look = |x: &[f32], all_rows: bool| {
            if let Some(tap) = tap.as_mut() {
                if all_rows {
                    tap(&batch.last_rows.iter().flat_map(|r| &x[r * hidden..][..hidden]).copied().collect::<Vec<_>>());
                } else {
                    tap(x);
                }
            }
        };
        look(x, true);
        for (l, saved) in saved.iter_mut().enumerate() {
            let queries = self.queries(l, batch);
            self.block_forward(l, batch, queries, lora, dropout, x, save.then_some(saved), space);
            look(x, queries == Queries::All);
        }
        y.resize(x.len(), 0.0);
        inv_rms.resize(x.len() / hidden, 0.0);
        rms_norm(x, &self.final_norm, self.config.rms_norm_eps, y, inv_rms);
    }
}
