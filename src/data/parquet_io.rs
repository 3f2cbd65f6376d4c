//! Samples as Parquet: the columns of the official frames (reference, section 1.1), lists included.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use arrow_array::builder::{Int64Builder, ListBuilder, StringBuilder};
use arrow_array::cast::AsArray;
use arrow_array::types::{Float64Type, Int32Type, Int64Type};
use arrow_array::{Array, ArrayRef, Float64Array, Int64Array, RecordBatch, StringArray};
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::basic::Compression;
use parquet::file::properties::WriterProperties;

use super::Error;
use super::samples::{Samples, Split};
use crate::files::write_atomic;

/// Titles by item id while files are read: one title an item.
#[derive(Debug, Default)]
pub struct Titles(pub Vec<String>);

impl Titles {
    /// Notes a title; `Err` names the two when they differ.
    pub fn note(&mut self, iid: u32, title: &str) -> Result<(), String> {
        let at = iid as usize;
        if self.0.len() <= at {
            self.0.resize(at + 1, String::new());
        }
        if self.0[at].is_empty() {
            self.0[at] = title.to_string();
        } else if self.0[at] != title {
            return Err(format!("item {iid} is titled {:?} and {title:?}", self.0[at]));
        }
        Ok(())
    }
}

/// Largest id believed: tables are sized by it.
const MAX_ID: i64 = 1 << 28;

/// Reads a table of rows with the columns `uid, iid, label, timestamp, his, his_title, title` (and `row`, if it is there).
/// `not_cold` and `warm` are left to the rules.
pub fn read_samples(path: &Path, titles: &mut Titles) -> Result<Samples, Error> {
    let bad = |what: String| Error::file(path, what);
    let mut samples = Samples::empty();
    for batch in read_batches(path)? {
        let first = samples.len();
        let column = |name: &str| {
            batch
                .column_by_name(name)
                .cloned()
                .ok_or_else(|| bad(format!("has no column {name}; has {}", names(&batch))))
        };
        let ints = |name: &str| integers(&column(name)?).map_err(|e| bad(format!("column {name}: {e}")));
        let (uid, iid, label, timestamp) = (ints("uid")?, ints("iid")?, ints("label")?, ints("timestamp")?);
        let row = match batch.column_by_name("row") {
            Some(_) => ints("row")?,
            None => (first as i64..).take(uid.len()).collect(),
        };
        let title = texts(&column("title")?).map_err(|e| bad(format!("column title: {e}")))?;
        let (his, his_title) = (column("his")?, column("his_title")?);
        for i in 0..batch.num_rows() {
            let at = |e: String| bad(format!("row {}: {e}", first + i));
            let list =
                |array: &ArrayRef| list_item(array, i).ok_or_else(|| at("his and his_title must be lists".into()));
            let ids = integers(&list(&his)?).map_err(|e| at(format!("his: {e}")))?;
            let words = texts(&list(&his_title)?).map_err(|e| at(format!("his_title: {e}")))?;
            push_row(&mut samples, titles, row[i], [uid[i], iid[i], label[i], timestamp[i]], &ids, &words, &title[i])
                .map_err(at)?;
        }
    }
    Ok(samples)
}

/// Checks and adds one row of the official form: histories begin with the sentinel 0 / "".
pub fn push_row(
    samples: &mut Samples,
    titles: &mut Titles,
    row: i64,
    [uid, iid, label, timestamp]: [i64; 4],
    his: &[i64],
    his_title: &[String],
    title: &str,
) -> Result<(), String> {
    let id = |name: &str, v: i64| {
        if (1..=MAX_ID).contains(&v) { Ok(v as u32) } else { Err(format!("{name} is {v}; expected 1 to {MAX_ID}")) }
    };
    if !(0..=1).contains(&label) {
        return Err(format!("label is {label}; expected 0 or 1"));
    }
    if his.len() != his_title.len() {
        return Err(format!("his has {} entries, his_title {}", his.len(), his_title.len()));
    }
    let mut history = Vec::with_capacity(his.len());
    for (i, (&item, title)) in his.iter().zip(his_title).enumerate() {
        if i == 0 && item == 0 {
            continue; // the sentinel
        }
        let item = id("an item of his", item)?;
        titles.note(item, title)?;
        history.push(item);
    }
    titles.note(id("iid", iid)?, title)?;
    samples.push(row, id("uid", uid)?, iid as u32, label as u8, timestamp, &history);
    Ok(())
}

/// Opens a Parquet file and reads all of it.
pub fn read_batches(path: &Path) -> Result<Vec<RecordBatch>, Error> {
    let file = File::open(path).map_err(Error::io(path))?;
    let bad = |e: &dyn std::fmt::Display| Error::file(path, format!("not a whole Parquet file: {e}"));
    let reader = ParquetRecordBatchReaderBuilder::try_new(file).map_err(|e| bad(&e))?;
    let reader = reader.with_batch_size(8192).build().map_err(|e| bad(&e))?;
    reader.collect::<Result<_, _>>().map_err(|e| bad(&e))
}

fn names(batch: &RecordBatch) -> String {
    batch.schema().fields().iter().map(|f| f.name().as_str()).collect::<Vec<_>>().join(", ")
}

/// A column of integers: int64, int32, or floats that are whole.
pub fn integers(array: &ArrayRef) -> Result<Vec<i64>, String> {
    if array.null_count() > 0 {
        return Err("holds nulls".into());
    }
    if let Some(a) = array.as_primitive_opt::<Int64Type>() {
        return Ok(a.values().to_vec());
    }
    if let Some(a) = array.as_primitive_opt::<Int32Type>() {
        return Ok(a.values().iter().map(|&v| v.into()).collect());
    }
    if let Some(a) = array.as_primitive_opt::<Float64Type>() {
        let whole = |&v: &f64| {
            if v.fract() == 0.0 && v.abs() < 1e15 {
                Ok(v as i64)
            } else {
                Err(format!("holds {v}; expected whole numbers"))
            }
        };
        return a.values().iter().map(whole).collect();
    }
    Err(format!("is of type {}; expected integers", array.data_type()))
}

/// A column of text.
pub fn texts(array: &ArrayRef) -> Result<Vec<String>, String> {
    if array.null_count() > 0 {
        return Err("holds nulls".into());
    }
    if let Some(a) = array.as_string_opt::<i32>() {
        return Ok((0..a.len()).map(|i| a.value(i).to_string()).collect());
    }
    if let Some(a) = array.as_string_opt::<i64>() {
        return Ok((0..a.len()).map(|i| a.value(i).to_string()).collect());
    }
    if let Some(a) = array.as_string_view_opt() {
        return Ok((0..a.len()).map(|i| a.value(i).to_string()).collect());
    }
    Err(format!("is of type {}; expected text", array.data_type()))
}

fn list_item(array: &ArrayRef, i: usize) -> Option<ArrayRef> {
    if let Some(a) = array.as_list_opt::<i32>() {
        return a.is_valid(i).then(|| a.value(i));
    }
    array.as_list_opt::<i64>().filter(|a| a.is_valid(i)).map(|a| a.value(i))
}

/// Writes a split with all official columns, and `warm` and `cold`.
pub fn write_samples(path: &Path, split: Split, samples: &Samples, titles: &[String]) -> Result<(), Error> {
    let ints = |values: Vec<i64>| Arc::new(Int64Array::from(values)) as ArrayRef;
    let wide = |values: &[u32]| ints(values.iter().map(|&v| v.into()).collect());
    let flags = |values: Vec<bool>| ints(values.into_iter().map(i64::from).collect());
    let (mut his, mut his_title) = (ListBuilder::new(Int64Builder::new()), ListBuilder::new(StringBuilder::new()));
    for i in 0..samples.len() {
        his.values().append_value(0);
        his_title.values().append_value("");
        for &item in samples.history(i) {
            his.values().append_value(item.into());
            his_title.values().append_value(&titles[item as usize]);
        }
        his.append(true);
        his_title.append(true);
    }
    let title: StringArray = samples.iid.iter().map(|&i| Some(titles[i as usize].as_str())).collect();
    let flag = match split {
        Split::Train => -1.0,
        Split::Valid | Split::ValidSmall => 0.0,
        Split::Test => 1.0,
    };
    let batch = RecordBatch::try_from_iter([
        ("row", ints(samples.row.clone())),
        ("uid", wide(&samples.uid)),
        ("iid", wide(&samples.iid)),
        ("label", ints(samples.label.iter().map(|&l| l.into()).collect())),
        ("timestamp", ints(samples.timestamp.clone())),
        ("his", Arc::new(his.finish()) as ArrayRef),
        ("his_title", Arc::new(his_title.finish()) as ArrayRef),
        ("title", Arc::new(title) as ArrayRef),
        ("flag", Arc::new(Float64Array::from(vec![flag; samples.len()])) as ArrayRef),
        ("not_cold", flags(samples.not_cold.clone())),
        ("warm", flags(samples.warm.clone())),
        ("cold", flags(samples.both_new.clone())),
    ]);
    let batch = batch.map_err(|e| Error::file(path, e.to_string()))?;
    write_batch(path, &batch)
}

/// Writes (id, title, raw key) of every item, or (id, raw key) of every user.
pub fn write_ids(path: &Path, id: &str, raw: &[String], titles: Option<&[String]>) -> Result<(), Error> {
    let ids = Int64Array::from((1..raw.len() as i64).collect::<Vec<_>>());
    let text =
        |values: &[String]| Arc::new(values[1..].iter().map(|v| Some(v.as_str())).collect::<StringArray>()) as ArrayRef;
    let mut columns = vec![(id, Arc::new(ids) as ArrayRef)];
    columns.extend(titles.map(|t| ("title", text(t))));
    columns.push(("raw_id", text(raw)));
    let batch = RecordBatch::try_from_iter(columns).map_err(|e| Error::file(path, e.to_string()))?;
    write_batch(path, &batch)
}

/// Writes one batch, whole or not at all.
pub fn write_batch(path: &Path, batch: &RecordBatch) -> Result<(), Error> {
    let properties = WriterProperties::builder().set_compression(Compression::SNAPPY).build();
    let written: std::io::Result<()> = write_atomic(path, |w| {
        let mut writer =
            ArrowWriter::try_new(&mut *w, batch.schema(), Some(properties)).map_err(std::io::Error::other)?;
        writer.write(batch).map_err(std::io::Error::other)?;
        writer.close().map_err(std::io::Error::other)?;
        Ok(())
    });
    written.map_err(Error::io(path))
}
