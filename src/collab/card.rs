//! The training steps of [`super::training`] on an NVIDIA card: tables, gradients and moments stay there for an epoch.

use super::Error;
use super::lightgcn::Propagation;
use super::mf::{Batch, Mf};
use super::training::Recipe;
use crate::device::cpu::optimizer::{Adam, Decay};
use crate::device::cuda::lightgcn::LightGcn;
use crate::device::cuda::mf::{self, BatchLists, Tables};
use crate::device::cuda::optimizer::{Optimizer, Step, Trained};
use crate::device::cuda::{Buffer, Cuda};

/// The graph on the card, and the layer means with their gradient.
struct Graph {
    gcn: LightGcn,
    layers: usize,
    mean: Buffer<f32>,
    d_mean: Buffer<f32>,
}

/// Tables in training on a card: users, then items, in one buffer.
pub struct Card<'a> {
    cuda: &'a Cuda,
    dim: usize,
    n_users: usize,
    n_items: usize,
    tables: Buffer<f32>,
    gradient: Buffer<f32>,
    optimizer: Optimizer,
    kernels: mf::Mf,
    batch: BatchLists,
    graph: Option<Graph>,
}

impl<'a> Card<'a> {
    /// Uploads tables and moments.
    pub fn new(
        cuda: &'a Cuda,
        model: &Mf,
        adam: &Adam,
        recipe: &Recipe,
        propagation: Option<&Propagation>,
    ) -> Result<Self, Error> {
        let dim = model.dim;
        let tables = Buffer::from_host(cuda, &[&model.users[..], &model.items[..]].concat(), "collaborative tables")?;
        let gradient = Buffer::zeros(cuda, tables.len(), "gradients of the tables")?;
        let part = |first: usize, len: usize| Trained {
            weights: tables.at(first),
            gradient: gradient.at(first),
            len,
            decay: recipe.weight_decay,
        };
        let (users, items) = (model.users.len(), model.items.len());
        let mut optimizer = Optimizer::new(cuda, Decay::Coupled, &[part(0, users), part(users, items)])?;
        optimizer.restore(cuda, adam)?;
        let graph = propagation.map(|p| -> Result<Graph, Error> {
            let nodes = || Buffer::zeros(cuda, tables.len(), "layer means");
            let gcn = LightGcn::new(cuda, &p.graph, dim)?;
            Ok(Graph { gcn, layers: p.layers, mean: nodes()?, d_mean: nodes()? })
        });
        let (n_users, n_items) = (users / dim, items / dim);
        Ok(Card {
            kernels: mf::Mf::new(cuda, recipe.batch_size)?,
            batch: BatchLists::new(cuda, n_users, n_items, recipe.batch_size)?,
            graph: graph.transpose()?,
            cuda,
            dim,
            n_users,
            n_items,
            tables,
            gradient,
            optimizer,
        })
    }

    /// One step; the mean loss of the batch before it.
    pub fn step(&mut self, rows: &Batch, lr: f64) -> Result<f64, Error> {
        let cuda = self.cuda;
        self.batch.set(cuda, &rows.users, &rows.items, &rows.labels)?;
        let tables = |buffer| Tables::joined(self.dim, self.n_users, self.n_items, buffer);
        match &self.graph {
            None => {
                let (tables, gradient) = (tables(&self.tables)?, tables(&self.gradient)?);
                self.kernels.loss_and_gradient(cuda, tables, &self.batch, gradient, true)?;
            }
            Some(g) => {
                g.gcn.propagate(cuda, g.layers, &self.tables, &g.mean)?;
                let (mean, d_mean) = (tables(&g.mean)?, tables(&g.d_mean)?);
                self.kernels.loss_and_gradient(cuda, mean, &self.batch, d_mean, true)?;
                g.gcn.propagate(cuda, g.layers, &g.d_mean, &self.gradient)?;
            }
        }
        self.optimizer.step(cuda, Step { lr, scale: 1.0, max_norm: f64::INFINITY, zero_gradients: false })?;
        Ok(self.kernels.loss(cuda)?)
    }

    /// Tables and moments back. `tables`: users, then items.
    pub fn read(&self, tables: Vec<&mut [f32]>) -> Result<Adam, Error> {
        let mut values = &self.tables.download(self.cuda, self.tables.len())?[..];
        for table in tables {
            let (here, rest) = values.split_at(table.len());
            table.copy_from_slice(here);
            values = rest;
        }
        Ok(self.optimizer.state(self.cuda)?)
    }
}
