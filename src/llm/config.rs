//! The architecture of a model: Hugging Face's `config.json`, checked.
//!
//! Reads the dialect of the Hub (`rope_theta`, `rope_scaling`, `torch_dtype`) and that of transformers 5
//! (`rope_parameters`, `dtype`). What the engine cannot run faithfully is refused here, by name.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::Error;

/// Which family the configuration names. They differ in defaults only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// LLaMA 1–3, Vicuna, SmolLM2.
    Llama,
    /// Mistral 7B.
    Mistral,
    /// Qwen2 and Qwen2.5: biases on q, k and v.
    Qwen2,
}

/// How rotary frequencies are stretched.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// All frequencies divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// LLaMA 3.1: low frequencies divided by `factor`, high ones kept, a ramp between.
    Llama3 {
        /// The divisor of low frequencies.
        factor: f64,
        /// Wavelengths above `original / low` are low frequencies.
        low_freq_factor: f64,
        /// Wavelengths below `original / high` are kept.
        high_freq_factor: f64,
        /// Context length the model was first trained with.
        original_max_position_embeddings: f64,
    },
}

impl RopeScaling {
    /// The stretched form of frequency `f`.
    pub fn apply(&self, f: f64) -> f64 {
        match *self {
            RopeScaling::Default => f,
            RopeScaling::Linear { factor } => f / factor,
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                let turns = original_max_position_embeddings * f / std::f64::consts::TAU;
                // 0 where the wavelength is long (divide), 1 where it is short (keep).
                let keep = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                (1.0 - keep) * f / factor + keep * f
            }
        }
    }
}

/// A checked model configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Family.
    pub architecture: Architecture,
    /// Rows of the embedding table.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Blocks.
    pub n_layers: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key/value heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// Width of a head; even.
    pub head_dim: usize,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Stretching of the rotary frequencies.
    pub rope_scaling: RopeScaling,
    /// Output embedding = input embedding.
    pub tie_word_embeddings: bool,
    /// q, k and v have biases.
    pub qkv_bias: bool,
    /// o has a bias.
    pub o_bias: bool,
    /// gate, up and down have biases.
    pub mlp_bias: bool,
    /// Longest input the model knows.
    pub max_position_embeddings: usize,
    /// Longest input before a sliding window would hide tokens (Mistral); longer ones are refused.
    pub sliding_window: Option<usize>,
}

#[derive(Deserialize)]
struct Raw {
    model_type: Option<String>,
    architectures: Option<Vec<String>>,
    vocab_size: Option<usize>,
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    rms_norm_eps: Option<f64>,
    rope_theta: Option<f64>,
    rope_scaling: Option<Value>,
    rope_parameters: Option<Value>,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    max_position_embeddings: Option<usize>,
    sliding_window: Option<usize>,
    use_sliding_window: Option<bool>,
    hidden_act: Option<String>,
    quantization_config: Option<Value>,
}

/// Bound on every size: far above any model, far below overflow.
const LARGEST: usize = 1 << 24;

impl ModelConfig {
    /// Reads `config.json` of a model directory.
    pub fn from_dir(dir: &Path) -> Result<Self, Error> {
        let path = dir.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
        Self::from_json(&text, &path)
    }

    /// Parses the text of a `config.json`; `path` is for messages.
    pub fn from_json(text: &str, path: &Path) -> Result<Self, Error> {
        let error = |what: String| Error::Config { path: path.to_path_buf(), what };
        let raw: Raw = serde_json::from_str(text).map_err(|e| error(format!("not a model configuration: {e}")))?;
        Self::from_raw(raw).map_err(error)
    }

    fn from_raw(raw: Raw) -> Result<Self, String> {
        let named = raw.model_type.clone().or_else(|| raw.architectures.as_ref()?.first().cloned());
        let architecture = match named.as_deref() {
            Some("llama" | "LlamaForCausalLM") => Architecture::Llama,
            Some("mistral" | "MistralForCausalLM") => Architecture::Mistral,
            Some("qwen2" | "Qwen2ForCausalLM") => Architecture::Qwen2,
            Some(other) => {
                return Err(format!("model_type {other:?} is not supported; supported: llama, mistral, qwen2"));
            }
            None => return Err("model_type is missing; supported: llama, mistral, qwen2".into()),
        };
        if raw.quantization_config.is_some() {
            return Err(
                "quantized checkpoints are not supported; use the f32, f16 or bf16 weights, or convert a GGUF".into()
            );
        }
        if let Some(act) = raw.hidden_act.filter(|a| a != "silu" && a != "swish") {
            return Err(format!("hidden_act {act:?} is not supported; supported: silu"));
        }
        let need = |name: &str, value: Option<usize>| match value {
            Some(v) if (1..=LARGEST).contains(&v) => Ok(v),
            Some(v) => Err(format!("{name} is {v}; expected 1 to {LARGEST}")),
            None => Err(format!("{name} is missing")),
        };
        let hidden_size = need("hidden_size", raw.hidden_size)?;
        let n_heads = need("num_attention_heads", raw.num_attention_heads)?;
        let n_kv_heads = need("num_key_value_heads", raw.num_key_value_heads.or(Some(n_heads)))?;
        if n_heads % n_kv_heads != 0 {
            return Err(format!("num_attention_heads {n_heads} is not a multiple of num_key_value_heads {n_kv_heads}"));
        }
        if raw.head_dim.is_none() && hidden_size % n_heads != 0 {
            return Err(format!(
                "hidden_size {hidden_size} is not a multiple of num_attention_heads {n_heads}, and head_dim is missing"
            ));
        }
        let head_dim = need("head_dim", raw.head_dim.or(Some(hidden_size / n_heads)))?;
        if head_dim % 2 != 0 {
            return Err(format!("head_dim {head_dim} is odd; rotary embedding needs pairs"));
        }
        let (rope_theta, rope_scaling) = rope(raw.rope_theta, raw.rope_parameters, raw.rope_scaling)?;
        let rms_norm_eps = raw.rms_norm_eps.unwrap_or(1e-6);
        if !(rms_norm_eps > 0.0 && rms_norm_eps < 1.0) {
            return Err(format!("rms_norm_eps is {rms_norm_eps}; expected a small positive number"));
        }
        let qwen = architecture == Architecture::Qwen2;
        let llama_bias = architecture == Architecture::Llama && raw.attention_bias.unwrap_or(false);
        // Qwen2 keeps a window in its configuration but uses it only when told to.
        let window_in_use =
            if qwen { raw.use_sliding_window.unwrap_or(false) } else { architecture == Architecture::Mistral };
        Ok(ModelConfig {
            architecture,
            vocab_size: need("vocab_size", raw.vocab_size)?,
            hidden_size,
            intermediate_size: need("intermediate_size", raw.intermediate_size)?,
            n_layers: need("num_hidden_layers", raw.num_hidden_layers)?,
            n_heads,
            n_kv_heads,
            head_dim,
            rms_norm_eps,
            rope_theta,
            rope_scaling,
            tie_word_embeddings: raw.tie_word_embeddings.unwrap_or(false),
            qkv_bias: qwen || llama_bias,
            o_bias: llama_bias,
            mlp_bias: architecture == Architecture::Llama && raw.mlp_bias.unwrap_or(false),
            max_position_embeddings: need("max_position_embeddings", raw.max_position_embeddings.or(Some(2048)))?,
            sliding_window: raw.sliding_window.filter(|_| window_in_use),
        })
    }

    /// Rotary frequencies, `[head_dim / 2]`, after scaling.
    pub fn inv_freq(&self) -> Vec<f64> {
        let base = |i: usize| self.rope_theta.powf(-((2 * i) as f64) / self.head_dim as f64);
        (0..self.head_dim / 2).map(|i| self.rope_scaling.apply(base(i))).collect()
    }

    /// Longest prompt the engine may run: what the positions and the attention window allow.
    pub fn longest_prompt(&self) -> usize {
        self.sliding_window.map_or(self.max_position_embeddings, |w| w.min(self.max_position_embeddings))
    }

    /// All parameters of the model.
    pub fn parameters(&self) -> usize {
        let (q, kv) = (self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim);
        let biases = [
            (self.qkv_bias, q + 2 * kv),
            (self.o_bias, self.hidden_size),
            (self.mlp_bias, 2 * self.intermediate_size + self.hidden_size),
        ];
        let biases: usize = biases.into_iter().filter(|b| b.0).map(|b| b.1).sum();
        let tables = if self.tie_word_embeddings { 1 } else { 2 };
        tables * self.vocab_size * self.hidden_size
            + self.n_layers * (self.block_params() + 2 * self.hidden_size + biases)
            + self.hidden_size
    }

    /// Weights in the blocks' matrices: the multiply-adds of one token.
    pub fn block_params(&self) -> usize {
        let (q, kv) = (self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim);
        self.hidden_size * (2 * q + 2 * kv + 3 * self.intermediate_size)
    }
}

fn rope(theta: Option<f64>, parameters: Option<Value>, scaling: Option<Value>) -> Result<(f64, RopeScaling), String> {
    let null = |v: &Value| v.is_null();
    let block = parameters.filter(|v| !null(v)).or(scaling.filter(|v| !null(v))).unwrap_or(Value::Null);
    let number = |name: &str| match block.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(v) => match v.as_f64() {
            Some(x) if x.is_finite() && x > 0.0 => Ok(Some(x)),
            _ => Err(format!("rope parameter {name} is {v}; expected a positive number")),
        },
    };
    let need = |name: &str| number(name)?.ok_or_else(|| format!("rope parameter {name} is missing"));
    let theta = number("rope_theta")?.or(theta).unwrap_or(10_000.0);
    if !(theta.is_finite() && theta > 1.0) {
        return Err(format!("rope_theta is {theta}; expected a number above 1"));
    }
    let kind = block.get("rope_type").or_else(|| block.get("type")).and_then(Value::as_str).unwrap_or("default");
    let scaling = match kind {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear { factor: need("factor")? },
        "llama3" => {
            let (low_freq_factor, high_freq_factor) = (need("low_freq_factor")?, need("high_freq_factor")?);
            if high_freq_factor <= low_freq_factor {
                return Err(format!(
                    "rope: high_freq_factor {high_freq_factor} must exceed low_freq_factor {low_freq_factor}"
                ));
            }
            RopeScaling::Llama3 {
                factor: need("factor")?,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings: need("original_max_position_embeddings")?,
            }
        }
        other => return Err(format!("rope type {other:?} is not supported; supported: default, linear, llama3")),
    };
    Ok((theta, scaling))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(patch: &str) -> Result<ModelConfig, String> {
        let mut config: Value = serde_json::from_str(
            r#"{"model_type":"llama","vocab_size":320,"hidden_size":64,"intermediate_size":96,"num_hidden_layers":2,
            "num_attention_heads":4,"rms_norm_eps":1e-5,"max_position_embeddings":512}"#,
        )
        .unwrap();
        let patch: Value = serde_json::from_str(patch).unwrap();
        config.as_object_mut().unwrap().extend(patch.as_object().unwrap().clone());
        ModelConfig::from_json(&config.to_string(), Path::new("config.json")).map_err(|e| e.to_string())
    }

    #[test]
    fn both_dialects_say_the_same() {
        let hub = parse(r#"{"rope_theta":1e6,"rope_scaling":{"type":"linear","factor":4.0}}"#).unwrap();
        let v5 = parse(r#"{"rope_parameters":{"rope_theta":1e6,"rope_type":"linear","factor":4.0}}"#).unwrap();
        assert_eq!(hub, v5);
        assert_eq!(hub.n_kv_heads, 4);
        assert_eq!(hub.head_dim, 16);
        let f = hub.inv_freq();
        assert_eq!(f.len(), 8);
        assert_eq!(f[0], 0.25);
        assert!((f[4] - 1e-3 / 4.0).abs() < 1e-18, "theta^(-8/16) = 1e-3");
    }

    #[test]
    fn llama3_ramp_by_hand() {
        let c = parse(
            r#"{"rope_theta":10000.0,"rope_scaling":{"rope_type":"llama3","factor":8.0,"low_freq_factor":1.0,
            "high_freq_factor":4.0,"original_max_position_embeddings":100}}"#,
        )
        .unwrap();
        let f = c.inv_freq();
        // i = 0: f = 1, 100 / 2π = 15.9 turns ≥ 4: kept. i = 1: f = 10^-0.5, 5.03 turns: kept.
        assert_eq!(f[0], 1.0);
        assert!((f[1] - 0.316_227_766_016_838).abs() < 1e-14);
        // i = 2: f = 0.1, turns = 10 / 2π = 1.5915494309: keep = 0.1971831436.
        let keep = (1.591_549_430_918_953_5 - 1.0) / 3.0;
        assert!((f[2] - (0.1 * keep + 0.1 / 8.0 * (1.0 - keep))).abs() < 1e-14);
        // i = 3: f = 10^-1.5, 0.503 turns: divided.
        assert!((f[3] - 0.031_622_776_601_683_8 / 8.0).abs() < 1e-15);
    }

    #[test]
    fn refusals_name_what_and_what_would_be_right() {
        for (patch, want) in [
            (r#"{"model_type":"gpt2"}"#, "model_type \"gpt2\" is not supported; supported: llama, mistral, qwen2"),
            (r#"{"hidden_act":"gelu"}"#, "hidden_act \"gelu\" is not supported"),
            (r#"{"num_key_value_heads":3}"#, "not a multiple of num_key_value_heads 3"),
            (r#"{"num_attention_heads":7}"#, "not a multiple of num_attention_heads 7"),
            (r#"{"head_dim":15}"#, "head_dim 15 is odd"),
            (r#"{"hidden_size":0}"#, "hidden_size is 0"),
            (r#"{"vocab_size":null}"#, "vocab_size is missing"),
            (r#"{"rope_scaling":{"type":"yarn","factor":2}}"#, "rope type \"yarn\" is not supported"),
            (r#"{"rope_scaling":{"type":"linear"}}"#, "rope parameter factor is missing"),
            (r#"{"quantization_config":{}}"#, "quantized checkpoints are not supported"),
        ] {
            let e = parse(patch).unwrap_err();
            assert!(e.starts_with("config.json: ") && e.contains(want), "{patch}: {e}");
        }
    }

    #[test]
    fn windows_count_only_where_they_are_used() {
        let qwen = r#"{"model_type":"qwen2","sliding_window":128,"use_sliding_window":false}"#;
        assert_eq!(parse(qwen).unwrap().longest_prompt(), 512);
        let mistral = parse(r#"{"model_type":"mistral","sliding_window":128}"#).unwrap();
        assert_eq!(mistral.longest_prompt(), 128);
        assert!(parse(qwen).unwrap().qkv_bias && !mistral.qkv_bias);
    }
}
