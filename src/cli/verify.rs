//! `collm-engine verify`: logits, loss and gradients against a golden file.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;

use crate::device::Device;
use crate::llm::verify::verify;

/// Arguments of `collm-engine verify`.
#[derive(clap::Args)]
pub struct Args {
    /// Hugging Face model directory.
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Golden file: inputs, outputs and gradients as Hugging Face + PEFT computed them.
    #[arg(long, value_name = "FILE")]
    against: PathBuf,
    /// PEFT adapter directory (default: `adapter` beside the golden file, if there is one).
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
}

/// Runs the subcommand: exit code 1 if a tensor is off.
pub fn run(args: Args, device: Device) -> Result<ExitCode> {
    let beside = args.against.parent().map(|dir| dir.join("adapter")).filter(|dir| dir.is_dir());
    let report = verify(&args.model, args.adapter.or(beside).as_deref(), &args.against, device)?;
    println!("{:<78} {:>11} {:>9}", "tensor", "rel. error", "limit");
    for c in &report.comparisons {
        println!("{:<78} {:>11.2e} {:>9.0e} {}", c.name, c.error, c.limit, if c.passes() { "ok" } else { "FAIL" });
    }
    for name in &report.unchecked {
        println!("{name:<78} not understood, not checked");
    }
    let failed = report.comparisons.iter().filter(|c| !c.passes()).count();
    println!("{} tensors compared, {failed} failed ({})", report.comparisons.len(), device);
    Ok(if report.passes() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
