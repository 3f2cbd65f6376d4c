//! Files that torch wrote (`tests/fixtures/torch/make.py`), files by hand, and damage.

use super::*;
use proptest::prelude::*;
use std::io::{Cursor, Write};

fn fixture(name: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/torch").join(name)).unwrap()
}

fn open(bytes: &[u8]) -> Result<TorchFile<Cursor<&[u8]>>, Error> {
    TorchFile::new(Cursor::new(bytes), Path::new("x.pth"))
}

/// Shape and values of a tensor.
fn tensor(bytes: &[u8], name: &str) -> Result<(Vec<usize>, Values), String> {
    let mut file = open(bytes).map_err(|e| e.to_string())?;
    let at = file.entries.iter().position(|e| e.name == name).ok_or("absent")?;
    let values = file.read(at).map_err(|e| e.to_string())?;
    Ok((file.entries[at].layout.clone()?.shape, values))
}

/// What make.py calls `values(n, …)`.
fn counted(n: f32, places: impl IntoIterator<Item = usize>) -> Values {
    Values::Floats(places.into_iter().map(|i| n + i as f32 / 8.0).collect())
}

#[test]
fn every_kind_of_tensor() {
    let kinds = fixture("kinds.pth");
    let get = |name: &str| tensor(&kinds, name).unwrap_or_else(|e| panic!("{name}: {e}"));
    assert_eq!(get("float32"), (vec![6, 4], counted(0.0, 0..24)));
    assert_eq!(get("again"), get("float32"));
    assert_eq!(get("float64"), (vec![2, 3], counted(1.0, 0..6)));
    assert_eq!(get("float16"), (vec![5], counted(2.0, 0..5)));
    assert_eq!(get("bfloat16"), (vec![5], counted(3.0, 0..5)));
    assert_eq!(get("int64"), (vec![1, 2], Values::Integers(vec![-(1 << 40), 3])));
    assert_eq!(get("transposed"), (vec![4, 6], counted(0.0, (0..24).map(|i| i % 6 * 4 + i / 6))));
    assert_eq!(get("rows"), (vec![2, 4], counted(0.0, 8..16)));
    assert_eq!(get("column"), (vec![6], counted(0.0, (0..6).map(|i| i * 4 + 1))));
    assert_eq!(get("steps"), (vec![3, 2], counted(0.0, [0, 3, 8, 11, 16, 19])));
    // [4, 2, 3] of [2, 3, 4].
    let want = (0..4).flat_map(|c| (0..2).flat_map(move |a| (0..3).map(move |b| a * 12 + b * 4 + c)));
    assert_eq!(get("permuted"), (vec![4, 2, 3], counted(4.0, want)));
    assert_eq!(get("scalar"), (vec![], Values::Floats(vec![2.5])));
    assert_eq!(get("empty"), (vec![0, 3], Values::Floats(vec![])));
    assert_eq!(get("parameter"), (vec![2], counted(5.0, 0..2)));
    assert_eq!(get("list.0"), (vec![1], counted(6.0, 0..1)));
    assert_eq!(get("list.1.deep"), (vec![1], counted(7.0, 0..1)));
    assert!(tensor(&kinds, "bool").unwrap_err().contains("bool: is of type BoolStorage; read are float32"));
    assert!(tensor(&kinds, "expanded").unwrap_err().contains("[3] does not fit its storage of 1 values"));
}

#[test]
fn nested_and_of_the_other_byte_order() {
    let nested = fixture("nested.pth");
    let names: Vec<String> = open(&nested).unwrap().entries.into_iter().map(|e| e.name).collect();
    let want = ["rec_encoder.user_embedding.weight", "rec_encoder.item_embedding.weight", "llama_proj.0.weight"];
    let want: Vec<String> = want.iter().map(|n| format!("model.{n}")).collect();
    assert_eq!(names, [&want[..], &["optimizer.state.0.step".to_string()]].concat());
    assert_eq!(tensor(&nested, "model.llama_proj.0.weight").unwrap(), (vec![3, 2], counted(2.0, 0..6)));
    let big = fixture("big-endian.pth");
    assert_eq!(tensor(&big, "w").unwrap().1, counted(0.0, 0..3));
    assert_eq!(tensor(&big, "n").unwrap().1, Values::Integers(vec![1, -2]));
    assert_eq!(tensor(&big, "h").unwrap().1, counted(1.0, 0..2));
}

#[test]
fn what_cannot_be_read_is_told_in_a_line() {
    let e = |bytes: &[u8]| open(bytes).unwrap_err().to_string();
    assert!(e(&fixture("legacy.pth")).starts_with("x.pth: is in torch's form from before version 1.6"));
    assert!(e(&fixture("module.pth")).contains("class torch.nn.modules.linear.Linear; save its state_dict() instead"));
    assert!(e(b"").contains("not a whole file of torch.save"));
    assert!(e(b"PK").contains("not a whole file of torch.save"));
    let whole = fixture("mf.pth");
    for cut in 0..whole.len() {
        assert!(open(&whole[..cut]).is_err(), "cut at {cut}");
    }
    // A byte of a storage: the archive's checksum does not agree.
    let mut bytes = whole.clone();
    let at = bytes
        .windows(4)
        .position(|w| w == 1.0f32.to_le_bytes())
        .or_else(|| bytes.windows(4).position(|w| w == (1.0f32 / 64.0).to_le_bytes()));
    bytes[at.unwrap()] ^= 1;
    let damaged = ["user_embedding.weight", "item_embedding.weight"].map(|n| tensor(&bytes, n));
    assert!(damaged.iter().any(|d| d.as_ref().is_err_and(|e| e.contains("is damaged"))), "{damaged:?}");
}

/// An archive with this pickle and one storage of 6 float32.
fn archive(pickle: &[u8], compression: CompressionMethod) -> Vec<u8> {
    let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
    let options = zip::write::SimpleFileOptions::default().compression_method(compression);
    for (name, bytes) in [("a/data.pkl", pickle), ("a/data/0", &[0; 24])] {
        zip.start_file(name, options).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

/// `{"w": tensor}` with these sizes, all of 8 bytes.
fn pickled(n: i64, offset: i64, shape: &[i64], strides: &[i64]) -> Vec<u8> {
    let int = |v: i64| [&b"\x8a\x08"[..], &v.to_le_bytes()].concat();
    let ints = |v: &[i64]| [b"(", &v.iter().flat_map(|&v| int(v)).collect::<Vec<_>>()[..], b"t"].concat();
    let text = |s: &str| [&b"X"[..], &(s.len() as u32).to_le_bytes(), s.as_bytes()].concat();
    let storage =
        [b"(", &text("storage")[..], b"ctorch\nFloatStorage\n", &text("0"), &text("cpu"), &int(n), b"tQ"].concat();
    let call =
        [b"ctorch._utils\n_rebuild_tensor_v2\n(", &storage[..], &int(offset), &ints(shape), &ints(strides), b"tR"]
            .concat();
    [b"\x80\x02}", &text("w")[..], &call, b"s."].concat()
}

#[test]
fn claims_are_held_against_the_file() {
    let read = |n, offset, shape: &[i64], strides: &[i64]| {
        tensor(&archive(&pickled(n, offset, shape, strides), CompressionMethod::Stored), "w").map(|t| t.1)
    };
    assert_eq!(read(6, 0, &[2, 3], &[3, 1]), Ok(Values::Floats(vec![0.0; 6])));
    assert_eq!(read(6, 5, &[1], &[1 << 62]), Ok(Values::Floats(vec![0.0])));
    assert_eq!(read(6, 99, &[0, 1 << 62], &[1, 1]), Ok(Values::Floats(vec![])));
    for (offset, shape, strides) in [
        (1, vec![2, 3], vec![3, 1]),
        (6, vec![1], vec![1]),
        (0, vec![7], vec![1]),
        (0, vec![1 << 40], vec![0]),
        (0, vec![1 << 32, 1 << 32], vec![1, 1]),
        (0, vec![2, 2], vec![1 << 62, 1 << 62]),
        (i64::MAX, vec![2], vec![i64::MAX]),
    ] {
        let e = read(6, offset, &shape, &strides).unwrap_err();
        assert!(e.contains("does not fit its storage of 6 values"), "{e}");
    }
    assert!(read(6, -1, &[1], &[1]).unwrap_err().contains("negative"));
    assert!(read(6, 0, &[2, 3], &[-3, 1]).unwrap_err().contains("negative"));
    assert!(read(6, 0, &[2, 3], &[1]).unwrap_err().contains("2 sizes and 1 strides"));
    assert!(read(i64::MAX, 0, &[1 << 40], &[1]).unwrap_err().contains("data/0 has 24 bytes; expected"));
    assert!(read(5, 0, &[5], &[1]).unwrap_err().contains("data/0 has 24 bytes; expected 5 values of 4"));
    let packed = archive(&pickled(6, 0, &[6], &[1]), CompressionMethod::Deflated);
    assert!(open(&packed).unwrap_err().to_string().contains("data.pkl is compressed"));
}

/// Small pickles that say much: a list that holds itself, one tensor under very many names, depth, long names.
#[test]
fn bombs_do_not_go_off() {
    let open = |pickle: &[u8]| {
        let bytes = archive(pickle, CompressionMethod::Stored);
        TorchFile::new(Cursor::new(bytes), Path::new("x")).map(|f| f.entries.len()).map_err(|e| e.to_string())
    };
    assert_eq!(open(b"\x80\x02]q\x00(h\x00h\x00e."), Ok(0));
    // Forty lists, each with the one before it twice.
    let twice: Vec<u8> = (0..40u8).flat_map(|i| [b'q', i, b'0', b']', b'(', b'h', i, b'h', i, b'e']).collect();
    assert_eq!(open(&[&b"\x80\x02]"[..], &twice, b"."].concat()), Ok(0));
    let deep = [&b"\x80\x02"[..], &b"]".repeat(5000), &b"a".repeat(4999), b"."].concat();
    assert!(open(&deep).unwrap_err().contains("nested deeper than 64"));
    let one = pickled(6, 0, &[6], &[1]);
    let call = &one[one.iter().position(|&b| b == b'c').unwrap()..one.len() - 2];
    let many = [&b"\x80\x02](c"[..], &call[1..], b"q\x00", &b"h\x00".repeat(100_000), b"e."].concat();
    assert!(open(&many).unwrap_err().contains("more than 100000 tensors"));
    let long = [&b"X"[..], &2000u32.to_le_bytes(), &[b'n'; 2000]].concat();
    let long = [&b"\x80\x02}"[..], &long, call, b"s."].concat();
    assert!(open(&long).unwrap_err().contains("name is longer than 1024 bytes"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    /// Damage anywhere is read or refused, and no tensor is larger than its file.
    #[test]
    fn mutations_are_read_or_refused(
        kinds in any::<bool>(),
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..5),
    ) {
        let mut bytes = fixture(if kinds { "kinds.pth" } else { "nested.pth" });
        for (at, byte) in damage {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Ok(mut file) = open(&bytes) {
            for i in 0..file.entries.len() {
                if let Ok(Values::Floats(v)) = file.read(i) {
                    prop_assert!(v.len() <= bytes.len());
                }
            }
        }
    }

    /// The same for the pickle alone, which the archive's checksum protects above.
    #[test]
    fn mutated_pickles_are_read_or_refused(
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..5),
    ) {
        let mut pickle = open(&fixture("nested.pth")).unwrap().part("data.pkl").unwrap();
        for (at, byte) in damage {
            let at = at.index(pickle.len());
            pickle[at] = byte;
        }
        let bytes = archive(&pickle, CompressionMethod::Stored);
        if let Ok(mut file) = open(&bytes) {
            for i in 0..file.entries.len() {
                let _ = file.read(i);
            }
        }
    }
}
