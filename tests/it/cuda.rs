//! The CUDA kernels on the emulator: every operation against float64, and the sizes at which tiles are ragged.

use std::ffi::{CString, c_char, c_int, c_void};
use std::path::PathBuf;
use std::sync::Once;

use collm_engine::device::cuda::attention::Attention;
use collm_engine::device::cuda::{Cuda, Precision};

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

/// Prints all outcomes, then fails with the first bad one.
fn judge(precision: Precision, outcomes: &[collm_engine::selftest::Outcome]) {
    for o in outcomes {
        println!("{precision:?} {} {}: {:.2e} of {:.2e}", o.operation, o.case, o.error, o.limit);
    }
    let bad = outcomes.iter().find(|o| !o.passed());
    assert!(bad.is_none(), "{precision:?} {bad:?}");
}

#[test]
fn attention() {
    for precision in [Precision::F32, Precision::Bf16] {
        let cuda = cuda(precision);
        judge(precision, &collm_engine::selftest::attention::cases(&cuda).unwrap());
        for head_dim in [0, 12, 100, 136] {
            let error = Attention::new(&cuda, head_dim).unwrap_err().to_string();
            assert!(error.contains("multiples of 8 up to 128"), "{error}");
        }
    }
}

#[test]
fn operations_agree_with_float64() {
    for precision in [Precision::F32, Precision::Bf16] {
        let cuda = cuda(precision);
        let outcomes = collm_engine::selftest::run(&cuda).unwrap();
        for o in &outcomes {
            println!("{precision:?} {} {}: {:.2e} of {:.2e}", o.operation, o.case, o.error, o.limit);
        }
        for o in &outcomes {
            assert!(
                o.passed(),
                "{precision:?} {} {}: error {:e}, limit {:e}, contained {}",
                o.operation,
                o.case,
                o.error,
                o.limit,
                o.contained
            );
        }
    }
}
