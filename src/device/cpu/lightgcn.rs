//! LightGCN's propagation: `e_{l+1} = Â e_l`, and the mean of all layers, e_0 included (He et al. 2020).
//!
//! This file owns the normalised adjacency in CSR form, for every device, and the propagation on the CPU. `Â = D^-½ A D^-½` over
//! users and items, `A` bipartite and without self loops; an edge that occurs twice weighs twice. Nodes without edges keep
//! `e_0 / (layers + 1)`, as officially (reference, section 4). `Â` is symmetric, so the gradient with respect to e_0 is the same
//! propagation of the gradient of the mean.

use rayon::prelude::*;

use super::ROWS_PER_TASK;
use super::simd::per_isa;
use crate::device::profile::{Group, span};

/// `Â` in CSR form: users are nodes `0..n_users`, items follow.
#[derive(Clone, Debug, PartialEq)]
pub struct Adjacency {
    /// Users.
    pub n_users: usize,
    /// Items.
    pub n_items: usize,
    /// Where a node's neighbours begin, `[nodes + 1]`.
    pub starts: Vec<u32>,
    /// Neighbours, in ascending order within a node.
    pub columns: Vec<u32>,
    /// Their weights.
    pub values: Vec<f32>,
}

impl Adjacency {
    /// From edges (user, item), in any order. Ids must lie below `n_users` and `n_items`.
    ///
    /// # Panics
    /// If an id does not.
    pub fn new(n_users: usize, n_items: usize, edges: &[(u32, u32)]) -> Self {
        let nodes = n_users + n_items;
        let mut pairs: Vec<(u32, u32)> = Vec::with_capacity(2 * edges.len());
        let mut degrees = vec![0u32; nodes];
        for &(user, item) in edges {
            assert!(
                (user as usize) < n_users && (item as usize) < n_items,
                "edge ({user}, {item}) is outside the graph"
            );
            let item = item + n_users as u32;
            pairs.extend([(user, item), (item, user)]);
            degrees[user as usize] += 1;
            degrees[item as usize] += 1;
        }
        pairs.sort_unstable();
        let mut adjacency =
            Adjacency { n_users, n_items, starts: vec![0; nodes + 1], columns: Vec::new(), values: Vec::new() };
        for same in pairs.chunk_by(|a, b| a == b) {
            let (row, column) = same[0];
            let degree = |node: u32| f64::from(degrees[node as usize]);
            adjacency.starts[row as usize + 1] += 1;
            adjacency.columns.push(column);
            adjacency.values.push((same.len() as f64 / (degree(row) * degree(column)).sqrt()) as f32);
        }
        for node in 0..nodes {
            adjacency.starts[node + 1] += adjacency.starts[node];
        }
        adjacency
    }

    /// Users and items.
    pub fn nodes(&self) -> usize {
        self.n_users + self.n_items
    }

    /// Neighbours of a node and their weights.
    fn row(&self, node: usize) -> (&[u32], &[f32]) {
        let range = self.starts[node] as usize..self.starts[node + 1] as usize;
        (&self.columns[range.clone()], &self.values[range])
    }

    /// `mean = (e_0 + … + e_layers) / (layers + 1)` with `e_0 = from: [nodes, dim]`. Each row sums its neighbours in their order.
    pub fn propagate(&self, layers: usize, dim: usize, from: &[f32], mean: &mut [f32]) {
        assert!(
            from.len() == self.nodes() * dim && mean.len() == from.len(),
            "rows of {dim} for {} nodes",
            self.nodes()
        );
        let _span = span(Group::Collaborative, || 2.0 * (layers * self.columns.len() * dim) as f64);
        mean.copy_from_slice(from);
        let mut layer = from.to_vec();
        let mut next = layer.clone();
        for _ in 0..layers {
            let rows = next.par_chunks_mut(dim).zip(mean.par_chunks_mut(dim)).enumerate();
            rows.with_min_len(ROWS_PER_TASK).for_each(|(node, (to, mean))| {
                let (columns, values) = self.row(node);
                sum_neighbours(columns, values, &layer, to);
                mean.iter_mut().zip(to).for_each(|(m, &mut x)| *m += x);
            });
            std::mem::swap(&mut layer, &mut next);
        }
        let scale = 1.0 / (layers + 1) as f32;
        mean.par_chunks_mut(dim * ROWS_PER_TASK).for_each(|mean| mean.iter_mut().for_each(|m| *m *= scale));
    }
}

per_isa! {
    /// `to = Σ value · from[column]`.
    fn sum_neighbours(columns: &[u32], values: &[f32], from: &[f32], to: &mut [f32]) {
        to.fill(0.0);
        for (&column, &value) in columns.iter().zip(values) {
            let x = &from[column as usize * to.len()..][..to.len()];
            to.iter_mut().zip(x).for_each(|(to, &x)| *to += value * x);
        }
    }
}
