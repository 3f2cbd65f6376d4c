//! What is compared in `bench overhead`: TALLRec, and CoLLM with each collaborative model.

use std::time::Instant;

use super::Error;
use crate::collab::lightgcn::{LightGcn, LightGcnConfig, Propagation};
use crate::collab::mf::{Mf, MfConfig};
use crate::collab::training;
use crate::data::Dataset;
use crate::device::cuda::Cuda;

/// The method without collaborative vectors, against which overheads are taken.
pub const TALLREC: &str = "TALLRec";

/// Called after an epoch with its number, loss and AUC; `false` stops.
type Observe<'a> = &'a mut dyn FnMut(usize, f64, f64) -> bool;

/// A collaborative model: what fills the slots, in its official shape, and what training it costs. A further one is a line of
/// [`MODELS`].
pub struct Collaborative {
    /// As in `collab.model`.
    pub key: &'static str,
    /// The method's name.
    pub title: &'static str,
    /// Tables that were never trained: their values cost nothing.
    pub tables: fn(&Dataset) -> Mf,
    /// The graph that the official code propagates the tables over for every batch.
    pub graph: fn(&Dataset) -> Option<Propagation>,
    /// Epochs until early stopping on official ML-1M.
    pub epochs: usize,
    train: fn(&Dataset, Option<&Cuda>, Observe) -> Result<(), crate::collab::Error>,
}

/// Seed of tables and tensors.
pub const SEED: u64 = 1;

fn tables(data: &Dataset, dim: usize) -> Mf {
    Mf::init(data.n_users, data.n_items, dim, SEED)
}

/// The collaborative models.
pub const MODELS: [Collaborative; 2] = [
    Collaborative {
        key: "mf",
        title: "CoLLM-MF",
        tables: |data| tables(data, MfConfig::default().dim),
        graph: |_| None,
        epochs: 565, // the best at 465, and the patience of 100 (reference, section 4)
        train: |data, cuda, observe| {
            let recipe = MfConfig::default().recipe();
            training::train(data, tables(data, MfConfig::default().dim), &recipe, cuda, None, observe).map(drop)
        },
    },
    Collaborative {
        key: "lightgcn",
        title: "CoLLM-LightGCN",
        tables: |data| tables(data, LightGcnConfig::default().dim),
        graph: |data| Some(Propagation::new(data, LightGcnConfig::default().layers)),
        epochs: LIGHTGCN_EPOCHS,
        train: |data, cuda, observe| {
            let config = LightGcnConfig::default();
            training::train(data, LightGcn::init(data, &config), &config.recipe(), cuda, None, observe).map(drop)
        },
    },
];

/// Epochs that the engine's LightGCN trains on official ML-1M with its default seed; the official number is not known.
const LIGHTGCN_EPOCHS: usize = 128;

impl Collaborative {
    /// The model of a method; `None` for TALLRec.
    pub fn of(method: &str) -> Option<&'static Collaborative> {
        MODELS.iter().find(|m| m.title == method)
    }

    /// Seconds of an epoch of its own training, with its share of evaluation: the mean of `epochs` after a first one.
    pub fn epoch_seconds(&self, data: &Dataset, cuda: Option<&Cuda>, epochs: usize) -> Result<f64, Error> {
        let (mut first, mut seconds) = (None, 0.0);
        let mut observe = |epoch: usize, _: f64, _: f64| {
            let began = *first.get_or_insert_with(Instant::now);
            seconds = began.elapsed().as_secs_f64() / epochs as f64;
            epoch <= epochs
        };
        match (self.train)(data, cuda, &mut observe) {
            // It stopped because it was told to.
            Ok(()) | Err(crate::collab::Error::Interrupted) => Ok(seconds),
            Err(e) => Err(e.into()),
        }
    }
}
