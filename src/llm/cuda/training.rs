//! What a stage trains, on the card: adapter, mapping, their gradients and moments. A step uploads batches and brings back its
//! losses and the gradient's norm; nothing else crosses the bus.

use super::graphs::{Counts, Key, Work};
use super::mapping::DeviceMapping;
use super::model::Model;
use super::plan::{Demand, Recompute};
use super::workspace::{Input, LoraFrom, Vectors, Workspace};
use crate::cie::Mapping;
use crate::device::cpu::optimizer::{Adam, Decay};
use crate::device::cuda::optimizer::{Optimizer, Step, Trained};
use crate::device::ops::{Dropout, Loss};
use crate::llm::Error;
use crate::llm::batch::PackedBatch;
use crate::llm::peft::LoraTensors;

/// What is trained, and how.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// The adapter is.
    pub lora: bool,
    /// The mapping is.
    pub cie: bool,
    /// Of the adapter's tensors and the mapping's matrices; its biases have none.
    pub weight_decay: f64,
    /// Largest global norm of the gradient; infinity for no clipping.
    pub max_norm: f64,
    /// Which loss.
    pub loss: Loss,
}

/// A part of an optimizer step.
#[derive(Clone, Copy, Debug)]
pub struct MicroBatch<'a> {
    /// The prompts.
    pub batch: &'a PackedBatch,
    /// Collaborative vectors, `[2 · prompts, dim]`; empty where no prompt has slots. Spliced as they are where there is no mapping.
    pub x: &'a [f32],
    /// 0 or 1 for each prompt.
    pub labels: &'a [f32],
    /// Factor of each row's gradient: 1 / rows of the optimizer step.
    pub weight: f32,
    /// Dropout on the adapter's inputs.
    pub dropout: Option<Dropout>,
}

/// A stage's state on the card.
#[derive(Debug)]
pub struct Training<'a> {
    model: &'a Model,
    workspace: Workspace,
    mapping: Option<DeviceMapping>,
    optimizer: Optimizer,
    rules: Rules,
    /// The packed elements are the masters'.
    packed: bool,
    rows: usize,
}

impl<'a> Training<'a> {
    /// Copies what is trained to the card, and makes room for passes of the demanded size; moments are zero. `recompute`: see
    /// [`Model::plan`].
    pub fn new(
        model: &'a Model,
        lora: &LoraTensors,
        cie: Option<&Mapping>,
        rules: Rules,
        demand: &Demand,
        recompute: Recompute,
    ) -> Result<Self, Error> {
        let cuda = &model.cuda;
        let mut workspace = Workspace::new(model)?;
        workspace.set_recompute(recompute);
        let adapter = workspace.place(model, lora)?;
        adapter.load(cuda, lora)?;
        let mut mapping = cie.map(|m| DeviceMapping::new(cuda, m)).transpose()?;
        let mut trained = if rules.lora { adapter.trained(rules.weight_decay) } else { Vec::new() };
        if let Some(m) = mapping.as_ref().filter(|_| rules.cie) {
            let tensors = m.parameters.iter().zip(&m.gradients).zip(Mapping::decays(rules.weight_decay));
            trained.extend(tensors.map(|((w, g), decay)| Trained::new(w, g, decay)));
        }
        let optimizer = Optimizer::new(cuda, Decay::Decoupled, &trained)?;
        if let Some(mapping) = &mut mapping {
            mapping.reserve(cuda, 2 * demand.most_prompts())?;
        }
        workspace.reserve(model, demand)?;
        Ok(Training { model, workspace, mapping, optimizer, rules, packed: false, rows: 0 })
    }

    /// Bytes that this takes beside the adapter and its gradients, on a card of `sms` multiprocessors.
    pub fn bytes(lora: &LoraTensors, cie: Option<&Mapping>, rules: Rules, demand: &Demand, sms: usize) -> usize {
        let pairs = lora.tensors.values().flat_map(|p| [p.a.len(), p.b.len()]).filter(|_| rules.lora);
        let tensors = cie.filter(|_| rules.cie).into_iter().flat_map(|m| m.tensors.iter().map(Vec::len));
        Optimizer::bytes(pairs.chain(tensors))
            + cie.map_or(0, |m| DeviceMapping::bytes(m, 2 * demand.most_prompts(), sms))
    }

    /// Begins an optimizer step over `rows` prompts.
    pub fn begin_step(&mut self, rows: usize) -> Result<(), Error> {
        self.rows = rows;
        self.pack()?;
        self.workspace.begin_step(self.model, rows)
    }

    fn pack(&mut self) -> Result<(), Error> {
        if let Some(adapter) = self.workspace.adapter.as_ref().filter(|_| !self.packed) {
            adapter.pack(&self.model.cuda, &self.model.ops.lora)?;
            self.packed = true;
        }
        Ok(())
    }

    /// Vectors for a batch: mapped, or as they are.
    fn vectors<'v>(mapping: &'v mut Option<DeviceMapping>, x: &'v [f32]) -> Vectors<'v> {
        match mapping {
            Some(mapping) if !x.is_empty() => Vectors::Mapped(mapping, x),
            _ => Vectors::Ready(x),
        }
    }

    /// Adds the gradients of some of the step's prompts. Returns before the card is done, unless `d_x` is wanted: the gradients of
    /// [`MicroBatch::x`], set.
    pub fn micro_batch(&mut self, part: MicroBatch, d_x: Option<&mut [f32]>) -> Result<(), Error> {
        let MicroBatch { batch, x, labels, weight, dropout } = part;
        let (model, w, rules) = (self.model, &mut self.workspace, self.rules);
        if let Some(mapping) = &mut self.mapping {
            mapping.wants_d_x = d_x.is_some();
        }
        let vectors = Self::vectors(&mut self.mapping, x);
        let train = Some((labels, weight));
        w.begin(model, Input { lora: LoraFrom::Resident, dropout, batch, vectors, train, fill: true })?;
        let mapping = self.mapping.as_ref().filter(|_| w.n_vectors > 0);
        let d_mapping = mapping.filter(|_| rules.cie || d_x.is_some());
        let d_x = d_x.filter(|_| w.n_vectors > 0);
        let (mapped, d_vectors) = (mapping.is_some(), d_mapping.is_some() || d_x.is_some());
        let key = w.key(Work::Train { loss: rules.loss, lora: rules.lora, mapped, d_vectors });
        w.run(&model.cuda, key, |w| {
            if let Some(mapping) = mapping {
                mapping.forward(&model.cuda, &w.vectors)?;
            }
            model.both_ways(w, rules.loss, rules.lora, d_vectors, false)?;
            d_mapping.map_or(Ok(()), |mapping| mapping.backward(&model.cuda, &w.d_vectors))
        })?;
        if let Some(d_x) = d_x {
            mapping.map_or(&w.d_vectors, |mapping| &mapping.d_x).download_to(&model.cuda, d_x)?;
        }
        w.keep_losses(&model.cuda)
    }

    /// Clips and applies the gradients, which are zero afterwards. Returns the mean loss of the step's rows and the gradient's
    /// norm. Where the norm is not finite, weights and moments stay as they are.
    pub fn finish_step(&mut self, lr: f64) -> Result<(f64, f64), Error> {
        let cuda = &self.model.cuda;
        let step = Step { lr, scale: 1.0, max_norm: self.rules.max_norm, zero_gradients: true };
        self.optimizer.begin_step(cuda, step)?;
        let (optimizer, ops, trains_lora) = (&self.optimizer, &self.model.ops, self.rules.lora);
        self.workspace.run(cuda, Key::STEP, |w| {
            optimizer.launch(cuda, step.scale, step.max_norm)?;
            let adapter = w.adapter.as_ref().filter(|_| trains_lora);
            adapter.map_or(Ok(()), |adapter| adapter.pack(cuda, &ops.lora))
        })?;
        let losses = self.workspace.step_losses.download(cuda, self.rows)?;
        let loss = losses.iter().map(|&l| f64::from(l)).sum::<f64>() / self.rows as f64;
        Ok((loss, self.optimizer.norm(cuda)?))
    }

    /// Scores of prompts with the state as it is. `x` as in [`MicroBatch`].
    pub fn scores(&mut self, batch: &PackedBatch, x: &[f32]) -> Result<Vec<f32>, Error> {
        self.pack()?;
        let (model, w, loss) = (self.model, &mut self.workspace, self.rules.loss);
        let vectors = Self::vectors(&mut self.mapping, x);
        w.begin(model, Input { lora: LoraFrom::Resident, dropout: None, batch, vectors, train: None, fill: true })?;
        let mapping = self.mapping.as_ref().filter(|_| w.n_vectors > 0);
        let key = w.key(Work::Score { loss, mapped: mapping.is_some() });
        w.run(&model.cuda, key, |w| {
            if let Some(mapping) = mapping {
                mapping.forward(&model.cuda, &w.vectors)?;
            }
            model.answer(w, loss)
        })?;
        model.given_scores(w)
    }

    /// How passes and steps have been run so far.
    pub fn counts(&self) -> Counts {
        self.workspace.counts()
    }

    /// Reads adapter and mapping, into ones of the same shapes.
    pub fn read(&self, lora: &mut LoraTensors, cie: Option<&mut Mapping>) -> Result<(), Error> {
        let cuda = &self.model.cuda;
        if let Some(adapter) = &self.workspace.adapter {
            adapter.read(cuda, lora)?;
        }
        if let (Some(cie), Some(mapping)) = (cie, &self.mapping) {
            for (to, from) in cie.tensors.iter_mut().zip(&mapping.parameters) {
                from.download_to(cuda, to)?;
            }
        }
        Ok(())
    }

    /// The optimizer's state as the CPU has it.
    pub fn adam(&self) -> Result<Adam, Error> {
        Ok(self.optimizer.state(&self.model.cuda)?)
    }

    /// Goes on from another state, of whatever device, of the same shapes.
    pub fn restore(&mut self, lora: &LoraTensors, cie: Option<&Mapping>, adam: &Adam) -> Result<(), Error> {
        let cuda = &self.model.cuda;
        if let Some(adapter) = &mut self.workspace.adapter {
            adapter.load(cuda, lora)?;
        }
        if let (Some(cie), Some(mapping)) = (cie, &mut self.mapping) {
            for (to, from) in mapping.parameters.iter_mut().zip(&cie.tensors) {
                to.upload(cuda, from)?;
            }
        }
        self.packed = false;
        Ok(self.optimizer.restore(cuda, adam)?)
    }
}
