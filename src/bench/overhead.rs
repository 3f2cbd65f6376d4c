//! `bench overhead`: what CoLLM costs beyond TALLRec, the official way and the engine's, in turns.
//!
//! This file owns the order of the measurements: a process for each configuration ([`super::worker`]), all of one phase alive
//! together, and rounds in which each computes the same rows. What follows from the measurements is in [`super::report`].

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use super::Error;
use super::methods::{Collaborative, MODELS, TALLREC};
use super::report::{Assumptions, Configuration, Layers, Report};
use super::worker::{Batch, Job, Mode, Phase};
use crate::data::{Dataset, Split};
use crate::device::Device;
use crate::llm::ModelConfig;
use crate::llm::random::write_random;
use crate::progress::Progress;

/// What is measured, and how often.
#[derive(Clone, Debug)]
pub struct Options {
    /// This program.
    pub program: PathBuf,
    /// Where the language model computes.
    pub device: Device,
    /// Model directory; with `model_only`, only its tokenizer is used.
    pub llm: Option<PathBuf>,
    /// Directory of the tokenizer, if not the model's.
    pub tokenizer: Option<PathBuf>,
    /// A `config.json`: random weights of its shape.
    pub model_only: Option<PathBuf>,
    /// With `model_only`: blocks of the smaller of two measured models, at least two: the first and the last are unlike others.
    pub layers: usize,
    /// Prepared data directory.
    pub data: PathBuf,
    /// Keys of the collaborative models.
    pub models: Vec<String>,
    /// Measured batches of each configuration.
    pub rounds: usize,
    /// Rows of a training batch.
    pub train_batch: usize,
    /// Rows of an evaluation batch.
    pub eval_batch: usize,
    /// Most titles of a prompt's history.
    pub max_history: usize,
    /// Rows that stage 1 trains on in a whole run.
    pub rows_stage1: usize,
    /// Rows that stage 2 trains on.
    pub rows_stage2: usize,
}

/// Epochs of a collaborative model's own training that are measured.
const COLLABORATIVE_EPOCHS: usize = 5;

/// A model directory to measure, and its blocks.
struct Measured {
    dir: PathBuf,
    layers: usize,
}

/// Measures everything. `progress` says what is at work.
pub fn run(options: &Options, progress: &Progress) -> Result<Report, Error> {
    let collaborative = options.models.iter().map(|key| {
        let known = || MODELS.map(|m| m.key).join(", ");
        let found = MODELS.iter().find(|m| m.key == key);
        found.ok_or_else(|| Error::Options(format!("{key:?} is not a collaborative model; known: {}", known())))
    });
    let collaborative: Vec<&Collaborative> = collaborative.collect::<Result<_, _>>()?;
    let temporary = tempfile::tempdir().map_err(Error::io(&std::env::temp_dir()))?;
    let (name, models, full) = models(options, temporary.path(), progress)?;
    let methods: Vec<&str> = std::iter::once(TALLREC).chain(collaborative.iter().map(|c| c.title)).collect();

    let mut configurations = Vec::new();
    for model in &models {
        for phase in [Phase::Training, Phase::Inference] {
            configurations.extend(measure(options, model, phase, &methods, progress)?);
        }
    }
    let data = Dataset::load(&options.data)?;
    let cuda = options.device.open().map_err(crate::llm::Error::from)?;
    let mut epoch_seconds = Vec::new();
    for c in &collaborative {
        progress.line(&format!("{}: epochs of the collaborative model's own training", c.title));
        epoch_seconds.push(c.epoch_seconds(&data, cuda.as_ref(), COLLABORATIVE_EPOCHS)?);
    }
    let rates = collaborative.iter().zip(epoch_seconds);
    Ok(Report::new(
        name,
        options.device,
        &options.data,
        configurations,
        (models.len() == 2).then_some(Layers { few: options.layers, full }),
        Assumptions {
            rows_stage1: options.rows_stage1,
            rows_stage2: options.rows_stage2,
            valid_rows: data.split(Split::ValidSmall).len(),
            collaborative_seconds: rates.map(|(c, s)| (c.title.to_owned(), s, c.epochs)).collect(),
        },
    ))
}

/// What the model is called, the directories to measure (two where blocks are extrapolated), and the blocks of the whole model.
fn models(options: &Options, temporary: &Path, progress: &Progress) -> Result<(String, Vec<Measured>, usize), Error> {
    let Some(path) = &options.model_only else {
        let llm = options.llm.clone();
        let llm =
            llm.ok_or_else(|| Error::Options("pass --llm DIR, or --model-only FILE with --tokenizer DIR".into()))?;
        let layers = ModelConfig::from_dir(&llm)?.n_layers;
        return Ok((llm.display().to_string(), vec![Measured { dir: llm, layers }], layers));
    };
    let tokenizer = options.tokenizer.as_ref().or(options.llm.as_ref());
    let tokenizer =
        tokenizer.ok_or_else(|| Error::Options("--model-only needs --tokenizer DIR or --llm DIR".into()))?;
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    let full = ModelConfig::from_json(&text, path)?.n_layers;
    let counts = if full <= 2 * options.layers { vec![full] } else { vec![options.layers, 2 * options.layers] };
    let mut made = Vec::new();
    for layers in counts {
        progress.line(&format!("random weights of {}, {layers} of {full} blocks", path.display()));
        let dir = temporary.join(format!("{layers}-blocks"));
        std::fs::create_dir_all(&dir).map_err(Error::io(&dir))?;
        let mut config: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
        config["num_hidden_layers"] = layers.into();
        let file = dir.join("config.json");
        std::fs::write(&file, config.to_string()).map_err(Error::io(&file))?;
        let from = tokenizer.join("tokenizer.json");
        std::fs::copy(&from, dir.join("tokenizer.json")).map_err(Error::io(&from))?;
        write_random(&ModelConfig::from_dir(&dir)?, 1, &dir.join("model.safetensors"))?;
        made.push(Measured { dir, layers });
    }
    Ok((format!("random weights of {}", path.display()), made, full))
}

/// All configurations of a phase on a model, in turns.
fn measure(
    options: &Options,
    model: &Measured,
    phase: Phase,
    methods: &[&str],
    progress: &Progress,
) -> Result<Vec<Configuration>, Error> {
    let batch = if phase == Phase::Training { options.train_batch } else { options.eval_batch };
    let mut workers = Vec::new();
    for &method in methods {
        for mode in [Mode::Paper, Mode::Engine] {
            let job = Job {
                llm: model.dir.clone(),
                fold_ids: options.model_only.is_some(),
                data: options.data.clone(),
                mode,
                method: method.to_owned(),
                phase,
                rounds: options.rounds,
                batch,
                max_history: options.max_history,
            };
            workers.push((Worker::start(options, &job)?, Vec::new(), job));
        }
    }
    let what = format!("{phase:?}, {} blocks", model.layers).to_lowercase();
    let task = progress.task(&what, (options.rounds * workers.len()) as u64);
    for round in 0..options.rounds {
        for (i, (worker, batches, _)) in workers.iter_mut().enumerate() {
            batches.push(worker.batch(round)?);
            task.report((round * 2 * methods.len() + i + 1) as u64, &worker.name);
        }
    }
    task.finish("");
    let measured = workers.into_iter().map(|(worker, batches, job)| {
        worker.end()?;
        let Job { mode, method, phase, .. } = job;
        Ok(Configuration { mode, method, phase, layers: model.layers, batches })
    });
    measured.collect()
}

/// A configuration's process. Killed when dropped before its end: with one that failed, the others end too.
struct Worker {
    name: String,
    child: Child,
    commands: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Worker {
    /// Starts it and waits until it is warm.
    fn start(options: &Options, job: &Job) -> Result<Self, Error> {
        let io = Error::io(&options.program);
        let text = serde_json::to_string(job).map_err(std::io::Error::from);
        let spawned = text.and_then(|job| {
            let threads = rayon::current_num_threads().to_string();
            let device = options.device.to_string();
            Command::new(&options.program)
                .args(["--threads", &threads, "--device", &device, "bench", "overhead-worker", &job])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
        });
        let mut child = spawned.map_err(io)?;
        let name = format!("{:?} {} {:?}", job.mode, job.method, job.phase).to_lowercase();
        let (commands, answers) = (child.stdin.take(), child.stdout.take());
        let Some(answers) = answers else {
            return Err(Error::Worker { name, what: "has no standard output".into() });
        };
        let mut worker = Worker { name, child, commands, answers: BufReader::new(answers) };
        worker.answer::<String>()?;
        Ok(worker)
    }

    fn batch(&mut self, round: usize) -> Result<Batch, Error> {
        if let Some(commands) = &mut self.commands {
            let told = writeln!(commands, "{round}").and_then(|()| commands.flush());
            told.map_err(|e| Error::Worker { name: self.name.clone(), what: format!("takes no commands: {e}") })?;
        }
        self.answer()
    }

    fn answer<T: serde::de::DeserializeOwned>(&mut self) -> Result<T, Error> {
        let mut line = String::new();
        let read = self.answers.read_line(&mut line);
        let failed = |what: String| Error::Worker { name: self.name.clone(), what };
        match read {
            Ok(0) => Err(failed("its process ended before it had measured; its message is above".into())),
            Ok(_) => serde_json::from_str(&line).map_err(|e| failed(format!("answered {line:?}: {e}"))),
            Err(e) => Err(failed(format!("gives no answer: {e}"))),
        }
    }

    fn end(mut self) -> Result<(), Error> {
        self.commands = None;
        let failed = |what: String| Error::Worker { name: self.name.clone(), what };
        match self.child.wait() {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(failed(format!("ended with {status}"))),
            Err(e) => Err(failed(e.to_string())),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // It has ended by itself unless something failed; then nobody is left to be told.
        _ = self.child.kill();
        _ = self.child.wait();
    }
}
