//! Raw sets in, samples out. Knows nothing of tokens or tensors.
//!
//! Every source (raw MovieLens, RecBole atomic files, CSV, the official CoLLM pickles) becomes one prepared directory:
//! `train/valid/valid_small/test.parquet`, `items.parquet`, `users.parquet`, `manifest.json`. [`Dataset::load`] reads such a
//! directory.

mod error;
mod numpy_random;
pub mod pandas;
pub mod parquet_io;
pub mod pickle;
pub mod rules;
mod samples;
mod sources;
mod store;
mod table;

pub use error::{BadRow, Error};
pub use samples::{Dataset, Samples, Split};
pub use sources::{SplitRule, prepare_collm, prepare_ml1m, prepare_table};
pub use store::{Manifest, SplitFacts};
pub use table::Layout;
