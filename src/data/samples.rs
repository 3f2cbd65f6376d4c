//! Samples in memory: one row is one user–item interaction with its label and the user's earlier liked items.

use std::ops::Range;
use std::sync::Arc;

use sha2::{Digest, Sha256};

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
    /// Neither user nor item occurs in train (the official `cold`).
    pub both_new: Vec<bool>,
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

    /// No rows, ready for [`Self::push`].
    pub fn empty() -> Self {
        Samples { his_offsets: vec![0], ..Samples::default() }
    }

    /// Adds a row; `not_cold` and `warm` are left for the rules to set.
    pub fn push(&mut self, row: i64, uid: u32, iid: u32, label: u8, timestamp: i64, history: &[u32]) {
        self.row.push(row);
        self.uid.push(uid);
        self.iid.push(iid);
        self.label.push(label);
        self.timestamp.push(timestamp);
        self.his.extend_from_slice(history);
        self.his_offsets.push(self.his.len() as u64);
    }

    /// The given rows, in the given order.
    pub fn select(&self, rows: &[usize]) -> Samples {
        let mut out = Samples::empty();
        for &i in rows {
            out.push(self.row[i], self.uid[i], self.iid[i], self.label[i], self.timestamp[i], self.history(i));
        }
        out.not_cold = rows.iter().map(|&i| self.not_cold[i]).collect();
        out.warm = rows.iter().map(|&i| self.warm[i]).collect();
        out.both_new = rows.iter().map(|&i| self.both_new[i]).collect();
        out
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
    /// Hash of the contents: ids, labels, times, histories and titles; the same however the files were written.
    pub(super) fn compute_fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        for split in Split::ALL {
            let s = self.split(split);
            hash.update((s.len() as u64).to_le_bytes());
            for bytes in [
                bytemuck::cast_slice::<_, u8>(&s.uid),
                bytemuck::cast_slice(&s.iid),
                &s.label,
                bytemuck::cast_slice(&s.timestamp),
                bytemuck::cast_slice(&s.his_offsets),
                bytemuck::cast_slice(&s.his),
            ] {
                hash.update(bytes);
            }
        }
        for title in self.titles.iter() {
            hash.update((title.len() as u64).to_le_bytes());
            hash.update(title);
        }
        hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
    }

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
