//! DIN (Zhou et al. 2018) as CoLLM uses it (reference, section 4): an attention unit weighs the user's last liked items by the target,
//! without softmax, and an MLP reads item, weighted sum and user.
//!
//! This file owns settings, tensors and training; `din_pass.rs` has the layers. For CoLLM the user's vector is the MLP's input,
//! so it depends on history and target, and the item's is its row three times.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::Error;
use super::din_pass::{ATTENTION, DinBatch, Forward, MLP, N_TRAINED, forward};
use super::layers::{Init, Weights};
use super::real::Real;
use super::training::{Learner, Recipe};
use crate::checkpoint::Tensor;
use crate::data::Samples;
use crate::device::ops::{Dropout, bce_with_logits};

/// How DIN is trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DinConfig {
    /// Width of CoLLM's vectors; a third of it is that of the tables.
    pub dim: usize,
    /// Most recent items of a history that are read.
    pub max_length: usize,
    /// Dropout in training, behind the MLP's hidden layers.
    pub dropout: f64,
    /// Adam's learning rate. Officially (by a file's name) 1e-4; at 1e-3 the best epoch comes within a few.
    pub learning_rate: f64,
    /// Coupled L2 on everything.
    pub weight_decay: f64,
    /// Rows of a step.
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

impl Default for DinConfig {
    fn default() -> Self {
        DinConfig {
            dim: 192,
            max_length: 10,
            dropout: 0.2,
            learning_rate: 1e-3,
            weight_decay: 1e-4,
            batch_size: 2048,
            max_epochs: 5000,
            min_epochs: 0,
            patience: 15,
            seed: 2023,
        }
    }
}

impl DinConfig {
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
            model: format!("din dim {} length {} dropout {}", self.dim, self.max_length, self.dropout),
        }
    }
}

/// The model, or gradients of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Din<T = f32> {
    config: DinConfig,
    /// In the order of [`plan`].
    weights: Weights<T>,
}

/// Names and shapes, xavier-normal with biases of zero. The official names are not known: no trained DIN was published.
fn plan(config: &DinConfig, [n_users, n_items, n_history]: [usize; 3]) -> Vec<(String, Vec<usize>, Init)> {
    let d = config.dim / 3;
    let deviation = |a: usize, b: usize| (2.0 / (a + b) as f64).sqrt();
    let [zero, one] = [0.0, 1.0].map(Init::Constant);
    let table = |name: &str, n: usize| (format!("{name}_embedding.weight"), vec![n, d], Init::Table(deviation(n, d)));
    let mut plan = vec![table("user", n_users), table("item", n_items), table("history", n_history)];
    let mut running = Vec::new();
    let attention = [4 * d, ATTENTION[0], ATTENTION[1], 1];
    let mlp = [3 * d, MLP[0], MLP[1], 1];
    for (part, widths, n_dice) in [("attention", attention, 1), ("mlp", mlp, 2)] {
        for (i, w) in widths.windows(2).enumerate() {
            let weight = Init::Normal(deviation(w[0], w[1]));
            plan.push((format!("{part}.{i}.weight"), vec![w[1], w[0]], weight));
            plan.push((format!("{part}.{i}.bias"), vec![w[1]], zero));
            if i < n_dice {
                plan.push((format!("{part}.{i}.dice.alpha"), vec![w[1]], zero));
                running.push((format!("{part}.{i}.dice.running_mean"), vec![w[1]], zero));
                running.push((format!("{part}.{i}.dice.running_var"), vec![w[1]], one));
            }
        }
    }
    plan.extend(running);
    plan
}

/// Rows scored at once.
const SCORED_ROWS: usize = 2048;

impl<T: Real> Din<T> {
    /// Official beginnings.
    pub fn init(config: &DinConfig, n_users: usize, n_items: usize) -> Self {
        Din { config: config.clone(), weights: Weights::init(plan(config, [n_users, n_items, n_items]), config.seed) }
    }

    /// These rows, ids beyond a table as padding.
    fn batch(&self, samples: &Samples, rows: impl Iterator<Item = usize>) -> DinBatch {
        let known = |table: usize, id: u32| {
            if (id as usize + 1) * self.config.dim / 3 <= self.weights.values[table].len() { id } else { 0 }
        };
        let mut batch = DinBatch { starts: vec![0], ..DinBatch::default() };
        for i in rows {
            batch.users.push(known(0, samples.uid[i]));
            batch.items.push(known(1, samples.iid[i]));
            let history = samples.history(i);
            let recent = &history[history.len().saturating_sub(self.config.max_length)..];
            batch.history.extend(recent.iter().map(|&id| known(2, id)));
            batch.starts.push(batch.history.len());
        }
        batch
    }

    fn gradient_of(&mut self, batch: &DinBatch, labels: &[u8], dropout: Option<Dropout>, gradient: &mut Self) -> f64 {
        let width = self.config.dim / 3;
        let n = labels.len() as f64;
        let pass = forward(&self.weights.values, width, batch, true, dropout);
        pass.follow(&mut self.weights.values);
        let terms: Vec<(f64, f64)> =
            pass.logits.iter().zip(labels).map(|(&z, &label)| bce_with_logits(z.wide(), label.into())).collect();
        let d_logits: Vec<T> = terms.iter().map(|t| T::from_wide(t.1 / n)).collect();
        pass.backward(&self.weights.values, width, batch, &d_logits, &mut gradient.weights.values);
        terms.iter().map(|t| t.0).sum::<f64>() / n
    }

    /// Some of every row's results, as scored.
    fn scored(&self, samples: &Samples, take: impl Fn(Forward<T>) -> Vec<T>) -> Vec<T> {
        let n = samples.len();
        let part = |first: usize| {
            let batch = self.batch(samples, first..(first + SCORED_ROWS).min(n));
            take(forward(&self.weights.values, self.config.dim / 3, &batch, false, None))
        };
        (0..n).step_by(SCORED_ROWS).flat_map(part).collect()
    }
}

impl Din {
    /// The model's scores (logits) of all rows.
    pub fn scores(&self, samples: &Samples) -> Vec<f32> {
        self.scored(samples, |pass| pass.logits)
    }

    /// Width of the vectors.
    pub fn dim(&self) -> usize {
        self.config.dim
    }

    /// Vectors of the users of all rows, `[rows, dim]`: item, pooled history, user.
    pub fn user_vectors(&self, samples: &Samples) -> Vec<f32> {
        self.scored(samples, |pass| pass.joined)
    }

    /// A row of the item table, a third of the item's vector; zeros for ids beyond the table.
    pub fn item_third(&self, iid: u32) -> &[f32] {
        let (d, table) = (self.config.dim / 3, &self.weights.values[1]);
        let at = iid as usize * d;
        if at + d <= table.len() { &table[at..at + d] } else { &table[..d] }
    }

    /// Writes the tensors, with facts as metadata.
    pub fn save(&self, path: &Path, facts: &[(&str, String)]) -> Result<(), Error> {
        self.weights.save(path, facts)
    }

    /// Reads what [`Self::save`] wrote. The tables may be of any length.
    pub fn load(config: &DinConfig, path: &Path) -> Result<Self, Error> {
        let names = ["user", "item", "history"].map(|n| format!("{n}_embedding.weight"));
        let weights = Weights::load(path, |rows| plan(config, [0, 1, 2].map(|i: usize| rows(&names[i]))))?;
        Ok(Din { config: config.clone(), weights })
    }
}

impl Learner for Din {
    fn tensors(&self) -> Vec<Tensor> {
        self.weights.tensors()
    }

    fn values_mut(&mut self) -> Vec<&mut [f32]> {
        self.weights.values_mut()
    }

    fn n_trained(&self) -> usize {
        N_TRAINED
    }

    fn loss_and_gradient(&mut self, train: &Samples, rows: &[usize], step: u64, gradient: &mut Self) -> f64 {
        let labels: Vec<u8> = rows.iter().map(|&i| train.label[i]).collect();
        let DinConfig { dropout: p, seed, .. } = self.config;
        let dropout = (p > 0.0).then_some(Dropout { p: p as f32, seed, step });
        self.gradient_of(&self.batch(train, rows.iter().copied()), &labels, dropout, gradient)
    }

    fn scores(&self, samples: &Samples) -> Vec<f32> {
        Din::scores(self, samples)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collab::training::tests::dataset;
    use crate::collab::training::train;
    use crate::data::Dataset;
    use crate::rng::Rng;

    /// Histories that tell a user's taste; some are empty, some longer than what is read.
    fn data() -> Dataset {
        let (mut data, mut rng) = (dataset(), Rng::new(7, 7));
        for split in [&mut data.train, &mut data.valid] {
            let mut with_histories = Samples::empty();
            for i in 0..split.len() {
                let history: Vec<u32> = (0..rng.below(7)).map(|_| 1 + 2 * rng.below(10) + split.uid[i] % 2).collect();
                with_histories.push(i as i64, split.uid[i], split.iid[i], split.label[i], 0, &history);
            }
            *split = with_histories;
        }
        data
    }

    fn config() -> DinConfig {
        DinConfig {
            dim: 12,
            max_length: 4,
            learning_rate: 3e-3,
            batch_size: 100,
            max_epochs: 25,
            ..DinConfig::default()
        }
    }

    #[test]
    fn gradients_against_finite_differences() {
        let data = data();
        let mut model = Din::<f64>::init(&config(), data.n_users, data.n_items);
        let mut rng = Rng::new(3, 3);
        // Away from the beginning, where alphas and biases are zero.
        model.weights.values.iter_mut().skip(3).flatten().for_each(|w| *w += 0.1 * rng.normal());
        let batch = model.batch(&data.train, 0..40);
        assert!(batch.starts.windows(2).any(|w| w[0] == w[1]) && batch.starts.windows(2).all(|w| w[1] - w[0] <= 4));
        let labels = &data.train.label[..40];
        let dropout = Some(Dropout { p: 0.2, seed: 8, step: 3 });
        let mut gradient = model.clone();
        model.gradient_of(&batch, labels, dropout, &mut gradient);
        let mut unused = model.clone();
        for t in 0..N_TRAINED {
            for k in 0..6 {
                // Of tables, rows that occur.
                let row = match t {
                    0 => batch.users[k],
                    1 => batch.items[k],
                    2 => batch.history[k],
                    _ => rng.below(model.weights.values[t].len() as u32),
                };
                let i = if t < 3 { row as usize * 4 + k % 4 } else { row as usize };
                let before = model.weights.values[t][i];
                let mut moved = |x: f64| {
                    model.weights.values[t][i] = x;
                    model.gradient_of(&batch, labels, dropout, &mut unused)
                };
                let slope = (moved(before + 1e-6) - moved(before - 1e-6)) / 2e-6;
                model.weights.values[t][i] = before;
                let got = gradient.weights.values[t][i];
                let name = &model.weights.names[t].0;
                assert!((slope - got).abs() < 1e-8 + 1e-5 * got.abs(), "{name}: {got}, by differences {slope}");
            }
        }
    }

    #[test]
    fn learns_saves_and_loads() {
        let (data, config) = (data(), config());
        let fit = || {
            let start = Din::init(&config, data.n_users, data.n_items);
            train(&data, start, &config.recipe(), None, None, &mut |_, _, _| true).unwrap()
        };
        let trained = fit();
        assert!(trained.best_auc > 0.8, "{}", trained.best_auc);
        let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        assert_eq!(one.install(fit).model, trained.model, "the number of threads must not matter");
        let model = trained.model;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("din.safetensors");
        model.save(&path, &[]).unwrap();
        assert_eq!(Din::load(&config, &path).unwrap(), model);
        let e = Din::load(&DinConfig { dim: 15, ..config }, &path).unwrap_err().to_string();
        assert!(e.ends_with("user_embedding.weight has shape [31, 4]; expected [31, 5]"), "{e}");
        // A row alone has the score and the vector that it has among others; the vector is item, pooled history, user.
        let (s, i) = (&data.valid, 5);
        let mut alone = Samples::empty();
        alone.push(0, s.uid[i], s.iid[i], s.label[i], 0, s.history(i));
        assert!((model.scores(&alone)[0] - model.scores(s)[i]).abs() < 1e-5);
        let vector = model.user_vectors(&alone);
        assert_eq!(vector.len(), 12);
        assert_eq!(&vector[..4], model.item_third(s.iid[i]));
        assert_eq!(&vector[8..], &model.weights.values[0][s.uid[i] as usize * 4..][..4]);
    }
}
