//! One stage of tuning: steps, evaluations, early stopping, checkpoints.
//!
//! Everything random is a function of (seed, pass or step), and the state between steps is the checkpoint: a stage that dies and
//! is resumed ends in the same bits as one that did not.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::Error;
use super::config::{Config, StageConfig};
use super::groups::{self, Filling};
use super::order::{Grouping, Order};
use super::run_dir::RunDir;
use super::state::TrainState;
use super::trainable::{Together, Trainable, score_with};
use super::tuner::Tuner;
use crate::checkpoint::{Checkpoint, Tensor, take_tensor};
use crate::collab::slots::Tuned;
use crate::collab::{Collaborative, SlotVectors};
use crate::data::Dataset;
use crate::device::cpu::optimizer::{Adam, Decay};
use crate::device::ops::Dropout;
use crate::eval::metrics::evaluate;
use crate::llm::batch::{GradientFrom, frozen_tokens, micro_batches};
use crate::llm::cuda::{Demand, MicroBatch, Rules};
use crate::llm::model::Model;
use crate::llm::prefix_cache::{self, Plan, PrefixCache, PrefixCacheMode};
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
    /// What fills the slots, unless it is trained.
    pub collab: Option<&'a Collaborative>,
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

    /// Where gradients begin: anything trained in the blocks, and dropout that must be drawn again, reach all tokens.
    fn gradient_from(&self) -> GradientFrom {
        if self.config.train_lora || self.drops() { GradientFrom::Start } else { GradientFrom::FirstSlot }
    }

    fn order(&self) -> Order {
        let seed = self.experiment.seed;
        let rows = limited_rows(self.train.len(), self.config.rows, seed);
        match self.config.group {
            Grouping::Off => Order::of_rows(rows, seed),
            Grouping::ShuffleGroups => Order::of_groups(rows, &self.data.train, self.train, self.gradient_from(), seed),
        }
    }

    /// Opens the cache of frozen text that the settings ask for, and says how it is used. `rows`: of train and valid that it is for;
    /// `path`: of its file.
    fn prefixes<'a>(
        &'a self,
        start: &'a Trainable,
        rows: [&[usize]; 2],
        path: &Path,
    ) -> Result<Option<(PrefixCache<'a>, Plan)>, Error> {
        let (model, config) = (self.model, self.config);
        if model.on_card() && config.prefix_cache == PrefixCacheMode::Auto {
            return Ok(None);
        }
        let all = rows.iter().zip([self.train, self.valid]).flat_map(|(rows, set)| rows.iter().map(|&r| set.get(r)));
        let needed = prefix_cache::needed(model, all.map(|p| &p.ids[..frozen_tokens(&p)]));
        let Some(plan) = Plan::new(config.prefix_cache, config.prefix_cache_bytes, needed, path) else {
            return Ok(None);
        };
        if model.on_card() {
            let what = "is for the CPU so far; set it off to train on a card".to_string();
            return Err(Error::Config { origin: format!("{}.prefix_cache", self.name), what });
        }
        Ok(Some((PrefixCache::open(model, Some(&start.lora), plan, path)?, plan)))
    }

    /// The largest micro-batch, and the largest batch of an evaluation.
    fn demand(&self, order: &Order) -> Demand<'static> {
        let longest = |set: &PromptSet| (0..set.len()).map(|i| set.tokens(i)).max().unwrap_or(0);
        let tokens = self.config.micro_batch_tokens.max(longest(self.train));
        let prompts = tokens.div_ceil(order.shortest_own(self.train));
        let score_tokens = self.experiment.eval.batch_tokens.max(longest(self.valid));
        // Prompts that share a prefix cost no more than their own tokens.
        let score_prompts = score_tokens.div_ceil(8);
        let frozen = self.gradient_from() == GradientFrom::FirstSlot;
        // Those of a mapping are counted with it.
        let vectors = if self.train.is_empty() { 0 } else { self.train.get(0).slots.len() };
        let dropout = self.drops();
        Demand { tokens, prompts, frozen, dropout, score_tokens, score_prompts, vectors, ..Demand::default() }
    }

    /// Every group of tensors in a line.
    fn groups(&self, start: &Trainable, tuned: Option<&dyn Tuned>) -> Vec<String> {
        let name = self.experiment.method.filling(self.experiment.collab.title());
        let filling = match (tuned, self.collab) {
            (Some(tuned), _) => Filling::Trained(name, tuned),
            (None, Some(collab)) => Filling::Frozen(name, collab),
            (None, None) => Filling::Nothing,
        };
        groups::table(self.name, self.config, self.model.config(), start, filling)
    }

    /// A card's share of the gradient is clipped there, and something has to be trained there.
    fn check_card(&self, start: &Trainable) -> Result<(), Error> {
        let what = if self.config.grad_clip > 0.0 {
            "grad_clip needs one norm over card and host, which train what fills the slots; set it to 0"
        } else if !self.config.train_lora && start.cie.is_none() {
            "train_lora is off, so nothing on the card would be trained; set it, or use --device cpu"
        } else {
            return Ok(());
        };
        Err(Error::Config { origin: self.name.into(), what: what.into() })
    }

    /// Trains from `start` (or from the last checkpoint in `run`), and returns the tensors of the best evaluation. `tuned`: what fills
    /// the slots, where it is trained too.
    pub fn run(
        &self,
        start: &Trainable,
        tuned: Option<Box<dyn Tuned>>,
        run: &mut RunDir,
        progress: &Progress,
    ) -> Result<Outcome, Error> {
        if tuned.is_some() && self.model.on_card() {
            self.check_card(start)?;
        }
        self.groups(start, tuned.as_deref()).iter().for_each(|line| progress.line(line));
        let dir = run.checkpoints(self.name);
        let mut trainer = Trainer::new(self, start, tuned, dir)?;
        run.rewind(self.name, trainer.resumed.then_some(trainer.state.step))?;
        let total = self.config.steps_per_epoch * self.config.max_epochs;
        if let Some(plan) = trainer.learned.plan() {
            progress.line(&format!("{}: {plan}", self.name));
        }
        if let Some((_, plan)) = &trainer.prefixes {
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
        let mut message =
            format!("{} steps, best valid AUC {:.4} at step {}", outcome.steps, outcome.best_auc, outcome.best_step);
        if let Some((cache, _)) = &trainer.prefixes {
            let (found, computed) = cache.counts();
            message += &format!("; of the prefixes asked for, {found} were kept and {computed} computed");
        }
        task.finish(&message);
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
    /// What fills the slots, where it is trained.
    tuner: Option<Tuner>,
    /// What fills the slots of train and of valid_small.
    vectors: [Option<SlotVectors<'a>>; 2],
    state: State,
    order: Order,
    /// The pass that is under way, and its batches.
    drawn: Option<(u64, Vec<Vec<usize>>)>,
    prefixes: Option<(PrefixCache<'a>, Plan)>,
    valid_rows: Vec<usize>,
    /// Goes on from a checkpoint.
    resumed: bool,
}

impl<'a> Trainer<'a> {
    pub fn new(
        stage: &'a Stage<'a>,
        start: &'a Trainable,
        tuned: Option<Box<dyn Tuned>>,
        dir: PathBuf,
    ) -> Result<Self, Error> {
        let (config, seed) = (stage.config, stage.experiment.seed);
        let order = stage.order();
        if order.len() < config.batch_rows && config.batch_tokens == 0 {
            let what = format!(
                "{} train rows for batches of {}; lower {}.batch_rows",
                order.len(),
                config.batch_rows,
                stage.name
            );
            return Err(Error::Config { origin: stage.name.into(), what });
        }
        let valid_rows = limited_rows(stage.valid.len(), stage.experiment.eval.valid_rows, seed);
        let prefixes = stage.prefixes(start, [order.rows(), &valid_rows], &dir.with_file_name("prefixes.kv"))?;
        let mut trainer = Trainer {
            start,
            learned: TrainState::new(stage.model, start, stage.rules(), &stage.demand(&order))?,
            tuner: tuned.map(|t| Tuner::new(t, config.weight_decay)),
            vectors: [&stage.data.train, &stage.data.valid_small]
                .map(|samples| stage.collab.map(|c| c.slot_vectors(samples))),
            state: State { step: 0, pass: 0, batch: 0, adam_step: 0, best_auc: -1.0, best_step: 0, finished: false },
            order,
            drawn: None,
            prefixes,
            valid_rows,
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
            optimizer.extend(self.tuner.iter().flat_map(Tuner::moments));
            state.adam_step = adam.step;
        }
        let mut model = self.learned.tensors()?.tensors();
        model.extend(self.tuner.iter().flat_map(Tuner::tensors));
        let checkpoint = Checkpoint { model, optimizer, state };
        checkpoint.save(&self.dir, name).map_err(Error::io(&self.dir))
    }

    fn restore(&mut self, saved: Checkpoint<State>) -> Result<(), Error> {
        let place = self.dir.join("last");
        let misfit = |what| Error::state(&place, what);
        let (mut tensors, mut model, mut optimizer) = (self.start.clone(), saved.model, saved.optimizer);
        if let Some(tuner) = &mut self.tuner {
            tuner.restore(&mut model, &mut optimizer, saved.state.adam_step).map_err(misfit)?;
        }
        tensors.restore(model).map_err(misfit)?;
        let mut adam = Adam::new(Decay::Decoupled, self.start.trained_lengths(self.stage.rules()));
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
        let rows = self.order.pass(pass);
        if config.batch_tokens == 0 {
            return rows.chunks_exact(config.batch_rows).map(<[usize]>::to_vec).collect();
        }
        let lengths: Vec<usize> = rows.iter().map(|&r| self.stage.train.tokens(r)).collect();
        micro_batches(&lengths, config.batch_tokens).into_iter().map(|run| rows[run].to_vec()).collect()
    }

    fn next_rows(&mut self) -> Vec<usize> {
        let pass = self.state.pass;
        let batches = match self.drawn.take().filter(|drawn| drawn.0 == pass) {
            Some((_, batches)) => batches,
            None => self.batches(pass),
        };
        let rows = batches[self.state.batch].clone();
        self.state.batch += 1;
        if self.state.batch == batches.len() {
            (self.state.pass, self.state.batch) = (pass + 1, 0);
        }
        self.drawn = Some((pass, batches));
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
        let step = self.state.step;
        if let Some(tuner) = &mut self.tuner {
            tuner.begin_step(samples, rows, step);
        }
        let sharing = self.order.sharing(rows);
        let (vectors, prompts, from) = (self.vectors[0].as_ref(), stage.train, stage.gradient_from());
        let together = Together { vectors, prompts, rows, sharing: &sharing, from };
        let mut prefixes = self.prefixes.as_mut().map(|p| &mut p.0);
        for run in together.batches(config.micro_batch_tokens, prefixes.is_some()) {
            let (batch, x) = together.pack(run.clone(), prefixes.as_deref_mut())?;
            let labels: Vec<f32> = rows[run.clone()].iter().map(|&r| samples.label[r].into()).collect();
            let weight = 1.0 / rows.len() as f32;
            let (x, d_x) = match &mut self.tuner {
                Some(tuner) => {
                    let (x, d_x) = tuner.part(run);
                    (x, Some(d_x))
                }
                None => (&x[..], None),
            };
            self.learned.micro_batch(MicroBatch { batch: &batch, x, labels: &labels, weight, dropout }, d_x)?;
        }
        if let Some(tuner) = &mut self.tuner {
            tuner.backward(samples, rows, step);
        }
        let lr = config.schedule().lr(step);
        let (loss, norm) = self.learned.finish_step(lr, self.tuner.as_mut())?;
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
        let tuned = self.tuner.as_ref().map(Tuner::frozen);
        let tuned = tuned.as_ref().map(|model| model.slot_vectors(samples));
        let vectors = tuned.as_ref().or(self.vectors[1].as_ref());
        let prefixes = self.prefixes.as_mut().map(|p| &mut p.0);
        let scores = score_with(scorer, vectors, samples, stage.valid, &self.valid_rows, tokens, prefixes, |_| ())?;
        let users: Vec<u32> = self.valid_rows.iter().map(|&i| samples.uid[i]).collect();
        let labels: Vec<u8> = self.valid_rows.iter().map(|&i| samples.label[i]).collect();
        let m = evaluate(&users, &labels, &scores)?;
        Ok((m.log_loss.unwrap_or(0.0), m.auc.unwrap_or(0.5), m.uauc.unwrap_or(0.5)))
    }
}
