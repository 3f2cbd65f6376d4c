//! The answer in one launch (`kernels/head.cu`): final norm, one or two vocabulary rows, loss, gradient.

use super::context::Cuda;
use super::error::{Result, require};
use super::launch::{Kernel, arguments};
use super::lora::Adapter;
use super::memory::{Buffer, Rows};
use super::norm::MAX_WIDTH;

/// What the head reads that does not change from batch to batch.
#[derive(Clone, Copy, Debug)]
pub struct HeadWeights {
    /// Address of the final norm's weight, `[width]`.
    pub norm: u64,
    /// Address of the vocabulary row of "Yes".
    pub yes: u64,
    /// Of "No"; 0 for the raw logit of "Yes".
    pub no: u64,
    /// Of the norm.
    pub eps: f32,
}

/// What a training pass adds.
#[derive(Clone, Copy, Debug)]
pub struct HeadTraining<'a> {
    /// `[n]`.
    pub labels: &'a Buffer<f32>,
    /// Factor of each row's gradient, `[n]`.
    pub weights: &'a Buffer<f32>,
    /// Written, `[n]`.
    pub losses: &'a Buffer<f32>,
    /// Written, `[n, width]`.
    pub d_x: Rows,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Arguments {
    x: u64,
    w: u64,
    yes: u64,
    no: u64,
    labels: u64,
    weights: u64,
    scores: u64,
    losses: u64,
    d_x: u64,
    y: u64,
    ldx: i32,
    ldd: i32,
    width: i32,
    eps: f32,
    lora: Adapter,
}

/// Handle of the kernel.
#[derive(Debug)]
pub struct Head {
    kernel: Kernel,
}

impl Head {
    /// Resolves the kernel.
    pub fn new(cuda: &Cuda) -> Result<Self> {
        Ok(Head { kernel: cuda.kernel("head", "yes_head", 256, 0)? })
    }

    /// Scores of `x: [n, ≥ width]` (its adapter's u in the same rows), `y: [n, width]` the normed states if wanted, and with
    /// `training` losses and the gradient of x.
    #[allow(clippy::too_many_arguments)] // one operation, its operands
    pub fn run(
        &self,
        cuda: &Cuda,
        weights: HeadWeights,
        x: Rows,
        width: usize,
        lora: Option<Adapter>,
        scores: &Buffer<f32>,
        y: Option<Rows>,
        training: Option<HeadTraining>,
    ) -> Result<()> {
        let n = x.rows;
        let mut ok =
            width.is_multiple_of(8) && width <= MAX_WIDTH && x.is_aligned() && x.columns >= width && scores.len() >= n;
        ok &= y.is_none_or(|y| y.rows >= n && y.stride == width && y.is_aligned());
        ok &= training.is_none_or(|t| {
            t.labels.len() >= n
                && t.weights.len() >= n
                && t.losses.len() >= n
                && t.d_x.rows >= n
                && t.d_x.columns >= width
                && t.d_x.is_aligned()
        });
        require(ok, "yes_head", || format!("width {width} of {x:?}, y {y:?}, {training:?}"))?;
        let lora = lora.unwrap_or(Adapter::NONE);
        lora.check("yes_head", x)?;
        let a = Arguments {
            x: x.address,
            w: weights.norm,
            yes: weights.yes,
            no: weights.no,
            labels: training.map_or(0, |t| t.labels.address()),
            weights: training.map_or(0, |t| t.weights.address()),
            scores: scores.address(),
            losses: training.map_or(0, |t| t.losses.address()),
            d_x: training.map_or(0, |t| t.d_x.address),
            y: y.map_or(0, |y| y.address),
            ldx: x.stride as i32,
            ldd: training.map_or(0, |t| t.d_x.stride as i32),
            width: width as i32,
            eps: weights.eps,
            lora,
        };
        // SAFETY: the struct is the kernel's; shapes and alignment were checked.
        unsafe { cuda.launch(self.kernel, [n, 1, 1], arguments![a]) }
    }
}
