//! AdamW, and Adam with coupled L2, over all trained tensors (`kernels/optimizer.cu`), after clipping by the global norm.
//!
//! The arithmetic is that of [`crate::device::cpu::optimizer`], whose state this one's can be turned into and made from: a
//! checkpoint does not tell where it was trained. A step is three launches, none of which waits for the host.

use bytemuck::{Pod, Zeroable};

use super::context::Cuda;
use super::error::{Result, require};
use super::launch::{Kernel, arguments};
use super::memory::Buffer;
use crate::device::cpu::optimizer::{Adam, Decay};

const THREADS: u32 = 256;
/// Elements a block updates.
const CHUNK: usize = 4096;
const BETA1: f64 = 0.9;
const BETA2: f64 = 0.999;

/// A trained tensor: float32 weights and gradient, which stay where they are as long as the optimizer lives.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Trained {
    /// Address of the weights, a multiple of 16 bytes.
    pub weights: u64,
    /// Address of the gradient, a multiple of 16 bytes.
    pub gradient: u64,
    /// Elements.
    pub len: usize,
    /// Weight decay.
    pub decay: f64,
}

impl Trained {
    /// A whole buffer and its gradient.
    pub fn new(weights: &Buffer<f32>, gradient: &Buffer<f32>, decay: f64) -> Self {
        let len = weights.len().min(gradient.len());
        Trained { weights: weights.address(), gradient: gradient.address(), len, decay }
    }
}

/// What one step is told.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// Learning rate.
    pub lr: f64,
    /// Factor of the accumulated gradients; the norm is that of the scaled ones.
    pub scale: f32,
    /// Largest global norm; infinity for no clipping.
    pub max_norm: f64,
    /// Leave the gradients zero.
    pub zero_gradients: bool,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Chunk {
    w: u64,
    g: u64,
    m: u64,
    v: u64,
    decay: f64,
    n: u32,
    _padding: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Numbers {
    lr: f64,
    scale: f32,
    step_size: f32,
    correction: f32,
    coupled: i32,
    zero: i32,
    _padding: i32,
}

/// Moments, the table of chunks, and the kernels' handles.
#[derive(Debug)]
pub struct Optimizer {
    norm_kernel: Kernel,
    finish_kernel: Kernel,
    adam_kernel: Kernel,
    decay: Decay,
    step: u64,
    lengths: Vec<usize>,
    m: Buffer<f32>,
    v: Buffer<f32>,
    chunks: Buffer<Chunk>,
    partial: Buffer<f64>,
    /// The norm of the last step, and the factor of its gradients.
    norm: Buffer<f64>,
    /// What changes from step to step.
    numbers: Buffer<Numbers>,
}

/// Elements a tensor's moments take: the next tensor's begin at a 16-byte boundary.
fn padded(len: usize) -> usize {
    len.next_multiple_of(4)
}

impl Optimizer {
    /// Zero moments for `tensors`.
    pub fn new(cuda: &Cuda, decay: Decay, tensors: &[Trained]) -> Result<Self> {
        for (i, t) in tensors.iter().enumerate() {
            let aligned = t.weights.is_multiple_of(16) && t.gradient.is_multiple_of(16);
            require(aligned, "optimizer", || format!("tensor {i} does not lie at a 16-byte boundary: {t:?}"))?;
        }
        let total = tensors.iter().map(|t| padded(t.len)).sum();
        let m: Buffer<f32> = Buffer::zeros(cuda, total, "first moments")?;
        let v: Buffer<f32> = Buffer::zeros(cuda, total, "second moments")?;
        let mut chunks = Vec::new();
        let mut at = 0;
        for t in tensors {
            for first in (0..t.len).step_by(CHUNK) {
                let bytes = (first * size_of::<f32>()) as u64;
                chunks.push(Chunk {
                    w: t.weights + bytes,
                    g: t.gradient + bytes,
                    m: m.at(at + first),
                    v: v.at(at + first),
                    decay: t.decay,
                    n: (t.len - first).min(CHUNK) as u32,
                    _padding: 0,
                });
            }
            at += padded(t.len);
        }
        Ok(Optimizer {
            norm_kernel: cuda.kernel("optimizer", "grad_norm", THREADS, 0)?,
            finish_kernel: cuda.kernel("optimizer", "grad_norm_finish", THREADS, 0)?,
            adam_kernel: cuda.kernel("optimizer", "adam", THREADS, 0)?,
            decay,
            step: 0,
            lengths: tensors.iter().map(|t| t.len).collect(),
            m,
            v,
            partial: Buffer::new(cuda, chunks.len(), "partial norms")?,
            chunks: Buffer::from_host(cuda, &chunks, "the optimizer's table")?,
            norm: Buffer::zeros(cuda, 2, "the gradient's norm")?,
            numbers: Buffer::new(cuda, 1, "a step's numbers")?,
        })
    }

    /// Clips and applies the gradients. Where their norm is not finite, weights, moments and gradients stay as they are.
    pub fn step(&mut self, cuda: &Cuda, step: Step) -> Result<()> {
        self.begin_step(cuda, step)?;
        self.launch(cuda, step.scale, step.max_norm)
    }

    /// The first half of [`Self::step`]: counts it, and uploads what is different in it.
    pub fn begin_step(&mut self, cuda: &Cuda, step: Step) -> Result<()> {
        self.step += 1;
        let t = self.step as i32;
        let numbers = Numbers {
            lr: step.lr,
            scale: step.scale,
            step_size: (step.lr / (1.0 - BETA1.powi(t))) as f32,
            correction: (1.0 - BETA2.powi(t)).sqrt() as f32,
            coupled: i32::from(self.decay == Decay::Coupled),
            zero: i32::from(step.zero_gradients),
            _padding: 0,
        };
        self.numbers.upload(cuda, &[numbers])
    }

    /// The second half of [`Self::step`]: its kernels, the same ones for every step of equal `scale` and `max_norm`.
    pub fn launch(&self, cuda: &Cuda, scale: f32, max_norm: f64) -> Result<()> {
        let n = self.chunks.len();
        let (chunks, partial, norm) = (self.chunks.address(), self.partial.address(), self.norm.address());
        let (count, scale, max, numbers) = (n as i32, f64::from(scale), max_norm, self.numbers.address());
        // SAFETY: the arguments are the kernels'; the table was built from whole tensors, which the caller keeps alive, and from
        // this object's moments; `partial` has a value a chunk.
        unsafe {
            cuda.launch(self.norm_kernel, [n, 1, 1], arguments![chunks, partial])?;
            cuda.launch(self.finish_kernel, [1, 1, 1], arguments![partial, norm, count, scale, max])?;
            cuda.launch(self.adam_kernel, [n, 1, 1], arguments![chunks, norm, numbers])
        }
    }

    /// Bytes of what is kept for tensors of these lengths.
    pub fn bytes(lengths: impl Iterator<Item = usize>) -> usize {
        let tensor = |len: usize| 2 * padded(len) * size_of::<f32>() + len.div_ceil(CHUNK) * (size_of::<Chunk>() + 8);
        lengths.map(tensor).sum::<usize>() + 2 * 8 + size_of::<Numbers>()
    }

    /// The global norm of the last step's gradients before clipping; waits for that step. If it is not finite, no step was taken.
    pub fn norm(&self, cuda: &Cuda) -> Result<f64> {
        Ok(self.norm.download(cuda, 1)?[0])
    }

    /// Steps taken, those that changed nothing included.
    pub fn steps(&self) -> u64 {
        self.step
    }

    /// The state as the CPU's optimizer has it.
    pub fn state(&self, cuda: &Cuda) -> Result<Adam> {
        let split = |all: Vec<f32>| -> Vec<Vec<f32>> {
            let mut rest = all.as_slice();
            let mut part = |n: usize| {
                let (moments, after) = rest.split_at(padded(n));
                rest = after;
                moments[..n].to_vec()
            };
            self.lengths.iter().map(|&n| part(n)).collect()
        };
        let (m, v) = (self.m.download(cuda, self.m.len())?, self.v.download(cuda, self.v.len())?);
        Ok(Adam { decay: self.decay, step: self.step, m: split(m), v: split(v) })
    }

    /// Takes over what [`Self::state`] gave, or the CPU's optimizer.
    pub fn restore(&mut self, cuda: &Cuda, state: &Adam) -> Result<()> {
        let fits = |moments: &[Vec<f32>]| moments.iter().map(Vec::len).eq(self.lengths.iter().copied());
        require(fits(&state.m) && fits(&state.v) && state.decay == self.decay, "optimizer", || {
            format!("{:?} moments of {} tensors for {:?} of {:?}", state.decay, state.m.len(), self.decay, self.lengths)
        })?;
        let join = |moments: &[Vec<f32>]| -> Vec<f32> {
            let padding = |m: &Vec<f32>| std::iter::repeat_n(0.0, padded(m.len()) - m.len());
            moments.iter().flat_map(|m| m.iter().copied().chain(padding(m))).collect()
        };
        self.m.upload(cuda, &join(&state.m))?;
        self.v.upload(cuda, &join(&state.v))?;
        self.step = state.step;
        Ok(())
    }
}
