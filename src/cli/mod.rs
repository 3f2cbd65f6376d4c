//! The command line: one file a subcommand, no logic. Owns argument parsing and the exit code
//! (0 success, 1 failure, 2 usage, 130 interrupted); everything else is a call into the library.

pub mod bench;
pub mod config;
pub mod convert;
pub mod demo;
pub mod devices;
pub mod eval;
pub mod overhead;
pub mod prepare;
pub mod rank;
pub mod score;
pub mod selftest;
pub mod train;
pub mod verify;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::device::Device;
use crate::device::cuda::GemmChoice;

#[derive(Parser)]
#[command(name = "collm-engine", version, about, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Worker threads (default: all cores).
    #[arg(long, global = true, env = "COLLM_THREADS", value_name = "N")]
    threads: Option<usize>,
    /// Where the language model computes: cpu, cuda, cuda:N (cuda:N:f32 for the kernels' float32 build, a check).
    #[arg(long, global = true, env = "COLLM_DEVICE", default_value_t = Device::Cpu)]
    device: Device,
    /// Who computes matrix products on a card: ours, cublaslt, or auto (cuBLASLt where it is found and faster). Only `ours` gives
    /// the same bits on every run.
    #[arg(long, global = true, env = "COLLM_GEMM", default_value_t = GemmChoice::Auto)]
    gemm: GemmChoice,
}

#[derive(Subcommand)]
enum Command {
    /// The whole job on real data in one command: prepare, MF, stage 1, stage 2, evaluation, one table.
    Demo(demo::Args),
    /// Turn raw interactions into train/valid/test Parquet splits.
    Prepare(prepare::Args),
    /// Turn a GGUF file into a Hugging Face model directory.
    Convert(convert::Args),
    /// Check a model's logits, loss and gradients against a golden file.
    Verify(verify::Args),
    /// Import an official yaml configuration, or show what settings resolve to.
    Config(config::Args),
    /// Train the collaborative model, stage 1 (LoRA) and stage 2 (CIE).
    Train(train::Args),
    /// Metrics of a trained run, or of a file of scores, on all, warm and cold test rows.
    Eval(eval::Args),
    /// Score user–item rows or a candidates file with a trained run.
    Score(score::Args),
    /// Rank candidates for users with a trained run: the best items first.
    Rank(rank::Args),
    /// Measure what training and scoring cost.
    Bench(bench::Args),
    /// List the CPU and the NVIDIA cards, and what each can run.
    Devices(devices::Args),
    /// Check every operation on this machine against float64.
    Selftest(selftest::Args),
}

/// An error and its causes in one line. A cause that the message already tells is not told again.
fn chain(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// Runs the command line and returns the process's exit code.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let run = || -> anyhow::Result<ExitCode> {
        if let Some(n) = cli.threads {
            rayon::ThreadPoolBuilder::new().num_threads(n).build_global()?;
        }
        let device = cli.device.with_gemm(cli.gemm);
        match cli.command {
            Command::Demo(a) => demo::run(a, device),
            Command::Prepare(a) => prepare::run(a),
            Command::Convert(a) => convert::run(a),
            Command::Verify(a) => verify::run(a, device),
            Command::Train(a) => train::run(a, device),
            Command::Eval(a) => eval::run(a, device),
            Command::Score(a) => score::run(a, device),
            Command::Rank(a) => rank::run(a, device),
            Command::Bench(a) => bench::run(a, device),
            Command::Config(a) => config::run(a),
            Command::Devices(a) => devices::run(a),
            Command::Selftest(a) => selftest::run(a, device),
        }
    };
    match run() {
        Ok(code) => code,
        Err(e) => {
            eprintln!("error: {}", chain(&e));
            ExitCode::FAILURE
        }
    }
}
