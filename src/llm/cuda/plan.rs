//! What a pass needs of the card's memory, before it starts.

use super::adapter::{DeviceAdapter, Product};
use super::model::Model;
use crate::device::cuda::lora::Lora;
use crate::device::cuda::mask::mask_words;
use crate::llm::Error;
use crate::llm::peft::{LoraTensors, Target};

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
            model,
            Product::ALL.map(|product| {
                adapter.map_or(0, |a| (0..model.layers.len()).map(|l| a.tail(l, product)).max().unwrap_or(0))
            }),
        )
    }

    /// For an adapter that is not on the card yet.
    fn before(model: &Model, lora: Option<&LoraTensors>) -> Self {
        let padded = lora.map_or(0, |l| l.rank.next_multiple_of(8));
        let has = |t: &&Target| lora.is_some_and(|l| l.tensors.keys().any(|k| k.1 == **t));
        Self::with_tails(model, Product::ALL.map(|p| p.targets().iter().filter(has).count() * padded))
    }

    fn with_tails(model: &Model, [qkv, o, gate_up, down]: [usize; 4]) -> Self {
        let (config, heads) = (&model.config, model.heads());
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
#[derive(Clone, Copy, Debug)]
pub struct Demand<'a> {
    /// The adapter.
    pub lora: Option<&'a LoraTensors>,
    /// Tokens of a micro-batch.
    pub tokens: usize,
    /// Prompts of a micro-batch.
    pub prompts: usize,
    /// With a backward pass.
    pub train: bool,
    /// With dropout on the adapter's input.
    pub dropout: bool,
    /// Bytes of what a stage keeps beside the adapter: moments, the mapping and its gradients.
    pub state: usize,
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
    /// Activations.
    pub activations: usize,
    /// Gradients and scratch of backward.
    pub gradients: usize,
    /// cuBLASLt's workspace, already on the card; 0 without it.
    pub cublaslt: usize,
    /// Free on the card, now that the weights are there.
    pub free: usize,
}

impl Plan {
    /// Bytes to be allocated.
    pub fn needed(&self) -> usize {
        self.adapter + self.state + self.activations + self.gradients
    }

    fn new(model: &Model, demand: &Demand, recompute: Recompute, weights: usize, free: usize) -> Self {
        let w = Widths::before(model, demand.lora);
        let (n, p, layers) = (demand.tokens, demand.prompts, model.layers.len());
        let size = model.precision().bytes();
        let (inputs, sets) = recompute.kept(demand.train, layers);
        let acts = if demand.train && w.x > w.hidden { sets } else { 1 };
        let set = n * (w.qkv + w.q_width + w.mid + w.gate_up) * size + n * (2 + w.n_heads) * 4;
        let mut activations = inputs * n * w.x * size + sets * set + acts * n * w.inter * size;
        activations += (n * w.hidden + p * (w.x + w.q_last + 3 * w.hidden)) * size;
        if demand.dropout {
            activations += 3 * n * mask_words(w.widest_input()) * 4;
        }
        let mut gradients = 0;
        if demand.train {
            let columns = w.stream + w.hidden + w.gate_up + w.q_width + w.qkv;
            gradients = (n * columns + p * (w.stream + w.q_last)) * size + n * w.n_heads * 4;
            if demand.lora.is_some() {
                gradients += Lora::partials(n, w.widest_output()) * 4;
            }
        }
        // Masters and gradients in float32, packed elements with padded ranks.
        let adapter = demand.lora.map_or(0, |l| {
            let padded = l.rank.next_multiple_of(8) as f64 / l.rank as f64;
            l.n_params() * 8 + (l.n_params() as f64 * padded) as usize * size * 2
        });
        let cublaslt = model.ops.gemm.workspace();
        Plan { recompute, weights, adapter, state: demand.state, activations, gradients, cublaslt, free }
    }
}

impl std::fmt::Display for Plan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let gib = |bytes: usize| bytes as f64 / f64::from(1u32 << 30);
        write!(
            f,
            "device memory: weights {:.2} GiB, adapter {:.2}, training state {:.2}, activations {:.2}{}, gradients {:.2}{}; {:.2} GiB to allocate, {:.2} free",
            gib(self.weights),
            gib(self.adapter),
            gib(self.state),
            gib(self.activations),
            if self.recompute == Recompute::Blocks { " (blocks recomputed)" } else { "" },
            gib(self.gradients),
            if self.cublaslt > 0 { format!(", cuBLASLt {:.2}", gib(self.cublaslt)) } else { String::new() },
            gib(self.needed()),
            gib(self.free)
        )
    }
}

impl Model {
    /// Bytes allocated on the card.
    pub fn allocated(&self) -> usize {
        self.cuda.allocated()
    }

    /// The first plan that fits the card: all kept, else blocks recomputed. Refuses with the plan when none does.
    pub fn plan(&self, demand: &Demand) -> Result<Plan, Error> {
        let (weights, (free, _)) = (self.weight_bytes(), self.cuda.memory()?);
        let plans = [Recompute::Nothing, Recompute::Blocks].map(|r| Plan::new(self, demand, r, weights, free));
        // A little is left to the driver and to fragments.
        let fits = |plan: &&Plan| plan.needed() as f64 <= 0.97 * free as f64;
        if let Some(plan) = plans.iter().find(fits) {
            return Ok(plan.clone());
        }
        Err(Error::Shape {
            what: format!(
                "{}: {} tokens at once do not fit; lower micro_batch_tokens (training) or eval.batch_tokens (scoring)",
                plans[1], demand.tokens
            ),
        })
    }
}
