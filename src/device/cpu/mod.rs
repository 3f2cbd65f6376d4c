//! The operations on the CPU: float32 arithmetic, frozen weights in their file's own type, all cores.
//!
//! Rows are distributed over threads; every sum is taken in an order that does not depend on the number of threads.

pub mod attention;
pub mod gemm;
pub mod head;
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

/// Rows of a task in row-wise operations: enough work to be worth handing over.
const ROWS_PER_TASK: usize = 16;
