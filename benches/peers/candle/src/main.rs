//! What candle does with the same prompts: `candle_transformers::models::llama`, float32, one prompt at a time (its attention has
//! no mask for padded batches), the logits of the last position.
//!
//!     candle-score MODEL_DIR PROMPTS.json
//!
//! `PROMPTS.json`: lists of token ids (`llamacpp_score.py --ids PROMPTS.json` writes them). One prompt warms up.

use std::time::Instant;

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::llama::{Cache, Llama, LlamaConfig};

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (model, prompts) = arguments.next().zip(arguments.next()).context("usage: candle-score MODEL_DIR PROMPTS.json")?;
    let prompts: Vec<Vec<u32>> = serde_json::from_slice(&std::fs::read(prompts)?)?;
    let config: LlamaConfig = serde_json::from_slice(&std::fs::read(format!("{model}/config.json"))?)?;
    let config = config.into_config(false);
    let device = Device::Cpu;
    let weights = candle_core::safetensors::load(format!("{model}/model.safetensors"), &device)?;
    let llama = Llama::load(VarBuilder::from_tensors(weights, DType::F32, &device), &config)?;
    let score = |ids: &[u32]| -> Result<f32> {
        let mut cache = Cache::new(false, DType::F32, &config, &device)?;
        let ids = Tensor::new(ids, &device)?.unsqueeze(0)?;
        Ok(llama.forward(&ids, 0, &mut cache)?.flatten_all()?.max(0)?.to_scalar::<f32>()?)
    };
    score(&prompts[0])?;
    let began = Instant::now();
    for ids in &prompts {
        score(ids)?;
    }
    let seconds = began.elapsed().as_secs_f64();
    let tokens: usize = prompts.iter().map(Vec::len).sum();
    println!(
        "candle: {:.2} samples/s, {:.0} tokens/s",
        prompts.len() as f64 / seconds,
        tokens as f64 / seconds
    );
    Ok(())
}
