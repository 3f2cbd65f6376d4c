//! A prepared directory: written whole, read back, and described by a manifest.

use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::Error;
use super::error::BadRow;
use super::parquet_io::{Titles, read_samples, write_ids, write_samples};
use super::rules::{RawKeys, mark_warmth};
use super::samples::{Dataset, Samples, Split};
use crate::files::{sha256_file, write_atomic};

/// Facts of one split.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SplitFacts {
    /// Rows.
    pub rows: usize,
    /// Rows with label 1.
    pub positives: usize,
    /// Their share.
    pub positive_rate: f64,
    /// Distinct users.
    pub users: usize,
    /// Distinct items.
    pub items: usize,
    /// Rows whose user and item occur in train.
    pub not_cold: usize,
    /// Rows whose user and item have more than 3 train rows.
    pub warm: usize,
    /// Rows whose user and item are both new.
    pub both_new: usize,
    /// First and last time, Unix seconds.
    pub time_span: Option<(i64, i64)>,
    /// SHA-256 of the Parquet file.
    pub sha256: String,
}

/// `manifest.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Program and version.
    pub made_by: String,
    /// The source and the rules applied to it, in words.
    pub source: String,
    /// Labels, splits, order, ids: each rule in words.
    pub rules: Vec<String>,
    /// (file, SHA-256) of every input.
    pub inputs: Vec<(String, String)>,
    /// Facts of train, valid, valid_small, test.
    pub splits: Vec<(String, SplitFacts)>,
    /// Size of the user table (largest id + 1).
    pub n_users: usize,
    /// Size of the item table (largest id + 1).
    pub n_items: usize,
    /// Rows left out as unusable (`bad_rows.tsv` lists them).
    pub bad_rows: usize,
    /// Hash of the contents ([`Dataset::fingerprint`]).
    pub fingerprint: String,
}

fn facts(samples: &Samples, sha256: String) -> SplitFacts {
    let distinct = |ids: &[u32]| ids.iter().collect::<std::collections::HashSet<_>>().len();
    let count = |flags: &[bool]| flags.iter().filter(|&&f| f).count();
    let positives = samples.label.iter().filter(|&&l| l == 1).count();
    SplitFacts {
        rows: samples.len(),
        positives,
        positive_rate: positives as f64 / samples.len().max(1) as f64,
        users: distinct(&samples.uid),
        items: distinct(&samples.iid),
        not_cold: count(&samples.not_cold),
        warm: count(&samples.warm),
        both_new: count(&samples.both_new),
        time_span: samples.timestamp.iter().min().copied().zip(samples.timestamp.iter().max().copied()),
        sha256,
    }
}

/// What [`write`] records besides the data.
pub struct Provenance<'a> {
    /// The source in words.
    pub source: &'a str,
    /// The rules in words.
    pub rules: Vec<String>,
    /// Input files.
    pub inputs: Vec<&'a Path>,
    /// Rows that were left out.
    pub bad_rows: &'a [BadRow],
}

/// Writes a prepared directory. Files appear whole; the manifest comes last, so a directory with one is complete.
pub fn write(dir: &Path, dataset: &Dataset, keys: &RawKeys, from: Provenance) -> Result<Manifest, Error> {
    if dataset.train.is_empty() || dataset.valid.is_empty() || dataset.test.is_empty() {
        let rows = [&dataset.train, &dataset.valid, &dataset.test].map(|s| s.len());
        return Err(Error::Argument(format!(
            "train, valid and test would have {rows:?} rows; each needs some: check the split dates or fractions"
        )));
    }
    std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
    let manifest_path = dir.join("manifest.json");
    if manifest_path.exists() {
        std::fs::remove_file(&manifest_path).map_err(Error::io(&manifest_path))?;
    }
    let mut splits = Vec::new();
    for split in Split::ALL {
        let path = dir.join(format!("{}.parquet", split.name()));
        write_samples(&path, split, dataset.split(split), &dataset.titles)?;
        let hash = sha256_file(&path).map_err(Error::io(&path))?;
        splits.push((split.name().to_string(), facts(dataset.split(split), hash)));
    }
    write_ids(&dir.join("items.parquet"), "iid", &keys.items, Some(&dataset.titles))?;
    write_ids(&dir.join("users.parquet"), "uid", &keys.users, None)?;
    let bad_path = dir.join("bad_rows.tsv");
    if !from.bad_rows.is_empty() {
        write_atomic(&bad_path, |w| {
            use std::io::Write;
            writeln!(w, "file\tline\treason")?;
            from.bad_rows.iter().try_for_each(|b| {
                writeln!(w, "{}\t{}\t{}", b.path.display(), b.line, b.reason.replace(['\t', '\n'], " "))
            })
        })
        .map_err(Error::io(&bad_path))?;
    } else if bad_path.exists() {
        std::fs::remove_file(&bad_path).map_err(Error::io(&bad_path))?;
    }
    let hash = |path: &&Path| {
        let name = path.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned());
        sha256_file(path).map(|h| (name, h)).map_err(Error::io(*path))
    };
    let manifest = Manifest {
        made_by: format!("collm-engine {}", env!("CARGO_PKG_VERSION")),
        source: from.source.into(),
        rules: from.rules,
        inputs: from.inputs.iter().map(hash).collect::<Result<_, _>>()?,
        splits,
        n_users: dataset.n_users,
        n_items: dataset.n_items,
        bad_rows: from.bad_rows.len(),
        fingerprint: dataset.fingerprint.clone(),
    };
    write_atomic(&manifest_path, |w| serde_json::to_writer_pretty(w, &manifest).map_err(std::io::Error::from))
        .map_err(Error::io(&manifest_path))?;
    Ok(manifest)
}

impl Dataset {
    /// Reads a prepared directory, or any directory of the four Parquet files in the official form.
    pub fn load(dir: &Path) -> Result<Self, Error> {
        let mut titles = Titles::default();
        let mut read = |split: Split| {
            let path = dir.join(format!("{}.parquet", split.name()));
            if !path.is_file() {
                let what = "is missing; a data directory holds train, valid, valid_small and test.parquet: make one with `collm-engine prepare`";
                return Err(Error::file(&path, what));
            }
            read_samples(&path, &mut titles)
        };
        let splits = [read(Split::Train)?, read(Split::Valid)?, read(Split::ValidSmall)?, read(Split::Test)?];
        Dataset::from_splits(splits, titles, dir)
    }

    /// Puts splits in the official form together, deriving warmth from train.
    pub(super) fn from_splits(splits: [Samples; 4], titles: Titles, path: &Path) -> Result<Self, Error> {
        let [mut train, mut valid, mut valid_small, mut test] = splits;
        if train.is_empty() {
            return Err(Error::file(path, "the train split has no rows"));
        }
        let ids = (train.uid.clone(), train.iid.clone());
        mark_warmth((&ids.0, &ids.1), [&mut train, &mut valid, &mut valid_small, &mut test]);
        let largest = |column: fn(&Samples) -> &[u32]| {
            [&train, &valid, &valid_small, &test].iter().flat_map(|s| column(s)).copied().max().unwrap_or(0) as usize
                + 1
        };
        let (n_users, n_items) = (largest(|s| &s.uid), largest(|s| &s.iid).max(titles.0.len()));
        let mut titles = titles.0;
        titles.resize(n_items, String::new());
        let mut dataset = Dataset {
            train,
            valid,
            valid_small,
            test,
            titles: Arc::new(titles),
            n_users,
            n_items,
            fingerprint: String::new(),
        };
        dataset.fingerprint = dataset.compute_fingerprint();
        Ok(dataset)
    }
}
