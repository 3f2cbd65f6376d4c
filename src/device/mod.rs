//! The operations a CoLLM step is made of, and their implementations.
//!
//! [`ops`] holds what every implementation shares: which rows attend to which, how a dropped element is chosen, which
//! loss is meant. [`cpu`] computes in float32, [`cuda`] on NVIDIA cards. Knows nothing of LLMs or recommenders as wholes.
//!
//! | operation | forward | backward | file |
//! |---|---|---|---|
//! | matrix product with frozen weights | `C (+)= α A Wᵀ` | `C (+)= α A W`, `α Aᵀ B` | `gemm.rs` |
//! | RMSNorm | `y = x / rms(x) · w` | `d_x` added to the residual's gradient | `norm.rs` |
//! | RoPE | rotate pairs (i, i + d/2) | rotate back | `rope.rs` |
//! | attention | packed segments, prefix + causal own range, GQA | `d_q, d_k, d_v` | `attention.rs` |
//! | SwiGLU | `silu(g) · u` | `d_g, d_u` | `swiglu.rs` |
//! | LoRA | `y += s · drop(x) Aᵀ Bᵀ` | `d_A, d_B, d_x` | `lora.rs` |
//! | splice | token rows and CIE vectors into the packed input | slot gradients out | `splice.rs` |
//! | Yes head | dot with one or two vocabulary rows, loss | `d_x` | `head.rs` |
//! | LightGCN | mean of `Âˡ e`, l = 0 .. L | the same of `d_mean` | `lightgcn.rs` |

pub mod cpu;
pub mod cuda;
pub mod ops;
