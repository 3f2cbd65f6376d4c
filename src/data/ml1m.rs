//! Raw MovieLens-1M by the official CoLLM rules (reference, section 1.4).
//!
//! `ratings.dat` holds `user::movie::rating::seconds`, `movies.dat` holds `movie::title::genres`. Movies are joined inner,
//! ratings keep the order of their file.

use std::path::Path;

use super::Error;
use super::interactions::{Collector, UnknownItem};
use super::samples::Split;
use super::store::{Manifest, Rules, Source, write_built};
use super::time::{EXPECTED, seconds, year_and_month};

/// Prepares the raw pair of files.
pub fn prepare_ml1m(ratings: &Path, movies: &Path, out: &Path, skip_bad_rows: bool) -> Result<Manifest, Error> {
    let mut collector = Collector::default();
    for_lines(movies, |line, text| {
        if let Err(reason) = movie(text).and_then(|(key, title)| collector.item(key, title)) {
            collector.reject(movies, line, reason, text);
        }
    })?;
    for_lines(ratings, |line, text| {
        let added = rating(text).and_then(|(user, movie, stars, time)| {
            collector.interaction(line, (user, movie), stars >= 4.0, time, UnknownItem::Drop)
        });
        if let Err(reason) = added {
            collector.reject(ratings, line, reason, text);
        }
    })?;
    let (mut source, bad_rows) = collector.finish(skip_bad_rows)?;
    source.rows.iter_mut().for_each(|r| r.split = split_of(r.timestamp));
    let rules = Rules::usual(
        "liked: rating >= 4; ratings of movies that movies.dat does not name are left out".into(),
        "split by month (UTC), April 2000 being 0: train 14-23, valid 24-28, test 29-33, the rest unused".into(),
    );
    write_built(out, &source, Source { name: "MovieLens-1M", inputs: &[ratings, movies], bad_rows: &bad_rows }, rules)
}

/// PARITY: months 14–33 after April 2000; February 2003 (month 34) is dropped, though the paper speaks of the most recent 20.
fn split_of(timestamp: i64) -> Option<Split> {
    let (year, month) = year_and_month(timestamp);
    match 12 * (year - 2000) + month - 4 {
        14..=23 => Some(Split::Train),
        24..=28 => Some(Split::Valid),
        29..=33 => Some(Split::Test),
        _ => None,
    }
}

/// Key and title. A title may hold `::`: the key is before the first, the genres are behind the last.
fn movie(text: &str) -> Result<(&str, &str), String> {
    let parts = text.split_once("::").and_then(|(key, rest)| Some((key, rest.rsplit_once("::")?.0)));
    let (key, title) = parts.ok_or_else(|| format!("{text:?}; expected movie::title::genres"))?;
    Ok((key.trim(), title.trim()))
}

/// User, movie, stars and time.
fn rating(text: &str) -> Result<(&str, &str, f64, i64), String> {
    let fields: Vec<&str> = text.split("::").map(str::trim).collect();
    let [user, movie, stars, time] = fields[..] else {
        return Err(format!("{text:?}; expected user::movie::rating::seconds"));
    };
    let stars_number = stars.parse::<f64>().ok().filter(|s| s.is_finite());
    let stars = stars_number.ok_or_else(|| format!("rating is {stars:?}; expected a number"))?;
    Ok((user, movie, stars, seconds(time).ok_or_else(|| format!("time is {time:?}; {EXPECTED}"))?))
}

/// Calls `f` with number and text of every line. The published files are Latin-1; a copy that someone turned into UTF-8 is
/// read as such (Latin-1 letters beyond ASCII are not valid UTF-8 by chance).
fn for_lines(path: &Path, mut f: impl FnMut(u64, &str)) -> Result<(), Error> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes);
    let utf8 = std::str::from_utf8(bytes).is_ok();
    for (i, line) in bytes.split(|&b| b == b'\n').enumerate() {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if line.is_empty() {
            continue;
        }
        let text = if utf8 { String::from_utf8_lossy(line) } else { line.iter().map(|&b| char::from(b)).collect() };
        f(i as u64 + 1, &text);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn months() {
        let split = |date: &str| split_of(seconds(date).unwrap());
        assert_eq!((split("2001-05-31T23:59:59"), split("2001-06-01")), (None, Some(Split::Train)));
        assert_eq!((split("2002-03-31T23:59:59"), split("2002-04-01")), (Some(Split::Train), Some(Split::Valid)));
        assert_eq!((split("2002-08-31T23:59:59"), split("2002-09-01")), (Some(Split::Valid), Some(Split::Test)));
        assert_eq!((split("2003-01-31T23:59:59"), split("2003-02-01")), (Some(Split::Test), None));
    }

    #[test]
    fn lines() {
        assert_eq!(movie("1::Toy Story (1995)::Animation|Comedy"), Ok(("1", "Toy Story (1995)")));
        assert_eq!(movie("7::Mission:: Impossible (1999)::Action"), Ok(("7", "Mission:: Impossible (1999)")));
        assert_eq!(movie("8::::Drama"), Ok(("8", "")));
        assert!(movie("8::Drama").is_err() && movie("").is_err());
        assert_eq!(rating("1::2::5::978300760"), Ok(("1", "2", 5.0, 978_300_760)));
        for (text, part) in [
            ("1::2::5", "expected user::movie::rating::seconds"),
            ("1::2::nan::978300760", "rating is \"nan\"; expected a number"),
            ("1::2::5::1500000000000", "time is \"1500000000000\""),
            ("1,2,5,978300760", "expected user::movie::rating::seconds"),
        ] {
            assert!(rating(text).unwrap_err().contains(part), "{text}");
        }
    }
}
