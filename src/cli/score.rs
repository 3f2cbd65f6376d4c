//! `collm-engine score`: user–item rows in, scores out, streaming.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::ValueEnum;

use super::train::cache_dir;
use crate::data::Split;
use crate::device::Device;
use crate::progress::Progress;
use crate::train::config::Config;
use crate::train::pipeline::{Part, Pipeline};
use crate::train::scoring::{IdReader, ScoreWriter, Scorer};

/// Arguments of `collm-engine score`.
#[derive(clap::Args)]
pub struct Args {
    /// Run directory.
    #[arg(long, value_name = "DIR")]
    run: PathBuf,
    /// Rows to score, CSV or Parquet (a file, or a directory of parts) with the columns uid and iid (prepared ids). A user's history is what they liked in the
    /// data up to its end, unless a row of the data is the same user and item: then it is that row's history.
    #[arg(long, value_name = "FILE")]
    rows: Option<PathBuf>,
    /// Score a split of the run's data instead.
    #[arg(long, value_name = "SPLIT", value_parser = ["valid", "valid_small", "test"], conflicts_with = "rows")]
    split: Option<String>,
    /// Which part of the run scores.
    #[arg(long, value_enum, default_value_t = Stage::Stage2)]
    stage: Stage,
    /// Scores: CSV, or Parquet if the name ends in .parquet; `-` for CSV on standard output.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Stage {
    Stage1,
    Stage2,
}

/// Runs the subcommand.
pub fn run(args: Args, device: Device) -> Result<ExitCode> {
    let config = Config::resolve(None, Some(&args.run.join("config.toml")), &[])?;
    let progress = Progress::auto();
    let pipeline = Pipeline::open(config, device, &cache_dir(), progress.clone())?;
    let part = if args.stage == Stage::Stage1 { Part::Stage1 } else { Part::Stage2 };
    let trained = pipeline.trained(&args.run, part)?;
    let mut scorer = Scorer::new(&pipeline, &trained, part).with_prefixes(&args.run)?;
    let mut writer = ScoreWriter::create(&args.out, &["uid", "iid"])?;
    match (&args.rows, &args.split) {
        (Some(path), _) => {
            let task = progress.task("score", 0);
            let mut n = 0;
            for chunk in IdReader::open(path, ["uid", "iid"])? {
                let rows = scorer.rows(&chunk?)?;
                let scores = scorer.score(&rows)?;
                writer.write((0..rows.len()).map(|i| ([rows.uid[i], rows.iid[i]], scores[i])))?;
                n += rows.len();
                task.report(n as u64, "rows");
            }
            task.finish(&format!("{n} rows"));
        }
        (None, Some(name)) => {
            let split = Split::ALL.into_iter().find(|s| s.name() == name).unwrap_or(Split::Test);
            let samples = pipeline.data().split(split);
            let task = progress.task("score", samples.len() as u64);
            for chunk in (0..samples.len()).collect::<Vec<_>>().chunks(1024) {
                let rows = samples.select(chunk);
                let scores = scorer.score(&rows)?;
                writer.write((0..rows.len()).map(|i| ([rows.uid[i], rows.iid[i]], scores[i])))?;
                task.set(chunk.last().map_or(0, |&i| i as u64 + 1));
            }
            task.finish(&format!("{} rows", samples.len()));
        }
        _ => bail!("pass --rows FILE or --split SPLIT"),
    }
    writer.finish()?;
    Ok(ExitCode::SUCCESS)
}
