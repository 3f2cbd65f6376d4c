//! What fills slots and is trained with a stage: collaborative tables or free tokens, with their share of the optimizer.
//!
//! It lives on the host whatever the device: a step needs a few vectors of it and gives back as many gradients.

use std::ops::Range;

use crate::checkpoint::{Tensor, take_tensor};
use crate::collab::Collaborative;
use crate::collab::slots::Tuned;
use crate::data::Samples;
use crate::device::cpu::optimizer::{Adam, Decay};

/// Names in checkpoints begin with this, the official name of the collaborative model.
pub(super) const PREFIX: &str = "rec_encoder.";

/// A [`Tuned`] in a stage.
pub(crate) struct Tuner {
    model: Box<dyn Tuned>,
    /// Steps with the stage's optimizer, at its learning rate.
    adam: Adam,
    weight_decay: f64,
    /// Vectors of the step's rows and their gradients, `[rows, 2, dim]`.
    x: Vec<f32>,
    d_x: Vec<f32>,
    rows: usize,
}

impl Tuner {
    /// With zero moments.
    pub fn new(mut model: Box<dyn Tuned>, weight_decay: f64) -> Self {
        let adam = Adam::new(Decay::Decoupled, model.trained_mut().iter().map(|t| t.0.len()));
        Tuner { model, adam, weight_decay, x: Vec::new(), d_x: Vec::new(), rows: 0 }
    }

    /// Takes the vectors of a step's rows; their gradients are zero.
    pub fn begin_step(&mut self, samples: &Samples, rows: &[usize], step: u64) {
        self.x = self.model.slots(samples, rows, step);
        self.d_x = vec![0.0; self.x.len()];
        self.rows = rows.len();
    }

    /// The vectors of some of the step's rows, and the place for their gradients.
    pub fn part(&mut self, rows: Range<usize>) -> (&[f32], &mut [f32]) {
        let width = self.x.len() / self.rows;
        let range = rows.start * width..rows.end * width;
        (&self.x[range.clone()], &mut self.d_x[range])
    }

    /// The model's gradients from those of its vectors.
    pub fn backward(&mut self, samples: &Samples, rows: &[usize], step: u64) {
        self.model.backward(samples, rows, step, &self.d_x);
    }

    /// The gradients.
    pub fn gradients_mut(&mut self) -> Vec<&mut [f32]> {
        self.model.trained_mut().into_iter().map(|t| t.1).collect()
    }

    /// Their global norm.
    pub fn norm(&mut self) -> f64 {
        let squares = |g: &mut &mut [f32]| g.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>();
        self.gradients_mut().iter_mut().map(squares).sum::<f64>().sqrt()
    }

    /// Applies the gradients.
    pub fn step(&mut self, lr: f64) {
        let tensors = self.model.trained_mut().into_iter().map(|(w, g)| (w, &*g, self.weight_decay)).collect();
        self.adam.step(tensors, lr);
    }

    /// As it stands, for scoring.
    pub fn frozen(&self) -> Collaborative {
        self.model.frozen()
    }

    /// Its tensors under the names of checkpoints.
    pub fn tensors(&self) -> Vec<Tensor> {
        self.model.tensors().into_iter().map(|t| Tensor { name: format!("{PREFIX}{}", t.name), ..t }).collect()
    }

    /// Its moments, named as the stage's with `rec_` before.
    pub fn moments(&self) -> Vec<Tensor> {
        let named = |prefix: &'static str, moments: &[Vec<f32>]| -> Vec<Tensor> {
            let moments = moments.iter().enumerate();
            moments.map(|(i, v)| Tensor::new(format!("rec_{prefix}{i}"), vec![v.len()], v.clone())).collect()
        };
        [named("m", &self.adam.m), named("v", &self.adam.v)].concat()
    }

    /// Goes on from what [`Self::tensors`] and [`Self::moments`] gave after `steps` steps.
    pub fn restore(&mut self, tensors: &mut Vec<Tensor>, moments: &mut Vec<Tensor>, steps: u64) -> Result<(), String> {
        self.model.restore(tensors, PREFIX)?;
        for (prefix, own) in [("m", &mut self.adam.m), ("v", &mut self.adam.v)] {
            for (i, m) in own.iter_mut().enumerate() {
                *m = take_tensor(moments, &format!("rec_{prefix}{i}"), &[m.len()])?;
            }
        }
        self.adam.step = steps;
        Ok(())
    }
}
