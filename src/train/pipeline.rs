//! The whole experiment: collaborative model → stage 1 → stage 2, each resumable, each also alone.

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::Error;
use super::config::Config;
use super::run_dir::RunDir;
use super::stage::{INTERRUPTED, Outcome, Stage, limited_rows};
use super::trainable::{Trainable, score_rows};
use crate::checkpoint::{Checkpoint, write_tensors};
use crate::cie::Mapping;
use crate::collab::Collaborative;
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
use crate::prompt::{LlmTokenizer, PromptBuilder, PromptSet, Template, tokenize_split};

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
    cache: PathBuf,
    progress: Progress,
}

/// A trained run, ready to score.
pub struct Trained {
    /// Adapter and mapping.
    pub tensors: Trainable,
    /// The collaborative model, if the prompts have slots.
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
        Ok(Pipeline { config, data, device, model, tokenizer, templates, cache: cache.to_path_buf(), progress })
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
        PromptBuilder::new(&self.tokenizer, template, &self.config.prompt.style)
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

    fn collab_path(&self, run: &Path) -> PathBuf {
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

    /// Runs a stage.
    pub fn stage(
        &self,
        part: Part,
        start: &Trainable,
        collab: Option<&Collaborative>,
        run: &mut RunDir,
    ) -> Result<Outcome, Error> {
        let (name, config) = match part {
            Part::Stage2 => ("stage2", &self.config.stage2),
            _ => ("stage1", &self.config.stage1),
        };
        let slots = self.builder(part).template().has_slots();
        if config.train_cie && !slots {
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
        stage.run(start, run, &self.progress)
    }

    /// The adapter that stage 1 of the run found best.
    pub fn stage1_best(&self, run: &Path) -> Result<LoraTensors, Error> {
        let mut trainable = self.fresh();
        self.load_best(run, "stage1", &mut trainable)?;
        Ok(trainable.lora)
    }

    fn load_best(&self, run: &Path, stage: &str, into: &mut Trainable) -> Result<(), Error> {
        let dir = run.join(stage).join("checkpoints");
        let saved =
            Checkpoint::<serde_json::Value>::load(&dir, "best").map_err(|e| Error::state(&dir, e.to_string()))?;
        let saved = saved.ok_or_else(|| Error::state(&dir, format!("{stage} has not been trained in this run")))?;
        into.restore(saved.model).map_err(|what| Error::state(&dir.join("best"), what))
    }

    /// What a finished run holds for a part: stage 2's tensors with the collaborative model, or stage 1's alone.
    pub fn trained(&self, run: &Path, part: Part) -> Result<Trained, Error> {
        if part != Part::Stage2 {
            return Ok(Trained { tensors: Trainable { lora: self.stage1_best(run)?, cie: None }, collab: None });
        }
        let collab = self.config.collab.load(&self.collab_path(run))?;
        let mut tensors = self.with_cie(self.fresh().lora, collab.dim());
        self.load_best(run, "stage2", &mut tensors)?;
        Ok(Trained { tensors, collab: Some(collab) })
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

    /// Metrics of the collaborative model, stage 1 and stage 2 on the judged test rows, and how long each took to score them.
    pub fn evaluate(&self, run: &Path) -> Result<Vec<(MethodResult, Duration)>, Error> {
        let (rows, samples) = self.test_rows();
        let mut results = Vec::new();
        let stage2 = self.trained(run, Part::Stage2)?;
        let began = Instant::now();
        let scores = stage2.collab.as_ref().map(|c| c.scores(&samples)).unwrap_or_default();
        let name = self.config.collab.title();
        results.push((MethodResult::new(name, &samples, &scores)?, began.elapsed()));
        let stage1 = self.trained(run, Part::Stage1)?;
        for (name, part, trained) in
            [("TALLRec (stage 1)", Part::Stage1, &stage1), (&format!("CoLLM-{name}"), Part::Stage2, &stage2)]
        {
            let mut prefixes = self.prefixes(run, part, trained)?;
            let (scores, took) = self.score_test(part, Some(trained), &rows, name, prefixes.as_mut())?;
            results.push((MethodResult::new(name, &samples, &scores)?, took));
        }
        Ok(results)
    }
}
