//! The CUDA kernels on the emulator: every operation against float64, and the sizes at which tiles are ragged.

use std::ffi::{CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Once;

use crate::common::{GOLDEN_MODELS, fixture};
use collm_engine::device::Device;
use collm_engine::device::cuda::gemm::Gemm;
use collm_engine::device::cuda::{Buffer, Cuda, Precision};
use collm_engine::llm::verify::verify;
use collm_engine::rng::Rng;
use collm_engine::selftest::{self, Outcome};

unsafe extern "C" {
    fn dlopen(path: *const c_char, flags: c_int) -> *mut c_void;
}

/// A library of a package that only tests need, which cargo builds beside them.
pub fn beside_the_tests(name: &str) -> PathBuf {
    let exe = std::env::current_exe().unwrap();
    let library = exe.parent().unwrap().join(name);
    assert!(library.exists(), "{} is missing: cargo test builds it", library.display());
    library
}

fn emulator() -> PathBuf {
    beside_the_tests("libcuda_emulator.so")
}

/// Makes the emulator the driver of programs that search `dir` for libraries.
pub fn link_emulator(dir: &Path) {
    std::os::unix::fs::symlink(emulator(), dir.join("libcuda.so.1")).unwrap();
}

/// Makes the emulator this process's driver: its soname is libcuda.so.1, so the engine's own search finds it.
pub fn load_emulator() {
    static LOADED: Once = Once::new();
    LOADED.call_once(|| {
        let path = CString::new(emulator().to_str().unwrap()).unwrap();
        // SAFETY: RTLD_NOW | RTLD_GLOBAL of our own library.
        assert!(!unsafe { dlopen(path.as_ptr(), 0x102) }.is_null());
    });
}

/// Opens the emulated card.
pub fn cuda(precision: Precision) -> Cuda {
    load_emulator();
    Cuda::open(0, precision).unwrap()
}

/// All cases of one operation, in both builds of the kernels.
fn judge(cases: fn(&Cuda) -> collm_engine::device::cuda::Result<Vec<Outcome>>) {
    for precision in [Precision::F32, Precision::Bf16] {
        let outcomes = cases(&cuda(precision)).unwrap();
        assert!(!outcomes.is_empty());
        let bad: Vec<_> = outcomes.iter().filter(|o| !o.passed()).collect();
        assert!(bad.is_empty(), "{precision:?}: {bad:#?}");
    }
}

macro_rules! operations {
    ($($name:ident),*) => {
        $(
            #[test]
            fn $name() {
                judge(selftest::$name::cases);
            }
        )*

        /// `collm-engine selftest` runs no operation that has no test here.
        #[test]
        fn every_operation_has_a_test() {
            let names = [$(stringify!($name)),*];
            assert_eq!(selftest::OPERATIONS.map(|o| o.0), names);
        }
    };
}
operations!(gemm, attention, norm, rope, lora, rows, head, mask, mapping, optimizer, mf, lightgcn);

/// The products alone in bf16, on the card that `CUEMU_CARD` names; without it, only that the portable tiles are there.
#[test]
fn products_agree_with_float64() {
    let cuda = cuda(Precision::Bf16);
    let hopper = cuda.description().capability == (9, 0);
    assert_eq!(Gemm::new(&cuda).unwrap().shapes(), if hopper { 5 } else { 3 });
    if !hopper {
        // `gemm` runs the cases.
        return;
    }
    let outcomes = selftest::gemm::cases(&cuda).unwrap();
    let failed: Vec<_> = outcomes.iter().filter(|o| !o.passed()).collect();
    assert!(failed.is_empty(), "{} of {}: {failed:#?}", failed.len(), outcomes.len());
}

/// An emulated card is chosen once a process: this program again, on an H100, whose products are wgmma's. Copies land late and
/// early, blocks and warps run in order and permuted.
#[test]
fn products_agree_with_float64_on_hopper() {
    for (copies, seed) in [("late", None), ("eager", None), ("late", Some("1")), ("eager", Some("2"))] {
        let seed = seed.map(|s| ("CUEMU_SEED", s));
        on_hopper("products_agree_with_float64", [("CUEMU_COPIES", copies)].into_iter().chain(seed));
    }
}

/// Whole models there: on a card of one multiprocessor every product is large enough, and wgmma's tiles are what is chosen.
#[test]
fn golden_models_on_hopper() {
    let dir = tempfile::tempdir().unwrap();
    let report = dir.path().join("report.json");
    on_hopper("golden_models", [("CUEMU_SMS", "1"), ("CUEMU_REPORT", report.to_str().unwrap())]);
    let report = std::fs::read_to_string(report).unwrap();
    for product in ["nt", "nn", "nt_swiglu", "nn_swiglu_bwd"] {
        assert!(report.contains(&format!("gemm_sm90_{product}_128x256")), "{product} ran on other tiles");
    }
}

/// Runs a test of this file again, in a process whose card is an H100.
fn on_hopper<'a>(test: &str, settings: impl IntoIterator<Item = (&'a str, &'a str)> + Clone + std::fmt::Debug) {
    let mut again = Command::new(std::env::current_exe().unwrap());
    again.args(["--exact", &format!("cuda::{test}")]).env("CUEMU_CARD", "H100").envs(settings.clone());
    let out = again.output().unwrap();
    let said = String::from_utf8_lossy(&out.stdout);
    let errors = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success() && said.contains("1 passed"), "{settings:?}: {said}{errors}");
}

/// Every golden model through the kernels: float32 at the CPU's limits, bf16 at twice the error of a naive bf16 version, tensor by
/// tensor (`golden/bf16.json`, made by `bf16.py` beside it).
#[test]
fn golden_models() {
    load_emulator();
    let naive = std::fs::read_to_string(fixture("golden").join("bf16.json")).unwrap();
    let naive: serde_json::Value = serde_json::from_str(&naive).unwrap();
    for precision in [Precision::F32, Precision::Bf16] {
        for name in GOLDEN_MODELS {
            let dir = fixture("golden").join(name);
            let device = Device::cuda(0, precision);
            let report = verify(&dir, Some(&dir.join("adapter")), &dir.join("golden.safetensors"), device).unwrap();
            assert!(report.unchecked.is_empty(), "{name}: {:?}", report.unchecked);
            let mut worst = 0.0f64;
            for c in &report.comparisons {
                let naive = naive[name][&c.name].as_f64().filter(|_| precision == Precision::Bf16);
                let limit = naive.map_or(c.limit, |n| 2.0 * n);
                assert!(c.error <= limit, "{name} {precision:?}: {} is off by {:e}, limit {limit:e}", c.name, c.error);
                worst = worst.max(c.error / limit.max(1e-30));
            }
            println!("{name} {precision:?}: at most {worst:.2} of the limit");
        }
    }
}

/// Uploads pass through page-locked memory that two halves take turns in: larger than both, and many small ones from one vector.
#[test]
fn uploads_arrive_whole() {
    let cuda = cuda(Precision::Bf16);
    let pattern = |seed: u64, n: usize| -> Vec<u32> {
        let mut rng = Rng::new(seed, 0);
        (0..n).map(|_| rng.next_u32()).collect()
    };
    let large = pattern(1, (9 << 20) / 4 + 3);
    let on_card = Buffer::from_host(&cuda, &large, "a large upload").unwrap();
    assert!(on_card.download(&cuda, large.len()).unwrap() == large);
    let (n, count) = (40_001, 60);
    let small: Vec<Buffer<u32>> = (0..count)
        .map(|i| {
            let mut values = pattern(i, n);
            let buffer = Buffer::from_host(&cuda, &values, "a small upload").unwrap();
            // What the host does with them afterwards is its own affair.
            values.fill(0);
            buffer
        })
        .collect();
    for (i, buffer) in small.iter().enumerate() {
        assert!(buffer.download(&cuda, n).unwrap() == pattern(i as u64, n), "upload {i}");
    }
}
