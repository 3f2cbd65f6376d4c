//! `collm-engine convert`.

use std::process::ExitCode;

/// Arguments of `collm-engine convert`.
#[derive(clap::Args)]
pub struct Args {}

/// Runs the subcommand.
pub fn run(_args: Args) -> anyhow::Result<ExitCode> {
    anyhow::bail!("not built yet")
}
