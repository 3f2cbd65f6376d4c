//! One stage of tuning: steps, evaluations, early stopping, checkpoints.
//!
//! Everything random is a function of (seed, pass or step), and the state between steps is the checkpoint: a stage that dies and
//! is resumed ends in the same bits as one that did not.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::Error;
use super::config::{Config, StageConfig};
use super::run_dir::RunDir;
use super::state::TrainState;
use super::trainable::{Trainable, packed, score_with};
use crate::checkpoint::{Checkpoint, Tensor, take_tensor};
use crate::collab::mf::Mf;
use crate::data::Dataset;
use crate::device::cpu::optimizer::{Adam, Decay};
use crate::device::ops::Dropout;
use crate::eval::metrics::evaluate;
use crate::llm::batch::{GradientFrom, micro_batches};
use crate::llm::cuda::{Demand, MicroBatch, Rules};
use crate::llm::model::Model;
use crate::progress::Progress;
use crate::prompt::PromptSet;
use crate::rng::Rng;

/// Set by Ctrl-C: the step in progress is finished and saved, then the stage returns [`Error::Interrupted`].
pub static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// A seeded choice of `limit` rows out of `n` (0: all), in a seeded order.
pub fn limited_rows(n: usize, limit: usize, seed: u64) -> Vec<usize> {
    let mut rows: Vec<usize> = (0..n).collect();
    Rng::new(seed, 0x5e1ec7).shuffle(&mut rows);
    if limit > 0 {
        rows.truncate(limit);
    }
    rows
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct State {
    step: u64,
    pass: u64,
    batch: usize,
    adam_step: u64,
    best_auc: f64,
    best_step: u64,
    finished: bool,
}

/// A stage ready to run.
pub struct Stage<'a> {
    /// `stage1` or `stage2`.
    pub name: &'a str,
    /// Its settings.
    pub config: &'a StageConfig,
    /// The experiment's settings.
    pub experiment: &'a Config,
    /// The frozen model.
    pub model: &'a Model,
    /// The data.
    pub data: &'a Dataset,
    /// What fills the slots.
    pub mf: Option<&'a Mf>,
    /// Prompts of train.
    pub train: &'a PromptSet,
    /// Prompts of valid_small.
    pub valid: &'a PromptSet,
}

/// How a stage went.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Tensors of the best evaluation.
    pub best: Trainable,
    /// Its AUC on valid_small.
    pub best_auc: f64,
    /// The step it was at.
    pub best_step: u64,
    /// Optimizer steps taken.
    pub steps: u64,
}

impl Stage<'_> {
    /// What is trained, and how.
    pub fn rules(&self) -> Rules {
        let c = self.config;
        let max_norm = if c.grad_clip > 0.0 { c.grad_clip } else { f64::INFINITY };
        Rules { lora: c.train_lora, cie: c.train_cie, weight_decay: c.weight_decay, max_norm, loss: c.loss }
    }

    /// The adapter's inputs are dropped.
    fn drops(&self) -> bool {
        self.experiment.lora.dropout > 0.0 && (self.config.train_lora || self.config.frozen_lora_dropout)
    }

    /// The largest micro-batch.
    fn demand(&self) -> Demand<'static> {
        let lengths = || (0..self.train.len()).map(|i| self.train.tokens(i));
        let shortest = lengths().min().unwrap_or(1).max(1);
        let tokens = self.config.micro_batch_tokens.max(lengths().max().unwrap_or(0));
        let prompts = tokens.div_ceil(shortest);
        Demand { lora: None, tokens, prompts, train: true, dropout: self.drops(), state: 0 }
    }

    /// Trains from `start` (or from the last checkpoint in `run`), and returns the tensors of the best evaluation.
    pub fn run(&self, start: &Trainable, run: &mut RunDir, progress: &Progress) -> Result<Outcome, Error> {
        let dir = run.checkpoints(self.name);
        let mut trainer = Trainer::new(self, start, dir)?;
        run.rewind(self.name, trainer.resumed.then_some(trainer.state.step))?;
        let total = self.config.steps_per_epoch * self.config.max_epochs;
        if let Some(plan) = trainer.learned.plan() {
            progress.line(&format!("{}: {plan}", self.name));
        }
        let task = progress.task(self.name, total);
        if !trainer.resumed {
            // Before any training: where the curve begins. Not a candidate for the best: on few rows, chance would pick it.
            let (loss, auc, uauc) = trainer.evaluate()?;
            run.log(self.name, "valid", 0, &[("auc", auc), ("uauc", uauc), ("log_loss", loss)])?;
        }
        let mut message = String::new();
        while !trainer.state.finished {
            let began = Instant::now();
            let report = trainer.step()?;
            let state = &trainer.state;
            let values = [
                ("loss", report.loss),
                ("lr", report.lr),
                ("grad_norm", report.norm),
                ("rows_per_s", report.rows as f64 / began.elapsed().as_secs_f64()),
            ];
            run.log(self.name, "train", state.step, &values)?;
            let epoch_ends = state.step % self.config.steps_per_epoch == 0;
            if epoch_ends {
                let (loss, auc, uauc) = trainer.evaluate()?;
                run.log(self.name, "valid", trainer.state.step, &[("auc", auc), ("uauc", uauc), ("log_loss", loss)])?;
                let state = &mut trainer.state;
                if auc > state.best_auc {
                    (state.best_auc, state.best_step) = (auc, state.step);
                    trainer.save("best", false)?;
                }
                let state = &mut trainer.state;
                let waited = (state.step - state.best_step) / self.config.steps_per_epoch;
                state.finished = state.step >= total || (self.config.patience > 0 && waited >= self.config.patience);
                message = format!("valid AUC {auc:.4} (best {:.4})", state.best_auc);
            }
            let state = &trainer.state;
            task.report(state.step, &format!("loss {:.4} {message}", report.loss));
            let interrupted = INTERRUPTED.load(Ordering::Relaxed);
            if epoch_ends || interrupted || state.step % self.experiment.checkpoint.every_steps == 0 {
                trainer.save("last", true)?;
            }
            if interrupted {
                return Err(Error::Interrupted);
            }
        }
        let outcome = trainer.outcome()?;
        task.finish(&format!(
            "{} steps, best valid AUC {:.4} at step {}",
            outcome.steps, outcome.best_auc, outcome.best_step
        ));
        Ok(outcome)
    }
}

/// How a step went.
pub(crate) struct StepReport {
    loss: f64,
    lr: f64,
    norm: f64,
    rows: usize,
}

/// A stage in progress.
pub(crate) struct Trainer<'a> {
    stage: &'a Stage<'a>,
    dir: PathBuf,
    start: &'a Trainable,
    learned: TrainState<'a>,
    state: State,
    rows: Vec<usize>,
    valid_rows: Vec<usize>,
    /// Goes on from a checkpoint.
    resumed: bool,
}

impl<'a> Trainer<'a> {
    pub fn new(stage: &'a Stage<'a>, start: &'a Trainable, dir: PathBuf) -> Result<Self, Error> {
        let (config, seed) = (stage.config, stage.experiment.seed);
        let rows = limited_rows(stage.train.len(), config.rows, seed);
        if rows.len() < config.batch_rows && config.batch_tokens == 0 {
            let what = format!(
                "{} train rows for batches of {}; lower {}.batch_rows",
                rows.len(),
                config.batch_rows,
                stage.name
            );
            return Err(Error::Config { origin: stage.name.into(), what });
        }
        let mut trainer = Trainer {
            start,
            learned: TrainState::new(stage.model, start, stage.rules(), &stage.demand())?,
            state: State { step: 0, pass: 0, batch: 0, adam_step: 0, best_auc: -1.0, best_step: 0, finished: false },
            rows,
            valid_rows: limited_rows(stage.valid.len(), stage.experiment.eval.valid_rows, seed),
            resumed: false,
            stage,
            dir,
        };
        let saved =
            Checkpoint::<State>::load(&trainer.dir, "last").map_err(|e| Error::state(&trainer.dir, e.to_string()))?;
        if let Some(saved) = saved {
            trainer.restore(saved)?;
            trainer.resumed = true;
        }
        Ok(trainer)
    }

    fn save(&self, name: &str, with_optimizer: bool) -> Result<(), Error> {
        let (mut optimizer, mut state) = (Vec::new(), self.state.clone());
        if with_optimizer {
            let adam = self.learned.adam()?;
            for (prefix, moments) in [("m", adam.m), ("v", adam.v)] {
                let moments = moments.into_iter().enumerate();
                optimizer.extend(moments.map(|(i, v)| Tensor::new(format!("{prefix}{i}"), vec![v.len()], v)));
            }
            state.adam_step = adam.step;
        }
        let checkpoint = Checkpoint { model: self.learned.tensors()?.tensors(), optimizer, state };
        checkpoint.save(&self.dir, name).map_err(Error::io(&self.dir))
    }

    fn restore(&mut self, saved: Checkpoint<State>) -> Result<(), Error> {
        let misfit = |what| Error::state(&self.dir.join("last"), what);
        let mut tensors = self.start.clone();
        tensors.restore(saved.model).map_err(misfit)?;
        let mut adam = Adam::new(Decay::Decoupled, self.start.trained_lengths(self.stage.rules()));
        let mut optimizer = saved.optimizer;
        for (prefix, moments) in [("m", &mut adam.m), ("v", &mut adam.v)] {
            for (i, m) in moments.iter_mut().enumerate() {
                *m = take_tensor(&mut optimizer, &format!("{prefix}{i}"), &[m.len()]).map_err(misfit)?;
            }
        }
        adam.step = saved.state.adam_step;
        self.learned.restore(tensors, adam)?;
        self.state = saved.state;
        Ok(())
    }

    fn outcome(&self) -> Result<Outcome, Error> {
        let place = self.dir.join("best");
        let saved = Checkpoint::<State>::load(&self.dir, "best").map_err(|e| Error::state(&place, e.to_string()))?;
        let saved = saved
            .ok_or_else(|| Error::state(&place, "the best checkpoint is missing; delete the run and train again"))?;
        let mut best = self.start.clone();
        best.restore(saved.model).map_err(|what| Error::state(&place, what))?;
        let State { best_auc, best_step, step, .. } = self.state;
        Ok(Outcome { best, best_auc, best_step, steps: step })
    }

    fn dropout(&self) -> Option<Dropout> {
        let Stage { experiment, .. } = self.stage;
        let p = experiment.lora.dropout as f32;
        self.stage.drops().then_some(Dropout { p, seed: experiment.seed, step: self.state.step })
    }

    /// Batches of a pass over train, each a list of rows, in the order drawn for the pass. The rest that fills no batch is left
    /// out, as `drop_last` does.
    fn batches(&self, pass: u64) -> Vec<Vec<usize>> {
        let config = self.stage.config;
        let mut rows = self.rows.clone();
        Rng::new(self.stage.experiment.seed, 0x0bde_0000_0000 + pass).shuffle(&mut rows);
        if config.batch_tokens == 0 {
            return rows.chunks_exact(config.batch_rows).map(<[usize]>::to_vec).collect();
        }
        let lengths: Vec<usize> = rows.iter().map(|&r| self.stage.train.tokens(r)).collect();
        micro_batches(&lengths, config.batch_tokens).into_iter().map(|run| rows[run].to_vec()).collect()
    }

    fn next_rows(&mut self) -> Vec<usize> {
        let batches = self.batches(self.state.pass);
        let rows = batches[self.state.batch].clone();
        self.state.batch += 1;
        if self.state.batch == batches.len() {
            (self.state.pass, self.state.batch) = (self.state.pass + 1, 0);
        }
        rows
    }

    fn step(&mut self) -> Result<StepReport, Error> {
        let rows: Vec<usize> = (0..self.stage.config.accumulation).flat_map(|_| self.next_rows()).collect();
        self.step_on(&rows)
    }

    /// One optimizer step over these rows of train.
    pub fn step_on(&mut self, rows: &[usize]) -> Result<StepReport, Error> {
        let stage = self.stage;
        let (config, samples) = (stage.config, &stage.data.train);
        let dropout = self.dropout();
        self.learned.begin_step(rows.len())?;
        let from = if config.train_lora || dropout.is_some() { GradientFrom::Start } else { GradientFrom::FirstSlot };
        let lengths: Vec<usize> = rows.iter().map(|&r| stage.train.tokens(r)).collect();
        for run in micro_batches(&lengths, config.micro_batch_tokens) {
            let first = run.start;
            let rows_here = &rows[run];
            let (batch, x) = packed(stage.mf, samples, stage.train, rows_here, None, from, first);
            let labels: Vec<f32> = rows_here.iter().map(|&r| samples.label[r].into()).collect();
            let weight = 1.0 / rows.len() as f32;
            self.learned.micro_batch(MicroBatch { batch: &batch, x: &x, labels: &labels, weight, dropout })?;
        }
        let step = self.state.step;
        let lr = config.schedule().lr(step);
        let (loss, norm) = self.learned.finish_step(lr)?;
        for (what, value) in [("loss", loss), ("gradient norm", norm)] {
            if !value.is_finite() {
                return Err(Error::Diverged { stage: stage.name.into(), step, what, value });
            }
        }
        self.state.step += 1;
        Ok(StepReport { loss, lr, norm, rows: rows.len() })
    }

    /// Log-loss, AUC and UAUC on the chosen rows of valid_small. An AUC that is not defined counts as 0.5.
    fn evaluate(&mut self) -> Result<(f64, f64, f64), Error> {
        let stage = self.stage;
        let samples = &stage.data.valid_small;
        let tokens = stage.experiment.eval.batch_tokens;
        let learned = &mut self.learned;
        let scorer = |batch: &_, x: &_| learned.scores(batch, x);
        let scores = score_with(scorer, stage.mf, samples, stage.valid, &self.valid_rows, tokens, |_| ())?;
        let users: Vec<u32> = self.valid_rows.iter().map(|&i| samples.uid[i]).collect();
        let labels: Vec<u8> = self.valid_rows.iter().map(|&i| samples.label[i]).collect();
        let m = evaluate(&users, &labels, &scores)?;
        Ok((m.log_loss.unwrap_or(0.0), m.auc.unwrap_or(0.5), m.uauc.unwrap_or(0.5)))
    }
}
