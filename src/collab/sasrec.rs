//! SASRec (Kang & McAuley 2018) in the layout that CoLLM trains (reference, section 4): `score = state · item`, the state being the
//! last position of a causal transformer over the user's liked items; one example a row, binary cross-entropy on its label.
//!
//! This file owns settings, tensors and training; `sasrec_pass.rs` has the layers, forward and backward. For CoLLM the user's
//! vector is the state and the item's the raw row of the item table, so users without train rows have vectors too.

use std::path::Path;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::Error;
use super::layers::{Init, Weights, add};
use super::mf::{dot, gather};
use super::real::Real;
use super::sasrec_pass::{Chunk, SasRecPass};
use super::training::{Learner, Recipe};
use crate::checkpoint::Tensor;
use crate::data::Samples;
use crate::device::ops::{Dropout, bce_with_logits};

/// How SASRec is trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SasRecConfig {
    /// Width of a vector.
    pub dim: usize,
    /// Transformer blocks.
    pub blocks: usize,
    /// Attention heads; divides `dim`.
    pub heads: usize,
    /// PARITY: the official ML-1M run trains SASRec with one head and reads it with four when CoLLM takes its vectors: the shapes are
    /// the same, so nothing warns, but attention differs. 4 does as it does; 0, the default, reads it as it was trained.
    pub collm_heads: usize,
    /// Most recent items of a history that are read.
    pub max_length: usize,
    /// Dropout in training: embeddings, attention weights, both convolutions.
    pub dropout: f64,
    /// Adam's learning rate.
    pub learning_rate: f64,
    /// Coupled L2 on everything.
    pub weight_decay: f64,
    /// Rows of a step. Officially 2048, with the best epoch near 194 and patience 100: smaller batches get there in a fraction of the
    /// epochs (see the README).
    pub batch_size: usize,
    /// Epochs at most.
    pub max_epochs: usize,
    /// Epochs before early stopping may act.
    pub min_epochs: usize,
    /// Epochs without improvement of valid AUC before stopping.
    pub patience: usize,
    /// Seed of initialisation, order and dropout.
    pub seed: u64,
}

impl Default for SasRecConfig {
    fn default() -> Self {
        SasRecConfig {
            dim: 64,
            blocks: 2,
            heads: 1,
            collm_heads: 0,
            max_length: 25,
            dropout: 0.2,
            learning_rate: 1e-2,
            weight_decay: 1e-2,
            batch_size: 512,
            max_epochs: 5000,
            min_epochs: 0,
            patience: 15,
            seed: 2023,
        }
    }
}

impl SasRecConfig {
    /// For [`super::training::train`].
    pub fn recipe(&self) -> Recipe {
        Recipe {
            learning_rate: self.learning_rate,
            weight_decay: self.weight_decay,
            batch_size: self.batch_size,
            max_epochs: self.max_epochs,
            min_epochs: self.min_epochs,
            patience: self.patience,
            seed: self.seed,
            model: format!(
                "sasrec dim {} blocks {} heads {} length {} dropout {}",
                self.dim, self.blocks, self.heads, self.max_length, self.dropout
            ),
        }
    }
}

/// Rows of a chunk: what one thread works on, and what sums are cut by.
const CHUNK_ROWS: usize = 32;

/// The model, or gradients of it.
#[derive(Clone, Debug, PartialEq)]
pub struct SasRec<T = f32> {
    config: SasRecConfig,
    /// In the order of [`plan`].
    pub(super) weights: Weights<T>,
}

/// Official names and shapes, with PyTorch's own beginnings (reference, section 4).
fn plan(config: &SasRecConfig, n_items: usize) -> Vec<(String, Vec<usize>, Init)> {
    let d = config.dim;
    let fan_in = Init::Uniform((d as f64).recip().sqrt());
    let xavier = Init::Uniform((6.0 / (4 * d) as f64).sqrt());
    let [zero, one] = [0.0, 1.0].map(Init::Constant);
    let mut plan = vec![
        ("item_emb.weight".to_string(), vec![n_items, d], Init::Table(1.0)),
        ("pos_emb.weight".to_string(), vec![config.max_length, d], Init::Normal(1.0)),
    ];
    for b in 0..config.blocks {
        let parts: [(&str, &str, Vec<usize>, Init); 12] = [
            ("attention_layernorms", "weight", vec![d], one),
            ("attention_layernorms", "bias", vec![d], zero),
            ("attention_layers", "in_proj_weight", vec![3 * d, d], xavier),
            ("attention_layers", "in_proj_bias", vec![3 * d], zero),
            ("attention_layers", "out_proj.weight", vec![d, d], fan_in),
            ("attention_layers", "out_proj.bias", vec![d], zero),
            ("forward_layernorms", "weight", vec![d], one),
            ("forward_layernorms", "bias", vec![d], zero),
            ("forward_layers", "conv1.weight", vec![d, d, 1], fan_in),
            ("forward_layers", "conv1.bias", vec![d], fan_in),
            ("forward_layers", "conv2.weight", vec![d, d, 1], fan_in),
            ("forward_layers", "conv2.bias", vec![d], fan_in),
        ];
        plan.extend(parts.map(|(layer, part, shape, init)| (format!("{layer}.{b}.{part}"), shape, init)));
    }
    plan.push(("last_layernorm.weight".into(), vec![d], one));
    plan.push(("last_layernorm.bias".into(), vec![d], zero));
    plan
}

/// What is trained on, a row: the history to read, the item, the label.
type Row<'s> = (&'s [u32], u32, u8);

impl<T: Real> SasRec<T> {
    /// PyTorch's beginnings.
    pub fn init(config: &SasRecConfig, n_items: usize) -> Self {
        SasRec { config: config.clone(), weights: Weights::init(plan(config, n_items), config.seed) }
    }

    fn pass(&self, heads: usize) -> SasRecPass<'_, T> {
        SasRecPass { dim: self.config.dim, heads, max_length: self.config.max_length, weights: &self.weights.values }
    }

    fn item(&self, iid: u32) -> &[T] {
        let d = self.config.dim;
        &self.weights.values[0][self.known(iid) as usize * d..][..d]
    }

    /// The id, or padding if it is beyond the table.
    fn known(&self, id: u32) -> u32 {
        if (id as usize) < self.weights.values[0].len() / self.config.dim { id } else { 0 }
    }

    /// What the layers read of these histories.
    fn chunk<'s>(&self, histories: impl Iterator<Item = &'s [u32]>) -> Chunk {
        Chunk::new(histories, self.config.max_length, |id| self.known(id))
    }

    /// The states of these histories, `[rows, dim]`.
    fn states<'s>(&self, heads: usize, n: usize, history: impl Fn(usize) -> &'s [u32] + Sync) -> Vec<T> {
        let d = self.config.dim;
        let mut states = vec![T::default(); n * d];
        states.par_chunks_mut(CHUNK_ROWS * d).enumerate().for_each(|(c, out)| {
            let rows = (0..out.len() / d).map(|r| history(c * CHUNK_ROWS + r));
            let chunk = self.chunk(rows);
            out.copy_from_slice(&self.pass(heads).forward(&chunk, None, c).states);
        });
        states
    }

    /// Mean loss over the rows; `gradient` is overwritten.
    ///
    /// Chunks of rows are computed in parallel and summed in their order, so the bits do not depend on the number of threads.
    fn loss_and_gradient_of(&self, rows: &[Row], dropout: Option<Dropout>, gradient: &mut Self) -> f64 {
        let chunks: Vec<ChunkGradient<T>> = rows
            .par_chunks(CHUNK_ROWS)
            .enumerate()
            .map(|(c, part)| self.chunk_gradient(c, part, rows.len(), dropout))
            .collect();
        let (tables, dense) = gradient.weights.values.split_at_mut(1);
        dense.par_iter_mut().enumerate().for_each(|(i, sum)| {
            sum.fill(T::default());
            chunks.iter().for_each(|chunk| add(&chunk.dense[i + 1], sum));
        });
        let (one, d) = (T::from_wide(1.0), self.config.dim);
        let root = T::from_wide((d as f64).sqrt());
        let (mut ids, mut terms) = (Vec::new(), Vec::new());
        for chunk in &chunks {
            ids.extend_from_slice(&chunk.ids);
            terms.extend(chunk.d_tokens.chunks_exact(d).map(|v| (root, v)));
        }
        ids.extend(rows.iter().map(|r| self.known(r.1)));
        terms.extend(chunks.iter().flat_map(|chunk| chunk.d_items.chunks_exact(d)).map(|v| (one, v)));
        gather(&mut tables[0], d, &ids, |r| terms[r as usize]);
        chunks.iter().map(|chunk| chunk.loss).sum::<f64>() / rows.len() as f64
    }

    fn chunk_gradient(&self, c: usize, rows: &[Row], n: usize, dropout: Option<Dropout>) -> ChunkGradient<T> {
        let d = self.config.dim;
        let pass = self.pass(self.config.heads);
        let chunk = self.chunk(rows.iter().map(|r| r.0));
        let forward = pass.forward(&chunk, dropout, c);
        let (mut loss, mut d_states, mut d_items) = (0.0, Vec::new(), Vec::new());
        for (state, &(_, iid, label)) in forward.states.chunks_exact(d).zip(rows) {
            let item = self.item(iid);
            let (own, d_score) = bce_with_logits(dot(state, item).wide(), label.into());
            let d_score = T::from_wide(d_score / n as f64);
            loss += own;
            d_states.extend(item.iter().map(|&x| d_score * x));
            d_items.extend(state.iter().map(|&x| d_score * x));
        }
        let lengths = self.weights.values.iter().enumerate().map(|(i, v)| if i == 0 { 0 } else { v.len() });
        let mut dense: Vec<Vec<T>> = lengths.map(|n| vec![T::default(); n]).collect();
        let d_tokens = pass.backward(&chunk, &forward, &d_states, &mut dense);
        ChunkGradient { loss, ids: chunk.ids, d_tokens, d_items, dense }
    }
}

/// What a chunk adds to the gradient.
struct ChunkGradient<T> {
    loss: f64,
    /// Of every token, and the gradient of its embedding.
    ids: Vec<u32>,
    d_tokens: Vec<T>,
    /// Of every row's item.
    d_items: Vec<T>,
    /// Of every tensor; the item table's is empty.
    dense: Vec<Vec<T>>,
}

impl SasRec {
    /// The model's scores of all rows.
    pub fn scores(&self, samples: &Samples) -> Vec<f32> {
        let states = self.states(self.config.heads, samples.len(), |i| samples.history(i));
        states.chunks_exact(self.config.dim).zip(&samples.iid).map(|(s, &iid)| dot(s, self.item(iid))).collect()
    }

    /// Width of the vectors.
    pub fn dim(&self) -> usize {
        self.config.dim
    }

    /// Vectors of the users of all rows, as CoLLM takes them: `[rows, dim]`.
    pub fn user_vectors(&self, samples: &Samples) -> Vec<f32> {
        let heads = if self.config.collm_heads > 0 { self.config.collm_heads } else { self.config.heads };
        self.states(heads, samples.len(), |i| samples.history(i))
    }

    /// An item's vector; zeros for ids beyond the table.
    pub fn item_vector(&self, iid: u32) -> &[f32] {
        self.item(iid)
    }

    /// Writes the tensors under their official names, with facts as metadata.
    pub fn save(&self, path: &Path, facts: &[(&str, String)]) -> Result<(), Error> {
        self.weights.save(path, facts)
    }

    /// Reads what [`Self::save`] wrote. The item table may be of any length.
    pub fn load(config: &SasRecConfig, path: &Path) -> Result<Self, Error> {
        Ok(SasRec {
            config: config.clone(),
            weights: Weights::load(path, |rows| plan(config, rows("item_emb.weight")))?,
        })
    }
}

impl Learner for SasRec {
    fn tensors(&self) -> Vec<Tensor> {
        self.weights.tensors()
    }

    fn values_mut(&mut self) -> Vec<&mut [f32]> {
        self.weights.values_mut()
    }

    fn n_trained(&self) -> usize {
        self.weights.values.len()
    }

    fn loss_and_gradient(&mut self, train: &Samples, rows: &[usize], step: u64, gradient: &mut Self) -> f64 {
        let rows: Vec<Row> = rows.iter().map(|&i| (train.history(i), train.iid[i], train.label[i])).collect();
        let SasRecConfig { dropout: p, seed, .. } = self.config;
        let dropout = (p > 0.0).then_some(Dropout { p: p as f32, seed, step });
        self.loss_and_gradient_of(&rows, dropout, gradient)
    }

    fn scores(&self, samples: &Samples) -> Vec<f32> {
        SasRec::scores(self, samples)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collab::training::tests::dataset;
    use crate::collab::training::train;
    use safetensors::SafeTensors;

    fn golden<V: bytemuck::Pod>(file: &SafeTensors, name: &str) -> Vec<V> {
        bytemuck::pod_collect_to_vec(file.tensor(name).unwrap().data())
    }

    /// Against the official layout in PyTorch, float64: states, scores, loss and every gradient.
    #[test]
    fn golden_in_float64() {
        let bytes = include_bytes!("../../tests/fixtures/golden/collab-sasrec/golden.safetensors");
        let file = SafeTensors::deserialize(bytes).unwrap();
        let shape = file.tensor("seqs").unwrap().shape().to_vec();
        let heads = golden::<i64>(&file, "num_heads")[0] as usize;
        let blocks = golden::<i64>(&file, "num_blocks")[0] as usize;
        let config = SasRecConfig { dim: 32, blocks, heads, max_length: shape[1], ..SasRecConfig::default() };
        let n_items = file.tensor("item_emb.weight").unwrap().shape()[0];
        let mut model = SasRec::<f64>::init(&config, n_items);
        let names = model.weights.names.clone();
        for ((name, shape), values) in names.iter().zip(&mut model.weights.values) {
            assert_eq!(file.tensor(name).unwrap().shape(), shape, "{name}");
            *values = golden(&file, name);
        }
        let sequences: Vec<Vec<u32>> = golden::<i64>(&file, "seqs")
            .chunks(shape[1])
            .map(|s| s.iter().filter(|&&id| id != 0).map(|&id| id as u32).collect())
            .collect();
        assert!(sequences.iter().any(Vec::is_empty) && sequences.iter().any(|s| s.len() == shape[1]));
        let targets: Vec<i64> = golden(&file, "targets");
        let labels: Vec<f64> = golden(&file, "labels");
        let rows: Vec<Row> = (0..shape[0]).map(|i| (&sequences[i][..], targets[i] as u32, labels[i] as u8)).collect();
        let close = |what: &str, got: &[f64], want: &[f64]| {
            assert_eq!(got.len(), want.len(), "{what}");
            let worst = got.iter().zip(want).fold(0.0f64, |m, (g, w)| m.max((g - w).abs()));
            assert!(worst < 1e-9, "{what} is off by {worst:e}");
        };
        let states = model.states(heads, rows.len(), |i| rows[i].0);
        close("states", &states, &golden::<f64>(&file, "seq_emb"));
        let scores: Vec<f64> = states.chunks(32).zip(&rows).map(|(s, r)| dot(s, model.item(r.1))).collect();
        close("scores", &scores, &golden::<f64>(&file, "scores"));
        let mut gradient = model.clone();
        let loss = model.loss_and_gradient_of(&rows, None, &mut gradient);
        close("loss", &[loss], &golden::<f64>(&file, "loss"));
        for ((name, _), values) in names.iter().zip(&gradient.weights.values) {
            close(name, values, &golden::<f64>(&file, &format!("grad.{name}")));
        }
    }

    /// With dropout, more than one head and more rows than a chunk, against finite differences.
    #[test]
    fn gradients_with_dropout() {
        let config = SasRecConfig { dim: 6, heads: 2, max_length: 5, ..SasRecConfig::default() };
        let mut model = SasRec::<f64>::init(&config, 9);
        let mut rng = crate::rng::Rng::new(4, 4);
        let histories: Vec<Vec<u32>> =
            (0..CHUNK_ROWS + 9).map(|i| (0..i % 8).map(|_| 1 + rng.below(8)).collect()).collect();
        let rows: Vec<Row> = histories.iter().map(|h| (&h[..], 1 + rng.below(8), rng.below(2) as u8)).collect();
        let dropout = Some(Dropout { p: 0.3, seed: 8, step: 3 });
        let mut gradient = model.clone();
        let loss = model.loss_and_gradient_of(&rows, dropout, &mut gradient);
        assert_ne!(loss, model.loss_and_gradient_of(&rows, None, &mut model.clone()));
        let mut unused = model.clone();
        for t in 0..model.weights.values.len() {
            let n = model.weights.values[t].len();
            let first = if t == 0 { 6 } else { 0 };
            for _ in 0..6 {
                let i = first + rng.below((n - first) as u32) as usize;
                let before = model.weights.values[t][i];
                let mut moved = |x: f64| {
                    model.weights.values[t][i] = x;
                    model.loss_and_gradient_of(&rows, dropout, &mut unused)
                };
                let slope = (moved(before + 1e-6) - moved(before - 1e-6)) / 2e-6;
                model.weights.values[t][i] = before;
                let want = gradient.weights.values[t][i];
                assert!(
                    (slope - want).abs() < 1e-7 + 1e-5 * want.abs(),
                    "{:?}: {slope} {want}",
                    model.weights.names[t]
                );
            }
        }
        assert!(gradient.weights.values[0][..6].iter().all(|&g| g == 0.0), "padding has no gradient");
    }

    /// Histories that tell the label: learnt, the same bits on any number of threads, saved and loaded.
    #[test]
    fn learns_saves_and_loads() {
        let mut data = dataset();
        let mut rng = crate::rng::Rng::new(7, 7);
        for split in [&mut data.train, &mut data.valid] {
            let mut with_histories = Samples::empty();
            for i in 0..split.len() {
                let history: Vec<u32> = (0..rng.below(9)).map(|_| 1 + 2 * rng.below(10) + split.uid[i] % 2).collect();
                let label = u8::from((split.uid[i] + split.iid[i]) % 2 == 0);
                with_histories.push(i as i64, split.uid[i], split.iid[i], label, 0, &history);
            }
            *split = with_histories;
        }
        let config = SasRecConfig {
            dim: 8,
            max_length: 6,
            learning_rate: 1e-2,
            weight_decay: 1e-5,
            batch_size: 100,
            max_epochs: 60,
            patience: 100,
            ..SasRecConfig::default()
        };
        let fit = || {
            let start = SasRec::init(&config, data.n_items);
            train(&data, start, &config.recipe(), None, None, &mut |_, _, _| true).unwrap()
        };
        let trained = fit();
        assert!(trained.best_auc > 0.8, "{}", trained.best_auc);
        let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        assert_eq!(one.install(fit).model, trained.model, "the number of threads must not matter");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sasrec.safetensors");
        trained.model.save(&path, &[]).unwrap();
        assert_eq!(SasRec::load(&config, &path).unwrap(), trained.model);
        let e = SasRec::load(&SasRecConfig { blocks: 3, ..config.clone() }, &path).unwrap_err().to_string();
        assert!(e.ends_with("has no tensor attention_layernorms.2.weight of shape [8]"), "{e}");
        // PARITY: read with other heads, the vectors differ; the scores are those of the heads it was trained with.
        let slip = SasRec::load(&SasRecConfig { collm_heads: 4, ..config.clone() }, &path).unwrap();
        assert_ne!(slip.user_vectors(&data.valid), trained.model.user_vectors(&data.valid));
        assert_eq!(slip.scores(&data.valid), trained.model.scores(&data.valid));
    }
}
