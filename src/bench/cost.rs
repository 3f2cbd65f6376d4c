//! What a training step or a scored row costs: seconds, tokens, arithmetic, memory.

use std::hint::black_box;
use std::time::Instant;

use serde::Serialize;

use crate::cie::Mapping;
use crate::collab::Collaborative;
use crate::collab::mf::Mf;
use crate::data::Samples;
use crate::device::cpu::gemm::{Dense, Operand, Output, gemm};
use crate::device::ops::{Dropout, Loss};
use crate::llm::Error;
use crate::llm::batch::{GradientFrom, PackedBatch, micro_batches};
use crate::llm::model::{Model, TrainPass, Workspace};
use crate::llm::peft::{LoraTensors, Target};
use crate::llm::sharing::Sharing;
use crate::prompt::PromptSet;

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

/// Runs batches of `batch_rows` rows: one to warm up, then all of `rows`. `share`: when scoring, rows of a batch that begin alike
/// share that part; rows are taken in the order that brings them together, as scoring a split does.
#[allow(clippy::too_many_arguments)] // what is measured, and on what
pub fn measure(
    model: &Model,
    task: Task,
    samples: &Samples,
    prompts: &PromptSet,
    batch_rows: usize,
    micro_batch_tokens: usize,
    n_users_items: (usize, usize),
    share: bool,
) -> Result<Measurement, Error> {
    // Only scoring shares.
    let share = share && task == Task::Score;
    let config = model.config();
    let mut lora = LoraTensors::init(config, &[Target::Q, Target::V], 8, 16.0, 0.05, 1);
    lora.tensors.values_mut().for_each(|p| p.b.iter_mut().enumerate().for_each(|(i, b)| *b = 1e-3 * (i % 7) as f32));
    let mut d_lora = lora.zeros_like();
    let mf = Collaborative::Tables(Mf::init(n_users_items.0, n_users_items.1, DIM, 1));
    let slot_vectors = mf.slot_vectors(samples);
    let cie = Mapping::init(DIM, 10 * DIM, config.hidden_size, 1);
    let mut d_cie = Mapping::zeros(cie.dim, cie.mid, cie.out);
    let mut workspace = Workspace::default();
    let mut run = |rows: &[usize], step: u64| -> Result<f64, Error> {
        let lengths: Vec<usize> = rows.iter().map(|&r| prompts.tokens(r)).collect();
        let mut work = 0.0;
        for micro in micro_batches(&lengths, micro_batch_tokens) {
            let first = micro.start;
            let rows_here = &rows[micro];
            let refs: Vec<_> = rows_here.iter().map(|&r| prompts.get(r)).collect();
            let sharing = if share {
                let ids: Vec<_> = rows_here.iter().map(|&r| (samples.uid[r], samples.iid[r])).collect();
                Sharing::best(&refs, &ids, GradientFrom::Start)
            } else {
                Sharing::none(refs.len())
            };
            let refs: Vec<_> = sharing.order.iter().map(|&i| refs[i]).collect();
            let rows_here: Vec<_> = sharing.order.iter().map(|&i| rows_here[i]).collect();
            let from = if task == Task::Stage2 { GradientFrom::FirstSlot } else { GradientFrom::Start };
            let batch = PackedBatch::grouped(&refs, &sharing.groups, 1, from, first);
            work += linear_work(model, &batch, task);
            let x = slot_vectors.take(&rows_here);
            let pass = (task != Task::Stage1).then(|| cie.forward(&x));
            let vectors = pass.as_ref().map_or(&[][..], |p| &p.output);
            if task == Task::Score {
                black_box(model.scores(Some(&lora), &batch, vectors, Loss::YesLogitBce, &mut workspace)?);
                continue;
            }
            let labels: Vec<f32> = rows_here.iter().map(|&r| samples.label[r].into()).collect();
            let mut d_vectors = vec![0.0; vectors.len()];
            let stage1 = task == Task::Stage1;
            model.train_pass(
                TrainPass {
                    lora: Some(&lora),
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
    if share {
        let refs: Vec<_> = all.iter().map(|&r| prompts.get(r)).collect();
        let ids: Vec<_> = all.iter().map(|&r| (samples.uid[r], samples.iid[r])).collect();
        all = Sharing::best(&refs, &ids, GradientFrom::Start).order;
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
