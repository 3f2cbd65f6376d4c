//! Matrix factorisation: `score = p_u · q_i`, binary cross-entropy on explicit 0/1 labels (reference, section 4).

use std::path::Path;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::Error;
use crate::checkpoint::{Checkpoint, Tensor, read_tensors, take_tensor, write_tensors};
use crate::data::{Dataset, Samples};
use crate::device::cpu::optimizer::{Adam, Decay};
use crate::device::ops::bce_with_logits;
use crate::eval::metrics::evaluate;
use crate::rng::Rng;

/// How MF is trained. Defaults are the official choice for ML-1M.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MfConfig {
    /// Width of a vector.
    pub dim: usize,
    /// Adam's learning rate.
    pub learning_rate: f64,
    /// Coupled L2.
    pub weight_decay: f64,
    /// Rows of a step.
    pub batch_size: usize,
    /// Epochs at most.
    pub max_epochs: usize,
    /// Epochs before early stopping may act. Valid AUC stays near 0.5 for some 200 epochs before it climbs, so patience alone
    /// would stop an unlucky seed there (reference, section 4).
    pub min_epochs: usize,
    /// Epochs without improvement of valid AUC before stopping.
    pub patience: usize,
    /// Seed of initialisation and order.
    pub seed: u64,
}

impl Default for MfConfig {
    fn default() -> Self {
        MfConfig {
            dim: 256,
            learning_rate: 1e-3,
            weight_decay: 1e-4,
            batch_size: 2048,
            max_epochs: 5000,
            min_epochs: 350,
            patience: 100,
            seed: 2023,
        }
    }
}

/// float32 or float64: training uses the first, the golden test both.
pub trait Real: Copy + Send + Sync {
    /// Widened.
    fn wide(self) -> f64;
    /// Rounded.
    fn from_wide(x: f64) -> Self;
}

impl Real for f32 {
    fn wide(self) -> f64 {
        self.into()
    }
    fn from_wide(x: f64) -> f32 {
        x as f32
    }
}

impl Real for f64 {
    fn wide(self) -> f64 {
        self
    }
    fn from_wide(x: f64) -> f64 {
        x
    }
}

/// The two embedding tables, or gradients of them. Row 0 is padding: always zero.
#[derive(Clone, Debug, PartialEq)]
pub struct Mf<T = f32> {
    /// Width of a vector.
    pub dim: usize,
    /// `[n_users, dim]`.
    pub users: Vec<T>,
    /// `[n_items, dim]`.
    pub items: Vec<T>,
}

impl<T: Real> Mf<T> {
    /// The score of a user and an item.
    pub fn score(&self, uid: u32, iid: u32) -> f64 {
        let (p, q) = (row(&self.users, uid, self.dim), row(&self.items, iid, self.dim));
        p.iter().zip(q).map(|(a, b)| a.wide() * b.wide()).sum()
    }

    /// Adds the gradients of the mean loss over the rows to `gradient`; returns the mean loss.
    pub fn backward(&self, rows: impl ExactSizeIterator<Item = (u32, u32, u8)>, gradient: &mut Mf<T>) -> f64 {
        let (n, d) = (rows.len() as f64, self.dim);
        let mut loss = 0.0;
        for (uid, iid, label) in rows {
            let (l, d_score) = bce_with_logits(self.score(uid, iid), label.into());
            loss += l;
            let scale = d_score / n;
            let (p, q) = (row(&self.users, uid, d), row(&self.items, iid, d));
            for (id, table, other) in [(uid, &mut gradient.users, q), (iid, &mut gradient.items, p)] {
                if id != 0 {
                    let g = &mut table[id as usize * d..][..d];
                    g.iter_mut().zip(other).for_each(|(g, o)| *g = T::from_wide(g.wide() + scale * o.wide()));
                }
            }
        }
        loss / n
    }
}

fn row<T>(table: &[T], id: u32, dim: usize) -> &[T] {
    &table[id as usize * dim..][..dim]
}

impl Mf {
    /// N(0, 1) as `nn.Embedding`, row 0 zero.
    pub fn init(n_users: usize, n_items: usize, dim: usize, seed: u64) -> Self {
        let table = |n: usize, stream: u64| {
            let mut rng = Rng::new(seed, stream);
            let mut values: Vec<f32> = (0..n * dim).map(|_| rng.normal() as f32).collect();
            values[..dim].fill(0.0);
            values
        };
        Mf { dim, users: table(n_users, 0x3f01), items: table(n_items, 0x3f02) }
    }

    /// A user's vector; zeros for ids beyond the table.
    pub fn user_vector(&self, uid: u32) -> &[f32] {
        let id = if (uid as usize + 1) * self.dim <= self.users.len() { uid } else { 0 };
        row(&self.users, id, self.dim)
    }

    /// An item's vector; zeros for ids beyond the table.
    pub fn item_vector(&self, iid: u32) -> &[f32] {
        let id = if (iid as usize + 1) * self.dim <= self.items.len() { iid } else { 0 };
        row(&self.items, id, self.dim)
    }

    /// Scores of all rows.
    pub fn scores(&self, samples: &Samples) -> Vec<f32> {
        let score = |i: usize| {
            let (p, q) = (self.user_vector(samples.uid[i]), self.item_vector(samples.iid[i]));
            let mut lanes = [0.0f32; 8];
            for (p, q) in p.chunks(8).zip(q.chunks(8)) {
                lanes.iter_mut().zip(p.iter().zip(q)).for_each(|(l, (p, q))| *l += p * q);
            }
            lanes.iter().sum()
        };
        (0..samples.len()).into_par_iter().with_min_len(512).map(score).collect()
    }

    fn tensors(&self) -> Vec<Tensor> {
        let tensor = |name: &str, values: &[f32]| Tensor::new(name, vec![values.len() / self.dim, self.dim], values.to_vec());
        vec![tensor("user_embedding.weight", &self.users), tensor("item_embedding.weight", &self.items)]
    }

    /// Writes the tables under their official names, with facts as metadata.
    pub fn save(&self, path: &Path, facts: &[(&str, String)]) -> Result<(), Error> {
        let io = |source| Error::Io { path: path.into(), source };
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir).map_err(io)?;
        }
        write_tensors(path, &self.tensors(), facts).map_err(io)
    }

    /// Reads what [`Self::save`] wrote.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let (mut tensors, _) = read_tensors(path).map_err(|source| Error::Io { path: path.into(), source })?;
        let bad = |what: String| Error::Model { path: path.into(), what };
        let shape = |name: &str| match tensors.iter().find(|t| t.name == name).map(|t| t.shape.as_slice()) {
            Some(&[n, d]) if n > 0 && d > 0 => Ok((n, d)),
            other => Err(bad(format!("{name} has shape {other:?}; expected [ids, width]"))),
        };
        let ((n_users, dim), (n_items, d)) = (shape("user_embedding.weight")?, shape("item_embedding.weight")?);
        if dim != d {
            return Err(bad(format!("user vectors of width {dim}, item vectors of width {d}")));
        }
        let users = take_tensor(&mut tensors, "user_embedding.weight", &[n_users, dim]).map_err(bad)?;
        let items = take_tensor(&mut tensors, "item_embedding.weight", &[n_items, dim]).map_err(bad)?;
        Ok(Mf { dim, users, items })
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct State {
    epoch: usize,
    step: u64,
    best_epoch: usize,
    best_auc: f64,
    config: MfConfig,
    data: String,
}

/// Training in progress.
#[derive(Clone, Debug, PartialEq)]
struct Training {
    model: Mf,
    best: Mf,
    adam: Adam,
    state: State,
}

/// A trained model and how it came about.
#[derive(Clone, Debug)]
pub struct TrainedMf {
    /// The tables of the best epoch.
    pub model: Mf,
    /// The epoch with the highest valid AUC.
    pub best_epoch: usize,
    /// That AUC.
    pub best_auc: f64,
    /// Epochs trained.
    pub epochs: usize,
}

/// Epochs between checkpoints.
const CHECKPOINT_EPOCHS: usize = 50;

/// Trains MF on train, selecting by AUC on valid.
///
/// With `checkpoints`, the state is saved there from time to time and picked up again: the result has the same bits as an
/// uninterrupted run's. `observe(epoch, loss, auc)` is called after every epoch; `false` saves and stops.
pub fn train(
    data: &Dataset,
    config: &MfConfig,
    checkpoints: Option<&Path>,
    observe: &mut dyn FnMut(usize, f64, f64) -> bool,
) -> Result<TrainedMf, Error> {
    let io = |source| Error::Io { path: checkpoints.map(Path::to_path_buf).unwrap_or_default(), source };
    let mut training = Training::fresh(data, config);
    if let Some(saved) = checkpoints.map(|dir| Checkpoint::<State>::load(dir, "last")).transpose().map_err(io)?.flatten() {
        training = training.restored(saved).unwrap_or_else(|| Training::fresh(data, config));
    }
    let mut gradient = Mf { dim: config.dim, users: training.model.users.clone(), items: training.model.items.clone() };
    while !training.finished() {
        let loss = training.epoch(data, &mut gradient)?;
        let state = &training.state;
        let go_on = observe(state.epoch, loss.0, loss.1);
        if let Some(dir) = checkpoints
            && (!go_on || state.epoch % CHECKPOINT_EPOCHS == 0)
        {
            training.checkpoint().save(dir, "last").map_err(io)?;
        }
        if !go_on {
            return Err(Error::Interrupted);
        }
    }
    let State { epoch, best_epoch, best_auc, .. } = training.state;
    Ok(TrainedMf { model: training.best, best_epoch, best_auc, epochs: epoch })
}

impl Training {
    fn fresh(data: &Dataset, config: &MfConfig) -> Self {
        let model = Mf::init(data.n_users, data.n_items, config.dim, config.seed);
        let state = State {
            epoch: 0,
            step: 0,
            best_epoch: 0,
            best_auc: f64::NEG_INFINITY,
            config: config.clone(),
            data: data.fingerprint.clone(),
        };
        let adam = Adam::new(Decay::Coupled, [model.users.len(), model.items.len()]);
        Training { best: model.clone(), model, adam, state: State { best_auc: -1.0, ..state } }
    }

    fn checkpoint(&self) -> Checkpoint<State> {
        let moments = |name: &str, m: &[Vec<f32>]| {
            m.iter().enumerate().map(|(i, v)| Tensor::new(format!("{name}{i}"), vec![v.len()], v.clone())).collect::<Vec<_>>()
        };
        let best = self.best.tensors().into_iter().map(|t| Tensor { name: format!("best.{}", t.name), ..t });
        Checkpoint {
            model: self.model.tensors().into_iter().chain(best).collect(),
            optimizer: moments("m", &self.adam.m).into_iter().chain(moments("v", &self.adam.v)).collect(),
            state: State { step: self.adam.step, ..self.state.clone() },
        }
    }

    /// The saved state, if it is of the same data and configuration.
    fn restored(mut self, saved: Checkpoint<State>) -> Option<Self> {
        if saved.state.config != self.state.config || saved.state.data != self.state.data {
            return None;
        }
        let mut model = saved.model;
        let dim = self.model.dim;
        for (prefix, target) in [("", &mut self.model), ("best.", &mut self.best)] {
            for (name, table) in [("user_embedding.weight", &mut target.users), ("item_embedding.weight", &mut target.items)] {
                *table = take_tensor(&mut model, &format!("{prefix}{name}"), &[table.len() / dim, dim]).ok()?;
            }
        }
        let mut optimizer = saved.optimizer;
        for (prefix, moments) in [("m", &mut self.adam.m), ("v", &mut self.adam.v)] {
            for (i, m) in moments.iter_mut().enumerate() {
                *m = take_tensor(&mut optimizer, &format!("{prefix}{i}"), &[m.len()]).ok()?;
            }
        }
        self.adam.step = saved.state.step;
        self.state = saved.state;
        Some(self)
    }

    fn finished(&self) -> bool {
        let (s, c) = (&self.state, &self.state.config);
        s.epoch >= c.max_epochs || (s.epoch >= c.min_epochs && s.epoch >= s.best_epoch + c.patience)
    }

    /// One pass over train in an order drawn for this epoch, then the AUC on valid. Returns loss and AUC.
    fn epoch(&mut self, data: &Dataset, gradient: &mut Mf) -> Result<(f64, f64), Error> {
        let config = self.state.config.clone();
        let train = &data.train;
        let mut order: Vec<usize> = (0..train.len()).collect();
        Rng::new(config.seed, 0x3f10_0000 + self.state.epoch as u64).shuffle(&mut order);
        let (mut loss, mut steps) = (0.0, 0.0);
        for batch in order.chunks(config.batch_size) {
            gradient.users.fill(0.0);
            gradient.items.fill(0.0);
            let rows = batch.iter().map(|&i| (train.uid[i], train.iid[i], train.label[i]));
            loss += self.model.backward(rows, gradient);
            steps += 1.0;
            let wd = config.weight_decay;
            let tensors: Vec<(&mut [f32], &[f32], f64)> =
                vec![(&mut self.model.users, &gradient.users, wd), (&mut self.model.items, &gradient.items, wd)];
            self.adam.step(tensors, config.learning_rate);
        }
        let scores = self.model.scores(&data.valid);
        let auc = evaluate(&data.valid.uid, &data.valid.label, &scores)?.auc.unwrap_or(0.5);
        let state = &mut self.state;
        state.epoch += 1;
        if auc > state.best_auc {
            (state.best_auc, state.best_epoch) = (auc, state.epoch);
            self.best.clone_from(&self.model);
        }
        Ok((loss / steps, auc))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::SafeTensors;

    #[test]
    fn golden_score_loss_and_gradients_in_float64() {
        let bytes = include_bytes!("../../tests/fixtures/golden/collab-mf/golden.safetensors");
        let file = SafeTensors::deserialize(bytes).unwrap();
        let floats = |name: &str| -> Vec<f64> { bytemuck::pod_collect_to_vec(file.tensor(name).unwrap().data()) };
        let ids = |name: &str| -> Vec<i64> { bytemuck::pod_collect_to_vec(file.tensor(name).unwrap().data()) };
        let model =
            Mf { dim: 8, users: floats("user_embedding.weight"), items: floats("item_embedding.weight") };
        let (users, items, labels) = (ids("users"), ids("items"), floats("labels"));
        let mut gradient = Mf { dim: 8, users: vec![0.0; model.users.len()], items: vec![0.0; model.items.len()] };
        let rows: Vec<(u32, u32, u8)> =
            (0..users.len()).map(|i| (users[i] as u32, items[i] as u32, labels[i] as u8)).collect();
        let loss = model.backward(rows.iter().copied(), &mut gradient);
        let close = |got: &[f64], want: &[f64]| got.iter().zip(want).all(|(g, w)| (g - w).abs() < 1e-12);
        let scores: Vec<f64> = rows.iter().map(|r| model.score(r.0, r.1)).collect();
        assert!(close(&scores, &floats("scores")));
        assert!(close(&[loss], &floats("loss")));
        assert!(close(&gradient.users, &floats("grad.user_embedding.weight")));
        assert!(close(&gradient.items, &floats("grad.item_embedding.weight")));
    }

    /// Thirty users with two tastes: enough to learn from.
    fn dataset() -> Dataset {
        let mut rng = Rng::new(1, 1);
        let mut split = || {
            let mut s = Samples::empty();
            for i in 0..400 {
                let (u, item) = (1 + rng.below(30), 1 + rng.below(20));
                s.push(i, u, item, u8::from((u + item) % 2 == 0), i, &[]);
            }
            s.not_cold = vec![true; 400];
            (s.warm, s.both_new) = (s.not_cold.clone(), vec![false; 400]);
            s
        };
        let (train, valid, test) = (split(), split(), split());
        let titles = std::sync::Arc::new(vec![String::new(); 21]);
        Dataset { valid_small: valid.clone(), train, valid, test, titles, n_users: 31, n_items: 21, fingerprint: "toy".into() }
    }

    #[test]
    fn learns_and_resumes_with_the_same_bits() {
        let data = dataset();
        let config = MfConfig { dim: 8, learning_rate: 0.02, batch_size: 64, max_epochs: 120, ..MfConfig::default() };
        let whole = train(&data, &config, None, &mut |_, _, _| true).unwrap();
        assert!(whole.best_auc > 0.9, "{}", whole.best_auc);
        let dir = tempfile::tempdir().unwrap();
        for stop in [30, 70, 71] {
            let stopped = train(&data, &config, Some(dir.path()), &mut |epoch, _, _| epoch < stop);
            assert!(matches!(stopped, Err(Error::Interrupted)));
        }
        let resumed = train(&data, &config, Some(dir.path()), &mut |_, _, _| true).unwrap();
        assert_eq!(resumed.model, whole.model);
        assert_eq!((resumed.best_epoch, resumed.epochs), (whole.best_epoch, whole.epochs));
        let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        let single = one.install(|| train(&data, &config, None, &mut |_, _, _| true)).unwrap();
        assert_eq!(single.model, whole.model, "the number of threads must not matter");
    }

    #[test]
    fn saves_and_loads() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mf.safetensors");
        let mf = Mf::init(5, 7, 4, 1);
        mf.save(&path, &[("best_epoch", "3".into())]).unwrap();
        assert_eq!(Mf::load(&path).unwrap(), mf);
        assert!(mf.user_vector(0).iter().all(|&x| x == 0.0));
        assert_eq!(mf.item_vector(99), mf.item_vector(0), "an unknown id is padding");
    }
}
