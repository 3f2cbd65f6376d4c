//! LightGCN (He et al. 2020): `score = u · i` of the layer means over the graph of train's positives (reference, section 4).
//!
//! This file owns its settings, its graph and its file; [`crate::device::cpu::lightgcn`] propagates, [`super::training`] trains.
//! The graph does not change after training, so its vectors are computed once and kept: to everything behind it a trained LightGCN
//! is two tables whose rows are multiplied, as MF is.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::Error;
use super::mf::{Mf, save_tensors};
use super::training::{Propagation, Recipe, Trained, train};
use crate::data::Dataset;
use crate::device::cpu::lightgcn::Adjacency;
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

/// Official spread of the tables at the start.
const SPREAD: f64 = 0.1;

/// The graph of train's positives and its layers.
pub fn propagation(data: &Dataset, config: &LightGcnConfig) -> Propagation {
    let train = &data.train;
    let liked = (0..train.len()).filter(|&i| train.label[i] == 1);
    let edges: Vec<(u32, u32)> = liked.map(|i| (train.uid[i], train.iid[i])).collect();
    Propagation { graph: Adjacency::new(data.n_users, data.n_items, &edges), layers: config.layers }
}

/// Trains on train, selecting by AUC on valid; see [`train`].
pub fn fit(
    data: &Dataset,
    config: &LightGcnConfig,
    cuda: Option<&Cuda>,
    checkpoints: Option<&Path>,
    observe: &mut dyn FnMut(usize, f64, f64) -> bool,
) -> Result<Trained, Error> {
    let recipe = Recipe {
        learning_rate: config.learning_rate,
        weight_decay: config.weight_decay,
        batch_size: config.batch_size,
        max_epochs: config.max_epochs,
        min_epochs: config.min_epochs,
        patience: config.patience,
        seed: config.seed,
        model: format!("lightgcn dim {} layers {}", config.dim, config.layers),
    };
    let start = Mf::spread(data.n_users, data.n_items, config.dim, SPREAD, config.seed);
    train(data, start, &recipe, Some(&propagation(data, config)), cuda, checkpoints, observe)
}

const TABLES: [&str; 2] = ["embedding_user.weight", "embedding_item.weight"];
pub(super) const VECTORS: [&str; 2] = ["user_vectors", "item_vectors"];

/// Writes the tables under their official names and the vectors, with facts as metadata.
pub fn save(trained: &Trained, path: &Path, facts: &[(&str, String)]) -> Result<(), Error> {
    save_tensors(&[trained.tables.named(TABLES), trained.vectors.named(VECTORS)].concat(), path, facts)
}

/// The vectors of a file that [`save`] wrote.
pub fn load(path: &Path) -> Result<Mf, Error> {
    Mf::load_named(path, VECTORS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collab::training::tests::dataset;

    /// Along the gradient of the tables, the loss changes as fast as the gradient is long.
    #[test]
    fn gradients_go_back_through_the_graph() {
        let data = dataset();
        let p = propagation(&data, &LightGcnConfig::default());
        let mut tables = Mf::spread(data.n_users, data.n_items, 6, 0.5, 3);
        let rows = crate::collab::mf::Batch {
            users: data.train.uid.clone(),
            items: data.train.iid.clone(),
            labels: data.train.label.clone(),
        };
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
        let trained = fit(&data, &config, None, None, &mut |_, _, _| true).unwrap();
        assert!(trained.best_auc > 0.9, "{}", trained.best_auc);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lightgcn.safetensors");
        save(&trained, &path, &[]).unwrap();
        assert_eq!(load(&path).unwrap(), trained.vectors);
        assert_ne!(trained.vectors, trained.tables);
    }
}
