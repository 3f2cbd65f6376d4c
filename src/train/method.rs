//! The methods that are compared, and what a stage of each trains: which parts a run has, and where each begins.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::Error;
use super::config::{Config, StageConfig};
use super::pipeline::{Part, Pipeline, Trained};
use super::run_dir::RunDir;
use super::trainable::Trainable;
use super::tuner::PREFIX;
use crate::cie::FreeTokens;
use crate::collab::slots::Tuned;

/// What is done with the LLM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// CoLLM: collaborative vectors, mapped, in the prompt.
    #[default]
    Collm,
    /// TALLRec: the adapter on text alone, which is stage 1.
    Tallrec,
    /// In-context learning: the LLM as it is, asked as in stage 1.
    Icl,
    /// CoLLM's ablation with a free token for each user and item instead of collaborative model and mapping.
    UiToken,
    /// Prompt4NR: soft tokens, the same for all users and items, trained together with the adapter.
    Prompt4nr,
}

/// What stage 2 trains, and from where (reference, section 5.3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Strategy {
    /// Two stages: the adapter on text, then what fills the slots, with adapter and collaborative model frozen.
    #[default]
    Default,
    /// As `default`, with the collaborative model tuned in stage 2 from its pretrained state.
    T1,
    /// As T1, with the collaborative model from random numbers: it is never trained alone.
    T2,
    /// One stage: adapter and what fills the slots together, from scratch; the collaborative model is pretrained and frozen.
    T3,
}

impl Strategy {
    /// The collaborative model is tuned with stage 2.
    pub fn tunes_collab(self) -> bool {
        matches!(self, Strategy::T1 | Strategy::T2)
    }
}

impl Method {
    /// Its name in tables; `collab`: that of the collaborative model.
    pub fn title(self, strategy: Strategy, collab: &str) -> String {
        let name = match self {
            Method::Collm => format!("CoLLM-{collab}"),
            Method::Tallrec => "TALLRec (stage 1)".into(),
            Method::Icl => "ICL".into(),
            Method::UiToken => "w/ UI-token".into(),
            Method::Prompt4nr => "Prompt4NR".into(),
        };
        match strategy {
            Strategy::T1 => format!("{name} (T1)"),
            Strategy::T2 => format!("{name} (T2)"),
            Strategy::T3 if self == Method::Collm => format!("{name} (T3)"),
            _ => name,
        }
    }

    /// What fills the slots of stage 2, in tables of tensors.
    pub fn filling(self, collab: &'static str) -> &'static str {
        match self {
            Method::UiToken => "user and item tokens",
            Method::Prompt4nr => "soft tokens",
            _ => collab,
        }
    }
}

impl Config {
    /// The parts of a run, in their order.
    pub fn parts(&self) -> Vec<Part> {
        use Part::{Collab, Stage1, Stage2};
        match (self.method, self.strategy) {
            (Method::Icl, _) => vec![],
            (Method::Tallrec, _) => vec![Stage1],
            (Method::Collm, Strategy::T2) => vec![Stage1, Stage2],
            (Method::Collm, Strategy::T3) => vec![Collab, Stage2],
            (Method::Collm, _) => vec![Collab, Stage1, Stage2],
            (_, Strategy::T3) => vec![Stage2],
            _ => vec![Stage1, Stage2],
        }
    }

    /// Stage 2 with what method and strategy train switched on.
    pub(super) fn stage2_of_strategy(&self) -> StageConfig {
        let mut stage = self.stage2.clone();
        stage.train_cie |= self.strategy != Strategy::Default;
        stage.train_lora |= self.strategy == Strategy::T3 || self.method == Method::Prompt4nr;
        stage
    }

    /// A method that has no such strategy, and which it has.
    pub(super) fn strategy_misfit(&self) -> Option<String> {
        let known: &[Strategy] = match self.method {
            Method::Collm => return None,
            Method::Prompt4nr => &[Strategy::Default, Strategy::T3],
            _ => &[Strategy::Default],
        };
        let names = if known.len() == 1 { "default" } else { "default or t3" };
        let (strategy, method) = (written(self.strategy), written(self.method));
        (!known.contains(&self.strategy))
            .then(|| format!("is {strategy}, which method {method} does not have; set it to {names}"))
    }
}

/// A setting as it is written.
fn written(value: impl Serialize) -> String {
    toml::Value::try_from(value).ok().and_then(|v| v.as_str().map(str::to_string)).unwrap_or_default()
}

impl Pipeline {
    /// Runs one part of the run's method: what it has already is taken from the run directory.
    pub fn run(&self, part: Part, run: &mut RunDir) -> Result<(), Error> {
        let config = self.config();
        let outcome = match part {
            Part::Collab => return self.collab(run).map(drop),
            Part::Stage1 => self.stage(part, &self.fresh(), None, None, run)?,
            Part::Stage2 => {
                let pretrained = config.parts().contains(&Part::Collab).then(|| self.collab(run)).transpose()?;
                let tuned = self.tuned(run.root())?;
                let start = self.stage2_start(run.root(), pretrained.as_ref().map(|c| c.dim()), tuned.as_deref())?;
                let frozen = pretrained.as_ref().filter(|_| tuned.is_none());
                self.stage(part, &start, frozen, tuned, run)?
            }
        };
        self.export(run, &outcome.best)
    }

    /// What fills the slots of stage 2, if it is trained, as it begins.
    fn tuned(&self, run: &Path) -> Result<Option<Box<dyn Tuned>>, Error> {
        let (config, data) = (self.config(), self.data());
        let width = self.model().config().hidden_size * config.prompt.style.tokens_per_vector;
        Ok(match (config.method, config.strategy) {
            (Method::Collm, Strategy::T1) => Some(config.collab.tuned(data, Some(&self.collab_path(run)))?),
            (Method::Collm, Strategy::T2) => Some(config.collab.tuned(data, None)?),
            (Method::UiToken, _) => Some(Box::new(FreeTokens::per_id(data.n_users, data.n_items, width, config.seed))),
            (Method::Prompt4nr, _) => Some(Box::new(FreeTokens::shared(width, config.seed))),
            _ => None,
        })
    }

    /// Adapter and mapping as stage 2 begins.
    fn stage2_start(&self, run: &Path, dim: Option<usize>, tuned: Option<&dyn Tuned>) -> Result<Trainable, Error> {
        let two_stages = self.config().parts().contains(&Part::Stage1);
        let lora = if two_stages { self.stage1_best(run)? } else { self.fresh().lora };
        Ok(match (self.config().method, dim.or(tuned.map(|t| t.dim()))) {
            (Method::Collm, Some(dim)) => self.with_cie(lora, dim),
            _ => Trainable { lora, cie: None },
        })
    }

    /// What a finished run holds for a part: stage 2's tensors with what fills its slots, or stage 1's alone. The LLM as it is where
    /// the method trains nothing.
    pub fn trained(&self, run: &Path, part: Part) -> Result<Trained, Error> {
        let config = self.config();
        if config.method == Method::Icl {
            return Ok(Trained { tensors: self.fresh(), collab: None });
        }
        if part != Part::Stage2 {
            return Ok(Trained { tensors: Trainable { lora: self.stage1_best(run)?, cie: None }, collab: None });
        }
        let mut tuned = self.tuned(run)?;
        let pretrained = match &tuned {
            None => Some(config.collab.load(&self.collab_path(run))?),
            Some(_) => None,
        };
        let dim = pretrained.as_ref().map(|c| c.dim()).or(tuned.as_ref().map(|t| t.dim()));
        let mut tensors = self.fresh();
        if let (Method::Collm, Some(dim)) = (config.method, dim) {
            tensors = self.with_cie(tensors.lora, dim);
        }
        let (mut saved, place) = self.best(run, "stage2")?;
        if let Some(tuned) = &mut tuned {
            tuned.restore(&mut saved, PREFIX).map_err(|what| Error::state(&place, what))?;
        }
        tensors.restore(saved).map_err(|what| Error::state(&place, what))?;
        Ok(Trained { tensors, collab: pretrained.or(tuned.map(|t| t.frozen())) })
    }
}
