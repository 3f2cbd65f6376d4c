//! `collm-engine prepare`: every source, and what it refuses.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::path::Path;

use collm_engine::data::{Dataset, Split};

use crate::common::{fails, ok, path, shared, tiny_csv};

fn load(dir: &Path) -> Dataset {
    Dataset::load(dir).unwrap()
}

/// Every column of every row, in order.
fn assert_same(got: &Dataset, want: &Dataset) {
    for split in Split::ALL {
        let (g, w) = (got.split(split), want.split(split));
        let name = split.name();
        assert_eq!(g.row, w.row, "{name} row");
        assert_eq!(g.uid, w.uid, "{name} uid");
        assert_eq!(g.iid, w.iid, "{name} iid");
        assert_eq!(g.label, w.label, "{name} label");
        assert_eq!(g.timestamp, w.timestamp, "{name} timestamp");
        assert_eq!((&g.his_offsets, &g.his), (&w.his_offsets, &w.his), "{name} his");
        assert_eq!((&g.not_cold, &g.warm, &g.both_new), (&w.not_cold, &w.warm, &w.both_new), "{name} warmth");
    }
    assert_eq!(got.titles, want.titles);
    assert_eq!(got.fingerprint, want.fingerprint);
}

#[test]
fn csv_by_hand() {
    let dir = tempfile::tempdir().unwrap();
    let (rows, items) = (dir.path().join("r.csv"), dir.path().join("i.csv"));
    // Users 10 and 9: numeric order puts 9 first. Rows 2 and 3 of user 10 share a second and keep the file's order.
    std::fs::write(&rows, "\u{feff}user,item,rating,timestamp\r\n10,a,5,100\r\n10,b,4.0,200\r\n10,c,1,200\r\n9,b,5,150\r\n9,a,2,2001-01-01\r\n10,d,5,300\r\n")
        .unwrap();
    std::fs::write(&items, "item,title\na,\"Ä, the first\"\nb,B\nc,C\nd,D\n").unwrap();
    let out = dir.path().join("out");
    let text = ok(&[
        "prepare",
        "csv",
        "--interactions",
        path(&rows),
        "--items",
        path(&items),
        "--out",
        path(&out),
        "--split",
        "50/20/30",
    ]);
    assert!(text.starts_with("split"), "{text}");
    let d = load(&out);
    // In order of user and time: 9:b(150) 9:a(2001) 10:a(100) 10:b(200) 10:c(200) 10:d(300). Ids by first appearance: b a c d.
    assert_eq!(d.titles.iter().map(String::as_str).collect::<Vec<_>>(), ["", "B", "Ä, the first", "C", "D"]);
    // In order of time: 100 150 200 | 200 | 300 2001: three train, one valid, two test.
    assert_eq!((d.train.row.clone(), d.valid.row.clone(), d.test.row.clone()), (vec![0, 2, 3], vec![4], vec![1, 5]));
    assert_eq!((d.train.uid.clone(), d.train.iid.clone()), (vec![1, 2, 2], vec![1, 2, 1]));
    assert_eq!(d.test.history(0), [1]);
    assert_eq!(d.test.history(1), [2, 1], "likes across splits, without the disliked c");
    assert_eq!((d.test.not_cold.clone(), d.test.both_new.clone()), (vec![true, false], vec![false, false]));
    assert_eq!(load(&out).fingerprint, d.fingerprint);
    let manifest: serde_json::Value =
        serde_json::from_slice(&std::fs::read(out.join("manifest.json")).unwrap()).unwrap();
    assert_eq!(manifest["splits"][0][1]["rows"], 3);
    assert_eq!(manifest["inputs"][0][0], "r.csv");
}

#[test]
fn dates_split_too() {
    let dir = tempfile::tempdir().unwrap();
    let (rows, items) = tiny_csv(dir.path());
    let out = dir.path().join("out");
    let args = ["prepare", "csv", "--interactions", path(&rows), "--items", path(&items), "--out", path(&out)];
    ok(&[&args[..], &["--valid-from", "1000100", "--test-from", "1000200"]].concat());
    let d = load(&out);
    assert!(d.train.timestamp.iter().all(|&t| t < 1_000_100) && d.test.timestamp.iter().all(|&t| t >= 1_000_200));
    assert_eq!(d.train.len() + d.valid.len() + d.test.len(), 600);
    let e = fails(&[&args[..], &["--valid-from", "1000200", "--test-from", "1000100"]].concat());
    assert!(e.contains("--valid-from must be before --test-from"), "{e}");
    let e = fails(&[&args[..], &["--valid-from", "5", "--test-from", "6"]].concat());
    assert!(e.contains("each needs some: check the split dates"), "{e}");
}

#[test]
fn bad_rows_are_refused_or_listed() {
    let dir = tempfile::tempdir().unwrap();
    let (rows, items) = tiny_csv(dir.path());
    let good = std::fs::read_to_string(&rows).unwrap();
    let mut bytes = good.clone().into_bytes();
    bytes.extend(b"u1,i1,five,3\nu1,i99,5,3\nu1,i1,5\nu0,i0,5,9\nu1,i2,5,soon\nu\xff,i2,5,3\n,i2,5,3\nu77,i2,NaN,3\n");
    std::fs::write(&rows, bytes).unwrap();
    let out = dir.path().join("out");
    let args = ["prepare", "csv", "--interactions", path(&rows), "--items", path(&items), "--out", path(&out)];
    let e = fails(&args);
    for want in [
        "8 unusable row(s)",
        "rows.csv:602: rating is \"five\"; expected a number",
        "rows.csv:603: item i99 is not in the items file",
        "rows.csv:604: 3 fields; expected 4 as in the header",
        "rows.csv:605: user u0 and item i0 are already in line 2; expected one row a pair",
        "rows.csv:606: timestamp is \"soon\"; expected Unix seconds or a date",
        "rows.csv:607: not UTF-8 text",
        "rows.csv:608: expected a user and an item",
        "rows.csv:609: rating is \"NaN\"; expected a number",
    ] {
        assert!(e.contains(want), "{want}\n{e}");
    }
    assert!(!out.exists(), "nothing is written");
    let text = ok(&[&args[..], &["--skip-bad-rows"]].concat());
    assert!(text.contains("8 unusable rows left out, listed in bad_rows.tsv"), "{text}");
    assert_eq!(std::fs::read_to_string(out.join("bad_rows.tsv")).unwrap().lines().count(), 9);
    std::fs::write(&rows, good).unwrap();
    let clean = dir.path().join("clean");
    ok(&["prepare", "csv", "--interactions", path(&rows), "--items", path(&items), "--out", path(&clean)]);
    assert_same(&load(&out), &load(&clean));
    let e = fails(&[&args[..], &["--user-column", "uid"]].concat());
    assert!(e.contains("has no column \"uid\"; its columns are user, item, rating, timestamp"), "{e}");
    let e = fails(&[&args[..], &["--split", "60/20"]].concat());
    assert!(e.contains("expected three percentages that add up to 100"), "{e}");
}

#[test]
fn recbole_titles_get_their_year() {
    let dir = tempfile::tempdir().unwrap();
    let (inter, item) = (dir.path().join("x.inter"), dir.path().join("x.item"));
    let mut rows = String::from("user_id:token\titem_id:token\trating:float\ttimestamp:float\n");
    for n in 0..20 {
        writeln!(rows, "{}\t{}\t{}\t{}.0", n % 4, n % 5, 3 + n % 2, 1000 + n).unwrap();
    }
    std::fs::write(&inter, rows).unwrap();
    std::fs::write(&item, "item_id:token\tmovie_title:token_seq\trelease_year:token\n0\t\"Quoted\" film\t1999\n1\tB\t\n2\tC (1950)\t1950\n3\tD\tV\n4\tE\t2001\n").unwrap();
    let out = dir.path().join("out");
    ok(&["prepare", "recbole", "--inter", path(&inter), "--item", path(&item), "--out", path(&out)]);
    let mut titles = load(&out).titles[1..].to_vec();
    titles.sort();
    assert_eq!(titles, ["\"Quoted\" film (1999)", "B", "C (1950)", "D", "E (2001)"]);
}

#[test]
fn a_directory_without_data_says_how_to_make_it() {
    let dir = tempfile::tempdir().unwrap();
    let e = fails(&["prepare", "collm", "--from", path(dir.path()), "--out", path(&dir.path().join("out"))]);
    assert!(e.contains("holds no train_ood2.pkl (nor train.parquet)"), "{e}");
    std::fs::write(dir.path().join("train_ood2.pkl"), b"\x80\x04cos\nsystem\n\x8c\x02ls\x85R.").unwrap();
    let e = fails(&["prepare", "collm", "--from", path(dir.path()), "--out", path(&dir.path().join("out"))]);
    assert!(e.contains("a pickled system, not a DataFrame"), "a call is only data: {e}");
    std::fs::write(dir.path().join("train.parquet"), b"PAR1 but cut").unwrap();
    let e = fails(&["prepare", "collm", "--from", path(dir.path()), "--out", path(&dir.path().join("out"))]);
    assert!(e.contains("train.parquet: not a whole Parquet file"), "{e}");
}

/// The official pickles and their Parquet form hold the same, and the counts are those of the reference.
#[test]
fn official_files() {
    let (Some(zip), Some(parquet)) = (shared("data/ml-1m-official-pickles.zip"), shared("data/ml-1m")) else { return };
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    ok(&["prepare", "collm", "--from", path(&zip), "--out", path(&a)]);
    ok(&["prepare", "collm", "--from", path(&parquet), "--out", path(&b)]);
    let d = load(&a);
    assert_same(&d, &load(&b));
    assert_same(&d, &load(&parquet));
    assert_eq!((d.train.len(), d.valid.len(), d.valid_small.len(), d.test.len()), (33_891, 10_401, 5_200, 7_331));
    assert_eq!((d.n_users, d.n_items), (839, 3_256));
    let count = |flags: &[bool]| flags.iter().filter(|&&f| f).count();
    assert_eq!((count(&d.test.warm), count(&d.test.not_cold), count(&d.test.both_new)), (3_522, 4_153, 26));
}

/// Raw files made to fit the official splits, with everything the rules must ignore mixed in, give the official splits row for
/// row: order, ids, histories, warmth, and the sample that is valid_small.
#[test]
fn raw_ml1m_gives_the_official_splits() {
    let Some(official) = shared("data/ml-1m") else { return };
    let want = load(&official);
    let mut rows: Vec<(i64, u32, u32, u8, i64)> = Vec::new();
    for s in [&want.train, &want.valid, &want.test] {
        rows.extend((0..s.len()).map(|i| (s.row[i], s.uid[i], s.iid[i], s.label[i], s.timestamp[i])));
    }
    rows.sort_unstable();
    let mut raw_item: HashMap<u32, u32> = HashMap::new();
    let mut ratings = String::new();
    let mut last_user = 0;
    for &(row, uid, iid, label, time) in &rows {
        // Raw user numbers rise with the official ids (the sort is by them), raw items are scrambled.
        let (user, item) = (7 * uid + 3, *raw_item.entry(iid).or_insert(iid * 2_654_435 % 1_000_003));
        if user != last_user {
            // Outside the months, and of a movie without a name: both must vanish.
            writeln!(ratings, "{user}::{item}::5::{}", 946_684_800).unwrap();
            writeln!(ratings, "{user}::99999999::5::{time}").unwrap();
            writeln!(ratings, "{user}::1000004::1::{}", 1_046_000_000).unwrap();
            last_user = user;
        }
        let rating = if label == 1 { 4 + row % 2 } else { 1 + row % 3 };
        writeln!(ratings, "{user}::{item}::{rating}::{time}").unwrap();
    }
    // One row a pair is expected: the extra old rating of the first item would be a second one.
    let seen = |line: &str| line.split("::").take(2).map(String::from).collect::<Vec<_>>();
    let mut pairs = std::collections::HashSet::new();
    let kept: Vec<&str> = ratings.lines().rev().filter(|l| pairs.insert(seen(l))).collect();
    let ratings: String = kept.into_iter().rev().flat_map(|l| [l, "\n"]).collect();
    let mut movies: Vec<u8> = Vec::new();
    for (iid, item) in &raw_item {
        let latin1 = |c: char| u8::try_from(u32::from(c)).unwrap();
        movies.extend(format!("{item}::{}::Drama|War", want.titles[*iid as usize]).chars().map(latin1));
        movies.extend(b"\r\n");
    }
    movies.extend(b"1000004::Never in the window (1990)::Comedy\r\n");
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("ratings.dat"), ratings).unwrap();
    std::fs::write(dir.path().join("movies.dat"), movies).unwrap();
    let out = dir.path().join("out");
    ok(&["prepare", "ml-1m", "--from", path(dir.path()), "--out", path(&out)]);
    assert_same(&load(&out), &want);
}
