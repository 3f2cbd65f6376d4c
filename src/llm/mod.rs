//! The LLaMA-family model: architecture and weights in, the block's explicit forward and backward, LoRA, adapters out.
//! Knows nothing of datasets.

pub mod batch;
mod config;
pub mod convert;
pub mod cpu;
pub mod cuda;
pub mod dequant;
mod error;
pub mod gguf;
mod gguf_tokenizer;
pub mod model;
pub mod peft;
pub mod prefix_cache;
mod prefix_file;
pub(crate) mod random;
pub mod sharing;
pub mod verify;
pub mod weights;

pub use config::{Architecture, ModelConfig, RopeScaling};
pub use error::Error;
