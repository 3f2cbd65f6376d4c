//! Collaborative information encoding: from collaborative vectors to token embeddings. Knows nothing of attention.

mod free_tokens;
mod mapping;

pub use free_tokens::FreeTokens;
pub use mapping::{Mapping, MappingPass};
