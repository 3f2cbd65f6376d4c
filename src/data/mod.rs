//! Raw sets in, samples out. Knows nothing of tokens or tensors.
//!
//! Every source (raw MovieLens, RecBole atomic files, CSV, the official CoLLM pickles) becomes one prepared directory:
//! `train/valid/valid_small/test.parquet`, `items.parquet`, `manifest.json`. [`Dataset::load`] reads such a directory.

mod samples;

pub use samples::{Dataset, Samples, Split};
