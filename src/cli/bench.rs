//! `collm-engine bench`: what training and scoring cost on this machine, with the user's model and data.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Subcommand;

use super::overhead;
use super::train::cache_dir;
use crate::bench::{Reuse, Task, measure};
use crate::data::Split;
use crate::device::Device;
use crate::llm::batch::GradientFrom;
use crate::progress::Progress;
use crate::prompt::encode_rows;
use crate::train::config::Config;
use crate::train::order::{Grouping, Order};
use crate::train::pipeline::{Part, Pipeline};

/// Arguments of `collm-engine bench`.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Forward and backward of a stage.
    Train {
        /// 1: adapter on text; 2: mapping, adapter frozen.
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=2))]
        stage: u8,
        /// Take rows in groups that begin alike, groups in a seeded order, as stageN.group does: computed with their prefix shared
        /// (shuffle-groups), or each whole (off). Without this, the first rows of train, each whole.
        #[arg(long, value_enum)]
        group: Option<Grouping>,
        #[command(flatten)]
        common: Common,
    },
    /// Forward only.
    Score {
        /// Compute each row's prompt whole, even where rows begin alike.
        #[arg(long)]
        no_sharing: bool,
        #[command(flatten)]
        common: Common,
    },
    /// CoLLM beside TALLRec: time, arithmetic and memory, the official way and the engine's.
    Overhead(overhead::Args),
    /// One configuration of `overhead`, in a process of its own.
    #[command(hide = true)]
    OverheadWorker(overhead::WorkerArgs),
}

#[derive(clap::Args)]
struct Common {
    /// Hugging Face model directory.
    #[arg(long, value_name = "DIR")]
    llm: PathBuf,
    /// Prepared data directory; the first rows of train (train) or of test (score) are used.
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Rows to run.
    #[arg(long, default_value_t = 128)]
    rows: usize,
    /// Rows of a batch.
    #[arg(long, default_value_t = 16)]
    batch: usize,
    /// Tokens computed at once.
    #[arg(long, default_value_t = 1024)]
    micro_batch_tokens: usize,
    /// Stage 2 and scoring: merge the frozen adapter into the weights.
    #[arg(long)]
    merge_lora: bool,
    /// Stage 2 and scoring: with the keys and values of the text before the first slot in memory.
    #[arg(long)]
    warm_prefixes: bool,
    /// Write the measurement here as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Runs the subcommand.
pub fn run(args: Args, device: Device) -> Result<ExitCode> {
    let (task, part, split, common, group, sharing) = match args.what {
        What::Train { stage, group, common } => {
            let (task, part) = if stage == 1 { (Task::Stage1, Part::Stage1) } else { (Task::Stage2, Part::Stage2) };
            (task, part, Split::Train, common, group, group == Some(Grouping::ShuffleGroups))
        }
        What::Score { no_sharing, common } => (Task::Score, Part::Stage2, Split::Test, common, None, !no_sharing),
        What::Overhead(args) => return overhead::run(args, device),
        What::OverheadWorker(args) => return overhead::run_worker(&args, device),
    };
    let reuse = Reuse { sharing, merged: common.merge_lora, prefixes: common.warm_prefixes };
    let mut config = Config::default();
    config.data.dir = common.data.display().to_string();
    config.llm.dir = common.llm.display().to_string();
    let pipeline = Pipeline::open(config, device, &cache_dir(), Progress::silent())?;
    let samples = pipeline.data().split(split);
    let mut rows: Vec<usize> = (0..samples.len()).collect();
    if group.is_some() {
        let from = if task == Task::Stage1 { GradientFrom::Start } else { GradientFrom::FirstSlot };
        let prompts = pipeline.prompts(part, split)?;
        rows = Order::of_groups(rows, samples, &prompts, from, pipeline.config().seed).pass(0);
    }
    rows.truncate(common.rows.max(1));
    let samples = samples.select(&rows);
    let prompts = encode_rows(&pipeline.data().titles, &samples, &pipeline.builder(part))?;
    let sizes = (pipeline.data().n_users, pipeline.data().n_items);
    let m = measure(
        pipeline.model(),
        task,
        &samples,
        &prompts,
        common.batch.max(1),
        common.micro_batch_tokens,
        sizes,
        reuse,
    )?;
    println!(
        "{:?}: {:.2} samples/s, {:.0} tokens/s, {:.0} GFLOP/s in linear layers = {:.0} % of this machine's product ceiling ({:.0}), peak memory {:.2} GiB ({} rows, batch {}, {} threads)",
        task,
        m.samples_per_s,
        m.tokens_per_s,
        m.gflops,
        100.0 * m.gflops / m.gemm_ceiling_gflops,
        m.gemm_ceiling_gflops,
        m.peak_rss_bytes as f64 / f64::from(1 << 30),
        samples.len(),
        common.batch,
        rayon::current_num_threads(),
    );
    if let Some(path) = common.json {
        crate::files::write_atomic(&path, |w| serde_json::to_writer_pretty(w, &m).map_err(std::io::Error::from))?;
    }
    Ok(ExitCode::SUCCESS)
}
