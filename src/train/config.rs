//! The experiment: every setting with its default, from preset, file and `--set`, in this order of precedence.
//!
//! A switch that is off is written as 0, so that every key has a value and can be named in full.

use std::path::Path;

use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use super::Error;
use super::schedule::{Schedule, ScheduleKind};
use crate::collab::mf::MfConfig;
use crate::device::ops::Loss;
use crate::llm::peft::{TARGETS, Target};
use crate::prompt::PromptStyle;

/// A resolved experiment. Defaults are the official values for ML-1M where there are any (reference, section 5).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Seed of initialisation, order and dropout.
    pub seed: u64,
    /// Data.
    pub data: DataConfig,
    /// Model.
    pub llm: LlmConfig,
    /// Prompts.
    pub prompt: PromptConfig,
    /// Collaborative model.
    pub collab: CollabConfig,
    /// Adapter.
    pub lora: LoraConfig,
    /// Mapping.
    pub cie: CieConfig,
    /// Stage 1: the adapter on text alone.
    pub stage1: StageConfig,
    /// Stage 2: the mapping, with the adapter frozen.
    pub stage2: StageConfig,
    /// Evaluation during and after training.
    pub eval: EvalConfig,
    /// Saving.
    pub checkpoint: CheckpointConfig,
}

/// `[data]`
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataConfig {
    /// Prepared directory.
    pub dir: String,
}

/// `[llm]`
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LlmConfig {
    /// Hugging Face model directory.
    pub dir: String,
}

/// `[prompt]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PromptConfig {
    /// Template of stage 1: a built-in name or a file.
    pub stage1: String,
    /// Template of stage 2.
    pub stage2: String,
    /// How places are filled.
    pub style: PromptStyle,
}

/// `[collab]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CollabConfig {
    /// Which model: `mf`.
    pub model: String,
    /// Settings of MF.
    pub mf: MfConfig,
}

/// `[lora]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoraConfig {
    /// r.
    pub rank: usize,
    /// Scaling is alpha / r.
    pub alpha: f64,
    /// Dropout on the adapter's input in training.
    pub dropout: f64,
    /// Layers: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj.
    pub targets: Vec<String>,
}

/// `[cie]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CieConfig {
    /// Width of the mapping's hidden layer in widths of a collaborative vector (`proj_mid_times`).
    pub mid_times: usize,
}

/// `[stage1]`, `[stage2]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StageConfig {
    /// Top of the learning rate.
    pub learning_rate: f64,
    /// Where it ends.
    pub min_lr: f64,
    /// Where the warm-up begins.
    pub warmup_lr: f64,
    /// Steps of the warm-up.
    pub warmup_steps: u64,
    /// Shape over time.
    pub schedule: ScheduleKind,
    /// Optimizer steps between two evaluations (the official "epoch").
    pub steps_per_epoch: u64,
    /// Epochs at most.
    pub max_epochs: u64,
    /// Epochs without a better AUC on valid_small before stopping; 0: never.
    pub patience: u64,
    /// Rows of a batch.
    pub batch_rows: usize,
    /// Token budget of a batch, instead of a number of rows; 0: off.
    pub batch_tokens: usize,
    /// Batches whose gradients are added before a step.
    pub accumulation: usize,
    /// Tokens computed at once: memory against speed, no effect on what is computed.
    pub micro_batch_tokens: usize,
    /// Decoupled weight decay of matrices (not of biases).
    pub weight_decay: f64,
    /// Largest global norm of the gradients; 0: no clipping.
    pub grad_clip: f64,
    /// What the logit is trained to be.
    pub loss: Loss,
    /// Train on this many rows of a seeded order; 0: all.
    pub rows: usize,
    /// Train the adapter.
    pub train_lora: bool,
    /// Train the mapping (the template must have slots).
    pub train_cie: bool,
    /// PARITY: the official stage 2 freezes the adapter but leaves its dropout on. Off by default.
    pub frozen_lora_dropout: bool,
}

/// `[eval]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EvalConfig {
    /// Rows of valid_small judged at each evaluation, in a seeded order; 0: all.
    pub valid_rows: usize,
    /// Test rows judged at the end, in a seeded order; 0: all.
    pub test_rows: usize,
    /// Tokens scored at once.
    pub batch_tokens: usize,
}

/// `[checkpoint]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointConfig {
    /// Optimizer steps between two saves.
    pub every_steps: u64,
}

impl Default for Config {
    fn default() -> Self {
        let stage = StageConfig::default();
        Config {
            seed: 42,
            data: DataConfig::default(),
            llm: LlmConfig::default(),
            prompt: PromptConfig::default(),
            collab: CollabConfig::default(),
            lora: LoraConfig::default(),
            cie: CieConfig { mid_times: 10 },
            stage1: StageConfig { train_lora: true, ..stage.clone() },
            stage2: StageConfig { train_cie: true, ..stage },
            eval: EvalConfig::default(),
            checkpoint: CheckpointConfig::default(),
        }
    }
}

impl Default for PromptConfig {
    fn default() -> Self {
        PromptConfig { stage1: "tallrec_movie".into(), stage2: "collm_movie".into(), style: PromptStyle::default() }
    }
}

impl Default for CollabConfig {
    fn default() -> Self {
        CollabConfig { model: "mf".into(), mf: MfConfig::default() }
    }
}

impl Default for LoraConfig {
    fn default() -> Self {
        LoraConfig { rank: 8, alpha: 16.0, dropout: 0.05, targets: vec!["q_proj".into(), "v_proj".into()] }
    }
}

impl Default for CieConfig {
    fn default() -> Self {
        CieConfig { mid_times: 10 }
    }
}

impl Default for StageConfig {
    fn default() -> Self {
        StageConfig {
            learning_rate: 1e-3,
            min_lr: 8e-5,
            warmup_lr: 1e-5,
            warmup_steps: 200,
            schedule: ScheduleKind::Plain,
            steps_per_epoch: 50,
            max_epochs: 200,
            patience: 20,
            batch_rows: 32,
            batch_tokens: 0,
            accumulation: 1,
            micro_batch_tokens: 1024,
            weight_decay: 1e-3,
            grad_clip: 0.0,
            loss: Loss::YesLogitBce,
            rows: 0,
            train_lora: false,
            train_cie: false,
            frozen_lora_dropout: false,
        }
    }
}

impl Default for EvalConfig {
    fn default() -> Self {
        EvalConfig { valid_rows: 0, test_rows: 0, batch_tokens: 2048 }
    }
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        CheckpointConfig { every_steps: 25 }
    }
}

impl StageConfig {
    /// The learning rate over time.
    pub fn schedule(&self) -> Schedule {
        Schedule {
            kind: self.schedule,
            learning_rate: self.learning_rate,
            min_lr: self.min_lr,
            warmup_lr: self.warmup_lr,
            warmup_steps: self.warmup_steps,
            steps_per_epoch: self.steps_per_epoch,
            max_epochs: self.max_epochs,
        }
    }
}

const PRESETS: [(&str, &str); 2] = [
    ("ml-1m/collm-mf", include_str!("presets/ml-1m-collm-mf.toml")),
    ("ml-100k/collm-mf", include_str!("presets/ml-100k-collm-mf.toml")),
];

impl Config {
    /// Names of the presets.
    pub fn presets() -> Vec<&'static str> {
        PRESETS.iter().map(|p| p.0).collect()
    }

    /// Resolves preset, then file, then `key=value` settings.
    pub fn resolve(preset: Option<&str>, file: Option<&Path>, settings: &[String]) -> Result<Config, Error> {
        let config_error = |origin: &str, what: String| Error::Config { origin: origin.into(), what };
        let mut table = Table::try_from(Config::default()).map_err(|e| config_error("defaults", e.to_string()))?;
        if let Some(name) = preset {
            let found = PRESETS.iter().find(|p| p.0 == name);
            let (_, text) = found.ok_or_else(|| {
                config_error("--preset", format!("{name:?} is not a preset; presets: {}", Config::presets().join(", ")))
            })?;
            overlay(&mut table, text, name)?;
        }
        if let Some(path) = file {
            let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
            overlay(&mut table, &text, &path.display().to_string())?;
        }
        for setting in settings {
            set(&mut table, setting).map_err(|what| config_error(&format!("--set {setting}"), what))?;
        }
        let origin = file.map_or_else(|| preset.unwrap_or("configuration").to_string(), |f| f.display().to_string());
        let config: Config = table.try_into().map_err(|e: toml::de::Error| config_error(&origin, e.message().to_string()))?;
        config.check().map_err(|what| config_error(&origin, what))?;
        Ok(config)
    }

    /// The resolved form, which loads back equal.
    pub fn to_toml(&self) -> Result<String, Error> {
        toml::to_string_pretty(self).map_err(|e| Error::Config { origin: "configuration".into(), what: e.to_string() })
    }

    /// The targets of the adapter.
    pub fn targets(&self) -> Vec<Target> {
        self.lora.targets.iter().filter_map(|t| Target::named(t)).collect()
    }

    fn check(&self) -> Result<(), String> {
        let positive = [
            ("lora.rank", self.lora.rank),
            ("cie.mid_times", self.cie.mid_times),
            ("eval.batch_tokens", self.eval.batch_tokens),
            ("prompt.style.max_tokens", self.prompt.style.max_tokens),
            ("prompt.style.tokens_per_vector", self.prompt.style.tokens_per_vector),
            ("collab.mf.dim", self.collab.mf.dim),
            ("collab.mf.batch_size", self.collab.mf.batch_size),
            ("checkpoint.every_steps", self.checkpoint.every_steps as usize),
        ];
        if let Some((key, _)) = positive.iter().find(|p| p.1 == 0) {
            return Err(format!("{key} is 0; expected at least 1"));
        }
        if self.prompt.style.tokens_per_vector > 64 {
            return Err("prompt.style.tokens_per_vector exceeds 64".into());
        }
        if let Some(t) = self.lora.targets.iter().find(|t| Target::named(t).is_none()) {
            return Err(format!("lora.targets holds {t:?}; known: {}", TARGETS.join(", ")));
        }
        if !(0.0..1.0).contains(&self.lora.dropout) {
            return Err(format!("lora.dropout is {}; expected 0 <= dropout < 1", self.lora.dropout));
        }
        if self.collab.model != "mf" {
            return Err(format!("collab.model is {:?}; known: mf", self.collab.model));
        }
        for (name, stage) in [("stage1", &self.stage1), ("stage2", &self.stage2)] {
            let counts = [
                ("batch_rows", stage.batch_rows as u64),
                ("accumulation", stage.accumulation as u64),
                ("micro_batch_tokens", stage.micro_batch_tokens as u64),
                ("steps_per_epoch", stage.steps_per_epoch),
                ("max_epochs", stage.max_epochs),
            ];
            if let Some((key, _)) = counts.iter().find(|c| c.1 == 0) {
                return Err(format!("{name}.{key} is 0; expected at least 1"));
            }
            let rates = [
                ("learning_rate", stage.learning_rate),
                ("min_lr", stage.min_lr),
                ("warmup_lr", stage.warmup_lr),
                ("weight_decay", stage.weight_decay),
                ("grad_clip", stage.grad_clip),
            ];
            if let Some((key, value)) = rates.iter().find(|r| !(r.1.is_finite() && r.1 >= 0.0)) {
                return Err(format!("{name}.{key} is {value}; expected a number of at least 0"));
            }
            if !stage.train_lora && !stage.train_cie {
                return Err(format!("{name} trains nothing; set {name}.train_lora or {name}.train_cie"));
            }
        }
        Ok(())
    }
}

/// Lays a TOML text over the table; every key must exist there.
fn overlay(table: &mut Table, text: &str, origin: &str) -> Result<(), Error> {
    let error = |what: String| Error::Config { origin: origin.into(), what };
    let given: Table = text.parse().map_err(|e: toml::de::Error| error(e.to_string().trim_end().to_string()))?;
    merge(table, given, "", &mut |key, what| {
        let name = key.rsplit('.').next().unwrap_or(key);
        let line = text.lines().position(|l| l.trim_start().trim_start_matches('[').starts_with(name)).map_or(0, |l| l + 1);
        error(format!("line {line}: {what}"))
    })
}

fn merge(table: &mut Table, given: Table, path: &str, error: &mut dyn FnMut(&str, String) -> Error) -> Result<(), Error> {
    for (key, value) in given {
        let full = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        let Some(slot) = table.get_mut(&key) else {
            let what = unknown(&full, &leaves(table, path));
            return Err(error(&full, what));
        };
        match (slot, value) {
            (Value::Table(inner), Value::Table(value)) => merge(inner, value, &full, error)?,
            (Value::Table(_), other) => return Err(error(&full, format!("{full} is {}; expected a table", other.type_str()))),
            (slot, value) => *slot = like(slot, value).map_err(|what| error(&full, format!("{full} {what}")))?,
        }
    }
    Ok(())
}

/// `value` in the type of `slot`: an integer may stand for a float.
fn like(slot: &Value, value: Value) -> Result<Value, String> {
    match (slot, value) {
        (Value::Float(_), Value::Integer(i)) => Ok(Value::Float(i as f64)),
        (slot, value) if slot.same_type(&value) => Ok(value),
        (slot, value) => Err(format!("is {value}; expected a value of type {}", slot.type_str())),
    }
}

/// One `key=value`.
fn set(table: &mut Table, setting: &str) -> Result<(), String> {
    let (key, text) = setting.split_once('=').ok_or("expected key=value, like stage1.learning_rate=0.001")?;
    let (key, text) = (key.trim(), text.trim());
    let all = leaves(table, "");
    let mut parts = key.split('.').collect::<Vec<_>>();
    let last = parts.pop().ok_or("the key is empty")?;
    let mut at = table;
    for part in parts {
        at = match at.get_mut(part) {
            Some(Value::Table(inner)) => inner,
            _ => return Err(unknown(key, &all)),
        };
    }
    let slot = at.get_mut(last).filter(|v| !v.is_table()).ok_or_else(|| unknown(key, &all))?;
    let parsed = match slot {
        Value::String(_) => Value::String(text.trim_matches('"').into()),
        _ => format!("v = {text}").parse::<Table>().ok().and_then(|mut t| t.remove("v")).ok_or_else(|| {
            format!("{text:?} is not a value of type {}", slot.type_str())
        })?,
    };
    *slot = like(slot, parsed)?;
    Ok(())
}

fn leaves(table: &Table, path: &str) -> Vec<String> {
    let full = |key: &str| if path.is_empty() { key.to_string() } else { format!("{path}.{key}") };
    let inner = |(key, value): (&String, &Value)| match value {
        Value::Table(t) => leaves(t, &full(key)),
        _ => vec![full(key)],
    };
    table.iter().flat_map(inner).collect()
}

fn unknown(key: &str, known: &[String]) -> String {
    let last = |k: &str| k.rsplit('.').next().unwrap_or("").to_string();
    let likeness = |k: &&String| {
        let whole = strsim::jaro_winkler(k, key);
        whole.max(0.98 * strsim::jaro_winkler(&last(k), &last(key)))
    };
    let best = known.iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b))).filter(|k| likeness(k) > 0.75);
    let hint = best.map_or(String::new(), |k| format!("; did you mean {k}?"));
    format!("unknown key {key}{hint}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(settings: &[&str]) -> String {
        Config::resolve(None, None, &settings.iter().map(|s| s.to_string()).collect::<Vec<_>>()).unwrap_err().to_string()
    }

    #[test]
    fn presets_resolve_and_round_trip() {
        for name in Config::presets() {
            let config = Config::resolve(Some(name), None, &["seed=7".into(), "stage1.learning_rate=1".into()]).unwrap();
            assert_eq!((config.seed, config.stage1.learning_rate), (7, 1.0));
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), config.to_toml().unwrap()).unwrap();
            assert_eq!(Config::resolve(None, Some(file.path()), &[]).unwrap(), config);
        }
    }

    #[test]
    fn unknown_keys_are_refused_with_a_suggestion() {
        assert_eq!(error(&["lora.rnak=4"]), "--set lora.rnak=4: unknown key lora.rnak; did you mean lora.rank?");
        assert!(error(&["stage1.lerning_rate=4"]).ends_with("did you mean stage1.learning_rate?"));
        assert!(error(&["stage1"]).contains("expected key=value"));
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "seed = 1\n[stage1]\nbatch_row = 4\n").unwrap();
        let e = Config::resolve(None, Some(file.path()), &[]).unwrap_err().to_string();
        assert!(e.ends_with("line 3: unknown key stage1.batch_row; did you mean stage1.batch_rows?"), "{e}");
    }

    #[test]
    fn bad_values_say_what_is_expected() {
        assert!(error(&["stage1.batch_rows=0"]).ends_with("stage1.batch_rows is 0; expected at least 1"));
        assert!(error(&["stage1.batch_rows=many"]).contains("\"many\" is not a value of type integer"));
        assert!(error(&["lora.dropout=1.5"]).contains("expected 0 <= dropout < 1"));
        assert!(error(&["lora.targets=[\"x_proj\"]"]).contains("known: q_proj"));
        assert!(error(&["stage1.schedule=linear"]).contains("linear"));
        assert!(Config::resolve(Some("ml-1m"), None, &[]).unwrap_err().to_string().contains("presets: ml-1m/collm-mf"));
    }
}
