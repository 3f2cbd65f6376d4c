//! `collm-engine eval`: metrics of a trained run, or of a file of scores from elsewhere.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};

use super::train::{cache_dir, judge};
use crate::data::{Dataset, Samples, Split};
use crate::device::Device;
use crate::eval::report::{MethodResult, markdown};
use crate::progress::Progress;
use crate::train::config::Config;
use crate::train::pipeline::Pipeline;

/// Arguments of `collm-engine eval`.
#[derive(clap::Args)]
pub struct Args {
    /// Run directory: MF, stage 1 and stage 2 on its test rows.
    #[arg(long, value_name = "DIR", conflicts_with = "scores")]
    run: Option<PathBuf>,
    /// CSV of scores from elsewhere, with the columns uid, iid and score (others are ignored).
    #[arg(long, value_name = "FILE", requires = "data")]
    scores: Option<PathBuf>,
    /// Prepared data directory the scores belong to.
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Split the scores belong to.
    #[arg(long, default_value = "test", value_parser = ["train", "valid", "valid_small", "test"])]
    split: String,
    /// With --run: also the collaborative model together with each stage (the mean of their probabilities).
    #[arg(long, requires = "run")]
    ensemble: bool,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
}

/// Runs the subcommand.
pub fn run(args: Args, device: Device) -> Result<ExitCode> {
    match (args.run, args.scores, args.data) {
        (Some(run), _, _) => {
            let config = Config::resolve(None, Some(&run.join("config.toml")), &[])?;
            judge(&Pipeline::open(config, device, &cache_dir(), Progress::auto())?, &run, args.ensemble)?;
        }
        (None, Some(scores), Some(data)) => {
            let data = Dataset::load(&data)?;
            let split = Split::ALL.into_iter().find(|s| s.name() == args.split).unwrap_or(Split::Test);
            let (samples, scores) = scored(data.split(split), &scores)?;
            let result = MethodResult::new("scores", &samples, &scores)?;
            if args.json {
                println!("{}", serde_json::to_string_pretty(&result)?);
            } else {
                println!("{}", markdown(&[result]));
            }
        }
        _ => bail!("pass --run DIR, or --scores FILE with --data DIR"),
    }
    Ok(ExitCode::SUCCESS)
}

/// The rows of the split that have a score, with their scores.
fn scored(samples: &Samples, path: &Path) -> Result<(Samples, Vec<f32>)> {
    let mut reader = csv::Reader::from_path(path).with_context(|| path.display().to_string())?;
    let header = reader.headers()?.clone();
    let column = |name: &str| {
        let at = header.iter().position(|h| h == name);
        at.with_context(|| {
            format!(
                "{} has no column {name}; its columns are {}",
                path.display(),
                header.iter().collect::<Vec<_>>().join(", ")
            )
        })
    };
    let (uid, iid, score) = (column("uid")?, column("iid")?, column("score")?);
    let rows: std::collections::HashMap<(u32, u32), usize> =
        (0..samples.len()).map(|i| ((samples.uid[i], samples.iid[i]), i)).collect();
    let (mut chosen, mut scores) = (Vec::new(), Vec::new());
    for record in reader.records() {
        let record = record.with_context(|| path.display().to_string())?;
        let line = record.position().map_or(0, csv::Position::line);
        let at = || format!("{}:{line}", path.display());
        let id =
            |c: usize| record[c].parse::<u32>().with_context(|| format!("{}: {:?} is not an id", at(), &record[c]));
        let value: f32 =
            record[score].parse().with_context(|| format!("{}: {:?} is not a score", at(), &record[score]))?;
        let key = (id(uid)?, id(iid)?);
        let Some(&row) = rows.get(&key) else {
            bail!("{}: user {} and item {} are not a row of this split", at(), key.0, key.1)
        };
        chosen.push(row);
        scores.push(value);
    }
    if scores.is_empty() {
        bail!("{} holds no scores", path.display());
    }
    if scores.len() < samples.len() {
        eprintln!("{} of {} rows have a score; the others are left out", scores.len(), samples.len());
    }
    Ok((samples.select(&chosen), scores))
}
