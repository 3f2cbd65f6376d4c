//! What an experiment needs of a card's memory, from its settings and the model's configuration: neither the card nor the weights
//! need to be there.

use super::config::{Config, StageConfig};
use crate::cie::Mapping;
use crate::device::cuda::Precision;
use crate::llm::cuda::{Demand, Plan, Rules};
use crate::llm::peft::LoraTensors;
use crate::llm::{Error, ModelConfig};

/// What the driver keeps for itself of a card that nothing else uses, bytes: an assumption, for cards that cannot be asked.
pub const DRIVER_BYTES: usize = 1 << 29;
/// The shortest prompt that is counted on, where prompts are not at hand.
const SHORTEST_PROMPT: usize = 64;
/// Tokens of a prompt that are its own, where prompts share a prefix.
const OWN_TOKENS: usize = 8;
/// Multiprocessors that are counted on.
const MULTIPROCESSORS: usize = 160;

/// The parts of an experiment, each with its plan for `free` bytes beside nothing but the driver, or the refusal.
pub fn plans(config: &Config, model: &ModelConfig, free: usize) -> Vec<(&'static str, Result<Plan, Error>)> {
    let c = &config.lora;
    let lora = LoraTensors::init(model, &config.targets(), c.rank, c.alpha, c.dropout, config.seed);
    let dim = if config.collab.model == "lightgcn" { config.collab.lightgcn.dim } else { config.collab.mf.dim };
    let out = model.hidden_size * config.prompt.style.tokens_per_vector;
    let cie = Mapping::zeros(dim, dim * config.cie.mid_times, out);
    let scoring = Demand {
        score_tokens: config.eval.batch_tokens,
        score_prompts: config.eval.batch_tokens.div_ceil(OWN_TOKENS),
        ..Demand::default()
    };
    let weights = Plan::weight_bytes(model, Precision::Bf16);
    let choose = |demand: &Demand| Plan::choose(model, Precision::Bf16, demand, weights, free.saturating_sub(weights));
    let stage = |s: &StageConfig, cie: Option<&Mapping>| {
        let rules =
            Rules { lora: s.train_lora, cie: s.train_cie, weight_decay: 0.0, max_norm: f64::INFINITY, loss: s.loss };
        let dropout = c.dropout > 0.0 && (s.train_lora || s.frozen_lora_dropout);
        let (tokens, prompts) = (s.micro_batch_tokens, s.micro_batch_tokens.div_ceil(SHORTEST_PROMPT));
        let frozen = !s.train_lora && !dropout;
        let demand = Demand { tokens, prompts, frozen, dropout, ..scoring };
        choose(&demand.training(model, &lora, cie, rules, MULTIPROCESSORS))
    };
    vec![
        ("stage1", stage(&config.stage1, None)),
        ("stage2", stage(&config.stage2, Some(&cie))),
        ("scoring", choose(&Demand { lora: Some(&lora), vectors: 2 * out / model.hidden_size, ..scoring })),
    ]
}
