//! What a stage learns and how a step changes it: on the CPU here, on a card in [`crate::llm::cuda::Training`].
//!
//! Both take the same calls: a step is begun, micro-batches add their gradients, the step is finished. What they hold can be read
//! and put back, on either.

use super::Error;
use super::trainable::{Trainable, scores_of};
use super::tuner::Tuner;
use crate::cie::Mapping;
use crate::device::cpu::optimizer::{Adam, Decay, clip_global_norm};
use crate::llm::batch::PackedBatch;
use crate::llm::cuda::{Demand, MicroBatch, Rules, Training};
use crate::llm::model::{Model, TrainPass, Workspace};

/// Tensors, their gradients and moments, where the model is.
pub(crate) enum TrainState<'a> {
    Cpu(Box<Host<'a>>),
    Cuda { training: Box<Training<'a>>, plan: String, shapes: &'a Trainable },
}

impl<'a> TrainState<'a> {
    /// Begins from `start`. `demand`: the size of micro-batches to come.
    pub fn new(model: &'a Model, start: &'a Trainable, rules: Rules, demand: &Demand) -> Result<Self, Error> {
        if let Some((training, plan)) = model.training(demand, &start.lora, start.cie.as_ref(), rules)? {
            return Ok(TrainState::Cuda { training: Box::new(training), plan: plan.to_string(), shapes: start });
        }
        Ok(TrainState::Cpu(Box::new(Host {
            model,
            rules,
            current: start.clone(),
            gradient: start.zeros_like(),
            adam: Adam::new(Decay::Decoupled, start.trained_lengths(rules)),
            workspace: Workspace::default(),
            loss: 0.0,
            rows: 0,
        })))
    }

    /// How a card's memory is used, in a line.
    pub fn plan(&self) -> Option<&str> {
        match self {
            TrainState::Cpu(_) => None,
            TrainState::Cuda { plan, .. } => Some(plan),
        }
    }

    /// Begins a step over `rows` prompts: gradients are zero.
    pub fn begin_step(&mut self, rows: usize) -> Result<(), Error> {
        match self {
            TrainState::Cpu(host) => host.begin_step(rows),
            TrainState::Cuda { training, .. } => training.begin_step(rows)?,
        }
        Ok(())
    }

    /// Adds the gradients of some of the step's prompts, and sets `d_x` to those of [`MicroBatch::x`], where they are wanted.
    pub fn micro_batch(&mut self, part: MicroBatch, d_x: Option<&mut [f32]>) -> Result<(), Error> {
        match self {
            TrainState::Cpu(host) => host.micro_batch(part, d_x),
            TrainState::Cuda { training, .. } => Ok(training.micro_batch(part, d_x)?),
        }
    }

    /// Clips and applies the gradients, the tuner's with them. Returns the mean loss of the step's rows, and the gradient's norm
    /// before clipping. Where the norm is not finite, nothing is changed (on a card, the tuner's is looked at on its own).
    pub fn finish_step(&mut self, lr: f64, tuner: Option<&mut Tuner>) -> Result<(f64, f64), Error> {
        match (self, tuner) {
            (TrainState::Cpu(host), tuner) => Ok(host.finish_step(lr, tuner)),
            (TrainState::Cuda { training, .. }, None) => Ok(training.finish_step(lr)?),
            (TrainState::Cuda { training, .. }, Some(tuner)) => {
                let (loss, norm) = training.finish_step(lr)?;
                let norm = norm.hypot(tuner.norm());
                if norm.is_finite() {
                    tuner.step(lr);
                }
                Ok((loss, norm))
            }
        }
    }

    /// Scores of a batch; `x` as in [`MicroBatch`].
    pub fn scores(&mut self, batch: &PackedBatch, x: &[f32]) -> Result<Vec<f32>, Error> {
        match self {
            TrainState::Cpu(host) => host.scores(batch, x),
            TrainState::Cuda { training, .. } => Ok(training.scores(batch, x)?),
        }
    }

    /// The tensors as they are.
    pub fn tensors(&self) -> Result<Trainable, Error> {
        match self {
            TrainState::Cpu(host) => Ok(host.current.clone()),
            TrainState::Cuda { training, shapes, .. } => {
                let mut tensors = (*shapes).clone();
                training.read(&mut tensors.lora, tensors.cie.as_mut())?;
                Ok(tensors)
            }
        }
    }

    /// The optimizer's state.
    pub fn adam(&self) -> Result<Adam, Error> {
        match self {
            TrainState::Cpu(host) => Ok(host.adam.clone()),
            TrainState::Cuda { training, .. } => Ok(training.adam()?),
        }
    }

    /// Goes on from what [`Self::tensors`] and [`Self::adam`] gave, here or on another device.
    pub fn restore(&mut self, tensors: Trainable, adam: Adam) -> Result<(), Error> {
        match self {
            TrainState::Cpu(host) => (host.current, host.adam) = (tensors, adam),
            TrainState::Cuda { training, .. } => training.restore(&tensors.lora, tensors.cie.as_ref(), &adam)?,
        }
        Ok(())
    }
}

/// On the CPU.
pub(crate) struct Host<'a> {
    model: &'a Model,
    rules: Rules,
    current: Trainable,
    gradient: Trainable,
    adam: Adam,
    workspace: Workspace,
    /// Sum of the step's losses so far.
    loss: f64,
    rows: usize,
}

impl Host<'_> {
    fn begin_step(&mut self, rows: usize) {
        (self.loss, self.rows) = (0.0, rows);
        self.gradient.lora.fill_zero();
        if let Some(cie) = &mut self.gradient.cie {
            cie.tensors.iter_mut().for_each(|t| t.fill(0.0));
        }
    }

    fn micro_batch(&mut self, part: MicroBatch, d_x: Option<&mut [f32]>) -> Result<(), Error> {
        let MicroBatch { batch, x, labels, weight, dropout } = part;
        let mapped = self.current.cie.as_ref().filter(|_| !x.is_empty()).map(|cie| (cie, cie.forward(x)));
        // Without a mapping, what fills the slots is of the LLM's width already.
        let vectors = mapped.as_ref().map_or(x, |m| &m.1.output);
        let mut d_vectors = vec![0.0; if self.rules.cie || d_x.is_some() { vectors.len() } else { 0 }];
        let pass = TrainPass {
            lora: Some(&self.current.lora),
            dropout,
            batch,
            vectors,
            labels,
            weight,
            loss: self.rules.loss,
            d_lora: self.rules.lora.then_some(&mut self.gradient.lora),
            d_vectors: (!d_vectors.is_empty()).then_some(&mut d_vectors),
            d_inputs: None,
        };
        self.loss += self.model.train_pass(pass, &mut self.workspace)?.1;
        let d_inputs = match (&mapped, &mut self.gradient.cie) {
            _ if d_vectors.is_empty() => return Ok(()),
            (Some((cie, pass)), Some(gradient)) => cie.backward(x, pass, &d_vectors, gradient),
            _ => d_vectors,
        };
        if let Some(d_x) = d_x {
            d_x.copy_from_slice(&d_inputs);
        }
        Ok(())
    }

    fn finish_step(&mut self, lr: f64, mut tuner: Option<&mut Tuner>) -> (f64, f64) {
        let rules = self.rules;
        let mut weights: Vec<(&mut [f32], f64)> = Vec::new();
        let mut gradients: Vec<&mut [f32]> = Vec::new();
        if rules.lora {
            weights.extend(self.current.lora.slices_mut().into_iter().map(|w| (w, rules.weight_decay)));
            gradients.extend(self.gradient.lora.slices_mut());
        }
        if let (Some(cie), Some(gradient), true) = (&mut self.current.cie, &mut self.gradient.cie, rules.cie) {
            weights.extend(cie.tensors.iter_mut().map(Vec::as_mut_slice).zip(Mapping::decays(rules.weight_decay)));
            gradients.extend(gradient.tensors.iter_mut().map(Vec::as_mut_slice));
        }
        gradients.extend(tuner.iter_mut().flat_map(|t| t.gradients_mut()));
        let loss = self.loss / self.rows as f64;
        let norm = clip_global_norm(&mut gradients, rules.max_norm);
        if norm.is_finite() {
            let tensors = weights.into_iter().zip(gradients).map(|((w, decay), g)| (w, &*g, decay)).collect();
            self.adam.step(tensors, lr);
            if let Some(tuner) = tuner {
                tuner.step(lr);
            }
        }
        (loss, norm)
    }

    fn scores(&mut self, batch: &PackedBatch, x: &[f32]) -> Result<Vec<f32>, Error> {
        scores_of(self.model, Some(&self.current), batch, x, self.rules.loss, &mut self.workspace)
    }
}
