//! A GGUF file becomes a Hugging Face model directory: `config.json`, `model.safetensors` (bf16), `tokenizer.json`.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use half::bf16;
use safetensors::{Dtype, View};
use serde_json::json;

use super::gguf::{Gguf, TensorInfo, Value};
use super::{Error, ModelConfig, RopeScaling, gguf_tokenizer};
use crate::files::write_atomic;

/// What a conversion wrote.
#[derive(Clone, Debug)]
pub struct Summary {
    /// Tensors.
    pub tensors: usize,
    /// Weights.
    pub parameters: usize,
    /// Tokens of the vocabulary.
    pub vocab_size: usize,
}

/// Converts `gguf` into the directory `out`, which appears whole or not at all. An existing `out` is replaced only with
/// `force`.
pub fn convert_gguf(gguf: &Path, out: &Path, force: bool) -> Result<Summary, Error> {
    let occupied = out.read_dir().is_ok_and(|mut d| d.next().is_some());
    let error = |what: &str| Error::Gguf { path: out.to_path_buf(), what: what.into() };
    if occupied && !force {
        return Err(error("is not empty; choose another directory or pass --force"));
    }
    let file = Gguf::open(gguf)?;
    let config = config(&file)?;
    let parent = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent).map_err(Error::io(parent))?;
    let temporary = tempfile::Builder::new().prefix(".converting-").tempdir_in(parent).map_err(Error::io(parent))?;
    let dir = temporary.path();

    let path = dir.join("config.json");
    write_json(&path, &config)?;
    let parsed = ModelConfig::from_json(&config.to_string(), &path)?;
    let tokenizer = gguf_tokenizer::tokenizer_json(&file)?;
    write_json(&dir.join("tokenizer.json"), &tokenizer)?;
    write_json(&dir.join("tokenizer_config.json"), &gguf_tokenizer::tokenizer_config(&file)?)?;

    let tensors = tensors(&file, &parsed)?;
    let summary = Summary {
        tensors: tensors.len(),
        parameters: tensors.values().map(|t| t.info.shape.iter().product::<usize>()).sum(),
        vocab_size: parsed.vocab_size,
    };
    let path = dir.join("model.safetensors");
    let metadata = [("format".to_string(), "pt".to_string())].into();
    safetensors::serialize_to_file(tensors, Some(metadata), &path)
        .map_err(|e| Error::Io { path: path.clone(), source: std::io::Error::other(e) })?;
    std::fs::File::open(&path).and_then(|f| f.sync_all()).map_err(Error::io(&path))?;

    if occupied {
        std::fs::remove_dir_all(out).map_err(Error::io(out))?;
    } else if out.exists() {
        std::fs::remove_dir(out).map_err(Error::io(out))?;
    }
    let dir = temporary.keep();
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o755)).map_err(Error::io(&dir))?;
    }
    std::fs::rename(&dir, out).map_err(Error::io(out))?;
    Ok(summary)
}

fn write_json(path: &Path, value: &serde_json::Value) -> Result<(), Error> {
    write_atomic(path, |w| {
        serde_json::to_writer_pretty(&mut *w, value)?;
        w.write_all(b"\n")
    })
    .map_err(Error::io(path))
}

fn config(file: &Gguf) -> Result<serde_json::Value, Error> {
    let arch = file.text("general.architecture")?.to_string();
    let (model_type, class) = match arch.as_str() {
        "llama" => ("llama", "LlamaForCausalLM"),
        "qwen2" => ("qwen2", "Qwen2ForCausalLM"),
        other => return Err(file.error(format!("architecture {other:?} is not supported; supported: llama, qwen2"))),
    };
    let key = |name: &str| format!("{arch}.{name}");
    let need =
        |name: &str| file.size(&key(name))?.ok_or_else(|| file.error(format!("metadata {} is missing", key(name))));
    let (hidden, heads) = (need("embedding_length")?, need("attention.head_count")?);
    let tokens = file.list("tokenizer.ggml.tokens")?.len();
    let vocab = file.tensors().get("token_embd.weight").map_or(tokens, |t| t.shape[0]);
    let head_dim = file.size(&key("attention.key_length"))?.unwrap_or(hidden / heads.max(1));
    let scaling = match file.tensors().get("rope_freqs.weight") {
        Some(info) => llama3_scaling(file, &key, info)?,
        None => match file.get(&key("rope.scaling.type")) {
            Some(Value::Text(t)) if t != "none" => {
                json!({"rope_type": t, "factor": file.number(&key("rope.scaling.factor"))?})
            }
            _ => serde_json::Value::Null,
        },
    };
    let has = |name: &str| file.tensors().contains_key(name);
    Ok(json!({
        "architectures": [class],
        "model_type": model_type,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": need("feed_forward_length")?,
        "num_hidden_layers": need("block_count")?,
        "num_attention_heads": heads,
        "num_key_value_heads": file.size(&key("attention.head_count_kv"))?.unwrap_or(heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": need("context_length")?,
        "rms_norm_eps": file.number(&key("attention.layer_norm_rms_epsilon"))?.unwrap_or(1e-6),
        "rope_theta": file.number(&key("rope.freq_base"))?.unwrap_or(10_000.0),
        "rope_scaling": scaling,
        "attention_bias": model_type == "llama" && has("blk.0.attn_q.bias"),
        "mlp_bias": has("blk.0.ffn_gate.bias"),
        "tie_word_embeddings": !has("output.weight"),
        "bos_token_id": file.size("tokenizer.ggml.bos_token_id")?,
        "eos_token_id": file.size("tokenizer.ggml.eos_token_id")?,
        "torch_dtype": "bfloat16",
    }))
}

/// GGUF keeps LLaMA 3.1's frequency scaling as a tensor of divisors: find the published parameters that give them.
fn llama3_scaling(file: &Gguf, key: &dyn Fn(&str) -> String, info: &TensorInfo) -> Result<serde_json::Value, Error> {
    let divisors = file.decode(info);
    let theta = file.number(&key("rope.freq_base"))?.unwrap_or(10_000.0);
    for factor in [8.0, 32.0] {
        let scaling = RopeScaling::Llama3 {
            factor,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192.0,
        };
        let (n, fits) = (divisors.len(), |(i, &d): (usize, &f32)| {
            let f = theta.powf(-(i as f64) / divisors.len() as f64);
            (scaling.apply(f) * f64::from(d) / f - 1.0).abs() < 1e-3
        });
        if n > 0 && divisors.iter().enumerate().all(fits) {
            return Ok(
                json!({"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192}),
            );
        }
    }
    Err(file.error("rope_freqs.weight is not the scaling of LLaMA 3.1 or 3.2; convert from the original checkpoint"))
}

/// A tensor that is decoded when it is written.
struct Lazy<'a> {
    file: &'a Gguf,
    info: &'a TensorInfo,
    /// Heads whose rows the file keeps interleaved for another rotary layout.
    interleaved_heads: Option<usize>,
}

impl View for Lazy<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::BF16
    }

    fn shape(&self) -> &[usize] {
        &self.info.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let values = self.file.decode(self.info);
        let bits =
            |row: &[f32], out: &mut Vec<u8>| out.extend(row.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()));
        let mut bytes = Vec::with_capacity(2 * values.len());
        match self.interleaved_heads {
            None => bits(&values, &mut bytes),
            Some(heads) => {
                // File row (h, i, j) is the model's row (h, j, i): pairs lie next to each other there, half a head apart here.
                let rows = self.info.shape[0];
                let (width, half) = (values.len() / rows, rows / heads / 2);
                for row in 0..rows {
                    let (h, j, i) = (row / (2 * half), row / half % 2, row % half);
                    let source = (h * 2 * half + 2 * i + j) * width;
                    bits(&values[source..source + width], &mut bytes);
                }
            }
        }
        Cow::Owned(bytes)
    }

    fn data_len(&self) -> usize {
        2 * self.info.shape.iter().product::<usize>()
    }
}

fn tensors<'a>(file: &'a Gguf, config: &ModelConfig) -> Result<BTreeMap<String, Lazy<'a>>, Error> {
    let llama = file.text("general.architecture")? == "llama";
    let mut tensors = BTreeMap::new();
    for (name, info) in file.tensors() {
        if name == "rope_freqs.weight" {
            continue;
        }
        let hf = hf_name(name)
            .ok_or_else(|| file.error(format!("tensor {name} is not part of a dense LLaMA or Qwen2 model")))?;
        let heads = match () {
            () if llama && name.contains("attn_q.") => Some(config.n_heads),
            () if llama && name.contains("attn_k.") => Some(config.n_kv_heads),
            () => None,
        };
        if let Some(heads) = heads.filter(|h| info.shape[0] % (2 * h) != 0) {
            return Err(
                file.error(format!("tensor {name} of shape {:?} does not split into {heads} heads", info.shape))
            );
        }
        tensors.insert(hf, Lazy { file, info, interleaved_heads: heads });
    }
    Ok(tensors)
}

fn hf_name(name: &str) -> Option<String> {
    let whole = match name {
        "token_embd.weight" => "model.embed_tokens.weight",
        "output.weight" => "lm_head.weight",
        "output_norm.weight" => "model.norm.weight",
        _ => {
            let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
            let (part, kind) = rest.rsplit_once('.')?;
            let part = match part {
                "attn_norm" => "input_layernorm",
                "ffn_norm" => "post_attention_layernorm",
                "attn_q" => "self_attn.q_proj",
                "attn_k" => "self_attn.k_proj",
                "attn_v" => "self_attn.v_proj",
                "attn_output" => "self_attn.o_proj",
                "ffn_gate" => "mlp.gate_proj",
                "ffn_up" => "mlp.up_proj",
                "ffn_down" => "mlp.down_proj",
                _ => return None,
            };
            return (layer.parse::<usize>().is_ok() && (kind == "weight" || kind == "bias"))
                .then(|| format!("model.layers.{layer}.{part}.{kind}"));
        }
    };
    Some(whole.to_string())
}
