//! Cost Reuse, measurements on the user's own model and data.

mod cost;

pub use cost::{Measurement, Reuse, Task, gemm_ceiling, measure};
