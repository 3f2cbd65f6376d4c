//! RMSNorm (`kernels/norm.cu`), fused with LoRA's B of the product before it.

use super::context::Cuda;
use super::error::{Result, require};
use super::launch::{Kernel, arguments};
use super::lora::Adapter;
use super::memory::{Buffer, Rows};

/// Widest row.
pub const MAX_WIDTH: usize = 8192;
/// Rows of a block.
const ROWS: usize = 4;

/// Handles of the kernels.
#[derive(Debug)]
pub struct Norm {
    fwd: Kernel,
    bwd: Kernel,
}

fn check(x: Rows, others: &[Rows], width: usize) -> Result<()> {
    let shapes = others.iter().all(|o| o.rows >= x.rows && o.columns >= width && o.is_aligned());
    let ok = shapes && x.columns >= width && x.is_aligned() && width.is_multiple_of(8) && width <= MAX_WIDTH;
    require(ok, "rms_norm", || format!("width {width} (a multiple of 8, at most {MAX_WIDTH}) on {x:?}, {others:?}"))
}

impl Norm {
    /// Resolves the kernels.
    pub fn new(cuda: &Cuda) -> Result<Self> {
        Ok(Norm {
            fwd: cuda.kernel("norm", "rms_norm_fwd", 256, 0)?,
            bwd: cuda.kernel("norm", "rms_norm_bwd", 256, 0)?,
        })
    }

    /// `x += u Bᵀ` if there is an adapter, then `h = x / rms(x) · w`; `inv_rms: [rows]` is saved. `w`: address of `[width]`, width
    /// that of `h`.
    #[allow(clippy::too_many_arguments)] // one operation, its operands
    pub fn forward(
        &self,
        cuda: &Cuda,
        x: Rows,
        w: u64,
        eps: f32,
        h: Rows,
        inv_rms: &Buffer<f32>,
        lora: Option<Adapter>,
    ) -> Result<()> {
        require(inv_rms.len() >= x.rows, "rms_norm", || format!("{} factors for {} rows", inv_rms.len(), x.rows))?;
        self.run(cuda, x, w, eps, h, inv_rms.address(), lora, 0)
    }

    /// `h` again, from saved factors: address of `[rows]`.
    pub fn saved(&self, cuda: &Cuda, x: Rows, w: u64, h: Rows, inv_rms: u64) -> Result<()> {
        self.run(cuda, x, w, 0.0, h, inv_rms, None, 1)
    }

    #[allow(clippy::too_many_arguments)] // one operation, its operands
    fn run(
        &self,
        cuda: &Cuda,
        x: Rows,
        w: u64,
        eps: f32,
        h: Rows,
        inv_rms: u64,
        lora: Option<Adapter>,
        reuse: i32,
    ) -> Result<()> {
        let width = h.columns;
        check(x, &[h], width)?;
        let lora = lora.unwrap_or(Adapter::NONE);
        lora.check("rms_norm", x)?;
        let (ldx, ldh) = (x.stride as i32, h.stride as i32);
        let arguments =
            arguments![x.address, ldx, w, h.address, ldh, inv_rms, x.rows as i32, width as i32, eps, reuse, lora];
        // SAFETY: the arguments are the kernel's; shapes and alignment were checked.
        unsafe { cuda.launch(self.fwd, [x.rows.div_ceil(ROWS), 1, 1], arguments) }
    }

    /// `d_x +=` the gradient through the norm of `d_h`. `inv_rms`: address of the saved factors.
    pub fn backward(&self, cuda: &Cuda, x: Rows, w: u64, inv_rms: u64, d_h: Rows, d_x: Rows) -> Result<()> {
        let width = d_h.columns;
        check(x, &[d_h, d_x], width)?;
        let [ldx, ldh, ldd] = [x, d_h, d_x].map(|r| r.stride as i32);
        let (n, width) = (x.rows as i32, width as i32);
        let arguments = arguments![x.address, ldx, w, inv_rms, d_h.address, ldh, d_x.address, ldd, n, width];
        // SAFETY: as above.
        unsafe { cuda.launch(self.bwd, [x.rows.div_ceil(ROWS), 1, 1], arguments) }
    }
}
