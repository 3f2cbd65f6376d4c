//! `collm-engine devices`: the CPU and the cards, what each can run, and how an experiment would use a card's memory.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};

use super::train::Experiment;
use crate::device::inventory::list;
use crate::llm::ModelConfig;
use crate::train::config::Config;
use crate::train::memory::{DRIVER_BYTES, plans};

/// Arguments of `collm-engine devices`. With --llm (a model directory or its config.json), prints the memory plan of an experiment.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    experiment: Experiment,
    /// Plan for a card with this much memory (24GiB, 24GB, 800MiB), which need not be there, instead of the cards that are.
    #[arg(long, value_name = "SIZE", value_parser = size, requires = "llm")]
    memory: Option<usize>,
}

fn size(text: &str) -> Result<usize, String> {
    let units = [("GiB", 1 << 30), ("MiB", 1 << 20), ("GB", 1_000_000_000), ("MB", 1_000_000)];
    let found = units.iter().find_map(|(unit, bytes)| Some((text.strip_suffix(unit)?, *bytes as f64)));
    let value = found.and_then(|(number, bytes)| Some(number.trim().parse::<f64>().ok()? * bytes));
    value
        .filter(|v| (0.0..1e15).contains(v))
        .map(|v| v as usize)
        .ok_or_else(|| "expected a size such as 24GiB".to_owned())
}

/// Runs the subcommand.
pub fn run(args: Args) -> Result<ExitCode> {
    let gib = |bytes: usize| bytes as f64 / f64::from(1 << 30);
    let Some(path) = args.experiment.model() else {
        let (entries, why) = list();
        for e in &entries {
            let memory = e
                .memory_bytes
                .map_or_else(String::new, |[all, free]| format!(", {:.1} GiB ({:.1} free)", gib(all), gib(free)));
            println!("{:<8} {}: {}{memory}", e.device.to_string(), e.name, e.kind);
            println!("{:<8} runs {}", "", e.runs);
        }
        if let Some(why) = why {
            println!("No NVIDIA card can be used: {why}");
        }
        return Ok(ExitCode::SUCCESS);
    };
    let config = args.experiment.resolve()?;
    let model = model_config(path)?;
    if let Some(memory) = args.memory {
        let free = memory.saturating_sub(DRIVER_BYTES);
        println!("a card of {:.2} GiB, {:.2} of them kept for the driver:", gib(memory), gib(memory - free));
        return Ok(show(&config, &model, free));
    }
    let (entries, why) = list();
    let mut code = ExitCode::SUCCESS;
    for (e, [_, free]) in entries.iter().skip(1).filter_map(|e| Some((e, e.memory_bytes?))) {
        println!("{} {}, {:.2} GiB free:", e.device, e.name, gib(free));
        code = show(&config, &model, free);
    }
    match why {
        Some(why) => Err(anyhow::Error::new(why).context("no card to plan for; give --memory")),
        None => Ok(code),
    }
}

/// Prints the plans; fails if a part has none.
fn show(config: &Config, model: &ModelConfig, free: usize) -> ExitCode {
    let mut code = ExitCode::SUCCESS;
    for (part, plan) in plans(config, model, free) {
        match plan {
            Ok(plan) => println!("{part:<8} {plan}"),
            Err(refusal) => {
                println!("{part:<8} does not fit: {refusal}");
                code = ExitCode::FAILURE;
            }
        }
    }
    code
}

fn model_config(path: &Path) -> Result<ModelConfig> {
    if path.is_dir() {
        return Ok(ModelConfig::from_dir(path)?);
    }
    let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    Ok(ModelConfig::from_json(&text, path)?)
}
