//! Stages, optimizer, schedule, configuration, run directories. Knows nothing of the formats of raw data.

pub mod config;
mod error;
pub mod schedule;

pub use error::Error;
