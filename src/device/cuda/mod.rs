//! The operations on NVIDIA cards: handwritten kernels (`kernels/*.cu`), bf16 elements, float32 sums.
//!
//! [`context`] opens a card and loads the kernels, [`memory`] holds buffers, [`launch`] starts kernels. Every other file is
//! one operation: its handles, resolved once, and one checked function a kernel. The float32 build of the same kernels
//! ([`Precision::F32`]) tells a mistake from rounding. Knows nothing of LLMs and recommenders.

pub mod attention;
pub mod context;
mod cublaslt;
pub mod error;
mod events;
pub mod gemm;
mod gemm_choice;
mod gemm_sm90;
pub mod graph;
pub mod head;
pub mod launch;
pub mod lightgcn;
pub mod lora;
pub mod mapping;
pub mod mask;
pub mod memory;
pub mod mf;
pub mod norm;
pub mod optimizer;
pub mod rope;
pub mod rows;
mod staging;
mod tensor_map;

pub use context::{Cuda, Precision};
pub use error::{Error, Result};
pub use gemm_choice::GemmChoice;
pub use memory::{Buffer, Rows, Scalar};
