//! Metrics and reports. Knows nothing of training.

mod error;
pub mod metrics;
pub mod report;

pub use error::Error;
pub use metrics::{Metrics, Subset};
