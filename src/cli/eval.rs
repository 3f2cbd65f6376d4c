//! `collm-engine eval`.

use std::process::ExitCode;

/// Arguments of `collm-engine eval`.
#[derive(clap::Args)]
pub struct Args {}

/// Runs the subcommand.
pub fn run(_args: Args) -> anyhow::Result<ExitCode> {
    anyhow::bail!("not built yet")
}
