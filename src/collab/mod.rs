//! The collaborative models, one file each: parameters, forward, backward, how it is trained alone. Knows nothing of the LLM.

mod error;
pub mod mf;

pub use error::Error;
