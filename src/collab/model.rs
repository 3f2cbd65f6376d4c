//! What the rooms behind this one see of a collaborative model: how it is chosen, trained, saved and loaded, the scores it gives
//! alone, and the vectors that fill the slots of a prompt.
//!
//! Vectors (reference, section 3): MF has the two table rows, LightGCN their layer means; SASRec's user is the state after the row's
//! history, DIN's is history and target together.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::Error;
use super::din::{Din, DinConfig};
use super::lightgcn::{self, LightGcn, LightGcnConfig};
use super::mf::{Mf, MfConfig};
use super::sasrec::{SasRec, SasRecConfig};
use super::training::{Learner, Trained, train};
use crate::data::{Dataset, Samples};
use crate::device::cuda::Cuda;

/// `[collab]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CollabConfig {
    /// Which model: `mf`, `lightgcn`, `sasrec`, `din`.
    pub model: String,
    /// A trained model to take instead of training one: an official `.pth`, or `collab/*.safetensors` of a run. Empty: none.
    pub pretrained: String,
    /// Settings of MF.
    pub mf: MfConfig,
    /// Settings of LightGCN.
    pub lightgcn: LightGcnConfig,
    /// Settings of SASRec.
    pub sasrec: SasRecConfig,
    /// Settings of DIN.
    pub din: DinConfig,
}

impl Default for CollabConfig {
    fn default() -> Self {
        CollabConfig {
            model: "mf".into(),
            pretrained: String::new(),
            mf: MfConfig::default(),
            lightgcn: LightGcnConfig::default(),
            sasrec: SasRecConfig::default(),
            din: DinConfig::default(),
        }
    }
}

/// Names of the models, as settings and as titles of tables.
const MODELS: [(&str, &str); 4] = [("mf", "MF"), ("lightgcn", "LightGCN"), ("sasrec", "SASRec"), ("din", "DIN")];

impl CollabConfig {
    /// What [`Self::model`] may be.
    pub fn models() -> Vec<&'static str> {
        MODELS.iter().map(|m| m.0).collect()
    }

    /// The model's name in tables.
    pub fn title(&self) -> &'static str {
        MODELS.iter().find(|m| m.0 == self.model).map_or("MF", |m| m.1)
    }

    /// Settings of the chosen model, as text: what its file depends on besides the data.
    pub fn settings(&self) -> String {
        match self.model.as_str() {
            "lightgcn" => format!("{:?}", self.lightgcn),
            "sasrec" => format!("{:?}", self.sasrec),
            "din" => format!("{:?}", self.din),
            _ => format!("{:?}", self.mf),
        }
    }

    /// Epochs at most.
    pub fn max_epochs(&self) -> usize {
        match self.model.as_str() {
            "lightgcn" => self.lightgcn.max_epochs,
            "sasrec" => self.sasrec.max_epochs,
            "din" => self.din.max_epochs,
            _ => self.mf.max_epochs,
        }
    }

    /// Trains the chosen model (see [`train`]) and writes it, with facts and how it went as metadata, to `path`.
    pub fn fit(
        &self,
        data: &Dataset,
        cuda: Option<&Cuda>,
        checkpoints: Option<&Path>,
        (path, facts): (&Path, &[(&str, String)]),
        observe: &mut dyn FnMut(usize, f64, f64) -> bool,
    ) -> Result<(Collaborative, Summary), Error> {
        match self.model.as_str() {
            "lightgcn" => {
                let c = &self.lightgcn;
                let trained = train(data, LightGcn::init(data, c), &c.recipe(), cuda, checkpoints, observe)?;
                let summary = Summary::of(&trained);
                trained.model.save(path, &summary.facts(facts))?;
                Ok((Collaborative::Tables(trained.model.vectors()), summary))
            }
            "sasrec" => {
                let c = &self.sasrec;
                let trained = train(data, SasRec::init(c, data.n_items), &c.recipe(), cuda, checkpoints, observe)?;
                let summary = Summary::of(&trained);
                trained.model.save(path, &summary.facts(facts))?;
                Ok((Collaborative::SasRec(trained.model), summary))
            }
            "din" => {
                let c = &self.din;
                let start = Din::init(c, data.n_users, data.n_items);
                let trained = train(data, start, &c.recipe(), cuda, checkpoints, observe)?;
                let summary = Summary::of(&trained);
                trained.model.save(path, &summary.facts(facts))?;
                Ok((Collaborative::Din(trained.model), summary))
            }
            _ => {
                let c = &self.mf;
                let start = Mf::init(data.n_users, data.n_items, c.dim, c.seed);
                let trained = train(data, start, &c.recipe(), cuda, checkpoints, observe)?;
                let summary = Summary::of(&trained);
                trained.model.save(path, &summary.facts(facts))?;
                Ok((Collaborative::Tables(trained.model), summary))
            }
        }
    }

    /// Reads what [`Self::fit`] wrote.
    pub fn load(&self, path: &Path) -> Result<Collaborative, Error> {
        Ok(match self.model.as_str() {
            "lightgcn" => Collaborative::Tables(lightgcn::load(path)?),
            "sasrec" => Collaborative::SasRec(SasRec::load(&self.sasrec, path)?),
            "din" => Collaborative::Din(Din::load(&self.din, path)?),
            _ => Collaborative::Tables(Mf::load(path)?),
        })
    }
}

/// How training went.
#[derive(Clone, Copy, Debug)]
pub struct Summary {
    /// Epochs trained.
    pub epochs: usize,
    /// The epoch with the highest valid AUC.
    pub best_epoch: usize,
    /// That AUC.
    pub best_auc: f64,
}

impl Summary {
    fn of<M>(trained: &Trained<M>) -> Self {
        Summary { epochs: trained.epochs, best_epoch: trained.best_epoch, best_auc: trained.best_auc }
    }

    fn facts<'f>(&self, facts: &[(&'f str, String)]) -> Vec<(&'f str, String)> {
        let own = [("best_epoch", self.best_epoch.to_string()), ("valid_auc", self.best_auc.to_string())];
        facts.iter().cloned().chain(own).collect()
    }
}

/// A trained collaborative model.
#[derive(Clone, Debug)]
pub enum Collaborative {
    /// Two tables whose rows are multiplied: MF, or LightGCN after propagation.
    Tables(Mf),
    /// A state after the history, and a table of items.
    SasRec(SasRec),
    /// History and target together, and a table of items.
    Din(Din),
}

impl Collaborative {
    /// Width of the vectors.
    pub fn dim(&self) -> usize {
        match self {
            Collaborative::Tables(mf) => mf.dim,
            Collaborative::SasRec(sasrec) => sasrec.dim(),
            Collaborative::Din(din) => din.dim(),
        }
    }

    /// Numbers in its tensors.
    pub fn parameters(&self) -> usize {
        match self {
            Collaborative::Tables(mf) => mf.users.len() + mf.items.len(),
            Collaborative::SasRec(sasrec) => sasrec.tensors().iter().map(|t| t.values.len()).sum(),
            Collaborative::Din(din) => din.tensors().iter().map(|t| t.values.len()).sum(),
        }
    }

    /// The model's own scores of all rows.
    pub fn scores(&self, samples: &Samples) -> Vec<f32> {
        match self {
            Collaborative::Tables(mf) => mf.scores(samples),
            Collaborative::SasRec(sasrec) => sasrec.scores(samples),
            Collaborative::Din(din) => din.scores(samples),
        }
    }

    /// What fills the slots of these rows.
    pub fn slot_vectors<'m>(&'m self, samples: &'m Samples) -> SlotVectors<'m> {
        let users = match self {
            Collaborative::Tables(_) => Vec::new(),
            Collaborative::SasRec(sasrec) => sasrec.user_vectors(samples),
            Collaborative::Din(din) => din.user_vectors(samples),
        };
        SlotVectors { model: self, samples, users }
    }
}

/// The vectors behind the slots of a split's rows, while the model is frozen: what depends on more than an id is computed once.
#[derive(Debug)]
pub struct SlotVectors<'m> {
    model: &'m Collaborative,
    samples: &'m Samples,
    /// `[rows, dim]`; empty where a table has them.
    users: Vec<f32>,
}

impl SlotVectors<'_> {
    /// The vectors of these rows, `[rows, 2, dim]`: user, then item.
    pub fn take(&self, rows: &[usize]) -> Vec<f32> {
        let dim = self.model.dim();
        let mut out = Vec::with_capacity(2 * rows.len() * dim);
        for &row in rows {
            let (uid, iid) = (self.samples.uid[row], self.samples.iid[row]);
            match self.model {
                Collaborative::Tables(mf) => out.extend_from_slice(mf.user_vector(uid)),
                _ => out.extend_from_slice(&self.users[row * dim..][..dim]),
            }
            match self.model {
                Collaborative::Tables(mf) => out.extend_from_slice(mf.item_vector(iid)),
                Collaborative::SasRec(sasrec) => out.extend_from_slice(sasrec.item_vector(iid)),
                // PARITY: as wide as the user's vector by being there three times.
                Collaborative::Din(din) => (0..3).for_each(|_| out.extend_from_slice(din.item_third(iid))),
            }
        }
        out
    }
}
