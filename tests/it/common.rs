//! A tiny model with a tokenizer, and a tiny data set, made on the spot.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The models with golden files among the fixtures.
pub const GOLDEN_MODELS: [&str; 7] =
    ["llama-mha", "llama-gqa", "qwen2", "llama3-rope", "linear-rope", "llama-tied-theta1e6", "llama-sharded"];

/// A fixture of this repository.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// What is handed to the team beside the repository; tests use it only as an extra.
pub fn shared(name: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared").join(name);
    if !path.exists() {
        println!("skipped: {} is not here", path.display());
    }
    path.exists().then_some(path)
}

/// A byte-level tokenizer: 256 bytes, and the words Yes and No.
pub fn tokenizer_json() -> String {
    // GPT-2's printable stand-ins for bytes.
    let printable = |b: u32| matches!(b, 33..=126 | 161..=172 | 174..=255);
    let mut next = 256;
    let mut vocab: Vec<String> = Vec::new();
    for b in 0..256u32 {
        let c = if printable(b) {
            b
        } else {
            next += 1;
            next - 1
        };
        vocab.push(char::from_u32(c).unwrap().to_string());
    }
    vocab.extend(["Ye", "Yes", "No"].map(String::from));
    let vocab: serde_json::Map<String, serde_json::Value> =
        vocab.into_iter().enumerate().map(|(i, t)| (t, i.into())).collect();
    let bytes =
        serde_json::json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": [{"id": 259, "content": "<unk>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true}],
        "pre_tokenizer": bytes, "decoder": bytes,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "merges": [["Y", "e"], ["Ye", "s"], ["N", "o"]], "vocab": vocab},
    })
    .to_string()
}

/// A model directory: a golden's random LLaMA with grouped heads, and the tokenizer.
pub fn tiny_model(dir: &Path) -> PathBuf {
    let model = dir.join("model");
    std::fs::create_dir_all(&model).unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(fixture("golden/llama-gqa").join(name), model.join(name)).unwrap();
    }
    std::fs::write(model.join("tokenizer.json"), tokenizer_json()).unwrap();
    model
}

/// CSV files of 24 users, 30 items, 600 interactions; whether a user likes an item follows from their numbers.
pub fn tiny_csv(dir: &Path) -> (PathBuf, PathBuf) {
    let (mut rows, mut items) = (String::from("user,item,rating,timestamp\n"), String::from("item,title\n"));
    for i in 0..30 {
        writeln!(items, "i{i},\"Film {i}, The (19{:02})\"", 60 + i).unwrap();
    }
    for n in 0..600 {
        // Each user meets each item once, users interleaved in time.
        let (user, item) = (n % 24, (n / 24 * 7 + n % 24 * 3) % 30);
        writeln!(rows, "u{user},i{item},{},{}", if (user + item) % 3 == 0 { 2 } else { 5 }, 1_000_000 + n / 2).unwrap();
    }
    let paths = (dir.join("rows.csv"), dir.join("items.csv"));
    std::fs::write(&paths.0, rows).unwrap();
    std::fs::write(&paths.1, items).unwrap();
    paths
}

/// Runs the program.
pub fn run(args: &[&str]) -> Output {
    command(args).output().unwrap()
}

/// The program with its caches in a directory of the build.
pub fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_collm-engine"));
    command.args(args).env("COLLM_CACHE", Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache"));
    command
}

/// Runs the program, which must succeed; its standard output.
pub fn ok(args: &[&str]) -> String {
    let out = run(args);
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

/// Runs the program, which must fail with one readable message and no panic; the message.
pub fn fails(args: &[&str]) -> String {
    let out = run(args);
    let stderr = String::from_utf8(out.stderr).unwrap();
    assert!(!out.status.success(), "{args:?} should fail");
    assert!(!stderr.contains("panicked"), "{args:?}: {stderr}");
    stderr
}

/// A prepared data directory.
pub fn tiny_data(dir: &Path) -> PathBuf {
    let (rows, items) = tiny_csv(dir);
    let out = dir.join("data");
    ok(&["prepare", "csv", "--interactions", path(&rows), "--items", path(&items), "--out", path(&out)]);
    out
}

/// A path as an argument.
pub fn path(p: &Path) -> &str {
    p.to_str().unwrap()
}
