//! The CUDA kernels on the emulator: every operation against float64, and the sizes at which tiles are ragged.

use std::ffi::{CString, c_char, c_int, c_void};
use std::path::PathBuf;
use std::sync::Once;

use collm_engine::device::cuda::{Cuda, Precision};
use collm_engine::selftest::{self, Outcome};

unsafe extern "C" {
    fn dlopen(path: *const c_char, flags: c_int) -> *mut c_void;
}

/// The emulator's library, which cargo builds beside the tests.
fn emulator() -> PathBuf {
    let exe = std::env::current_exe().unwrap();
    let deps = exe.parent().unwrap();
    let library = deps.join("libcuda_emulator.so");
    assert!(library.exists(), "{} is missing: cargo test builds it", library.display());
    library
}

/// Opens the emulated card. Its soname is libcuda.so.1, so the engine's own search for a driver finds it.
pub fn cuda(precision: Precision) -> Cuda {
    static LOADED: Once = Once::new();
    LOADED.call_once(|| {
        let path = CString::new(emulator().to_str().unwrap()).unwrap();
        // SAFETY: RTLD_NOW | RTLD_GLOBAL of our own library.
        assert!(!unsafe { dlopen(path.as_ptr(), 0x102) }.is_null());
    });
    Cuda::open(0, precision).unwrap()
}

/// Runs an operation's cases in both precisions.
fn check(cases: impl Fn(&Cuda) -> collm_engine::device::cuda::Result<Vec<Outcome>>) {
    for precision in [Precision::F32, Precision::Bf16] {
        let cuda = cuda(precision);
        let outcomes = cases(&cuda).unwrap();
        for o in &outcomes {
            println!("{precision:?} {} {}: {:.2e} of {:.2e}", o.operation, o.case, o.error, o.limit);
        }
        let failed: Vec<_> = outcomes.iter().filter(|o| !o.passed()).collect();
        assert!(failed.is_empty(), "{precision:?}: {failed:#?}");
    }
}

#[test]
fn gemm() {
    check(selftest::gemm::cases);
}

#[test]
fn norm() {
    check(selftest::norm::cases);
}

#[test]
fn rope() {
    check(selftest::rope::cases);
}

#[test]
fn lora() {
    check(selftest::lora::cases);
}

#[test]
fn rows() {
    check(selftest::rows::cases);
}

#[test]
fn head() {
    check(selftest::head::cases);
}

#[test]
fn mask() {
    check(selftest::mask::cases);
}
