//! The sources of `collm-engine prepare`: each reads its files into the common form, applies its split rule, and writes a
//! prepared directory.

use std::path::{Path, PathBuf};

use super::Error;
use super::error::BadRow;
use super::pandas::{Column, Frame, read_frame};
use super::parquet_io::{Titles, push_row};
use super::rules::{Interactions, RawKeys, build};
use super::samples::{Dataset, Samples, Split};
use super::store::{Manifest, Provenance, write};
use super::table::{Collector, Layout, read, seconds, year_and_month};

/// Where valid and test begin.
#[derive(Clone, Debug, PartialEq)]
pub enum SplitRule {
    /// Shares of the rows in order of time, in percent: train, valid, test.
    Fractions(f64, f64, f64),
    /// Unix seconds from which rows are valid, and from which they are test.
    Dates(i64, i64),
}

impl SplitRule {
    /// From `60/20/20`.
    pub fn parse_fractions(text: &str) -> Result<Self, Error> {
        let parts: Option<Vec<f64>> = text.split('/').map(|p| p.trim().parse().ok()).collect();
        match parts.as_deref() {
            Some(&[a, b, c]) if [a, b, c].iter().all(|x| *x > 0.0) && (a + b + c - 100.0).abs() < 1e-9 => {
                Ok(SplitRule::Fractions(a, b, c))
            }
            _ => Err(Error::Argument(format!(
                "--split {text:?}: expected three percentages that add up to 100, like 60/20/20"
            ))),
        }
    }

    /// From two dates.
    pub fn parse_dates(valid: &str, test: &str) -> Result<Self, Error> {
        let date = |text: &str| {
            seconds(text)
                .ok_or_else(|| Error::Argument(format!("{text:?} is not a date; expected one like 2001-05-31")))
        };
        let (valid, test) = (date(valid)?, date(test)?);
        if valid >= test {
            return Err(Error::Argument("--valid-from must be before --test-from".into()));
        }
        Ok(SplitRule::Dates(valid, test))
    }

    fn describe(&self) -> String {
        match self {
            SplitRule::Fractions(a, b, c) => format!("split by rank in time: {a} % train, {b} % valid, {c} % test"),
            SplitRule::Dates(v, t) => format!("split by time: valid from Unix second {v}, test from {t}"),
        }
    }

    fn assign(&self, source: &mut Interactions) {
        match *self {
            SplitRule::Dates(valid, test) => source.rows.iter_mut().for_each(|r| {
                let later = if r.timestamp >= test { Split::Test } else { Split::Valid };
                r.split = Some(if r.timestamp < valid { Split::Train } else { later });
            }),
            SplitRule::Fractions(train, valid, _) => {
                let mut order: Vec<usize> = (0..source.rows.len()).collect();
                order.sort_by_key(|&i| source.rows[i].timestamp);
                let bound = |percent: f64| (percent / 100.0 * order.len() as f64).round() as usize;
                let (valid_from, test_from) = (bound(train), bound(train + valid));
                for (rank, &i) in order.iter().enumerate() {
                    let later = if rank >= test_from { Split::Test } else { Split::Valid };
                    source.rows[i].split = Some(if rank < valid_from { Split::Train } else { later });
                }
            }
        }
    }
}

/// Share of valid that becomes valid_small: the official half of ML-1M.
const SMALL: f64 = 0.5;

fn common_rules(extra: [String; 2]) -> Vec<String> {
    let [label, split] = extra;
    vec![
        label,
        split,
        "order: user, then time; ties keep the order of the file".into(),
        "history: all liked items of the user before the row, across splits, oldest first, after a sentinel 0".into(),
        "ids: from 1 in order of first appearance".into(),
        "not_cold: user and item occur in train; warm: more than 3 train rows each; cold: neither occurs in train"
            .into(),
        format!("valid_small: {SMALL} of valid, as pandas' sample with random_state 2023"),
    ]
}

/// Raw MovieLens-1M: `ratings.dat` (`user::movie::rating::time`) and `movies.dat` (`movie::title::genres`, Latin-1), by the
/// official rules: months 14 to 23 after April 2000 train, 24 to 28 valid, 29 to 33 test, the rest unused; liked from 4.
pub fn prepare_ml1m(ratings: &Path, movies: &Path, out: &Path, skip_bad_rows: bool) -> Result<Manifest, Error> {
    let mut collector = Collector::default();
    for_lines(movies, |line, text| {
        // A title may hold "::": the key is before the first, the genres after the last.
        match (text.split_once("::"), text.rsplit_once("::")) {
            (Some((key, _)), Some((before, _))) if before.len() > key.len() + 1 => {
                collector.item(movies, line, key, &before[key.len() + 2..]);
            }
            _ => collector.reject(movies, line, format!("{text:?}: expected movie::title::genres")),
        }
    })?;
    for_lines(ratings, |line, text| {
        let fields: Vec<&str> = text.split("::").collect();
        let numbers = match fields[..] {
            [_, _, rating, time] => rating.parse::<f64>().ok().filter(|r| r.is_finite()).zip(time.parse::<i64>().ok()),
            _ => None,
        };
        match numbers {
            // The official join is an inner one: ratings of movies that movies.dat does not name are left out.
            Some((rating, time)) => {
                collector.interaction(ratings, line, fields[0], fields[1], rating >= 4.0, time, true)
            }
            None => collector.reject(ratings, line, format!("{text:?}: expected user::movie::rating::seconds")),
        }
    })?;
    let (mut source, bad) = collector.finish(skip_bad_rows)?;
    for row in &mut source.rows {
        let (year, month) = year_and_month(row.timestamp);
        row.split = match 12 * (year - 2000) + month - 4 {
            14..=23 => Some(Split::Train),
            24..=28 => Some(Split::Valid),
            29..=33 => Some(Split::Test),
            _ => None,
        };
    }
    let rules = [
        "liked: rating >= 4".into(),
        "split by month (UTC) after April 2000: train 14-23, valid 24-28, test 29-33".into(),
    ];
    finish(&source, out, "MovieLens-1M", rules, vec![ratings, movies], &bad)
}

/// Interactions and items as delimited text.
pub fn prepare_table(
    name: &str,
    interactions: &Path,
    items: &Path,
    layout: &Layout,
    split: &SplitRule,
    out: &Path,
    skip_bad_rows: bool,
) -> Result<Manifest, Error> {
    let (mut source, bad) = read(interactions, items, layout)?.finish(skip_bad_rows)?;
    split.assign(&mut source);
    let rules = [format!("liked: {} >= {}", layout.rating, layout.threshold), split.describe()];
    finish(&source, out, name, rules, vec![interactions, items], &bad)
}

fn finish(
    source: &Interactions,
    out: &Path,
    name: &str,
    rules: [String; 2],
    inputs: Vec<&Path>,
    bad_rows: &[BadRow],
) -> Result<Manifest, Error> {
    let (dataset, keys) = build(source, SMALL);
    write(out, &dataset, &keys, Provenance { source: name, rules: common_rules(rules), inputs, bad_rows })
}

/// The official files: a zip or a directory of the published pickles, or a directory of the same as Parquet.
pub fn prepare_collm(from: &Path, out: &Path) -> Result<Manifest, Error> {
    let parquet = from.join("train.parquet");
    let (dataset, inputs) = if parquet.is_file() {
        (Dataset::load(from)?, Split::ALL.map(|s| from.join(format!("{}.parquet", s.name()))).to_vec())
    } else {
        let mut titles = Titles::default();
        let mut splits = Vec::new();
        let mut inputs = Vec::new();
        for split in Split::ALL {
            let name = format!("{}_ood2.pkl", split.name());
            let (path, bytes) = official_file(from, &name)?;
            let frame = read_frame(&bytes).map_err(|e| Error::file(&path, e))?;
            splits.push(samples_of(frame, &mut titles).map_err(|e| Error::file(&path, e))?);
            inputs.push(if from.is_dir() { path } else { from.to_path_buf() });
        }
        let splits: [Samples; 4] = splits.try_into().unwrap_or_else(|_| unreachable!("four splits"));
        inputs.dedup();
        (Dataset::from_splits(splits, titles, from)?, inputs)
    };
    let number = |n: usize| (0..n).map(|i| if i == 0 { String::new() } else { i.to_string() }).collect();
    let keys = RawKeys { users: number(dataset.n_users), items: number(dataset.n_items) };
    let rules = vec!["rows, ids, histories and splits as published; warm and cold from the counts of train".into()];
    let provenance = Provenance {
        source: "official CoLLM files",
        rules,
        inputs: inputs.iter().map(PathBuf::as_path).collect(),
        bad_rows: &[],
    };
    write(out, &dataset, &keys, provenance)
}

/// Finds a published file in a directory (or in a folder of it), or in a zip.
fn official_file(from: &Path, name: &str) -> Result<(PathBuf, Vec<u8>), Error> {
    let missing =
        || Error::file(from, format!("holds no {name} (nor train.parquet); expected the official CoLLM files"));
    if from.is_dir() {
        let mut places = vec![from.join(name)];
        let inside = from.read_dir().map_err(Error::io(from))?.flatten().map(|e| e.path().join(name));
        places.extend(inside);
        let path = places.into_iter().find(|p| p.is_file()).ok_or_else(missing)?;
        let bytes = std::fs::read(&path).map_err(Error::io(&path))?;
        return Ok((path, bytes));
    }
    /// Far above the published files: a zip that claims more is not one of them.
    const LARGEST: u64 = 8 << 30;
    let file = std::fs::File::open(from).map_err(Error::io(from))?;
    let mut zip =
        zip::ZipArchive::new(file).map_err(|e| Error::file(from, format!("neither a directory nor a zip: {e}")))?;
    let wanted = |n: &str| n.rsplit('/').next() == Some(name);
    let entry =
        zip.file_names().find_map(|n| n.ok().filter(|n| wanted(n)).map(|n| n.to_string())).ok_or_else(missing)?;
    let mut entry = zip.by_name(&entry).map_err(|e| Error::file(from, e.to_string()))?;
    if entry.size() > LARGEST {
        return Err(Error::file(from, format!("{name} claims {} bytes", entry.size())));
    }
    let mut bytes = Vec::new();
    let mut limited = std::io::Read::take(&mut entry, LARGEST);
    std::io::Read::read_to_end(&mut limited, &mut bytes).map_err(Error::io(from))?;
    Ok((from.join(name), bytes))
}

fn samples_of(frame: Frame, titles: &mut Titles) -> Result<Samples, String> {
    let column = |name: &str| {
        let names = || frame.columns.iter().map(|c| c.0.as_str()).collect::<Vec<_>>().join(", ");
        frame
            .columns
            .iter()
            .find(|c| c.0 == name)
            .map(|c| &c.1)
            .ok_or_else(|| format!("has no column {name}; has {}", names()))
    };
    let ints = |name: &str| match column(name)? {
        Column::Int(v) => Ok(v.clone()),
        Column::Float(v) if v.iter().all(|x| x.fract() == 0.0 && x.abs() < 1e15) => {
            Ok(v.iter().map(|&x| x as i64).collect())
        }
        _ => Err(format!("column {name} is not of whole numbers")),
    };
    let (uid, iid, label, timestamp) = (ints("uid")?, ints("iid")?, ints("label")?, ints("timestamp")?);
    let (Column::IntList(his), Column::TextList(his_title)) = (column("his")?, column("his_title")?) else {
        return Err("columns his and his_title are not lists of integers and of text".into());
    };
    let Column::Text(title) = column("title")? else { return Err("column title is not text".into()) };
    let mut samples = Samples::empty();
    for i in 0..uid.len() {
        let ids = [uid[i], iid[i], label[i], timestamp[i]];
        push_row(&mut samples, titles, frame.index[i], ids, &his[i], &his_title[i], &title[i])
            .map_err(|e| format!("row {i}: {e}"))?;
    }
    Ok(samples)
}

/// Calls `f` with number and text of every line of a Latin-1 file.
fn for_lines(path: &Path, mut f: impl FnMut(u64, &str)) -> Result<(), Error> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    for (i, line) in bytes.split(|&b| b == b'\n').enumerate() {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if !line.is_empty() {
            f(i as u64 + 1, &line.iter().map(|&b| char::from(b)).collect::<String>());
        }
    }
    Ok(())
}
