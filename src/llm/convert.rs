//! A GGUF file becomes a Hugging Face model directory: `config.json`, `model.safetensors` (bf16), `tokenizer.json`.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use half::bf16;
use safetensors::{Dtype, View};
use serde_json::json;

use super::gguf::{Gguf, TensorInfo, Value};
use super::weights::{MODULES, bias_flags, module_shapes};
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

/// Converts `gguf` into the directory `out`, which appears whole or not at all. With `force` an existing model directory
/// (one with a `config.json`) is replaced.
pub fn convert_gguf(gguf: &Path, out: &Path, force: bool) -> Result<Summary, Error> {
    let occupied = out.read_dir().is_ok_and(|mut d| d.next().is_some());
    let error = |what: &str| Error::Gguf { path: out.to_path_buf(), what: what.into() };
    if occupied && !force {
        return Err(error("is not empty; choose another directory or pass --force"));
    }
    if occupied && !out.join("config.json").is_file() {
        return Err(error("is not a model directory (no config.json), so --force does not replace it; choose another"));
    }
    let file = Gguf::open(gguf)?;
    let config = config(&file)?;
    let parsed = ModelConfig::from_json(&config.to_string(), gguf)?;
    let tensors = tensors(&file, &parsed)?;
    let tokenizer = gguf_tokenizer::tokenizer_json(&file)?;
    let summary = Summary {
        tensors: tensors.len(),
        parameters: tensors.values().map(|t| t.info.shape.iter().product::<usize>()).sum(),
        vocab_size: parsed.vocab_size,
    };

    let parent = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent).map_err(Error::io(parent))?;
    let temporary = tempfile::Builder::new().prefix(".converting-").tempdir_in(parent).map_err(Error::io(parent))?;
    let new = temporary.path().join("new");
    std::fs::create_dir(&new).map_err(Error::io(&new))?;
    write_json(&new.join("config.json"), &config)?;
    write_json(&new.join("tokenizer.json"), &tokenizer)?;
    write_json(&new.join("tokenizer_config.json"), &gguf_tokenizer::tokenizer_config(&file)?)?;
    write_weights(tensors, &new.join("model.safetensors"))?;

    if occupied {
        // The old one is moved aside and removed, with `temporary`, only when the new one is in its place.
        let old = temporary.path().join("old");
        std::fs::rename(out, &old).map_err(Error::io(out))?;
        if let Err(e) = std::fs::rename(&new, out) {
            if std::fs::rename(&old, out).is_err() {
                let kept = temporary.keep().join("old");
                return Err(error(&format!("could not be replaced ({e}); what it held is in {}", kept.display())));
            }
            return Err(Error::io(out)(e));
        }
    } else {
        if out.exists() {
            std::fs::remove_dir(out).map_err(Error::io(out))?;
        }
        std::fs::rename(&new, out).map_err(Error::io(out))?;
    }
    Ok(summary)
}

fn write_weights(tensors: BTreeMap<String, Lazy>, path: &Path) -> Result<(), Error> {
    let metadata = [("format".to_string(), "pt".to_string())].into();
    safetensors::serialize_to_file(tensors, Some(metadata), path)
        .map_err(|e| Error::Io { path: path.to_path_buf(), source: std::io::Error::other(e) })?;
    let file = std::fs::File::open(path).map_err(Error::io(path))?;
    #[cfg(unix)]
    {
        // The library writes through a private temporary file; a model is an ordinary file that colleagues may read.
        use std::os::unix::fs::PermissionsExt;
        file.set_permissions(std::fs::Permissions::from_mode(0o644)).map_err(Error::io(path))?;
    }
    file.sync_all().map_err(Error::io(path))
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
    let window = file.size(&format!("{arch}.attention.sliding_window"))?.filter(|&w| w > 0);
    let (model_type, class) = match arch.as_str() {
        // Mistral travels as llama; its window is the only difference.
        "llama" if window.is_some() => ("mistral", "MistralForCausalLM"),
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
    if tokens > vocab {
        return Err(file.error(format!("{tokens} tokens, but token_embd.weight has {vocab} rows")));
    }
    let head_dim = file.size(&key("attention.key_length"))?.unwrap_or(hidden / heads.max(1));
    if let Some(n) = file.size(&key("rope.dimension_count"))?.filter(|&n| n != head_dim) {
        return Err(file.error(format!("rotary embedding of {n} of a head's {head_dim} dimensions is not supported")));
    }
    let eps = key("attention.layer_norm_rms_epsilon");
    let eps = file.number(&eps)?.ok_or_else(|| file.error(format!("metadata {eps} is missing")))?;
    let linear = file.number(&key("rope.scale_linear"))?.filter(|&factor| factor != 1.0);
    let scaling = match file.tensors().get("rope_freqs.weight") {
        Some(info) => llama3_scaling(file, &key, info)?,
        None => match file.get(&key("rope.scaling.type")) {
            Some(Value::Text(t)) if t != "none" => {
                json!({"rope_type": t, "factor": file.number(&key("rope.scaling.factor"))?})
            }
            _ => linear.map_or(serde_json::Value::Null, |factor| json!({"rope_type": "linear", "factor": factor})),
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
        "rms_norm_eps": eps,
        "rope_theta": file.number(&key("rope.freq_base"))?.unwrap_or(10_000.0),
        "rope_scaling": scaling,
        "sliding_window": window,
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

/// q, k, v, o, gate, up, down as GGUF names them.
const PARTS: [&str; 7] = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"];

/// Every tensor the configuration asks for, under its Hugging Face name. Missing, misshaped and unexpected ones are named.
fn tensors<'a>(file: &'a Gguf, config: &ModelConfig) -> Result<BTreeMap<String, Lazy<'a>>, Error> {
    // Before anything is made for each layer: a damaged count must not become an allocation.
    if config.n_layers > file.tensors().len() {
        return Err(file.error(format!("{} layers, but only {} tensors", config.n_layers, file.tensors().len())));
    }
    // Only this architecture's files interleave the rows of q and k.
    let interleaved = file.text("general.architecture")? == "llama";
    let mut left: BTreeMap<&str, &TensorInfo> = file.tensors().iter().map(|(n, i)| (n.as_str(), i)).collect();
    left.remove("rope_freqs.weight");
    let (mut found, mut problems) = (BTreeMap::new(), Vec::new());
    let mut take = |gguf: &str, hf: String, shape: &[usize], interleaved_heads: Option<usize>| match left.remove(gguf) {
        None => problems.push(format!("missing tensor {gguf}, shape {shape:?}")),
        Some(info) if info.shape != shape => {
            problems.push(format!("{gguf} has shape {:?}; the metadata needs {shape:?}", info.shape));
        }
        Some(info) => _ = found.insert(hf, Lazy { file, info, interleaved_heads }),
    };
    let (hidden, vocab) = (config.hidden_size, config.vocab_size);
    take("token_embd.weight", "model.embed_tokens.weight".into(), &[vocab, hidden], None);
    take("output_norm.weight", "model.norm.weight".into(), &[hidden], None);
    if !config.tie_word_embeddings {
        take("output.weight", "lm_head.weight".into(), &[vocab, hidden], None);
    }
    let (shapes, biases) = (module_shapes(config), bias_flags(config));
    for l in 0..config.n_layers {
        for (gguf, hf) in [("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")] {
            take(&format!("blk.{l}.{gguf}.weight"), format!("model.layers.{l}.{hf}.weight"), &[hidden], None);
        }
        for m in 0..7 {
            let (gguf, hf) = (format!("blk.{l}.{}", PARTS[m]), format!("model.layers.{l}.{}", MODULES[m]));
            let heads = [config.n_heads, config.n_kv_heads].get(m).copied().filter(|_| interleaved);
            let (rows, cols) = shapes[m];
            take(&format!("{gguf}.weight"), format!("{hf}.weight"), &[rows, cols], heads);
            if biases[m] {
                take(&format!("{gguf}.bias"), format!("{hf}.bias"), &[rows], heads);
            }
        }
    }
    problems.extend(left.keys().map(|name| format!("unexpected tensor {name}: not part of a dense LLaMA or Qwen2")));
    if problems.is_empty() { Ok(found) } else { Err(Error::Weights { path: file.path().to_path_buf(), problems }) }
}
