//! What a stage trains, on the host, and scores from it.

use std::ops::Range;

use super::Error;
use crate::checkpoint::{Tensor, take_tensor};
use crate::cie::Mapping;
use crate::collab::{Collaborative, SlotVectors};
use crate::data::Samples;
use crate::device::ops::Loss;
use crate::llm::batch::{GradientFrom, PackedBatch, frozen_tokens, micro_batches};
use crate::llm::cuda::Rules;
use crate::llm::model::{Model, Workspace};
use crate::llm::peft::LoraTensors;
use crate::llm::prefix_cache::PrefixCache;
use crate::llm::sharing::{Sharing, within};
use crate::prompt::PromptSet;

/// What is trained, and what fills the slots.
#[derive(Clone, Debug, PartialEq)]
pub struct Trainable {
    /// The adapter.
    pub lora: LoraTensors,
    /// The mapping; `None` while no template has slots.
    pub cie: Option<Mapping>,
}

impl Trainable {
    /// All tensors under the names of files: PEFT's keys and `llama_proj.*`.
    pub fn tensors(&self) -> Vec<Tensor> {
        let lora = self.lora.named().into_iter().zip(self.lora.shapes());
        let lora = lora.map(|((name, values), shape)| Tensor::new(name, shape, values.to_vec()));
        let cie = self.cie.iter().flat_map(|m| {
            let parts = Mapping::NAMES.iter().zip(m.shapes()).zip(&m.tensors);
            parts.map(|((name, shape), values)| Tensor::new(*name, shape, values.clone()))
        });
        lora.chain(cie).collect()
    }

    /// Takes the values of a list that [`Self::tensors`] made.
    pub fn restore(&mut self, mut tensors: Vec<Tensor>) -> Result<(), String> {
        for current in self.tensors() {
            let values = take_tensor(&mut tensors, &current.name, &current.shape)?;
            self.slot(&current.name).copy_from_slice(&values);
        }
        Ok(())
    }

    /// Lengths of the tensors that are trained, in the order of [`Self::tensors`].
    pub fn trained_lengths(&self, rules: Rules) -> Vec<usize> {
        let is_trained = |name: &str| if name.starts_with("llama_proj") { rules.cie } else { rules.lora };
        self.tensors().iter().filter(|t| is_trained(&t.name)).map(|t| t.values.len()).collect()
    }

    fn slot(&mut self, name: &str) -> &mut [f32] {
        let names: Vec<String> = self.lora.named().into_iter().map(|n| n.0).collect();
        if let Some(i) = names.iter().position(|n| n == name) {
            return self.lora.slices_mut().swap_remove(i);
        }
        let i = Mapping::NAMES.iter().position(|n| *n == name);
        match (i, &mut self.cie) {
            (Some(i), Some(m)) => &mut m.tensors[i],
            _ => unreachable!("{name} is a name of tensors()"),
        }
    }

    /// The same shapes, all zero.
    pub fn zeros_like(&self) -> Self {
        let cie = self.cie.as_ref().map(|m| Mapping::zeros(m.dim, m.mid, m.out));
        Trainable { lora: self.lora.zeros_like(), cie }
    }
}

/// Scores of the given rows with tensors of the host: prompts of at most `batch_tokens` tokens at once. `prefixes`: keys and values of
/// the text before the first slot under the same model and adapter. `done` is called with the number of rows scored.
#[allow(clippy::too_many_arguments)] // everything a score depends on
pub fn score_rows(
    model: &Model,
    trained: Option<&Trainable>,
    collab: Option<&Collaborative>,
    samples: &Samples,
    prompts: &PromptSet,
    rows: &[usize],
    loss: Loss,
    batch_tokens: usize,
    workspace: &mut Workspace,
    prefixes: Option<&mut PrefixCache>,
    done: impl FnMut(usize),
) -> Result<Vec<f32>, Error> {
    let scorer = |batch: &_, x: &_| scores_of(model, trained, batch, x, loss, workspace);
    let vectors = collab.map(|c| c.slot_vectors(samples));
    score_with(scorer, vectors.as_ref(), samples, prompts, rows, batch_tokens, prefixes, done)
}

/// Scores of a batch with tensors of the host. `x`: the collaborative vectors behind it.
pub(super) fn scores_of(
    model: &Model,
    trained: Option<&Trainable>,
    batch: &PackedBatch,
    x: &[f32],
    loss: Loss,
    workspace: &mut Workspace,
) -> Result<Vec<f32>, Error> {
    let cie = trained.and_then(|t| t.cie.as_ref()).filter(|_| !x.is_empty());
    let mapped = cie.map(|cie| cie.forward(x).output);
    let vectors = mapped.as_deref().unwrap_or(x);
    Ok(model.scores(trained.map(|t| &t.lora), batch, vectors, loss, workspace)?)
}

/// As [`score_rows`], with anything that gives the scores of a batch and the collaborative vectors behind it.
#[allow(clippy::too_many_arguments)] // everything a score depends on
pub(crate) fn score_with(
    mut scorer: impl FnMut(&PackedBatch, &[f32]) -> Result<Vec<f32>, Error>,
    vectors: Option<&SlotVectors>,
    samples: &Samples,
    prompts: &PromptSet,
    rows: &[usize],
    batch_tokens: usize,
    mut prefixes: Option<&mut PrefixCache>,
    mut done: impl FnMut(usize),
) -> Result<Vec<f32>, Error> {
    let refs: Vec<_> = rows.iter().map(|&r| prompts.get(r)).collect();
    let ids: Vec<_> = rows.iter().map(|&r| (samples.uid[r], samples.iid[r])).collect();
    let from = if prefixes.is_some() { GradientFrom::FirstSlot } else { GradientFrom::Start };
    // Rows of one user mostly begin alike: that part is computed once.
    let sharing = Sharing::best(&refs, &ids, from);
    let ordered: Vec<usize> = sharing.order.iter().map(|&i| rows[i]).collect();
    let together = Together { vectors, prompts, rows: &ordered, sharing: &sharing, from };
    let (mut scores, mut n_done) = (vec![0.0; rows.len()], 0);
    for run in together.batches(batch_tokens, prefixes.is_some()) {
        let (batch, x) = together.pack(run.clone(), prefixes.as_deref_mut())?;
        let places = &sharing.order[run];
        places.iter().zip(scorer(&batch, &x)?).for_each(|(&i, score)| scores[i] = score);
        n_done += places.len();
        done(n_done);
    }
    Ok(scores)
}

/// Rows that are computed together, a part at a time: those of an optimizer step, or of a scoring.
pub(crate) struct Together<'a> {
    /// What fills the slots of the split's rows.
    pub vectors: Option<&'a SlotVectors<'a>>,
    pub prompts: &'a PromptSet,
    /// Rows of the samples, in the order of the groups.
    pub rows: &'a [usize],
    pub sharing: &'a Sharing,
    pub from: GradientFrom,
}

impl Together<'_> {
    /// Consecutive runs of the rows, of at most `max_tokens` computed tokens each; `given`: frozen text is not computed.
    pub fn batches(&self, max_tokens: usize, given: bool) -> Vec<Range<usize>> {
        if given {
            let own = |&r: &usize| self.prompts.tokens(r) - frozen_tokens(&self.prompts.get(r));
            return micro_batches(&self.rows.iter().map(own).collect::<Vec<_>>(), max_tokens);
        }
        self.sharing.batches(|place| self.prompts.tokens(self.rows[place]), max_tokens)
    }

    /// The prompts of a run of rows, and the collaborative vectors behind them; none where no prompt has slots.
    pub fn pack(
        &self,
        run: Range<usize>,
        prefixes: Option<&mut PrefixCache>,
    ) -> Result<(PackedBatch, Vec<f32>), Error> {
        let rows = &self.rows[run.clone()];
        let refs: Vec<_> = rows.iter().map(|&r| self.prompts.get(r)).collect();
        let has_slots = refs.iter().any(|p| !p.slots.is_empty());
        let x = self.vectors.filter(|_| has_slots).map(|v| v.take(rows)).unwrap_or_default();
        let tokens_per_vector = refs.iter().flat_map(|p| p.slots).map(|s| s.part as usize + 1).max().unwrap_or(1);
        let groups = &self.sharing.groups;
        let given = match prefixes {
            None => Vec::new(),
            Some(cache) => {
                let firsts = within(groups, run.clone()).map(|(_, members)| refs[members.start - run.start]);
                cache.fetch(&firsts.map(|p| &p.ids[..frozen_tokens(&p)]).collect::<Vec<_>>())?
            }
        };
        Ok((PackedBatch::grouped(&refs, groups, tokens_per_vector, self.from, run.start, given), x))
    }
}
