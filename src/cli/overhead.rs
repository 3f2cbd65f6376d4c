//! `collm-engine bench overhead`: CoLLM beside TALLRec, the official way and the engine's, on the user's model and data.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::bench::overhead::{Options, run as measure};
use crate::bench::worker::serve;
use crate::bench::{plot, worker};
use crate::device::Device;
use crate::files::write_atomic;
use crate::progress::Progress;

/// Arguments of `collm-engine bench overhead`.
#[derive(clap::Args)]
pub struct Args {
    /// Hugging Face model directory.
    #[arg(long, value_name = "DIR", required_unless_present = "model_only")]
    llm: Option<PathBuf>,
    /// Prepared data directory: rows of train and of test are used.
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Random weights of this config.json's shape, where the weights cannot be had.
    #[arg(long, value_name = "FILE")]
    model_only: Option<PathBuf>,
    /// Whose tokenizer splits the prompts of --model-only (default: that of --llm).
    #[arg(long, value_name = "DIR", requires = "model_only")]
    tokenizer: Option<PathBuf>,
    /// With --model-only: measure this many blocks (at least 2) and twice as many, and extrapolate.
    #[arg(long, default_value_t = 2, requires = "model_only", value_parser = blocks)]
    layers: usize,
    /// Collaborative models, with commas.
    #[arg(long, value_delimiter = ',', default_value = "mf,lightgcn")]
    models: Vec<String>,
    /// Measured batches of each configuration.
    #[arg(long, default_value_t = 3, value_parser = positive)]
    rounds: usize,
    /// Rows of a training batch.
    #[arg(long, default_value_t = 16, value_parser = positive)]
    train_batch: usize,
    /// Rows of an evaluation batch.
    #[arg(long, default_value_t = 64, value_parser = positive)]
    eval_batch: usize,
    /// Most titles of a prompt's history.
    #[arg(long, default_value_t = 10)]
    max_history: usize,
    /// Rows that stage 1 trains on in a whole run (default: 40 official epochs, of which the last 20 are its patience).
    #[arg(long, default_value_t = 64_000, value_parser = positive)]
    rows_stage1: usize,
    /// Rows that stage 2 trains on in a whole run.
    #[arg(long, default_value_t = 64_000, value_parser = positive)]
    rows_stage2: usize,
    /// Write everything here as JSON, every batch included.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw the times of a row here.
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
}

fn positive(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|&n| n > 0).ok_or_else(|| "expected a whole number of at least 1".into())
}

/// The first and the last block differ from those between: cost grows by a block's from two on.
fn blocks(text: &str) -> Result<usize, String> {
    positive(text).ok().filter(|&n| n > 1).ok_or_else(|| "expected a whole number of at least 2".into())
}

/// Arguments of `collm-engine bench overhead-worker`, which `bench overhead` starts.
#[derive(clap::Args)]
pub struct WorkerArgs {
    /// The configuration, as JSON.
    job: String,
}

/// Runs the subcommand.
pub fn run(args: Args, device: Device) -> Result<ExitCode> {
    let options = Options {
        program: std::env::current_exe().context("this program's own file")?,
        device,
        llm: args.llm,
        tokenizer: args.tokenizer,
        model_only: args.model_only,
        layers: args.layers,
        data: args.data,
        models: args.models,
        rounds: args.rounds,
        train_batch: args.train_batch,
        eval_batch: args.eval_batch,
        max_history: args.max_history,
        rows_stage1: args.rows_stage1,
        rows_stage2: args.rows_stage2,
    };
    let report = measure(&options, &Progress::auto())?;
    print!("{report}");
    if let Some(path) = args.json {
        write_atomic(&path, |w| serde_json::to_writer_pretty(w, &report).map_err(std::io::Error::from))
            .with_context(|| path.display().to_string())?;
    }
    if let Some(path) = args.plot {
        write_atomic(&path, |w| w.write_all(plot::svg(&report).as_bytes()))
            .with_context(|| path.display().to_string())?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Runs one configuration, told by standard input, heard on standard output.
pub fn run_worker(args: &WorkerArgs, device: Device) -> Result<ExitCode> {
    let job: worker::Job = serde_json::from_str(&args.job).context("the configuration")?;
    serve(&job, device, std::io::stdin().lock(), std::io::stdout().lock())?;
    Ok(ExitCode::SUCCESS)
}
