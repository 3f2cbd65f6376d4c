//! LightGCN's propagation (`kernels/lightgcn.cu`): the mean of all layers over a normalised adjacency, a launch a layer.
//!
//! [`crate::device::cpu::lightgcn`] owns the adjacency and says what is computed.

use super::context::Cuda;
use super::error::{Result, require};
use super::launch::{Kernel, arguments};
use super::memory::Buffer;
use super::mf::lanes;
use crate::device::cpu::lightgcn::Adjacency;

const THREADS: usize = 256;

#[repr(C)]
#[derive(Clone, Copy)]
struct Layer {
    starts: u64,
    columns: u64,
    values: u64,
    from: u64,
    to: u64,
    first: u64,
    mean: u64,
    scale: f32,
    nodes: i32,
    dim: i32,
    lanes: i32,
}

/// The kernel, the graph on the device, and two layers of `[nodes, dim]`.
#[derive(Debug)]
pub struct LightGcn {
    kernel: Kernel,
    nodes: usize,
    dim: usize,
    starts: Buffer<u32>,
    columns: Buffer<u32>,
    values: Buffer<f32>,
    layers: [Buffer<f32>; 2],
}

impl LightGcn {
    /// Uploads the graph. Vectors are `dim` wide, a multiple of 4.
    pub fn new(cuda: &Cuda, graph: &Adjacency, dim: usize) -> Result<Self> {
        let nodes = graph.nodes();
        require(dim > 0 && dim.is_multiple_of(4), "lightgcn", || format!("a width of {dim} is not a multiple of 4"))?;
        Ok(LightGcn {
            kernel: cuda.kernel("lightgcn", "lightgcn_layer", THREADS as u32, 0)?,
            nodes,
            dim,
            starts: Buffer::from_host(cuda, &graph.starts, "the graph")?,
            columns: Buffer::from_host(cuda, &graph.columns, "the graph")?,
            values: Buffer::from_host(cuda, &graph.values, "the graph")?,
            layers: [
                Buffer::new(cuda, nodes * dim, "layers of the graph")?,
                Buffer::new(cuda, nodes * dim, "layers of the graph")?,
            ],
        })
    }

    /// `mean = (e_0 + … + e_layers) / (layers + 1)`, users then items, `[nodes, dim]`; `layers` at least 1. With the gradient of the
    /// mean as `from`, `mean` becomes the gradient of e_0.
    pub fn propagate(&self, cuda: &Cuda, layers: usize, from: &Buffer<f32>, mean: &Buffer<f32>) -> Result<()> {
        let values = self.nodes * self.dim;
        let fits = from.len() >= values && mean.len() >= values && from.address() != mean.address();
        require(fits && layers > 0, "lightgcn", || {
            format!("{layers} layers from {} to {} values for {} x {}", from.len(), mean.len(), self.nodes, self.dim)
        })?;
        let lanes = lanes(self.dim);
        let blocks = (self.nodes << lanes).div_ceil(THREADS);
        for l in 0..layers {
            let last = l + 1 == layers;
            let layer = Layer {
                starts: self.starts.address(),
                columns: self.columns.address(),
                values: self.values.address(),
                from: if l == 0 { from.address() } else { self.layers[(l - 1) % 2].address() },
                to: if last { 0 } else { self.layers[l % 2].address() },
                first: if l == 0 { from.address() } else { 0 },
                mean: mean.address(),
                scale: if last { 1.0 / (layers + 1) as f32 } else { 1.0 },
                nodes: self.nodes as i32,
                dim: self.dim as i32,
                lanes: lanes as i32,
            };
            // SAFETY: the struct is the kernel's; all buffers hold [nodes, dim], and the graph's columns are nodes.
            unsafe { cuda.launch(self.kernel, [blocks, 1, 1], arguments![layer]) }?;
        }
        Ok(())
    }
}
