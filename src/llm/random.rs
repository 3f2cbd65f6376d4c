//! A model file of random weights: for measuring cost where weights cannot be had.

use std::io::Write;
use std::path::Path;

use rayon::prelude::*;
use serde_json::json;

use super::weights::{MODULES, bias_flags, module_shapes};
use super::{Error, ModelConfig};
use crate::files::write_atomic;
use crate::rng::Rng;

/// What a tensor is filled with.
#[derive(Clone, Copy)]
enum Fill {
    Random,
    Ones,
    Zeros,
}

/// Elements drawn from one stream of random numbers.
const CHUNK: usize = 1 << 16;
/// Chunks in memory at once.
const AT_ONCE: usize = 64;

/// Writes `model.safetensors` of a configuration: matrices bf16, uniform with deviation 0.02, norms 1, biases 0. A function of
/// the seed alone.
pub fn write_random(config: &ModelConfig, seed: u64, path: &Path) -> Result<(), Error> {
    let tensors = tensors(config);
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for (name, shape, _) in &tensors {
        let bytes = 2 * shape.iter().product::<usize>();
        header.insert(name.clone(), json!({"dtype": "BF16", "shape": shape, "data_offsets": [end, end + bytes]}));
        end += bytes;
    }
    let mut header = serde_json::Value::from(header).to_string();
    // Data begin at a multiple of eight bytes.
    header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));
    let write = |w: &mut std::io::BufWriter<&std::fs::File>| -> std::io::Result<()> {
        w.write_all(&(header.len() as u64).to_le_bytes())?;
        w.write_all(header.as_bytes())?;
        for (t, (_, shape, fill)) in tensors.iter().enumerate() {
            let n: usize = shape.iter().product();
            let chunks = n.div_ceil(CHUNK);
            for first in (0..chunks).step_by(AT_ONCE) {
                let made: Vec<Vec<u16>> = (first..chunks.min(first + AT_ONCE))
                    .into_par_iter()
                    .map(|c| values(*fill, seed, (t as u64) << 32 | c as u64, CHUNK.min(n - c * CHUNK)))
                    .collect();
                made.iter().try_for_each(|bits| w.write_all(bytemuck::cast_slice(bits)))?;
            }
        }
        Ok(())
    };
    write_atomic(path, write).map_err(Error::io(path))
}

/// Bits of `n` bf16 numbers.
fn values(fill: Fill, seed: u64, stream: u64, n: usize) -> Vec<u16> {
    let of = |x: f32| half::bf16::from_f32(x).to_bits();
    match fill {
        Fill::Ones => vec![of(1.0); n],
        Fill::Zeros => vec![0; n],
        Fill::Random => {
            let mut rng = Rng::new(seed, stream);
            // A half word a number; a uniform one spreads √3 deviations to each side.
            let scale = 0.02 * 3f32.sqrt() / 32_768.0;
            let number = |word: u32| of(f32::from(word as u16 as i16) * scale);
            (0..n.div_ceil(2)).map(|_| rng.next_u32()).flat_map(|w| [number(w), number(w >> 16)]).take(n).collect()
        }
    }
}

/// Name, shape and filling of every tensor.
fn tensors(config: &ModelConfig) -> Vec<(String, Vec<usize>, Fill)> {
    let table = vec![config.vocab_size, config.hidden_size];
    let norm = || vec![config.hidden_size];
    let mut all = vec![("model.embed_tokens.weight".to_owned(), table.clone(), Fill::Random)];
    for l in 0..config.n_layers {
        let at = |name: &str| format!("model.layers.{l}.{name}");
        for name in ["input_layernorm.weight", "post_attention_layernorm.weight"] {
            all.push((at(name), norm(), Fill::Ones));
        }
        for ((module, (rows, cols)), bias) in MODULES.iter().zip(module_shapes(config)).zip(bias_flags(config)) {
            all.push((at(&format!("{module}.weight")), vec![rows, cols], Fill::Random));
            if bias {
                all.push((at(&format!("{module}.bias")), vec![rows], Fill::Zeros));
            }
        }
    }
    all.push(("model.norm.weight".to_owned(), norm(), Fill::Ones));
    if !config.tie_word_embeddings {
        all.push(("lm_head.weight".to_owned(), table, Fill::Random));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::llm::weights::ModelWeights;

    #[test]
    fn what_is_written_loads_and_is_as_wide_as_it_should_be() {
        let dir = tempfile::tempdir().unwrap();
        for (kind, tied) in [("qwen2", true), ("llama", false)] {
            let text = format!(
                r#"{{"model_type":"{kind}","vocab_size":301,"hidden_size":252,"intermediate_size":33,
                "num_hidden_layers":2,"num_attention_heads":6,"num_key_value_heads":2,"tie_word_embeddings":{tied}}}"#
            );
            std::fs::write(dir.path().join("config.json"), &text).unwrap();
            let config = ModelConfig::from_dir(dir.path()).unwrap();
            let file = dir.path().join("model.safetensors");
            write_random(&config, 1, &file).unwrap();
            let weights = ModelWeights::load(dir.path()).unwrap();
            let values = weights.embed_tokens.to_f32();
            let mean_square = values.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / values.len() as f64;
            assert!((mean_square.sqrt() - 0.02).abs() < 2e-4, "{mean_square}");
            assert_ne!(values[..100], values[CHUNK..CHUNK + 100], "streams differ");
            assert!(weights.final_norm.iter().all(|&x| x == 1.0));
            assert_eq!(weights.lm_head.is_some(), !tied);
            let first = std::fs::read(&file).unwrap();
            write_random(&config, 1, &file).unwrap();
            assert!(std::fs::read(&file).unwrap() == first, "the seed decides all");
        }
    }
}
