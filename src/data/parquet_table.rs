//! A Parquet table as input: one file, or a directory of part files as Spark, Hive, Dask or pyarrow write it.
//!
//! Directories named `key=value` add a column; names that begin with `_` or `.` (`_SUCCESS`, `_metadata`, checksums) and empty
//! files are passed over. Rows come in the order of the parts' paths. Tables whose part files are not the whole truth (Delta,
//! Hudi, Iceberg) are refused. What the columns hold is left to `cells` and `parquet_io`.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::{ArrayRef, Int64Array, RecordBatch, StringArray};
use arrow_schema::{Field, Schema};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};

use super::Error;

/// Rows decoded at once.
const BATCH_ROWS: usize = 8192;
/// Directories within directories: more is a loop of links.
const DEEPEST: usize = 32;
/// What Hive and Spark name the directory of a null.
const NULL_PARTITION: &str = "__HIVE_DEFAULT_PARTITION__";

/// A Parquet file or a directory of them.
#[derive(Clone, Debug)]
pub struct ParquetTable {
    parts: Vec<Part>,
    keys: Vec<Key>,
}

/// One file, and the values that its directories give the keys.
#[derive(Clone, Debug)]
struct Part {
    path: PathBuf,
    partition: Vec<(String, Option<String>)>,
}

/// A column that directories carry.
#[derive(Clone, Debug)]
struct Key {
    name: String,
    /// Every value is a whole number.
    whole_numbers: bool,
}

/// Is `path` a directory, or a file that begins as Parquet files do?
pub fn is_parquet(path: &Path) -> bool {
    let begins_so = || {
        let mut magic = [0; 4];
        File::open(path)?.read_exact(&mut magic)?;
        Ok::<_, std::io::Error>(&magic == b"PAR1")
    };
    path.is_dir() || begins_so().unwrap_or(false)
}

/// The files that a table is read from, each with its name: below the directory, or its own.
pub fn part_files(path: &Path) -> Result<Vec<(String, PathBuf)>, Error> {
    let name = |p: &Path| p.file_name().map_or_else(|| p.display().to_string(), |n| n.to_string_lossy().into_owned());
    if !path.is_dir() {
        return Ok(vec![(name(path), path.to_path_buf())]);
    }
    let below = |part: &Path| part.strip_prefix(path).unwrap_or(part).to_string_lossy().into_owned();
    let parts = ParquetTable::open(path)?.parts;
    Ok(parts.into_iter().map(|p| (format!("{}/{}", name(path), below(&p.path)), p.path)).collect())
}

impl ParquetTable {
    /// Finds the parts.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let mut parts = Vec::new();
        if path.is_dir() {
            collect(path, &mut Vec::new(), &mut parts)?;
            if parts.is_empty() {
                return Err(Error::file(path, "holds no Parquet files"));
            }
        } else {
            parts.push(Part { path: path.to_path_buf(), partition: Vec::new() });
        }
        let names = |part: &Part| part.partition.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
        let first = names(&parts[0]);
        if let Some(other) = parts.iter().find(|p| names(p) != first) {
            let shown = |names: &[String]| if names.is_empty() { "none".into() } else { names.join(", ") };
            let (this, before) = (shown(&names(other)), shown(&first));
            return Err(Error::file(&other.path, format!("is under the keys {this}, but other parts under {before}")));
        }
        let values = |at: usize| parts.iter().filter_map(move |p| p.partition[at].1.as_deref());
        let whole = |text: &str| text.parse::<i64>().is_ok_and(|n| n.to_string() == text);
        let key = |(at, name)| Key { name, whole_numbers: values(at).all(whole) };
        let keys = first.into_iter().enumerate().map(key).collect();
        Ok(ParquetTable { parts, keys })
    }

    /// The columns of the first part, and those that directories carry.
    pub fn columns(&self) -> Result<Vec<String>, Error> {
        let first = reader(&self.parts[0].path)?;
        let mut names: Vec<String> = first.schema().fields().iter().map(|f| f.name().clone()).collect();
        names.retain(|name| self.keys.iter().all(|k| k.name != *name));
        names.extend(self.keys.iter().map(|k| k.name.clone()));
        Ok(names)
    }

    /// The rows, part by part; of each only the named columns are decoded (`None`: all).
    pub fn batches(self, columns: Option<Vec<String>>) -> impl Iterator<Item = Result<RecordBatch, Error>> {
        let columns = Arc::new(columns);
        let keys = Arc::new(self.keys);
        self.parts.into_iter().flat_map(move |part| {
            let (keys, columns) = (Arc::clone(&keys), Arc::clone(&columns));
            // Opened once its turn comes; an error ends the part.
            let (batches, failed) = match open_part(&part, &keys, columns.as_ref().as_deref()) {
                Ok(batches) => (Some(batches), None),
                Err(e) => (None, Some(Err(e))),
            };
            let read = move |batch: Result<RecordBatch, _>| {
                let batch = batch.map_err(|e| not_whole(&part.path, &e))?;
                with_keys(batch, &part, &keys, columns.as_ref().as_deref())
            };
            failed.into_iter().chain(batches.into_iter().flatten().map(read))
        })
    }
}

fn not_whole(path: &Path, e: &dyn std::fmt::Display) -> Error {
    Error::file(path, format!("not a whole Parquet file: {e}"))
}

fn reader(path: &Path) -> Result<ParquetRecordBatchReaderBuilder<File>, Error> {
    let file = File::open(path).map_err(Error::io(path))?;
    ParquetRecordBatchReaderBuilder::try_new(file).map_err(|e| not_whole(path, &e))
}

fn open_part(part: &Part, keys: &[Key], columns: Option<&[String]>) -> Result<ParquetRecordBatchReader, Error> {
    let reader = reader(&part.path)?;
    let schema = reader.schema();
    let position = |name: &String| schema.fields().iter().position(|f| f.name() == name);
    let wanted: Vec<usize> = match columns {
        None => (0..schema.fields().len()).collect(),
        Some(columns) => {
            let own = columns.iter().filter(|name| keys.iter().all(|k| k.name != **name));
            let found = own.map(|name| {
                position(name).ok_or_else(|| {
                    let all = schema.fields().iter().map(|f| f.name().as_str()).collect::<Vec<_>>().join(", ");
                    Error::file(&part.path, format!("has no column {name:?}; its columns are {all}"))
                })
            });
            found.collect::<Result<_, _>>()?
        }
    };
    let mask = ProjectionMask::roots(reader.parquet_schema(), wanted);
    reader.with_projection(mask).with_batch_size(BATCH_ROWS).build().map_err(|e| not_whole(&part.path, &e))
}

/// The batch with the columns of its directories; as in Spark they go before a column of the file with the same name.
fn with_keys(batch: RecordBatch, part: &Part, keys: &[Key], columns: Option<&[String]>) -> Result<RecordBatch, Error> {
    let wanted = |name: &String| columns.is_none_or(|columns| columns.contains(name));
    if !keys.iter().any(|k| wanted(&k.name)) {
        return Ok(batch);
    }
    let rows = batch.num_rows();
    let (schema, arrays, _) = batch.into_parts();
    let mut all: Vec<(Arc<Field>, ArrayRef)> = schema.fields().iter().cloned().zip(arrays).collect();
    all.retain(|(field, _)| keys.iter().all(|k| k.name != *field.name()));
    for (key, (_, value)) in keys.iter().zip(&part.partition).filter(|(k, _)| wanted(&k.name)) {
        let array: ArrayRef = match (key.whole_numbers, value) {
            (true, value) => Arc::new(Int64Array::from(vec![value.as_ref().and_then(|v| v.parse::<i64>().ok()); rows])),
            (false, value) => Arc::new(StringArray::from(vec![value.as_deref(); rows])),
        };
        all.push((Arc::new(Field::new(&key.name, array.data_type().clone(), true)), array));
    }
    let (fields, arrays): (Vec<_>, Vec<_>) = all.into_iter().unzip();
    RecordBatch::try_new(Arc::new(Schema::new(fields)), arrays).map_err(|e| not_whole(&part.path, &e))
}

/// Adds the part files below `dir` in the order of their names.
fn collect(dir: &Path, partition: &mut Vec<(String, Option<String>)>, parts: &mut Vec<Part>) -> Result<(), Error> {
    for (mark, what) in [("_delta_log", "a Delta table"), (".hoodie", "a Hudi table"), ("metadata", "an Iceberg table")]
    {
        // Iceberg keeps `metadata` beside `data`.
        if dir.join(mark).is_dir() && (mark != "metadata" || dir.join("data").is_dir()) {
            let why = "whose files also hold rows that were deleted since; write it as plain Parquet first";
            return Err(Error::file(dir, format!("is {what}, {why}")));
        }
    }
    if partition.len() > DEEPEST {
        return Err(Error::file(dir, format!("lies more than {DEEPEST} directories deep")));
    }
    let entries =
        dir.read_dir().and_then(|entries| entries.map(|e| e.map(|e| e.path())).collect::<Result<Vec<_>, _>>());
    let mut entries = entries.map_err(Error::io(dir))?;
    entries.sort();
    for path in entries {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let (key, value) = name.split_once('=').map_or((None, ""), |(key, value)| (Some(key), value));
        if name.starts_with('.') || (name.starts_with('_') && key.is_none()) {
            continue;
        }
        let meta = path.metadata().map_err(Error::io(&path))?;
        if meta.is_dir() {
            let key = key.ok_or_else(|| {
                Error::file(&path, "is a directory inside a table; expected part files or directories named key=value")
            })?;
            let value = unescape(value);
            partition.push((unescape(key), (value != NULL_PARTITION).then_some(value)));
            collect(&path, partition, parts)?;
            partition.pop();
        } else if meta.len() > 0 {
            parts.push(Part { path, partition: partition.clone() });
        }
    }
    Ok(())
}

/// Text with `%2F` and the like resolved.
fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let digits = after.get(..2).and_then(|d| std::str::from_utf8(d).ok());
        let byte = digits.filter(|_| first == b'%').and_then(|d| u8::from_str_radix(d, 16).ok());
        bytes.push(byte.unwrap_or(first));
        rest = if byte.is_some() { &after[2..] } else { after };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_of_directories() {
        for (text, want) in [("a%2Fb%20", "a/b "), ("100%", "100%"), ("%zz%4", "%zz%4"), ("%C3%A9", "é")] {
            assert_eq!(unescape(text), want);
        }
    }
}
