//! What passes need of the card's memory, before they start: from the model's configuration alone, so that a card and a model can
//! be judged without either.

use super::adapter::{DeviceAdapter, Product};
use super::filling::{filled_prompts, filled_rows, filled_segments};
use super::model::{Model, head_shape};
use super::training::{Rules, Training};
use super::workspace::LOSSES;
use crate::cie::Mapping;
use crate::device::cuda::Precision;
use crate::device::cuda::attention::Tables;
use crate::device::cuda::lora::Lora;
use crate::device::cuda::mask::{Numbers, mask_words};
use crate::llm::peft::{LoraTensors, Target};
use crate::llm::{Error, ModelConfig};

/// What backward does about the activations between a block's input and its output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Recompute {
    /// They are kept.
    #[default]
    Nothing,
    /// Each block runs forward again before it runs backward, from its kept input.
    Blocks,
}

impl Recompute {
    /// How many inputs of blocks are kept, and how many sets of the activations in between. Without a backward pass two inputs
    /// take turns, and one set serves all blocks.
    pub(super) fn kept(self, train: bool, layers: usize) -> (usize, usize) {
        match (train, self) {
            (false, _) => (2.min(layers), 1),
            (true, Recompute::Nothing) => (layers, layers),
            (true, Recompute::Blocks) => (layers, 1),
        }
    }
}

/// Columns of the rows that the blocks pass on, adapters' columns included; the widest of all blocks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Widths {
    pub hidden: usize,
    pub inter: usize,
    pub q_width: usize,
    pub qkv: usize,
    pub q_last: usize,
    pub x: usize,
    pub mid: usize,
    pub gate_up: usize,
    /// Gradient of the residual stream.
    pub stream: usize,
    n_heads: usize,
}

impl Widths {
    pub fn new(model: &Model, adapter: Option<&DeviceAdapter>) -> Self {
        Self::with_tails(
            &model.config,
            Product::ALL.map(|product| {
                adapter.map_or(0, |a| (0..model.layers.len()).map(|l| a.tail(l, product)).max().unwrap_or(0))
            }),
        )
    }

    /// For an adapter that is not on the card yet.
    fn before(config: &ModelConfig, lora: Option<&LoraTensors>) -> Self {
        let padded = lora.map_or(0, |l| l.rank.next_multiple_of(8));
        let has = |t: &&Target| lora.is_some_and(|l| l.tensors.keys().any(|k| k.1 == **t));
        Self::with_tails(config, Product::ALL.map(|p| p.targets().iter().filter(has).count() * padded))
    }

    fn with_tails(config: &ModelConfig, [qkv, o, gate_up, down]: [usize; 4]) -> Self {
        let heads = head_shape(config);
        let (hidden, inter) = (config.hidden_size, config.intermediate_size);
        let q_width = heads.q_width();
        Widths {
            hidden,
            inter,
            q_width,
            qkv: q_width + 2 * heads.kv_width() + qkv,
            q_last: q_width + qkv,
            x: hidden + down,
            mid: hidden + o,
            gate_up: 2 * inter + gate_up,
            stream: hidden + o.max(down),
            n_heads: heads.n_heads,
        }
    }

    pub fn widest_input(&self) -> usize {
        self.hidden.max(self.inter).max(self.q_width)
    }

    pub fn widest_output(&self) -> usize {
        (2 * self.inter).max(self.hidden).max(self.q_width)
    }
}

/// What a stage will need, for its largest micro-batch.
#[derive(Clone, Copy, Debug, Default)]
pub struct Demand<'a> {
    /// The adapter.
    pub lora: Option<&'a LoraTensors>,
    /// Tokens of a micro-batch; 0 where nothing is trained.
    pub tokens: usize,
    /// Prompts of a micro-batch.
    pub prompts: usize,
    /// Some tokens of a micro-batch may need no gradient.
    pub frozen: bool,
    /// With dropout on the adapter's input.
    pub dropout: bool,
    /// Tokens that are scored at once; 0 where nothing is scored.
    pub score_tokens: usize,
    /// Prompts that are.
    pub score_prompts: usize,
    /// Vectors of the model's width that a prompt's slots may read.
    pub vectors: usize,
    /// Bytes of what a stage keeps beside the adapter: moments, the mapping and its gradients.
    pub state: usize,
}

/// What buffers are made for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    /// Rows, and those that need no gradient.
    pub n: usize,
    pub first: usize,
    pub prompts: usize,
    pub vectors: usize,
    /// Segments at most.
    pub segments: usize,
    /// With a backward pass.
    pub train: bool,
    pub dropout: bool,
}

impl Room {
    /// Queries, and queries and keys with a gradient, in all blocks but the last and in the last.
    pub fn tables(&self) -> [(usize, [usize; 2]); 2] {
        let (n, p) = (self.n, self.prompts);
        let gradient = |queries| if self.train { [queries, n - self.first] } else { [0, 0] };
        [(n, gradient(n - self.first)), (p, gradient(p))]
    }
}

impl<'a> Demand<'a> {
    /// With what a stage that trains these keeps (slots read mapped vectors, where there is a mapping) on a card of `sms` multiprocessors.
    pub fn training(
        self,
        config: &ModelConfig,
        lora: &'a LoraTensors,
        cie: Option<&Mapping>,
        rules: Rules,
        sms: usize,
    ) -> Self {
        let vectors = cie.map_or(self.vectors, |cie| 2 * cie.out / config.hidden_size);
        let demand = Demand { lora: Some(lora), vectors, ..self };
        Demand { state: Training::bytes(lora, cie, rules, &demand, sms), ..demand }
    }

    /// The largest training pass and the largest scoring pass, filled up.
    pub(super) fn rooms(&self) -> Vec<Room> {
        let room = |tokens: usize, prompts: usize, frozen: bool, train: bool| {
            let (n, with_gradient) = filled_rows(tokens, frozen);
            let filled = filled_prompts(prompts);
            Room {
                n,
                first: n - with_gradient,
                prompts: filled,
                vectors: self.vectors * filled,
                segments: filled_segments(prompts),
                train,
                dropout: train && self.dropout,
            }
        };
        let mut rooms = Vec::new();
        if self.tokens > 0 {
            rooms.push(room(self.tokens, self.prompts, self.frozen, true));
        }
        if self.score_tokens > 0 {
            rooms.push(room(self.score_tokens, self.score_prompts, false, false));
        }
        rooms
    }

    /// Prompts of the largest pass, filled up.
    pub(super) fn most_prompts(&self) -> usize {
        filled_prompts(self.prompts.max(self.score_prompts))
    }
}

/// The plan: what lies where, in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// What is kept.
    pub recompute: Recompute,
    /// Weights, already on the card.
    pub weights: usize,
    /// Adapter: masters, packed elements, gradients.
    pub adapter: usize,
    /// Moments, the mapping and its gradients.
    pub state: usize,
    /// Activations, and what a batch brings.
    pub activations: usize,
    /// Gradients and scratch of backward.
    pub gradients: usize,
    /// cuBLASLt's workspace, already on the card; 0 without it.
    pub cublaslt: usize,
    /// Free on the card, now that the weights are there.
    pub free: usize,
}

/// Dropout's numbers.
const DROPOUT_BYTES: usize = size_of::<Numbers>();

/// Bytes of the buffers of a workspace, in one order for all rooms: those of activations, and those of backward.
fn buffers(
    w: &Widths,
    layers: usize,
    precision: Precision,
    lora: bool,
    recompute: Recompute,
    room: &Room,
) -> [Vec<usize>; 2] {
    let (size, Room { n, prompts: p, vectors: v, .. }) = (precision.bytes(), *room);
    let (inputs, sets) = recompute.kept(room.train, layers);
    let acts = if room.train && w.x > w.hidden { sets } else { 1 };
    let tables = room.tables().map(|(n, gradient)| Tables::bytes(precision, n, gradient, room.segments));
    let mut forward = vec![
        12 * n,
        16 * p,
        v * w.hidden * 4,
        tables[0],
        tables[1],
        n * w.hidden * size,
        p * (w.x + w.q_last + 3 * w.hidden) * size,
        if room.dropout { 3 * n * mask_words(w.widest_input()) * 4 } else { 0 },
    ];
    let set = n * (w.qkv + w.q_width + w.mid + w.gate_up) * size + n * (2 + w.n_heads) * 4;
    for l in 0..layers {
        forward.push(if l < inputs { n * w.x * size } else { 0 });
        forward.push(if l < sets { set } else { 0 });
        forward.push(if l < acts { n * w.inter * size } else { 0 });
    }
    if !room.train {
        return [forward, Vec::new()];
    }
    let d = n - room.first;
    let d_q = d.max(p);
    let elements = d * (w.stream + w.qkv) + d_q * (w.hidden + w.gate_up + w.q_width) + p * (w.stream + w.q_last);
    let partials = if lora { Lora::partials(d_q, w.widest_output()) * 4 } else { 0 };
    [
        forward,
        vec![elements * size, d_q * w.n_heads * 4, partials, 16 * p, v * (4 + w.hidden * 4), LOSSES * 4, DROPOUT_BYTES],
    ]
}

impl Plan {
    /// Bytes to be allocated.
    pub fn needed(&self) -> usize {
        self.adapter + self.state + self.activations + self.gradients
    }

    /// It fits, a little being left to the driver, to fragments and to graphs.
    pub fn fits(&self) -> bool {
        self.needed() as f64 <= 0.97 * self.free as f64
    }

    fn new(
        config: &ModelConfig,
        precision: Precision,
        demand: &Demand,
        recompute: Recompute,
        weights: usize,
        free: usize,
    ) -> Self {
        let (w, layers) = (Widths::before(config, demand.lora), config.n_layers);
        let mut sums = [0, 0];
        let rooms = demand.rooms();
        let all: Vec<_> =
            rooms.iter().map(|room| buffers(&w, layers, precision, demand.lora.is_some(), recompute, room)).collect();
        for (i, sum) in sums.iter_mut().enumerate() {
            let longest = all.iter().map(|b| b[i].len()).max().unwrap_or(0);
            // One buffer serves all passes.
            let largest = |at| all.iter().filter_map(|b| b[i].get(at)).max().copied().unwrap_or(0);
            *sum = (0..longest).map(largest).sum();
        }
        let adapter = demand.lora.map_or(0, |lora| DeviceAdapter::bytes(lora, precision));
        let [activations, gradients] = sums;
        Plan { recompute, weights, adapter, state: demand.state, activations, gradients, cublaslt: 0, free }
    }

    /// The first plan that fits: all kept, else blocks recomputed. Refuses with the plan when none does. `free`: bytes of the card
    /// beside the weights.
    pub fn choose(
        config: &ModelConfig,
        precision: Precision,
        demand: &Demand,
        weights: usize,
        free: usize,
    ) -> Result<Plan, Error> {
        let plans =
            [Recompute::Nothing, Recompute::Blocks].map(|r| Plan::new(config, precision, demand, r, weights, free));
        if let Some(plan) = plans.iter().find(|p| p.fits()) {
            return Ok(plan.clone());
        }
        Err(Error::Shape {
            what: format!(
                "{}: {} tokens at once do not fit; lower micro_batch_tokens (training) or eval.batch_tokens (scoring)",
                plans[1],
                demand.tokens.max(demand.score_tokens)
            ),
        })
    }

    /// Bytes of a model's frozen weights on a card.
    pub fn weight_bytes(config: &ModelConfig, precision: Precision) -> usize {
        let heads = head_shape(config);
        let (hidden, inter, q) = (config.hidden_size, config.intermediate_size, heads.q_width());
        let linear = |out: usize, width: usize, bias: bool| out * (width + usize::from(bias));
        let layer = linear(q + 2 * heads.kv_width(), hidden, config.qkv_bias)
            + linear(hidden, q, config.o_bias)
            + linear(2 * inter, hidden, config.mlp_bias)
            + linear(hidden, inter, config.mlp_bias)
            + 2 * hidden;
        let tables = if config.tie_word_embeddings { 1 } else { 2 };
        let vocabulary = tables * config.vocab_size.next_multiple_of(8) * hidden;
        (config.n_layers * layer + vocabulary + hidden) * precision.bytes()
    }
}

impl std::fmt::Display for Plan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (unit, size, digits) =
            if self.weights + self.needed() < 1 << 28 { ("MiB", 1u32 << 20, 3) } else { ("GiB", 1 << 30, 2) };
        let show = |bytes: usize| format!("{:.digits$}", bytes as f64 / f64::from(size));
        write!(
            f,
            "device memory: weights {} {unit}, adapter {}, training state {}, activations {}{}, gradients {}{}; {} {unit} to allocate, {} free",
            show(self.weights),
            show(self.adapter),
            show(self.state),
            show(self.activations),
            if self.recompute == Recompute::Blocks { " (blocks recomputed)" } else { "" },
            show(self.gradients),
            if self.cublaslt > 0 { format!(", cuBLASLt {}", show(self.cublaslt)) } else { String::new() },
            show(self.needed()),
            show(self.free)
        )
    }
}

impl Model {
    /// Bytes allocated on the card.
    pub fn allocated(&self) -> usize {
        self.cuda.allocated()
    }

    /// The first plan that fits the card: see [`Plan::choose`].
    pub fn plan(&self, demand: &Demand) -> Result<Plan, Error> {
        let (free, _) = self.cuda.memory()?;
        let plan = Plan::choose(&self.config, self.precision(), demand, self.weight_bytes(), free)?;
        Ok(Plan { cublaslt: self.ops.gemm.workspace(), ..plan })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::ops::Loss;

    fn vicuna() -> ModelConfig {
        let json = r#"{"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
            "num_hidden_layers": 32, "num_attention_heads": 32, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048,
            "tie_word_embeddings": false}"#;
        ModelConfig::from_json(json, std::path::Path::new("vicuna-7b")).unwrap()
    }

    /// The plan of stage 1 (LoRA of rank 8 on q and v) for micro-batches of `tokens` on a card with so many GiB.
    fn stage1(tokens: usize, gib: f64) -> Result<Plan, Error> {
        let (config, weights) = (vicuna(), Plan::weight_bytes(&vicuna(), Precision::Bf16));
        let lora = LoraTensors::init(&config, &[Target::Q, Target::V], 8, 16.0, 0.05, 0);
        let rules =
            Rules { lora: true, cie: false, weight_decay: 0.0, max_norm: f64::INFINITY, loss: Loss::YesLogitBce };
        let sizes = Demand { tokens, prompts: tokens / 64, dropout: true, score_tokens: 2048, ..Demand::default() };
        let demand = sizes.training(&config, &lora, None, rules, 128);
        let free = (gib * f64::from(1u32 << 30)) as usize;
        Plan::choose(&config, Precision::Bf16, &demand, weights, free.saturating_sub(weights))
    }

    #[test]
    fn weights_are_those_of_vicuna() {
        // 6,738,415,616 parameters, the number on its card.
        assert_eq!(Plan::weight_bytes(&vicuna(), Precision::Bf16), 2 * 6_738_415_616);
    }

    #[test]
    fn what_is_kept_follows_from_the_card() {
        let level = |tokens, gib| stage1(tokens, gib).map(|p| p.recompute).ok();
        assert_eq!(level(1024, 24.0), Some(Recompute::Nothing));
        assert_eq!(level(4096, 24.0), Some(Recompute::Blocks));
        assert_eq!(level(4096, 80.0), Some(Recompute::Nothing));
        assert_eq!(level(1024, 16.0), Some(Recompute::Blocks));
        assert_eq!(level(8192, 16.0), None);
        let refusal = stage1(8192, 16.0).unwrap_err().to_string();
        assert!(refusal.contains("weights 12.55 GiB") && refusal.contains("(blocks recomputed)"), "{refusal}");
        assert!(refusal.contains("8192 tokens at once do not fit; lower micro_batch_tokens"), "{refusal}");
        assert_eq!(level(1024, 13.0), None);
        assert_eq!(level(1, 12.0), None, "the weights alone are more");
    }
}
