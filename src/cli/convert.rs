//! `collm-engine convert`: a GGUF file becomes a Hugging Face model directory.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;

use crate::llm::convert::convert_gguf;

/// Arguments of `collm-engine convert`.
#[derive(clap::Args)]
pub struct Args {
    /// GGUF file: LLaMA or Qwen2 architecture; F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K.
    gguf: PathBuf,
    /// Directory to write.
    out: PathBuf,
    /// Replace an existing model directory.
    #[arg(long)]
    force: bool,
}

/// Runs the subcommand.
pub fn run(args: Args) -> Result<ExitCode> {
    let start = Instant::now();
    let s = convert_gguf(&args.gguf, &args.out, args.force)?;
    println!(
        "{}: {} tensors, {:.1} M weights as bf16, {} tokens, {:.1} s",
        args.out.display(),
        s.tensors,
        s.parameters as f64 / 1e6,
        s.vocab_size,
        start.elapsed().as_secs_f64()
    );
    Ok(ExitCode::SUCCESS)
}
