//! Scoring rows from outside: readers of requests, writers of scores, histories of users.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::{ArrayRef, Float32Array, Int64Array, RecordBatch};

use super::Error;
use super::pipeline::{Part, Pipeline, Trained};
use super::trainable::score_rows;
use crate::data::parquet_io::{integers, read_batches, write_batch};
use crate::data::{Samples, Split};
use crate::llm::model::Workspace;
use crate::llm::prefix_cache::PrefixCache;
use crate::prompt::encode_rows;

/// Rows read and scored at once.
const CHUNK: usize = 1024;

/// Ids of some columns of a CSV or Parquet file, in chunks.
pub struct IdReader<const N: usize> {
    path: PathBuf,
    names: [&'static str; N],
    source: Source<N>,
}

enum Source<const N: usize> {
    Csv { reader: Box<csv::Reader<File>>, columns: [usize; N] },
    Parquet(std::vec::IntoIter<Vec<[u32; N]>>),
}

impl<const N: usize> IdReader<N> {
    /// Opens a file; a name that ends in `.parquet`, or a directory of part files, is Parquet.
    pub fn open(path: &Path, names: [&'static str; N]) -> Result<Self, Error> {
        let bad = |what: String| Error::state(path, what);
        let source = if path.is_dir() || path.extension().is_some_and(|e| e == "parquet") {
            let mut rows = Vec::new();
            for batch in read_batches(path)? {
                let column = |name: &str| {
                    let array = batch.column_by_name(name).ok_or_else(|| bad(format!("has no column {name}")))?;
                    integers(array).map_err(|e| bad(format!("column {name} {e}")))
                };
                let columns = names.iter().map(|name| column(name)).collect::<Result<Vec<_>, _>>()?;
                for row in 0..batch.num_rows() {
                    let mut ids = [0; N];
                    for ((id, name), column) in ids.iter_mut().zip(names).zip(&columns) {
                        let value = column[row];
                        *id = u32::try_from(value)
                            .map_err(|_| bad(format!("row {row}: {name} is {value}; expected an id")))?;
                    }
                    rows.push(ids);
                }
            }
            Source::Parquet(rows.chunks(CHUNK).map(<[_]>::to_vec).collect::<Vec<_>>().into_iter())
        } else {
            let mut reader = csv::Reader::from_path(path).map_err(|e| bad(e.to_string()))?;
            let header = reader.headers().map_err(|e| bad(e.to_string()))?.clone();
            let mut columns = [0; N];
            for (at, name) in columns.iter_mut().zip(names) {
                let all = || header.iter().collect::<Vec<_>>().join(", ");
                let found = header.iter().position(|h| h == name);
                *at = found.ok_or_else(|| bad(format!("has no column {name}; its columns are {}", all())))?;
            }
            Source::Csv { columns, reader: Box::new(reader) }
        };
        Ok(IdReader { path: path.to_path_buf(), names, source })
    }
}

impl<const N: usize> Iterator for IdReader<N> {
    type Item = Result<Vec<[u32; N]>, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        let (reader, columns) = match &mut self.source {
            Source::Parquet(chunks) => return chunks.next().map(Ok),
            Source::Csv { reader, columns } => (reader, columns),
        };
        let mut rows = Vec::new();
        for record in reader.records().take(CHUNK) {
            let record = match record {
                Ok(r) => r,
                Err(e) => return Some(Err(Error::state(&self.path, e.to_string()))),
            };
            let parsed = columns.map(|at| record[at].trim().parse().ok());
            if parsed.contains(&None) {
                let line = record.position().map_or(0, csv::Position::line);
                let fields = self.names.iter().zip(*columns).map(|(name, at)| format!("{name} {:?}", &record[at]));
                let fields = fields.collect::<Vec<_>>().join(", ");
                let expected = match N {
                    1 => "an id",
                    2 => "two ids",
                    _ => "ids",
                };
                return Some(Err(Error::state(&self.path, format!("line {line}: {fields}; expected {expected}"))));
            }
            rows.push(parsed.map(Option::unwrap_or_default));
        }
        (!rows.is_empty()).then_some(Ok(rows))
    }
}

/// Scores rows with a part of a run.
pub struct Scorer<'a> {
    pipeline: &'a Pipeline,
    trained: &'a Trained,
    part: Part,
    /// Place of every (user, item) of valid and test.
    known: HashMap<(u32, u32), (Split, usize)>,
    /// Everything a user liked, oldest first.
    liked: HashMap<u32, Vec<u32>>,
    workspace: Workspace,
    prefixes: Option<PrefixCache<'a>>,
}

impl<'a> Scorer<'a> {
    /// Indexes the run's data.
    pub fn new(pipeline: &'a Pipeline, trained: &'a Trained, part: Part) -> Self {
        let data = pipeline.data();
        let mut known = HashMap::new();
        let mut latest: HashMap<u32, (i64, Vec<u32>)> = HashMap::new();
        for split in [Split::Train, Split::Valid, Split::Test] {
            let s = data.split(split);
            for i in 0..s.len() {
                known.insert((s.uid[i], s.iid[i]), (split, i));
                // A user's last row knows all earlier likes; its own like comes on top.
                let entry = latest.entry(s.uid[i]).or_insert((i64::MIN, Vec::new()));
                if s.row[i] > entry.0 {
                    let own = (s.label[i] == 1).then_some(s.iid[i]);
                    *entry = (s.row[i], s.history(i).iter().copied().chain(own).collect());
                }
            }
        }
        let liked = latest.into_iter().map(|(user, (_, liked))| (user, liked)).collect();
        Scorer { pipeline, trained, part, known, liked, workspace: Workspace::default(), prefixes: None }
    }

    /// With the prefix cache of the run, if it has one ([`Pipeline::prefixes`]). For rows as they come: candidates of one user share
    /// more among themselves than what is kept.
    pub fn with_prefixes(mut self, run: &Path) -> Result<Self, Error> {
        self.prefixes = self.pipeline.prefixes(run, self.part, self.trained)?;
        Ok(self)
    }

    /// Rows of the data form for (user, item) pairs: the row of the data itself where there is one, else the user's likes so far
    /// (without the item).
    pub fn rows(&self, pairs: &[[u32; 2]]) -> Result<Samples, Error> {
        let data = self.pipeline.data();
        let mut rows = Samples::empty();
        for (n, &[uid, iid]) in pairs.iter().enumerate() {
            if data.titles.get(iid as usize).is_none_or(String::is_empty) {
                let what = format!(
                    "item {iid} of request {n} has no title in the data; known items are 1 to {}",
                    data.n_items - 1
                );
                return Err(Error::state(Path::new(&self.pipeline.config().data.dir), what));
            }
            match self.known.get(&(uid, iid)) {
                Some(&(split, i)) => {
                    let s = data.split(split);
                    rows.push(s.row[i], uid, iid, s.label[i], s.timestamp[i], s.history(i));
                }
                None => {
                    let liked = self.liked.get(&uid).map_or(&[][..], Vec::as_slice);
                    rows.push(-1, uid, iid, 0, 0, liked);
                }
            }
        }
        Ok(rows)
    }

    /// Rows that ask for each candidate after everything the user is known to like; with `keep_liked` false, without what they like.
    pub fn candidates(&self, user: u32, items: &[u32], keep_liked: bool) -> Result<Samples, Error> {
        let data = self.pipeline.data();
        let liked = self.liked.get(&user).map_or(&[][..], Vec::as_slice);
        let mut rows = Samples::empty();
        for &item in items {
            if data.titles.get(item as usize).is_none_or(String::is_empty) {
                let what =
                    format!("candidate {item} has no title in the data; known items are 1 to {}", data.n_items - 1);
                return Err(Error::state(Path::new(&self.pipeline.config().data.dir), what));
            }
            if keep_liked || !liked.contains(&item) {
                rows.push(-1, user, item, 0, 0, liked);
            }
        }
        Ok(rows)
    }

    /// The score of every row.
    pub fn score(&mut self, rows: &Samples) -> Result<Vec<f32>, Error> {
        let config = self.pipeline.config();
        let prompts = encode_rows(&self.pipeline.data().titles, rows, &self.pipeline.builder(self.part))?;
        let all: Vec<usize> = (0..rows.len()).collect();
        let loss = if self.part == Part::Stage2 { config.stage2.loss } else { config.stage1.loss };
        score_rows(
            self.pipeline.model(),
            Some(&self.trained.tensors),
            self.trained.collab.as_ref(),
            rows,
            &prompts,
            &all,
            loss,
            config.eval.batch_tokens,
            &mut self.workspace,
            self.prefixes.as_mut(),
            |_| (),
        )
    }
}

/// Writes rows of ids and a score: CSV as they come, Parquet at the end.
pub struct ScoreWriter {
    path: PathBuf,
    columns: &'static [&'static str],
    sink: Sink,
}

enum Sink {
    Stdout,
    /// Written under a temporary name, renamed when it is whole.
    Csv(BufWriter<tempfile::NamedTempFile>),
    /// A column of each kind of id, and the scores.
    Parquet(Vec<Vec<i64>>, Vec<f32>),
}

impl ScoreWriter {
    /// Opens the output; `-` is standard output. `columns`: names of the ids; the score comes last.
    pub fn create(path: &Path, columns: &'static [&'static str]) -> Result<Self, Error> {
        let sink = if path == Path::new("-") {
            Sink::Stdout
        } else if path.extension().is_some_and(|e| e == "parquet") {
            Sink::Parquet(vec![Vec::new(); columns.len()], Vec::new())
        } else {
            let dir = path.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new("."));
            Sink::Csv(BufWriter::new(tempfile::NamedTempFile::new_in(dir).map_err(Error::io(dir))?))
        };
        let mut writer = ScoreWriter { path: path.to_path_buf(), columns, sink };
        writer.line(&format!("{},score\n", columns.join(",")))?;
        Ok(writer)
    }

    fn line(&mut self, text: &str) -> Result<(), Error> {
        let written = match &mut self.sink {
            Sink::Stdout => std::io::stdout().write_all(text.as_bytes()),
            Sink::Csv(file) => file.write_all(text.as_bytes()),
            Sink::Parquet(..) => Ok(()),
        };
        written.map_err(Error::io(&self.path))
    }

    /// Adds rows: ids in the order of the columns, and their score.
    pub fn write<const N: usize>(&mut self, rows: impl IntoIterator<Item = ([u32; N], f32)>) -> Result<(), Error> {
        assert_eq!(N, self.columns.len(), "an id for each column");
        let mut lines = String::new();
        for (ids, score) in rows {
            match &mut self.sink {
                Sink::Parquet(columns, scores) => {
                    columns.iter_mut().zip(ids).for_each(|(c, id)| c.push(i64::from(id)));
                    scores.push(score);
                }
                _ => {
                    ids.iter().for_each(|id| lines += &format!("{id},"));
                    lines += &format!("{score}\n");
                }
            }
        }
        self.line(&lines)
    }

    /// Makes the output whole.
    pub fn finish(self) -> Result<(), Error> {
        match self.sink {
            Sink::Stdout => Ok(()),
            Sink::Csv(file) => {
                let file =
                    file.into_inner().map_err(|e| Error::Io { path: self.path.clone(), source: e.into_error() })?;
                file.as_file().sync_all().map_err(Error::io(&self.path))?;
                file.persist(&self.path).map(|_| ()).map_err(|e| Error::Io { path: self.path.clone(), source: e.error })
            }
            Sink::Parquet(ids, scores) => {
                let ids = ids.into_iter().map(|c| Arc::new(Int64Array::from(c)) as ArrayRef);
                let columns = self.columns.iter().copied().zip(ids);
                let scores = [("score", Arc::new(Float32Array::from(scores)) as ArrayRef)];
                let batch = RecordBatch::try_from_iter(columns.chain(scores));
                let batch = batch.map_err(|e| Error::state(&self.path, e.to_string()))?;
                Ok(write_batch(&self.path, &batch)?)
            }
        }
    }
}
