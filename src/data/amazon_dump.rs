//! Files of Amazon's review dumps, row by row: lines of JSON in the forms of 2018 and 2023, or Parquet with the same names, and what
//! is wrong with a row or a whole file. Which rows count is left to `amazon`.

use std::borrow::Cow;
use std::path::Path;

use arrow_array::Array;
use arrow_schema::DataType;

use super::Error;
use super::cells::cells;
use super::error::BadRow;
use super::json_fields::{Field, fields};
use super::lines::{first_line, for_lines};
use super::parquet_table::{ParquetTable, is_parquet};
use super::time::LATEST;

/// Unusable rows listed before a refused input is read no further.
pub const BAD_ROWS_SHOWN: usize = 1000;
/// Unusable rows that may be skipped: more of them are another kind of file.
pub const MOST_BAD_ROWS: usize = 100_000;

/// Names of the fields of a dump.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// `*_5.json.gz` and `meta_*.json.gz`: items by asin, times in seconds.
    Y2018,
    /// `*.jsonl` and `meta_*.jsonl`, or Parquet: items by their parents' asin, times in milliseconds.
    Y2023,
}

impl Form {
    /// User, item, stars, time.
    pub fn review(self) -> [&'static str; 4] {
        match self {
            Form::Y2018 => ["reviewerID", "asin", "overall", "unixReviewTime"],
            Form::Y2023 => ["user_id", "parent_asin", "rating", "timestamp"],
        }
    }

    /// Item, title.
    pub fn meta(self) -> [&'static str; 2] {
        match self {
            Form::Y2018 => ["asin", "title"],
            Form::Y2023 => ["parent_asin", "title"],
        }
    }

    /// The form of a file of reviews.
    pub fn of_reviews(path: &Path) -> Result<Self, Error> {
        let has = named(path)?;
        // Any of a form's own names will do: the first line may be a bad one.
        match (has(&["reviewerID", "unixReviewTime", "overall"]), has(&["user_id"])) {
            (true, _) => Ok(Form::Y2018),
            (_, true) => Ok(Form::Y2023),
            _ => Err(Error::file(path, "has neither reviewerID (2018) nor user_id (2023); expected a file of reviews")),
        }
    }

    /// The form of a file of metas.
    pub fn of_metas(path: &Path) -> Result<Self, Error> {
        let has = named(path)?;
        if has(&["reviewerID", "user_id"]) {
            return Err(Error::file(path, "is a file of reviews; expected the file of metas, with the titles"));
        }
        match (has(&["parent_asin"]), has(&["asin"])) {
            (true, _) => Ok(Form::Y2023),
            (_, true) => Ok(Form::Y2018),
            _ => Err(Error::file(path, "has neither asin (2018) nor parent_asin (2023); expected a file of metas")),
        }
    }

    /// Unix seconds of a time as it stands in the file.
    pub fn seconds(self, name: &str, time: f64) -> Result<i64, String> {
        let latest = LATEST as f64;
        match self {
            Form::Y2018 if time.abs() <= latest => Ok(time.floor() as i64),
            Form::Y2018 => Err(format!("{name} is {time}; expected Unix seconds")),
            Form::Y2023 if time.abs() > latest && time.abs() <= latest * 1000.0 => Ok((time / 1000.0).floor() as i64),
            Form::Y2023 => Err(format!("{name} is {time}; expected Unix milliseconds")),
        }
    }
}

/// Says of names whether any of them is a field of the first line, or a column.
fn named(path: &Path) -> Result<impl Fn(&[&str]) -> bool, Error> {
    let (columns, line) = if is_parquet(path) {
        (ParquetTable::open(path)?.columns()?, String::new())
    } else {
        (Vec::new(), first_line(path)?)
    };
    let compact: String = line.chars().take(3).filter(|c| !c.is_whitespace()).collect();
    if compact.starts_with("{'") {
        let what = "holds Python dictionaries, the form of the 2014 dump, not JSON; use the 2018 dump (*_5.json.gz, \
                    meta_*.json.gz)";
        return Err(Error::file(path, what));
    }
    if compact.starts_with('[') {
        return Err(Error::file(path, "is one JSON array; expected one object a line"));
    }
    Ok(move |names: &[&str]| {
        names.iter().any(|name| columns.iter().any(|c| c == name) || line.contains(&format!("\"{name}\"")))
    })
}

/// Unusable rows, up to a limit.
pub struct BadRows {
    /// The rows so far.
    pub rows: Vec<BadRow>,
    limit: usize,
}

impl BadRows {
    /// None so far; `limit` of them are an error.
    pub fn new(limit: usize) -> Self {
        BadRows { rows: Vec::new(), limit }
    }

    /// Notes one.
    pub fn reject(&mut self, path: &Path, line: u64, reason: String, text: &str) -> Result<(), Error> {
        self.rows.push(BadRow { path: path.to_path_buf(), line, reason, text: text.chars().take(200).collect() });
        match self.rows.len() {
            n if n < self.limit => Ok(()),
            MOST_BAD_ROWS => Err(Error::file(
                path,
                format!("has {MOST_BAD_ROWS} unusable rows by line {line}: is it the right file?"),
            )),
            _ => Err(Error::BadRows(std::mem::take(&mut self.rows))),
        }
    }
}

/// A user's or item's key.
pub fn key<'a>(field: Field<'a>, name: &str) -> Result<Cow<'a, str>, String> {
    let text = field.text(name)?;
    if text.is_empty() { Err(format!("{name} is empty; expected a key")) } else { Ok(text) }
}

/// A line of JSON, or a row of Parquet.
pub enum Row<'a> {
    /// Of a file of lines; `Err`: it is not UTF-8.
    Line(Result<&'a str, String>),
    /// Of a Parquet table.
    Cells {
        /// The columns asked for, as text.
        texts: &'a [String],
        /// The last of them is a time by its type, given in seconds.
        time_is_typed: bool,
    },
}

impl Row<'_> {
    /// The named fields. `Err`: why the row is unusable.
    pub fn fields<const N: usize>(&self, names: &[&str; N]) -> Result<[Field<'_>; N], String> {
        match self {
            Row::Line(Ok(line)) => fields(line, names),
            Row::Line(Err(_)) => Err("not UTF-8; expected UTF-8 text".into()),
            Row::Cells { texts, .. } => Ok(std::array::from_fn(|i| match texts[i].as_str() {
                "" => Field::Null,
                // Only stars and time are numbers; keys of digits stay text.
                text if i < 2 => Field::Text(text.into()),
                text => text.parse().map_or(Field::Text(text.into()), Field::Number),
            })),
        }
    }

    /// The time, where the column says by its type that it is one.
    pub fn seconds(&self) -> Option<i64> {
        match self {
            Row::Cells { texts, time_is_typed: true } => texts.get(3)?.parse().ok(),
            _ => None,
        }
    }

    /// The row as it stands, for messages.
    pub fn text(&self) -> String {
        match self {
            Row::Line(Ok(line)) => line.chars().take(200).collect(),
            Row::Line(Err(lossy)) => lossy.clone(),
            Row::Cells { texts, .. } => texts.join("\t"),
        }
    }
}

/// Calls `f` with number and contents of every row of a file of lines or a Parquet table, of which `names` are read.
pub fn for_rows<const N: usize>(
    path: &Path,
    names: &[&str; N],
    mut f: impl FnMut(u64, Row) -> Result<(), Error>,
) -> Result<(), Error> {
    if !is_parquet(path) {
        return for_lines(path, |line, text| f(line, Row::Line(text)));
    }
    let mut row = 0;
    for batch in ParquetTable::open(path)?.batches(Some(names.map(String::from).to_vec())) {
        let batch = batch?;
        let column = |name: &&str| {
            let array = batch.column_by_name(name).ok_or_else(|| Error::file(path, format!("has no column {name}")))?;
            let typed = matches!(array.data_type(), DataType::Timestamp(..) | DataType::Date32 | DataType::Date64);
            cells(array).map(|cells| (cells, typed)).map_err(|e| Error::file(path, format!("column {name} {e}")))
        };
        let columns = names.iter().map(column).collect::<Result<Vec<_>, _>>()?;
        let time_is_typed = columns.last().is_some_and(|c| c.1);
        let mut texts = vec![String::new(); N];
        for i in 0..batch.num_rows() {
            for (text, (cell, _)) in texts.iter_mut().zip(&columns) {
                text.clear();
                cell(i, text);
            }
            row += 1;
            f(row, Row::Cells { texts: &texts, time_is_typed })?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_of_both_forms() {
        assert_eq!(Form::Y2018.seconds("t", 1_483_228_800.0), Ok(1_483_228_800));
        assert_eq!(Form::Y2023.seconds("t", 1_483_228_800_999.0), Ok(1_483_228_800));
        let other = [(Form::Y2018, 1.4e12), (Form::Y2023, 1.4e9), (Form::Y2023, 1e300), (Form::Y2018, f64::NAN)];
        for (form, time) in other {
            assert!(form.seconds("t", time).is_err(), "{form:?} {time}");
        }
    }
}
