//! Any bytes are a torch file whose tensors are read, or an error: `cargo +nightly fuzz run torch`.
//!
//! The reader is included by path, so that the fuzzer instruments it and nothing else. `data` is its room's name.
#![no_main]
#![allow(dead_code)]

mod data {
    #[path = "../../../src/data/pickle.rs"]
    pub mod pickle;
}
#[path = "../../src/pth/mod.rs"]
mod pth;

use std::io::Cursor;
use std::path::Path;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(mut file) = pth::TorchFile::new(Cursor::new(bytes), Path::new("fuzzed")) {
        for i in 0..file.entries.len() {
            let _ = file.read(i);
        }
    }
});
