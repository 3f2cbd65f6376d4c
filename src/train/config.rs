//! The experiment: every setting with its default, from preset, file and `--set`, in this order of precedence.
//!
//! A switch that is off is written as 0, so that every key has a value and can be named in full.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::Error;
use super::layers::{Fault, Layers};
use super::method::{Method, Strategy};
use super::order::Grouping;
use super::schedule::{Schedule, ScheduleKind};
use super::variants::VARIANTS;
use crate::collab::CollabConfig;
use crate::device::ops::Loss;
use crate::llm::peft::{TARGETS, Target};
use crate::llm::prefix_cache::PrefixCacheMode;
use crate::prompt::{PromptStyle, Template};

/// A resolved experiment. Defaults are the official values for ML-1M where there are any (reference, section 5).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Seed of initialisation, order and dropout.
    pub seed: u64,
    /// What is done with the LLM: `collm`, `tallrec`, `icl`, `ui-token`, `prompt4nr`.
    pub method: Method,
    /// What stage 2 trains, and from where: `default`, `t1`, `t2`, `t3`.
    pub strategy: Strategy,
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
    /// Answered train rows before every prompt of method `icl`, half of them liked.
    pub examples: usize,
    /// How places are filled.
    pub style: PromptStyle,
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
    /// What a pass over train shuffles: rows (`off`), or groups of rows that begin alike, whose prefix is then computed once
    /// (`shuffle-groups`). Dropout drops a shared token once for all rows that share it.
    pub group: Grouping,
    /// Where the keys and values of the text before the first slot are kept while the adapter is frozen, rounded to f16: `off`
    /// (computed in every pass, exact), `memory`, `disk` (in the run directory) or `auto`. On the CPU only.
    pub prefix_cache: PrefixCacheMode,
    /// Most bytes of it; 0: half of the memory available, or of the disk free.
    pub prefix_cache_bytes: u64,
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
            method: Method::default(),
            strategy: Strategy::default(),
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
        PromptConfig {
            stage1: "tallrec_movie".into(),
            stage2: "collm_movie".into(),
            examples: 0,
            style: PromptStyle::default(),
        }
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
            group: Grouping::Off,
            prefix_cache: PrefixCacheMode::Off,
            prefix_cache_bytes: 0,
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

const PRESETS: [(&str, &str); 5] = [
    ("ml-1m/collm-mf", include_str!("presets/ml-1m-collm-mf.toml")),
    ("ml-1m/collm-lightgcn", include_str!("presets/ml-1m-collm-lightgcn.toml")),
    ("ml-1m/collm-sasrec", include_str!("presets/ml-1m-collm-sasrec.toml")),
    ("ml-1m/collm-din", include_str!("presets/ml-1m-collm-din.toml")),
    ("ml-100k/collm-mf", include_str!("presets/ml-100k-collm-mf.toml")),
];

impl Config {
    /// Names of the presets.
    pub fn presets() -> Vec<&'static str> {
        PRESETS.iter().map(|p| p.0).chain(VARIANTS.iter().map(|v| v.0)).collect()
    }

    /// Resolves preset, then file, then `key=value` settings.
    pub fn resolve(preset: Option<&str>, file: Option<&Path>, settings: &[String]) -> Result<Config, Error> {
        let mut layers = Layers::new(&Config::default())?;
        if let Some(name) = preset {
            lay_preset(&mut layers, name)?;
        }
        if let Some(path) = file {
            let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
            layers.text(&text, &path.display().to_string())?;
        }
        for setting in settings {
            layers.setting(setting)?;
        }
        let mut config: Config = layers.resolve(Config::check)?;
        config.stage2 = config.stage2_of_strategy();
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

    /// Do the values make sense? The first that does not, and what would.
    fn check(&self) -> Result<(), Fault> {
        let fault = |key: &str, what: String| Err((key.to_string(), what));
        let CollabConfig { mf, lightgcn: gcn, sasrec, din, .. } = &self.collab;
        // At least 1; the upper bounds keep a slip of the finger from becoming an allocation.
        counts(&[
            ("lora.rank", self.lora.rank as u64, 4096),
            ("cie.mid_times", self.cie.mid_times as u64, 1024),
            ("eval.batch_tokens", self.eval.batch_tokens as u64, LARGEST),
            ("prompt.style.max_tokens", self.prompt.style.max_tokens as u64, LARGEST),
            ("prompt.style.tokens_per_vector", self.prompt.style.tokens_per_vector as u64, 64),
            ("collab.mf.dim", mf.dim as u64, 16_384),
            ("collab.mf.batch_size", mf.batch_size as u64, LARGEST),
            ("collab.mf.max_epochs", mf.max_epochs as u64, LARGEST),
            ("collab.mf.patience", mf.patience as u64, LARGEST),
            ("collab.lightgcn.dim", gcn.dim as u64, 16_384),
            ("collab.lightgcn.layers", gcn.layers as u64, 16),
            ("collab.lightgcn.batch_size", gcn.batch_size as u64, LARGEST),
            ("collab.lightgcn.max_epochs", gcn.max_epochs as u64, LARGEST),
            ("collab.lightgcn.patience", gcn.patience as u64, LARGEST),
            ("collab.sasrec.dim", sasrec.dim as u64, 16_384),
            ("collab.sasrec.blocks", sasrec.blocks as u64, 64),
            ("collab.sasrec.heads", sasrec.heads as u64, 1024),
            ("collab.sasrec.max_length", sasrec.max_length as u64, 4096),
            ("collab.sasrec.batch_size", sasrec.batch_size as u64, LARGEST),
            ("collab.sasrec.max_epochs", sasrec.max_epochs as u64, LARGEST),
            ("collab.sasrec.patience", sasrec.patience as u64, LARGEST),
            ("collab.din.dim", din.dim as u64, 16_384),
            ("collab.din.max_length", din.max_length as u64, 4096),
            ("collab.din.batch_size", din.batch_size as u64, LARGEST),
            ("collab.din.max_epochs", din.max_epochs as u64, LARGEST),
            ("collab.din.patience", din.patience as u64, LARGEST),
            ("checkpoint.every_steps", self.checkpoint.every_steps, LARGEST),
        ])?;
        not_negative(&[
            ("collab.mf.learning_rate", mf.learning_rate),
            ("collab.mf.weight_decay", mf.weight_decay),
            ("collab.lightgcn.learning_rate", gcn.learning_rate),
            ("collab.lightgcn.weight_decay", gcn.weight_decay),
            ("collab.sasrec.learning_rate", sasrec.learning_rate),
            ("collab.sasrec.weight_decay", sasrec.weight_decay),
            ("collab.din.learning_rate", din.learning_rate),
            ("collab.din.weight_decay", din.weight_decay),
            ("lora.alpha", self.lora.alpha),
        ])?;
        if let Some(t) = self.lora.targets.iter().find(|t| Target::named(t).is_none()) {
            return fault("lora.targets", format!("holds {t:?}; known: {}", TARGETS.join(", ")));
        }
        if self.lora.targets.is_empty() {
            return fault("lora.targets", format!("is empty; expected some of {}", TARGETS.join(", ")));
        }
        for (key, p) in [
            ("lora.dropout", self.lora.dropout),
            ("collab.sasrec.dropout", sasrec.dropout),
            ("collab.din.dropout", din.dropout),
        ] {
            if !(0.0..1.0).contains(&p) {
                return fault(key, format!("is {p}; expected 0 <= dropout < 1"));
            }
        }
        for (key, heads) in
            [("collab.sasrec.heads", sasrec.heads), ("collab.sasrec.collm_heads", sasrec.collm_heads.max(1))]
        {
            if !sasrec.dim.is_multiple_of(heads) {
                return fault(key, format!("is {heads}; expected a divisor of collab.sasrec.dim = {}", sasrec.dim));
            }
        }
        if !din.dim.is_multiple_of(3) {
            return fault("collab.din.dim", format!("is {}; expected a multiple of 3: item, history, user", din.dim));
        }
        let known = CollabConfig::models();
        if !known.contains(&self.collab.model.as_str()) {
            return fault("collab.model", format!("is {:?}; known: {}", self.collab.model, known.join(", ")));
        }
        for (key, name) in [("prompt.stage1", &self.prompt.stage1), ("prompt.stage2", &self.prompt.stage2)] {
            Template::find(name).map_err(|e| (key.to_string(), format!("is not usable: {e}")))?;
        }
        if self.prompt.examples > 0 && self.method != Method::Icl {
            return fault("prompt.examples", "is set, but only method icl reads examples; set it to 0".into());
        }
        if let Some(what) = self.strategy_misfit() {
            return fault("strategy", what);
        }
        self.stage1.check("stage1")?;
        self.stage2_of_strategy().check("stage2")
    }
}

/// Lays a preset, after the one that it is based on.
fn lay_preset(layers: &mut Layers, name: &str) -> Result<(), Error> {
    if let Some((_, base, text)) = VARIANTS.iter().find(|v| v.0 == name) {
        if !base.is_empty() {
            lay_preset(layers, base)?;
        }
        return layers.text(text, name);
    }
    let (_, text) = PRESETS.iter().find(|p| p.0 == name).ok_or_else(|| {
        let what = format!("{name:?} is not a preset; presets: {}", Config::presets().join(", "));
        Error::Config { origin: "--preset".into(), what }
    })?;
    layers.text(text, name)
}

/// Largest count: products of two still fit 64 bits.
const LARGEST: u64 = 1_000_000_000;

fn counts(settings: &[(&str, u64, u64)]) -> Result<(), Fault> {
    match settings.iter().find(|s| !(1..=s.2).contains(&s.1)) {
        Some((key, 0, _)) => Err((key.to_string(), "is 0; expected at least 1".into())),
        Some((key, value, most)) => Err((key.to_string(), format!("is {value}; expected at most {most}"))),
        None => Ok(()),
    }
}

fn not_negative(settings: &[(&str, f64)]) -> Result<(), Fault> {
    match settings.iter().find(|s| !(s.1.is_finite() && s.1 >= 0.0)) {
        Some((key, value)) => Err((key.to_string(), format!("is {value}; expected a number of at least 0"))),
        None => Ok(()),
    }
}

impl StageConfig {
    fn check(&self, name: &str) -> Result<(), Fault> {
        let key = |key: &str| format!("{name}.{key}");
        counts(&[
            (&key("batch_rows"), self.batch_rows as u64, LARGEST),
            (&key("accumulation"), self.accumulation as u64, LARGEST),
            (&key("micro_batch_tokens"), self.micro_batch_tokens as u64, LARGEST),
            (&key("steps_per_epoch"), self.steps_per_epoch, LARGEST),
            (&key("max_epochs"), self.max_epochs, LARGEST),
        ])?;
        not_negative(&[
            (&key("learning_rate"), self.learning_rate),
            (&key("min_lr"), self.min_lr),
            (&key("warmup_lr"), self.warmup_lr),
            (&key("weight_decay"), self.weight_decay),
            (&key("grad_clip"), self.grad_clip),
        ])?;
        if self.schedule != ScheduleKind::Constant && self.min_lr > self.learning_rate {
            let (min, top) = (self.min_lr, self.learning_rate);
            return Err((
                key("min_lr"),
                format!("is {min}, above {name}.learning_rate = {top}: the rate would rise; lower it"),
            ));
        }
        if self.prefix_cache != PrefixCacheMode::Off && (self.train_lora || self.frozen_lora_dropout) {
            let which = if self.train_lora { "train_lora" } else { "frozen_lora_dropout" };
            return Err((
                key("prefix_cache"),
                format!(
                    "is on, but with {name}.{which} the text before the first slot differs in every step; set it off"
                ),
            ));
        }
        if !self.train_lora && !self.train_cie {
            return Err((
                key("train_lora"),
                format!("and {name}.train_cie are off: {name} trains nothing; set one of them"),
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(settings: &[&str]) -> String {
        Config::resolve(None, None, &settings.iter().map(|s| s.to_string()).collect::<Vec<_>>())
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn presets_resolve_and_round_trip() {
        for name in Config::presets() {
            let config =
                Config::resolve(Some(name), None, &["seed=7".into(), "stage1.learning_rate=1".into()]).unwrap();
            assert_eq!((config.seed, config.stage1.learning_rate), (7, 1.0));
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), config.to_toml().unwrap()).unwrap();
            assert_eq!(Config::resolve(None, Some(file.path()), &[]).unwrap(), config);
        }
    }

    fn file_error(text: &str) -> String {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        let e = Config::resolve(None, Some(file.path()), &[]).unwrap_err().to_string();
        e.strip_prefix(&format!("{}: ", file.path().display())).unwrap_or(&e).to_string()
    }

    #[test]
    fn unknown_keys_are_refused_with_a_suggestion() {
        assert_eq!(error(&["lora.rnak=4"]), "--set lora.rnak=4: unknown key lora.rnak; did you mean lora.rank?");
        let e = error(&["stage1.lerning_rate=4"]);
        assert!(e.ends_with("did you mean stage1.learning_rate?"), "{e}");
        let e = error(&["batch_rows=4"]);
        assert!(e.ends_with("did you mean stage2.batch_rows?"), "{e}");
        assert!(error(&["stage1.learning_rate.x=4"]).contains("unknown key stage1.learning_rate.x"));
        assert!(error(&["stage1"]).contains("expected key=value"));
        assert!(error(&["=3"]).contains("the key is empty"));
        assert!(error(&["lora=3"]).contains("lora is a table; name one of its keys: lora."));
        let e = file_error("seed = 1\n[stage1]\nbatch_row = 4\n");
        assert_eq!(e, "line 3: unknown key stage1.batch_row; did you mean stage1.batch_rows?");
    }

    /// The line of the key itself, not of its namesake in another table or of a longer one.
    #[test]
    fn faults_of_a_file_are_told_with_their_line() {
        let e = file_error("[stage1]\nbatch_rows = 4\nbatch_tokens = 1\n[stage2]\nbatch = 4\n");
        assert_eq!(e, "line 5: unknown key stage2.batch; did you mean stage2.batch_rows?");
        let e = file_error("[stage1]\nbatch_rows = 4\n\n[stage2]\nbatch_rows = \"a\"\n");
        assert_eq!(e, "line 5: stage2.batch_rows is \"a\"; expected a value of type integer");
        let e = file_error("# stage2\nstage2.batch_row = 4\n");
        assert_eq!(e, "line 2: unknown key stage2.batch_row; did you mean stage2.batch_rows?");
        let e = file_error("stage2 = { seed = 1, batch_rows = 0 }");
        assert!(e.starts_with("line 1: unknown key stage2.seed"), "{e}");
        assert_eq!(file_error("stage2 = 4"), "line 1: stage2 is integer; expected a table, [stage2]");
        assert_eq!(file_error("[stages]\n"), "line 1: unknown key stages; did you mean stage2?");
        assert_eq!(file_error("[lora.x]\n"), "line 1: unknown key lora.x");
        let e = file_error("[stage1]\nschedule = \"linear\"\n");
        assert!(e.starts_with("line 2: stage1.schedule: unknown variant `linear`, expected one of `constant`"), "{e}");
        let e = file_error("[stage1]\nbatch_rows = 4\n[stage2]\nbatch_rows = 0\n");
        assert_eq!(e, "line 4: stage2.batch_rows is 0; expected at least 1");
        assert!(file_error("[stage1]\nbatch_rows =\n").contains("line 2, column 13"));
    }

    #[test]
    fn bad_values_say_what_is_expected() {
        assert_eq!(
            error(&["stage1.batch_rows=0"]),
            "--set stage1.batch_rows=0: stage1.batch_rows is 0; expected at least 1"
        );
        assert!(
            error(&["stage1.batch_rows=-1"]).ends_with("stage1.batch_rows is -1; expected an integer of at least 0")
        );
        assert!(error(&["stage1.batch_rows=many"]).contains("\"many\" is not a value of type integer"));
        assert!(error(&["seed=1\nx=2"]).contains("is not a value of type integer"));
        assert!(error(&["lora.dropout=1.5"]).contains("expected 0 <= dropout < 1"));
        assert!(error(&["lora.alpha=nan"]).ends_with("lora.alpha is NaN; expected a number of at least 0"));
        assert!(error(&["lora.targets=[\"x_proj\"]"]).contains("known: q_proj"));
        assert!(error(&["lora.targets=[]"]).contains("lora.targets is empty"));
        assert!(error(&["lora.targets=[1]"]).starts_with("--set lora.targets=[1]: lora.targets"));
        assert!(
            error(&["stage1.schedule=linear"])
                .starts_with("--set stage1.schedule=linear: stage1.schedule: unknown variant")
        );
        assert!(
            error(&["stage2.learning_rate=1e-5"])
                .contains("stage2.min_lr is 0.00008, above stage2.learning_rate = 0.00001")
        );
        assert!(error(&["stage2.train_cie=false"]).contains("stage2 trains nothing"));
        assert!(error(&["stage1.max_epochs=99999999999"]).ends_with("expected at most 1000000000"));
        assert!(error(&["collab.sasrec.heads=3"]).ends_with("is 3; expected a divisor of collab.sasrec.dim = 64"));
        assert!(error(&["collab.din.dim=64"]).ends_with("is 64; expected a multiple of 3: item, history, user"));
        assert!(error(&["collab.din.dropout=1"]).contains("expected 0 <= dropout < 1"));
        assert!(error(&["collab.model=ncf"]).ends_with("is \"ncf\"; known: mf, lightgcn, sasrec, din"));
        assert!(error(&["collab.mf.patience=0"]).ends_with("collab.mf.patience is 0; expected at least 1"));
        assert!(
            error(&["prompt.stage1=nope"]).contains("prompt.stage1 is not usable: template nope: neither a built-in")
        );
        assert!(Config::resolve(Some("ml-1m"), None, &[]).unwrap_err().to_string().contains("presets: ml-1m/collm-mf"));
    }

    #[test]
    fn text_needs_no_quotes() {
        let settings = [
            "data.dir=/a b",
            "llm.dir=\"q\"",
            "prompt.style.begin=#x",
            "stage1.batch_rows=5 # five",
            "prompt.style.empty_history=a\"b",
        ];
        let c = Config::resolve(None, None, &settings.map(String::from)).unwrap();
        assert_eq!((c.data.dir.as_str(), c.llm.dir.as_str(), c.prompt.style.begin.as_str()), ("/a b", "q", "#x"));
        assert_eq!((c.stage1.batch_rows, c.prompt.style.empty_history.as_str()), (5, "a\"b"));
    }
}
