//! A packed batch: prompts laid end to end, without padding, and split where gradients begin.

use std::ops::Range;
use std::sync::Arc;

use half::slice::HalfFloatSliceExt;

use crate::device::cpu::splice::Source;
use crate::device::ops::Segment;
use crate::llm::sharing::{Group, Sharing, within};
use crate::prompt::{PromptRef, SlotKind};

/// Where the gradient starts in each prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GradientFrom {
    /// At the first token: something trained acts on all of them (LoRA).
    Start,
    /// At the first slot: the text before it depends on nothing that is trained. It becomes a prefix segment of its own,
    /// computed forward only.
    FirstSlot,
}

/// Keys and values of frozen text that are known before the pass ([`super::prefix_cache`]).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Given {
    /// How many tokens.
    pub tokens: usize,
    /// Rotated keys, then values, of every token in every block: `[n_layers, tokens, 2 · kv_width]`.
    pub kv: Arc<[half::f16]>,
}

/// Rows of one or more prompts, frozen rows first.
#[derive(Clone, Debug, Default)]
pub struct PackedBatch {
    /// What each input row is made from.
    pub sources: Vec<Source>,
    /// Position of each row in its prompt (for RoPE).
    pub positions: Vec<u32>,
    /// Number of each row's token within the optimizer step (for dropout): the same however a step is cut.
    pub step_tokens: Vec<u32>,
    /// Who attends to whom when every row is a query. Key/value rows are those of [`Self::given`], then the batch's own.
    pub segments: Vec<Segment>,
    /// Keys and values that are not computed: they come before those of the rows.
    pub given: Vec<Given>,
    /// The row of each prompt's last token, in prompt order.
    pub last_rows: Vec<usize>,
    /// Rows before this one need no gradient.
    pub first_gradient: usize,
    /// Take all rows through all of the last block, and compute all vocabulary logits of each, as the official code does (for
    /// comparisons of cost). On a card this has no effect.
    pub every_position: bool,
}

/// Longest prompt that dropout's token numbers allow.
pub const MAX_PROMPT_TOKENS: usize = 1 << 14;

impl PackedBatch {
    /// Packs `prompts`, which are numbers `first_prompt..` of their optimizer step.
    ///
    /// A slot takes row `(i · 2 + kind) · tokens_per_vector + part` of the vectors, i the prompt's place in this batch.
    pub fn new(prompts: &[PromptRef], tokens_per_vector: usize, from: GradientFrom, first_prompt: usize) -> Self {
        let groups = Sharing::none(first_prompt + prompts.len()).groups;
        Self::grouped(prompts, &groups, tokens_per_vector, from, first_prompt, Vec::new())
    }

    /// As [`Self::new`], with the prefix of each group ([`super::sharing`]) computed once. `groups`: of the whole step, their members
    /// places in it; those that have some here count.
    ///
    /// A slot in a shared prefix takes the vector of the group's first prompt here; its gradient is that of all readers. The tokens of
    /// a shared prefix carry the numbers of the group's first prompt in the step, so they are dropped out once for all members, the
    /// same however the step is cut.
    ///
    /// `given`: empty, or with [`GradientFrom::FirstSlot`] the keys and values of the frozen text of each group here, in order.
    pub fn grouped(
        prompts: &[PromptRef],
        groups: &[Group],
        tokens_per_vector: usize,
        from: GradientFrom,
        first_prompt: usize,
        given: Vec<Given>,
    ) -> Self {
        let n_given: usize = given.iter().map(|g| g.tokens).sum();
        let mut batch = PackedBatch::default();
        let mut prefixes = vec![0..0; prompts.len()];
        let mut at = 0;
        for (k, (group, members)) in within(groups, first_prompt..first_prompt + prompts.len()).enumerate() {
            let members = members.start - first_prompt..members.end - first_prompt;
            let first = members.start;
            let tokens = group.prefix.max(match from {
                GradientFrom::Start => 0,
                GradientFrom::FirstSlot => frozen_tokens(&prompts[first]),
            });
            if let Some(given) = given.get(k) {
                assert_eq!(given.tokens, tokens, "the keys and values of a group's frozen text");
                prefixes[members].fill(at..at + tokens);
                at += tokens;
            } else if tokens > 0 {
                let q = batch.push(&prompts[first], 0..tokens, first, group.members.start, tokens_per_vector);
                batch.segments.push(Segment { kv: q.clone(), q: q.clone(), prefix: 0..0 });
                prefixes[members].fill(q);
            }
        }
        if from == GradientFrom::FirstSlot {
            batch.first_gradient = batch.sources.len();
        }
        for (i, (prompt, prefix)) in prompts.iter().zip(prefixes).enumerate() {
            let own = prefix.len()..prompt.ids.len();
            let q = batch.push(prompt, own, i, first_prompt + i, tokens_per_vector);
            batch.last_rows.push(q.end - 1);
            batch.segments.push(Segment { kv: n_given + q.start..n_given + q.end, q, prefix });
        }
        batch.given = given;
        batch
    }

    /// Rows for some tokens of prompt `i`, under the numbers of the step's prompt `number`.
    fn push(
        &mut self,
        prompt: &PromptRef,
        tokens: Range<usize>,
        i: usize,
        number: usize,
        tokens_per_vector: usize,
    ) -> Range<usize> {
        let start = self.sources.len();
        self.sources.extend(prompt.ids[tokens.clone()].iter().map(|&id| Source::Token(id)));
        for slot in prompt.slots.iter().filter(|s| tokens.contains(&(s.position as usize))) {
            let vector = (2 * i + (slot.kind == SlotKind::Item) as usize) * tokens_per_vector + slot.part as usize;
            self.sources[start + slot.position as usize - tokens.start] = Source::Vector(vector as u32);
        }
        self.positions.extend(tokens.clone().map(|t| t as u32));
        self.step_tokens.extend(tokens.map(|t| (number * MAX_PROMPT_TOKENS + t) as u32));
        start..self.sources.len()
    }

    /// Key/value rows that are given.
    pub fn n_given(&self) -> usize {
        self.given.iter().map(|g| g.tokens).sum()
    }

    /// Block `l`'s part of what is given, widened, `[n_given, width]`.
    pub fn read_given(&self, l: usize, width: usize, out: &mut [f32]) {
        let mut at = 0;
        for given in &self.given {
            let len = given.tokens * width;
            given.kv[l * len..][..len].convert_to_f32_slice(&mut out[at..at + len]);
            at += len;
        }
    }

    /// Number of rows (tokens).
    pub fn n_rows(&self) -> usize {
        self.sources.len()
    }

    /// Number of prompts.
    pub fn n_prompts(&self) -> usize {
        self.last_rows.len()
    }

    /// Segments of the trimmed last layer: query i is prompt i's last token.
    pub fn last_segments(&self) -> Vec<Segment> {
        let n_prefixes = self.segments.len() - self.last_rows.len();
        let own = &self.segments[n_prefixes..];
        own.iter()
            .enumerate()
            .map(|(i, s)| Segment { q: i..i + 1, kv: s.kv.clone(), prefix: s.prefix.clone() })
            .collect()
    }

    /// Segments that carry gradients, with query rows counted from `first_gradient`.
    pub fn gradient_segments(&self) -> Vec<Segment> {
        let first = self.first_gradient;
        let with_gradient = self.segments.iter().filter(|s| s.q.start >= first);
        with_gradient.map(|s| Segment { q: s.q.start - first..s.q.end - first, ..s.clone() }).collect()
    }
}

/// Tokens before the first slot of a prompt: they depend on nothing that is trained where the adapter is frozen. None without slots.
pub fn frozen_tokens(prompt: &PromptRef) -> usize {
    prompt.slots.first().map_or(0, |s| s.position as usize)
}

/// Cuts prompts of the given lengths into consecutive runs of at most `max_tokens` tokens (at least one prompt a run).
pub fn micro_batches(lengths: &[usize], max_tokens: usize) -> Vec<Range<usize>> {
    let mut runs = Vec::new();
    let (mut start, mut tokens) = (0, 0);
    for (i, &len) in lengths.iter().enumerate() {
        if i > start && tokens + len > max_tokens {
            runs.push(start..i);
            (start, tokens) = (i, 0);
        }
        tokens += len;
    }
    if start < lengths.len() {
        runs.push(start..lengths.len());
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prompt::Slot;

    #[test]
    fn frozen_rows_come_first_and_slots_are_spliced() {
        let slots = |at: [u32; 2]| {
            [SlotKind::User, SlotKind::Item].map(|kind| Slot { position: at[kind as usize], kind, part: 0 })
        };
        let (a, b) = (slots([2, 4]), slots([0, 1]));
        let prompts =
            [PromptRef { ids: &[10, 11, 0, 12, 0, 13], slots: &a }, PromptRef { ids: &[0, 0, 14], slots: &b }];
        let batch = PackedBatch::new(&prompts, 1, GradientFrom::FirstSlot, 3);
        use Source::{Token as T, Vector as V};
        assert_eq!(batch.sources, [T(10), T(11), V(0), T(12), V(1), T(13), V(2), V(3), T(14)]);
        assert_eq!(batch.positions, [0, 1, 2, 3, 4, 5, 0, 1, 2]);
        assert_eq!(batch.first_gradient, 2);
        assert_eq!(batch.last_rows, [5, 8]);
        assert_eq!(batch.segments[1], Segment { q: 2..6, kv: 2..6, prefix: 0..2 });
        assert_eq!(batch.segments[2], Segment { q: 6..9, kv: 6..9, prefix: 0..0 });
        assert_eq!(batch.last_segments()[1], Segment { q: 1..2, kv: 6..9, prefix: 0..0 });
        assert_eq!(batch.gradient_segments()[0], Segment { q: 0..4, kv: 2..6, prefix: 0..2 });
        assert_eq!(batch.step_tokens[2] as usize, 3 * MAX_PROMPT_TOKENS + 2);
        let whole = PackedBatch::new(&prompts, 1, GradientFrom::Start, 3);
        assert_eq!((whole.first_gradient, whole.segments.len()), (0, 2));
    }

    #[test]
    fn a_shared_prefix_is_there_once() {
        let prompts: [PromptRef; 3] = [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 6]]
            .map(|ids: [u32; 4]| PromptRef { ids: Box::leak(Box::new(ids)), slots: &[] });
        let groups = [Group { members: 0..2, prefix: 3 }, Group { members: 2..3, prefix: 0 }];
        let batch = PackedBatch::grouped(&prompts, &groups, 1, GradientFrom::Start, 0, Vec::new());
        use Source::Token as T;
        assert_eq!(batch.sources, [T(1), T(2), T(3), T(4), T(5), T(1), T(2), T(3), T(6)]);
        assert_eq!(batch.positions, [0, 1, 2, 3, 3, 0, 1, 2, 3]);
        assert_eq!((batch.first_gradient, &batch.last_rows[..]), (0, &[3, 4, 8][..]));
        assert_eq!(batch.segments[2], Segment { q: 4..5, kv: 4..5, prefix: 0..3 });
        assert_eq!(batch.last_segments()[1], Segment { q: 1..2, kv: 4..5, prefix: 0..3 });
    }

    #[test]
    fn micro_batches_cover_all_prompts_in_order() {
        assert_eq!(micro_batches(&[3, 3, 3, 10, 1], 6), [0..2, 2..3, 3..4, 4..5]);
        assert!(micro_batches(&[], 6).is_empty());
    }
}
