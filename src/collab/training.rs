//! Training of models whose score is a dot product of two tables' rows, straight (MF) or after propagation over a graph
//! (LightGCN): epochs over train, early stopping on the AUC of valid, checkpoints that resume with the same bits.
//!
//! PARITY: the optimizer is Adam with L2 in the gradient over whole tables, as `torch.optim.Adam` is on dense gradients: every
//! row moves at every step, rows of ids absent from train decay to zero, and so cold scores carry no information.

use std::borrow::Cow;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::Error;
use super::card::Card;
use super::mf::{Batch, Mf};
use crate::checkpoint::{Checkpoint, Tensor, take_tensor};
use crate::data::Dataset;
use crate::device::cpu::lightgcn::Adjacency;
use crate::device::cpu::optimizer::{Adam, Decay};
use crate::device::cuda::Cuda;
use crate::eval::metrics::evaluate;
use crate::rng::Rng;

/// How tables are trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Recipe {
    /// Adam's learning rate.
    pub learning_rate: f64,
    /// Coupled L2.
    pub weight_decay: f64,
    /// Rows of a step.
    pub batch_size: usize,
    /// Epochs at most.
    pub max_epochs: usize,
    /// Epochs before early stopping may act.
    pub min_epochs: usize,
    /// Epochs without improvement of valid AUC before stopping.
    pub patience: usize,
    /// Seed of the order.
    pub seed: u64,
    /// Everything else that the result depends on: a checkpoint of another model is refused.
    pub model: String,
}

/// Propagation between the tables and the vectors that are multiplied.
#[derive(Debug)]
pub struct Propagation {
    /// The graph.
    pub graph: Adjacency,
    /// Its layers.
    pub layers: usize,
}

impl Propagation {
    /// The layer mean of both tables, or, as the matrix is symmetric, the gradient of the tables from that of the mean.
    pub fn apply(&self, tables: &Mf) -> Mf {
        let joined = [&tables.users[..], &tables.items[..]].concat();
        let mut mean = vec![0.0; joined.len()];
        self.graph.propagate(self.layers, tables.dim, &joined, &mut mean);
        let items = mean.split_off(tables.users.len());
        Mf { dim: tables.dim, users: mean, items }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct State {
    epoch: usize,
    step: u64,
    best_epoch: usize,
    best_auc: f64,
    recipe: Recipe,
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
pub struct Trained {
    /// The tables of the best epoch.
    pub tables: Mf,
    /// What is multiplied: the tables, propagated where there is a graph.
    pub vectors: Mf,
    /// The epoch with the highest valid AUC.
    pub best_epoch: usize,
    /// That AUC.
    pub best_auc: f64,
    /// Epochs trained.
    pub epochs: usize,
}

/// Epochs between checkpoints.
const CHECKPOINT_EPOCHS: usize = 50;

/// Trains `start` on train, selecting by AUC on valid.
///
/// With `checkpoints`, the state is saved there from time to time and picked up again: the result has the same bits as an
/// uninterrupted run's. `observe(epoch, loss, auc)` is called after every epoch; `false` saves and stops. With `cuda`, the steps run
/// on that card.
pub fn train(
    data: &Dataset,
    start: Mf,
    recipe: &Recipe,
    propagation: Option<&Propagation>,
    cuda: Option<&Cuda>,
    checkpoints: Option<&Path>,
    observe: &mut dyn FnMut(usize, f64, f64) -> bool,
) -> Result<Trained, Error> {
    let io = |source| Error::Io { path: checkpoints.map(Path::to_path_buf).unwrap_or_default(), source };
    let mut training = Training::fresh(data, start, recipe);
    if let Some(saved) =
        checkpoints.map(|dir| Checkpoint::<State>::load(dir, "last")).transpose().map_err(io)?.flatten()
    {
        training = training.restored(saved).map_err(|what| Error::Model {
            path: checkpoints.map(|dir| dir.join("last")).unwrap_or_default(),
            what: format!("the checkpoint {what}; delete it to begin anew"),
        })?;
    }
    let mut gradient = training.model.clone();
    let card = cuda.map(|cuda| Card::new(cuda, &training.model, &training.adam, recipe, propagation));
    let mut card = card.transpose()?;
    while !training.finished() {
        let loss = training.epoch(data, propagation, card.as_mut(), &mut gradient)?;
        let state = &training.state;
        let go_on = observe(state.epoch, loss.0, loss.1);
        if let Some(dir) = checkpoints
            && (!go_on || state.epoch.is_multiple_of(CHECKPOINT_EPOCHS))
        {
            training.checkpoint().save(dir, "last").map_err(io)?;
        }
        if !go_on {
            return Err(Error::Interrupted);
        }
    }
    let State { epoch, best_epoch, best_auc, .. } = training.state;
    let vectors = vectors(&training.best, propagation).into_owned();
    Ok(Trained { tables: training.best, vectors, best_epoch, best_auc, epochs: epoch })
}

fn vectors<'m>(tables: &'m Mf, propagation: Option<&Propagation>) -> Cow<'m, Mf> {
    propagation.map_or(Cow::Borrowed(tables), |p| Cow::Owned(p.apply(tables)))
}

impl Training {
    fn fresh(data: &Dataset, start: Mf, recipe: &Recipe) -> Self {
        let state = State {
            epoch: 0,
            step: 0,
            best_epoch: 0,
            best_auc: -1.0,
            recipe: recipe.clone(),
            data: data.fingerprint.clone(),
        };
        let adam = Adam::new(Decay::Coupled, [start.users.len(), start.items.len()]);
        Training { best: start.clone(), model: start, adam, state }
    }

    fn checkpoint(&self) -> Checkpoint<State> {
        let moments = |name: &str, m: &[Vec<f32>]| {
            m.iter()
                .enumerate()
                .map(|(i, v)| Tensor::new(format!("{name}{i}"), vec![v.len()], v.clone()))
                .collect::<Vec<_>>()
        };
        let best = self.best.tensors().into_iter().map(|t| Tensor { name: format!("best.{}", t.name), ..t });
        Checkpoint {
            model: self.model.tensors().into_iter().chain(best).collect(),
            optimizer: moments("m", &self.adam.m).into_iter().chain(moments("v", &self.adam.v)).collect(),
            state: State { step: self.adam.step, ..self.state.clone() },
        }
    }

    /// The saved state, which must be of the same data and configuration.
    fn restored(mut self, saved: Checkpoint<State>) -> Result<Self, String> {
        if saved.state.recipe != self.state.recipe {
            return Err("is of other settings".into());
        }
        if saved.state.data != self.state.data {
            return Err("is of other data".into());
        }
        let mut model = saved.model;
        let dim = self.model.dim;
        for (prefix, target) in [("", &mut self.model), ("best.", &mut self.best)] {
            for (name, table) in
                [("user_embedding.weight", &mut target.users), ("item_embedding.weight", &mut target.items)]
            {
                *table = take_tensor(&mut model, &format!("{prefix}{name}"), &[table.len() / dim, dim])?;
            }
        }
        let mut optimizer = saved.optimizer;
        for (prefix, moments) in [("m", &mut self.adam.m), ("v", &mut self.adam.v)] {
            for (i, m) in moments.iter_mut().enumerate() {
                *m = take_tensor(&mut optimizer, &format!("{prefix}{i}"), &[m.len()])?;
            }
        }
        self.adam.step = saved.state.step;
        self.state = saved.state;
        Ok(self)
    }

    fn finished(&self) -> bool {
        let (s, r) = (&self.state, &self.state.recipe);
        s.epoch >= r.max_epochs || (s.epoch >= r.min_epochs && s.epoch >= s.best_epoch + r.patience)
    }

    /// One pass over train in an order drawn for this epoch, then the AUC on valid. Returns loss and AUC.
    fn epoch(
        &mut self,
        data: &Dataset,
        propagation: Option<&Propagation>,
        mut card: Option<&mut Card>,
        gradient: &mut Mf,
    ) -> Result<(f64, f64), Error> {
        let recipe = self.state.recipe.clone();
        let train = &data.train;
        let mut order: Vec<usize> = (0..train.len()).collect();
        Rng::new(recipe.seed, 0x3f10_0000 + self.state.epoch as u64).shuffle(&mut order);
        let (mut loss, mut steps) = (0.0, 0.0);
        for batch in order.chunks(recipe.batch_size) {
            let rows = Batch {
                users: batch.iter().map(|&i| train.uid[i]).collect(),
                items: batch.iter().map(|&i| train.iid[i]).collect(),
                labels: batch.iter().map(|&i| train.label[i]).collect(),
            };
            steps += 1.0;
            if let Some(card) = &mut card {
                loss += card.step(&rows, recipe.learning_rate)?;
                continue;
            }
            loss += vectors(&self.model, propagation).loss_and_gradient(&rows, gradient);
            if let Some(p) = propagation {
                *gradient = p.apply(gradient);
            }
            let wd = recipe.weight_decay;
            let tensors: Vec<(&mut [f32], &[f32], f64)> =
                vec![(&mut self.model.users, &gradient.users, wd), (&mut self.model.items, &gradient.items, wd)];
            self.adam.step(tensors, recipe.learning_rate);
        }
        if let Some(card) = card {
            self.adam = card.read(&mut self.model)?;
        }
        let scores = vectors(&self.model, propagation).scores(&data.valid);
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
pub(super) mod tests {
    use super::*;
    use crate::collab::mf::MfConfig;
    use crate::data::Samples;

    /// Thirty users with two tastes: enough to learn from.
    pub fn dataset() -> Dataset {
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
        Dataset {
            valid_small: valid.clone(),
            train,
            valid,
            test,
            titles,
            n_users: 31,
            n_items: 21,
            fingerprint: "toy".into(),
        }
    }

    #[test]
    fn learns_and_resumes_with_the_same_bits() {
        let data = dataset();
        let config = MfConfig { dim: 8, learning_rate: 0.02, batch_size: 64, max_epochs: 120, ..MfConfig::default() };
        let train =
            |config: &MfConfig, checkpoints: Option<&Path>, observe: &mut dyn FnMut(usize, f64, f64) -> bool| {
                let start = Mf::init(data.n_users, data.n_items, config.dim, config.seed);
                train(&data, start, &config.recipe(), None, None, checkpoints, observe)
            };
        let whole = train(&config, None, &mut |_, _, _| true).unwrap();
        assert!(whole.best_auc > 0.9, "{}", whole.best_auc);
        let dir = tempfile::tempdir().unwrap();
        for stop in [30, 70, 71] {
            let stopped = train(&config, Some(dir.path()), &mut |epoch, _, _| epoch < stop);
            assert!(matches!(stopped, Err(Error::Interrupted)));
        }
        let resumed = train(&config, Some(dir.path()), &mut |_, _, _| true).unwrap();
        assert_eq!(resumed.tables, whole.tables);
        assert_eq!((resumed.best_epoch, resumed.epochs), (whole.best_epoch, whole.epochs));
        let other = MfConfig { seed: 1, ..config.clone() };
        let e = train(&other, Some(dir.path()), &mut |_, _, _| true).unwrap_err().to_string();
        assert!(e.ends_with("last: the checkpoint is of other settings; delete it to begin anew"), "{e}");
        let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        let single = one.install(|| train(&config, None, &mut |_, _, _| true)).unwrap();
        assert_eq!(single.tables, whole.tables, "the number of threads must not matter");
    }
}
