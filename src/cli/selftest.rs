//! `collm-engine selftest`: every operation on this machine against float64, as a table.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;

use crate::device::Device;
use crate::device::cuda::context::KERNELS_ORIGIN;
use crate::device::cuda::{Cuda, Precision};
use crate::selftest::bench::{self, Bench};
use crate::selftest::{self, Outcome, Summary};

/// Arguments of `collm-engine selftest`.
#[derive(clap::Args)]
pub struct Args {
    /// Also time the operations at a model's shapes, beside the best rates measured in the same run.
    #[arg(long)]
    bench: bool,
}

/// Runs the subcommand on a device (cuda: the bf16 kernels and their float32 build); exit code 1 if a case is off.
pub fn run(args: Args, device: Device) -> Result<ExitCode> {
    let began = Instant::now();
    println!("{:<7} {:<22} {:>5} {:>12} {:>12}", "type", "operation", "cases", "worst error", "its limit");
    let mut failures = Vec::new();
    match device {
        Device::Cpu => show("float32", &selftest::cpu::run(), &mut failures),
        Device::Cuda { ordinal, precision, gemm } => {
            // float32 elements asked for: only those.
            let shipped = (precision == Precision::Bf16).then_some(Precision::Bf16);
            for precision in shipped.into_iter().chain([Precision::F32]) {
                let cuda = Cuda::open(ordinal, precision)?.with_gemm(gemm);
                let name = if precision == Precision::Bf16 { "bf16" } else { "float32" };
                show(name, &selftest::run(&cuda)?, &mut failures);
            }
        }
    }
    for failure in &failures {
        println!("{failure}");
    }
    let kernels = if device == Device::Cpu { String::new() } else { format!(" (kernels from {KERNELS_ORIGIN})") };
    let seconds = began.elapsed().as_secs_f64();
    println!("{device}{kernels}: {} cases failed, {seconds:.1} s", failures.len());
    if args.bench {
        rates(&match device {
            Device::Cpu => bench::cpu(),
            Device::Cuda { ordinal, precision, gemm } => bench::cuda(&Cuda::open(ordinal, precision)?.with_gemm(gemm))?,
        });
    }
    Ok(if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A line for each operation. The case shown is the one nearest to its limit, or furthest beyond it.
fn show(kind: &str, outcomes: &[Outcome], failures: &mut Vec<String>) {
    for Summary { operation, cases, worst, failed } in selftest::summarize(outcomes) {
        let verdict = if failed == 0 { "ok".to_owned() } else { format!("FAIL ({failed})") };
        println!("{kind:<7} {operation:<22} {cases:>5} {:>12.2e} {:>12.2e} {verdict}", worst.error, worst.limit);
    }
    failures.extend(outcomes.iter().filter(|o| !o.passed()).map(|o| {
        let outside = if o.contained { "" } else { ", wrote outside its outputs" };
        format!("FAIL {kind} {} {}: error {:.3e}, limit {:.3e}{outside}", o.operation, o.case, o.error, o.limit)
    }));
}

/// A line for each operation: time, rate, and what part of the best rate of its kind that is.
fn rates(bench: &Bench) {
    println!();
    if bench.emulated {
        println!("Times are those of an emulator on this CPU: they say nothing about a card.");
    }
    println!("{}", bench.shape);
    let other = bench.rows.iter().any(|r| r.cublaslt.is_some());
    let heading = if other { format!(" {:>12}", "cuBLASLt") } else { String::new() };
    println!("{:<44} {:>12} {:>18} {:>11}{heading}", "operation", "time", "rate", "of the best");
    for r in &bench.rows {
        let (rate, unit, best) = if r.flops > 0.0 {
            (r.flops / r.seconds, "GFLOP/s", bench.best_flops())
        } else {
            (r.bytes / r.seconds, "GB/s", bench.copy_bytes_per_s)
        };
        let (rate, part) = (rate / 1e9, 100.0 * rate / best);
        let other = r.cublaslt.map_or_else(String::new, |s| format!(" {:>9.1} us", s * 1e6));
        println!("{:<44} {:>9.1} us {rate:>10.1} {unit:<7} {part:>9.1} %{other}", r.operation, r.seconds * 1e6);
    }
    let (flops, bytes) = (bench.best_flops() / 1e9, bench.copy_bytes_per_s / 1e9);
    println!("Best in this run: {flops:.0} GFLOP/s (a matrix product), {bytes:.1} GB/s (a copy, read and written).");
}
