//! One configuration of `bench overhead`, in a process of its own: mode, method and phase. It sets up, warms up, says so, and then
//! runs a batch whenever it is told to. So its peak memory is its own, and runs of several configurations can take turns.

use std::borrow::Cow;
use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::Error;
use super::cost::peak_rss_bytes;
use super::methods::{Collaborative, SEED};
use super::paper::padded;
use crate::cie::Mapping;
use crate::collab;
use crate::collab::lightgcn::Propagation;
use crate::collab::mf::Mf;
use crate::data::{Dataset, Samples, Split};
use crate::device::Device;
use crate::device::ops::Dropout;
use crate::device::profile::{self, Cost, Group};
use crate::llm::batch::PackedBatch;
use crate::llm::cuda::{Demand, MicroBatch, Rules};
use crate::llm::model::Model;
use crate::llm::peft::LoraTensors;
use crate::llm::weights::ModelWeights;
use crate::prompt::{LlmTokenizer, PromptBuilder, PromptSet, PromptStyle, Template, encode_rows};
use crate::train::config::Config;
use crate::train::stage::{Stage, Trainer, limited_rows};
use crate::train::state::TrainState;
use crate::train::trainable::{Trainable, score_with};

/// Whose way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// The official code's, on our kernels.
    Paper,
    /// The engine's.
    Engine,
}

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// A step of stage 1 (TALLRec) or stage 2 (CoLLM).
    Training,
    /// Scores.
    Inference,
}

/// What a worker measures.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Job {
    /// Model directory.
    pub llm: PathBuf,
    /// The tokenizer is another model's: take its ids modulo the vocabulary.
    pub fold_ids: bool,
    /// Prepared data.
    pub data: PathBuf,
    /// Whose way.
    pub mode: Mode,
    /// TALLRec or a title of `methods::MODELS`.
    pub method: String,
    /// What is done.
    pub phase: Phase,
    /// Batches to come.
    pub rounds: usize,
    /// Rows of a batch.
    pub batch: usize,
    /// Most titles of a prompt's history.
    pub max_history: usize,
}

/// A measured batch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Batch {
    /// Rows.
    pub rows: usize,
    /// Tokens of their prompts, without padding and each prompt whole.
    pub prompt_tokens: usize,
    /// Tokens that entered the model: with padding, or with shared prefixes once; `None` on a card, where nothing is counted.
    pub computed_tokens: Option<f64>,
    /// Wall time.
    pub seconds: f64,
    /// Of each of [`Group::ALL`]; empty on a card.
    pub groups: Vec<Cost>,
    /// Largest resident memory of the process so far.
    pub peak_bytes: f64,
}

/// Rows that warm up: the first use of weights, threads and kernels, not of the largest buffers (the median drops those).
const WARM_UP: usize = 4;

/// The rows of each round. Training takes rows in an order drawn from the seed, as a pass does; evaluation runs of neighbours, as
/// the official sampler does. Where the split has too few, rows come again.
fn rows_of_rounds(n: usize, job: &Job) -> Vec<Vec<usize>> {
    let batch = job.batch.min(n);
    let shuffled = limited_rows(n, 0, SEED);
    let round = |r: usize| -> Vec<usize> {
        match job.phase {
            Phase::Training => (0..batch).map(|i| shuffled[(r * batch + i) % n]).collect(),
            Phase::Inference => {
                let first = r * n / job.rounds;
                (0..batch).map(|i| (first + i) % n).collect()
            }
        }
    };
    (0..job.rounds).map(round).collect()
}

/// What a configuration works with.
struct Setting {
    config: Config,
    model: Model,
    start: Trainable,
    /// What fills the slots, made once; the engine's way.
    vectors: Option<collab::Collaborative>,
    /// What it is made from for every batch; the official way.
    graph: Option<(Propagation, Mf)>,
    /// The rows of all rounds.
    data: Dataset,
    prompts: PromptSet,
    answer_ids: [u32; 2],
    /// Rows of `data` for each round.
    rounds: Vec<Vec<usize>>,
}

impl Setting {
    fn open(job: &Job, device: Device) -> Result<Self, Error> {
        let collaborative = Collaborative::of(&job.method);
        let data = Dataset::load(&job.data)?;
        let weights = ModelWeights::load(&job.llm)?;
        let mut tokenizer = LlmTokenizer::from_dir(&job.llm)?;
        if job.fold_ids {
            tokenizer = tokenizer.folded(weights.config.vocab_size as u32);
        }
        let (yes, no) = tokenizer.answer_ids()?;
        let mut config = Config::default();
        config.prompt.style.max_history = job.max_history;
        let positions = weights.config.longest_prompt().min(config.prompt.style.max_tokens);
        // The answer token comes on top.
        let style = PromptStyle { max_tokens: positions - 1, ..config.prompt.style.clone() };
        let template = if collaborative.is_some() { &config.prompt.stage2 } else { &config.prompt.stage1 };
        let template = Template::find(template)?;
        let model = Model::on(device, weights, yes, no, positions)?;

        let split = if job.phase == Phase::Training { Split::Train } else { Split::Test };
        let n = data.split(split).len();
        if n == 0 {
            return Err(Error::Options(format!("{}: {} has no rows to measure", job.data.display(), split.name())));
        }
        let rounds = rows_of_rounds(n, job);
        (config.stage1.batch_rows, config.stage2.batch_rows) = (rounds[0].len(), rounds[0].len());
        let samples = data.split(split).select(&rounds.concat());
        let prompts = encode_rows(&data.titles, &samples, &PromptBuilder::new(&tokenizer, &template, &style))?;
        let mut next = 0..;
        let rounds = rounds.iter().map(|rows| next.by_ref().take(rows.len()).collect()).collect();

        let l = &config.lora;
        let mut lora = LoraTensors::init(model.config(), &config.targets(), l.rank, l.alpha, l.dropout, SEED);
        // As after training: B is not zero.
        lora.tensors
            .values_mut()
            .for_each(|p| p.b.iter_mut().enumerate().for_each(|(i, b)| *b = 1e-3 * (i % 7) as f32));
        let tables = collaborative.map(|c| (c.tables)(&data));
        let out = model.config().hidden_size * config.prompt.style.tokens_per_vector;
        let cie = tables.as_ref().map(|t| Mapping::init(t.dim, config.cie.mid_times * t.dim, out, SEED));
        let graph = collaborative.and_then(|c| (c.graph)(&data)).zip(tables.clone());
        let vectors = graph.as_ref().map(|(graph, tables)| graph.apply(tables)).or(tables);
        let vectors = vectors.map(collab::Collaborative::Tables);
        let none = Samples::empty;
        let data = Dataset { train: samples, valid: none(), valid_small: none(), test: none(), ..data };
        let start = Trainable { lora, cie };
        Ok(Setting { config, model, start, vectors, graph, data, prompts, answer_ids: [no, yes], rounds })
    }

    fn stage(&self, method: &str) -> Stage<'_> {
        let (name, config) = match Collaborative::of(method) {
            Some(_) => ("stage2", &self.config.stage2),
            None => ("stage1", &self.config.stage1),
        };
        Stage {
            name,
            config,
            experiment: &self.config,
            model: &self.model,
            data: &self.data,
            collab: self.vectors.as_ref(),
            train: &self.prompts,
            valid: &self.prompts,
        }
    }

    /// The state that a stage trains, for batches of padded prompts.
    fn state(&self, rules: Rules) -> Result<TrainState<'_>, Error> {
        let longest = (0..self.prompts.len()).map(|i| self.prompts.tokens(i)).max().unwrap_or(0) + 1;
        let prompts = self.rounds.iter().map(Vec::len).max().unwrap_or(0);
        let tokens = prompts * longest;
        let score_tokens = tokens.max(self.config.eval.batch_tokens);
        let score_prompts = score_tokens.div_ceil(8);
        let demand = Demand { tokens, prompts, dropout: true, score_tokens, score_prompts, ..Demand::default() };
        Ok(TrainState::new(&self.model, &self.start, rules, &demand)?)
    }

    /// A batch the official way: propagated, gathered, padded.
    fn official(&self, rows: &[usize]) -> (PackedBatch, Vec<f32>, Vec<f32>) {
        let samples = &self.data.train;
        let tables = match &self.graph {
            Some((graph, tables)) => Some(Cow::Owned(collab::Collaborative::Tables(graph.apply(tables)))),
            None => self.vectors.as_ref().map(Cow::Borrowed),
        };
        let x = tables.map(|tables| tables.slot_vectors(samples).take(rows)).unwrap_or_default();
        let refs: Vec<_> = rows.iter().map(|&r| self.prompts.get(r)).collect();
        let labels: Vec<u8> = rows.iter().map(|&r| samples.label[r]).collect();
        let answers: Vec<u32> = labels.iter().map(|&l| self.answer_ids[usize::from(l == 1)]).collect();
        // Any token will do as padding.
        let batch = padded(&refs, &answers, answers[0], self.config.prompt.style.tokens_per_vector);
        (batch, x, labels.into_iter().map(f32::from).collect())
    }
}

/// Measures a batch whenever a line of `commands` names its round, and answers with a line of JSON ([`Batch`]). The first answer is
/// `ready`.
pub fn serve(job: &Job, device: Device, commands: impl BufRead, answers: impl Write) -> Result<(), Error> {
    let setting = Setting::open(job, device)?;
    let mut turns = Turns { setting: &setting, device, commands, answers };
    let stage = setting.stage(&job.method);
    let rules = stage.rules();
    match (job.mode, job.phase) {
        (Mode::Engine, Phase::Training) => {
            // Where a run's checkpoints would be: there are none, and none are written.
            let dir = tempfile::tempdir().map_err(Error::io(&std::env::temp_dir()))?;
            let mut trainer = Trainer::new(&stage, &setting.start, None, dir.path().to_path_buf())?;
            turns.take(|rows| Ok(trainer.step_on(rows).map(drop)?))
        }
        (Mode::Engine, Phase::Inference) => {
            let (mut state, tokens) = (setting.state(rules)?, setting.config.eval.batch_tokens);
            let (samples, prompts) = (&setting.data.train, &setting.prompts);
            let vectors = setting.vectors.as_ref().map(|v| v.slot_vectors(samples));
            turns.take(|rows| {
                let scorer = |batch: &_, x: &_| state.scores(batch, x);
                Ok(score_with(scorer, vectors.as_ref(), samples, prompts, rows, tokens, None, |_| ()).map(drop)?)
            })
        }
        (Mode::Paper, Phase::Training) => {
            let (mut state, mut step) = (setting.state(rules)?, 0);
            turns.take(|rows| {
                let (batch, x, labels) = setting.official(rows);
                // PARITY: stage 2 freezes the adapter and leaves its dropout on.
                let dropout = Some(Dropout { p: setting.config.lora.dropout as f32, seed: SEED, step });
                state.begin_step(rows.len())?;
                let weight = 1.0 / rows.len() as f32;
                state.micro_batch(MicroBatch { batch: &batch, x: &x, labels: &labels, weight, dropout }, None)?;
                state.finish_step(stage.config.schedule().lr(step), None)?;
                step += 1;
                Ok(())
            })
        }
        (Mode::Paper, Phase::Inference) => {
            let mut state = setting.state(rules)?;
            turns.take(|rows| {
                let (batch, x, _) = setting.official(rows);
                Ok(state.scores(&batch, &x).map(drop)?)
            })
        }
    }
}

struct Turns<'a, R, W> {
    setting: &'a Setting,
    device: Device,
    commands: R,
    answers: W,
}

impl<R: BufRead, W: Write> Turns<'_, R, W> {
    /// `run` computes the batch of some rows.
    fn take(&mut self, mut run: impl FnMut(&[usize]) -> Result<(), Error>) -> Result<(), Error> {
        let rounds = &self.setting.rounds;
        run(&rounds[0][..WARM_UP.min(rounds[0].len())])?;
        self.answer(&"ready")?;
        let mut line = String::new();
        loop {
            line.clear();
            if self.commands.read_line(&mut line).map_err(Error::io(Path::new("stdin")))? == 0 {
                return Ok(());
            }
            let Some(rows) = line.trim().parse().ok().and_then(|round: usize| rounds.get(round)) else {
                return Err(Error::Options(format!("{line:?} is not one of {} rounds", rounds.len())));
            };
            profile::start();
            let began = Instant::now();
            run(rows)?;
            let seconds = began.elapsed().as_secs_f64();
            let tally = profile::stop();
            let counted = self.device == Device::Cpu;
            self.answer(&Batch {
                rows: rows.len(),
                prompt_tokens: rows.iter().map(|&r| self.setting.prompts.tokens(r)).sum(),
                computed_tokens: counted.then_some(tally.rows as f64),
                seconds,
                groups: if counted { tally.groups.to_vec() } else { Vec::new() },
                peak_bytes: peak_rss_bytes() as f64,
            })?;
        }
    }

    fn answer(&mut self, value: &impl Serialize) -> Result<(), Error> {
        let line = serde_json::to_string(value).map_err(std::io::Error::from);
        line.and_then(|line| writeln!(self.answers, "{line}").and_then(|()| self.answers.flush()))
            .map_err(Error::io(Path::new("stdout")))
    }
}

impl Batch {
    /// Arithmetic of all groups.
    pub fn flop(&self) -> Option<f64> {
        (!self.groups.is_empty()).then(|| self.groups.iter().map(|g| g.flop).sum())
    }

    /// The batch at `full` layers, on the line through `self` at `few` and `more` at twice as many.
    pub fn extrapolated(&self, more: &Batch, few: usize, full: usize) -> Batch {
        let steps = (full as f64 - few as f64) / few as f64;
        let line = |a: f64, b: f64| a + (b - a) * steps;
        let groups = self.groups.iter().zip(&more.groups);
        Batch {
            seconds: line(self.seconds, more.seconds),
            groups: groups
                .map(|(a, b)| Cost { seconds: line(a.seconds, b.seconds), flop: line(a.flop, b.flop) })
                .collect(),
            peak_bytes: line(self.peak_bytes, more.peak_bytes),
            ..self.clone()
        }
    }
}

/// Wall time outside of all groups, and their names beside it.
pub fn shares(batch: &Batch) -> Vec<(&'static str, Cost)> {
    let mut shares: Vec<_> = Group::ALL.iter().map(|g| g.title()).zip(batch.groups.iter().copied()).collect();
    if !shares.is_empty() {
        let inside: f64 = batch.groups.iter().map(|g| g.seconds).sum();
        shares.push(("rest", Cost { seconds: batch.seconds - inside, flop: 0.0 }));
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(phase: Phase, rounds: usize, batch: usize) -> Job {
        Job {
            llm: PathBuf::new(),
            fold_ids: false,
            data: PathBuf::new(),
            mode: Mode::Paper,
            method: "TALLRec".into(),
            phase,
            rounds,
            batch,
            max_history: 10,
        }
    }

    #[test]
    fn rounds_take_other_rows_and_come_again_where_there_are_few() {
        let mut rows = rows_of_rounds(40, &job(Phase::Training, 2, 16)).concat();
        rows.sort_unstable();
        rows.dedup();
        assert_eq!(rows.len(), 32);
        assert_eq!(rows_of_rounds(40, &job(Phase::Inference, 2, 3)), [[0, 1, 2], [20, 21, 22]]);
        assert_eq!(rows_of_rounds(4, &job(Phase::Inference, 2, 64)), [[0, 1, 2, 3], [2, 3, 0, 1]]);
        assert_eq!(rows_of_rounds(5, &job(Phase::Training, 3, 4)).concat().len(), 12);
    }

    #[test]
    fn a_line_through_two_layer_counts() {
        let at = |layers: f64| Batch {
            rows: 2,
            prompt_tokens: 10,
            computed_tokens: Some(12.0),
            seconds: 1.0 + 0.5 * layers,
            groups: vec![Cost { seconds: 0.25 * layers, flop: 3.0 + 7.0 * layers }],
            peak_bytes: 100.0 + layers,
        };
        assert_eq!(at(2.0).extrapolated(&at(4.0), 2, 32), at(32.0));
        assert_eq!(shares(&at(2.0))[1], ("rest", Cost { seconds: 1.5, flop: 0.0 }));
    }
}
