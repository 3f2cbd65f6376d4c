//! Masks of LoRA's dropout (`kernels/mask.cu`): the elements that [`crate::device::ops::Dropout`] drops, a bit each.

use super::context::Cuda;
use super::error::{Result, require};
use super::launch::{Kernel, arguments};
use super::memory::Buffer;
use crate::device::ops::Dropout;

/// Rows and words that a block makes.
const ROWS: usize = 32;
const WORDS: usize = 2;

/// Handle of the kernel.
#[derive(Debug)]
pub struct Mask {
    kernel: Kernel,
}

/// What the kernel is told of a [`Dropout`]; it reads it from memory.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Numbers {
    key: [u32; 2],
    step: u32,
    threshold: u32,
}

/// `MaskLayout` of `kernels/include/mask.cuh`: word `i / 32` of a quarter, bit `i % 32`, is feature `i` of it; words of neighbouring
/// rows are neighbours.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct MaskLayout {
    words: i32,
    quarter: i32,
    rows: i32,
}

impl MaskLayout {
    /// Of a mask of `rows` rows of `width` features.
    pub fn new(width: usize, rows: usize) -> Self {
        let quarter = width.div_ceil(4);
        MaskLayout { words: quarter.div_ceil(32) as i32, quarter: quarter as i32, rows: rows as i32 }
    }
}

impl Numbers {
    /// Of one step.
    pub fn of(dropout: &Dropout) -> Self {
        Numbers { key: dropout.key(), step: dropout.step as u32, threshold: dropout.threshold() }
    }

    /// On the card.
    pub fn upload(cuda: &Cuda, dropout: &Dropout) -> Result<Buffer<Numbers>> {
        Buffer::from_host(cuda, &[Numbers::of(dropout)], "dropout's numbers")
    }
}

/// 32-bit words of a mask row for `width` features.
pub fn mask_words(width: usize) -> usize {
    4 * width.div_ceil(4).div_ceil(32)
}

impl Mask {
    /// Resolves the kernel.
    pub fn new(cuda: &Cuda) -> Result<Self> {
        Ok(Mask { kernel: cuda.kernel("mask", "dropout_mask", 256, 0)? })
    }

    /// The mask of LoRA module `module` for `rows` rows: `dropout: [1]`, `tokens: [rows]`, `out: [mask_words(width), rows]`.
    #[allow(clippy::too_many_arguments)] // one operation, its operands
    pub fn run(
        &self,
        cuda: &Cuda,
        dropout: &Buffer<Numbers>,
        module: u32,
        tokens: &Buffer<u32>,
        first: usize,
        rows: usize,
        width: usize,
        out: &Buffer<u32>,
    ) -> Result<()> {
        let words = mask_words(width) / 4;
        let fits = dropout.len() == 1
            && first + rows <= tokens.len()
            && rows * 4 * words <= out.len()
            && rows * words < 1 << 30;
        require(fits, "dropout_mask", || {
            format!("{rows} rows from {first} of {} into {} words", tokens.len(), out.len())
        })?;
        let (tokens, numbers, out) = (tokens.at(first), dropout.address(), out.address());
        let arguments = arguments![tokens, out, numbers, module, words as i32, rows as i32];
        // SAFETY: the arguments are the kernel's, and the buffers were checked to hold them.
        unsafe { cuda.launch(self.kernel, [rows.div_ceil(ROWS), words.div_ceil(WORDS), 1], arguments) }
    }
}
