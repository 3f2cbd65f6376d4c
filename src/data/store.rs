//! A prepared directory: written whole, read back, and described by a manifest.

use std::collections::{BTreeMap, HashSet};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::Error;
use super::error::BadRow;
use super::interactions::Interactions;
use super::parquet_io::{Titles, read_samples, read_titles, write_ids, write_samples};
use super::parquet_table::part_files;
use super::rules::{IdOrder, RawKeys, build, mark_warmth};
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
}

/// Facts of the four splits.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Splits {
    /// Of train.
    pub train: SplitFacts,
    /// Of valid.
    pub valid: SplitFacts,
    /// Of valid_small, a sample of valid.
    pub valid_small: SplitFacts,
    /// Of test.
    pub test: SplitFacts,
}

impl Splits {
    /// The facts of `split`.
    pub fn of(&self, split: Split) -> &SplitFacts {
        match split {
            Split::Train => &self.train,
            Split::Valid => &self.valid,
            Split::ValidSmall => &self.valid_small,
            Split::Test => &self.test,
        }
    }
}

/// `manifest.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Program and version.
    pub made_by: String,
    /// The source in words.
    pub source: String,
    /// Labels, splits, order, ids: each rule in words.
    pub rules: Vec<String>,
    /// File name → SHA-256 of every input; a directory's parts by their names below it.
    pub inputs: BTreeMap<String, String>,
    /// Facts of train, valid, valid_small, test.
    pub splits: Splits,
    /// Size of the user table (largest id + 1).
    pub n_users: usize,
    /// Size of the item table (largest id + 1).
    pub n_items: usize,
    /// Good rows that the rules do not use (other months, movies that are not listed).
    pub unused_rows: usize,
    /// Rows left out as unusable (`bad_rows.tsv` lists them).
    pub bad_rows: usize,
    /// File name → SHA-256 of every Parquet file written.
    pub outputs: BTreeMap<String, String>,
    /// Hash of the contents ([`Dataset::fingerprint`]).
    pub fingerprint: String,
}

fn facts(samples: &Samples) -> SplitFacts {
    let distinct = |ids: &[u32]| ids.iter().collect::<HashSet<_>>().len();
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
    }
}

/// Where prepared data came from.
pub struct Source<'a> {
    /// The source in words.
    pub name: &'a str,
    /// Input files.
    pub inputs: &'a [&'a Path],
    /// Rows that were left out as unusable.
    pub bad_rows: &'a [BadRow],
}

/// What differs between sources in the common form.
pub struct Rules {
    /// In words: which rows, which are likes, how they are split.
    pub source: Vec<String>,
    /// Share of valid that becomes valid_small.
    pub small: f64,
    /// How users and items are numbered.
    pub ids: IdOrder,
}

impl Rules {
    /// Half of valid as valid_small, as the official ML-1M has it, and numbers by first appearance.
    pub fn usual(liked: String, split: String) -> Self {
        Rules { source: vec![liked, split], small: 0.5, ids: IdOrder::Sorted }
    }
}

/// Applies the rules to a source in the common form and writes the result.
pub fn write_built(out: &Path, rows: &Interactions, source: Source, rules: Rules) -> Result<Manifest, Error> {
    let Rules { source: mut words, small, ids } = rules;
    let numbered = match ids {
        IdOrder::Sorted => "ids: from 1 in order of first appearance",
        IdOrder::Source => "ids: from 1, items in the order of the items file, users by first appearance in that order",
    };
    words.extend([
        "order: user, then time; ties keep the order of the source".into(),
        "history: all liked items of the user before the row, across splits, oldest first, after a sentinel 0".into(),
        numbered.into(),
        "not_cold: user and item occur in train; warm: more than 3 train rows each; cold: neither occurs in train"
            .into(),
        format!("valid_small: {small} of valid, the rows of pandas' sample with random_state 2023"),
    ]);
    let unused = rows.unused + rows.rows.iter().filter(|r| r.split.is_none()).count();
    let (dataset, keys) = build(rows, small, ids);
    write(out, &dataset, &keys, source, words, unused)
}

/// Writes a prepared directory. Files appear whole; the manifest comes last, so a directory with one is complete.
pub fn write(
    dir: &Path,
    dataset: &Dataset,
    keys: &RawKeys,
    source: Source,
    rules: Vec<String>,
    unused_rows: usize,
) -> Result<Manifest, Error> {
    check_usable(dataset)?;
    let overwritten =
        |input: &Path| Err(Error::file(input, "is an input, and would be overwritten; write to another directory"));
    // Before anything is made: an empty directory inside a table would spoil it.
    let inside = |p: &&&Path| {
        let whole = |p: &Path| std::path::absolute(p).unwrap_or_default();
        p.is_dir() && whole(dir).starts_with(whole(p))
    };
    if let Some(input) = source.inputs.iter().find(inside) {
        return overwritten(input);
    }
    std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
    let here = dir.canonicalize().map_err(Error::io(dir))?;
    let overwrites = |p: &&&Path| {
        p.extension().is_some_and(|e| e == "parquet") && p.canonicalize().is_ok_and(|p| p.parent() == Some(&here))
    };
    if let Some(input) = source.inputs.iter().find(overwrites) {
        return overwritten(input);
    }
    let hash = |path: &Path| {
        let name = path.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned());
        sha256_file(path).map(|h| (name, h)).map_err(Error::io(path))
    };
    // The inputs may be many gigabytes: all cores.
    let parts: Vec<_> = source.inputs.iter().map(|p| part_files(p)).collect::<Result<_, _>>()?;
    let hashed = parts.into_par_iter().flatten().map(|(name, path)| Ok((name, hash(&path)?.1)));
    let inputs = hashed.collect::<Result<_, Error>>()?;
    let manifest_path = dir.join("manifest.json");
    remove_if_there(&manifest_path)?;
    let mut outputs: Vec<PathBuf> = Split::ALL
        .into_par_iter()
        .map(|split| {
            let path = dir.join(format!("{}.parquet", split.name()));
            write_samples(&path, split, dataset.split(split), &dataset.titles)?;
            Ok(path)
        })
        .collect::<Result<_, Error>>()?;
    outputs.extend([dir.join("items.parquet"), dir.join("users.parquet")]);
    write_ids(&outputs[4], "iid", &keys.items, Some(&dataset.titles))?;
    write_ids(&outputs[5], "uid", &keys.users, None)?;
    write_bad_rows(&dir.join("bad_rows.tsv"), source.bad_rows)?;
    let manifest = Manifest {
        made_by: format!("collm-engine {}", env!("CARGO_PKG_VERSION")),
        source: source.name.into(),
        rules,
        inputs,
        splits: Splits {
            train: facts(&dataset.train),
            valid: facts(&dataset.valid),
            valid_small: facts(&dataset.valid_small),
            test: facts(&dataset.test),
        },
        n_users: dataset.n_users,
        n_items: dataset.n_items,
        unused_rows,
        bad_rows: source.bad_rows.len(),
        outputs: outputs.iter().map(|p| hash(p)).collect::<Result<_, _>>()?,
        fingerprint: dataset.fingerprint.clone(),
    };
    write_atomic(&manifest_path, |w| serde_json::to_writer_pretty(w, &manifest).map_err(std::io::Error::from))
        .map_err(Error::io(&manifest_path))?;
    Ok(manifest)
}

/// Every split needs likes and dislikes: without one of them there is nothing to learn and no AUC.
fn check_usable(dataset: &Dataset) -> Result<(), Error> {
    let rows = Split::ALL.map(|s| dataset.split(s).len());
    if rows.contains(&0) {
        let [train, valid, small, test] = rows;
        return Err(Error::Argument(format!(
            "train, valid, valid_small and test would have {train}, {valid}, {small} and {test} rows; each needs some: \
             check the dates or fractions of the split"
        )));
    }
    for split in Split::ALL {
        let label = &dataset.split(split).label;
        if label.iter().all(|l| *l == label[0]) {
            let [which, missing] = if label[0] == 1 { ["a like", "dislikes"] } else { ["a dislike", "likes"] };
            return Err(Error::Argument(format!(
                "all {} rows of {} are {which}; CoLLM needs {missing} as well: check the column of ratings and the threshold",
                label.len(),
                split.name()
            )));
        }
    }
    Ok(())
}

fn write_bad_rows(path: &Path, rows: &[BadRow]) -> Result<(), Error> {
    if rows.is_empty() {
        return remove_if_there(path);
    }
    let flat = |text: &str| text.replace(['\t', '\n', '\r'], " ");
    write_atomic(path, |w| {
        writeln!(w, "file\tline\treason\ttext")?;
        rows.iter().try_for_each(|b| {
            writeln!(w, "{}\t{}\t{}\t{}", flat(&b.path.to_string_lossy()), b.line, flat(&b.reason), flat(&b.text))
        })
    })
    .map_err(Error::io(path))
}

fn remove_if_there(path: &Path) -> Result<(), Error> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(path)(e)),
        _ => Ok(()),
    }
}

impl Dataset {
    /// Reads a prepared directory, or any directory of the four Parquet files in the official form: then titles come from the
    /// rows. Warmth is counted from train in both cases.
    pub fn load(dir: &Path) -> Result<Self, Error> {
        let items = dir.join("items.parquet");
        let mut titles = if items.exists() { read_titles(&items)? } else { Titles::default() };
        let mut read = |split: Split| {
            let path = dir.join(format!("{}.parquet", split.name()));
            if !path.exists() {
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
        let mut titles = titles.into_vec();
        let (n_users, n_items) = (largest(|s| &s.uid), largest(|s| &s.iid).max(titles.len()));
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
