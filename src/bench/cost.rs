//! What a training step or a scored row costs: seconds, tokens, arithmetic, memory.

use std::hint::black_box;
use std::path::Path;
use std::time::Instant;

use serde::Serialize;

use crate::cie::Mapping;
use crate::collab::Collaborative;
use crate::collab::mf::Mf;
use crate::data::Samples;
use crate::device::cpu::gemm::{Dense, Operand, Output, gemm};
use crate::device::ops::{Dropout, Loss};
use crate::llm::batch::{GradientFrom, PackedBatch, frozen_tokens};
use crate::llm::model::{Model, TrainPass, Workspace};
use crate::llm::peft::{LoraTensors, Target};
use crate::llm::prefix_cache::{Plan, PrefixCache};
use crate::llm::sharing::Sharing;
use crate::prompt::PromptSet;
use crate::train::Error;
use crate::train::trainable::Together;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// Forward and backward of stage 1: adapter trained, with dropout.
    Stage1,
    /// Forward and backward of stage 2: mapping trained, adapter frozen.
    Stage2,
    /// Forward only, collaborative vectors spliced.
    Score,
}

/// One batch.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct BatchCost {
    /// Rows.
    pub rows: usize,
    /// Tokens, without padding (there is none).
    pub tokens: usize,
    /// Wall time.
    pub seconds: f64,
}

/// A measurement.
#[derive(Clone, Debug, Serialize)]
pub struct Measurement {
    /// Median over batches.
    pub samples_per_s: f64,
    /// Median over batches.
    pub tokens_per_s: f64,
    /// Median over batches of the arithmetic done, in 10⁹ operations a second (a multiply-add is two). Linear layers only.
    pub gflops: f64,
    /// A large matrix product on the same threads, in the same unit, measured before and after.
    pub gemm_ceiling_gflops: f64,
    /// Largest resident memory of the process (VmHWM).
    pub peak_rss_bytes: u64,
    /// Every batch.
    pub batches: Vec<BatchCost>,
}

/// Widths of the collaborative vectors and of the mapping's hidden layer: MF's official 256 and ten times that.
const DIM: usize = 256;

/// What is not computed twice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reuse {
    /// Rows of a batch that begin alike share that part.
    pub sharing: bool,
    /// The frozen adapter is merged into the weights (not in stage 1).
    pub merged: bool,
    /// Keys and values of the text before the first slot are in memory before the time starts (not in stage 1).
    pub prefixes: bool,
}

/// Runs batches of `batch_rows` rows: one to warm up, then all of `rows`. Rows are taken in their order; where scoring shares, in the
/// order that brings those that begin alike together, as scoring a split does.
#[allow(clippy::too_many_arguments)] // what is measured, and on what
pub fn measure(
    model: &Model,
    task: Task,
    samples: &Samples,
    prompts: &PromptSet,
    batch_rows: usize,
    micro_batch_tokens: usize,
    n_users_items: (usize, usize),
    reuse: Reuse,
) -> Result<Measurement, Error> {
    let config = model.config();
    let mut lora = LoraTensors::init(config, &[Target::Q, Target::V], 8, 16.0, 0.05, 1);
    lora.tensors.values_mut().for_each(|p| p.b.iter_mut().enumerate().for_each(|(i, b)| *b = 1e-3 * (i % 7) as f32));
    let mut d_lora = lora.zeros_like();
    let mf = Collaborative::Tables(Mf::init(n_users_items.0, n_users_items.1, DIM, 1));
    let slot_vectors = mf.slot_vectors(samples);
    let cie = Mapping::init(DIM, 10 * DIM, config.hidden_size, 1);
    let mut d_cie = Mapping::zeros(cie.dim, cie.mid, cie.out);
    let merged = if reuse.merged && task != Task::Stage1 { model.merged(&lora) } else { None };
    let (model, adapter) = merged.as_ref().map_or((model, Some(&lora)), |merged| (merged, None));
    let mut cache = if reuse.prefixes && task != Task::Stage1 {
        let plan = Plan { disk: false, limit: u64::MAX, needed: 0 };
        let mut cache = PrefixCache::open(model, adapter, plan, Path::new(""))?;
        for row in 0..samples.len() {
            let prompt = prompts.get(row);
            cache.fetch(&[&prompt.ids[..frozen_tokens(&prompt)]])?;
        }
        Some(cache)
    } else {
        None
    };
    let from = match task {
        Task::Stage2 => GradientFrom::FirstSlot,
        Task::Score if cache.is_some() => GradientFrom::FirstSlot,
        _ => GradientFrom::Start,
    };
    let best = |rows: &[usize]| {
        let refs: Vec<_> = rows.iter().map(|&r| prompts.get(r)).collect();
        let ids: Vec<_> = rows.iter().map(|&r| (samples.uid[r], samples.iid[r])).collect();
        if reuse.sharing { Sharing::best(&refs, &ids, from) } else { Sharing::none(rows.len()) }
    };
    let mut workspace = Workspace::default();
    let mut run = |rows: &[usize], step: u64| -> Result<f64, Error> {
        let mut work = 0.0;
        let sharing = best(rows);
        let rows: Vec<usize> = sharing.order.iter().map(|&i| rows[i]).collect();
        let together = Together { vectors: Some(&slot_vectors), prompts, rows: &rows, sharing: &sharing, from };
        for part in together.batches(micro_batch_tokens, cache.is_some()) {
            let (batch, x) = together.pack(part.clone(), cache.as_mut())?;
            let rows_here = &rows[part];
            work += linear_work(model, &batch, task);
            let pass = (task != Task::Stage1).then(|| cie.forward(&x));
            let vectors = pass.as_ref().map_or(&[][..], |p| &p.output);
            if task == Task::Score {
                black_box(model.scores(adapter, &batch, vectors, Loss::YesLogitBce, &mut workspace)?);
                continue;
            }
            let labels: Vec<f32> = rows_here.iter().map(|&r| samples.label[r].into()).collect();
            let mut d_vectors = vec![0.0; vectors.len()];
            let stage1 = task == Task::Stage1;
            model.train_pass(
                TrainPass {
                    lora: adapter,
                    dropout: stage1.then_some(Dropout { p: 0.05, seed: 1, step }),
                    batch: &batch,
                    vectors,
                    labels: &labels,
                    weight: 1.0 / rows.len() as f32,
                    loss: Loss::YesLogitBce,
                    d_lora: stage1.then_some(&mut d_lora),
                    d_vectors: (!stage1).then_some(&mut d_vectors),
                    d_inputs: None,
                },
                &mut workspace,
            )?;
            if let Some(pass) = &pass {
                cie.backward(&x, pass, &d_vectors, &mut d_cie);
            }
        }
        Ok(work)
    };
    let mut all: Vec<usize> = (0..samples.len()).collect();
    if task == Task::Score {
        all = best(&all).order;
    }
    run(&all[..batch_rows.min(all.len())], 0)?;
    let ceiling = gemm_ceiling();
    let (mut batches, mut rates) = (Vec::new(), Vec::new());
    for (step, rows) in all.chunks(batch_rows).enumerate() {
        let began = Instant::now();
        let work = run(rows, step as u64 + 1)?;
        let seconds = began.elapsed().as_secs_f64();
        let tokens = rows.iter().map(|&r| prompts.tokens(r)).sum();
        batches.push(BatchCost { rows: rows.len(), tokens, seconds });
        rates.push(work / seconds / 1e9);
    }
    let median = |f: &dyn Fn(&BatchCost) -> f64| middle(batches.iter().map(f).collect());
    Ok(Measurement {
        samples_per_s: median(&|b| b.rows as f64 / b.seconds),
        tokens_per_s: median(&|b| b.tokens as f64 / b.seconds),
        gflops: middle(rates),
        gemm_ceiling_gflops: ceiling.max(gemm_ceiling()),
        peak_rss_bytes: peak_rss_bytes(),
        batches,
    })
}

/// Operations in the frozen linear layers, as they are done: all rows forward (in the last block all rows through k and v, last
/// rows through the rest), rows with a gradient backward.
fn linear_work(model: &Model, batch: &PackedBatch, task: Task) -> f64 {
    let c = model.config();
    let kv = (2 * c.n_kv_heads * c.head_dim * c.hidden_size) as f64;
    let rest = c.block_params() as f64 - kv;
    let per =
        |rows: f64| 2.0 * ((c.n_layers - 1) as f64 * rows * (kv + rest) + rows * kv + batch.n_prompts() as f64 * rest);
    let forward = per(batch.n_rows() as f64);
    if task == Task::Score { forward } else { forward + per((batch.n_rows() - batch.first_gradient) as f64) }
}

fn middle(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let n = values.len();
    match n {
        0 => 0.0,
        _ if n % 2 == 1 => values[n / 2],
        _ => 0.5 * (values[n / 2 - 1] + values[n / 2]),
    }
}

/// GFLOP/s of a 1024 × 2048 × 2048 product on all threads: the best of seven.
pub fn gemm_ceiling() -> f64 {
    let (m, n) = (1024, 2048);
    let (a, b, mut c) = (vec![0.5; m * n], vec![0.25; n * n], vec![0.0; m * n]);
    let mut best = 0.0f64;
    for _ in 0..7 {
        let began = Instant::now();
        gemm(m, n, n, Dense::rows(&a, n), Operand::Dense(Dense::rows(&b, n)), Output::set(&mut c, n));
        black_box(&mut c);
        best = best.max(2.0 * (m * n * n) as f64 / began.elapsed().as_secs_f64() / 1e9);
    }
    best
}

/// `VmHWM` of this process; 0 where the system does not tell.
pub fn peak_rss_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    line.and_then(|l| l.trim().trim_end_matches("kB").trim().parse::<u64>().ok()).map_or(0, |kb| kb * 1024)
}
