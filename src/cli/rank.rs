//! `collm-engine rank`: the best items for users, each user's prompt prefix computed once for all candidates.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, bail};

use super::train::cache_dir;
use crate::device::Device;
use crate::progress::Progress;
use crate::train::Error;
use crate::train::config::Config;
use crate::train::pipeline::{Part, Pipeline};
use crate::train::ranking::rank;
use crate::train::scoring::{IdReader, ScoreWriter, Scorer};

/// Arguments of `collm-engine rank`.
#[derive(clap::Args)]
pub struct Args {
    /// Run directory.
    #[arg(long, value_name = "DIR")]
    run: PathBuf,
    /// Users to rank for (prepared ids), comma-separated.
    #[arg(long, value_name = "ID", value_delimiter = ',', conflicts_with_all = ["users", "pairs"])]
    user: Vec<u32>,
    /// Users to rank for: CSV or Parquet with the column uid.
    #[arg(long, value_name = "FILE", conflicts_with = "pairs")]
    users: Option<PathBuf>,
    /// Candidates for every user: CSV or Parquet with the column iid (default: every item that has a title).
    #[arg(long, value_name = "FILE", conflicts_with = "pairs")]
    candidates: Option<PathBuf>,
    /// Each user's own candidates: CSV or Parquet with the columns uid and iid.
    #[arg(long, value_name = "FILE")]
    pairs: Option<PathBuf>,
    /// Items a user gets.
    #[arg(long, short = 'k', value_name = "K", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    top: u32,
    /// Rank items too that the user is known to like.
    #[arg(long)]
    keep_liked: bool,
    /// Ranking: CSV, or Parquet if the name ends in .parquet; `-` for CSV on standard output.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

/// The ids of a file's column.
fn column(path: &Path, name: &'static str) -> Result<Vec<u32>, Error> {
    let chunks = IdReader::open(path, [name])?.collect::<Result<Vec<_>, _>>()?;
    Ok(chunks.into_iter().flatten().map(|[id]| id).collect())
}

/// Runs the subcommand.
pub fn run(args: Args, device: Device) -> Result<ExitCode> {
    let config = Config::resolve(None, Some(&args.run.join("config.toml")), &[])?;
    let progress = Progress::auto();
    let pipeline = Pipeline::open(config, device, &cache_dir(), progress.clone())?;
    let trained = pipeline.trained(&args.run, Part::Stage2)?;
    let mut scorer = Scorer::new(&pipeline, &trained, Part::Stage2);
    let mut wanted: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    if let Some(path) = &args.pairs {
        for chunk in IdReader::open(path, ["uid", "iid"])? {
            chunk?.into_iter().for_each(|[uid, iid]| wanted.entry(uid).or_default().push(iid));
        }
    } else {
        let users = match &args.users {
            Some(path) => column(path, "uid")?,
            None => args.user.clone(),
        };
        let titles = &pipeline.data().titles;
        let items = match &args.candidates {
            Some(path) => column(path, "iid")?,
            None => (0..titles.len() as u32).filter(|&i| !titles[i as usize].is_empty()).collect(),
        };
        wanted.extend(users.into_iter().map(|u| (u, items.clone())));
    }
    if wanted.is_empty() {
        bail!("no users: pass --user ID,…, --users FILE or --pairs FILE");
    }
    let mut writer = ScoreWriter::create(&args.out, &["uid", "rank", "iid"])?;
    let task = progress.task("rank", wanted.len() as u64);
    let (mut n, total) = (0, wanted.len());
    for (i, (user, candidates)) in wanted.into_iter().enumerate() {
        n += candidates.len();
        let best = rank(&mut scorer, user, &candidates, args.top as usize, args.keep_liked)?;
        let ranked = best.into_iter().zip(1..);
        writer.write(ranked.map(|((item, score), place)| ([user, place, item], score)))?;
        task.report(i as u64 + 1, &format!("{n} candidates"));
    }
    writer.finish()?;
    task.finish(&format!("{total} users, {n} candidates"));
    Ok(ExitCode::SUCCESS)
}
