//! The model on an NVIDIA card: weights as the kernels' elements, its blocks forward and backward through fused operations.
//!
//! Every product with a frozen weight carries its adapters along (`[W; A]` as one operand): its output rows are
//! `[y | u of each adapter]`, and the kernel that reads them next (RoPE, the norm, SwiGLU) adds `u Bᵀ`. Backward, rows are
//! `[d_y | d_u]` and one product gives `d_y W + d_u A`. Gate and up rows lie in turn, so that SwiGLU is an epilogue.

mod adapter;
mod backward;
mod filling;
mod forward;
mod graphs;
mod mapping;
mod model;
mod plan;
mod training;
mod workspace;

pub use graphs::Counts;
pub use model::Model;
pub use plan::{Demand, Plan, Recompute};
pub use training::{MicroBatch, Rules, Training};
pub use workspace::Workspace;
