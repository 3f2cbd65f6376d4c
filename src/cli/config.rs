//! `collm-engine config`: official yaml files become ours, and settings are shown as they resolve.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Subcommand;

use super::train::Experiment;
use crate::files::write_atomic;
use crate::train::config::Config;
use crate::train::import::import;

/// Arguments of `collm-engine config`.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Turn an official train_configs/*.yaml into a TOML file for --config, with a comment for every key without a counterpart.
    Import {
        /// The yaml file.
        yaml: PathBuf,
        /// File to write (default: standard output).
        #[arg(long, value_name = "FILE.toml")]
        out: Option<PathBuf>,
        /// Processes that the official training ran side by side (torchrun --nproc-per-node): batches there are per process.
        #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=1024))]
        processes: u64,
    },
    /// List the presets.
    Presets,
    /// Print every setting of an experiment: preset, file and --set resolved.
    Show(Experiment),
}

/// Runs the subcommand.
pub fn run(args: Args) -> Result<ExitCode> {
    match args.what {
        What::Show(experiment) => print!("{}", experiment.resolve()?.to_toml()?),
        What::Presets => println!("{}", Config::presets().join("\n")),
        What::Import { yaml, out, processes } => {
            let bytes = std::fs::read(&yaml).with_context(|| yaml.display().to_string())?;
            let text = String::from_utf8(bytes).map_err(|e| {
                let line = e.as_bytes()[..e.utf8_error().valid_up_to()].iter().filter(|&&b| b == b'\n').count() + 1;
                anyhow::anyhow!("{}:{line}: text that is not UTF-8", yaml.display())
            })?;
            let imported = import(&text, &yaml.display().to_string(), processes)?;
            let Some(out) = out else {
                print!("{}", imported.toml);
                return Ok(ExitCode::SUCCESS);
            };
            if out.exists() {
                bail!("{} exists; choose another --out or remove it", out.display());
            }
            write_atomic(&out, |w| w.write_all(imported.toml.as_bytes())).with_context(|| out.display().to_string())?;
            println!(
                "{}: {} settings, {} keys without a counterpart (at its end, with what to do)",
                out.display(),
                imported.settings,
                imported.unmatched
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}
