//! LightGCN (He et al. 2020): `score = u · i` of the layer means over the graph of train's positives (reference, section 4).
//!
//! This file owns its settings, its graph and its file; [`crate::device::cpu::lightgcn`] propagates, [`super::training`] trains.
//! The graph does not change after training, so its vectors are computed once and kept: to everything behind it a trained LightGCN
//! is two tables whose rows are multiplied, as MF is.

use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::Error;
use super::card::Card;
use super::mf::{Batch, Mf, save_tensors};
use super::training::{Learner, Recipe};
use crate::checkpoint::Tensor;
use crate::data::{Dataset, Samples};
use crate::device::cpu::lightgcn::Adjacency;
use crate::device::cpu::optimizer::Adam;
use crate::device::cuda::Cuda;

/// How LightGCN is trained. Defaults are the official choice for ML-1M.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LightGcnConfig {
    /// Width of a vector.
    pub dim: usize,
    /// Layers of propagation; the mean is over these and the tables themselves.
    pub layers: usize,
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
    /// Seed of initialisation and order.
    pub seed: u64,
}

impl Default for LightGcnConfig {
    fn default() -> Self {
        LightGcnConfig {
            dim: 64,
            layers: 2,
            learning_rate: 1e-2,
            weight_decay: 1e-4,
            batch_size: 2048,
            max_epochs: 5000,
            min_epochs: 0,
            patience: 100,
            seed: 2023,
        }
    }
}

impl LightGcnConfig {
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
            model: format!("lightgcn dim {} layers {}", self.dim, self.layers),
        }
    }
}

/// Official spread of the tables at the start.
const SPREAD: f64 = 0.1;

/// Propagation between the tables and the vectors that are multiplied.
#[derive(Debug)]
pub struct Propagation {
    /// The graph.
    pub graph: Adjacency,
    /// Its layers.
    pub layers: usize,
}

impl Propagation {
    /// The graph of train's positives.
    pub fn new(data: &Dataset, layers: usize) -> Self {
        let train = &data.train;
        let liked = (0..train.len()).filter(|&i| train.label[i] == 1);
        let edges: Vec<(u32, u32)> = liked.map(|i| (train.uid[i], train.iid[i])).collect();
        Propagation { graph: Adjacency::new(data.n_users, data.n_items, &edges), layers }
    }

    /// The layer mean of both tables, or, as the matrix is symmetric, the gradient of the tables from that of the mean.
    pub fn apply(&self, tables: &Mf) -> Mf {
        let joined = [&tables.users[..], &tables.items[..]].concat();
        let mut mean = vec![0.0; joined.len()];
        self.graph.propagate(self.layers, tables.dim, &joined, &mut mean);
        let items = mean.split_off(tables.users.len());
        Mf { dim: tables.dim, users: mean, items }
    }
}

/// LightGCN in training: tables and the graph between them and the vectors.
#[derive(Clone, Debug)]
pub struct LightGcn {
    /// What is trained.
    pub tables: Mf,
    propagation: Arc<Propagation>,
}

impl LightGcn {
    /// N(0, 0.1), and the graph of train's positives.
    pub fn init(data: &Dataset, config: &LightGcnConfig) -> Self {
        LightGcn {
            tables: Mf::spread(data.n_users, data.n_items, config.dim, SPREAD, config.seed),
            propagation: Arc::new(Propagation::new(data, config.layers)),
        }
    }

    /// What is multiplied: the propagated tables.
    pub fn vectors(&self) -> Mf {
        self.propagation.apply(&self.tables)
    }

    /// Writes the tables under their official names and the vectors, with facts as metadata.
    pub fn save(&self, path: &Path, facts: &[(&str, String)]) -> Result<(), Error> {
        save_tensors(&[self.tables.named(TABLES), self.vectors().named(VECTORS)].concat(), path, facts)
    }
}

impl Learner for LightGcn {
    fn tensors(&self) -> Vec<Tensor> {
        self.tables.named(TABLES)
    }

    fn values_mut(&mut self) -> Vec<&mut [f32]> {
        self.tables.values_mut()
    }

    fn n_trained(&self) -> usize {
        2
    }

    fn loss_and_gradient(&mut self, train: &Samples, rows: &[usize], _: u64, gradient: &mut Self) -> f64 {
        let loss = self.vectors().loss_and_gradient(&Batch::of(train, rows), &mut gradient.tables);
        gradient.tables = self.propagation.apply(&gradient.tables);
        loss
    }

    fn scores(&self, samples: &Samples) -> Vec<f32> {
        self.vectors().scores(samples)
    }

    fn card<'c>(&self, cuda: &'c Cuda, adam: &Adam, recipe: &Recipe) -> Result<Option<Card<'c>>, Error> {
        Card::new(cuda, &self.tables, adam, recipe, Some(&self.propagation)).map(Some)
    }
}

const TABLES: [&str; 2] = ["embedding_user.weight", "embedding_item.weight"];
const VECTORS: [&str; 2] = ["user_vectors", "item_vectors"];

/// The vectors of a file that [`LightGcn::save`] wrote.
pub fn load(path: &Path) -> Result<Mf, Error> {
    Mf::load_named(path, VECTORS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collab::training::tests::dataset;
    use crate::collab::training::train;

    /// Along the gradient of the tables, the loss changes as fast as the gradient is long.
    #[test]
    fn gradients_go_back_through_the_graph() {
        let data = dataset();
        let p = Propagation::new(&data, 2);
        let mut tables = Mf::spread(data.n_users, data.n_items, 6, 0.5, 3);
        let rows = Batch::of(&data.train, &(0..data.train.len()).collect::<Vec<_>>());
        let mut gradient = tables.clone();
        p.apply(&tables).loss_and_gradient(&rows, &mut gradient);
        let gradient = p.apply(&gradient);
        let length = gradient.users.iter().chain(&gradient.items).map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
        let step = 1e-2 / length;
        let mut moved = |sign: f64| {
            let before = tables.clone();
            let pairs =
                tables.users.iter_mut().zip(&gradient.users).chain(tables.items.iter_mut().zip(&gradient.items));
            pairs.for_each(|(w, g)| *w += (sign * step * f64::from(*g)) as f32);
            let mut unused = before.clone();
            let loss = p.apply(&tables).loss_and_gradient(&rows, &mut unused);
            tables = before;
            loss
        };
        let slope = (moved(1.0) - moved(-1.0)) / (2.0 * step) / (length * length);
        assert!((slope - 1.0).abs() < 1e-2, "{slope}");
    }

    #[test]
    fn learns_saves_and_loads() {
        let data = dataset();
        let config = LightGcnConfig { dim: 8, batch_size: 64, max_epochs: 60, ..LightGcnConfig::default() };
        let start = LightGcn::init(&data, &config);
        let trained = train(&data, start, &config.recipe(), None, None, &mut |_, _, _| true).unwrap();
        assert!(trained.best_auc > 0.9, "{}", trained.best_auc);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lightgcn.safetensors");
        trained.model.save(&path, &[]).unwrap();
        assert_eq!(load(&path).unwrap(), trained.model.vectors());
        assert_ne!(trained.model.vectors(), trained.model.tables);
    }
}
