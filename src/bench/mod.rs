//! Cost measurements on the user's own model and data.

mod cost;

pub use cost::{Measurement, Task, gemm_ceiling, measure};
