//! Amazon's review dumps by the official CoLLM rules for Amazon-Book (reference, section 1.4, and the published notebook).
//!
//! Reviews and metas are read at once, each in one pass: lines of JSON (2018: `*_5.json.gz` and `meta_*.json.gz`; 2023: `*.jsonl`,
//! gzipped or not) or Parquet. Kept are user, item, time and like of the year's reviews, and every title, until the rules have
//! chosen. What is mirrored:
//!
//! - Reviews are joined to metas in the order of the *metas*; of several metas of one item the last counts, with its place.
//! - Users and items of more than 20 rows of the year, both counted once, before either is filtered.
//! - Several reviews of one item by one user all stay. Titles stay as they are: HTML entities, tags, none at all.
//! - Users and items are numbered by first appearance in that order, before anything is sorted by time.
//! - January to November is train; December, in order of time, is valid to the half and then test.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;

use super::Error;
use super::amazon_dump::{BAD_ROWS_SHOWN, BadRows, Form, MOST_BAD_ROWS, for_rows, key};
use super::interactions::{Interaction, Interactions};
use super::numpy_sort::argsort;
use super::rules::IdOrder;
use super::samples::Split;
use super::store::{Manifest, Rules, Source, write_built};
use super::time::seconds;

/// Which reviews are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// The year (UTC).
    pub year: u16,
    /// Users and items need more than this many reviews in it.
    pub more_than: u32,
}

impl Default for Window {
    /// As in the official preprocessing of Amazon-Book.
    fn default() -> Self {
        Window { year: 2017, more_than: 20 }
    }
}

/// Share of valid that becomes valid_small.
const SMALL: f64 = 0.25;
/// A review of at least this many stars is a like (the paper says "greater than 4").
const LIKED: f64 = 5.0;

/// Prepares reviews and metas. `name` describes the source in the manifest.
pub fn prepare_amazon(
    name: &str,
    (reviews, meta): (&Path, &Path),
    window: Window,
    out: &Path,
    skip_bad_rows: bool,
) -> Result<Manifest, Error> {
    let span = Span::of(window.year)?;
    let form = Form::of_reviews(reviews)?;
    if Form::of_metas(meta)? != form {
        let [this, other] = if form == Form::Y2018 { ["2018", "2023"] } else { ["2023", "2018"] };
        let what = format!("is of the {other} form, but the reviews are of the {this} form; expected both of one dump");
        return Err(Error::file(meta, what));
    }
    let limit = if skip_bad_rows { MOST_BAD_ROWS } else { BAD_ROWS_SHOWN };
    let (read_reviews, read_metas) = rayon::join(
        || Reviews::read(reviews, form, span, BadRows::new(limit)),
        || Metas::read(meta, form, BadRows::new(limit)),
    );
    let (mut reviews_read, metas) = (read_reviews?, read_metas?);
    let mut bad_rows = std::mem::take(&mut reviews_read.bad.rows);
    bad_rows.extend_from_slice(&metas.bad.rows);
    if !bad_rows.is_empty() && !skip_bad_rows {
        return Err(Error::BadRows(bad_rows));
    }
    let (source, words) = assemble(reviews_read, metas, window, span);
    let rules = Rules { source: words, small: SMALL, ids: IdOrder::Source };
    write_built(out, &source, Source { name, inputs: &[reviews, meta], bad_rows: &bad_rows }, rules)
}

/// A year and its December, in Unix seconds.
#[derive(Clone, Copy)]
struct Span {
    start: i64,
    december: i64,
    end: i64,
}

impl Span {
    fn of(year: u16) -> Result<Self, Error> {
        let at = |date: String| {
            seconds(&date).ok_or_else(|| Error::Argument(format!("year {year}: expected four digits, as in 2017")))
        };
        let (start, end) = (at(format!("{year:04}-01-01"))?, at(format!("{:04}-01-01", year + 1))?);
        Ok(Span { start, december: at(format!("{year:04}-12-01"))?, end })
    }
}

/// Keys numbered by first appearance.
#[derive(Default)]
struct Keys(HashMap<Box<str>, u32>);

impl Keys {
    fn id(&mut self, key: &str) -> u32 {
        if let Some(&id) = self.0.get(key) {
            return id;
        }
        let id = self.0.len() as u32;
        self.0.insert(key.into(), id);
        id
    }

    fn names(&self) -> Vec<&str> {
        let mut names = vec![""; self.0.len()];
        self.0.iter().for_each(|(name, &id)| names[id as usize] = name);
        names
    }
}

/// A review of the year.
#[derive(Clone, Copy)]
struct Review {
    user: u32,
    item: u32,
    /// Seconds into the year.
    second: u32,
    liked: bool,
}

struct Reviews {
    users: Keys,
    items: Keys,
    /// In the order of the file.
    rows: Vec<Review>,
    other_years: usize,
    span: Span,
    bad: BadRows,
}

impl Reviews {
    fn read(path: &Path, form: Form, span: Span, bad: BadRows) -> Result<Self, Error> {
        let (users, items) = (Keys::default(), Keys::default());
        let mut reviews = Reviews { users, items, rows: Vec::new(), other_years: 0, span, bad };
        let names = form.review();
        for_rows(path, &names, |line, row| {
            let read = row.fields(&names).and_then(|[user, item, stars, time]| {
                let (user, item) = (key(user, names[0])?, key(item, names[1])?);
                let stars = stars.number(names[2])?;
                if !(0.0..=5.0).contains(&stars) {
                    return Err(format!("{} is {stars}; expected 0 to 5", names[2]));
                }
                let time = match row.seconds() {
                    Some(seconds) => time.number(names[3]).and(Ok(seconds))?,
                    None => form.seconds(names[3], time.number(names[3])?)?,
                };
                reviews.add(&user, &item, stars, time);
                Ok(())
            });
            read.or_else(|reason| reviews.bad.reject(path, line, reason, &row.text()))
        })?;
        Ok(reviews)
    }

    fn add(&mut self, user: &str, item: &str, stars: f64, time: i64) {
        if !(self.span.start..self.span.end).contains(&time) {
            self.other_years += 1;
            return;
        }
        let (user, item) = (self.users.id(user), self.items.id(item));
        self.rows.push(Review { user, item, second: (time - self.span.start) as u32, liked: stars >= LIKED });
    }
}

/// Titles of all items: one text, cut at the ends.
struct Metas {
    /// The last meta of each item.
    last: HashMap<Box<str>, u32>,
    titles: String,
    ends: Vec<usize>,
    unformatted: usize,
    bad: BadRows,
}

impl Metas {
    fn read(path: &Path, form: Form, bad: BadRows) -> Result<Self, Error> {
        let (last, titles, ends) = (HashMap::new(), String::new(), Vec::new());
        let mut metas = Metas { last, titles, ends, unformatted: 0, bad };
        let names = form.meta();
        for_rows(path, &names, |line, row| {
            let read = row.fields(&names).and_then(|[item, title]| {
                let item = key(item, names[0])?;
                // PARITY: the official code fills a missing title with the empty text and keeps the item.
                let title = if title.is_absent() { Cow::Borrowed("") } else { title.text(names[1])? };
                metas.add(&item, &title);
                Ok(())
            });
            read.or_else(|reason| metas.bad.reject(path, line, reason, &row.text()))
        })?;
        Ok(metas)
    }

    fn add(&mut self, item: &str, title: &str) {
        // PARITY: the official code passes over titles that are scripts of a web page, before it looks for the last meta.
        if title.contains("getTime") {
            self.unformatted += 1;
            return;
        }
        let entry = self.ends.len() as u32;
        self.titles.push_str(title);
        self.ends.push(self.titles.len());
        match self.last.get_mut(item) {
            Some(last) => *last = entry,
            None => drop(self.last.insert(item.into(), entry)),
        }
    }

    fn title(&self, entry: u32) -> &str {
        let entry = entry as usize;
        let start = if entry == 0 { 0 } else { self.ends[entry - 1] };
        &self.titles[start..self.ends[entry]]
    }
}

/// The common form, in the order that the rules start from, and the rules in words.
fn assemble(reviews: Reviews, metas: Metas, window: Window, span: Span) -> (Interactions, Vec<String>) {
    let (users, items) = (reviews.users.names(), reviews.items.names());
    let entries: Vec<Option<u32>> = items.iter().map(|item| metas.last.get(*item).copied()).collect();
    let mut rows: Vec<(u32, Review)> = Vec::with_capacity(reviews.rows.len());
    rows.extend(reviews.rows.iter().filter_map(|r| Some((entries[r.item as usize]?, *r))));
    let listed = rows.len();
    // PARITY: one pass; a user may be left with a single row.
    let (mut of_user, mut of_item) = (vec![0u32; users.len()], vec![0u32; items.len()]);
    for (_, r) in &rows {
        of_user[r.user as usize] += 1;
        of_item[r.item as usize] += 1;
    }
    rows.retain(|(_, r)| of_user[r.user as usize] > window.more_than && of_item[r.item as usize] > window.more_than);
    // PARITY: a right join, in the order of the metas; reviews of one item keep the order of their file.
    rows.sort_by_key(|(entry, _)| *entry);

    let mut source = Interactions::default();
    let (mut user_ids, mut item_ids) = (vec![None; users.len()], vec![None; items.len()]);
    for (entry, r) in rows {
        let user = *user_ids[r.user as usize].get_or_insert_with(|| {
            source.users.push(users[r.user as usize].to_string());
            source.users.len() as u32 - 1
        });
        let item = *item_ids[r.item as usize].get_or_insert_with(|| {
            source.items.push(items[r.item as usize].to_string());
            source.titles.push(metas.title(entry).to_string());
            source.items.len() as u32 - 1
        });
        let timestamp = span.start + i64::from(r.second);
        source.rows.push(Interaction { user, item, label: r.liked, timestamp, split: Some(Split::Train) });
    }
    let december = source.rows.extract_if(.., |r| r.timestamp >= span.december).collect::<Vec<_>>();
    let times: Vec<i64> = december.iter().map(|r| r.timestamp).collect();
    for (rank, i) in argsort(&times).into_iter().enumerate() {
        let split = if rank < december.len() / 2 { Split::Valid } else { Split::Test };
        source.rows.push(Interaction { split: Some(split), ..december[i as usize] });
    }
    let (unlisted, rare) = (reviews.rows.len() - listed, listed - source.rows.len());
    source.unused = reviews.other_years + unlisted + rare;
    let (Window { year, more_than }, other_years, unformatted) = (window, reviews.other_years, metas.unformatted);
    let untitled = source.titles.iter().filter(|t| t.is_empty()).count();
    let words = vec![
        format!("rows: reviews of {year} (UTC) of items with a meta; left out: {other_years} of other years, {unlisted} without one"),
        format!("users and items of more than {more_than} of these rows, both counted once; left out: {rare} rows"),
        format!("titles: as in the last meta of an item; {untitled} items have none; {unformatted} metas with getTime in the title passed over"),
        format!("liked: rating >= {LIKED}; several reviews of one item by one user all count"),
        "split: January to November train, December in order of time (ties as in NumPy's quicksort) valid to the half, then test".into(),
    ];
    (source, words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_year_in_seconds() {
        let span = Span::of(2017).unwrap();
        assert_eq!((span.start, span.december, span.end), (1_483_228_800, 1_512_086_400, 1_514_764_800));
        assert!(Span::of(9999).is_err());
    }
}
