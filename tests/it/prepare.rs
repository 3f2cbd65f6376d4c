//! `collm-engine prepare`: every source, and what it refuses.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::path::Path;

use arrow_array::cast::AsArray;
use collm_engine::data::parquet_io::{integers, read_batches, write_ids};
use collm_engine::data::{Dataset, Split};

use crate::common::{fails, fixture, ok, path, shared, tiny_csv, tiny_data};

/// A prepared directory.
pub fn load(dir: &Path) -> Dataset {
    Dataset::load(dir).unwrap()
}

/// Every column of every row, in order.
pub fn assert_same(got: &Dataset, want: &Dataset) {
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

/// `manifest.json` of a prepared directory.
pub fn manifest(dir: &Path) -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(dir.join("manifest.json")).unwrap()).unwrap()
}

#[test]
fn csv_by_hand() {
    let dir = tempfile::tempdir().unwrap();
    let (rows, items) = (dir.path().join("r.csv"), dir.path().join("i.csv"));
    // Users 10 and 9: numeric order puts 9 first. 10:b and 10:c share a second and keep the file's order.
    std::fs::write(
        &rows,
        "\u{feff}user,item,rating,timestamp\r\n10,a,5,100\r\n10,b,4.0,200\r\n10,c,1,200\r\n9,b,5,150\r\n9,a,5,2001-01-01\r\n\
         10,d,5,300\r\n9,c,1,400.7\r\n\r\n9,d,2,160\r\n10,e,2,900\r\n9,e,5,800\r\n",
    )
    .unwrap();
    std::fs::write(&items, "item,title\na,\"Ä, the first\"\nb,B\nc,C\nd,D\ne,E\n").unwrap();
    let out = dir.path().join("out");
    let args = ["prepare", "csv", "--interactions", path(&rows), "--items", path(&items), "--out", path(&out)];
    let text = ok(&[&args[..], &["--split", "50/30/20"]].concat());
    assert!(text.starts_with("CSV: 2 users, 5 items\nsplit"), "{text}");
    let d = load(&out);
    // By user and time: 9:b 9:d 9:c 9:e 9:a | 10:a 10:b 10:c 10:d 10:e. Ids by first appearance: b d c e a.
    assert_eq!(d.titles.iter().map(String::as_str).collect::<Vec<_>>(), ["", "B", "D", "C", "E", "Ä, the first"]);
    // By time: 10:a 9:b 9:d 10:b 10:c | 10:d 9:c 9:e | 10:e 9:a.
    assert_eq!(
        (d.train.row.clone(), d.valid.row.clone(), d.test.row.clone()),
        (vec![0, 1, 5, 6, 7], vec![2, 3, 8], vec![4, 9])
    );
    assert_eq!((d.train.uid.clone(), d.train.iid.clone()), (vec![1, 1, 2, 2, 2], vec![1, 2, 5, 1, 3]));
    assert_eq!(d.train.label, [1, 0, 1, 1, 0]);
    assert_eq!(
        (d.test.history(0), d.test.history(1)),
        (&[1, 4][..], &[5, 1, 2][..]),
        "likes across splits, dislikes not"
    );
    assert_eq!((d.test.not_cold.clone(), d.test.both_new.clone()), (vec![true, false], vec![false, false]));
    // numpy.random.RandomState(2023).permutation(3)[:2] is [2, 0].
    assert_eq!(d.valid_small.row, [8, 2]);
    assert_eq!(d.valid.timestamp[0], 400, "fractions of seconds are dropped");
    let m = manifest(&out);
    assert_eq!((&m["splits"]["train"]["rows"], &m["splits"]["test"]["positives"]), (&5.into(), &1.into()));
    assert_eq!(m["inputs"]["r.csv"], collm_engine::files::sha256_file(&rows).unwrap());
    assert_eq!(m["outputs"]["items.parquet"], collm_engine::files::sha256_file(&out.join("items.parquet")).unwrap());
    // Read back and written anew, the contents have the same fingerprint.
    let again = dir.path().join("again");
    ok(&["prepare", "collm", "--from", path(&out), "--out", path(&again)]);
    assert_same(&load(&again), &d);
    assert_eq!(manifest(&again)["fingerprint"], m["fingerprint"]);
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
    assert!(e.contains("each needs some: check the dates or fractions of the split"), "{e}");
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
        "rows.csv:603: item \"i99\" is not in the items file",
        "rows.csv:604: 3 fields; expected 4 as in the header",
        "rows.csv:605: user u0 and item i0 are already in line 2; expected one row a pair",
        "rows.csv:606: timestamp is \"soon\"; expected Unix seconds (not milliseconds), or a UTC date",
        "rows.csv:607: not UTF-8; expected UTF-8 text",
        "rows.csv:608: expected a user and an item",
        "rows.csv:609: rating is \"NaN\"; expected a number",
    ] {
        assert!(e.contains(want), "{want}\n{e}");
    }
    assert!(!out.exists(), "nothing is written");
    let text = ok(&[&args[..], &["--skip-bad-rows"]].concat());
    assert!(text.contains("8 unusable rows left out, listed in bad_rows.tsv"), "{text}");
    let listed = std::fs::read_to_string(out.join("bad_rows.tsv")).unwrap();
    assert_eq!(listed.lines().count(), 9);
    assert!(listed.contains("rows.csv\t604\t3 fields; expected 4 as in the header\tu1,i1,5\n"), "{listed}");
    assert_eq!(manifest(&out)["bad_rows"], 8);
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
fn likes_need_dislikes() {
    let dir = tempfile::tempdir().unwrap();
    let (rows, items) = tiny_csv(dir.path());
    let out = dir.path().join("out");
    let args = ["prepare", "csv", "--interactions", path(&rows), "--items", path(&items), "--out", path(&out)];
    let e = fails(&[&args[..], &["--threshold", "1"]].concat());
    assert!(e.contains("all 360 rows of train are a like; CoLLM needs dislikes as well"), "{e}");
    let e = fails(&[&args[..], &["--rating-column", "stars"]].concat());
    assert!(
        e.contains("has no column \"stars\"; its columns are user, item, rating, timestamp; CoLLM learns from likes"),
        "{e}"
    );
    let e = fails(&[&args[..], &["--label-column", "rating"]].concat());
    assert!(e.contains("rows.csv:2: rating is \"2\"; expected 0 or 1") && e.contains("and 590 more"), "{e}");
    let e = fails(&[&args[..], &["--delimiter", ";"]].concat());
    assert!(e.contains("its only column is \"item,title\" (is the delimiter right?)"), "{e}");
    ok(&args);
    let rated = load(&out);
    let text = std::fs::read_to_string(&rows).unwrap();
    let labelled = text.replace(",rating,", ",liked,").replace(",2,", ",0,").replace(",5,", ",1,");
    std::fs::write(&rows, labelled).unwrap();
    ok(&[&args[..], &["--label-column", "liked"]].concat());
    assert_same(&load(&out), &rated);
    std::fs::write(&rows, "").unwrap();
    let e = fails(&args);
    assert!(e.contains("rows.csv: is empty; expected a line of column names"), "{e}");
    std::fs::remove_file(&rows).unwrap();
    let e = fails(&args);
    assert!(e.contains("rows.csv: No such file"), "{e}");
}

#[test]
fn items_have_one_title() {
    let dir = tempfile::tempdir().unwrap();
    let (rows, items) = tiny_csv(dir.path());
    let out = dir.path().join("out");
    let args = ["prepare", "csv", "--interactions", path(&rows), "--items", path(&items), "--out", path(&out)];
    let good = std::fs::read_to_string(&items).unwrap();
    std::fs::write(&items, format!("{good}i3,Other\ni3,\"Film 3, The (1963)\"\nx,\n")).unwrap();
    let e = fails(&args);
    assert!(e.contains("2 unusable row(s)"), "a repeated item is harmless: {e}");
    assert!(e.contains("items.csv:32: item i3 is titled \"Other\" here and \"Film 3, The (1963)\" before"), "{e}");
    assert!(e.contains("items.csv:34: item x has an empty title"), "{e}");
    std::fs::write(&items, good).unwrap();
    ok(&args);
    let mut titles = load(&out).titles.to_vec();
    titles[1] = "Other".into();
    let keys = vec![String::new(); titles.len()];
    write_ids(&out.join("items.parquet"), "iid", &keys, Some(&titles)).unwrap();
    let e = Dataset::load(&out).unwrap_err().to_string();
    assert!(
        e.contains("train.parquet: row ")
            && e.contains("item 1 is titled \"Film 0, The (1960)\", but \"Other\" before"),
        "{e}"
    );
    std::fs::remove_file(out.join("items.parquet")).unwrap();
    load(&out);
    std::fs::remove_file(out.join("valid_small.parquet")).unwrap();
    let e = Dataset::load(&out).unwrap_err().to_string();
    assert!(e.contains("valid_small.parquet: is missing") && e.contains("collm-engine prepare"), "{e}");
}

/// RecBole's layout with made-up ratings, in files and in a wheel.
#[test]
fn recbole_titles_get_their_year() {
    let dir = tempfile::tempdir().unwrap();
    let (inter, item) = (dir.path().join("ml-100k.inter"), dir.path().join("ml-100k.item"));
    let mut rows = String::from("rating:float\tuser_id:token\titem_id:token\ttimestamp:float\tmore:token\n");
    for n in 0..20 {
        writeln!(rows, "{}\t{}\t{}\t{}.0\tx", 3 + n / 5 % 2, n % 4, n % 5, 1000 + 7 * n % 20).unwrap();
    }
    std::fs::write(&inter, &rows).unwrap();
    let titles = "item_id:token\tmovie_title:token_seq\trelease_year:token\n0\t\"Quoted\" film\t1999\n1\tB\t\n2\tC (1950)\t1950\n3\tSeven (Se7en)\t1995\n4\tE\tV\n";
    std::fs::write(&item, titles).unwrap();
    let out = dir.path().join("out");
    let text = ok(&["prepare", "recbole", "--inter", path(&inter), "--item", path(&item), "--out", path(&out)]);
    assert!(text.contains("4 users, 5 items"), "{text}");
    let d = load(&out);
    let mut sorted = d.titles[1..].to_vec();
    sorted.sort();
    assert_eq!(sorted, ["\"Quoted\" film (1999)", "B", "C (1950)", "E", "Seven (Se7en) (1995)"]);
    assert_eq!((d.train.len(), d.valid.len(), d.test.len()), (12, 4, 4));

    let wheel = dir.path().join("recbole.whl");
    let mut zip = zip::ZipWriter::new(std::fs::File::create(&wheel).unwrap());
    for (name, text) in [("ml-100k.inter", rows.as_str()), ("ml-100k.item", titles)] {
        let folder = "recbole/dataset_example/ml-100k";
        zip.start_file(format!("{folder}/{name}"), zip::write::SimpleFileOptions::default()).unwrap();
        std::io::Write::write_all(&mut zip, text.as_bytes()).unwrap();
    }
    zip.finish().unwrap();
    for (name, from) in [("wheel", wheel.as_path()), ("files", dir.path())] {
        let out = dir.path().join(name);
        ok(&["prepare", "ml-100k", "--from", path(from), "--out", path(&out)]);
        assert_same(&load(&out), &d);
    }
    let e = fails(&["prepare", "ml-100k", "--from", path(&inter), "--out", path(&out)]);
    assert!(e.contains("ml-100k.inter: neither a directory nor a zip archive"), "{e}");
    let e = fails(&["prepare", "recbole", "--inter", path(&item), "--item", path(&item), "--out", path(&out)]);
    assert!(
        e.contains("ml-100k.item: has no column \"user_id\"; its columns are item_id, movie_title, release_year"),
        "{e}"
    );
}

/// Made-up raw files, and the splits that pandas makes of them by the official rules (`tests/fixtures/data/make.py`): equal row
/// for row, with pickles of object columns and of pandas 3's own text columns.
#[test]
fn rules_are_those_of_the_pandas_oracle() {
    let dir = tempfile::tempdir().unwrap();
    let (raw, out) = (fixture("data/raw"), dir.path().join("out"));
    let text = ok(&["prepare", "ml-1m", "--from", path(&raw), "--out", path(&out)]);
    assert!(text.contains(" rows not used by the rules"), "{text}");
    let d = load(&out);
    for pickles in ["pickles", "pickles-pandas3"] {
        let out = dir.path().join(pickles);
        ok(&["prepare", "collm", "--from", path(&fixture("data").join(pickles)), "--out", path(&out)]);
        assert_same(&load(&out), &d);
    }
    let expected: serde_json::Value =
        serde_json::from_slice(&std::fs::read(fixture("data/expected.json")).unwrap()).unwrap();
    for split in Split::ALL {
        let (s, e) = (d.split(split), &expected[split.name()]);
        let ints = |key: &str| e[key].as_array().unwrap().iter().map(|v| v.as_i64().unwrap()).collect::<Vec<_>>();
        let flags = |key: &str| ints(key).into_iter().map(|v| v == 1).collect::<Vec<_>>();
        assert_eq!(s.row, ints("rows"));
        assert_eq!((&s.warm, &s.both_new, &s.not_cold), (&flags("warm"), &flags("cold"), &flags("not_cold")));
    }
    // The files hold what other readers of the official form expect.
    let batch = &read_batches(&out.join("test.parquet")).unwrap()[0];
    let names: Vec<String> = batch.schema().fields().iter().map(|f| f.name().clone()).collect();
    let official =
        ["row", "uid", "iid", "label", "timestamp", "his", "his_title", "title", "flag", "not_cold", "warm", "cold"];
    assert_eq!(names, official);
    assert_eq!(integers(batch.column_by_name("flag").unwrap()).unwrap(), vec![1; d.test.len()]);
    let his = batch.column_by_name("his").unwrap().as_list::<i32>();
    let his_title = batch.column_by_name("his_title").unwrap().as_list::<i32>();
    for i in 0..d.test.len() {
        let wanted: Vec<i64> = std::iter::once(0).chain(d.test.history(i).iter().map(|&x| x.into())).collect();
        assert_eq!(integers(&his.value(i)).unwrap(), wanted);
        let words = his_title.value(i);
        let words: Vec<&str> = words.as_string::<i32>().iter().flatten().collect();
        assert_eq!(words, wanted.iter().map(|&x| d.titles[x as usize].as_str()).collect::<Vec<_>>());
    }
}

#[test]
fn broken_raw_movielens_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["ratings.dat", "movies.dat"] {
        std::fs::copy(fixture("data/raw").join(name), dir.path().join(name)).unwrap();
    }
    let out = dir.path().join("out");
    let args = ["prepare", "ml-1m", "--from", path(dir.path()), "--out", path(&out)];
    ok(&args);
    let plain = load(&out);
    // A copy of the titles in UTF-8 with a byte order mark and Windows line ends reads the same.
    let movies = std::fs::read(dir.path().join("movies.dat")).unwrap();
    let utf8: String = movies.iter().map(|&b| char::from(b)).collect();
    std::fs::write(dir.path().join("movies.dat"), format!("\u{feff}{}", utf8.replace('\n', "\r\n"))).unwrap();
    ok(&args);
    assert_same(&load(&out), &plain);
    let mut ratings = std::fs::read_to_string(dir.path().join("ratings.dat")).unwrap();
    ratings.push_str("1::1000::4\n1,1000,4,978300760\n1::1000::x::978300760\n1::1000::4::soon\n");
    std::fs::write(dir.path().join("ratings.dat"), ratings).unwrap();
    let e = fails(&args);
    for want in [
        "4 unusable row(s)",
        "\"1::1000::4\"; expected user::movie::rating::seconds",
        "\"1,1000,4,978300760\"; expected user::movie::rating::seconds",
        "rating is \"x\"; expected a number",
        "time is \"soon\"; expected Unix seconds",
    ] {
        assert!(e.contains(want), "{want}\n{e}");
    }
    ok(&[&args[..], &["--skip-bad-rows"]].concat());
    assert_same(&load(&out), &plain);
    std::fs::remove_file(dir.path().join("movies.dat")).unwrap();
    let e = fails(&args);
    assert!(e.contains("movies.dat: No such file"), "{e}");
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
    let data = tiny_data(dir.path());
    let e = fails(&["prepare", "collm", "--from", path(&data), "--out", path(&data)]);
    assert!(e.contains("is an input, and would be overwritten; write to another directory"), "{e}");
    load(&data);
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
