//! Collaborative information encoding: from collaborative vectors to token embeddings. Knows nothing of attention.

mod mapping;

pub use mapping::{Mapping, MappingPass};
