//! Samples in memory: one row is one user–item interaction with its label and the user's earlier liked items.

use std::ops::Range;
use std::sync::Arc;

/// One of the four splits of a prepared directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Split {
    /// Rows the models are trained on.
    Train,
    /// All validation rows: the collaborative models select on these.
    Valid,
    /// A seeded sample of the validation rows: the LLM stages select on these (reference, section 1.2).
    ValidSmall,
    /// Test rows.
    Test,
}

impl Split {
    /// All splits in file order.
    pub const ALL: [Split; 4] = [Split::Train, Split::Valid, Split::ValidSmall, Split::Test];

    /// The file stem: `train`, `valid`, `valid_small`, `test`.
    pub fn name(self) -> &'static str {
        match self {
            Split::Train => "train",
            Split::Valid => "valid",
            Split::ValidSmall => "valid_small",
            Split::Test => "test",
        }
    }
}

/// Rows of one split, column by column. All columns have the same length; ids start at 1 (0 is padding).
#[derive(Clone, Debug, Default)]
pub struct Samples {
    /// Row number in the table of all splits, sorted by user and time (the official index).
    pub row: Vec<i64>,
    /// User id.
    pub uid: Vec<u32>,
    /// Item id.
    pub iid: Vec<u32>,
    /// 1 liked, 0 not.
    pub label: Vec<u8>,
    /// Unix seconds.
    pub timestamp: Vec<i64>,
    /// `history` of row i is `his[his_offsets[i]..his_offsets[i + 1]]`; one entry more than rows.
    pub his_offsets: Vec<u64>,
    /// Liked items before the row, oldest first, *without* the official leading 0 sentinel.
    pub his: Vec<u32>,
    /// User and item both occur in train.
    pub not_cold: Vec<bool>,
    /// User and item both have more than 3 train rows.
    pub warm: Vec<bool>,
}

impl Samples {
    /// Number of rows.
    pub fn len(&self) -> usize {
        self.uid.len()
    }

    /// No rows?
    pub fn is_empty(&self) -> bool {
        self.uid.is_empty()
    }

    /// Liked items before row `i`, oldest first.
    pub fn history(&self, i: usize) -> &[u32] {
        let range: Range<usize> = self.his_offsets[i] as usize..self.his_offsets[i + 1] as usize;
        &self.his[range]
    }
}

/// A prepared directory in memory.
#[derive(Clone, Debug)]
pub struct Dataset {
    /// The four splits.
    pub train: Samples,
    /// See [`Split::Valid`].
    pub valid: Samples,
    /// See [`Split::ValidSmall`].
    pub valid_small: Samples,
    /// See [`Split::Test`].
    pub test: Samples,
    /// Title of item id `i` (entry 0 is empty).
    pub titles: Arc<Vec<String>>,
    /// Size of the user table: largest user id of all splits plus 1.
    pub n_users: usize,
    /// Size of the item table: largest item id of all splits plus 1.
    pub n_items: usize,
    /// SHA-256 over the contents: keys of caches and run manifests.
    pub fingerprint: String,
}

impl Dataset {
    /// The rows of `split`.
    pub fn split(&self, split: Split) -> &Samples {
        match split {
            Split::Train => &self.train,
            Split::Valid => &self.valid,
            Split::ValidSmall => &self.valid_small,
            Split::Test => &self.test,
        }
    }
}
