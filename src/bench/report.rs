//! What follows from the measurements of `bench overhead`: medians and spreads, overheads, the cost of whole runs.
//! `table.rs` shows it, `plot.rs` draws it.

use std::path::Path;

use serde::Serialize;

use super::methods::{Collaborative, TALLREC};
use super::worker::{Batch, Mode, Phase, shares};
use crate::device::Device;

/// Overheads of CoLLM over TALLRec that the paper reports for training and inference (Table VI, means of two data sets).
pub const PAPER: [f64; 2] = [0.155, 0.125];
/// Rows between two official evaluations: 50 steps of 16 rows on two cards (reference, section 5.1).
pub const EPOCH_ROWS: usize = 1600;

/// All batches of one configuration on one model.
#[derive(Clone, Debug, Serialize)]
pub struct Configuration {
    /// Whose way.
    pub mode: Mode,
    /// TALLRec, or CoLLM with a collaborative model.
    pub method: String,
    /// What was done.
    pub phase: Phase,
    /// Blocks of the measured model.
    pub layers: usize,
    /// In the order of the rounds.
    pub batches: Vec<Batch>,
}

/// Models of `few` and of twice as many blocks were measured, one of `full` is reported.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Layers {
    /// Blocks of the smaller measured model.
    pub few: usize,
    /// Blocks of the whole model.
    pub full: usize,
}

/// What the cost of a whole run is made from beside the measured batches.
#[derive(Clone, Debug, Serialize)]
pub struct Assumptions {
    /// Rows that stage 1 trains on.
    pub rows_stage1: usize,
    /// Rows that stage 2 trains on.
    pub rows_stage2: usize,
    /// Rows of each evaluation.
    pub valid_rows: usize,
    /// Method, seconds of an epoch of its collaborative model's training, epochs.
    pub collaborative_seconds: Vec<(String, f64, usize)>,
}

/// Median and quartiles.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// Median.
    pub median: f64,
    /// First quartile.
    pub q1: f64,
    /// Third quartile.
    pub q3: f64,
}

impl Spread {
    /// Of at least one value; quartiles between two values are interpolated.
    pub fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |q: f64| {
            let place = q * values.len().saturating_sub(1) as f64;
            let (low, high) = (values[place.floor() as usize], values[place.ceil() as usize]);
            low + (high - low) * place.fract()
        };
        Spread { median: at(0.5), q1: at(0.25), q3: at(0.75) }
    }
}

/// Time and arithmetic of a group of operations, a row.
#[derive(Clone, Debug, Serialize)]
pub struct Operation {
    /// Which.
    pub name: &'static str,
    /// Mean seconds.
    pub seconds_per_row: f64,
    /// Mean of 10⁹ operations.
    pub gflop_per_row: f64,
}

/// A configuration's figures, for the whole model.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// Whose way.
    pub mode: Mode,
    /// Method.
    pub method: String,
    /// Phase.
    pub phase: Phase,
    /// Wall time of a row.
    pub seconds_per_row: Spread,
    /// Tokens of a prompt, without padding.
    pub prompt_tokens_per_row: f64,
    /// Tokens that entered the model; `None` on a card, as all counts.
    pub computed_tokens_per_row: Option<f64>,
    /// Arithmetic of a row, 10⁹ operations (a multiply-add is two).
    pub gflop_per_row: Option<f64>,
    /// The same a second.
    pub gflop_per_second: Option<f64>,
    /// Largest resident memory of the process.
    pub peak_bytes: f64,
    /// Where the time goes.
    pub operations: Vec<Operation>,
}

/// What a method costs beyond TALLRec: 0.1 is a tenth more.
#[derive(Clone, Debug, Serialize)]
pub struct Overhead {
    /// Whose way.
    pub mode: Mode,
    /// Method.
    pub method: String,
    /// Phase.
    pub phase: Phase,
    /// Of the rounds' times.
    pub time: Spread,
    /// Of the prompts' tokens.
    pub prompt_tokens: f64,
    /// Of the tokens that entered the model.
    pub computed_tokens: Option<f64>,
    /// Of arithmetic.
    pub arithmetic: Option<f64>,
    /// What the paper reports for CoLLM-MF.
    pub paper: f64,
}

/// Seconds of a whole run, from measured times of rows and epochs.
#[derive(Clone, Debug, Serialize)]
pub struct WholeRun {
    /// Whose way.
    pub mode: Mode,
    /// Method.
    pub method: String,
    /// Training the collaborative model.
    pub collaborative: f64,
    /// Stage 1's steps.
    pub stage1: f64,
    /// Evaluations in stage 1.
    pub stage1_evaluation: f64,
    /// Stage 2's steps.
    pub stage2: f64,
    /// Evaluations in stage 2.
    pub stage2_evaluation: f64,
    /// All.
    pub total: f64,
    /// Beyond TALLRec's total.
    pub overhead: f64,
}

/// Everything that `bench overhead` tells.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Version of this program.
    pub version: &'static str,
    /// The model.
    pub llm: String,
    /// The data.
    pub data: String,
    /// Where the language model computes.
    pub device: String,
    /// Instructions of the CPU's matrix kernels.
    pub instructions: &'static str,
    /// Threads.
    pub threads: usize,
    /// Set where blocks are extrapolated.
    pub layers: Option<Layers>,
    /// What whole runs assume.
    pub assumptions: Assumptions,
    /// One for each configuration.
    pub summaries: Vec<Summary>,
    /// One for each configuration but TALLRec's.
    pub overheads: Vec<Overhead>,
    /// One for each mode and method.
    pub whole_runs: Vec<WholeRun>,
    /// What the figures leave out.
    pub notes: Vec<String>,
    /// As measured.
    pub configurations: Vec<Configuration>,
}

impl Report {
    /// Draws the conclusions. `configurations` hold TALLRec in every mode and phase, and every configuration has as many rounds.
    pub fn new(
        llm: String,
        device: Device,
        data: &Path,
        configurations: Vec<Configuration>,
        layers: Option<Layers>,
        assumptions: Assumptions,
    ) -> Self {
        let whole = whole_models(&configurations, layers);
        let summaries: Vec<Summary> = whole.iter().map(summary).collect();
        let overheads = whole.iter().filter(|c| c.method != TALLREC).map(|c| overhead(c, &whole)).collect();
        let whole_runs = whole_runs(&summaries, &assumptions);
        Report {
            version: env!("CARGO_PKG_VERSION"),
            llm,
            data: data.display().to_string(),
            device: device.to_string(),
            instructions: crate::device::cpu::instruction_set(),
            threads: rayon::current_num_threads(),
            layers,
            summaries,
            overheads,
            whole_runs,
            notes: notes(device, layers, &assumptions),
            assumptions,
            configurations,
        }
    }
}

/// The configurations on the whole model: as measured, or on the line through two numbers of blocks.
fn whole_models(measured: &[Configuration], layers: Option<Layers>) -> Vec<Configuration> {
    let Some(Layers { few, full }) = layers else { return measured.to_vec() };
    let same = |a: &&Configuration, b: &Configuration| {
        a.layers == 2 * few && (a.mode, a.phase, &a.method) == (b.mode, b.phase, &b.method)
    };
    let at_few = measured.iter().filter(|c| c.layers == few);
    at_few
        .map(|c| {
            let more = measured.iter().find(|other| same(other, c)).map_or(&[][..], |c| &c.batches);
            let batches = c.batches.iter().zip(more).map(|(a, b)| a.extrapolated(b, few, full)).collect();
            Configuration { layers: full, batches, ..c.clone() }
        })
        .collect()
}

/// A mean a row over all batches.
fn per_row(batches: &[Batch], of: impl Fn(&Batch) -> f64) -> f64 {
    batches.iter().map(of).sum::<f64>() / batches.iter().map(|b| b.rows as f64).sum::<f64>()
}

/// The same of something that is not counted everywhere.
fn counted_per_row(batches: &[Batch], of: impl Fn(&Batch) -> Option<f64>) -> Option<f64> {
    batches.iter().all(|b| of(b).is_some()).then(|| per_row(batches, |b| of(b).unwrap_or_default()))
}

fn summary(c: &Configuration) -> Summary {
    let b = &c.batches;
    let gflop = |b: &Batch| b.flop().map(|f| f / 1e9);
    let operations =
        b.first().map(shares).unwrap_or_default().into_iter().enumerate().map(|(i, (name, _))| Operation {
            name,
            seconds_per_row: per_row(b, |b| shares(b)[i].1.seconds),
            gflop_per_row: per_row(b, |b| shares(b)[i].1.flop / 1e9),
        });
    let rates: Option<Vec<f64>> = b.iter().map(|b| Some(gflop(b)? / b.seconds)).collect();
    Summary {
        mode: c.mode,
        method: c.method.clone(),
        phase: c.phase,
        seconds_per_row: Spread::of(b.iter().map(|b| b.seconds / b.rows as f64).collect()),
        prompt_tokens_per_row: per_row(b, |b| b.prompt_tokens as f64),
        computed_tokens_per_row: counted_per_row(b, |b| b.computed_tokens),
        gflop_per_row: counted_per_row(b, gflop),
        gflop_per_second: rates.map(|r| Spread::of(r).median),
        peak_bytes: b.iter().fold(0.0, |m, b| m.max(b.peak_bytes)),
        operations: operations.collect(),
    }
}

fn overhead(c: &Configuration, all: &[Configuration]) -> Overhead {
    let base = all.iter().find(|b| b.method == TALLREC && (b.mode, b.phase) == (c.mode, c.phase));
    let base = base.map_or(&[][..], |b| &b.batches);
    let (mine, theirs) = (summary(c), summary(&Configuration { batches: base.to_vec(), ..c.clone() }));
    let beyond = |a: f64, b: f64| a / b - 1.0;
    let both = |a: Option<f64>, b: Option<f64>| a.zip(b).map(|(a, b)| beyond(a, b));
    Overhead {
        mode: c.mode,
        method: c.method.clone(),
        phase: c.phase,
        // A round's batches run one after the other: what slows the machine slows both.
        time: Spread::of(c.batches.iter().zip(base).map(|(a, b)| beyond(a.seconds, b.seconds)).collect()),
        prompt_tokens: beyond(mine.prompt_tokens_per_row, theirs.prompt_tokens_per_row),
        computed_tokens: both(mine.computed_tokens_per_row, theirs.computed_tokens_per_row),
        arithmetic: both(mine.gflop_per_row, theirs.gflop_per_row),
        paper: PAPER[c.phase as usize],
    }
}

fn whole_runs(summaries: &[Summary], assumptions: &Assumptions) -> Vec<WholeRun> {
    let row = |mode: Mode, method: &str, phase: Phase| {
        let found = summaries.iter().find(|s| s.method == method && (s.mode, s.phase) == (mode, phase));
        found.map_or(0.0, |s| s.seconds_per_row.median)
    };
    let stage = |mode: Mode, method: &str, rows: usize| {
        let evaluated = rows.div_ceil(EPOCH_ROWS) * assumptions.valid_rows;
        (rows as f64 * row(mode, method, Phase::Training), evaluated as f64 * row(mode, method, Phase::Inference))
    };
    let of = |s: &Summary| {
        let (stage1, stage1_evaluation) = stage(s.mode, TALLREC, assumptions.rows_stage1);
        let mine = Collaborative::of(&s.method).is_some();
        let (stage2, stage2_evaluation) =
            if mine { stage(s.mode, &s.method, assumptions.rows_stage2) } else { (0.0, 0.0) };
        let own = assumptions.collaborative_seconds.iter().find(|c| c.0 == s.method);
        let collaborative = own.map_or(0.0, |(_, seconds, epochs)| seconds * *epochs as f64);
        let base = stage1 + stage1_evaluation;
        let total = collaborative + base + stage2 + stage2_evaluation;
        WholeRun {
            mode: s.mode,
            method: s.method.clone(),
            collaborative,
            stage1,
            stage1_evaluation,
            stage2,
            stage2_evaluation,
            total,
            overhead: total / base - 1.0,
        }
    };
    summaries.iter().filter(|s| s.phase == Phase::Training).map(of).collect()
}

fn notes(device: Device, layers: Option<Layers>, a: &Assumptions) -> Vec<String> {
    let mut notes = vec![format!(
        "whole runs are extrapolated from the measured times: {} rows in stage 1, {} in stage 2, {} rows of valid_small scored every {EPOCH_ROWS} rows; the official numbers of rows are not published",
        a.rows_stage1, a.rows_stage2, a.valid_rows
    )];
    if let Some(Layers { few, full }) = layers {
        notes.push(format!(
            "times, arithmetic and memory of {full} blocks lie on the line through {few} and {}, which were measured",
            2 * few
        ));
    }
    if device == Device::Cpu {
        notes.push("paper mode leaves out what would make it slower: whole squares of attention scores, the discarded language-modelling loss".into());
    } else {
        notes.push("on a card nothing is counted, and paper mode trims the last block and computes one logit, as engine mode does; peak memory is the host's".into());
    }
    notes
}
