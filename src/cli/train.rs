//! `collm-engine train`: collaborative model → stage 1 → stage 2.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::Ordering;

use anyhow::Result;
use clap::ValueEnum;

use crate::device::Device;
use crate::eval::report::{MethodResult, markdown};
use crate::progress::Progress;
use crate::train::Error;
use crate::train::config::Config;
use crate::train::pipeline::{Part, Pipeline};
use crate::train::run_dir::RunDir;
use crate::train::stage::INTERRUPTED;

/// Arguments of `collm-engine train`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    experiment: Experiment,
    /// Run directory.
    #[arg(long, value_name = "DIR", default_value = "runs/default")]
    run: PathBuf,
    /// Go on with an existing run.
    #[arg(long)]
    resume: bool,
    /// Which parts to run, of those that the method has.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Stage::Collab, Stage::Stage1, Stage::Stage2])]
    only: Vec<Stage>,
    /// Do not judge the test rows at the end.
    #[arg(long)]
    no_test: bool,
}

/// Where settings come from.
#[derive(clap::Args)]
pub struct Experiment {
    /// Preset in the binary: ml-1m/collm-mf, ml-1m/tallrec, amazon-book/collm-mf (`config presets` lists them).
    #[arg(long, value_name = "NAME")]
    preset: Option<String>,
    /// Configuration file (TOML), over the preset.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// A setting, over preset and file: --set stage1.learning_rate=0.001
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Prepared data directory (data.dir).
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Hugging Face model directory (llm.dir).
    #[arg(long, value_name = "DIR")]
    llm: Option<PathBuf>,
}

impl Experiment {
    /// Where the model is, if that was given by its own option.
    pub fn model(&self) -> Option<&Path> {
        self.llm.as_deref()
    }

    /// Preset, file, settings.
    pub fn resolve(&self) -> Result<Config> {
        let mut config = Config::resolve(self.preset.as_deref(), self.config.as_deref(), &self.set)?;
        if let Some(dir) = &self.data {
            config.data.dir = dir.display().to_string();
        }
        if let Some(dir) = &self.llm {
            config.llm.dir = dir.display().to_string();
        }
        Ok(config)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Stage {
    Collab,
    Stage1,
    Stage2,
}

impl Stage {
    fn part(self) -> Part {
        match self {
            Stage::Collab => Part::Collab,
            Stage::Stage1 => Part::Stage1,
            Stage::Stage2 => Part::Stage2,
        }
    }
}

/// The first Ctrl-C asks for an orderly end, the second one ends at once.
pub fn catch_interrupts() {
    // It fails only when a handler is set already: then that one is ours.
    let _ = ctrlc::set_handler(|| {
        if INTERRUPTED.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        eprintln!("finishing this step and saving; press Ctrl-C again to stop at once");
    });
}

/// Where tokenised prompts and downloads are kept.
pub fn cache_dir() -> PathBuf {
    let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let base = var("COLLM_CACHE").or_else(|| var("XDG_CACHE_HOME").map(|d| d.join("collm-engine")));
    base.or_else(|| var("HOME").map(|d| d.join(".cache").join("collm-engine")))
        .unwrap_or_else(|| PathBuf::from(".collm-cache"))
}

/// Runs the subcommand.
pub fn run(args: Args, device: Device) -> Result<ExitCode> {
    catch_interrupts();
    let config = args.experiment.resolve()?;
    // The run directory comes second: a mistyped --data should leave nothing behind that is in the way of the next try.
    let pipeline = Pipeline::open(config, device, &cache_dir(), Progress::auto())?;
    let mut run = RunDir::open(&args.run, pipeline.config(), args.resume)?;
    match train(&pipeline, &mut run, &args.only) {
        Err(Error::Interrupted) => {
            eprintln!("interrupted; saved in {}, resume with --resume", args.run.display());
            return Ok(ExitCode::from(130));
        }
        other => other?,
    }
    let parts = pipeline.config().parts();
    let chosen = |part: &Part| args.only.iter().any(|stage| stage.part() == *part);
    if !args.no_test && parts.last().is_none_or(chosen) {
        judge(&pipeline, &args.run, false)?;
    } else if !args.no_test && parts.contains(&Part::Collab) && chosen(&Part::Collab) {
        // It takes no time.
        show(&pipeline, &args.run, &[Part::Collab], false)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn train(pipeline: &Pipeline, run: &mut RunDir, only: &[Stage]) -> Result<(), Error> {
    let chosen = |part: &Part| only.iter().any(|stage| stage.part() == *part);
    pipeline.config().parts().into_iter().filter(chosen).try_for_each(|part| pipeline.run(part, run))
}

/// Judges a finished run on the test rows: prints the table and writes `results.json`.
pub fn judge(pipeline: &Pipeline, run: &Path, ensemble: bool) -> Result<()> {
    let results = show(pipeline, run, &pipeline.config().parts(), ensemble)?;
    crate::files::write_atomic(&run.join("results.json"), |w| {
        serde_json::to_writer_pretty(w, &results).map_err(std::io::Error::from)
    })?;
    Ok(())
}

fn show(pipeline: &Pipeline, run: &Path, parts: &[Part], ensemble: bool) -> Result<Vec<MethodResult>> {
    let results: Vec<_> = pipeline.evaluate(run, parts, ensemble)?.into_iter().map(|r| r.0).collect();
    println!("{}", markdown(&results));
    Ok(results)
}
