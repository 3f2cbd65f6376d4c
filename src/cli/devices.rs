//! `collm-engine devices`: the CPU and the cards, and what each can run.

use std::process::ExitCode;

use anyhow::Result;

use crate::device::inventory::list;

/// Arguments of `collm-engine devices`: none.
#[derive(clap::Args)]
pub struct Args {}

/// Runs the subcommand.
pub fn run(_: Args) -> Result<ExitCode> {
    let (entries, why) = list();
    for e in &entries {
        let gib = |bytes: usize| bytes as f64 / f64::from(1 << 30);
        let memory = e
            .memory_bytes
            .map_or_else(String::new, |[all, free]| format!(", {:.1} GiB ({:.1} free)", gib(all), gib(free)));
        println!("{:<8} {}: {}{memory}", e.device.to_string(), e.name, e.kind);
        println!("{:<8} runs {}", "", e.runs);
    }
    if let Some(why) = why {
        println!("No NVIDIA card can be used: {why}");
    }
    Ok(ExitCode::SUCCESS)
}
