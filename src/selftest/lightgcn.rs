//! LightGCN's propagation against a dense matrix: edges that occur twice, nodes without edges, several widths and depths.

use super::floats::Floats;
use super::{Outcome, limit, random, relative_error};
use crate::device::cpu::lightgcn::Adjacency;
use crate::device::cuda::lightgcn::LightGcn;
use crate::device::cuda::{Cuda, Precision, Result};
use crate::rng::Rng;

/// All cases.
pub fn cases(cuda: &Cuda) -> Result<Vec<Outcome>> {
    SHAPES.into_iter().map(|shape| propagation(cuda, shape)).collect()
}

/// Users, items, edges, width, layers.
type Shape = (usize, usize, usize, usize, usize);

pub(super) const SHAPES: [Shape; 6] = [
    (3, 4, 5, 4, 1),
    (50, 70, 420, 16, 2),
    (33, 61, 700, 64, 3),
    (20, 9, 60, 72, 2),
    (31, 40, 200, 256, 2),
    (2, 90, 150, 132, 3),
];

/// A graph, a vector for each node, and their propagation.
pub(super) struct Example {
    pub graph: Adjacency,
    pub from: Vec<f32>,
    pub want: Vec<f64>,
    pub limit: f64,
}

pub(super) fn example(n_users: usize, n_items: usize, n_edges: usize, dim: usize, layers: usize) -> Example {
    let nodes = n_users + n_items;
    let mut rng = Rng::new(7, n_edges as u64);
    // The last node of each kind gets no edge.
    let mut draw = |n: usize| rng.below(n as u32 - 1);
    let mut edges: Vec<(u32, u32)> = (0..n_edges - 1).map(|_| (draw(n_users), draw(n_items))).collect();
    edges.push(edges[0]);
    let from = random(Precision::F32, nodes * dim, 1);

    // D^-½ A D^-½, dense.
    let mut a = vec![0.0f64; nodes * nodes];
    for &(u, i) in &edges {
        let (u, i) = (u as usize, n_users + i as usize);
        a[u * nodes + i] += 1.0;
        a[i * nodes + u] += 1.0;
    }
    let degrees: Vec<f64> = a.chunks_exact(nodes).map(|row| row.iter().sum()).collect();
    let mut layer: Vec<f64> = from.iter().map(|&x| x.into()).collect();
    let mut want = layer.clone();
    for _ in 0..layers {
        let mut next = vec![0.0; nodes * dim];
        for row in 0..nodes {
            for column in (0..nodes).filter(|&c| a[row * nodes + c] > 0.0) {
                let weight = a[row * nodes + column] / (degrees[row] * degrees[column]).sqrt();
                for d in 0..dim {
                    next[row * dim + d] += weight * layer[column * dim + d];
                }
            }
        }
        want.iter_mut().zip(&next).for_each(|(w, n)| *w += n);
        layer = next;
    }
    want.iter_mut().for_each(|w| *w /= (layers + 1) as f64);

    let graph = Adjacency::new(n_users, n_items, &edges);
    let most = degrees.iter().fold(1.0f64, |m, &d| m.max(d)) as usize;
    Example { graph, from, want, limit: layers as f64 * limit(Precision::F32, most) }
}

fn propagation(cuda: &Cuda, (n_users, n_items, edges, dim, layers): Shape) -> Result<Outcome> {
    let e = example(n_users, n_items, edges, dim, layers);
    let gcn = LightGcn::new(cuda, &e.graph, dim)?;
    let (input, mean) = (Floats::filled(cuda, &e.from)?, Floats::new(cuda, e.from.len())?);
    gcn.propagate(cuda, layers, &input.buffer, &mean.buffer)?;
    let (got, contained) = mean.read(cuda)?;
    Ok(Outcome {
        operation: "lightgcn",
        case: format!("users {n_users} items {n_items} edges {edges} dim {dim} layers {layers}"),
        error: relative_error(&got, &e.want),
        limit: e.limit,
        contained,
    })
}
