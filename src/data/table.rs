//! Tables of interactions as delimited text: RecBole's atomic files, CSV, and raw MovieLens, read into the common form.
//!
//! A row that cannot be used is noted with file, line and reason. By default any such row refuses the whole input: silently
//! thinner data gives silently different numbers.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::Error;
use super::error::BadRow;
use super::rules::{Interaction, Interactions};

/// How a delimited file is laid out.
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
    /// Column of the rating, liked from the threshold on.
    pub rating: String,
    /// Column of the time.
    pub timestamp: String,
    /// Column of the title, in the items file.
    pub title: String,
    /// Column of the year, put behind titles as `Title (Year)` where it is a year and the title has none.
    pub year: Option<String>,
    /// A rating of at least this is a like.
    pub threshold: f64,
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
            rating: "rating".into(),
            timestamp: "timestamp".into(),
            title: "movie_title".into(),
            year: Some("release_year".into()),
            threshold,
        }
    }
}

/// Collects interactions and what is wrong with them.
#[derive(Debug, Default)]
pub struct Collector {
    /// The common form so far.
    pub interactions: Interactions,
    /// Unusable rows so far.
    pub bad: Vec<BadRow>,
    users: HashMap<String, u32>,
    items: HashMap<String, u32>,
    seen: HashMap<(u32, u32), u64>,
}

impl Collector {
    /// Notes an unusable row.
    pub fn reject(&mut self, path: &Path, line: u64, reason: impl Into<String>) {
        self.bad.push(BadRow { path: path.to_path_buf(), line, reason: reason.into() });
    }

    /// Adds an item.
    pub fn item(&mut self, path: &Path, line: u64, key: &str, title: &str) {
        let title = title.trim();
        if key.is_empty() || title.is_empty() {
            return self.reject(path, line, format!("expected an item and a title, found {key:?} and {title:?}"));
        }
        let next = self.items.len() as u32;
        match self.items.entry(key.to_string()) {
            std::collections::hash_map::Entry::Occupied(e) => {
                let first = &self.interactions.titles[*e.get() as usize];
                if first != title {
                    let reason = format!("item {key} is titled {title:?} here and {first:?} above");
                    self.reject(path, line, reason);
                }
            }
            std::collections::hash_map::Entry::Vacant(e) => {
                e.insert(next);
                self.interactions.items.push(key.to_string());
                self.interactions.titles.push(title.to_string());
            }
        }
    }

    /// Adds an interaction; its split is assigned later. `known_items_only`: rows of other items are left out, as an inner
    /// join does, instead of being noted as unusable.
    #[allow(clippy::too_many_arguments)] // the fields of a row, and where it stands
    pub fn interaction(
        &mut self,
        path: &Path,
        line: u64,
        user: &str,
        item: &str,
        label: bool,
        timestamp: i64,
        inner_join: bool,
    ) {
        if user.is_empty() || item.is_empty() {
            return self.reject(path, line, format!("expected a user and an item, found {user:?} and {item:?}"));
        }
        let Some(&item_index) = self.items.get(item) else {
            if !inner_join {
                self.reject(path, line, format!("item {item} is not in the items file"));
            }
            return;
        };
        let next = self.users.len() as u32;
        let user_index = *self.users.entry(user.to_string()).or_insert_with(|| {
            self.interactions.users.push(user.to_string());
            next
        });
        if let Some(first) = self.seen.get(&(user_index, item_index)) {
            let reason = format!("user {user} and item {item} are already in line {first}; expected one row a pair");
            return self.reject(path, line, reason);
        }
        self.seen.insert((user_index, item_index), line);
        self.interactions.rows.push(Interaction { user: user_index, item: item_index, label, timestamp, split: None });
    }

    /// The interactions, or an error that names the unusable rows.
    pub fn finish(self, skip_bad_rows: bool) -> Result<(Interactions, Vec<BadRow>), Error> {
        if self.bad.is_empty() || skip_bad_rows {
            Ok((self.interactions, self.bad))
        } else {
            Err(Error::BadRows(self.bad))
        }
    }
}

/// Reads an items file and an interactions file of the given layout.
pub fn read(interactions: &Path, items: &Path, layout: &Layout) -> Result<Collector, Error> {
    let mut collector = Collector::default();
    let mut table = Table::open(items, layout)?;
    let (item, title) = (table.column(&layout.item)?, table.column(&layout.title)?);
    let year = layout.year.as_ref().and_then(|y| table.position(y));
    while let Some((line, record)) = table.next(&mut collector)? {
        let mut name = record[title].trim().to_string();
        if let Some(year) =
            year.map(|y| record[y].trim()).filter(|y| y.len() == 4 && y.bytes().all(|b| b.is_ascii_digit()))
            && !name.is_empty()
            && !name.ends_with(')')
        {
            name = format!("{name} ({year})");
        }
        collector.item(items, line, record[item].trim(), &name);
    }
    let mut table = Table::open(interactions, layout)?;
    let user = table.column(&layout.user)?;
    let (item, rating, time) =
        (table.column(&layout.item)?, table.column(&layout.rating)?, table.column(&layout.timestamp)?);
    while let Some((line, record)) = table.next(&mut collector)? {
        let value: Option<f64> = record[rating].trim().parse().ok().filter(|r: &f64| r.is_finite());
        match (value, seconds(record[time].trim())) {
            (Some(r), Some(t)) => {
                let (user, item) = (record[user].trim(), record[item].trim());
                collector.interaction(interactions, line, user, item, r >= layout.threshold, t, false);
            }
            (None, _) => collector.reject(
                interactions,
                line,
                format!("{} is {:?}; expected a number", layout.rating, &record[rating]),
            ),
            (_, None) => {
                let reason = format!(
                    "{} is {:?}; expected Unix seconds or a date like 2001-05-31",
                    layout.timestamp, &record[time]
                );
                collector.reject(interactions, line, reason);
            }
        }
    }
    Ok(collector)
}

struct Table {
    path: PathBuf,
    reader: csv::Reader<std::fs::File>,
    header: Vec<String>,
}

impl Table {
    fn open(path: &Path, layout: &Layout) -> Result<Self, Error> {
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
        let header = header.iter().map(name).collect();
        Ok(Table { path: path.to_path_buf(), reader, header })
    }

    fn position(&self, name: &str) -> Option<usize> {
        self.header.iter().position(|h| h == name)
    }

    fn column(&self, name: &str) -> Result<usize, Error> {
        self.position(name).ok_or_else(|| {
            Error::file(&self.path, format!("has no column {name:?}; its columns are {}", self.header.join(", ")))
        })
    }

    /// The next usable record and its line; unusable ones are noted.
    fn next(&mut self, collector: &mut Collector) -> Result<Option<(u64, csv::StringRecord)>, Error> {
        let mut record = csv::ByteRecord::new();
        loop {
            let more = self.reader.read_byte_record(&mut record);
            if !more.map_err(|e| Error::file(&self.path, e.to_string()))? {
                return Ok(None);
            }
            let line = record.position().map_or(0, csv::Position::line);
            if record.len() != self.header.len() {
                let reason = format!("{} fields; expected {} as in the header", record.len(), self.header.len());
                collector.reject(&self.path, line, reason);
                continue;
            }
            match csv::StringRecord::from_byte_record(std::mem::take(&mut record)) {
                Ok(text) => return Ok(Some((line, text))),
                Err(_) => collector.reject(&self.path, line, "not UTF-8 text; expected UTF-8"),
            }
        }
    }
}

/// Unix seconds from an integer, a float, or an ISO date with an optional time (UTC).
pub fn seconds(text: &str) -> Option<i64> {
    if let Ok(t) = text.parse::<i64>() {
        return Some(t);
    }
    if let Ok(t) = text.parse::<f64>() {
        return (t.is_finite() && t.abs() < 1e15).then_some(t.floor() as i64);
    }
    let (date, time) = text.trim_end_matches('Z').split_once(['T', ' ']).unwrap_or((text, "00:00:00"));
    let numbers = |s: &str, by: char| s.split(by).map(|p| p.parse::<i64>().ok()).collect::<Option<Vec<_>>>();
    let [year, month, day] = numbers(date, '-')?[..] else { return None };
    let time = numbers(time.split('.').next()?, ':')?;
    let (hour, minute, second) = (*time.first()?, time.get(1).copied().unwrap_or(0), time.get(2).copied().unwrap_or(0));
    let valid = (1..=12).contains(&month)
        && (1..=31).contains(&day)
        && (0..9999).contains(&year)
        && (0..24).contains(&hour)
        && (0..60).contains(&minute)
        && (0..61).contains(&second);
    valid.then(|| days_from_civil(year, month, day) * 86_400 + hour * 3600 + minute * 60 + second)
}

/// Days since 1970-01-01 of a date of the Gregorian calendar.
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    // Years begin in March, so that the leap day comes last; 400 years have 146,097 days.
    let year = if month <= 2 { year - 1 } else { year };
    let (era, of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + day_of_year - 719_468
}

/// (year, month) of Unix seconds, UTC.
pub fn year_and_month(seconds: i64) -> (i64, i64) {
    let days = seconds.div_euclid(86_400) + 719_468;
    let (era, of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let day_of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * day_of_year + 2) / 153;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (era * 400 + year + i64::from(month <= 2), month)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        assert_eq!(seconds("2001-06-01"), Some(991_353_600));
        assert_eq!(seconds("2001-06-01T01:02:03Z"), Some(991_353_600 + 3723));
        assert_eq!(seconds("978300760"), Some(978_300_760));
        assert_eq!(seconds("881250949.0"), Some(881_250_949));
        assert_eq!((seconds("yesterday"), seconds("2001-13-01"), seconds("")), (None, None, None));
        for (y, m, d) in [(1970, 1, 1), (2000, 2, 29), (2001, 12, 31), (1999, 3, 1), (2003, 2, 28)] {
            let t = days_from_civil(y, m, d) * 86_400;
            assert_eq!((year_and_month(t), year_and_month(t + 86_399)), ((y, m), (y, m)));
        }
        assert_eq!(days_from_civil(1970, 1, 1), 0);
    }
}
