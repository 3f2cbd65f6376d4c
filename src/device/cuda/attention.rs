//! Attention over packed segments (`kernels/attention.cu`), forward and backward.
//!
//! Who attends to whom is in [`Tables`], made once a batch for all its layers.

mod tables;

pub use tables::Tables;

use super::context::{Cuda, Precision};
use super::error::{Error, Result, require};
use super::launch::{Kernel, arguments};
use super::memory::{Buffer, Rows};
use crate::device::ops::HeadShape;

/// Head widths of the kernels: (width, forward, d_q, d_kv), bf16 and float32.
type Width = (usize, &'static str, &'static str, &'static str);
const WIDTHS: [Width; 3] = [
    (32, "attention_forward_32", "attention_d_q_32", "attention_d_kv_32"),
    (64, "attention_forward_64", "attention_d_q_64", "attention_d_kv_64"),
    (128, "attention_forward_128", "attention_d_q_128", "attention_d_kv_128"),
];

/// OWN and OTHER of attention.cu: rows of a tile, and rows of a step of its walk.
fn tile_rows(precision: Precision) -> (usize, usize) {
    match precision {
        Precision::Bf16 => (64, 32),
        Precision::F32 => (32, 16),
    }
}

/// The kernels' struct of the same name.
#[repr(C)]
#[derive(Clone, Copy)]
struct Arguments {
    query_tiles: u64,
    key_tiles: u64,
    readers: u64,
    q: u64,
    k: u64,
    v: u64,
    out: u64,
    d_out: u64,
    d_q: u64,
    d_k: u64,
    d_v: u64,
    lse: u64,
    delta: u64,
    ld_q: i32,
    ld_k: i32,
    ld_v: i32,
    ld_out: i32,
    ld_d_out: i32,
    ld_d_q: i32,
    ld_d_k: i32,
    ld_d_v: i32,
    n_q: i32,
    n_heads: i32,
    n_lse: i32,
    group: i32,
    head_dim: i32,
    first: i32,
    scale: f32,
}

/// Handles of the kernels for one head width.
#[derive(Debug)]
pub struct Attention {
    head_dim: usize,
    forward: Kernel,
    delta: Kernel,
    d_q: Kernel,
    d_kv: Kernel,
}

/// Operands of [`Attention::backward`]. Query rows are those of the backward segments, key rows those of the forward.
#[derive(Clone, Copy, Debug)]
pub struct Backward<'a> {
    /// `[n_q, q_width]`.
    pub q: Rows,
    /// `[n_kv, kv_width]`.
    pub k: Rows,
    /// `[n_kv, kv_width]`.
    pub v: Rows,
    /// What the forward returned, `[n_q, q_width]`.
    pub out: Rows,
    /// What the forward returned, `[n_heads, queries of the forward]`.
    pub lse: &'a Buffer<f32>,
    /// The query of the forward that is query row 0.
    pub lse_first: usize,
    /// `[n_q, q_width]`.
    pub d_out: Rows,
    /// Scratch for `[n_heads, n_q]`.
    pub delta: &'a Buffer<f32>,
    /// Set for the queries of the backward segments, `[n_q, q_width]`.
    pub d_q: Rows,
    /// Set for all key rows from `first` on, zero where nobody reads: `[n_kv − first, kv_width]`.
    pub d_k: Rows,
    /// As `d_k`.
    pub d_v: Rows,
}

impl Attention {
    /// Resolves the kernels. `head_dim`: a multiple of 8, at most 128.
    pub fn new(cuda: &Cuda, head_dim: usize) -> Result<Self> {
        let precision = cuda.precision();
        // The float32 build has no 32.
        let narrowest = if precision == Precision::F32 { 64 } else { 0 };
        let fitting = WIDTHS.into_iter().find(|w| w.0 >= head_dim.max(narrowest));
        let (width, forward, d_q, d_kv) =
            fitting.filter(|_| head_dim > 0 && head_dim.is_multiple_of(8)).ok_or_else(|| Error::Operand {
                operation: "attention",
                what: format!("head_dim is {head_dim}; the kernels take multiples of 8 up to 128"),
            })?;
        let (own, other) = tile_rows(precision);
        let threads = 2 * own as u32;
        let shared_bytes =
            |own_tiles: usize| (own_tiles * own + 4 * other) * (width + precision.vec()) * precision.bytes();
        Ok(Attention {
            head_dim,
            forward: cuda.kernel("attention", forward, threads, shared_bytes(1))?,
            delta: cuda.kernel("attention", "attention_delta", threads, 0)?,
            d_q: cuda.kernel("attention", d_q, threads, shared_bytes(2))?,
            d_kv: cuda.kernel("attention", d_kv, threads, shared_bytes(2) + 4 * other * size_of::<f32>())?,
        })
    }

    /// `out: [n_q, q_width]` and `lse: [n_heads, n_q]` (natural logarithm of Σ exp(scores)) from `q: [n_q, q_width]` and
    /// `k, v: [n_kv, kv_width]`, for the forward segments of `tables`.
    #[allow(clippy::too_many_arguments)] // one operation, its operands
    pub fn forward(
        &self,
        cuda: &Cuda,
        shape: HeadShape,
        tables: &Tables,
        q: Rows,
        k: Rows,
        v: Rows,
        out: Rows,
        lse: &Buffer<f32>,
    ) -> Result<()> {
        let plan = &tables.plan;
        let mut a = self.arguments(cuda, shape, plan.n_q, plan.n_q, plan.n_kv, q, k, v)?;
        fits("out", cuda, out, plan.n_q, shape.q_width())?;
        holds("lse", lse.len(), plan.n_q * shape.n_heads)?;
        (a.out, a.ld_out, a.lse) = (out.address, out.stride as i32, lse.address());
        a.query_tiles = tables.query_tiles();
        // SAFETY: the struct is the kernel's; the operands were checked to hold the rows that the tables name.
        unsafe { cuda.launch(self.forward, [shape.n_heads, plan.query_tiles.len(), 1], arguments![a]) }
    }

    /// Gradients of [`Self::forward`] for the backward segments of `tables`.
    pub fn backward(&self, cuda: &Cuda, shape: HeadShape, tables: &Tables, b: &Backward) -> Result<()> {
        let plan = &tables.plan;
        let n_q = plan.gradient_n_q;
        let mut a = self.arguments(cuda, shape, n_q, plan.n_q, plan.n_kv, b.q, b.k, b.v)?;
        for (name, rows) in [("out", b.out), ("d_out", b.d_out), ("d_q", b.d_q)] {
            fits(name, cuda, rows, n_q, shape.q_width())?;
        }
        for (name, rows) in [("d_k", b.d_k), ("d_v", b.d_v)] {
            fits(name, cuda, rows, plan.gradient_n_kv, shape.kv_width())?;
            // Further rows would not be set.
            require(rows.rows == plan.gradient_n_kv, "attention", || {
                format!(
                    "{name} has {} rows; the segments have {} from the first gradient on",
                    rows.rows, plan.gradient_n_kv
                )
            })?;
        }
        holds("lse", b.lse.len(), plan.n_q * shape.n_heads)?;
        require(b.lse_first + n_q <= plan.n_q, "attention", || {
            format!("gradients of {n_q} queries from {} on; the forward had {}", b.lse_first, plan.n_q)
        })?;
        holds("delta", b.delta.len(), n_q * shape.n_heads)?;
        (a.out, a.ld_out) = (b.out.address, b.out.stride as i32);
        (a.d_out, a.ld_d_out) = (b.d_out.address, b.d_out.stride as i32);
        (a.d_q, a.ld_d_q) = (b.d_q.address, b.d_q.stride as i32);
        (a.d_k, a.ld_d_k) = (b.d_k.address, b.d_k.stride as i32);
        (a.d_v, a.ld_d_v) = (b.d_v.address, b.d_v.stride as i32);
        (a.lse, a.delta) = (b.lse.at(b.lse_first), b.delta.address());
        a.first = plan.first as i32;
        a.query_tiles = tables.gradient_tiles();
        (a.key_tiles, a.readers) = (tables.key_tiles(), tables.readers());
        let deltas = (n_q * shape.n_heads).div_ceil(self.delta.threads as usize / 8);
        // SAFETY: the struct is the kernels'; the operands were checked to hold the rows that the tables name.
        unsafe {
            cuda.launch(self.delta, [deltas, 1, 1], arguments![a])?;
            cuda.launch(self.d_q, [shape.n_heads, plan.gradient_tiles.len(), 1], arguments![a])?;
            cuda.launch(self.d_kv, [shape.n_kv_heads, plan.key_tiles.len(), 1], arguments![a])
        }
    }

    #[allow(clippy::too_many_arguments)] // one operation, its operands
    fn arguments(
        &self,
        cuda: &Cuda,
        shape: HeadShape,
        n_q: usize,
        n_lse: usize,
        n_kv: usize,
        q: Rows,
        k: Rows,
        v: Rows,
    ) -> Result<Arguments> {
        let heads =
            shape.n_kv_heads > 0 && shape.n_heads.is_multiple_of(shape.n_kv_heads) && shape.head_dim == self.head_dim;
        require(heads, "attention", || format!("{shape:?} for kernels of head_dim {}", self.head_dim))?;
        require(n_q * shape.n_heads <= i32::MAX as usize, "attention", || {
            format!("{n_q} queries of {} heads are too many for one launch", shape.n_heads)
        })?;
        fits("q", cuda, q, n_q, shape.q_width())?;
        fits("k", cuda, k, n_kv, shape.kv_width())?;
        fits("v", cuda, v, n_kv, shape.kv_width())?;
        Ok(Arguments {
            query_tiles: 0,
            key_tiles: 0,
            readers: 0,
            q: q.address,
            k: k.address,
            v: v.address,
            out: 0,
            d_out: 0,
            d_q: 0,
            d_k: 0,
            d_v: 0,
            lse: 0,
            delta: 0,
            ld_q: q.stride as i32,
            ld_k: k.stride as i32,
            ld_v: v.stride as i32,
            ld_out: 0,
            ld_d_out: 0,
            ld_d_q: 0,
            ld_d_k: 0,
            ld_d_v: 0,
            n_q: n_q as i32,
            n_heads: shape.n_heads as i32,
            n_lse: n_lse as i32,
            group: (shape.n_heads / shape.n_kv_heads) as i32,
            head_dim: shape.head_dim as i32,
            first: 0,
            scale: 1.0 / (shape.head_dim as f32).sqrt(),
        })
    }
}

fn fits(name: &str, cuda: &Cuda, rows: Rows, n: usize, width: usize) -> Result<()> {
    let ok = rows.rows >= n && rows.columns == width && rows.is_aligned() && rows.precision == cuda.precision();
    require(ok, "attention", || {
        format!("{name} must be [{n}, {width}] of {:?}, rows at 16-byte boundaries: {rows:?}", cuda.precision())
    })
}

fn holds(name: &str, len: usize, needed: usize) -> Result<()> {
    require(len >= needed, "attention", || format!("{name} holds {len} values; {needed} are needed"))
}
