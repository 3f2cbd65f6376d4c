//! Raw sets in, samples out. Knows nothing of tokens or tensors.
//!
//! Every source (raw MovieLens, Amazon dumps, RecBole atomic files, CSV, Parquet, the official CoLLM pickles) becomes one prepared
//! directory:
//! `train/valid/valid_small/test.parquet`, `items.parquet`, `users.parquet`, `manifest.json`. [`Dataset::load`] reads such a
//! directory.

mod amazon;
mod amazon_dump;
mod archive;
mod cells;
mod collm;
mod error;
mod interactions;
mod json_fields;
mod lines;
mod ml1m;
mod numpy_random;
mod numpy_sort;
pub mod pandas;
pub mod parquet_io;
mod parquet_table;
pub mod pickle;
mod recbole;
mod rules;
mod samples;
mod split;
mod store;
mod table;
mod time;

pub use amazon::{Window, prepare_amazon};
pub use collm::prepare_collm;
pub use error::{BadRow, Error};
pub use ml1m::prepare_ml1m;
pub use recbole::{prepare_ml100k, prepare_ml100k_from};
pub use samples::{Dataset, Samples, Split};
pub use split::SplitRule;
pub use store::{Manifest, SplitFacts, Splits};
pub use table::{Layout, Liked, prepare_table};
