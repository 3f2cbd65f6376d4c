//! Numbers: formats narrower than f32, directed rounding, approximate functions, tensor-core sums. Scalar functions only;
//! nothing here knows of warps or PTX text.

pub mod approx;
pub mod format;
pub mod rounding;
pub mod tensor;
