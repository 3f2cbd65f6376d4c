//! `collm-engine prepare amazon-*`: the official rules against pandas, both forms of the dumps, and what they may be broken by.

use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::{ArrayRef, Float64Array, RecordBatch, StringArray, TimestampMillisecondArray};
use collm_engine::data::parquet_io::write_batch;
use flate2::Compression;
use flate2::write::GzEncoder;

use crate::common::{command, fails, fixture, ok, path};
use crate::prepare::{assert_same, load, manifest};

/// 2017-01-01 in Unix seconds.
const START: i64 = 1_483_228_800;
const DAY: i64 = 86_400;

fn gzip(text: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(text).unwrap();
    encoder.finish().unwrap()
}

/// User, item, stars, second.
type Review = (String, String, u8, i64);

/// Made-up reviews and metas (item, title).
struct Dump {
    reviews: Vec<Review>,
    metas: Vec<(String, String)>,
}

impl Dump {
    fn new() -> Self {
        let mut x = 99u64;
        let mut below = |n: u64| {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (x >> 33) % n
        };
        let mut dump = Dump { reviews: Vec::new(), metas: Vec::new() };
        for item in 0..30 {
            dump.metas.push((format!("B{:09}", item * 7_919 % 1000), format!("Title & \"{item}\" <b>é</b>")));
            for user in 0..28 {
                if below(10) < 9 {
                    let day = if below(3) == 0 { 334 + below(4) } else { below(360) };
                    let item = dump.metas[item as usize].0.clone();
                    let time = START + DAY * day as i64 + below(DAY as u64) as i64;
                    dump.reviews.push((format!("A{user}"), item, 1 + below(5) as u8, time));
                }
            }
        }
        dump
    }

    /// The lines of 2018: reviews and metas.
    fn y2018(&self) -> (String, String) {
        let (mut reviews, mut metas) = (String::new(), String::new());
        for (user, item, stars, time) in &self.reviews {
            writeln!(
                reviews,
                r#"{{"overall": {stars}.0, "vote": "2", "reviewerID": "{user}", "asin": "{item}", "style": {{"Format:": "x"}}, "reviewText": "Good \"one\"\n", "unixReviewTime": {time}}}"#
            )
            .unwrap();
        }
        for (item, title) in &self.metas {
            let title = serde_json::to_string(title).unwrap();
            writeln!(metas, r#"{{"category": [], "title": {title}, "asin": "{item}", "also_buy": ["{item}"]}}"#)
                .unwrap();
        }
        (reviews, metas)
    }

    /// The lines of 2023: milliseconds, and items by their parents.
    fn y2023(&self) -> (String, String) {
        let (mut reviews, mut metas) = (String::new(), String::new());
        for (user, item, stars, time) in &self.reviews {
            writeln!(
                reviews,
                r#"{{"rating": {stars}.0, "title": "Not the item's", "text": "…", "images": [], "asin": "child", "parent_asin": "{item}", "user_id": "{user}", "timestamp": {time}123, "verified_purchase": true}}"#
            )
            .unwrap();
        }
        for (item, title) in &self.metas {
            let title = serde_json::to_string(title).unwrap();
            writeln!(
                metas,
                r#"{{"main_category": "Books", "title": {title}, "parent_asin": "{item}", "details": {{}}}}"#
            )
            .unwrap();
        }
        (reviews, metas)
    }

    /// 2018, written to a directory.
    fn files(&self, dir: &Path) -> (PathBuf, PathBuf) {
        let (reviews, metas) = self.y2018();
        write_pair(dir, &gzip(reviews.as_bytes()), &gzip(metas.as_bytes()))
    }
}

fn write_pair(dir: &Path, reviews: &[u8], metas: &[u8]) -> (PathBuf, PathBuf) {
    let paths = (dir.join("reviews.json.gz"), dir.join("meta.json.gz"));
    std::fs::write(&paths.0, reviews).unwrap();
    std::fs::write(&paths.1, metas).unwrap();
    paths
}

fn arguments<'a>(reviews: &'a Path, meta: &'a Path, out: &'a Path) -> Vec<&'a str> {
    vec!["prepare", "amazon-book", "--reviews", path(reviews), "--meta", path(meta), "--out", path(out)]
}

/// Duplicate and missing metas, titles of every kind, rows that only count before the filter, several reviews of one item,
/// ties that NumPy's quicksort moves: row for row what pandas makes of them (`tests/fixtures/amazon/make.py`).
#[test]
fn rules_are_those_of_the_pandas_oracle() {
    let dir = tempfile::tempdir().unwrap();
    let (out, official) = (dir.path().join("out"), dir.path().join("official"));
    let raw = fixture("amazon");
    let text = ok(&arguments(&raw.join("reviews_5.json.gz"), &raw.join("meta.json.gz"), &out));
    assert!(text.starts_with("Amazon Books: ") && text.contains("rows not used by the rules"), "{text}");
    ok(&["prepare", "collm", "--from", path(&raw.join("expected")), "--out", path(&official)]);
    let d = load(&out);
    assert_same(&d, &load(&official));
    for title in ["Biology &amp; God&#39;s <i>Living</i> Creation", " outer spaces ", "The last of three"] {
        assert!(d.titles.iter().any(|t| t == title), "{title}");
    }
    assert_eq!(d.titles[1..].iter().filter(|t| t.is_empty()).count(), 3, "items without a title stay");
    let (mut pairs, mut rows) = (std::collections::HashSet::new(), 0);
    for split in [&d.train, &d.valid, &d.test] {
        rows += split.len();
        pairs.extend(split.uid.iter().zip(&split.iid).map(|(u, i)| (*u, *i)));
    }
    assert!(pairs.len() < rows, "several reviews of one item by one user stay");
    let m = manifest(&out);
    let rules = m["rules"].to_string();
    assert!(rules.contains("users and items of more than 20 of these rows, both counted once"), "{rules}");
    assert!(rules.contains("3 items have none; 2 metas with getTime"), "{rules}");
}

/// The same reviews in the forms of 2018 (plain text too) and 2023 (JSONL, Parquet) become the same splits.
#[test]
fn every_form_gives_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let dump = Dump::new();
    let out = |name: &str| dir.path().join(name);
    let (reviews, meta) = dump.files(dir.path());
    ok(&arguments(&reviews, &meta, &out("a")));
    let want = load(&out("a"));
    assert!(want.n_users > 20 && want.n_items > 20 && want.test.len() > 50);

    let (text, metas) = dump.y2018();
    // Unpacked under the same name, with a byte order mark, Windows line ends, blank lines, no newline at the end.
    let text = format!("\u{feff}{}", text.replace('\n', "\r\n\r\n").trim_end());
    write_pair(dir.path(), text.as_bytes(), metas.as_bytes());
    ok(&arguments(&reviews, &meta, &out("b")));
    assert_same(&load(&out("b")), &want);

    let (text, metas) = dump.y2023();
    let (reviews, meta) = write_pair(dir.path(), &gzip(text.as_bytes()), metas.as_bytes());
    ok(&arguments(&reviews, &meta, &out("c")));
    assert_same(&load(&out("c")), &want);
    let m = manifest(&out("c"));
    assert_eq!(m["inputs"]["reviews.json.gz"], collm_engine::files::sha256_file(&reviews).unwrap());

    let texts = |f: fn(&Review) -> String| -> ArrayRef {
        Arc::new(dump.reviews.iter().map(|r| Some(f(r))).collect::<StringArray>())
    };
    let times = dump.reviews.iter().map(|r| r.3 * 1000 + 5);
    for typed in [false, true] {
        let time: ArrayRef = if typed {
            Arc::new(TimestampMillisecondArray::from_iter_values(times.clone()).with_timezone("UTC"))
        } else {
            Arc::new(arrow_array::Int64Array::from_iter_values(times.clone()))
        };
        let columns = [
            ("rating", Arc::new(dump.reviews.iter().map(|r| Some(r.2.into())).collect::<Float64Array>()) as ArrayRef),
            ("parent_asin", texts(|r| r.1.clone())),
            ("title", texts(|_| "not the item's".into())),
            ("user_id", texts(|r| r.0.clone())),
            ("timestamp", time),
        ];
        let batch = RecordBatch::try_from_iter(columns).unwrap();
        // In two parts of a directory.
        let (reviews, half) = (dir.path().join("reviews"), batch.num_rows() / 2);
        std::fs::create_dir_all(&reviews).unwrap();
        write_batch(&reviews.join("part-0.parquet"), &batch.slice(0, half)).unwrap();
        write_batch(&reviews.join("part-1.parquet"), &batch.slice(half, batch.num_rows() - half)).unwrap();
        ok(&arguments(&reviews, &meta, &out("d")));
        assert_same(&load(&out("d")), &want);
        let parts = manifest(&out("d"))["inputs"].clone();
        assert!(parts["reviews/part-0.parquet"].is_string() && parts["reviews/part-1.parquet"].is_string(), "{parts}");
    }
    let (_, old) = dump.y2018();
    std::fs::write(&meta, old).unwrap();
    let e = fails(&arguments(&reviews, &meta, &out("e")));
    assert!(e.contains("is of the 2018 form, but the reviews are of the 2023 form"), "{e}");
}

#[test]
fn unusable_lines_are_refused_or_listed() {
    let dir = tempfile::tempdir().unwrap();
    let (reviews, metas) = Dump::new().y2018();
    let (a, b) = write_pair(dir.path(), &gzip(reviews.as_bytes()), &gzip(metas.as_bytes()));
    let (out, clean) = (dir.path().join("out"), dir.path().join("clean"));
    ok(&arguments(&a, &b, &clean));
    let n = reviews.lines().count();
    let rest = r#""asin": "B1", "unixReviewTime": 1500000000}"#;
    let mut bad: Vec<(Vec<u8>, &str)> = [
        (r#"{"overall": 5.0, "#.to_string() + rest, "has no reviewerID; expected text"),
        (
            r#"{"overall": "5.0", "reviewerID": "A1", "#.to_string() + rest,
            "overall is the text \"5.0\"; expected a number",
        ),
        (r#"{"overall": null, "reviewerID": "A1", "#.to_string() + rest, "overall is null; expected a number"),
        (r#"{"overall": 50, "reviewerID": "A1", "#.to_string() + rest, "overall is 50; expected 0 to 5"),
        (
            r#"{"overall": 1e400, "reviewerID": "A1", "#.to_string() + rest,
            "not a whole JSON object: number out of range",
        ),
        (r#"{"overall": 5, "reviewerID": "", "#.to_string() + rest, "reviewerID is empty; expected a key"),
        (r#"{"overall": 5, "reviewerID": 7, "#.to_string() + rest, "reviewerID is the number 7; expected text"),
        (
            r#"{"overall": 5, "reviewerID": "A1", "asin": "B1", "unixReviewTime": 1500000000000}"#.to_string(),
            "unixReviewTime is 1500000000000; expected Unix seconds",
        ),
        (r#"{"overall": 5, "reviewerID": "A1", "asin"#.to_string(), "not a whole JSON object: EOF while parsing"),
        ("{'overall': 5.0, 'reviewerID': 'A1'}".to_string(), "not a whole JSON object: key must be a string"),
    ]
    .map(|(line, reason)| (line.into_bytes(), reason))
    .to_vec();
    // Latin-1, though only in the text that is not used: as Python refuses it.
    bad.push((
        b"{\"reviewText\": \"caf\xe9\", \"overall\": 5, \"reviewerID\": \"A1\", ".to_vec(),
        "not UTF-8; expected UTF-8 text",
    ));
    bad.last_mut().unwrap().0.extend(rest.as_bytes());
    let mut bytes = reviews.into_bytes();
    bad.iter().for_each(|(line, _)| bytes.extend([line.as_slice(), b"\n"].concat()));
    let more = "{\"title\": [\"x\"], \"asin\": \"B1\"}\n{\"title\": \"x\"}\n";
    let (a, b) = write_pair(dir.path(), &gzip(&bytes), &gzip(format!("{metas}{more}").as_bytes()));
    let e = fails(&arguments(&a, &b, &out));
    assert!(e.contains("13 unusable row(s); mend them, or pass --skip-bad-rows"), "{e}");
    for (i, (_, reason)) in bad.iter().enumerate().take(10) {
        let want = format!("reviews.json.gz:{}: {reason}", n + 1 + i);
        assert!(e.contains(&want), "{want}\n{e}");
    }
    assert!(!out.exists(), "nothing is written");
    let text = ok(&[&arguments(&a, &b, &out)[..], &["--skip-bad-rows"]].concat());
    assert!(text.contains("13 unusable rows left out, listed in bad_rows.tsv"), "{text}");
    let listed = std::fs::read_to_string(out.join("bad_rows.tsv")).unwrap();
    assert!(listed.contains("\t31\ttitle is a list; expected text\t{\"title\": [\"x\"]"), "{listed}");
    assert!(listed.contains("\t32\thas no asin; expected text\t"), "{listed}");
    assert!(listed.contains("not UTF-8; expected UTF-8 text\t{\"reviewText\": \"caf\u{fffd}\""), "{listed}");
    assert_same(&load(&out), &load(&clean));
}

#[test]
fn other_files_are_refused_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let (reviews, metas) = Dump::new().y2018();
    let out = dir.path().join("out");
    let whole = gzip(reviews.as_bytes());
    let refused = |reviews: &[u8], metas: &[u8], want: &str| {
        let (a, b) = write_pair(dir.path(), reviews, metas);
        let e = fails(&arguments(&a, &b, &out));
        assert!(e.contains(want), "{want}\n{e}");
        assert!(!out.exists());
    };
    let old = b"{'reviewerID': 'A1', 'asin': 'B1', 'overall': 5.0, 'unixReviewTime': 1}\n";
    refused(
        &gzip(old),
        metas.as_bytes(),
        "reviews.json.gz: holds Python dictionaries, the form of the 2014 dump, not JSON",
    );
    refused(b"[{\"asin\": 1}]", metas.as_bytes(), "reviews.json.gz: is one JSON array; expected one object a line");
    refused(
        metas.as_bytes(),
        metas.as_bytes(),
        "has neither reviewerID (2018) nor user_id (2023); expected a file of reviews",
    );
    refused(&whole, &whole, "meta.json.gz: is a file of reviews; expected the file of metas");
    refused(b"", metas.as_bytes(), "reviews.json.gz: is empty; expected lines of JSON");
    refused(
        &whole[..whole.len() - 9],
        metas.as_bytes(),
        "the gzip data break off: the file is cut short, fetch it again",
    );
    refused(&whole, b"\xff\xfe{\0", "meta.json.gz: is UTF-16 text; expected UTF-8");
    // Never so many of them that memory would not hold.
    let line = reviews.lines().next().unwrap();
    refused(format!("{line}\n{}", "{}\n".repeat(5_000)).as_bytes(), metas.as_bytes(), "1000 unusable row(s)");
    let (a, b) = write_pair(dir.path(), format!("{line}\n{}", "{}\n".repeat(200_000)).as_bytes(), metas.as_bytes());
    let e = fails(&[&arguments(&a, &b, &out)[..], &["--skip-bad-rows"]].concat());
    assert!(e.contains("has 100000 unusable rows by line 100001: is it the right file?"), "{e}");
    let (a, b) = Dump::new().files(dir.path());
    let e = fails(&[&arguments(&a, &b, &out)[..], &["--year", "2016"]].concat());
    assert!(e.contains("train, valid, valid_small and test would have 0, 0, 0 and 0 rows"), "{e}");
    let e = fails(&[&arguments(&a, &b, &out)[..], &["--more-than", "28"]].concat());
    assert!(e.contains("would have 0, 0, 0 and 0 rows"), "{e}");
    ok(&[&arguments(&a, &b, &out)[..], &["--more-than", "22"]].concat());
}

/// 900 MB of text go through a process whose whole address space is 400 MB.
#[test]
#[cfg(target_os = "linux")]
fn memory_is_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let dump = Dump::new();
    let (a, b) = dump.files(dir.path());
    let (clean, out) = (dir.path().join("clean"), dir.path().join("out"));
    ok(&arguments(&a, &b, &clean));
    let (reviews, metas) = dump.y2018();
    let write = |path: &Path, text: &str, filler: &str, times: usize| {
        let mut encoder = GzEncoder::new(File::create(path).unwrap(), Compression::fast());
        let filler = format!("{filler}\n").repeat(64);
        (0..times).for_each(|_| encoder.write_all(filler.as_bytes()).unwrap());
        encoder.write_all(text.as_bytes()).unwrap();
        encoder.finish().unwrap();
    };
    let old = r#"{"overall": 5.0, "reviewerID": "A", "asin": "B", "unixReviewTime": 1000000000, "reviewText": "#;
    write(&a, &reviews, &format!("{old}\"{}\"}}", "so good ".repeat(1000)), 1000);
    write(&b, &metas, &format!(r#"{{"asin": "B", "title": "T", "description": "{}"}}"#, "so good ".repeat(800)), 1000);
    let args = arguments(&a, &b, &out);
    let program = command(&[]).get_program().to_owned();
    let limited = std::process::Command::new("sh")
        .args(["-c", "ulimit -v 400000; exec \"$0\" \"$@\""])
        .arg(program)
        .args(args)
        .env("COLLM_THREADS", "2")
        .env("MALLOC_ARENA_MAX", "2")
        .output()
        .unwrap();
    assert!(limited.status.success(), "{}", String::from_utf8_lossy(&limited.stderr));
    assert_same(&load(&out), &load(&clean));
}
