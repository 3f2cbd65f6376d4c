//! The official CoLLM files: the published pandas pickles (in their zip, or unpacked), or the same splits as Parquet.
//!
//! Rows, ids, histories and splits stay as published (reference, sections 1.1 to 1.3); warmth is counted from train, because
//! the file that carries it was never published (section 1.5).

use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::Error;
use super::archive::Archive;
use super::pandas::{Column, Frame, read_frame};
use super::parquet_io::{Row, Titles, push_row};
use super::rules::RawKeys;
use super::samples::{Dataset, Samples, Split};
use super::store::{Manifest, Source, write};

/// Prepares a zip or a directory of the published pickles, or a directory of the splits as Parquet.
pub fn prepare_collm(from: &Path, out: &Path) -> Result<Manifest, Error> {
    let parquet = Split::ALL.map(|s| from.join(format!("{}.parquet", s.name())));
    let (dataset, inputs) =
        if parquet[0].exists() { (Dataset::load(from)?, parquet.to_vec()) } else { read_pickles(from)? };
    let numbers = |n: usize| (0..n).map(|i| if i == 0 { String::new() } else { i.to_string() }).collect();
    let keys = RawKeys { users: numbers(dataset.n_users), items: numbers(dataset.n_items) };
    let inputs: Vec<&Path> = inputs.iter().map(PathBuf::as_path).collect();
    let rules = vec!["rows, ids, histories and splits as published; warm and cold from the counts of train".into()];
    write(out, &dataset, &keys, Source { name: "official CoLLM files", inputs: &inputs, bad_rows: &[] }, rules, 0)
}

/// The data, and the files it came from.
fn read_pickles(from: &Path) -> Result<(Dataset, Vec<PathBuf>), Error> {
    let names = Split::ALL.map(|s| format!("{}_ood2.pkl", s.name()));
    let missing = |name: &str| {
        Error::file(
            from,
            format!("holds no {name} (nor train.parquet); expected the official CoLLM files: {}", names.join(", ")),
        )
    };
    let places = if from.is_dir() { with_folders(from)? } else { Vec::new() };
    let frame = |name: &String| -> Result<(PathBuf, Frame), Error> {
        let (path, bytes) = if from.is_dir() {
            let path = places.iter().map(|d| d.join(name)).find(|p| p.is_file()).ok_or_else(|| missing(name))?;
            let bytes = std::fs::read(&path).map_err(Error::io(&path))?;
            (path, bytes)
        } else {
            let bytes = Archive::open(from)?.read(name)?.ok_or_else(|| missing(name))?;
            (from.join(name), bytes)
        };
        let frame = read_frame(&bytes).map_err(|e| Error::file(&path, e))?;
        Ok((path, frame))
    };
    // Of several errors the first split's is reported, whichever thread met one first.
    let frames: Vec<Result<(PathBuf, Frame), Error>> = names.par_iter().map(frame).collect();
    let frames: Vec<(PathBuf, Frame)> = frames.into_iter().collect::<Result<_, _>>()?;
    let inputs = if from.is_dir() { frames.iter().map(|f| f.0.clone()).collect() } else { vec![from.to_path_buf()] };
    let mut titles = Titles::default();
    let mut splits = [const { None }; 4];
    for (slot, (path, frame)) in splits.iter_mut().zip(&frames) {
        *slot = Some(samples_of(frame, &mut titles).map_err(|e| Error::file(path, e))?);
    }
    let splits = splits.map(Option::unwrap_or_default);
    Ok((Dataset::from_splits(splits, titles, from)?, inputs))
}

/// A directory and, because the published zip has one inside, the folders in it.
fn with_folders(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut folders: Vec<PathBuf> = dir.read_dir().map_err(Error::io(dir))?.flatten().map(|e| e.path()).collect();
    folders.sort();
    folders.insert(0, dir.to_path_buf());
    Ok(folders)
}

fn samples_of(frame: &Frame, titles: &mut Titles) -> Result<Samples, String> {
    let column = |name: &str| {
        let names = || frame.columns.iter().map(|c| c.0.as_ref()).collect::<Vec<&str>>().join(", ");
        let found = frame.columns.iter().find(|c| &*c.0 == name);
        found.map(|c| &c.1).ok_or_else(|| format!("has no column {name}; its columns are {}", names()))
    };
    let ints = |name: &str| match column(name)? {
        Column::Int(v) => Ok(v.clone()),
        Column::Float(v) if v.iter().all(|x| x.fract() == 0.0 && x.abs() < 1e15) => {
            Ok(v.iter().map(|&x| x as i64).collect())
        }
        _ => Err(format!("column {name} is not of whole numbers")),
    };
    let (uid, iid, label, timestamp) = (ints("uid")?, ints("iid")?, ints("label")?, ints("timestamp")?);
    let Column::IntList(his) = column("his")? else { return Err("column his is not of lists of integers".into()) };
    let Column::TextList(his_title) = column("his_title")? else {
        return Err("column his_title is not of lists of text".into());
    };
    let Column::Text(title) = column("title")? else { return Err("column title is not of text".into()) };
    let mut samples = Samples::empty();
    for i in 0..uid.len() {
        let row = Row {
            row: frame.index[i],
            uid: uid[i],
            iid: iid[i],
            label: label[i],
            timestamp: timestamp[i],
            his: &his[i],
            title: &title[i],
        };
        push_row(&mut samples, titles, row, his_title[i].iter().map(|t| &**t)).map_err(|e| format!("row {i}: {e}"))?;
    }
    Ok(samples)
}
