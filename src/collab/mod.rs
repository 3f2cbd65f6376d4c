//! The collaborative models, one file each: parameters, forward, backward, how it is trained alone. Knows nothing of the LLM.

mod card;
mod error;
pub mod lightgcn;
pub mod mf;
mod model;
mod real;
pub mod training;

pub use error::Error;
pub use model::{CollabConfig, Collaborative, SlotVectors, Summary};
pub use real::Real;
