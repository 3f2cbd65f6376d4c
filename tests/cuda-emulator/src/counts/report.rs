//! The report of a program's launches: JSON for `CUEMU_REPORT`, and a table for people.

use std::fmt::Write;

use serde_json::{Value, json};

use super::card::{Card, cards};
use super::counters::Counters;
use crate::checks::Finding;
use crate::machine::Outcome;
use crate::program::{Class, Program};

/// One launch, as reported.
#[derive(Debug, Clone)]
pub struct LaunchReport {
    /// The JSON object.
    pub json: Value,
    /// The line of the table.
    pub line: String,
}

/// The heading of the table that [`LaunchReport::line`] is a line of.
pub const TABLE_HEADING: &str = "kernel                        grid x block       thread-instr   tensor flop   global MB (distinct)   coalesced  conflicts  modelled us (bound)";

/// Reports a launch.
pub fn launch(
    card: &Card,
    program: &Program,
    grid: [u32; 3],
    block: [u32; 3],
    shared: u32,
    outcome: &Outcome,
) -> LaunchReport {
    let c = &outcome.counters;
    let modelled = card.model(program, c);
    let classes = c.by_class(program.code.iter().map(|i| i.class));
    let mut instructions = serde_json::Map::new();
    for (class, executed) in Class::ALL.iter().zip(classes) {
        if *class != Class::Hidden && executed.warps > 0 {
            instructions.insert(format!("{class:?}"), json!({ "warps": executed.warps, "threads": executed.lanes }));
        }
    }
    let conflicts = c.shared_passes.saturating_sub(c.shared_passes_least);
    let json = json!({
        "kernel": program.name,
        "grid": grid,
        "block": block,
        "shared_bytes": shared,
        "instructions": instructions,
        "plain_flops": plain_flops(program, c),
        "tensor_flops": c.tensor_flops,
        "global_loads": traffic(&c.global_loads),
        "global_stores": traffic(&c.global_stores),
        "distinct_bytes": { "read": c.distinct_read, "written": c.distinct_written },
        "memory_bytes": { "read": c.memory_read, "written": c.memory_written },
        "local_bytes": c.local_bytes,
        "shared": { "bytes": c.shared_bytes, "passes": c.shared_passes, "conflict_passes": conflicts },
        "atomics": { "global": c.global_atomics, "shared": c.shared_atomics },
        "barriers": c.barriers,
        "branches": { "executed": c.branches, "divergent": c.divergent_branches },
        "modelled": {
            "card": card.name,
            "seconds": modelled.seconds(),
            "bound": modelled.bound(),
            "memory": modelled.memory,
            "tensor": modelled.tensor,
            "arithmetic": modelled.arithmetic,
            "shared": modelled.shared,
        },
        "cards": cards().iter().map(|card| (card.key.clone(), rated(card, program, c))).collect::<serde_json::Map<_, _>>(),
        "main_loop": main_loop(program, c),
        "emulation_seconds": outcome.seconds,
        "findings": outcome.findings.iter().map(finding).collect::<Vec<_>>(),
    });
    let threads: u64 = classes.iter().skip(1).map(|e| e.lanes).sum();
    let moved = (c.global_loads.sectors + c.global_stores.sectors) as f64 * 32e-6;
    let distinct = (c.distinct_read + c.distinct_written) as f64 * 1e-6;
    let asked = c.global_loads.bytes + c.global_stores.bytes;
    let coalesced = if moved > 0.0 { asked as f64 / (moved * 1e6) * 100.0 } else { 100.0 };
    let mut line = String::new();
    let shape = format!("{}x{}x{} x {}", grid[0], grid[1], grid[2], block.iter().product::<u32>());
    let _ = write!(
        line,
        "{:<29} {shape:<18} {threads:>12} {:>13} {moved:>12.3} ({distinct:>7.3}) {coalesced:>9.0}% {conflicts:>10} {:>10.2} ({})",
        program.name,
        c.tensor_flops,
        modelled.seconds() * 1e6,
        modelled.bound()
    );
    LaunchReport { json, line }
}

/// What the counters model for another card, as if it had run the same launch.
fn rated(card: &Card, program: &Program, c: &Counters) -> Value {
    let modelled = card.model(program, c);
    json!({ "seconds": modelled.seconds(), "bound": modelled.bound() })
}

/// The instructions that warps executed at least half as often as the most executed one: in a kernel with one loop that matters,
/// that loop. How many there are, how often warps executed them, and how often of these tensor-core products.
fn main_loop(program: &Program, c: &Counters) -> Value {
    let seen = || c.executed.iter().zip(&program.code).filter(|(_, i)| i.class != Class::Hidden);
    let most = seen().map(|(e, _)| e.warps).max().unwrap_or_default();
    let (mut instructions, mut warps, mut tensor) = (0u64, 0, 0);
    for (executed, instruction) in seen().filter(|(e, _)| e.warps * 2 >= most && e.warps > 0) {
        instructions += 1;
        warps += executed.warps;
        tensor += if instruction.class == Class::Tensor { executed.warps } else { 0 };
    }
    json!({ "instructions": instructions, "warps": warps, "tensor_warps": tensor })
}

fn plain_flops(program: &Program, c: &Counters) -> u64 {
    let classes = c.by_class(program.code.iter().map(|i| i.class));
    Class::ALL.iter().zip(classes).map(|(class, executed)| class.flops() * executed.lanes).sum()
}

fn traffic(t: &super::counters::Traffic) -> Value {
    json!({ "requests": t.requests, "bytes": t.bytes, "sectors": t.sectors, "efficiency": t.efficiency() })
}

fn finding(f: &Finding) -> Value {
    json!({
        "kind": format!("{:?}", f.kind),
        "block": f.block,
        "thread": f.thread,
        "ptx_line": f.ptx_line,
        "source": f.source.as_ref().map(|(file, line)| format!("{file}:{line}")),
        "address": f.address.map(|a| format!("{a:#x}")),
        "allocation": f.allocation,
        "message": f.to_string(),
    })
}
