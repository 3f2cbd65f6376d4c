//! Cost measurements on the user's own model and data.

mod cost;
mod error;
mod methods;
pub mod overhead;
mod paper;
pub mod plot;
pub mod report;
mod table;
pub mod worker;

pub use cost::{Measurement, Reuse, Task, gemm_ceiling, measure};
pub use error::Error;
