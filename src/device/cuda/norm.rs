//! RMSNorm (`kernels/norm.cu`), fused with LoRA's B of the product before it.

use super::context::Cuda;
use super::error::{Result, require};
use super::launch::{Kernel, arguments};
use super::lora::Adapter;
use super::memory::{Buffer, Rows};

/// Widest row.
pub const MAX_WIDTH: usize = 8192;

/// Handles of the kernels.
#[derive(Debug)]
pub struct Norm {
    fwd: Kernel,
    bwd: Kernel,
}

fn check(x: Rows, others: &[Rows], inv_rms: &Buffer<f32>, width: usize) -> Result<()> {
    let shapes = others.iter().all(|o| o.rows >= x.rows && o.columns >= width && o.is_aligned());
    let ok = shapes && x.is_aligned() && width % 8 == 0 && width <= MAX_WIDTH && inv_rms.len() >= x.rows;
    require(ok, "rms_norm", || {
        format!("width {width} (a multiple of 8, at most {MAX_WIDTH}) on {x:?}, {others:?}, {} factors", inv_rms.len())
    })
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
        self.run(cuda, x, w, eps, h, inv_rms, lora, 0)
    }

    /// `h` again, from saved `inv_rms`.
    pub fn saved(&self, cuda: &Cuda, x: Rows, w: u64, h: Rows, inv_rms: &Buffer<f32>) -> Result<()> {
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
        inv_rms: &Buffer<f32>,
        lora: Option<Adapter>,
        reuse: i32,
    ) -> Result<()> {
        let width = h.columns;
        check(x, &[h], inv_rms, width)?;
        let lora = lora.unwrap_or(Adapter::NONE);
        let (ldx, ldh) = (x.stride as i32, h.stride as i32);
        let arguments =
            arguments![x.address, ldx, w, h.address, ldh, inv_rms.address(), width as i32, eps, reuse, lora];
        // SAFETY: the arguments are the kernel's; shapes and alignment were checked.
        unsafe { cuda.launch(self.fwd, [x.rows, 1, 1], arguments) }
    }

    /// `d_x +=` the gradient through the norm of `d_h`.
    pub fn backward(&self, cuda: &Cuda, x: Rows, w: u64, inv_rms: &Buffer<f32>, d_h: Rows, d_x: Rows) -> Result<()> {
        let width = d_h.columns;
        check(x, &[d_h, d_x], inv_rms, width)?;
        let [ldx, ldh, ldd] = [x, d_h, d_x].map(|r| r.stride as i32);
        let (inv_rms, width) = (inv_rms.address(), width as i32);
        let arguments = arguments![x.address, ldx, w, inv_rms, d_h.address, ldh, d_x.address, ldd, width];
        // SAFETY: as above.
        unsafe { cuda.launch(self.bwd, [x.rows, 1, 1], arguments) }
    }
}
