//! `devices` and `selftest` as a user runs them, on the CPU and on the emulated card.

use std::path::Path;
use std::process::Output;

use crate::common::command;
use crate::cuda::link_emulator;

/// Runs the program where the emulator is the driver.
fn on_card(args: &[&str], env: &[(&str, &str)]) -> Output {
    let dir = tempfile::tempdir().unwrap();
    link_emulator(dir.path());
    let mut command = command(args);
    command.env("LD_LIBRARY_PATH", dir.path()).envs(env.iter().copied()).output().unwrap()
}

fn text(out: &Output) -> &str {
    std::str::from_utf8(&out.stdout).unwrap()
}

#[test]
fn devices_lists_the_cpu_and_says_why_there_is_no_card() {
    let out = command(&["devices"]).output().unwrap();
    assert!(out.status.success());
    assert!(text(&out).starts_with("cpu "), "{}", text(&out));
    assert!(text(&out).contains("threads"), "{}", text(&out));
    // Where a driver is installed, there may be cards.
    let driver = ["/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/cuda/compat"];
    if !driver.iter().any(|dir| Path::new(dir).join("libcuda.so.1").exists()) {
        let last = text(&out).lines().last().unwrap();
        assert!(last.starts_with("No NVIDIA card can be used: no CUDA driver"), "{last}");
    }
}

#[test]
fn devices_lists_the_emulated_card() {
    for (card, wanted) in [("A100", "compute capability 8.0, 108 multi"), ("H100", "compute capability 9.0, 132 multi")]
    {
        let out = on_card(&["devices"], &[("CUEMU_CARD", card)]);
        assert!(out.status.success());
        assert!(text(&out).contains("cuda:0"), "{}", text(&out));
        assert!(text(&out).contains(wanted) && text(&out).contains("emulator"), "{}", text(&out));
    }
}

/// Operation lines of a self-test: all but headings and the last.
fn verdicts(table: &str) -> Vec<&str> {
    table.lines().filter(|l| l.starts_with("bf16 ") || l.starts_with("float32 ")).collect()
}

#[test]
fn selftest_passes_on_the_cpu() {
    let out = command(&["selftest"]).output().unwrap();
    assert!(out.status.success(), "{}", text(&out));
    let lines = verdicts(text(&out));
    assert!(lines.len() > 15 && lines.iter().all(|l| l.ends_with(" ok")), "{}", text(&out));
}

/// The checks are off for time's sake: the same cases run checked in `cuda.rs`.
#[test]
fn selftest_passes_on_the_emulated_card_and_says_what_its_times_are() {
    let out = on_card(&["selftest", "--device", "cuda", "--bench"], &[("CUEMU_CHECK", "off")]);
    assert!(out.status.success(), "{}{}", text(&out), String::from_utf8_lossy(&out.stderr));
    let lines = verdicts(text(&out));
    assert!(lines.iter().all(|l| l.ends_with(" ok")), "{}", text(&out));
    for kind in ["bf16", "float32"] {
        assert!(lines.iter().filter(|l| l.starts_with(kind)).count() > 15, "{}", text(&out));
    }
    for wanted in ["Times are those of an emulator", "gemm gate, up, SwiGLU", "attention backward", "GB/s"] {
        assert!(text(&out).contains(wanted), "{wanted} is missing in {}", text(&out));
    }
}

/// A driver too old for the kernels, and a card that is not there: errors, not tables.
#[test]
fn selftest_fails_where_kernels_cannot_run() {
    let out = on_card(&["selftest", "--device", "cuda"], &[("CUEMU_PTX_VERSION", "6.0")]);
    assert_eq!(out.status.code(), Some(1), "{}", text(&out));
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(stderr.contains("loading the kernels") && !stderr.contains("panicked"), "{stderr}");
    let out = on_card(&["selftest", "--device", "cuda:3"], &[]);
    assert_eq!(out.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&out.stderr).contains("there is no CUDA device 3"));
}
