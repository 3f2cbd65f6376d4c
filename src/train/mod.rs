//! Stages, schedule, configuration, run directories. Knows nothing of the formats of raw data.

pub mod config;
mod error;
mod groups;
pub mod import;
mod layers;
pub mod memory;
pub mod method;
mod official_keys;
pub mod order;
pub mod pipeline;
pub mod ranking;
pub mod run_dir;
pub mod schedule;
pub mod scoring;
pub mod stage;
pub(crate) mod state;
pub mod tensorboard;
pub mod trainable;
mod tuner;
mod variants;
mod yaml;

pub use error::Error;
