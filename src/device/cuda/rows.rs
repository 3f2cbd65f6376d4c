//! Moving rows (`kernels/rows.cu`): the embedding splice and its gradient, gathering and scattering last positions.

use super::context::Cuda;
use super::error::{Result, require};
use super::launch::{Kernel, arguments};
use super::memory::{Buffer, Rows};

/// Handles of the kernels.
#[derive(Debug)]
pub struct RowMoves {
    splice_fwd: Kernel,
    splice_bwd: Kernel,
    gather: Kernel,
    scatter: Kernel,
    zero: Kernel,
}

fn check(what: &'static str, n: usize, index: usize, rows: &[Rows], width: usize) -> Result<()> {
    let ok = n <= index && width.is_multiple_of(8) && rows.iter().all(|r| r.is_aligned() && r.columns >= width);
    require(ok, what, || format!("{n} of {index} rows, width {width}: {rows:?}"))
}

impl RowMoves {
    /// Resolves the kernels.
    pub fn new(cuda: &Cuda) -> Result<Self> {
        let kernel = |name| cuda.kernel("rows", name, 128, 0);
        Ok(RowMoves {
            splice_fwd: kernel("splice_fwd")?,
            splice_bwd: kernel("splice_bwd")?,
            gather: kernel("gather_rows")?,
            scatter: kernel("scatter_rows")?,
            zero: kernel("zero_rows")?,
        })
    }

    /// `x[t] = embed[s]` for `s = sources[t] ≥ 0`, else `vectors[−1 − s]`. `vectors`: float32, `[n, width]`.
    pub fn splice(
        &self,
        cuda: &Cuda,
        sources: &Buffer<i32>,
        embed: Rows,
        vectors: &Buffer<f32>,
        x: Rows,
    ) -> Result<()> {
        check("splice", x.rows, sources.len(), &[embed, x], embed.columns)?;
        require(embed.stride == embed.columns, "splice", || format!("the embedding's rows lie apart: {embed:?}"))?;
        let (ldx, width) = (x.stride as i32, embed.columns as i32);
        let arguments = arguments![sources.address(), embed.address, vectors.address(), x.address, ldx, width];
        // SAFETY: the arguments are the kernel's; the batch's sources name rows of both tables (checked when it is uploaded).
        unsafe { cuda.launch(self.splice_fwd, [x.rows, 1, 1], arguments) }
    }

    /// `d_vectors[v] = d_x[rows[v]]` for the first `n` entries; zero where `rows[v]` is negative: no row reads that vector.
    pub fn splice_backward(
        &self,
        cuda: &Cuda,
        rows: &Buffer<i32>,
        n: usize,
        d_x: Rows,
        width: usize,
        d_vectors: &Buffer<f32>,
    ) -> Result<()> {
        check("splice_bwd", n, rows.len().min(d_vectors.len() / width), &[d_x], width)?;
        let arguments = arguments![rows.address(), d_x.address, d_x.stride as i32, d_vectors.address(), width as i32];
        // SAFETY: as above.
        unsafe { cuda.launch(self.splice_bwd, [n, 1, 1], arguments) }
    }

    /// `to[i] = from[rows[i]]` for every row of `to`.
    pub fn gather(&self, cuda: &Cuda, rows: &Buffer<i32>, from: Rows, to: Rows) -> Result<()> {
        check("gather_rows", to.rows, rows.len(), &[from, to], to.columns)?;
        let (ld_from, ld_to, width) = (from.stride as i32, to.stride as i32, to.columns as i32);
        let arguments = arguments![rows.address(), from.address, ld_from, to.address, ld_to, width];
        // SAFETY: as above.
        unsafe { cuda.launch(self.gather, [to.rows, 1, 1], arguments) }
    }

    /// `to[rows[i]] = from[i]`, or `+=`, for every row of `from`; no row twice.
    pub fn scatter(&self, cuda: &Cuda, rows: &Buffer<i32>, from: Rows, to: Rows, add: bool) -> Result<()> {
        check("scatter_rows", from.rows, rows.len(), &[from, to], from.columns)?;
        let (ld_from, ld_to, width) = (from.stride as i32, to.stride as i32, from.columns as i32);
        let add = i32::from(add);
        let arguments = arguments![rows.address(), from.address, ld_from, to.address, ld_to, width, add];
        // SAFETY: as above.
        unsafe { cuda.launch(self.scatter, [from.rows, 1, 1], arguments) }
    }

    /// Zeroes rows.
    pub fn zero(&self, cuda: &Cuda, to: Rows) -> Result<()> {
        check("zero_rows", to.rows, to.rows, &[to], to.columns)?;
        let (ld, width) = (to.stride as i32, to.columns as i32);
        // SAFETY: as above.
        unsafe { cuda.launch(self.zero, [to.rows, 1, 1], arguments![to.address, ld, width]) }
    }
}
