//! Interactions and items as tables with named columns, read into the common form: delimited text with a header (CSV, RecBole's
//! atomic files), or Parquet, one file or a directory of parts. Parquet is told by its first bytes.

use std::path::{Path, PathBuf};

use arrow_array::RecordBatch;

use super::Error;
use super::cells::cells;
use super::interactions::{Collector, UnknownItem};
use super::parquet_table::{ParquetTable, is_parquet};
use super::split::SplitRule;
use super::store::{Manifest, Rules, Source, write_built};
use super::time::{EXPECTED, seconds};

/// How a table is laid out. Delimiter, quoting and typed header do not concern Parquet.
#[derive(Clone, Debug)]
pub struct Layout {
    /// Field delimiter.
    pub delimiter: u8,
    /// Fields may be quoted with `"`.
    pub quoting: bool,
    /// Header names carry a type after a colon (RecBole: `user_id:token`), which is not part of the name.
    pub typed_header: bool,
    /// Column of the user.
    pub user: String,
    /// Column of the item, in both files.
    pub item: String,
    /// What says whether a row is a like.
    pub liked: Liked,
    /// Column of the time.
    pub timestamp: String,
    /// Column of the title, in the items file; `None`: the one that is named like a title.
    pub title: Option<String>,
    /// Column of the year, put behind titles as `Title (Year)` where it is a year and the title has none.
    pub year: Option<String>,
}

/// What says whether a row is a like.
#[derive(Clone, Debug, PartialEq)]
pub enum Liked {
    /// A rating of at least the threshold.
    Rating {
        /// Its column.
        column: String,
        /// The least rating that is a like.
        threshold: f64,
    },
    /// A column of 0 and 1.
    Label {
        /// Its column.
        column: String,
    },
}

impl Liked {
    fn column(&self) -> &str {
        match self {
            Liked::Rating { column, .. } | Liked::Label { column } => column,
        }
    }

    fn of(&self, text: &str) -> Result<bool, String> {
        let number = text.parse::<f64>().ok().filter(|r| r.is_finite());
        match self {
            Liked::Rating { column, threshold } => {
                number.map(|r| r >= *threshold).ok_or_else(|| format!("{column} is {text:?}; expected a number"))
            }
            Liked::Label { column } => match number {
                Some(0.0) => Ok(false),
                Some(1.0) => Ok(true),
                _ => Err(format!("{column} is {text:?}; expected 0 or 1")),
            },
        }
    }

    fn describe(&self) -> String {
        match self {
            Liked::Rating { column, threshold } => format!("liked: {column} >= {threshold}"),
            Liked::Label { column } => format!("liked: {column} = 1"),
        }
    }
}

impl Layout {
    /// RecBole's atomic files with MovieLens' column names.
    pub fn recbole(threshold: f64) -> Self {
        Layout {
            delimiter: b'\t',
            quoting: false,
            typed_header: true,
            user: "user_id".into(),
            item: "item_id".into(),
            liked: Liked::Rating { column: "rating".into(), threshold },
            timestamp: "timestamp".into(),
            title: None,
            year: Some("release_year".into()),
        }
    }
}

/// Prepares interactions and items, each delimited text or Parquet. `name` describes the source in the manifest.
pub fn prepare_table(
    name: &str,
    interactions: &Path,
    items: &Path,
    layout: &Layout,
    split: &SplitRule,
    out: &Path,
    skip_bad_rows: bool,
) -> Result<Manifest, Error> {
    let mut collector = Collector::default();
    read_items(items, layout, &mut collector)?;
    read_interactions(interactions, layout, &mut collector)?;
    let (mut source, bad_rows) = collector.finish(skip_bad_rows)?;
    split.assign(&mut source);
    let rules = Rules::usual(layout.liked.describe(), split.describe());
    write_built(out, &source, Source { name, inputs: &[interactions, items], bad_rows: &bad_rows }, rules)
}

fn read_items(path: &Path, layout: &Layout, collector: &mut Collector) -> Result<(), Error> {
    let mut table = Table::open(path, layout)?;
    let item = table.column(&layout.item)?;
    let title = match &layout.title {
        Some(name) => table.column(name)?,
        None => table.title_column()?,
    };
    let year = layout.year.as_ref().and_then(|y| table.position(y));
    table.start(&[Some(item), Some(title), year]);
    while let Some((line, record)) = table.next(collector)? {
        let mut name = record[title].trim().to_string();
        if let Some(year) = year.map(|y| record[y].trim()).filter(|y| is_year(y))
            && !name.is_empty()
            && !ends_in_year(&name)
        {
            name = format!("{name} ({year})");
        }
        if let Err(reason) = collector.item(record[item].trim(), &name) {
            collector.reject(path, line, reason, &table.text(&record));
        }
    }
    Ok(())
}

fn read_interactions(path: &Path, layout: &Layout, collector: &mut Collector) -> Result<(), Error> {
    let mut table = Table::open(path, layout)?;
    let (user, item) = (table.column(&layout.user)?, table.column(&layout.item)?);
    let liked = table.position(layout.liked.column()).ok_or_else(|| {
        let hint = "CoLLM learns from likes and dislikes: name the column of a rating, or of a 0/1 label";
        Error::file(path, format!("has no column {:?}; {}; {hint}", layout.liked.column(), table.columns()))
    })?;
    let time = table.column(&layout.timestamp)?;
    table.start(&[Some(user), Some(item), Some(liked), Some(time)]);
    while let Some((line, record)) = table.next(collector)? {
        let stamp = record[time].trim();
        let added = layout.liked.of(record[liked].trim()).and_then(|label| {
            let timestamp = seconds(stamp).ok_or_else(|| format!("{} is {stamp:?}; {EXPECTED}", layout.timestamp))?;
            collector.interaction(
                line,
                (record[user].trim(), record[item].trim()),
                label,
                timestamp,
                UnknownItem::Refuse,
            )
        });
        if let Err(reason) = added {
            collector.reject(path, line, reason, &table.text(&record));
        }
    }
    Ok(())
}

fn is_year(text: &str) -> bool {
    text.len() == 4 && text.bytes().all(|b| b.is_ascii_digit())
}

/// `Toy Story (1995)` does, `Seven (Se7en)` does not.
fn ends_in_year(title: &str) -> bool {
    title.strip_suffix(')').and_then(|t| t.rsplit_once('(')).is_some_and(|(_, year)| is_year(year))
}

struct Table {
    path: PathBuf,
    rows: Rows,
    delimiter: u8,
    header: Vec<String>,
}

enum Rows {
    Delimited(csv::Reader<std::fs::File>),
    Parquet(Box<ParquetRows>),
}

/// Rows of a Parquet table as records, from 1; columns that were not asked for are empty.
struct ParquetRows {
    /// Taken when the reading starts.
    table: Option<ParquetTable>,
    batches: Box<dyn Iterator<Item = Result<RecordBatch, Error>>>,
    /// Records of the last batch, last first.
    records: Vec<csv::StringRecord>,
    row: u64,
}

impl Table {
    fn open(path: &Path, layout: &Layout) -> Result<Self, Error> {
        if is_parquet(path) {
            let table = ParquetTable::open(path)?;
            let header = table.columns()?;
            let batches = Box::new(std::iter::empty());
            let rows = ParquetRows { table: Some(table), batches, records: Vec::new(), row: 0 };
            return Ok(Table {
                path: path.to_path_buf(),
                rows: Rows::Parquet(Box::new(rows)),
                delimiter: b'\t',
                header,
            });
        }
        let file = std::fs::File::open(path).map_err(Error::io(path))?;
        let mut reader = csv::ReaderBuilder::new()
            .delimiter(layout.delimiter)
            .quoting(layout.quoting)
            .flexible(true)
            .from_reader(file);
        let header = reader.byte_headers().map_err(|e| Error::file(path, format!("cannot read the header: {e}")))?;
        let name = |h: &[u8]| {
            let text = String::from_utf8_lossy(h);
            let text = text.trim_start_matches('\u{feff}').trim();
            if layout.typed_header { text.split(':').next().unwrap_or("").to_string() } else { text.to_string() }
        };
        let header: Vec<String> = header.iter().map(name).collect();
        if header.is_empty() {
            return Err(Error::file(path, "is empty; expected a line of column names, then rows"));
        }
        Ok(Table { path: path.to_path_buf(), rows: Rows::Delimited(reader), delimiter: layout.delimiter, header })
    }

    /// Begins with the rows; of a Parquet table only these columns are read.
    fn start(&mut self, columns: &[Option<usize>]) {
        if let Rows::Parquet(rows) = &mut self.rows
            && let Some(table) = rows.table.take()
        {
            let names = columns.iter().flatten().map(|&at| self.header[at].clone()).collect();
            rows.batches = Box::new(table.batches(Some(names)));
        }
    }

    fn position(&self, name: &str) -> Option<usize> {
        self.header.iter().position(|h| h == name)
    }

    fn column(&self, name: &str) -> Result<usize, Error> {
        self.position(name)
            .ok_or_else(|| Error::file(&self.path, format!("has no column {name:?}; {}", self.columns())))
    }

    fn title_column(&self) -> Result<usize, Error> {
        let like_a_title = |h: &String| h.to_lowercase().contains("title");
        self.position("title")
            .or_else(|| self.header.iter().position(like_a_title))
            .or_else(|| self.position("name"))
            .ok_or_else(|| {
                Error::file(
                    &self.path,
                    format!("has no column of titles; {}; name one with --title-column", self.columns()),
                )
            })
    }

    fn columns(&self) -> String {
        match &self.header[..] {
            [only] => format!("its only column is {only:?} (is the delimiter right?)"),
            all => format!("its columns are {}", all.join(", ")),
        }
    }

    /// The next usable record and its line; unusable ones are noted.
    fn next(&mut self, collector: &mut Collector) -> Result<Option<(u64, csv::StringRecord)>, Error> {
        let reader = match &mut self.rows {
            Rows::Parquet(rows) => return rows.next(&self.path, &self.header),
            Rows::Delimited(reader) => reader,
        };
        let mut record = csv::ByteRecord::new();
        loop {
            let more = reader.read_byte_record(&mut record);
            if !more.map_err(|e| Error::file(&self.path, e.to_string()))? {
                return Ok(None);
            }
            let line = record.position().map_or(0, csv::Position::line);
            match csv::StringRecord::from_byte_record(std::mem::take(&mut record)) {
                Ok(text) if text.len() == self.header.len() => return Ok(Some((line, text))),
                Ok(text) => {
                    let reason = format!("{} fields; expected {} as in the header", text.len(), self.header.len());
                    collector.reject(&self.path, line, reason, &joined(&text, self.delimiter));
                }
                Err(e) => {
                    let lossy = csv::StringRecord::from_byte_record_lossy(e.into_byte_record());
                    collector.reject(
                        &self.path,
                        line,
                        "not UTF-8; expected UTF-8 text".into(),
                        &joined(&lossy, self.delimiter),
                    );
                }
            }
        }
    }

    fn text(&self, record: &csv::StringRecord) -> String {
        joined(record, self.delimiter)
    }
}

fn joined(record: &csv::StringRecord, delimiter: u8) -> String {
    record.iter().collect::<Vec<_>>().join(&char::from(delimiter).to_string())
}

impl ParquetRows {
    fn next(&mut self, path: &Path, header: &[String]) -> Result<Option<(u64, csv::StringRecord)>, Error> {
        while self.records.is_empty() {
            let Some(batch) = self.batches.next() else { return Ok(None) };
            let batch = batch?;
            let column = |name: &String| {
                let array = batch.column_by_name(name)?;
                Some(cells(array).map_err(|e| Error::file(path, format!("column {name} {e}"))))
            };
            let columns = header.iter().map(|name| column(name).transpose()).collect::<Result<Vec<_>, _>>()?;
            let mut text = String::new();
            let record = |row| {
                let mut record = csv::StringRecord::new();
                for cell in &columns {
                    text.clear();
                    if let Some(cell) = cell {
                        cell(row, &mut text);
                    }
                    record.push_field(&text);
                }
                record
            };
            self.records = (0..batch.num_rows()).rev().map(record).collect();
        }
        self.row += 1;
        Ok(self.records.pop().map(|record| (self.row, record)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn years_at_the_end_of_titles() {
        assert!(ends_in_year("Toy Story (1995)") && ends_in_year("M (1931)"));
        for title in ["Seven (Se7en)", "Apollo 13", "1984", "2001: A Space Odyssey (68)", "", ")", "(195x)", "1995)"] {
            assert!(!ends_in_year(title), "{title}");
        }
    }

    #[test]
    fn likes() {
        let rating = Liked::Rating { column: "stars".into(), threshold: 4.0 };
        assert_eq!((rating.of("4"), rating.of("3.5"), rating.of("5.0")), (Ok(true), Ok(false), Ok(true)));
        for text in ["NaN", "inf", "", "four"] {
            assert_eq!(rating.of(text), Err(format!("stars is {text:?}; expected a number")));
        }
        let label = Liked::Label { column: "y".into() };
        assert_eq!((label.of("0"), label.of("1.0")), (Ok(false), Ok(true)));
        assert_eq!(label.of("2"), Err("y is \"2\"; expected 0 or 1".into()));
    }
}
