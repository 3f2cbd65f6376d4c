//! Any bytes are a pickle that is read, or an error: `cargo +nightly fuzz run pickle`.
//!
//! The reader is included by path, so that the fuzzer instruments it and nothing else.
#![no_main]
#![allow(dead_code)]

#[path = "../../src/data/pandas.rs"]
mod pandas;
#[path = "../../src/data/pickle.rs"]
mod pickle;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _ = pickle::Pickle::parse(data);
    let _ = pandas::read_frame(data);
});
