//! LoRA adapters, in memory and in the layout of Hugging Face PEFT
//! (`adapter_config.json` + `adapter_model.safetensors`).

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::weights::module_shapes;
use super::{Error, ModelConfig};
use crate::files::write_atomic;
use crate::rng::Rng;

/// The linear layers that can carry a pair, in the order of [`Target`].
pub const TARGETS: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// A linear layer of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Target {
    /// Queries.
    Q,
    /// Keys.
    K,
    /// Values.
    V,
    /// Attention output.
    O,
    /// MLP gate.
    Gate,
    /// MLP up.
    Up,
    /// MLP down.
    Down,
}

impl Target {
    /// All of them, in order.
    pub const ALL: [Target; 7] = [Target::Q, Target::K, Target::V, Target::O, Target::Gate, Target::Up, Target::Down];

    /// By its name in Hugging Face models (`q_proj`).
    pub fn named(name: &str) -> Option<Target> {
        TARGETS.iter().position(|t| *t == name).map(|i| Target::ALL[i])
    }

    fn module(self) -> &'static str {
        if self < Target::Gate { "self_attn" } else { "mlp" }
    }
}

/// One pair: `y += scaling · (x Aᵀ) Bᵀ`.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraPair {
    /// `[rank, in_features]`.
    pub a: Vec<f32>,
    /// `[out_features, rank]`.
    pub b: Vec<f32>,
}

/// An adapter, or the gradients of one (same shapes).
#[derive(Clone, Debug, PartialEq)]
pub struct LoraTensors {
    /// r.
    pub rank: usize,
    /// Scaling is `alpha / r`, or `alpha / √r` with `rslora`.
    pub alpha: f64,
    /// Probability of dropping an input element in training.
    pub dropout: f64,
    /// Rank-stabilised scaling.
    pub rslora: bool,
    /// The pairs, by block and layer.
    pub tensors: BTreeMap<(usize, Target), LoraPair>,
}

impl LoraTensors {
    /// PEFT's default start: A uniform in ±1/√in_features (kaiming with a = √5), B zero.
    pub fn init(config: &ModelConfig, targets: &[Target], rank: usize, alpha: f64, dropout: f64, seed: u64) -> Self {
        let shapes = module_shapes(config);
        let mut tensors = BTreeMap::new();
        for l in 0..config.n_layers {
            for &target in targets {
                let (out_features, in_features) = shapes[target as usize];
                let mut rng = Rng::new(seed, 0x10a << 32 | (l * TARGETS.len() + target as usize) as u64);
                let bound = 1.0 / (in_features as f64).sqrt();
                let a = (0..rank * in_features).map(|_| ((2.0 * rng.uniform() - 1.0) * bound) as f32).collect();
                tensors.insert((l, target), LoraPair { a, b: vec![0.0; out_features * rank] });
            }
        }
        LoraTensors { rank, alpha, dropout, rslora: false, tensors }
    }

    /// The same shapes, all zero.
    pub fn zeros_like(&self) -> Self {
        let mut zeros = self.clone();
        zeros.fill_zero();
        zeros
    }

    /// Sets everything to zero.
    pub fn fill_zero(&mut self) {
        for pair in self.tensors.values_mut() {
            pair.a.fill(0.0);
            pair.b.fill(0.0);
        }
    }

    /// Factor of the adapter's output.
    pub fn scaling(&self) -> f32 {
        let rank = self.rank as f64;
        (self.alpha / if self.rslora { rank.sqrt() } else { rank }) as f32
    }

    /// Trained numbers.
    pub fn n_params(&self) -> usize {
        self.tensors.values().map(|p| p.a.len() + p.b.len()).sum()
    }

    /// Identifies the adapter by what it computes: SHA-256 over scaling, names and values.
    pub fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        hash.update(self.scaling().to_le_bytes());
        for (name, values) in self.named() {
            hash.update(name);
            hash.update(bytemuck::cast_slice::<_, u8>(values));
        }
        hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
    }

    /// PEFT's key of every tensor, and its values: A before B, block by block.
    pub fn named(&self) -> Vec<(String, &[f32])> {
        self.tensors.iter().flat_map(|(&at, p)| [(key(at, 'A'), &p.a[..]), (key(at, 'B'), &p.b[..])]).collect()
    }

    /// The tensors in the order of [`Self::named`], to be changed.
    pub fn slices_mut(&mut self) -> Vec<&mut [f32]> {
        self.tensors.values_mut().flat_map(|p| [&mut p.a[..], &mut p.b[..]]).collect()
    }

    /// Shapes in the order of [`Self::named`].
    pub fn shapes(&self) -> Vec<Vec<usize>> {
        let rank = self.rank;
        self.tensors.values().flat_map(|p| [vec![rank, p.a.len() / rank], vec![p.b.len() / rank, rank]]).collect()
    }

    /// Reads an adapter directory as PEFT writes it. Options this engine does not compute (DoRA, per-layer ranks, biases,
    /// saved modules) are refused by name.
    pub fn load(dir: &Path, config: &ModelConfig) -> Result<Self, Error> {
        let path = dir.join("adapter_config.json");
        let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
        let bad = |what: String| Error::Adapter { path: path.clone(), what };
        let raw: Raw = serde_json::from_str(&text).map_err(|e| bad(format!("not an adapter configuration: {e}")))?;
        let targets = raw.check(config).map_err(bad)?;

        let path = dir.join("adapter_model.safetensors");
        let bad = |what: String| Error::Adapter { path: path.clone(), what };
        let bytes = std::fs::read(&path).map_err(Error::io(&path))?;
        let file = SafeTensors::deserialize(&bytes).map_err(|e| bad(format!("not a whole safetensors file: {e}")))?;
        let mut lora = LoraTensors::init(config, &targets, raw.r, raw.lora_alpha, raw.lora_dropout, 0);
        lora.rslora = raw.use_rslora;
        let mut problems = Vec::new();
        let (shapes, names) = (lora.shapes(), lora.named().into_iter().map(|(n, _)| n).collect::<Vec<_>>());
        for ((name, shape), slot) in names.iter().zip(shapes).zip(lora.slices_mut()) {
            match file.tensor(name) {
                Err(_) => problems.push(format!("missing {name} {shape:?}")),
                Ok(t) if t.shape() != shape => {
                    problems.push(format!("{name} has shape {:?}, expected {shape:?}", t.shape()))
                }
                Ok(t) => match widen(&t) {
                    Some(values) => slot.copy_from_slice(&values),
                    None => problems.push(format!("{name} has type {:?}; supported: F32, F16, BF16", t.dtype())),
                },
            }
        }
        let extra = file.names().into_iter().filter(|n| !names.iter().any(|m| m == n));
        problems.extend(extra.map(|n| format!("unexpected {n}")));
        if problems.is_empty() {
            return Ok(lora);
        }
        let more = problems.len().saturating_sub(5);
        problems.truncate(5);
        let rest = if more > 0 { format!("; and {more} more") } else { String::new() };
        Err(bad(format!("{}{rest}", problems.join("; "))))
    }

    /// Writes the adapter so that `PeftModel.from_pretrained` reads it. `base_model` is recorded as the base's name.
    pub fn save(&self, dir: &Path, base_model: &str) -> Result<(), Error> {
        std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
        let present: Vec<&str> = Target::ALL
            .iter()
            .filter(|t| self.tensors.keys().any(|k| k.1 == **t))
            .map(|t| TARGETS[*t as usize])
            .collect();
        let config = json!({
            "base_model_name_or_path": base_model, "bias": "none", "fan_in_fan_out": false, "inference_mode": true,
            "init_lora_weights": true, "layers_pattern": null, "layers_to_transform": null, "lora_alpha": self.alpha,
            "lora_dropout": self.dropout, "modules_to_save": null, "peft_type": "LORA", "r": self.rank,
            "revision": null, "target_modules": present, "task_type": "CAUSAL_LM", "use_dora": false,
            "use_rslora": self.rslora, "rank_pattern": {}, "alpha_pattern": {},
        });
        let path = dir.join("adapter_config.json");
        let text = serde_json::to_string_pretty(&config)
            .map_err(|e| Error::Adapter { path: path.clone(), what: e.to_string() })?;
        write_atomic(&path, |w| w.write_all(text.as_bytes())).map_err(Error::io(&path))?;
        let path = dir.join("adapter_model.safetensors");
        let bytes = self.to_safetensors().map_err(|e| Error::Adapter { path: path.clone(), what: e.to_string() })?;
        write_atomic(&path, |w| w.write_all(&bytes)).map_err(Error::io(&path))
    }

    fn to_safetensors(&self) -> Result<Vec<u8>, safetensors::SafeTensorError> {
        let named = self.named().into_iter().zip(self.shapes());
        let views: Result<Vec<_>, safetensors::SafeTensorError> = named
            .map(|((name, values), shape)| {
                TensorView::new(Dtype::F32, shape, bytemuck::cast_slice(values)).map(|view| (name, view))
            })
            .collect();
        safetensors::serialize(views?, Some([("format".to_string(), "pt".to_string())].into()))
    }
}

fn key((l, target): (usize, Target), ab: char) -> String {
    format!("base_model.model.model.layers.{l}.{}.{}.lora_{ab}.weight", target.module(), TARGETS[target as usize])
}

/// A tensor's values as float32, if it is of a float type.
fn widen(t: &TensorView) -> Option<Vec<f32>> {
    let halves = || t.data().chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
    match t.dtype() {
        Dtype::F32 => Some(bytemuck::pod_collect_to_vec(t.data())),
        Dtype::BF16 => Some(halves().map(|b| half::bf16::from_bits(b).to_f32()).collect()),
        Dtype::F16 => Some(halves().map(|b| half::f16::from_bits(b).to_f32()).collect()),
        _ => None,
    }
}

#[derive(Deserialize)]
struct Raw {
    peft_type: String,
    r: usize,
    lora_alpha: f64,
    #[serde(default)]
    lora_dropout: f64,
    target_modules: Value,
    #[serde(default)]
    use_rslora: bool,
    #[serde(flatten)]
    rest: BTreeMap<String, Value>,
}

impl Raw {
    fn check(&self, config: &ModelConfig) -> Result<Vec<Target>, String> {
        if self.peft_type != "LORA" {
            return Err(format!("peft_type {:?} is not supported; supported: LORA", self.peft_type));
        }
        if !(1..=config.hidden_size.max(config.intermediate_size)).contains(&self.r) {
            return Err(format!("r is {}; expected 1 to the width of the model", self.r));
        }
        if !(0.0..1.0).contains(&self.lora_dropout) || !self.lora_alpha.is_finite() {
            return Err(format!(
                "lora_dropout {} or lora_alpha {} is out of range",
                self.lora_dropout, self.lora_alpha
            ));
        }
        let unused = |v: &Value| match v {
            Value::Null | Value::Bool(false) => true,
            Value::Object(o) => o.is_empty(),
            Value::Array(a) => a.is_empty(),
            Value::String(s) => s == "none",
            _ => false,
        };
        for name in [
            "bias",
            "fan_in_fan_out",
            "modules_to_save",
            "use_dora",
            "rank_pattern",
            "alpha_pattern",
            "layers_to_transform",
            "layers_pattern",
            "layer_replication",
            "lora_bias",
            "trainable_token_indices",
            "target_parameters",
        ] {
            if let Some(v) = self.rest.get(name).filter(|v| !unused(v)) {
                return Err(format!("{name} = {v} is not supported; train the adapter without it"));
            }
        }
        let names: Vec<&str> = match &self.target_modules {
            Value::Array(list) => list.iter().filter_map(Value::as_str).collect(),
            Value::String(s) if s == "all-linear" => TARGETS.to_vec(),
            other => return Err(format!("target_modules is {other}; expected a list out of {}", TARGETS.join(", "))),
        };
        let mut targets: Vec<Target> = Vec::new();
        for name in names {
            let target = Target::named(name);
            targets.push(target.ok_or_else(|| {
                format!("target module {name:?} is not supported; supported: {}", TARGETS.join(", "))
            })?);
        }
        targets.sort();
        targets.dedup();
        if targets.is_empty() {
            return Err(format!("target_modules is empty; expected some of {}", TARGETS.join(", ")));
        }
        Ok(targets)
    }
}
