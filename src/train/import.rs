//! The official `train_configs/*.yaml` as a configuration of ours: every key becomes a setting, or a line that tells what it did
//! and what to do here (reference, section 5).
//!
//! One official file is one stage: a template with places for vectors makes it stage 2, any other stage 1. What is written is what
//! the file says; everything else keeps its default.

use std::path::Path;

use toml::Value as Toml;

use super::Error;
use super::config::Config;
use super::official_keys::{NUMBERS, sizes, unmatched};
use super::yaml::{self, Leaf, Scalar, Value};
use crate::collab::CollabConfig;
use crate::prompt::Template;

/// A configuration made from an official file.
#[derive(Clone, Debug)]
pub struct Imported {
    /// TOML with comments: where each setting comes from, and a line for each key that became none.
    pub toml: String,
    /// Number of settings.
    pub settings: usize,
    /// Number of keys that became none.
    pub unmatched: usize,
}

/// Imports the text of the file `name`. Batches there were per process; `processes` ran side by side (torchrun's
/// `--nproc-per-node`).
pub fn import(text: &str, name: &str, processes: u64) -> Result<Imported, Error> {
    let leaves = yaml::leaves(text).map_err(|(line, what)| error(name, line, &what))?;
    let official = |l: &Leaf| ["model.", "datasets.", "run."].iter().any(|t| l.key.starts_with(t));
    if !leaves.iter().any(official) {
        let what = "holds none of the tables model, datasets and run; expected an official train_configs/*.yaml";
        return Err(Error::Config { origin: name.into(), what: what.into() });
    }
    let taken = vec![false; leaves.len()];
    let mut import = Import { name, leaves, taken, settings: Vec::new(), unmatched: Vec::new() };
    let stage = import.template()?;
    import.trained(stage)?;
    import.collab()?;
    import.values(stage)?;
    import.schedule(stage)?;
    import.batch(stage, processes)?;
    import.places()?;
    import.rest();
    import.check()?;
    Ok(import.write(stage))
}

const PRETRAINED: &str = "model.rec_config.pretrained_path";

fn error(name: &str, line: usize, what: &str) -> Error {
    Error::Config { origin: format!("{name}:{line}"), what: what.into() }
}

struct Setting {
    key: String,
    value: Toml,
    /// Official key and line; line 0: no key says it.
    from: (String, usize),
    remark: String,
}

struct Import<'a> {
    name: &'a str,
    leaves: Vec<Leaf>,
    taken: Vec<bool>,
    settings: Vec<Setting>,
    /// Line, and the sentence.
    unmatched: Vec<(usize, String)>,
}

/// What the two parts of an official file can be.
#[derive(Clone, Copy, PartialEq)]
enum Stage {
    One,
    Two,
}

impl Stage {
    fn name(self) -> &'static str {
        if self == Stage::One { "stage1" } else { "stage2" }
    }
}

impl Import<'_> {
    /// A key's line and value; the key is done with.
    fn take(&mut self, key: &str) -> Option<(usize, Value)> {
        let at = self.leaves.iter().position(|l| l.key == key)?;
        self.taken[at] = true;
        Some((self.leaves[at].line, self.leaves[at].value.clone()))
    }

    /// A key's line and single value, if it has one that is not null.
    fn one<T>(
        &mut self,
        key: &str,
        what: &str,
        read: impl Fn(&Scalar) -> Option<T>,
    ) -> Result<Option<(usize, T)>, Error> {
        match self.take(key) {
            None => Ok(None),
            Some((line, Value::One(s))) if s.is_null() => {
                self.note(line, format!("{key} = null: said nothing"));
                Ok(None)
            }
            Some((line, value)) => {
                let read = if let Value::One(s) = &value { read(s) } else { None };
                let wrong = || error(self.name, line, &format!("{key} is {}; expected {what}", value.shown()));
                Ok(Some((line, read.ok_or_else(wrong)?)))
            }
        }
    }

    fn text(&mut self, key: &str) -> Result<Option<(usize, String)>, Error> {
        self.one(key, "a text", |s| Some(s.text.clone()))
    }

    fn switch(&mut self, key: &str) -> Result<Option<(usize, bool)>, Error> {
        self.one(key, "True or False", Scalar::boolean)
    }

    fn count(&mut self, key: &str) -> Result<Option<(usize, u64)>, Error> {
        self.one(key, "a count", |s| s.count().filter(|&n| i64::try_from(n).is_ok()))
    }

    /// A number that keeps its meaning.
    fn number(&mut self, official: &str, ours: String, is_count: bool, remark: &str) -> Result<(), Error> {
        if is_count {
            if let Some((line, n)) = self.count(official)? {
                self.set(ours, n as i64, (official, line), remark);
            }
        } else if let Some((line, x)) = self.one(official, "a number", Scalar::number)? {
            self.set(ours, x, (official, line), remark);
        }
        Ok(())
    }

    fn set(&mut self, key: impl Into<String>, value: impl Into<Toml>, from: (&str, usize), remark: &str) {
        let (key, value, from) = (key.into(), value.into(), (from.0.into(), from.1));
        self.settings.push(Setting { key, value, from, remark: remark.into() });
    }

    fn note(&mut self, line: usize, what: String) {
        self.unmatched.push((line, what));
    }

    /// The template, which tells the stage.
    fn template(&mut self) -> Result<Stage, Error> {
        const KEY: &str = "model.prompt_path";
        let Some((line, path)) = self.text(KEY)? else {
            let what = format!("{KEY} is missing; the template tells which stage this is");
            return Err(Error::Config { origin: self.name.into(), what });
        };
        let stem = Path::new(&path).file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
        let (name, remark) = match stem.as_str() {
            "rec_alignment" => ("collm_movie", "under its old name there"),
            "rec_alignment_amazon" => ("collm_amazon", "under its old name there"),
            "rec_alignment_ml_dcn" => ("collm_movie", "the file named there was never published; this one is alike"),
            "rec_alignment_amazon_dcn" => {
                ("collm_amazon", "the file named there was never published; this one is alike")
            }
            other if Template::find(other).is_ok() && !Path::new(other).is_file() => (other, ""),
            _ => (path.as_str(), ""),
        };
        let template = Template::find(name).map_err(|e| error(self.name, line, &format!("{KEY}: {e}")))?;
        let stage = if template.has_slots() { Stage::Two } else { Stage::One };
        self.set(format!("prompt.{}", stage.name()), name, (KEY, line), remark);
        if let Some((line, wrap)) = self.text("model.prompt_template")? {
            self.note(
                line,
                match wrap.as_str() {
                    "{}" => "model.prompt_template = \"{}\": wrapped the prompt in nothing".into(),
                    w => format!(
                        "model.prompt_template = {w:?}: wrapped every prompt; write the wrapped template to a file and name it in prompt.{}",
                        stage.name()
                    ),
                },
            );
        }
        Ok(stage)
    }

    /// What is trained, and from where.
    fn trained(&mut self, stage: Stage) -> Result<(), Error> {
        let name = stage.name();
        let lora_used = self.switch("model.lora_config.use_lora")?;
        let lora = self.switch("model.freeze_lora")?;
        let cie = self.switch("model.freeze_proj")?;
        let trains_lora = lora.is_some_and(|l| !l.1) && lora_used.is_none_or(|u| u.1);
        let trains_cie = cie.is_some_and(|c| !c.1) && stage == Stage::Two;
        match lora_used {
            Some((line, true)) => {
                self.note(line, "model.lora_config.use_lora = True: asked for an adapter; here there is one".into());
            }
            Some((line, false)) => {
                let what = "no adapter; here there is always one, and a fresh one that is not trained changes nothing";
                self.note(line, format!("model.lora_config.use_lora = False: {what}"));
            }
            None => {}
        }
        if trains_lora || trains_cie {
            if let Some((line, _)) = lora {
                self.set(format!("{name}.train_lora"), trains_lora, ("model.freeze_lora", line), "");
            }
            match cie {
                Some((line, false)) if stage == Stage::One => {
                    let what = "trained a mapping that this template has no places for: it had no gradient";
                    self.note(line, format!("model.freeze_proj = False: {what}"));
                }
                Some((line, _)) => self.set(format!("{name}.train_cie"), trains_cie, ("model.freeze_proj", line), ""),
                None => {}
            }
        } else {
            for (key, found) in [("model.freeze_lora", lora), ("model.freeze_proj", cie)] {
                if let Some((line, frozen)) = found {
                    let what = format!("nothing was trained; here {name} trains what it does by default");
                    self.note(line, format!("{key} = {}: {what}", if frozen { "True" } else { "False" }));
                }
            }
        }
        if stage == Stage::Two && !trains_lora {
            let remark = "no key: the official adapter keeps its dropout when it is frozen";
            self.set("stage2.frozen_lora_dropout", true, ("", 0), remark);
        }
        match self.switch("model.freeze_rec")? {
            Some((line, true)) => {
                self.note(line, "model.freeze_rec = True: froze the collaborative model; here it is frozen".into());
            }
            Some((line, false)) if stage == Stage::One => {
                let what =
                    "asked to tune a collaborative model that this template has no places for: it had no gradient";
                self.note(line, format!("model.freeze_rec = False: {what}"));
            }
            Some((line, false)) => {
                let begins =
                    |l: &Leaf| l.key == PRETRAINED && !matches!(&l.value, Value::One(s) if s.text == "not_have");
                let random = !self.leaves.iter().any(begins);
                let (strategy, remark) = if random { ("t2", "from random numbers") } else { ("t1", "as pretrained") };
                self.set("strategy", strategy, ("model.freeze_rec", line), remark);
            }
            None => {}
        }
        let ckpt = self.text("model.ckpt")?;
        if stage == Stage::Two && trains_lora && trains_cie && ckpt.is_none() {
            self.set("strategy", "t3", ("", 0), "no key: adapter and mapping were trained together, from nothing");
        }
        if let Some((line, ckpt)) = ckpt {
            let what = match stage {
                Stage::Two => "began from these weights; here stage 2 begins from stage 1 of the same --run",
                Stage::One => "began from these weights; here stage 1 begins from a fresh adapter",
            };
            self.note(line, format!("model.ckpt = {ckpt}: {what}"));
        }
        if let Some((line, alone)) = self.switch("run.evaluate")? {
            let what = match alone {
                true => "True: only judged the checkpoint; here: collm-engine eval --run DIR on a trained run",
                false => "False: trained; here that is collm-engine train",
            };
            self.note(line, format!("run.evaluate = {what}"));
        }
        Ok(())
    }

    /// The collaborative model: which, how wide, from where.
    fn collab(&mut self) -> Result<(), Error> {
        let found = self.text("model.rec_model")?;
        let (line, official) = found.unwrap_or((0, "MF".into()));
        let model = official.to_lowercase();
        // Officially the models that are none stand where a collaborative model does.
        let method =
            [("personlized_prompt", "ui-token"), ("soft_prompt", "prompt4nr")].into_iter().find(|m| m.0 == model);
        if let Some((_, method)) = method {
            self.set("method", method, ("model.rec_model", line), "");
            return Ok(());
        }
        if !CollabConfig::models().contains(&model.as_str()) {
            let what = "is not a collaborative model of this program; collab.model keeps its default";
            self.note(line, format!("model.rec_model = {official}: {what}"));
            return Ok(());
        }
        let remark = if line == 0 { "no key: the official default" } else { "" };
        let sizes = sizes(&model);
        self.set("collab.model", model, ("model.rec_model", line), remark);
        for (key, ours, is_count) in sizes {
            self.number(&format!("model.rec_config.{key}"), format!("collab.{ours}"), *is_count, "")?;
        }
        match self.text(PRETRAINED)? {
            Some((line, path)) if path == "not_have" => {
                let tuned = self.settings.iter().any(|s| s.key == "strategy");
                let here = if tuned { "so does strategy t2" } else { "here the collaborative model is trained first" };
                let what = format!("began from random tables; {here}");
                self.note(line, format!("{PRETRAINED} = not_have: {what}"));
            }
            Some((line, path)) if path.chars().all(|c| c == 'x') => {
                let what = "is a placeholder; set collab.pretrained, or the collaborative model is trained first";
                self.note(line, format!("{PRETRAINED} = {path}: {what}"));
            }
            Some((line, path)) => {
                let remark = "without it the collaborative model is trained here";
                self.set("collab.pretrained", path, (PRETRAINED, line), remark);
            }
            None => {}
        }
        Ok(())
    }

    fn values(&mut self, stage: Stage) -> Result<(), Error> {
        for (official, ours, is_count, remark) in NUMBERS {
            self.number(official, ours.replace("stage.", &format!("{}.", stage.name())), is_count, remark)?;
        }
        const TARGETS: &str = "model.lora_config.target_modules";
        match self.take(TARGETS) {
            Some((line, Value::List(items))) => {
                let names: Vec<Toml> = items.into_iter().map(|s| s.text.into()).collect();
                self.set("lora.targets", names, (TARGETS, line), "");
            }
            Some((line, value)) => {
                return Err(error(self.name, line, &format!("{TARGETS} is {}; expected a list", value.shown())));
            }
            None => {}
        }
        Ok(())
    }

    fn schedule(&mut self, stage: Stage) -> Result<(), Error> {
        let Some((line, kind)) = self.text("run.lr_sched")? else { return Ok(()) };
        if kind == "linear_warmup_cosine_lr" {
            let remark = "with its sawtooth: the warm-up counts steps within an epoch; \"plain\" does not";
            self.set(format!("{}.schedule", stage.name()), "official", ("run.lr_sched", line), remark);
        } else {
            let what = "is not a schedule of this program; choose one: constant, plain, official";
            self.note(line, format!("run.lr_sched = {kind}: {what}"));
        }
        Ok(())
    }

    fn batch(&mut self, stage: Stage, processes: u64) -> Result<(), Error> {
        if let Some((line, rows)) = self.count("run.batch_size_train")? {
            let all = rows.checked_mul(processes).and_then(|n| i64::try_from(n).ok());
            let all = all.ok_or_else(|| error(self.name, line, "run.batch_size_train is too large"))?;
            let remark = format!("{rows} rows on each of {processes} process(es)");
            self.set(format!("{}.batch_rows", stage.name()), all, ("run.batch_size_train", line), &remark);
        }
        self.number("run.accum_grad_iters", format!("{}.accumulation", stage.name()), true, "")?;
        Ok(())
    }

    /// Directories.
    fn places(&mut self) -> Result<(), Error> {
        if let Some((line, dir)) = self.text("model.llama_model")? {
            let remark = "a directory or hub name there; a Hugging Face directory here (--llm)";
            self.set("llm.dir", dir, ("model.llama_model", line), remark);
        }
        let storages: Vec<String> = self
            .leaves
            .iter()
            .map(|l| l.key.clone())
            .filter(|k| k.starts_with("datasets.") && k.ends_with(".build_info.storage"))
            .collect();
        for (i, key) in storages.iter().enumerate() {
            let Some((line, value)) = self.take(key) else { continue };
            match value {
                Value::One(s) if i == 0 && !s.is_null() => {
                    let remark = "pickles there, a prepared directory here (--data): collm-engine prepare collm --from … --out …";
                    self.set("data.dir", s.text, (key, line), remark);
                }
                other => self.note(line, format!("{key} = {}: here a run has one prepared directory", other.shown())),
            }
        }
        Ok(())
    }

    /// A line for every key that nothing took.
    fn rest(&mut self) {
        for at in 0..self.leaves.len() {
            if self.taken[at] {
                continue;
            }
            let Leaf { key, line, value } = &self.leaves[at];
            let what = unmatched(key).unwrap_or("is not a key of the official files; nothing was made of it");
            self.unmatched.push((*line, format!("{key} = {}: {what}", value.shown())));
        }
        self.unmatched.sort();
    }

    /// Is what was made usable? Told with the line that is to blame.
    fn check(&self) -> Result<(), Error> {
        let settings: Vec<String> = self.settings.iter().map(|s| format!("{}={}", s.key, s.value)).collect();
        Config::resolve(None, None, &settings).map(drop).map_err(|e| match e {
            Error::Config { origin, what } => {
                let at = settings.iter().position(|s| origin == format!("--set {s}"));
                let line = at.map(|i| &self.settings[i].from).filter(|f| f.1 > 0);
                let origin = line.map_or(self.name.to_string(), |(key, line)| format!("{}:{line}: {key}", self.name));
                Error::Config { origin, what }
            }
            other => other,
        })
    }

    fn write(mut self, stage: Stage) -> Imported {
        let kind = if stage == Stage::One { "stage 1" } else { "stage 2" };
        let mut toml = format!(
            "# Made by `collm-engine config import` from {}, which describes {kind}.\n\
             # Behind each setting: the key it comes from and its line. What is not here keeps its default.\n",
            self.name.escape_debug()
        );
        let table = |s: &Setting| s.key.rsplit_once('.').map_or("", |k| k.0).to_string();
        self.settings.sort_by_key(|s| (table(s), s.from.1));
        let mut last = None;
        for s in &self.settings {
            let here = table(s);
            if last.as_ref() != Some(&here) {
                toml += &if here.is_empty() { "\n".to_string() } else { format!("\n[{here}]\n") };
            }
            let name = s.key.rsplit('.').next().unwrap_or_default();
            let from = match &s.from {
                (_, 0) => String::new(),
                (key, line) => format!("{key}, line {line}"),
            };
            let gap = if from.is_empty() || s.remark.is_empty() { "" } else { ": " };
            toml += &format!("{name} = {}  # {from}{gap}{}\n", s.value, s.remark);
            last = Some(here);
        }
        if !self.unmatched.is_empty() {
            toml += "\n# Keys that became no setting:\n";
        }
        for (line, what) in &self.unmatched {
            toml += &format!("# line {line}: {}\n", what.replace(|c: char| c.is_control(), " "));
        }
        Imported { toml, settings: self.settings.len(), unmatched: self.unmatched.len() }
    }
}
