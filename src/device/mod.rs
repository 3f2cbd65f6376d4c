//! The operations a CoLLM step is made of, and their implementations.
//!
//! [`ops`] holds what every implementation shares: which rows attend to which, how a dropped element is chosen, which
//! loss is meant. [`cpu`] computes in float32, [`cuda`] on NVIDIA cards; [`inventory`] tells what a machine has. Knows nothing of LLMs or recommenders as wholes.
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
pub mod inventory;
pub mod ops;
pub mod profile;

use std::str::FromStr;

/// Where a model computes: `cpu`, `cuda`, `cuda:N`; `cuda:N:f32` takes the float32 kernels, for checking.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Device {
    /// All cores, float32.
    #[default]
    Cpu,
    /// An NVIDIA card.
    Cuda {
        /// Its number.
        ordinal: usize,
        /// Element type.
        precision: cuda::Precision,
        /// Who computes its matrix products.
        gemm: cuda::GemmChoice,
    },
}

impl Device {
    /// A card with our kernels alone.
    pub fn cuda(ordinal: usize, precision: cuda::Precision) -> Self {
        Device::Cuda { ordinal, precision, gemm: cuda::GemmChoice::Ours }
    }

    /// The same device with another choice of who computes products; the CPU has none.
    pub fn with_gemm(self, gemm: cuda::GemmChoice) -> Self {
        match self {
            Device::Cpu => self,
            Device::Cuda { ordinal, precision, .. } => Device::Cuda { ordinal, precision, gemm },
        }
    }

    /// Opens the card; nothing to open on the CPU.
    pub fn open(self) -> cuda::Result<Option<cuda::Cuda>> {
        match self {
            Device::Cpu => Ok(None),
            Device::Cuda { ordinal, precision, gemm } => {
                Ok(Some(cuda::Cuda::open(ordinal, precision)?.with_gemm(gemm)))
            }
        }
    }
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("{text:?} is not a device; devices are cpu, cuda and cuda:N");
        let mut parts = text.split(':');
        match parts.next() {
            Some("cpu") if parts.next().is_none() => Ok(Device::Cpu),
            Some("cuda") => {
                let ordinal = parts.next().map_or(Ok(0), |n| n.parse().map_err(|_| bad()))?;
                let precision = match (parts.next(), parts.next()) {
                    (None, _) | (Some("bf16"), None) => cuda::Precision::Bf16,
                    (Some("f32"), None) => cuda::Precision::F32,
                    _ => return Err(bad()),
                };
                Ok(Device::cuda(ordinal, precision))
            }
            _ => Err(bad()),
        }
    }
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Device::Cpu => write!(f, "cpu"),
            Device::Cuda { ordinal, precision: cuda::Precision::Bf16, .. } => write!(f, "cuda:{ordinal}"),
            Device::Cuda { ordinal, precision: cuda::Precision::F32, .. } => write!(f, "cuda:{ordinal}:f32"),
        }
    }
}
