//! What a stage trains, on the host, and scores from it.

use super::Error;
use crate::checkpoint::{Tensor, take_tensor};
use crate::cie::Mapping;
use crate::collab::mf::Mf;
use crate::data::Samples;
use crate::device::ops::Loss;
use crate::llm::batch::{GradientFrom, PackedBatch};
use crate::llm::cuda::Rules;
use crate::llm::model::{Model, Workspace};
use crate::llm::peft::LoraTensors;
use crate::llm::sharing::{Group, Sharing};
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

/// The vectors of rows, `[rows, 2, dim]`: user, then item.
pub fn collaborative_vectors(mf: &Mf, samples: &Samples, rows: &[usize]) -> Vec<f32> {
    let pair = |&i: &usize| [mf.user_vector(samples.uid[i]), mf.item_vector(samples.iid[i])];
    rows.iter().flat_map(pair).flatten().copied().collect()
}

/// Scores of the given rows with tensors of the host: prompts of at most `batch_tokens` tokens at once. `done` is called with the
/// number of rows scored.
#[allow(clippy::too_many_arguments)] // everything a score depends on
pub fn score_rows(
    model: &Model,
    trained: Option<&Trainable>,
    mf: Option<&Mf>,
    samples: &Samples,
    prompts: &PromptSet,
    rows: &[usize],
    loss: Loss,
    batch_tokens: usize,
    workspace: &mut Workspace,
    done: impl FnMut(usize),
) -> Result<Vec<f32>, Error> {
    let scorer = |batch: &_, x: &_| scores_of(model, trained, batch, x, loss, workspace);
    score_with(scorer, mf, samples, prompts, rows, batch_tokens, done)
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
    let vectors = cie.map(|cie| cie.forward(x).output).unwrap_or_default();
    Ok(model.scores(trained.map(|t| &t.lora), batch, &vectors, loss, workspace)?)
}

/// As [`score_rows`], with anything that gives the scores of a batch and the collaborative vectors behind it.
pub(crate) fn score_with(
    mut scorer: impl FnMut(&PackedBatch, &[f32]) -> Result<Vec<f32>, Error>,
    mf: Option<&Mf>,
    samples: &Samples,
    prompts: &PromptSet,
    rows: &[usize],
    batch_tokens: usize,
    mut done: impl FnMut(usize),
) -> Result<Vec<f32>, Error> {
    let refs: Vec<_> = rows.iter().map(|&r| prompts.get(r)).collect();
    let ids: Vec<_> = rows.iter().map(|&r| (samples.uid[r], samples.iid[r])).collect();
    // Rows of one user mostly begin alike: that part is computed once.
    let sharing = Sharing::best(&refs, &ids, GradientFrom::Start);
    let (mut scores, mut n_done) = (vec![0.0; rows.len()], 0);
    for groups in sharing.batches(|i| refs[i].ids.len(), batch_tokens) {
        let (first, end) = (groups[0].members.start, groups[groups.len() - 1].members.end);
        let places = &sharing.order[first..end];
        let here: Vec<usize> = places.iter().map(|&i| rows[i]).collect();
        let groups: Vec<Group> = groups
            .iter()
            .map(|g| Group { members: g.members.start - first..g.members.end - first, prefix: g.prefix })
            .collect();
        let (batch, x) = packed(mf, samples, prompts, &here, Some(&groups), GradientFrom::Start, 0);
        places.iter().zip(scorer(&batch, &x)?).for_each(|(&i, score)| scores[i] = score);
        n_done += places.len();
        done(n_done);
    }
    Ok(scores)
}

/// The prompts of rows, and the collaborative vectors behind them; none where no prompt has slots.
pub(super) fn packed(
    mf: Option<&Mf>,
    samples: &Samples,
    prompts: &PromptSet,
    rows: &[usize],
    groups: Option<&[Group]>,
    from: GradientFrom,
    first: usize,
) -> (PackedBatch, Vec<f32>) {
    let refs: Vec<_> = rows.iter().map(|&r| prompts.get(r)).collect();
    let has_slots = refs.iter().any(|p| !p.slots.is_empty());
    let x = mf.filter(|_| has_slots).map(|mf| collaborative_vectors(mf, samples, rows)).unwrap_or_default();
    let tokens_per_vector = refs.iter().flat_map(|p| p.slots).map(|s| s.part as usize + 1).max().unwrap_or(1);
    let batch = match groups {
        Some(groups) => PackedBatch::grouped(&refs, groups, tokens_per_vector, from, first),
        None => PackedBatch::new(&refs, tokens_per_vector, from, first),
    };
    (batch, x)
}
