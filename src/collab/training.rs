//! Training of any collaborative model ([`Learner`]): epochs over train, early stopping on the AUC of valid, checkpoints that
//! resume with the same bits.
//!
//! PARITY: the optimizer is Adam with L2 in the gradient over whole tables, as `torch.optim.Adam` is on dense gradients: every
//! row moves at every step, rows of ids absent from train decay to zero, and so cold scores carry no information.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::Error;
use super::card::Card;
use super::mf::Batch;
use crate::checkpoint::{Checkpoint, Tensor, take_tensor};
use crate::data::{Dataset, Samples};
use crate::device::cpu::optimizer::{Adam, Decay};
use crate::device::cuda::Cuda;
use crate::eval::metrics::evaluate;
use crate::rng::Rng;

/// What [`train`] asks of a model.
pub trait Learner: Clone {
    /// Everything the model is made of, under official names.
    fn tensors(&self) -> Vec<Tensor>;

    /// The values of [`Self::tensors`], in its order.
    fn values_mut(&mut self) -> Vec<&mut [f32]>;

    /// The first so many of the tensors are trained; the rest (running means) only follows.
    fn n_trained(&self) -> usize;

    /// Mean loss over these rows. `gradient`, of the same shape, is overwritten where tensors are trained. `step` counts from 0:
    /// what is dropped is a function of it.
    fn loss_and_gradient(&mut self, train: &Samples, rows: &[usize], step: u64, gradient: &mut Self) -> f64;

    /// Scores of all rows, without dropout.
    fn scores(&self, samples: &Samples) -> Vec<f32>;

    /// The model's steps on a card, where there are kernels for it.
    fn card<'c>(&self, _: &'c Cuda, _: &Adam, _: &Recipe) -> Result<Option<Card<'c>>, Error> {
        Ok(None)
    }
}

/// How a model is trained.
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
struct Training<M> {
    model: M,
    best: M,
    adam: Adam,
    state: State,
}

/// A trained model and how it came about.
#[derive(Clone, Debug)]
pub struct Trained<M> {
    /// The model of the best epoch.
    pub model: M,
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
/// on that card if the model has kernels.
pub fn train<M: Learner>(
    data: &Dataset,
    start: M,
    recipe: &Recipe,
    cuda: Option<&Cuda>,
    checkpoints: Option<&Path>,
    observe: &mut dyn FnMut(usize, f64, f64) -> bool,
) -> Result<Trained<M>, Error> {
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
    let card = cuda.map(|cuda| training.model.card(cuda, &training.adam, recipe));
    let mut card = card.transpose()?.flatten();
    while !training.finished() {
        let loss = training.epoch(data, card.as_mut(), &mut gradient)?;
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
    Ok(Trained { model: training.best, best_epoch, best_auc, epochs: epoch })
}

impl<M: Learner> Training<M> {
    fn fresh(data: &Dataset, mut start: M, recipe: &Recipe) -> Self {
        let state = State {
            epoch: 0,
            step: 0,
            best_epoch: 0,
            best_auc: -1.0,
            recipe: recipe.clone(),
            data: data.fingerprint.clone(),
        };
        let n = start.n_trained();
        let adam = Adam::new(Decay::Coupled, start.values_mut()[..n].iter().map(|v| v.len()));
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
        for (prefix, target) in [("", &mut self.model), ("best.", &mut self.best)] {
            let tensors = target.tensors();
            for (Tensor { name, shape, .. }, values) in tensors.iter().zip(target.values_mut()) {
                values.copy_from_slice(&take_tensor(&mut model, &format!("{prefix}{name}"), shape)?);
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
    fn epoch(&mut self, data: &Dataset, mut card: Option<&mut Card>, gradient: &mut M) -> Result<(f64, f64), Error> {
        let recipe = self.state.recipe.clone();
        let train = &data.train;
        let mut order: Vec<usize> = (0..train.len()).collect();
        Rng::new(recipe.seed, 0x3f10_0000 + self.state.epoch as u64).shuffle(&mut order);
        let (mut loss, mut steps) = (0.0, 0.0);
        for rows in order.chunks(recipe.batch_size) {
            steps += 1.0;
            if let Some(card) = &mut card {
                loss += card.step(&Batch::of(train, rows), recipe.learning_rate)?;
                continue;
            }
            loss += self.model.loss_and_gradient(train, rows, self.adam.step, gradient);
            let weights = self.model.values_mut().into_iter().zip(gradient.values_mut());
            let tensors = weights.map(|(w, g)| (w, &*g, recipe.weight_decay));
            self.adam.step(tensors.take(self.adam.m.len()).collect(), recipe.learning_rate);
        }
        if let Some(card) = card {
            self.adam = card.read(self.model.values_mut())?;
        }
        let auc = evaluate(&data.valid.uid, &data.valid.label, &self.model.scores(&data.valid))?.auc.unwrap_or(0.5);
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
    use crate::collab::mf::{Mf, MfConfig};

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
                train(&data, start, &config.recipe(), None, checkpoints, observe)
            };
        let whole = train(&config, None, &mut |_, _, _| true).unwrap();
        assert!(whole.best_auc > 0.9, "{}", whole.best_auc);
        let dir = tempfile::tempdir().unwrap();
        for stop in [30, 70, 71] {
            let stopped = train(&config, Some(dir.path()), &mut |epoch, _, _| epoch < stop);
            assert!(matches!(stopped, Err(Error::Interrupted)));
        }
        let resumed = train(&config, Some(dir.path()), &mut |_, _, _| true).unwrap();
        assert_eq!(resumed.model, whole.model);
        assert_eq!((resumed.best_epoch, resumed.epochs), (whole.best_epoch, whole.epochs));
        let other = MfConfig { seed: 1, ..config.clone() };
        let e = train(&other, Some(dir.path()), &mut |_, _, _| true).unwrap_err().to_string();
        assert!(e.ends_with("last: the checkpoint is of other settings; delete it to begin anew"), "{e}");
        let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        let single = one.install(|| train(&config, None, &mut |_, _, _| true)).unwrap();
        assert_eq!(single.model, whole.model, "the number of threads must not matter");
    }
}
