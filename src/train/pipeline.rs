//! The whole experiment: collaborative model → stage 1 → stage 2, each resumable, each also alone.

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::Error;
use super::config::Config;
use super::method::{Method, Strategy};
use super::run_dir::RunDir;
use super::stage::{INTERRUPTED, Outcome, Stage, limited_rows};
use super::trainable::{Trainable, score_rows};
use crate::checkpoint::{Checkpoint, Tensor, write_tensors};
use crate::cie::Mapping;
use crate::collab::Collaborative;
use crate::collab::slots::Tuned;
use crate::data::{Dataset, Samples, Split};
use crate::device::Device;
use crate::eval::metrics::evaluate;
use crate::eval::report::MethodResult;
use crate::files::sha256;
use crate::llm::model::{Model, Workspace};
use crate::llm::peft::LoraTensors;
use crate::llm::prefix_cache::{Plan, PrefixCache, PrefixCacheMode};
use crate::llm::weights::ModelWeights;
use crate::progress::Progress;
use crate::prompt::{Example, LlmTokenizer, PromptBuilder, PromptSet, Template, tokenize_split};

/// Parts of an experiment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The collaborative model.
    Collab,
    /// Stage 1.
    Stage1,
    /// Stage 2.
    Stage2,
}

/// An open experiment: data, model, tokenizer.
pub struct Pipeline {
    config: Config,
    data: Dataset,
    device: Device,
    model: Model,
    tokenizer: LlmTokenizer,
    templates: [Template; 2],
    /// Answered examples before every prompt of stage 1's form.
    examples: Vec<u32>,
    cache: PathBuf,
    progress: Progress,
}

/// A trained run, ready to score.
pub struct Trained {
    /// Adapter and mapping.
    pub tensors: Trainable,
    /// What fills the slots, if the prompts have some.
    pub collab: Option<Collaborative>,
}

impl Pipeline {
    /// Loads what the configuration names. Tokenised prompts are kept in `cache`.
    pub fn open(config: Config, device: Device, cache: &Path, progress: Progress) -> Result<Self, Error> {
        let missing = |key: &str| Error::Config {
            origin: "configuration".into(),
            what: format!("{key} is empty; set it with --set {key}=DIR"),
        };
        if config.data.dir.is_empty() {
            return Err(missing("data.dir"));
        }
        if config.llm.dir.is_empty() {
            return Err(missing("llm.dir"));
        }
        let data = Dataset::load(Path::new(&config.data.dir))?;
        Self::with_data(config, data, device, cache, progress)
    }

    /// [`Self::open`] with data that is in memory already.
    pub fn with_data(
        config: Config,
        data: Dataset,
        device: Device,
        cache: &Path,
        progress: Progress,
    ) -> Result<Self, Error> {
        let llm = Path::new(&config.llm.dir);
        let tokenizer = LlmTokenizer::from_dir(llm)?;
        let (yes, no) = tokenizer.answer_ids()?;
        let weights = ModelWeights::load(llm)?;
        let longest = config.prompt.style.max_tokens;
        let limit = weights.config.longest_prompt().min(crate::llm::batch::MAX_PROMPT_TOKENS);
        if longest > limit {
            let what =
                format!("prompt.style.max_tokens is {longest}, but this model reads at most {limit} tokens; lower it");
            return Err(Error::Config { origin: "configuration".into(), what });
        }
        let templates = [Template::find(&config.prompt.stage1)?, Template::find(&config.prompt.stage2)?];
        let model = Model::on(device, weights, yes, no, longest)?;
        let cache = cache.to_path_buf();
        let examples = PromptBuilder::new(&tokenizer, &templates[0], &config.prompt.style)
            .encode_examples(&examples(&data, config.prompt.examples, config.seed))?;
        Ok(Pipeline { config, data, device, model, tokenizer, templates, examples, cache, progress })
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The data.
    pub fn data(&self) -> &Dataset {
        &self.data
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// A prompt builder with the template of a stage.
    pub fn builder(&self, part: Part) -> PromptBuilder<'_> {
        let template = &self.templates[usize::from(part == Part::Stage2)];
        PromptBuilder::new(&self.tokenizer, template, &self.config.prompt.style).after(&self.examples)
    }

    /// The prompts of a split.
    pub fn prompts(&self, part: Part, split: Split) -> Result<PromptSet, Error> {
        let task = self.progress.task(&format!("tokenise {}", split.name()), self.data.split(split).len() as u64);
        let prompts = tokenize_split(&self.data, split, &self.builder(part), &self.cache, &|n| task.set(n as u64))?;
        let (n, tokens) = (prompts.len(), prompts.n_tokens());
        task.finish(&format!("{n} prompts, {:.0} tokens each", tokens as f64 / n.max(1) as f64));
        Ok(prompts)
    }

    /// The run's collaborative model: trained, resumed or loaded.
    pub fn collab(&self, run: &mut RunDir) -> Result<Collaborative, Error> {
        let config = &self.config.collab;
        let path = self.collab_path(run.root());
        let mut depends = format!("{} {}", config.settings(), self.data.fingerprint);
        if !config.pretrained.is_empty() {
            depends = format!("{depends} {}", config.pretrained);
        }
        let key = sha256(depends.as_bytes());
        if !path.exists() && !config.pretrained.is_empty() {
            return self.import_collab(&path, key);
        }
        if path.exists() {
            let (_, facts) = crate::checkpoint::read_tensors(&path).map_err(Error::io(&path))?;
            if facts.get("key") == Some(&key) {
                return Ok(config.load(&path)?);
            }
            return Err(Error::state(&path, "was trained on other data or with other settings; choose another --run"));
        }
        let checkpoints = run.checkpoints("collab");
        let task = self.progress.task(config.title(), config.max_epochs() as u64);
        let mut logged = Ok(());
        let mut first = true;
        let mut observe = |epoch: usize, loss: f64, auc: f64| {
            if std::mem::take(&mut first) {
                logged = run.rewind("collab", Some(epoch as u64 - 1));
            }
            if logged.is_ok() {
                logged = run.log("collab", "valid", epoch as u64, &[("loss", loss), ("auc", auc)]);
            }
            task.report(epoch as u64, &format!("loss {loss:.4} valid AUC {auc:.4}"));
            logged.is_ok() && !INTERRUPTED.load(Ordering::Relaxed)
        };
        let cuda = self.device.open().map_err(crate::collab::Error::from)?;
        let facts = [("key", key)];
        let trained = config.fit(&self.data, cuda.as_ref(), Some(&checkpoints), (&path, &facts), &mut observe);
        logged?;
        let (model, summary) = trained.map_err(|e| match e {
            crate::collab::Error::Interrupted => Error::Interrupted,
            other => other.into(),
        })?;
        task.finish(&format!(
            "{} epochs, best valid AUC {:.4} at epoch {}",
            summary.epochs, summary.best_auc, summary.best_epoch
        ));
        Ok(model)
    }

    /// Makes a model that was trained elsewhere the run's own.
    fn import_collab(&self, path: &Path, key: String) -> Result<Collaborative, Error> {
        let (config, valid) = (&self.config.collab, &self.data.valid);
        let task = self.progress.task(config.title(), 0);
        config.import(&self.data, (path, &[("key", key), ("imported_from", config.pretrained.clone())]))?;
        let model = config.load(path)?;
        let auc = evaluate(&valid.uid, &valid.label, &model.scores(valid))?.auc;
        let auc = auc.map_or("none".into(), |auc| format!("{auc:.4}"));
        task.finish(&format!("taken from {}, valid AUC {auc}", config.pretrained));
        Ok(model)
    }

    /// Where the run's collaborative model lies.
    pub(super) fn collab_path(&self, run: &Path) -> PathBuf {
        run.join("collab").join(format!("{}.safetensors", self.config.collab.model))
    }

    /// What stage 1 starts from.
    pub fn fresh(&self) -> Trainable {
        let (c, model) = (&self.config, self.model.config());
        let lora = LoraTensors::init(model, &c.targets(), c.lora.rank, c.lora.alpha, c.lora.dropout, c.seed);
        Trainable { lora, cie: None }
    }

    /// What stage 2 starts from: the adapter of stage 1, and a fresh mapping.
    pub fn with_cie(&self, lora: LoraTensors, dim: usize) -> Trainable {
        let out = self.model.config().hidden_size * self.config.prompt.style.tokens_per_vector;
        let cie = Mapping::init(dim, dim * self.config.cie.mid_times, out, self.config.seed);
        Trainable { lora, cie: Some(cie) }
    }

    /// Runs a stage. `tuned`: what fills the slots, where it is trained too.
    pub fn stage(
        &self,
        part: Part,
        start: &Trainable,
        collab: Option<&Collaborative>,
        tuned: Option<Box<dyn Tuned>>,
        run: &mut RunDir,
    ) -> Result<Outcome, Error> {
        let (name, config) = match part {
            Part::Stage2 => ("stage2", &self.config.stage2),
            _ => ("stage1", &self.config.stage1),
        };
        let slots = self.builder(part).template().has_slots();
        if (config.train_cie || tuned.is_some()) && !slots {
            let what = format!("{name}.train_cie is set, but its template has no slots (<UserID>, <TargetItemID>)");
            return Err(Error::Config { origin: "configuration".into(), what });
        }
        let (train, valid) = (self.prompts(part, Split::Train)?, self.prompts(part, Split::ValidSmall)?);
        let stage = Stage {
            name,
            config,
            experiment: &self.config,
            model: &self.model,
            data: &self.data,
            collab: collab.filter(|_| slots),
            train: &train,
            valid: &valid,
        };
        stage.run(start, tuned, run, &self.progress)
    }

    /// The adapter that stage 1 of the run found best.
    pub fn stage1_best(&self, run: &Path) -> Result<LoraTensors, Error> {
        let mut trainable = self.fresh();
        let (saved, place) = self.best(run, "stage1")?;
        trainable.restore(saved).map_err(|what| Error::state(&place, what))?;
        Ok(trainable.lora)
    }

    /// The tensors that a stage of the run found best, and where they lie.
    pub(super) fn best(&self, run: &Path, stage: &str) -> Result<(Vec<Tensor>, PathBuf), Error> {
        let dir = run.join(stage).join("checkpoints");
        let saved =
            Checkpoint::<serde_json::Value>::load(&dir, "best").map_err(|e| Error::state(&dir, e.to_string()))?;
        let saved = saved.ok_or_else(|| Error::state(&dir, format!("{stage} has not been trained in this run")))?;
        Ok((saved.model, dir.join("best")))
    }

    /// Frozen text as stage 2 of the run computes it, if it has a prefix cache: what is on disk is read and added to. `None` without a
    /// cache, for another part, and on a card.
    pub fn prefixes<'a>(
        &'a self,
        run: &Path,
        part: Part,
        trained: &'a Trained,
    ) -> Result<Option<PrefixCache<'a>>, Error> {
        let (config, path) = (&self.config.stage2, run.join("stage2").join("prefixes.kv"));
        if part != Part::Stage2 || self.model.on_card() {
            return Ok(None);
        }
        let plan = match config.prefix_cache {
            PrefixCacheMode::Off => None,
            PrefixCacheMode::Auto if path.exists() => {
                Plan::new(PrefixCacheMode::Disk, config.prefix_cache_bytes, 0, &path)
            }
            PrefixCacheMode::Disk => Plan::new(PrefixCacheMode::Disk, config.prefix_cache_bytes, 0, &path),
            // Rounded alike, but nothing comes twice: nothing is kept.
            PrefixCacheMode::Memory | PrefixCacheMode::Auto => Some(Plan { disk: false, limit: 0, needed: 0 }),
        };
        let Some(plan) = plan else { return Ok(None) };
        Ok(Some(PrefixCache::open(&self.model, Some(&trained.tensors.lora), plan, &path)?))
    }

    /// Writes what others read: the adapter in PEFT's layout, and the mapping.
    pub fn export(&self, run: &RunDir, tensors: &Trainable) -> Result<(), Error> {
        tensors.lora.save(&run.root().join("adapter"), &self.config.llm.dir)?;
        if tensors.cie.is_some() {
            let mapping: Vec<_> = tensors.tensors().into_iter().filter(|t| t.name.starts_with("llama_proj")).collect();
            let path = run.root().join("cie.safetensors");
            write_tensors(&path, &mapping, &[]).map_err(Error::io(&path))?;
        }
        Ok(())
    }

    /// Rows of test that are judged.
    pub fn test_rows(&self) -> (Vec<usize>, Samples) {
        let mut rows = limited_rows(self.data.test.len(), self.config.eval.test_rows, self.config.seed);
        rows.sort_unstable();
        let samples = self.data.test.select(&rows);
        (rows, samples)
    }

    /// Scores test rows with a part of the run.
    pub fn score_test(
        &self,
        part: Part,
        trained: Option<&Trained>,
        rows: &[usize],
        name: &str,
        prefixes: Option<&mut PrefixCache>,
    ) -> Result<(Vec<f32>, Duration), Error> {
        let prompts = self.prompts(part, Split::Test)?;
        let task = self.progress.task(&format!("score {name}"), rows.len() as u64);
        let loss = if part == Part::Stage2 { self.config.stage2.loss } else { self.config.stage1.loss };
        let began = Instant::now();
        let scores = score_rows(
            &self.model,
            trained.map(|t| &t.tensors),
            trained.and_then(|t| t.collab.as_ref()),
            &self.data.test,
            &prompts,
            rows,
            loss,
            self.config.eval.batch_tokens,
            &mut Workspace::default(),
            prefixes,
            |n| task.set(n as u64),
        )?;
        let took = began.elapsed();
        task.finish(&format!("{:.1} rows/s", rows.len() as f64 / took.as_secs_f64()));
        Ok((scores, took))
    }

    /// Metrics on the judged test rows of these parts of the run, and how long each took to score them; without parts, of the bare
    /// LLM. With `ensemble`, also of the collaborative model with each stage.
    pub fn evaluate(&self, run: &Path, parts: &[Part], ensemble: bool) -> Result<Vec<(MethodResult, Duration)>, Error> {
        let (rows, samples) = self.test_rows();
        let config = &self.config;
        let mut scored: Vec<(String, Vec<f32>, Duration)> = Vec::new();
        if parts.contains(&Part::Collab) {
            let collab = config.collab.load(&self.collab_path(run))?;
            let began = Instant::now();
            let scores = collab.scores(&samples);
            scored.push((config.collab.title().into(), scores, began.elapsed()));
        }
        if parts.is_empty() {
            let title = config.method.title(config.strategy, "");
            let (scores, took) = self.score_test(Part::Stage1, None, &rows, &title, None)?;
            scored.push((title, scores, took));
        }
        for part in parts.iter().copied().filter(|&part| part != Part::Collab) {
            let title = match part {
                Part::Stage2 => config.method.title(config.strategy, config.collab.title()),
                _ => Method::Tallrec.title(Strategy::Default, ""),
            };
            let trained = self.trained(run, part)?;
            let mut prefixes = self.prefixes(run, part, &trained)?;
            let (scores, took) = self.score_test(part, Some(&trained), &rows, &title, prefixes.as_mut())?;
            scored.push((title, scores, took));
        }
        if let ([(first, alone, took), others @ ..], true) = (&scored[..], ensemble) {
            let both = |(name, scores, more): &(String, Vec<f32>, Duration)| {
                (format!("{first} + {name}"), mean_probability(alone, scores), *took + *more)
            };
            let both: Vec<_> = others.iter().map(both).collect();
            scored.extend(both);
        }
        let judged = |(name, scores, took): (String, Vec<f32>, Duration)| {
            Ok((MethodResult::new(&name, &samples, &scores)?, took))
        };
        scored.into_iter().map(judged).collect()
    }
}

/// Train rows, drawn by `seed`, every other one liked, as far as there are such.
fn examples(data: &Dataset, n: usize, seed: u64) -> Vec<Example<'_>> {
    let train = &data.train;
    let order = if n > 0 { limited_rows(train.len(), 0, seed) } else { Vec::new() };
    let of = |label: u8, n: usize| order.iter().copied().filter(move |&row| train.label[row] == label).take(n);
    let (liked, not): (Vec<usize>, Vec<usize>) = (of(1, n.div_ceil(2)).collect(), of(0, n / 2).collect());
    let title = |item: u32| data.titles[item as usize].as_str();
    let example = |&row: &usize| {
        let history = train.history(row).iter().map(|&item| title(item)).collect();
        (history, title(train.iid[row]), train.label[row] == 1)
    };
    let turns = (0..liked.len().max(not.len())).flat_map(|i| [liked.get(i), not.get(i)]);
    turns.flatten().map(example).collect()
}

/// Two models as one: the mean of the probabilities that their scores, both logits, stand for. (The paper does not say how its
/// ensembles join.)
fn mean_probability(a: &[f32], b: &[f32]) -> Vec<f32> {
    let probability = |x: f32| 1.0 / (1.0 + (-f64::from(x)).exp());
    a.iter().zip(b).map(|(&a, &b)| ((probability(a) + probability(b)) / 2.0) as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ensemble_is_the_mean_probability() {
        let joined = mean_probability(&[0.0, 3.0, -900.0], &[0.0, -1.0, 900.0]);
        assert_eq!((joined[0], joined[2]), (0.5, 0.5));
        assert!((joined[1] - (0.952_574_1 + 0.268_941_4) / 2.0).abs() < 1e-6);
    }
}
