//! Samples as Parquet: the columns of the official frames (reference, section 1.1), lists included.

use std::path::Path;
use std::sync::Arc;

use arrow_array::builder::{Int64Builder, ListBuilder, StringBuilder};
use arrow_array::cast::AsArray;
use arrow_array::types::{Float64Type, Int32Type, Int64Type};
use arrow_array::{
    Array, ArrayRef, Float64Array, Int64Array, LargeStringArray, RecordBatch, StringArray, StringViewArray,
};
use arrow_schema::{ArrowError, Schema};
use parquet::arrow::ArrowWriter;
use parquet::basic::Compression;
use parquet::file::properties::WriterProperties;

use super::Error;
use super::cells::cells;
use super::parquet_table::ParquetTable;
use super::samples::{Samples, Split};
use crate::files::write_atomic;

/// Titles by item id while files are read: one title an item.
#[derive(Debug, Default)]
pub struct Titles(Vec<Option<String>>);

impl Titles {
    /// Notes a title; `Err` names the two when they differ.
    pub fn note(&mut self, iid: u32, title: &str) -> Result<(), String> {
        let at = iid as usize;
        if self.0.len() <= at {
            self.0.resize(at + 1, None);
        }
        match &self.0[at] {
            Some(first) if first == title => Ok(()),
            Some(first) => {
                Err(format!("item {iid} is titled {title:?}, but {first:?} before; expected one title an item"))
            }
            None => {
                self.0[at] = Some(title.to_string());
                Ok(())
            }
        }
    }

    /// Titles by id; ids that never occurred have an empty one.
    pub fn into_vec(self) -> Vec<String> {
        self.0.into_iter().map(Option::unwrap_or_default).collect()
    }
}

/// Largest id believed: tables are sized by it.
const MAX_ID: i64 = 1 << 26;

/// A row of the official form, but for the titles of its history.
pub struct Row<'a> {
    /// The official index.
    pub row: i64,
    /// User id.
    pub uid: i64,
    /// Item id.
    pub iid: i64,
    /// 0 or 1.
    pub label: i64,
    /// Unix seconds.
    pub timestamp: i64,
    /// Liked items before the row, behind a sentinel 0.
    pub his: &'a [i64],
    /// Title of the item.
    pub title: &'a str,
}

/// Reads a table of rows with the columns `uid, iid, label, timestamp, his, his_title, title` (and `row`, if it is there).
/// `not_cold` and `warm` are left to the rules.
pub fn read_samples(path: &Path, titles: &mut Titles) -> Result<Samples, Error> {
    let mut samples = Samples::empty();
    for batch in ParquetTable::open(path)?.batches(None) {
        push_batch(&batch?, &mut samples, titles).map_err(|e| Error::file(path, e))?;
    }
    Ok(samples)
}

/// Reads the titles of an `items.parquet`.
pub fn read_titles(path: &Path) -> Result<Titles, Error> {
    let mut titles = Titles::default();
    for batch in ParquetTable::open(path)?.batches(None) {
        note_titles(&batch?, &mut titles).map_err(|e| Error::file(path, e))?;
    }
    Ok(titles)
}

fn note_titles(batch: &RecordBatch, titles: &mut Titles) -> Result<(), String> {
    let iid = integers(column(batch, "iid")?).map_err(|e| format!("column iid {e}"))?;
    let title = Texts::of(column(batch, "title")?).map_err(|e| format!("column title {e}"))?;
    iid.iter().enumerate().try_for_each(|(i, &iid)| titles.note(id("iid", iid)?, title.value(i)))
}

/// An id within the sizes believed.
fn id(name: &str, value: i64) -> Result<u32, String> {
    match u32::try_from(value) {
        Ok(id) if (1..=MAX_ID).contains(&value) => Ok(id),
        _ => Err(format!("{name} is {value}; expected 1 to {MAX_ID}")),
    }
}

fn column<'a>(batch: &'a RecordBatch, name: &str) -> Result<&'a ArrayRef, String> {
    let names = || batch.schema().fields().iter().map(|f| f.name().to_string()).collect::<Vec<_>>().join(", ");
    batch.column_by_name(name).ok_or_else(|| format!("has no column {name}; its columns are {}", names()))
}

fn push_batch(batch: &RecordBatch, samples: &mut Samples, titles: &mut Titles) -> Result<(), String> {
    let first = samples.len();
    let ints = |name: &str| integers(column(batch, name)?).map_err(|e| format!("column {name} {e}"));
    let (uid, iid, label, timestamp) = (ints("uid")?, ints("iid")?, ints("label")?, ints("timestamp")?);
    let row = match batch.column_by_name("row") {
        Some(_) => ints("row")?,
        None => (first as i64..).take(uid.len()).collect(),
    };
    let title = Texts::of(column(batch, "title")?).map_err(|e| format!("column title {e}"))?;
    let (his_ends, his) = lists(column(batch, "his")?).map_err(|e| format!("column his {e}"))?;
    let his = integers(&his).map_err(|e| format!("column his {e}"))?;
    let (title_ends, his_title) = lists(column(batch, "his_title")?).map_err(|e| format!("column his_title {e}"))?;
    let his_title = Texts::of(&his_title).map_err(|e| format!("column his_title {e}"))?;
    for i in 0..uid.len() {
        let row = Row {
            row: row[i],
            uid: uid[i],
            iid: iid[i],
            label: label[i],
            timestamp: timestamp[i],
            his: &his[his_ends[i]..his_ends[i + 1]],
            title: title.value(i),
        };
        let history_titles = (title_ends[i]..title_ends[i + 1]).map(|j| his_title.value(j));
        push_row(samples, titles, row, history_titles).map_err(|e| format!("row {}: {e}", first + i))?;
    }
    Ok(())
}

/// Checks and adds one row of the official form. `his_title`: titles of its history, behind a sentinel "".
pub fn push_row<'a>(
    samples: &mut Samples,
    titles: &mut Titles,
    row: Row,
    his_title: impl ExactSizeIterator<Item = &'a str>,
) -> Result<(), String> {
    let label = match row.label {
        0 => 0,
        1 => 1,
        other => return Err(format!("label is {other}; expected 0 or 1")),
    };
    if row.his.len() != his_title.len() {
        return Err(format!("his has {} entries, his_title {}; expected as many", row.his.len(), his_title.len()));
    }
    let mut history = Vec::with_capacity(row.his.len());
    for (i, (&item, title)) in row.his.iter().zip(his_title).enumerate() {
        if i == 0 && item == 0 {
            continue; // the sentinel
        }
        let item = id("an item of his", item)?;
        titles.note(item, title)?;
        history.push(item);
    }
    let (uid, iid) = (id("uid", row.uid)?, id("iid", row.iid)?);
    titles.note(iid, row.title)?;
    samples.push(row.row, uid, iid, label, row.timestamp, &history);
    Ok(())
}

/// Opens a Parquet file, or a directory of part files, and reads all of it.
pub fn read_batches(path: &Path) -> Result<Vec<RecordBatch>, Error> {
    ParquetTable::open(path)?.batches(None).collect()
}

/// A column of whole numbers, of whatever type. `Err`: what it is instead, to follow its name.
pub fn integers(array: &ArrayRef) -> Result<Vec<i64>, String> {
    if array.null_count() > 0 {
        return Err("holds nulls; expected integers".into());
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
    let of_type = |_| format!("is of type {}; expected integers", array.data_type());
    let cell = cells(array).map_err(of_type)?;
    let mut text = String::new();
    let whole = |i| {
        text.clear();
        cell(i, &mut text);
        text.parse().map_err(|_| format!("holds {text:?}; expected whole numbers"))
    };
    (0..array.len()).map(whole).collect()
}

/// A column of text, in whichever of Arrow's layouts.
enum Texts<'a> {
    Short(&'a StringArray),
    Large(&'a LargeStringArray),
    View(&'a StringViewArray),
    Dictionary(Vec<usize>, Box<Texts<'a>>),
}

impl<'a> Texts<'a> {
    fn of(array: &'a ArrayRef) -> Result<Self, String> {
        if array.null_count() > 0 {
            return Err("holds nulls; expected text".into());
        }
        if let Some(dictionary) = array.as_any_dictionary_opt().filter(|d| !d.values().is_empty()) {
            let values = Box::new(Texts::of(dictionary.values())?);
            return Ok(Texts::Dictionary(dictionary.normalized_keys(), values));
        }
        let short = array.as_string_opt().map(Texts::Short);
        let text = short.or_else(|| array.as_string_opt().map(Texts::Large));
        let text = text.or_else(|| array.as_string_view_opt().map(Texts::View));
        text.ok_or_else(|| format!("is of type {}; expected text", array.data_type()))
    }

    fn value(&self, i: usize) -> &'a str {
        match self {
            Texts::Short(a) => a.value(i),
            Texts::Large(a) => a.value(i),
            Texts::View(a) => a.value(i),
            Texts::Dictionary(keys, values) => values.value(keys[i]),
        }
    }
}

/// A column of lists: where each begins and ends in the values, and the values.
fn lists(array: &ArrayRef) -> Result<(Vec<usize>, ArrayRef), String> {
    if array.null_count() > 0 {
        return Err("holds nulls; expected lists".into());
    }
    if let Some(a) = array.as_list_opt::<i32>() {
        return Ok((a.value_offsets().iter().map(|&o| o as usize).collect(), a.values().clone()));
    }
    if let Some(a) = array.as_list_opt::<i64>() {
        return Ok((a.value_offsets().iter().map(|&o| o as usize).collect(), a.values().clone()));
    }
    Err(format!("is of type {}; expected lists", array.data_type()))
}

/// Rows turned into Arrow at once: histories repeat their titles, a large split at once would be gigabytes.
const WRITE_ROWS: usize = 8192;
/// Rows of a row group, which the writer holds in memory (compressed).
const ROW_GROUP_ROWS: usize = 8 * WRITE_ROWS;
/// Distinct titles up to this many bytes are stored once a row group.
const DICTIONARY_BYTES: usize = 16 << 20;

/// Writes a split with all official columns, and `warm` and `cold`.
pub fn write_samples(path: &Path, split: Split, samples: &Samples, titles: &[String]) -> Result<(), Error> {
    // An empty split is one batch, too: the columns.
    let starts = (0..samples.len().max(1)).step_by(WRITE_ROWS);
    let batches = starts.map(|start| {
        let rows: Vec<usize> = (start..samples.len().min(start + WRITE_ROWS)).collect();
        sample_batch(split, &samples.select(&rows), titles)
    });
    write_batches(path, batches)
}

fn sample_batch(split: Split, samples: &Samples, titles: &[String]) -> Result<RecordBatch, ArrowError> {
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
    RecordBatch::try_from_iter([
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
    ])
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
    write_batches(path, std::iter::once(Ok(batch.clone())))
}

fn write_batches(path: &Path, batches: impl Iterator<Item = Result<RecordBatch, ArrowError>>) -> Result<(), Error> {
    let properties = WriterProperties::builder()
        .set_compression(Compression::SNAPPY)
        .set_max_row_group_row_count(Some(ROW_GROUP_ROWS))
        .set_dictionary_page_size_limit(DICTIONARY_BYTES)
        .build();
    let mut batches = batches.map(|b| b.map_err(std::io::Error::other)).peekable();
    let written: std::io::Result<()> = write_atomic(path, |w| {
        let schema = match batches.peek() {
            Some(Ok(first)) => first.schema(),
            _ => Arc::new(Schema::empty()),
        };
        let mut writer = ArrowWriter::try_new(&mut *w, schema, Some(properties)).map_err(std::io::Error::other)?;
        for batch in batches {
            writer.write(&batch?).map_err(std::io::Error::other)?;
        }
        writer.close().map_err(std::io::Error::other)?;
        Ok(())
    });
    written.map_err(Error::io(path))
}
