//! The collaborative models, one file each: parameters, forward, backward, how it is trained alone. Knows nothing of the LLM.

mod card;
mod dice;
pub mod din;
mod din_pass;
mod error;
pub mod import;
mod layers;
pub mod lightgcn;
pub mod mf;
mod model;
mod real;
pub mod sasrec;
mod sasrec_pass;
pub mod slots;
pub mod training;

pub use error::Error;
pub use model::{CollabConfig, Collaborative, SlotVectors, Summary};
pub use real::Real;
