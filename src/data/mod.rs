//! Raw sets in, samples out. Knows nothing of tokens or tensors.
//!
//! Every source (raw MovieLens, RecBole atomic files, CSV, the official CoLLM pickles) becomes one prepared directory:
//! `train/valid/valid_small/test.parquet`, `items.parquet`, `users.parquet`, `manifest.json`. [`Dataset::load`] reads such a
//! directory.

mod archive;
mod collm;
mod error;
mod interactions;
mod ml1m;
mod numpy_random;
pub mod pandas;
pub mod parquet_io;
pub mod pickle;
mod recbole;
mod rules;
mod samples;
mod split;
mod store;
mod table;
mod time;

pub use collm::prepare_collm;
pub use error::{BadRow, Error};
pub use ml1m::prepare_ml1m;
pub use recbole::{prepare_ml100k, prepare_ml100k_from};
pub use samples::{Dataset, Samples, Split};
pub use split::SplitRule;
pub use store::{Manifest, SplitFacts, Splits};
pub use table::{Layout, Liked, prepare_table};
