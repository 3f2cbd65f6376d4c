//! The operations on the CPU: float32 arithmetic, frozen weights in their file's own type, all cores.
//!
//! Rows are distributed over threads; every sum is taken in an order that does not depend on the number of threads.

use rayon::prelude::*;

use super::profile::{Group, span};

pub mod attention;
pub mod gemm;
pub mod head;
pub mod lightgcn;
pub mod lora;
pub(crate) mod microkernel;
pub mod norm;
pub mod optimizer;
mod pack;
pub mod rope;
mod shared;
mod simd;
pub mod splice;
pub mod swiglu;

/// Which instructions the matrix kernels use on this machine.
pub fn instruction_set() -> &'static str {
    match microkernel::Isa::detect() {
        microkernel::Isa::Avx512 => "AVX-512",
        microkernel::Isa::Avx2 => "AVX2 and FMA",
        microkernel::Isa::Portable => "plain instructions",
    }
}

/// `to = from`, on all threads.
pub fn copy(from: &[f32], to: &mut [f32]) {
    const CHUNK: usize = 1 << 15;
    let _span = span(Group::Elementwise, || 0.0);
    to.par_chunks_mut(CHUNK).zip(from.par_chunks(CHUNK)).for_each(|(to, from)| to.copy_from_slice(from));
}

/// Rows of a task in row-wise operations: enough work to be worth handing over.
const ROWS_PER_TASK: usize = 16;
