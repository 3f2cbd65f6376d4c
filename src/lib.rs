//! collm-engine: training, evaluation and serving of CoLLM recommenders.
//!
//! Interactions become samples ([`data`]), samples become packed prompts with slots for collaborative vectors
//! ([`prompt`]), a LLaMA-family model with LoRA reads them ([`llm`]), one number (the "Yes" logit) comes out, and
//! gradients run the same way back through one list of operations ([`device`]). The collaborative model ([`collab`])
//! and the mapping ([`cie`]) fill the slots. [`train`], [`eval`] and [`mod@bench`] use all of it; [`cli`] is the command line.
//!
//! Imports point one way: cli → (train, bench) → (llm, cie, collab, prompt) → (eval, data) → device.
#![deny(missing_docs)]

pub mod bench;
pub mod checkpoint;
pub mod cie;
pub mod cli;
pub mod collab;
pub mod data;
pub mod device;
pub mod eval;
pub mod files;
pub mod llm;
pub mod progress;
pub mod prompt;
pub mod pth;
pub mod rng;
pub mod selftest;
pub mod train;
