//! The model: LLaMA-family weights on a device, and the passes over a packed batch.
//!
//! One answer is one number, so no pass computes a vocabulary of logits, and in the last block only the last positions go
//! through queries, output projection and MLP (architecture, idea 4). The passes are written out twice, for the CPU
//! ([`super::cpu`]) and for NVIDIA cards ([`super::cuda`]).

use super::batch::PackedBatch;
use super::cuda::{Counts, Demand, Plan, Recompute, Rules, Training};
use super::peft::LoraTensors;
use super::weights::ModelWeights;
use super::{Error, ModelConfig, cpu, cuda};
use crate::cie::Mapping;
use crate::device::Device;
use crate::device::cuda::Cuda;
use crate::device::ops::{Dropout, Loss};

/// Looks at the last tokens' residual stream, `[n_prompts, hidden]`.
pub type Tap<'a> = &'a mut dyn FnMut(&[f32]);

/// What a training pass reads and what it adds gradients to.
#[derive(Debug)]
pub struct TrainPass<'a> {
    /// The adapter, if there is one.
    pub lora: Option<&'a LoraTensors>,
    /// Dropout on the adapter's inputs; `None` switches it off.
    pub dropout: Option<Dropout>,
    /// The prompts.
    pub batch: &'a PackedBatch,
    /// Vectors to splice, `[n, hidden]` (see [`PackedBatch::new`]).
    pub vectors: &'a [f32],
    /// 0 or 1 for each prompt.
    pub labels: &'a [f32],
    /// Factor of each row's gradient: 1 / rows of the optimizer step.
    pub weight: f32,
    /// Which loss.
    pub loss: Loss,
    /// Adapter gradients, added to; `None` when the adapter is frozen.
    pub d_lora: Option<&'a mut LoraTensors>,
    /// Gradients of `vectors`, set; `None` when nothing behind them is trained.
    pub d_vectors: Option<&'a mut [f32]>,
    /// Gradients of the input rows from `batch.first_gradient` on, set; only for verification.
    pub d_inputs: Option<&'a mut Vec<f32>>,
}

/// A LLaMA-family model, frozen, with the vocabulary rows of the answer, on a device.
#[derive(Debug)]
pub struct Model {
    backend: Backend,
}

#[derive(Debug)]
enum Backend {
    Cpu(Box<cpu::Model>),
    Cuda(Box<cuda::Model>),
}

/// Buffers of the passes, kept from batch to batch so that no step allocates once they have grown.
#[derive(Debug, Default)]
pub struct Workspace {
    cpu: cpu::Workspace,
    cuda: Option<cuda::Workspace>,
}

impl Model {
    /// Arranges loaded weights for the CPU. `yes_id`, `no_id`: vocabulary rows of the answer; `n_positions`: longest prompt to
    /// come.
    pub fn new(weights: ModelWeights, yes_id: u32, no_id: u32, n_positions: usize) -> Self {
        Model { backend: Backend::Cpu(Box::new(cpu::Model::new(weights, yes_id, no_id, n_positions))) }
    }

    /// On the given device.
    pub fn on(
        device: Device,
        weights: ModelWeights,
        yes_id: u32,
        no_id: u32,
        n_positions: usize,
    ) -> Result<Self, Error> {
        match device.open()? {
            None => Ok(Model::new(weights, yes_id, no_id, n_positions)),
            Some(cuda) => Model::on_cuda(weights, yes_id, no_id, n_positions, cuda),
        }
    }

    /// Copies loaded weights to a card, whose element type they take.
    pub fn on_cuda(
        weights: ModelWeights,
        yes_id: u32,
        no_id: u32,
        n_positions: usize,
        cuda: Cuda,
    ) -> Result<Self, Error> {
        let model = cuda::Model::new(weights, yes_id, no_id, n_positions, cuda)?;
        Ok(Model { backend: Backend::Cuda(Box::new(model)) })
    }

    /// The architecture.
    pub fn config(&self) -> &ModelConfig {
        match &self.backend {
            Backend::Cpu(m) => m.config(),
            Backend::Cuda(m) => m.config(),
        }
    }

    /// Identifies the weights.
    pub fn fingerprint(&self) -> &str {
        match &self.backend {
            Backend::Cpu(m) => m.fingerprint(),
            Backend::Cuda(m) => m.fingerprint(),
        }
    }

    /// On a card, puts what a stage trains there for passes of the demanded size, and says how they use its memory; `None` on the
    /// CPU.
    pub fn training(
        &self,
        demand: &Demand,
        lora: &LoraTensors,
        cie: Option<&Mapping>,
        rules: Rules,
    ) -> Result<Option<(Training<'_>, Plan)>, Error> {
        let Backend::Cuda(m) = &self.backend else { return Ok(None) };
        let demand = demand.training(m.config(), lora, cie, rules, m.multiprocessors());
        let plan = m.plan(&demand)?;
        let training = Training::new(m, lora, cie, rules, &demand, plan.recompute)?;
        Ok(Some((training, plan)))
    }

    /// How passes of this size would use the memory of the card that holds the model; `None` on the CPU.
    pub fn cuda_plan(&self, demand: &Demand) -> Result<Option<Plan>, Error> {
        match &self.backend {
            Backend::Cpu(_) => Ok(None),
            Backend::Cuda(m) => m.plan(demand).map(Some),
        }
    }

    /// Whether the card that holds the model runs passes that come again as graphs: the bits are the same.
    pub fn use_graphs(&mut self, graphs: bool) {
        if let Backend::Cuda(m) = &mut self.backend {
            m.use_graphs(graphs);
        }
    }

    /// Is it on a card?
    pub fn on_card(&self) -> bool {
        matches!(self.backend, Backend::Cuda(_))
    }

    /// Bytes allocated on the card that holds the model.
    pub fn cuda_allocated(&self) -> usize {
        match &self.backend {
            Backend::Cpu(_) => 0,
            Backend::Cuda(m) => m.allocated(),
        }
    }

    /// The score of each prompt: the logit that `loss` is taken on. No gradients, nothing saved.
    pub fn scores(
        &self,
        lora: Option<&LoraTensors>,
        batch: &PackedBatch,
        vectors: &[f32],
        loss: Loss,
        workspace: &mut Workspace,
    ) -> Result<Vec<f32>, Error> {
        Ok(match &self.backend {
            Backend::Cpu(m) => m.scores(lora, batch, vectors, loss, &mut workspace.cpu),
            Backend::Cuda(m) => m.scores(lora, batch, vectors, loss, workspace.on(m)?)?,
        })
    }

    /// Final hidden states (after the last norm) of each prompt's last token, `[n_prompts, hidden]`. `tap` is given the last
    /// tokens' residual stream: the embeddings, then the output of each block.
    pub fn hidden(
        &self,
        lora: Option<&LoraTensors>,
        batch: &PackedBatch,
        vectors: &[f32],
        workspace: &mut Workspace,
        tap: Option<Tap>,
    ) -> Result<Vec<f32>, Error> {
        Ok(match &self.backend {
            Backend::Cpu(m) => m.hidden(lora, batch, vectors, &mut workspace.cpu, tap).to_vec(),
            Backend::Cuda(m) => m.hidden(lora, batch, vectors, workspace.on(m)?, tap)?,
        })
    }

    /// The packed input rows, `[n_rows, hidden]`: embeddings with the vectors spliced in.
    pub fn inputs(&self, batch: &PackedBatch, vectors: &[f32], workspace: &mut Workspace) -> Result<Vec<f32>, Error> {
        Ok(match &self.backend {
            Backend::Cpu(m) => m.inputs(batch, vectors),
            Backend::Cuda(m) => m.inputs(batch, vectors, workspace.on(m)?)?,
        })
    }

    /// All vocabulary logits of hidden states `y: [n, hidden]`: `[n, vocab_size]`. For verification.
    pub fn logits(&self, y: &[f32]) -> Result<Vec<f32>, Error> {
        Ok(match &self.backend {
            Backend::Cpu(m) => m.logits(y),
            Backend::Cuda(m) => m.logits(y)?,
        })
    }

    /// Rotated keys and values of the rows of a batch without slots, of each block `[n_rows, 2 · kv_width]`; `None` on a card.
    pub fn keys_values(
        &self,
        lora: Option<&LoraTensors>,
        batch: &PackedBatch,
        workspace: &mut Workspace,
    ) -> Option<Vec<Vec<half::f16>>> {
        match &self.backend {
            Backend::Cpu(m) => Some(m.keys_values(lora, batch, &mut workspace.cpu)),
            Backend::Cuda(_) => None,
        }
    }

    /// The same model with an adapter added to its weights in float32; `None` on a card, whose weights would round it to their type.
    pub fn merged(&self, lora: &LoraTensors) -> Option<Model> {
        match &self.backend {
            Backend::Cpu(m) => Some(Model { backend: Backend::Cpu(Box::new(m.merged(lora))) }),
            Backend::Cuda(_) => None,
        }
    }

    /// Forward and backward over one (micro-)batch. Returns the scores and the sum of the rows' losses.
    pub fn train_pass(&self, pass: TrainPass, workspace: &mut Workspace) -> Result<(Vec<f32>, f64), Error> {
        Ok(match &self.backend {
            Backend::Cpu(m) => m.train_pass(pass, &mut workspace.cpu),
            Backend::Cuda(m) => m.train_pass(pass, workspace.on(m)?)?,
        })
    }
}

impl Workspace {
    /// On a card, keeps no activations between a block's input and output, whatever the plan says.
    pub fn recompute_blocks(&mut self, model: &Model) -> Result<(), Error> {
        if let Backend::Cuda(m) = &model.backend {
            self.on(m)?.set_recompute(Recompute::Blocks);
        }
        Ok(())
    }

    /// How passes on a card have been run so far.
    pub fn cuda_counts(&self) -> Counts {
        self.cuda.as_ref().map(cuda::Workspace::counts).unwrap_or_default()
    }

    fn on(&mut self, model: &cuda::Model) -> Result<&mut cuda::Workspace, Error> {
        if self.cuda.is_none() {
            self.cuda = Some(cuda::Workspace::new(model)?);
        }
        Ok(self.cuda.as_mut().expect("just made"))
    }
}
