//! Collaborative models that are trained through the prompts (strategies T1 and T2): vectors for a step's rows, and the way back
//! from the gradients of these vectors to the model's own tensors.
//!
//! A step asks once for the vectors of all its rows and gives back all their gradients at once, so what a model does for its whole
//! graph (LightGCN) it does once each way. A model joins with [`SlotLearner`] and a line in [`CollabConfig::tuned`]; optimizer and
//! checkpoints are `train`'s.
//!
//! PARITY: gradients are dense, as `nn.Embedding`'s are: weight decay moves every row of a table, whether it occurs or not.

use std::path::Path;

use super::lightgcn::LightGcn;
use super::mf::Mf;
use super::training::Learner;
use super::{CollabConfig, Collaborative, Error};
use crate::checkpoint::{Tensor, take_tensor};
use crate::data::{Dataset, Samples};

/// A [`Learner`] whose vectors fill slots while it is trained.
pub trait SlotLearner: Learner {
    /// Vectors of these rows, `[rows, 2, dim]`: user, then item. What is dropped is a function of `step`, which counts from 0.
    fn slots(&mut self, samples: &Samples, rows: &[usize], step: u64) -> Vec<f32>;

    /// Overwrites `gradient`, of the model's shape, where tensors are trained, with the gradients for those of the vectors that
    /// [`Self::slots`] gave for the same rows and step, `d_slots: [rows, 2, dim]`.
    fn slots_backward(&mut self, samples: &Samples, rows: &[usize], step: u64, d_slots: &[f32], gradient: &mut Self);

    /// The model as it stands, for scoring.
    fn frozen(&self) -> Collaborative;
}

/// Anything trained that fills slots, with its gradient.
pub trait Tuned {
    /// Everything it is made of, under official names.
    fn tensors(&self) -> Vec<Tensor>;

    /// The values of [`Self::tensors`], in its order.
    fn values_mut(&mut self) -> Vec<&mut [f32]>;

    /// Weights and gradients of the trained tensors: the first of [`Self::tensors`].
    fn trained_mut(&mut self) -> Vec<(&mut [f32], &mut [f32])>;

    /// See [`SlotLearner::slots`].
    fn slots(&mut self, samples: &Samples, rows: &[usize], step: u64) -> Vec<f32>;

    /// See [`SlotLearner::slots_backward`]; the gradient is kept.
    fn backward(&mut self, samples: &Samples, rows: &[usize], step: u64, d_slots: &[f32]);

    /// As it stands, for scoring.
    fn frozen(&self) -> Collaborative;

    /// Width of a vector.
    fn dim(&self) -> usize {
        self.frozen().dim()
    }

    /// Takes the values of a list that holds [`Self::tensors`] under these names after `prefix`; others are left alone.
    fn restore(&mut self, tensors: &mut Vec<Tensor>, prefix: &str) -> Result<(), String> {
        let own = self.tensors();
        for (Tensor { name, shape, .. }, values) in own.iter().zip(self.values_mut()) {
            values.copy_from_slice(&take_tensor(tensors, &format!("{prefix}{name}"), shape)?);
        }
        Ok(())
    }
}

/// A model and its gradient.
struct Tuning<M> {
    model: M,
    gradient: M,
}

impl<M: SlotLearner> Tuned for Tuning<M> {
    fn tensors(&self) -> Vec<Tensor> {
        self.model.tensors()
    }

    fn values_mut(&mut self) -> Vec<&mut [f32]> {
        self.model.values_mut()
    }

    fn trained_mut(&mut self) -> Vec<(&mut [f32], &mut [f32])> {
        let n = self.model.n_trained();
        self.model.values_mut().into_iter().zip(self.gradient.values_mut()).take(n).collect()
    }

    fn slots(&mut self, samples: &Samples, rows: &[usize], step: u64) -> Vec<f32> {
        self.model.slots(samples, rows, step)
    }

    fn backward(&mut self, samples: &Samples, rows: &[usize], step: u64, d_slots: &[f32]) {
        self.model.slots_backward(samples, rows, step, d_slots, &mut self.gradient);
    }

    fn frozen(&self) -> Collaborative {
        self.model.frozen()
    }
}

fn tuning<M: SlotLearner + 'static>(model: M) -> Box<dyn Tuned> {
    Box::new(Tuning { gradient: model.clone(), model })
}

impl CollabConfig {
    /// The chosen model, to be trained through the prompts: as `pretrained`, a file that [`Self::fit`] wrote, or as its own training
    /// begins.
    pub fn tuned(&self, data: &Dataset, pretrained: Option<&Path>) -> Result<Box<dyn Tuned>, Error> {
        let model = match (self.model.as_str(), pretrained) {
            ("mf", Some(path)) => tuning(Mf::load(path)?),
            ("mf", None) => tuning(Mf::init(data.n_users, data.n_items, self.mf.dim, self.mf.seed)),
            ("lightgcn", _) => {
                let mut model = tuning(LightGcn::init(data, &self.lightgcn));
                if let Some(path) = pretrained {
                    let (mut tensors, _) = crate::checkpoint::read_tensors(path)
                        .map_err(|source| Error::Io { path: path.into(), source })?;
                    model.restore(&mut tensors, "").map_err(|what| Error::Model { path: path.into(), what })?;
                }
                model
            }
            (other, _) => {
                let what =
                    format!("collab.model {other} cannot be tuned by strategies t1 and t2; they know mf and lightgcn");
                return Err(Error::Model { path: pretrained.unwrap_or(Path::new("configuration")).into(), what });
            }
        };
        Ok(model)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collab::lightgcn::LightGcnConfig;
    use crate::collab::mf::MfConfig;
    use crate::collab::training::tests::dataset;
    use crate::rng::Rng;

    fn config(model: &str) -> CollabConfig {
        CollabConfig {
            model: model.into(),
            mf: MfConfig { dim: 6, ..MfConfig::default() },
            lightgcn: LightGcnConfig { dim: 6, ..LightGcnConfig::default() },
            ..CollabConfig::default()
        }
    }

    /// Vectors are linear in the tables: along any direction of the tables they move by what backward says, to rounding.
    #[test]
    fn backward_is_the_adjoint_of_slots() {
        let data = dataset();
        let rows: Vec<usize> = (0..60).map(|i| i * 5 % 97).collect();
        for name in ["mf", "lightgcn"] {
            let mut model = config(name).tuned(&data, None).unwrap();
            let slots = model.slots(&data.train, &rows, 0);
            assert_eq!(slots.len(), rows.len() * 2 * model.dim());
            assert_eq!(slots, model.frozen().slot_vectors(&data.train).take(&rows), "{name}: as it is scored");
            let mut rng = Rng::new(8, 1);
            let d: Vec<f32> = slots.iter().map(|_| rng.normal() as f32).collect();
            // Gradients are overwritten: a second backward gives the same.
            model.backward(&data.train, &rows, 0, &slots);
            model.backward(&data.train, &rows, 0, &d);
            let along = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
            let (mut left, mut size) = (0.0, 0.0);
            for (weights, gradient) in model.trained_mut() {
                left += along(weights, gradient);
                size += along(gradient, gradient).sqrt() * along(weights, weights).sqrt();
                assert!(gradient[..6].iter().all(|&g| g == 0.0), "{name}: padding has no gradient");
            }
            let right = along(&d, &slots);
            assert!((left - right).abs() < 1e-5 * size, "{name}: {left} against {right}, of {size}");
            assert!(right.abs() > 1e-3 * size, "{name}: says nothing");
        }
    }

    #[test]
    fn a_pretrained_model_is_taken_and_others_are_refused() {
        let data = dataset();
        let dir = tempfile::tempdir().unwrap();
        for name in ["mf", "lightgcn"] {
            let (path, config) = (dir.path().join(name), config(name));
            match name {
                "mf" => Mf::init(data.n_users, data.n_items, 6, 77).save(&path, &[]).unwrap(),
                _ => LightGcn::init(&data, &LightGcnConfig { seed: 77, ..config.lightgcn.clone() })
                    .save(&path, &[])
                    .unwrap(),
            }
            let (pretrained, random) = (config.tuned(&data, Some(&path)).unwrap(), config.tuned(&data, None).unwrap());
            let take = |m: &dyn Tuned| m.frozen().slot_vectors(&data.test).take(&[3, 4]);
            assert_eq!(take(&*pretrained), config.load(&path).unwrap().slot_vectors(&data.test).take(&[3, 4]));
            assert_ne!(take(&*pretrained), take(&*random));
        }
        let other = config("din").tuned(&data, None).err().unwrap().to_string();
        assert!(other.ends_with("collab.model din cannot be tuned by strategies t1 and t2; they know mf and lightgcn"));
    }
}
