//! Parquet as an input: files and partitioned directories as pyarrow and Spark write them (`tests/fixtures/parquet/make.py`).

use std::path::{Path, PathBuf};

use collm_engine::data::parquet_io::{read_batches, write_batch};
use collm_engine::train::scoring::IdReader;

use crate::common::{fails, fixture, ok, path};
use crate::prepare::{assert_same, load, manifest};

/// The fixture prepared from CSV.
fn from_csv(dir: &Path) -> PathBuf {
    let out = dir.join("csv");
    let (rows, items) = (fixture("parquet/rows.csv"), fixture("parquet/items.csv"));
    ok(&["prepare", "csv", "--interactions", path(&rows), "--items", path(&items), "--out", path(&out)]);
    out
}

fn prepare<'a>(rows: &'a Path, items: &'a Path, out: &'a Path) -> Vec<&'a str> {
    vec!["prepare", "parquet", "--interactions", path(rows), "--items", path(items), "--out", path(out)]
}

/// A copy of a fixture's directory.
fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in from.read_dir().unwrap() {
        let entry = entry.unwrap();
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        if from.is_dir() {
            copy(&from, &to);
        } else {
            std::fs::copy(from, to).unwrap();
        }
    }
}

/// Integers of every width, decimals, floats, text of every layout, instants, INT96; plain, dictionary and delta encodings; every
/// codec; parts with marks beside them; Hive's directories: all hold what the CSV files hold.
#[test]
fn every_way_of_writing_reads_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let want = load(&from_csv(dir.path()));
    let titles = fixture("parquet/items.parquet");
    for name in ["plain.parquet", "types.parquet", "int96.parquet", "binary.parquet", "parts", "hive"] {
        let out = dir.path().join(name);
        let text = ok(&prepare(&fixture("parquet").join(name), &titles, &out));
        assert!(text.starts_with("Parquet: 12 users, 9 items"), "{name}: {text}");
        assert_same(&load(&out), &want);
    }
    // One table in each form, and a null among the partitions.
    let (rows, out) = (fixture("parquet/rows.csv"), dir.path().join("mixed"));
    ok(&prepare(&rows, &fixture("parquet/hive-items"), &out));
    assert_same(&load(&out), &want);
    let inputs = manifest(&out)["inputs"].clone();
    let null = "hive-items/genre=__HIVE_DEFAULT_PARTITION__/item=i%2F2%20%C3%A9/part-0.parquet";
    let hash = collm_engine::files::sha256_file(&fixture("parquet").join(null)).unwrap();
    assert_eq!((&inputs[null], inputs.as_object().unwrap().len()), (&hash.into(), 10));
}

#[test]
fn rows_and_tables_that_are_wrong_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let (titles, out) = (fixture("parquet/items.parquet"), dir.path().join("out"));
    let parts = dir.path().join("parts");
    let refused = |want: &str| {
        let e = fails(&prepare(&parts, &titles, &out));
        assert!(e.contains(want), "{want}\n{e}");
        assert!(!out.exists());
    };
    copy(&fixture("parquet/parts"), &parts);
    // A part twice: its rows are there already.
    std::fs::copy(parts.join("part-00001.parquet"), parts.join("part-00009.parquet")).unwrap();
    refused("21 unusable row(s)");
    refused("parts:109: user ");
    refused("are already in line 22; expected one row a pair");
    std::fs::remove_file(parts.join("part-00009.parquet")).unwrap();
    let e = fails(&[&prepare(&parts, &titles, &out)[..], &["--rating-column", "stars"]].concat());
    assert!(e.contains("has no column \"stars\"; its columns are user, item, rating, timestamp, unused"), "{e}");
    let e = fails(&[&prepare(&parts, &titles, &out)[..], &["--user-column", "unused"]].concat());
    assert!(e.contains("column unused is of type List(") && e.contains("expected text, numbers, or times"), "{e}");

    let whole = std::fs::read(parts.join("part-00002.parquet")).unwrap();
    std::fs::write(parts.join("part-00002.parquet"), &whole[..whole.len() / 2]).unwrap();
    refused("part-00002.parquet: not a whole Parquet file");
    let titles_alone = read_batches(&titles).unwrap();
    write_batch(&parts.join("part-00002.parquet"), &titles_alone[0]).unwrap();
    refused("part-00002.parquet: has no column \"user\"; its columns are item, title, genre");
    std::fs::write(parts.join("part-00002.parquet"), whole).unwrap();
    std::fs::write(parts.join("README"), "Made by Spark").unwrap();
    refused("README: not a whole Parquet file");
    std::fs::remove_file(parts.join("README")).unwrap();
    std::fs::create_dir(parts.join("sub")).unwrap();
    refused("sub: is a directory inside a table; expected part files or directories named key=value");
    std::fs::remove_dir(parts.join("sub")).unwrap();
    std::fs::create_dir(parts.join("_delta_log")).unwrap();
    refused("is a Delta table, whose files also hold rows that were deleted since");
    std::fs::remove_dir(parts.join("_delta_log")).unwrap();
    std::fs::create_dir(parts.join("x=1")).unwrap();
    std::fs::copy(parts.join("part-00001.parquet"), parts.join("x=1/part-0.parquet")).unwrap();
    refused("is under the keys x, but other parts under none");
    std::fs::remove_dir_all(&parts).unwrap();
    std::fs::create_dir(&parts).unwrap();
    refused("parts: holds no Parquet files");

    copy(&fixture("parquet/parts"), &parts);
    let e = fails(&prepare(&parts, &titles, &parts));
    assert!(e.contains("parts: is an input, and would be overwritten; write to another directory"), "{e}");
    let e = fails(&prepare(&parts, &titles, &parts.join("out")));
    assert!(e.contains("parts: is an input") && !parts.join("out").exists(), "{e}");
    assert!(!parts.join("train.parquet").exists());
}

/// Where one Parquet file is read, a directory of parts is, too: prepared splits, and rows to score.
#[test]
fn directories_stand_for_files() {
    let dir = tempfile::tempdir().unwrap();
    let data = from_csv(dir.path());
    let parts = dir.path().join("parts");
    for name in ["train", "valid", "valid_small", "test"] {
        let split = parts.join(format!("{name}.parquet"));
        std::fs::create_dir_all(&split).unwrap();
        let batch = read_batches(&data.join(format!("{name}.parquet"))).unwrap().remove(0);
        for (i, start) in (0..batch.num_rows()).step_by(10).enumerate() {
            let rows = batch.slice(start, 10.min(batch.num_rows() - start));
            write_batch(&split.join(format!("part-{i:05}.snappy.parquet")), &rows).unwrap();
        }
        std::fs::write(split.join("_SUCCESS"), "").unwrap();
    }
    assert_same(&load(&parts), &load(&data));
    let out = dir.path().join("out");
    ok(&["prepare", "collm", "--from", path(&parts), "--out", path(&out)]);
    assert_same(&load(&out), &load(&data));
    let e = fails(&["prepare", "collm", "--from", path(&parts), "--out", path(&parts)]);
    assert!(e.contains("is an input, and would be overwritten"), "{e}");
    let ids = |path: &Path| -> Vec<[u32; 2]> {
        IdReader::open(path, ["uid", "iid"]).unwrap().flat_map(Result::unwrap).collect()
    };
    let rows = ids(&parts.join("train.parquet"));
    assert!(rows.len() > 50);
    assert_eq!(rows, ids(&data.join("train.parquet")));
}
