//! LoRA's own kernels (`kernels/lora.cu`, `kernels/swiglu.cu`): packing masters, `d_u`, gradients, SwiGLU with adapters.

use super::context::Cuda;
use super::error::{Result, require};
use super::launch::{Kernel, arguments};
use super::mask::MaskLayout;
use super::memory::{Buffer, Rows};

/// Largest padded rank.
pub const MAX_RANK: usize = 64;
/// Columns a block of the gradient kernel sums.
const COLUMNS: usize = 128;

/// An adapter for the kernel that reads a product's rows: where u lies in them, and B, packed and transposed: `[rank, out]`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Adapter {
    column: i32,
    rank: i32,
    b: u64,
}

impl Adapter {
    pub(super) const NONE: Adapter = Adapter { column: 0, rank: 0, b: 0 };

    /// u in columns `column..column + rank`; `b`: address of packed B.
    pub fn new(column: usize, rank: usize, b: u64) -> Self {
        Adapter { column: column as i32, rank: rank as i32, b }
    }

    /// u lies within `rows`, at a 16-byte boundary.
    pub(super) fn check(&self, operation: &'static str, rows: Rows) -> Result<()> {
        let end = self.column + self.rank;
        let ok = end as usize <= rows.columns && self.column % 8 == 0 && self.rank % 8 == 0;
        require(ok, operation, || format!("{self:?} of {rows:?}: u lies in multiples of 8 columns"))
    }
}

/// One matrix to pack: `to[offset + r · row_step + c · column_step] = scale · from[r, c]`, zeros up to the padded sizes.
///
/// A: steps (leading dimension, 1). B is transposed to `[rank, out]`: steps (1, out), or (2, out) with offset 0 or 1 where gate and
/// up lie in turn.
#[derive(Clone, Copy, Debug, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C)]
pub struct Pack {
    /// Address of float32 `[rows, columns]`.
    pub from: u64,
    /// Address of elements.
    pub to: u64,
    /// Rows of the master.
    pub rows: i32,
    /// Columns of the master.
    pub columns: i32,
    /// Rows written.
    pub rows_padded: i32,
    /// Columns written.
    pub columns_padded: i32,
    /// Elements of `to` from one row of the master to the next.
    pub row_step: i32,
    /// From one column to the next.
    pub column_step: i32,
    /// The element of `to` of the first.
    pub offset: i32,
    /// Factor.
    pub scale: f32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Grad {
    u: u64,
    x: u64,
    mask: u64,
    partials: u64,
    ldu: i32,
    ldx: i32,
    n: i32,
    rank: i32,
    columns: i32,
    rows_per_split: i32,
    mask_layout: MaskLayout,
}

/// Dropout of the input whose gradient of A is taken.
#[derive(Clone, Copy, Debug)]
pub struct InputMask {
    /// Address of the mask, which has these rows.
    pub mask: u64,
    /// `1 / (1 − p)`.
    pub scale: f32,
}

/// Which of the gradient's columns belong to it, and where they go.
#[derive(Clone, Copy, Debug)]
pub struct GradTarget {
    /// Address of the float32 gradient: `[rank, columns]` of A, `[columns, rank]` of B.
    pub to: u64,
    /// True rank.
    pub rank: usize,
    /// The gradient of B: stored transposed.
    pub is_b: bool,
    /// Factor.
    pub scale: f32,
    /// Every `stride`-th column from `offset` on (2 where gate and up lie in turn).
    pub stride: usize,
    /// First column.
    pub offset: usize,
}

/// Handles of the kernels.
#[derive(Debug)]
pub struct Lora {
    pack: Kernel,
    d_u: Kernel,
    grad_16: Kernel,
    grad_64: Kernel,
    grad_sum: Kernel,
    swiglu: Kernel,
}

/// Rows each split of a gradient sums, for `n` rows: at most 64 splits.
fn rows_per_split(n: usize) -> usize {
    n.div_ceil(64).max(256).next_multiple_of(32)
}

impl Lora {
    /// Resolves the kernels.
    pub fn new(cuda: &Cuda) -> Result<Self> {
        Ok(Lora {
            pack: cuda.kernel("lora", "lora_pack", 256, 0)?,
            d_u: cuda.kernel("lora", "lora_d_u", 256, 0)?,
            grad_16: cuda.kernel("lora", "lora_grad_16", 128, 0)?,
            grad_64: cuda.kernel("lora", "lora_grad_64", 128, 0)?,
            grad_sum: cuda.kernel("lora", "lora_grad_sum", 256, 0)?,
            swiglu: cuda.kernel("swiglu", "swiglu_lora", 256, 0)?,
        })
    }

    /// Packs all matrices of a table in one launch.
    pub fn pack(&self, cuda: &Cuda, table: &Buffer<Pack>) -> Result<()> {
        // SAFETY: the table's owner keeps its addresses and sizes right.
        unsafe { cuda.launch(self.pack, [table.len(), 64, 1], arguments![table.address()]) }
    }

    /// `d_u = d_y B`. `d_y: [n, width]`; `b`: packed `[rank, width]`; `d_u: [n, rank]`, which may lie in the same rows.
    pub fn d_u(&self, cuda: &Cuda, d_y: Rows, b: u64, d_u: Rows) -> Result<()> {
        let ok =
            d_y.is_aligned() && d_y.columns.is_multiple_of(8) && d_u.columns.is_multiple_of(8) && d_u.rows >= d_y.rows;
        require(ok, "lora_d_u", || format!("d_y {d_y:?}, d_u {d_u:?}"))?;
        let (width, rank) = (d_y.columns as i32, d_u.columns as i32);
        let arguments = arguments![d_y.address, d_y.stride as i32, b, width, rank, d_u.address, d_u.stride as i32];
        // SAFETY: the arguments are the kernel's; shapes were checked.
        unsafe { cuda.launch(self.d_u, [d_y.rows, 1, 1], arguments) }
    }

    /// Floats of the partial sums for `n` rows of `columns` columns.
    pub fn partials(n: usize, columns: usize) -> usize {
        n.div_ceil(rows_per_split(n)) * columns.div_ceil(COLUMNS) * MAX_RANK * COLUMNS
    }

    /// `Σ_t u[t, r] · drop(x)[t, c]` added to each target's gradient. `u: [n, padded rank]`, `x: [n, columns]`.
    pub fn gradient(
        &self,
        cuda: &Cuda,
        u: Rows,
        x: Rows,
        mask: Option<InputMask>,
        partials: &Buffer<f32>,
        targets: &[GradTarget],
    ) -> Result<()> {
        let (n, rank, columns) = (u.rows, u.columns, x.columns);
        let ok = x.rows >= n && rank <= MAX_RANK && rank.is_multiple_of(8) && columns.is_multiple_of(8);
        let ok = ok && u.is_aligned() && x.is_aligned() && partials.len() >= Self::partials(n, columns);
        let ok =
            ok && targets.iter().all(|t| t.rank <= rank && t.offset < t.stride && columns.is_multiple_of(t.stride));
        require(ok, "lora_grad", || format!("u {u:?}, x {x:?}, {} partial sums, to {targets:?}", partials.len()))?;
        let per_split = rows_per_split(n);
        let (spans, splits) = (columns.div_ceil(COLUMNS), n.div_ceil(per_split));
        let arguments = Grad {
            u: u.address,
            x: x.address,
            mask: mask.map_or(0, |m| m.mask),
            partials: partials.address(),
            ldu: u.stride as i32,
            ldx: x.stride as i32,
            n: n as i32,
            rank: rank as i32,
            columns: columns as i32,
            rows_per_split: per_split as i32,
            mask_layout: MaskLayout::new(columns, n),
        };
        let kernel = if rank <= 16 { self.grad_16 } else { self.grad_64 };
        // SAFETY: the struct is the kernel's; shapes, alignment and space were checked.
        unsafe { cuda.launch(kernel, [spans, splits, 1], arguments![arguments]) }?;
        for t in targets {
            let (splits, rank, columns) = (splits as i32, t.rank as i32, columns as i32);
            let (is_b, stride, offset) = (i32::from(t.is_b), t.stride as i32, t.offset as i32);
            let partials = partials.address();
            // What is dropped is zero; what is kept takes its factor here.
            let scale = t.scale * mask.map_or(1.0, |m| m.scale);
            let arguments = arguments![partials, t.to, splits, rank, columns, is_b, scale, stride, offset];
            // SAFETY: as above; the gradient's owner gives its address and rank.
            unsafe { cuda.launch(self.grad_sum, [spans, 1, 1], arguments) }?;
        }
        Ok(())
    }

    /// `gate_up += u Bᵀ` (B `[rank, 2 · width]`, gate and up in turn), `act = silu(gate) · up`. `act: [n, width]`.
    pub fn swiglu(&self, cuda: &Cuda, gate_up: Rows, act: Rows, lora: Adapter) -> Result<()> {
        let (n, width) = (act.rows, act.columns);
        let ok = gate_up.rows >= n && gate_up.columns >= 2 * width;
        let ok = ok && gate_up.is_aligned() && act.is_aligned() && width.is_multiple_of(8);
        require(ok, "swiglu", || format!("gate_up {gate_up:?}, act {act:?}, {lora:?}"))?;
        lora.check("swiglu", gate_up)?;
        let (ld, ld_act) = (gate_up.stride as i32, act.stride as i32);
        let grid = [(2 * width).div_ceil(2048), n.div_ceil(4), 1];
        let arguments = arguments![gate_up.address, ld, act.address, ld_act, n as i32, width as i32, lora];
        // SAFETY: the arguments are the kernel's; shapes were checked.
        unsafe { cuda.launch(self.swiglu, grid, arguments) }
    }
}
