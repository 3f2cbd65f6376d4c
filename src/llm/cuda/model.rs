//! Weights on the card, and the passes over a packed batch.

use super::graphs::Work;
use super::workspace::{Input, LoraFrom, Vectors, Workspace};
use crate::device::cuda::attention::Attention;
use crate::device::cuda::gemm::{Epilogue, Gemm, Weight};
use crate::device::cuda::head::{Head, HeadTraining, HeadWeights};
use crate::device::cuda::lora::Lora;
use crate::device::cuda::mask::Mask;
use crate::device::cuda::memory::{Elements, from_elements, to_elements};
use crate::device::cuda::norm::Norm;
use crate::device::cuda::rope::Rope;
use crate::device::cuda::rows::RowMoves;
use crate::device::cuda::{Buffer, Cuda, Precision, Rows};
use crate::device::ops::{HeadShape, Loss};
use crate::llm::batch::PackedBatch;
use crate::llm::model::{Tap, TrainPass};
use crate::llm::peft::LoraTensors;
use crate::llm::weights::{LayerWeights, ModelWeights, WeightMatrix};
use crate::llm::{Error, ModelConfig};

/// A frozen product: weight `[out, in]` and, if it has one, bias `[out]`.
#[derive(Debug)]
pub(super) struct Linear {
    weight: Elements,
    bias: Option<Elements>,
    out: usize,
    width: usize,
}

impl Linear {
    /// Stacks matrices by rows; with `in_turn`, row i of each before row i + 1 of any.
    fn new(cuda: &Cuda, parts: &[&WeightMatrix], biases: &[&Option<Vec<f32>>], in_turn: bool) -> Result<Self, Error> {
        let precision = cuda.precision();
        let (width, out) = (parts[0].cols(), parts.iter().map(|p| p.rows()).sum());
        let mut bytes = Vec::with_capacity(out * width * precision.bytes());
        if in_turn {
            (0..parts[0].rows()).for_each(|r| parts.iter().for_each(|p| append_row(precision, p, r, &mut bytes)));
        } else {
            parts.iter().for_each(|p| (0..p.rows()).for_each(|r| append_row(precision, p, r, &mut bytes)));
        }
        let weight = Buffer::from_host(cuda, &bytes, "weights")?;
        let bias = if biases.iter().any(|b| b.is_some()) {
            let whole: Vec<Vec<f32>> = parts
                .iter()
                .zip(biases)
                .map(|(p, b)| b.as_ref().map_or_else(|| vec![0.0; p.rows()], Clone::clone))
                .collect();
            let values: Vec<f32> = if in_turn {
                (0..whole[0].len()).flat_map(|r| whole.iter().map(move |b| b[r])).collect()
            } else {
                whole.concat()
            };
            Some(Buffer::from_host(cuda, &to_elements(precision, &values), "biases")?)
        } else {
            None
        };
        Ok(Linear { weight, bias, out, width })
    }

    /// The weight as an operand.
    pub fn rows(&self, precision: Precision) -> Rows {
        Rows::new(&self.weight, precision, self.out, self.width)
    }

    /// Address of the bias from row `first` on, or 0.
    pub fn bias(&self, precision: Precision, first: usize) -> u64 {
        self.bias.as_ref().map_or(0, |b| b.at(first * precision.bytes()))
    }
}

/// Heads of a configuration.
pub(super) fn head_shape(c: &ModelConfig) -> HeadShape {
    HeadShape { n_heads: c.n_heads, n_kv_heads: c.n_kv_heads, head_dim: c.head_dim }
}

fn append_row(precision: Precision, matrix: &WeightMatrix, r: usize, bytes: &mut Vec<u8>) {
    let at = r * matrix.cols()..(r + 1) * matrix.cols();
    match (precision, matrix.as_bf16()) {
        (Precision::Bf16, Some(bits)) => bytes.extend_from_slice(bytemuck::cast_slice(&bits[at])),
        _ => {
            let mut row = vec![0.0; matrix.cols()];
            matrix.read_row(r, &mut row);
            bytes.extend_from_slice(&to_elements(precision, &row));
        }
    }
}

/// A table of rows, padded with zero rows to a multiple of 8.
fn table(cuda: &Cuda, matrix: &WeightMatrix) -> Result<Elements, Error> {
    let mut bytes = Vec::new();
    (0..matrix.rows()).for_each(|r| append_row(cuda.precision(), matrix, r, &mut bytes));
    bytes.resize(matrix.rows().next_multiple_of(8) * matrix.cols() * cuda.precision().bytes(), 0);
    Ok(Buffer::from_host(cuda, &bytes, "a vocabulary")?)
}

/// One block's frozen weights.
#[derive(Debug)]
pub(super) struct Layer {
    pub input_norm: Elements,
    pub post_norm: Elements,
    /// Queries, keys, values.
    pub qkv: Linear,
    pub o: Linear,
    /// Gate and up in turn.
    pub gate_up: Linear,
    pub down: Linear,
}

impl Layer {
    fn new(cuda: &Cuda, l: &LayerWeights) -> Result<Self, Error> {
        let [q, k, v, o, gate, up, down] = &l.biases;
        let norm = |w: &[f32]| Buffer::from_host(cuda, &to_elements(cuda.precision(), w), "norm weights");
        Ok(Layer {
            input_norm: norm(&l.input_norm)?,
            post_norm: norm(&l.post_norm)?,
            qkv: Linear::new(cuda, &[&l.q, &l.k, &l.v], &[q, k, v], false)?,
            o: Linear::new(cuda, &[&l.o], &[o], false)?,
            gate_up: Linear::new(cuda, &[&l.gate, &l.up], &[gate, up], true)?,
            down: Linear::new(cuda, &[&l.down], &[down], false)?,
        })
    }
}

/// The operations' handles.
#[derive(Debug)]
pub(super) struct Operations {
    pub gemm: Gemm,
    pub norm: Norm,
    pub rope: Rope,
    pub attention: Attention,
    pub lora: Lora,
    pub rows: RowMoves,
    pub head: Head,
    pub mask: Mask,
}

/// A LLaMA-family model on a card.
#[derive(Debug)]
pub struct Model {
    pub(super) config: ModelConfig,
    fingerprint: String,
    pub(super) layers: Vec<Layer>,
    pub(super) ops: Operations,
    embed: Elements,
    /// `None` when tied to `embed`.
    lm_head: Option<Elements>,
    final_norm: Elements,
    yes_id: usize,
    no_id: usize,
    // Dropped last: everything above lies on it.
    pub(super) cuda: Cuda,
}

impl Model {
    /// Copies loaded weights to the card. `yes_id`, `no_id`: vocabulary rows of the answer; `n_positions`: longest prompt to come.
    pub fn new(weights: ModelWeights, yes_id: u32, no_id: u32, n_positions: usize, cuda: Cuda) -> Result<Self, Error> {
        let config = weights.config;
        let widths = [
            ("hidden_size", config.hidden_size),
            ("intermediate_size", config.intermediate_size),
            ("head_dim", config.head_dim),
        ];
        if let Some((name, width)) = widths.into_iter().find(|(_, w)| w % 8 != 0) {
            return Err(Error::Shape { what: format!("{name} is {width}; the CUDA kernels take multiples of 8") });
        }
        if config.hidden_size > crate::device::cuda::norm::MAX_WIDTH {
            let what = format!(
                "hidden_size is {}; the CUDA kernels take up to {}",
                config.hidden_size,
                crate::device::cuda::norm::MAX_WIDTH
            );
            return Err(Error::Shape { what });
        }
        let ops = Operations {
            gemm: Gemm::new(&cuda)?,
            norm: Norm::new(&cuda)?,
            rope: Rope::new(&cuda, &config.inv_freq(), n_positions)?,
            attention: Attention::new(&cuda, config.head_dim)?,
            lora: Lora::new(&cuda)?,
            rows: RowMoves::new(&cuda)?,
            head: Head::new(&cuda)?,
            mask: Mask::new(&cuda)?,
        };
        let layers = weights.layers.iter().map(|l| Layer::new(&cuda, l)).collect::<Result<_, _>>()?;
        let final_norm = Buffer::from_host(&cuda, &to_elements(cuda.precision(), &weights.final_norm), "norm weights")?;
        Ok(Model {
            embed: table(&cuda, &weights.embed_tokens)?,
            lm_head: weights.lm_head.as_ref().map(|h| table(&cuda, h)).transpose()?,
            final_norm,
            layers,
            ops,
            fingerprint: weights.fingerprint,
            yes_id: yes_id as usize,
            no_id: no_id as usize,
            config,
            cuda,
        })
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
        head_shape(&self.config)
    }

    /// Multiprocessors of the card.
    pub fn multiprocessors(&self) -> usize {
        self.cuda.description().sm_count
    }

    /// Switches graphs on or off: see [`Cuda::use_graphs`].
    pub fn use_graphs(&mut self, graphs: bool) {
        self.cuda.use_graphs(graphs);
    }

    pub(super) fn precision(&self) -> Precision {
        self.cuda.precision()
    }

    pub(super) fn embed(&self) -> Rows {
        Rows::new(&self.embed, self.precision(), self.config.vocab_size, self.config.hidden_size)
    }

    fn head_weights(&self, loss: Loss) -> HeadWeights {
        let row = self.config.hidden_size * self.precision().bytes();
        let table = self.lm_head.as_ref().unwrap_or(&self.embed);
        let no = if loss == Loss::YesNoSoftmax { table.at(self.no_id * row) } else { 0 };
        HeadWeights {
            norm: self.final_norm.address(),
            yes: table.at(self.yes_id * row),
            no,
            eps: self.config.rms_norm_eps as f32,
        }
    }

    /// Bytes of the frozen weights.
    pub(super) fn weight_bytes(&self) -> usize {
        let linear = |l: &Linear| l.weight.len() + l.bias.as_ref().map_or(0, Buffer::len);
        let layer = |l: &Layer| {
            let products = linear(&l.qkv) + linear(&l.o) + linear(&l.gate_up) + linear(&l.down);
            products + l.input_norm.len() + l.post_norm.len()
        };
        let layers: usize = self.layers.iter().map(layer).sum();
        layers + self.embed.len() + self.lm_head.as_ref().map_or(0, Buffer::len) + self.final_norm.len()
    }

    /// The score of each prompt. See [`crate::llm::model::Model::scores`].
    pub fn scores(
        &self,
        lora: Option<&LoraTensors>,
        batch: &PackedBatch,
        vectors: &[f32],
        loss: Loss,
        w: &mut Workspace,
    ) -> Result<Vec<f32>, Error> {
        let vectors = Vectors::Ready(vectors);
        w.begin(self, Input { lora: lora.into(), dropout: None, batch, vectors, train: None, fill: true })?;
        let key = w.key(Work::Score { loss, mapped: false });
        w.run(&self.cuda, key, |w| self.answer(w, loss))?;
        self.given_scores(w)
    }

    /// Final hidden states. See [`crate::llm::model::Model::hidden`].
    pub fn hidden(
        &self,
        lora: Option<&LoraTensors>,
        batch: &PackedBatch,
        vectors: &[f32],
        w: &mut Workspace,
        mut tap: Option<Tap>,
    ) -> Result<Vec<f32>, Error> {
        let vectors = Vectors::Ready(vectors);
        w.begin(self, Input { lora: lora.into(), dropout: None, batch, vectors, train: None, fill: false })?;
        self.forward(w, false, tap.as_mut())?;
        self.head(w, Loss::YesLogitBce, false, true)?;
        if let Some(tap) = tap {
            // The head adds the last adapter's part to the residual stream, so this is the whole of it.
            tap(&w.read(self, w.last_x(self))?);
        }
        let y = Rows::new(&w.y, self.precision(), batch.n_prompts(), self.config.hidden_size);
        w.read(self, y)
    }

    /// The packed input rows. See [`crate::llm::model::Model::inputs`].
    pub fn inputs(&self, batch: &PackedBatch, vectors: &[f32], w: &mut Workspace) -> Result<Vec<f32>, Error> {
        let vectors = Vectors::Ready(vectors);
        w.begin(self, Input { lora: LoraFrom::Nowhere, dropout: None, batch, vectors, train: None, fill: false })?;
        let x = w.x(self, 0);
        self.ops.rows.splice(&self.cuda, &w.sources, self.embed(), &w.vectors, x)?;
        w.read(self, x)
    }

    /// All vocabulary logits of hidden states, for verification: allocates.
    pub fn logits(&self, y: &[f32]) -> Result<Vec<f32>, Error> {
        let (hidden, vocab) = (self.config.hidden_size, self.config.vocab_size);
        let (n, padded) = (y.len() / hidden, vocab.next_multiple_of(8));
        let precision = self.precision();
        let states = Buffer::from_host(&self.cuda, &to_elements(precision, y), "hidden states")?;
        let out: Elements = Buffer::new(&self.cuda, n * padded * precision.bytes(), "logits")?;
        let table = self.lm_head.as_ref().unwrap_or(&self.embed);
        let states = Rows::new(&states, precision, n, hidden);
        let head = Rows::new(table, precision, padded, hidden);
        let logits = Rows::new(&out, precision, n, padded);
        self.ops.gemm.run(&self.cuda, states, head, Weight::Transposed, logits, Epilogue::NONE)?;
        let all = from_elements(precision, &out.download(&self.cuda, out.len())?);
        Ok(all.chunks_exact(padded).flat_map(|row| &row[..vocab]).copied().collect())
    }

    /// Forward and backward. See [`crate::llm::model::Model::train_pass`].
    pub fn train_pass(&self, pass: TrainPass, w: &mut Workspace) -> Result<(Vec<f32>, f64), Error> {
        let TrainPass { lora, dropout, batch, vectors, labels, weight, loss, d_lora, d_vectors, d_inputs } = pass;
        let (vectors, train) = (Vectors::Ready(vectors), Some((labels, weight)));
        w.begin(self, Input { lora: lora.into(), dropout, batch, vectors, train, fill: false })?;
        self.both_ways(w, loss, d_lora.is_some(), d_vectors.is_some(), d_inputs.is_some())?;
        let n = batch.n_prompts();
        let scores = w.scores.download(&self.cuda, n)?;
        let losses = w.losses.download(&self.cuda, n)?;
        if let Some(d_lora) = d_lora {
            w.add_gradients(self, d_lora)?;
        }
        if let Some(d_vectors) = d_vectors {
            w.d_vectors.download_to(&self.cuda, d_vectors)?;
        }
        if let Some(d_inputs) = d_inputs {
            *d_inputs = w.read(self, w.d_x_all(self))?;
        }
        Ok((scores, losses.iter().map(|&l| f64::from(l)).sum()))
    }

    /// Forward and backward over the batch that was begun, without waiting for it: losses, scores and gradients stay where they
    /// are. The adapter's gradients are added to, the vectors' are set.
    pub(super) fn both_ways(
        &self,
        w: &Workspace,
        loss: Loss,
        d_lora: bool,
        d_vectors: bool,
        d_inputs: bool,
    ) -> Result<(), Error> {
        self.forward(w, true, None)?;
        self.head(w, loss, true, false)?;
        self.backward(w, d_lora, d_vectors || d_inputs)?;
        if d_vectors {
            let (rows, n, d_x, hidden) = (&w.slot_rows, w.n_vectors, w.d_x_all(self), self.config.hidden_size);
            self.ops.rows.splice_backward(&self.cuda, rows, n, d_x, hidden, &w.d_vectors)?;
        }
        Ok(())
    }

    /// Computes the scores of the batch that was begun.
    pub(super) fn answer(&self, w: &Workspace, loss: Loss) -> Result<(), Error> {
        self.forward(w, false, None)?;
        self.head(w, loss, false, false)
    }

    /// Scores of the prompts that were given.
    pub(super) fn given_scores(&self, w: &Workspace) -> Result<Vec<f32>, Error> {
        Ok(w.scores.download(&self.cuda, w.n_given)?)
    }

    fn head(&self, w: &Workspace, loss: Loss, train: bool, keep_y: bool) -> Result<(), Error> {
        let hidden = self.config.hidden_size;
        let x = w.last_x(self);
        let lora = w.down_adapter(self, self.layers.len() - 1);
        let training = train.then(|| HeadTraining {
            labels: &w.labels,
            weights: &w.weights,
            losses: &w.losses,
            d_x: w.d_x_last(self),
        });
        let y = keep_y.then(|| Rows::new(&w.y, self.precision(), x.rows, hidden));
        self.ops.head.run(&self.cuda, self.head_weights(loss), x, hidden, lora, &w.scores, y, training)?;
        Ok(())
    }
}
