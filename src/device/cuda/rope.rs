//! Rotary embedding fused with LoRA's B (`kernels/rope.cu`).

use super::context::Cuda;
use super::error::{Result, require};
use super::launch::{Kernel, arguments};
use super::lora::Adapter;
use super::memory::{Buffer, Rows};

const ROWS: usize = 4;
const MAX_HALF: usize = 128;

/// One part of a row: heads side by side.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Part {
    column: i32,
    heads: i32,
    turned: i32,
    lora: Adapter,
}

impl Part {
    const NONE: Part = Part { column: 0, heads: 0, turned: 0, lora: Adapter::NONE };

    /// Heads whose pairs are turned (q, k).
    pub fn turned(column: usize, heads: usize, lora: Option<Adapter>) -> Self {
        Part { column: column as i32, heads: heads as i32, turned: 1, lora: lora.unwrap_or(Adapter::NONE) }
    }

    /// Heads that only take their adapter (v).
    pub fn plain(column: usize, heads: usize, lora: Option<Adapter>) -> Self {
        Part { turned: 0, ..Part::turned(column, heads, lora) }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Arguments {
    rows: u64,
    positions: u64,
    table: u64,
    ld: i32,
    n: i32,
    head_dim: i32,
    parts: [Part; 3],
}

/// Handles of the kernels and the table of angles.
#[derive(Debug)]
pub struct Rope {
    fwd: Kernel,
    bwd: Kernel,
    head_dim: usize,
    table: Buffer<[f32; 2]>,
}

impl Rope {
    /// Resolves the kernels for heads of `2 · inv_freq.len()` elements and makes the table for `n_positions` positions.
    pub fn new(cuda: &Cuda, inv_freq: &[f64], n_positions: usize) -> Result<Self> {
        let half = inv_freq.len();
        let ok = half.is_multiple_of(4) && half <= MAX_HALF;
        require(ok, "rope", || format!("head_dim {} must be a multiple of 8, at most {}", 2 * half, 2 * MAX_HALF))?;
        let angles = (0..n_positions).flat_map(|p| {
            inv_freq.iter().map(move |f| {
                let angle = p as f64 * f;
                [angle.cos() as f32, angle.sin() as f32]
            })
        });
        let table = Buffer::from_host(cuda, &angles.collect::<Vec<_>>(), "the table of rotary angles")?;
        let names = if half.is_multiple_of(8) { ["rope_fwd_8", "rope_bwd_8"] } else { ["rope_fwd_4", "rope_bwd_4"] };
        let [fwd, bwd] = names.map(|name| cuda.kernel("rope", name, 256, 0));
        Ok(Rope { fwd: fwd?, bwd: bwd?, head_dim: 2 * half, table })
    }

    /// In place on `rows`: each part takes its adapter, then turns. `positions`: address of one u32 a row.
    pub fn forward(&self, cuda: &Cuda, rows: Rows, positions: u64, parts: &[Part]) -> Result<()> {
        self.run(cuda, self.fwd, rows, positions, parts)
    }

    /// In place on gradients: each part turns back, then `d_u = d_y B` is written where u lies.
    pub fn backward(&self, cuda: &Cuda, rows: Rows, positions: u64, parts: &[Part]) -> Result<()> {
        self.run(cuda, self.bwd, rows, positions, parts)
    }

    fn run(&self, cuda: &Cuda, kernel: Kernel, rows: Rows, positions: u64, parts: &[Part]) -> Result<()> {
        let fits = |p: &Part| (p.column + p.heads * self.head_dim as i32) as usize <= rows.columns && p.column % 8 == 0;
        require(parts.len() <= 3 && parts.iter().all(fits) && rows.is_aligned(), "rope", || {
            format!("parts {parts:?} of heads of {} do not fit {rows:?}", self.head_dim)
        })?;
        parts.iter().try_for_each(|p| p.lora.check("rope", rows))?;
        let mut three = [Part::NONE; 3];
        three[..parts.len()].copy_from_slice(parts);
        let arguments = Arguments {
            rows: rows.address,
            positions,
            table: self.table.address(),
            ld: rows.stride as i32,
            n: rows.rows as i32,
            head_dim: self.head_dim as i32,
            parts: three,
        };
        // SAFETY: the struct is the kernel's, and the parts lie within the rows; positions are below the table's length, which
        // the caller sized for the longest prompt.
        unsafe { cuda.launch(kernel, [rows.rows.div_ceil(ROWS), 1, 1], arguments![arguments]) }
    }
}
