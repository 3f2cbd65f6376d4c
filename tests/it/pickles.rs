//! Pickles from anywhere: pandas' frames are read, hostile ones are refused in bounded time and memory.

use std::sync::Arc;

use collm_engine::data::pandas::{Column, read_frame};
use proptest::prelude::*;

use crate::common::fixture;

fn text(s: &str) -> Vec<u8> {
    [&b"X"[..], &(s.len() as u32).to_le_bytes(), s.as_bytes()].concat()
}

fn int(v: i64) -> Vec<u8> {
    [&b"\x8a\x08"[..], &v.to_le_bytes()].concat()
}

fn tuple(items: &[Vec<u8>]) -> Vec<u8> {
    [b"(", &items.concat()[..], b"t"].concat()
}

fn list(items: &[Vec<u8>]) -> Vec<u8> {
    [b"](", &items.concat()[..], b"e"].concat()
}

fn dict(pairs: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let items: Vec<u8> = pairs.iter().flat_map(|(k, v)| [text(k), v.clone()].concat()).collect();
    [b"}(", &items[..], b"u"].concat()
}

fn global(name: &str) -> Vec<u8> {
    [text("some.module"), text(name), b"\x93".to_vec()].concat()
}

fn call(name: &str, arguments: &[Vec<u8>]) -> Vec<u8> {
    [global(name), tuple(arguments), b"R".to_vec()].concat()
}

fn dtype(code: &str) -> Vec<u8> {
    call("dtype", &[text(code)])
}

fn objects(values: &[Vec<u8>]) -> Vec<u8> {
    let shape = tuple(&[int(values.len() as i64)]);
    let state = tuple(&[int(1), shape, dtype("O8"), b"\x89".to_vec(), list(values)]);
    [call("_reconstruct", &[]), state, b"b".to_vec()].concat()
}

fn index(values: &[Vec<u8>]) -> Vec<u8> {
    call("_new_Index", &[global("Index"), dict(&[("data", objects(values))])])
}

fn range(stop: i64) -> Vec<u8> {
    let settings = dict(&[("start", int(0)), ("stop", int(stop)), ("step", int(1))]);
    call("_new_Index", &[global("RangeIndex"), settings])
}

/// A block of object columns that fills the columns from `place` on. `values`: row by row of the block's `[columns, rows]`.
fn block(place: i64, columns: i64, rows: i64, values: Vec<u8>) -> Vec<u8> {
    let shape = tuple(&[int(columns), int(rows)]);
    let state = tuple(&[int(1), shape, dtype("O8"), b"\x89".to_vec(), values]);
    let array = [call("_reconstruct", &[]), state, b"b".to_vec()].concat();
    call("_unpickle_block", &[array, call("slice", &[int(place), int(place + columns), int(1)]), int(2)])
}

fn frame(names: &[&str], rows: Vec<u8>, blocks: &[Vec<u8>]) -> Vec<u8> {
    let names: Vec<Vec<u8>> = names.iter().map(|n| text(n)).collect();
    let manager = call("BlockManager", &[tuple(blocks), list(&[index(&names), rows])]);
    let state = dict(&[("_mgr", manager)]);
    [b"\x80\x04".to_vec(), global("DataFrame"), b")\x81".to_vec(), state, b"b.".to_vec()].concat()
}

#[test]
fn frames_by_hand() {
    let both = list(&[text("a"), text("é"), text("b"), text("")]);
    let one_block = read_frame(&frame(&["t", "n"], range(2), &[block(0, 2, 2, both)])).unwrap();
    assert_eq!(one_block.columns[1], ("n".into(), Column::Text(vec!["b".into(), "".into()])));
    let texts = block(0, 1, 2, list(&[text("a"), text("é")]));
    let lists = block(1, 1, 2, list(&[list(&[]), list(&[int(-3), int(1 << 40)])]));
    let f = read_frame(&frame(&["t", "n"], range(2), &[texts.clone(), lists.clone()])).unwrap();
    assert_eq!(f.index, [0, 1]);
    assert_eq!(f.columns[0], ("t".into(), Column::Text(vec!["a".into(), "é".into()])));
    assert_eq!(f.columns[1], ("n".into(), Column::IntList(vec![vec![], vec![-3, 1 << 40]])));
    for (bytes, want) in [
        (frame(&["t", "n"], range(2), std::slice::from_ref(&texts)), "a column without values"),
        (frame(&["t"], range(3), std::slice::from_ref(&texts)), "a block of 2 rows in a frame of 3"),
        (frame(&["t"], range(2), &[lists]), "a block beyond the columns"),
        (frame(&["t"], range(2), &[block(0, 1, 2, list(&[text("a"), b"N".to_vec()]))]), "row 1: expected text"),
        (frame(&["t"], range(2), &[block(0, 1, 2, list(&[list(&[]), text("a")]))]), "mixes lists and other values"),
        (frame(&["t"], call("read_csv", &[text("x"), text("y")]), &[texts]), "an index without data"),
    ] {
        let e = read_frame(&bytes).unwrap_err();
        assert!(e.contains(want), "{want}: {e}");
    }
}

/// Small files that describe huge frames.
#[test]
fn bombs_do_not_go_off() {
    let refused = |bytes: &[u8]| {
        let e = read_frame(bytes).unwrap_err();
        assert!(e.contains("claims more cells than its file can hold"), "{e}");
    };
    refused(&frame(&["t"], range(1 << 40), &[]));
    refused(&frame(&["t"], range(i64::MAX), &[]));
    refused(&frame(&[], range(0), &[block(0, i64::MAX, 0, list(&[]))]));

    // A long text that every row names again is held once.
    let long = "x".repeat(1 << 20);
    let named_again: Vec<Vec<u8>> = (0..50_000).map(|_| b"h\x00".to_vec()).collect();
    let rows = [vec![[text(&long), b"q\x00".to_vec()].concat()], named_again].concat();
    let bytes = frame(&["t"], range(rows.len() as i64), &[block(0, 1, rows.len() as i64, list(&rows))]);
    let f = read_frame(&bytes).unwrap();
    let Column::Text(texts) = &f.columns[0].1 else { panic!("expected text") };
    assert!(texts.iter().all(|t| Arc::ptr_eq(t, &texts[0])));

    // A long list that every row names again is refused.
    let long: Vec<Vec<u8>> = (0..20_000).map(|_| b"K\x01".to_vec()).collect();
    let named_again: Vec<Vec<u8>> = (0..20_000).map(|_| b"h\x00".to_vec()).collect();
    let rows = [vec![[list(&long), b"q\x00".to_vec()].concat()], named_again].concat();
    refused(&frame(&["t"], range(rows.len() as i64), &[block(0, 1, rows.len() as i64, list(&rows))]));

    // So is one column given again and again.
    let once = block(0, 1, 20_000, [list(&long), b"q\x00".to_vec()].concat());
    let again = block(0, 1, 20_000, b"h\x00".to_vec());
    let blocks: Vec<Vec<u8>> = std::iter::once(once).chain((0..1000).map(|_| again.clone())).collect();
    assert!(read_frame(&frame(&["t"], range(20_000), &blocks)).is_err());

    // Values that hold themselves.
    let loops = [&b"\x80\x04]q\x00h\x00a."[..], b"\x80\x04]q\x00(h\x00h\x00e."];
    for bytes in loops {
        assert!(read_frame(bytes).is_err());
    }
}

#[test]
fn every_cut_is_refused() {
    let bytes = std::fs::read(fixture("data/pickles-pandas3/test_ood2.pkl")).unwrap();
    read_frame(&bytes).unwrap();
    for cut in (0..bytes.len()).step_by(7) {
        assert!(read_frame(&bytes[..cut]).is_err(), "cut at {cut}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// No damage makes the reader panic, and what it believes stays in proportion to the file.
    #[test]
    fn damaged_frames_are_read_or_refused(
        pandas3 in any::<bool>(),
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let folder = if pandas3 { "data/pickles-pandas3" } else { "data/pickles" };
        let mut bytes = std::fs::read(fixture(folder).join("test_ood2.pkl")).unwrap();
        for (at, byte) in damage {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Ok(frame) = read_frame(&bytes) {
            prop_assert!(frame.index.len() <= 2 * bytes.len());
        }
    }
}
