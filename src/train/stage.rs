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
use crate::checkpoint::{Checkpoint, Tensor, take_tensor};
use crate::cie::Mapping;
use crate::collab::mf::Mf;
use crate::data::{Dataset, Samples};
use crate::device::cpu::optimizer::{Adam, Decay, clip_global_norm};
use crate::device::ops::{Dropout, Loss};
use crate::eval::metrics::evaluate;
use crate::llm::batch::{GradientFrom, PackedBatch, micro_batches};
use crate::llm::cuda::Demand;
use crate::llm::model::{Model, TrainPass, Workspace};
use crate::llm::peft::LoraTensors;
use crate::llm::sharing::{Group, Sharing};
use crate::progress::Progress;
use crate::prompt::PromptSet;
use crate::rng::Rng;

/// Set by Ctrl-C: the step in progress is finished and saved, then the stage returns [`Error::Interrupted`].
pub static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// What is trained, and what fills the slots.
#[derive(Clone, Debug, PartialEq)]
pub struct Trainable {
    /// The adapter.
    pub lora: LoraTensors,
    /// The mapping; `None` while no template has slots.
    pub cie: Option<Mapping>,
}

impl Trainable {
    /// All tensors under the names of files: PEFT's keys and `llama_proj.*`.
    pub fn tensors(&self) -> Vec<Tensor> {
        let lora = self.lora.named().into_iter().zip(self.lora.shapes());
        let lora = lora.map(|((name, values), shape)| Tensor::new(name, shape, values.to_vec()));
        let cie = self.cie.iter().flat_map(|m| {
            let parts = Mapping::NAMES.iter().zip(m.shapes()).zip(&m.tensors);
            parts.map(|((name, shape), values)| Tensor::new(*name, shape, values.clone()))
        });
        lora.chain(cie).collect()
    }

    /// Takes the values of a list that [`Self::tensors`] made.
    pub fn restore(&mut self, mut tensors: Vec<Tensor>) -> Result<(), String> {
        for current in self.tensors() {
            let values = take_tensor(&mut tensors, &current.name, &current.shape)?;
            self.slot(&current.name).copy_from_slice(&values);
        }
        Ok(())
    }

    fn slot(&mut self, name: &str) -> &mut [f32] {
        let names: Vec<String> = self.lora.named().into_iter().map(|n| n.0).collect();
        if let Some(i) = names.iter().position(|n| n == name) {
            return self.lora.slices_mut().swap_remove(i);
        }
        let i = Mapping::NAMES.iter().position(|n| *n == name);
        match (i, &mut self.cie) {
            (Some(i), Some(m)) => &mut m.tensors[i],
            _ => unreachable!("{name} is a name of tensors()"),
        }
    }

    fn zeros_like(&self) -> Self {
        let cie = self.cie.as_ref().map(|m| Mapping::zeros(m.dim, m.mid, m.out));
        Trainable { lora: self.lora.zeros_like(), cie }
    }
}

/// The vectors of rows, `[rows, 2, dim]`: user, then item.
pub fn collaborative_vectors(mf: &Mf, samples: &Samples, rows: &[usize]) -> Vec<f32> {
    let pair = |&i: &usize| [mf.user_vector(samples.uid[i]), mf.item_vector(samples.iid[i])];
    rows.iter().flat_map(pair).flatten().copied().collect()
}

/// Scores of the given rows: prompts of at most `batch_tokens` tokens at once. `done` is called with the number of rows scored.
#[allow(clippy::too_many_arguments)] // everything a score depends on
pub fn score_rows(
    model: &Model,
    trained: Option<&Trainable>,
    mf: Option<&Mf>,
    samples: &Samples,
    prompts: &PromptSet,
    rows: &[usize],
    loss: Loss,
    batch_tokens: usize,
    workspace: &mut Workspace,
    mut done: impl FnMut(usize),
) -> Result<Vec<f32>, Error> {
    let refs: Vec<_> = rows.iter().map(|&r| prompts.get(r)).collect();
    let ids: Vec<_> = rows.iter().map(|&r| (samples.uid[r], samples.iid[r])).collect();
    // Rows of one user mostly begin alike: that part is computed once.
    let sharing = Sharing::best(&refs, &ids, GradientFrom::Start);
    let (mut scores, mut n_done) = (vec![0.0; rows.len()], 0);
    for groups in sharing.batches(|i| refs[i].ids.len(), batch_tokens) {
        let (first, end) = (groups[0].members.start, groups[groups.len() - 1].members.end);
        let places = &sharing.order[first..end];
        let here: Vec<usize> = places.iter().map(|&i| rows[i]).collect();
        let groups: Vec<Group> = groups
            .iter()
            .map(|g| Group { members: g.members.start - first..g.members.end - first, prefix: g.prefix })
            .collect();
        let (batch, vectors) = packed(trained, mf, samples, prompts, &here, Some(&groups), GradientFrom::Start, 0);
        let vectors = vectors.map(|(_, pass)| pass.output).unwrap_or_default();
        let found = model.scores(trained.map(|t| &t.lora), &batch, &vectors, loss, workspace)?;
        places.iter().zip(found).for_each(|(&i, score)| scores[i] = score);
        n_done += places.len();
        done(n_done);
    }
    Ok(scores)
}

type Mapped = Option<(Vec<f32>, crate::cie::MappingPass)>;

#[allow(clippy::too_many_arguments)] // everything a batch is made of
fn packed(
    trained: Option<&Trainable>,
    mf: Option<&Mf>,
    samples: &Samples,
    prompts: &PromptSet,
    rows: &[usize],
    groups: Option<&[Group]>,
    from: GradientFrom,
    first: usize,
) -> (PackedBatch, Mapped) {
    let refs: Vec<_> = rows.iter().map(|&r| prompts.get(r)).collect();
    let has_slots = refs.iter().any(|p| !p.slots.is_empty());
    let cie = trained.and_then(|t| t.cie.as_ref()).zip(mf).filter(|_| has_slots);
    let mapped = cie.map(|(cie, mf)| {
        let x = collaborative_vectors(mf, samples, rows);
        let pass = cie.forward(&x);
        (x, pass)
    });
    let tokens_per_vector = refs.iter().flat_map(|p| p.slots).map(|s| s.part as usize + 1).max().unwrap_or(1);
    let batch = match groups {
        Some(groups) => PackedBatch::grouped(&refs, groups, tokens_per_vector, from, first),
        None => PackedBatch::new(&refs, tokens_per_vector, from, first),
    };
    (batch, mapped)
}

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
    /// Trains from `start` (or from the last checkpoint in `run`), and returns the tensors of the best evaluation.
    pub fn run(&self, start: &Trainable, run: &mut RunDir, progress: &Progress) -> Result<Outcome, Error> {
        let dir = run.checkpoints(self.name);
        let mut trainer = Trainer::new(self, start, dir)?;
        run.rewind(self.name, trainer.resumed.then_some(trainer.state.step))?;
        let total = self.config.steps_per_epoch * self.config.max_epochs;
        if let Some(plan) = trainer.plan_memory()? {
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

struct StepReport {
    loss: f64,
    lr: f64,
    norm: f64,
    rows: usize,
}

struct Trainer<'a> {
    stage: &'a Stage<'a>,
    dir: PathBuf,
    current: Trainable,
    gradient: Trainable,
    adam: Adam,
    state: State,
    rows: Vec<usize>,
    valid_rows: Vec<usize>,
    workspace: Workspace,
    /// Goes on from a checkpoint.
    resumed: bool,
}

impl<'a> Trainer<'a> {
    fn new(stage: &'a Stage<'a>, start: &Trainable, dir: PathBuf) -> Result<Self, Error> {
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
            current: start.clone(),
            gradient: start.zeros_like(),
            adam: Adam::new(Decay::Decoupled, []),
            state: State { step: 0, pass: 0, batch: 0, adam_step: 0, best_auc: -1.0, best_step: 0, finished: false },
            rows,
            valid_rows: limited_rows(stage.valid.len(), stage.experiment.eval.valid_rows, seed),
            workspace: Workspace::default(),
            resumed: false,
            stage,
            dir,
        };
        let lengths: Vec<usize> = trainer.trained().iter().map(|t| t.1.len()).collect();
        trainer.adam = Adam::new(Decay::Decoupled, lengths);
        let saved =
            Checkpoint::<State>::load(&trainer.dir, "last").map_err(|e| Error::state(&trainer.dir, e.to_string()))?;
        if let Some(saved) = saved {
            trainer.restore(saved).map_err(|what| Error::state(&trainer.dir.join("last"), what))?;
            trainer.resumed = true;
        }
        Ok(trainer)
    }

    /// (name, values) of the tensors that this stage trains.
    fn trained(&self) -> Vec<(String, Vec<f32>)> {
        let config = self.stage.config;
        let wanted = |t: &Tensor| if t.name.starts_with("llama_proj") { config.train_cie } else { config.train_lora };
        self.current.tensors().into_iter().filter(wanted).map(|t| (t.name, t.values)).collect()
    }

    fn save(&self, name: &str, with_optimizer: bool) -> Result<(), Error> {
        let mut optimizer = Vec::new();
        if with_optimizer {
            for (prefix, moments) in [("m", &self.adam.m), ("v", &self.adam.v)] {
                optimizer.extend(
                    moments
                        .iter()
                        .enumerate()
                        .map(|(i, v)| Tensor::new(format!("{prefix}{i}"), vec![v.len()], v.clone())),
                );
            }
        }
        let state = State { adam_step: self.adam.step, ..self.state.clone() };
        let checkpoint = Checkpoint { model: self.current.tensors(), optimizer, state };
        checkpoint.save(&self.dir, name).map_err(Error::io(&self.dir))
    }

    fn restore(&mut self, saved: Checkpoint<State>) -> Result<(), String> {
        self.current.restore(saved.model)?;
        let mut optimizer = saved.optimizer;
        for (prefix, moments) in [("m", &mut self.adam.m), ("v", &mut self.adam.v)] {
            for (i, m) in moments.iter_mut().enumerate() {
                *m = take_tensor(&mut optimizer, &format!("{prefix}{i}"), &[m.len()])?;
            }
        }
        self.adam.step = saved.state.adam_step;
        self.state = saved.state;
        Ok(())
    }

    fn outcome(&self) -> Result<Outcome, Error> {
        let place = self.dir.join("best");
        let saved = Checkpoint::<State>::load(&self.dir, "best").map_err(|e| Error::state(&place, e.to_string()))?;
        let saved = saved
            .ok_or_else(|| Error::state(&place, "the best checkpoint is missing; delete the run and train again"))?;
        let mut best = self.current.clone();
        best.restore(saved.model).map_err(|what| Error::state(&place, what))?;
        let State { best_auc, best_step, step, .. } = self.state;
        Ok(Outcome { best, best_auc, best_step, steps: step })
    }

    /// How the largest micro-batch will use the card's memory.
    fn plan_memory(&mut self) -> Result<Option<String>, Error> {
        let (stage, config) = (self.stage, self.stage.config);
        let longest = (0..stage.train.len()).map(|i| stage.train.tokens(i)).max().unwrap_or(0);
        let shortest = (0..stage.train.len()).map(|i| stage.train.tokens(i)).min().unwrap_or(1).max(1);
        let tokens = config.micro_batch_tokens.max(longest);
        let demand = Demand {
            lora: Some(&self.current.lora),
            tokens,
            prompts: tokens.div_ceil(shortest),
            train: true,
            dropout: self.dropout().is_some(),
        };
        Ok(stage.model.plan(&demand, &mut self.workspace)?)
    }

    fn dropout(&self) -> Option<Dropout> {
        let (experiment, config) = (self.stage.experiment, self.stage.config);
        let p = experiment.lora.dropout as f32;
        let active = p > 0.0 && (config.train_lora || config.frozen_lora_dropout);
        active.then_some(Dropout { p, seed: experiment.seed, step: self.state.step })
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
        let stage = self.stage;
        let (config, samples) = (stage.config, &stage.data.train);
        let rows: Vec<usize> = (0..config.accumulation).flat_map(|_| self.next_rows()).collect();
        let dropout = self.dropout();
        self.gradient.lora.fill_zero();
        if let Some(cie) = &mut self.gradient.cie {
            cie.tensors.iter_mut().for_each(|t| t.fill(0.0));
        }
        let from = if config.train_lora || dropout.is_some() { GradientFrom::Start } else { GradientFrom::FirstSlot };
        let lengths: Vec<usize> = rows.iter().map(|&r| stage.train.tokens(r)).collect();
        let mut loss = 0.0;
        for run in micro_batches(&lengths, config.micro_batch_tokens) {
            let first = run.start;
            let rows_here = &rows[run];
            let (batch, mapped) =
                packed(Some(&self.current), stage.mf, samples, stage.train, rows_here, None, from, first);
            let labels: Vec<f32> = rows_here.iter().map(|&r| samples.label[r].into()).collect();
            let vectors = mapped.as_ref().map_or(&[][..], |m| &m.1.output);
            let mut d_vectors = vec![0.0; if config.train_cie { vectors.len() } else { 0 }];
            let pass = TrainPass {
                lora: Some(&self.current.lora),
                dropout,
                batch: &batch,
                vectors,
                labels: &labels,
                weight: 1.0 / rows.len() as f32,
                loss: config.loss,
                d_lora: config.train_lora.then_some(&mut self.gradient.lora),
                d_vectors: (!d_vectors.is_empty()).then_some(&mut d_vectors),
                d_inputs: None,
            };
            loss += stage.model.train_pass(pass, &mut self.workspace)?.1;
            if let (Some((x, pass)), Some(cie), Some(gradient)) = (&mapped, &self.current.cie, &mut self.gradient.cie)
                && config.train_cie
            {
                cie.backward(x, pass, &d_vectors, gradient);
            }
        }
        loss /= rows.len() as f64;
        let step = self.state.step;
        let diverged = |what, value| Error::Diverged { stage: stage.name.into(), step, what, value };
        if !loss.is_finite() {
            return Err(diverged("loss", loss));
        }
        let lr = config.schedule().lr(step);
        let norm = self.update(lr);
        if !norm.is_finite() {
            return Err(diverged("gradient norm", norm));
        }
        self.state.step += 1;
        Ok(StepReport { loss, lr, norm, rows: rows.len() })
    }

    /// Clips and applies the gradients. Returns their norm; where it is not finite the weights stay as they are, so that they
    /// are never saved with a NaN.
    fn update(&mut self, lr: f64) -> f64 {
        let config = self.stage.config;
        let mut weights: Vec<(&mut [f32], f64)> = Vec::new();
        let mut gradients: Vec<&mut [f32]> = Vec::new();
        if config.train_lora {
            weights.extend(self.current.lora.slices_mut().into_iter().map(|w| (w, config.weight_decay)));
            gradients.extend(self.gradient.lora.slices_mut());
        }
        if let (Some(cie), Some(gradient)) = (&mut self.current.cie, &mut self.gradient.cie)
            && config.train_cie
        {
            // Decay on matrices, not on biases, as officially.
            let decays = [config.weight_decay, 0.0, config.weight_decay, 0.0];
            weights.extend(cie.tensors.iter_mut().map(Vec::as_mut_slice).zip(decays));
            gradients.extend(gradient.tensors.iter_mut().map(Vec::as_mut_slice));
        }
        let max = if config.grad_clip > 0.0 { config.grad_clip } else { f64::INFINITY };
        let norm = clip_global_norm(&mut gradients, max);
        if !norm.is_finite() {
            return norm;
        }
        let tensors = weights.into_iter().zip(gradients).map(|((w, decay), g)| (w, &*g, decay)).collect();
        self.adam.step(tensors, lr);
        norm
    }

    /// Log-loss, AUC and UAUC on the chosen rows of valid_small. An AUC that is not defined counts as 0.5.
    fn evaluate(&mut self) -> Result<(f64, f64, f64), Error> {
        let stage = self.stage;
        let samples = &stage.data.valid_small;
        let tokens = stage.experiment.eval.batch_tokens;
        let scores = score_rows(
            stage.model,
            Some(&self.current),
            stage.mf,
            samples,
            stage.valid,
            &self.valid_rows,
            stage.config.loss,
            tokens,
            &mut self.workspace,
            |_| (),
        )?;
        let users: Vec<u32> = self.valid_rows.iter().map(|&i| samples.uid[i]).collect();
        let labels: Vec<u8> = self.valid_rows.iter().map(|&i| samples.label[i]).collect();
        let m = evaluate(&users, &labels, &scores)?;
        Ok((m.log_loss.unwrap_or(0.0), m.auc.unwrap_or(0.5), m.uauc.unwrap_or(0.5)))
    }
}
