//! Batches filled up to one of few sizes, so that the same graph serves many of them.
//!
//! Frozen rows, rows with a gradient and prompts are rounded up. The rows that are added attend to each other only; each added prompt
//! is one of them, and its loss has weight 0: gradients get zeros from them, and no other row sees them. That holds bit for bit, so
//! filled batches are used with graphs and without. Products have tiles of 128 rows: rows up to the next tile cost them nothing.

use std::ops::Range;

use crate::device::cpu::splice::Source;
use crate::device::ops::Segment;
use crate::llm::batch::PackedBatch;

/// Rows are a multiple of this.
const ROWS: usize = 128;
/// Prompts are a multiple of this.
const PROMPTS: usize = 8;

/// Prompts of the filled batch.
pub(super) fn filled_prompts(prompts: usize) -> usize {
    prompts.next_multiple_of(PROMPTS)
}

/// Rows of a filled batch of at most so many, `(all, with a gradient)`. `frozen`: some may have none.
pub(super) fn filled_rows(rows: usize, frozen: bool) -> (usize, usize) {
    let with_gradient = (rows + PROMPTS - 1).next_multiple_of(ROWS);
    (with_gradient + if frozen { ROWS } else { 0 }, with_gradient)
}

/// Segments that a filled batch of so many prompts has at most: prompts, prefixes, and added rows twice.
pub(super) fn filled_segments(prompts: usize) -> usize {
    2 * filled_prompts(prompts) + 2
}

/// The batch with added rows behind the frozen rows and behind the others. The prompts keep their numbers.
pub(super) fn filled(batch: &PackedBatch) -> PackedBatch {
    let (n, first, prompts) = (batch.n_rows(), batch.first_gradient, batch.n_prompts());
    let more_prompts = filled_prompts(prompts) - prompts;
    let more_frozen = first.next_multiple_of(ROWS) - first;
    let with_gradient = n - first;
    let more = (with_gradient + more_prompts).next_multiple_of(ROWS) - with_gradient;
    let mut out = PackedBatch { first_gradient: first + more_frozen, ..PackedBatch::default() };
    let mut take = |rows: Range<usize>, then: usize| {
        let end = out.sources.len() + rows.len() + then;
        out.sources.extend_from_slice(&batch.sources[rows.clone()]);
        out.sources.resize(end, Source::Token(0));
        out.positions.extend_from_slice(&batch.positions[rows.clone()]);
        out.positions.resize(end, 0);
        out.step_tokens.extend_from_slice(&batch.step_tokens[rows]);
        out.step_tokens.resize(end, 0);
    };
    take(0..first, more_frozen);
    take(first..n, more);
    let alone = |rows: Range<usize>| Segment { q: rows.clone(), kv: rows, prefix: 0..0 };
    let behind = n + more_frozen;
    let end = behind + more;
    // What is no prompt comes before the prompts.
    let extra = [first..first + more_frozen, behind + more_prompts..end];
    out.segments.extend(extra.into_iter().filter(|rows| !rows.is_empty()).map(alone));
    let row = |r: usize| if r < first { r } else { r + more_frozen };
    let rows = |r: &Range<usize>| if r.is_empty() { 0..0 } else { row(r.start)..row(r.end - 1) + 1 };
    out.segments.extend(batch.segments.iter().map(|s| Segment {
        q: rows(&s.q),
        kv: rows(&s.kv),
        prefix: rows(&s.prefix),
    }));
    out.segments.extend((behind..behind + more_prompts).map(|r| alone(r..r + 1)));
    out.last_rows.extend(batch.last_rows.iter().map(|&r| row(r)));
    out.last_rows.extend(behind..behind + more_prompts);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::llm::batch::GradientFrom;
    use crate::prompt::{PromptRef, Slot, SlotKind};

    #[test]
    fn what_was_there_keeps_its_neighbours() {
        let slot = |position| Slot { position, kind: SlotKind::User, part: 0 };
        let slots = [[slot(2)], [slot(1)]];
        let ids: Vec<Vec<u32>> = vec![(1..150).collect(), (200..203).collect()];
        let prompts: Vec<_> =
            ids.iter().zip(&slots).map(|(ids, slots)| PromptRef { ids, slots: slots.as_slice() }).collect();
        for from in [GradientFrom::Start, GradientFrom::FirstSlot] {
            let batch = PackedBatch::new(&prompts, 1, from, 5);
            let out = filled(&batch);
            let (rows, with_gradient) = filled_rows(batch.n_rows(), from == GradientFrom::FirstSlot);
            assert_eq!(out.n_prompts(), 8);
            assert!(out.n_rows() <= rows && out.n_rows() - out.first_gradient <= with_gradient);
            assert!(out.n_rows().is_multiple_of(ROWS) && out.first_gradient.is_multiple_of(ROWS));
            assert_eq!((out.positions.len(), out.step_tokens.len()), (out.n_rows(), out.n_rows()));
            assert!(out.segments.len() <= filled_segments(2));
            // Every row is a query of exactly one segment.
            let mut queries: Vec<_> = out.segments.iter().flat_map(|s| s.q.clone()).collect();
            queries.sort_unstable();
            assert!(queries.into_iter().eq(0..out.n_rows()));
            // What the prompts' segments are made of is what it was.
            let tokens = |b: &PackedBatch, rows: Range<usize>| -> Vec<_> {
                rows.map(|r| (b.sources[r], b.positions[r], b.step_tokens[r])).collect()
            };
            let whole = |b: &PackedBatch, s: &Segment| (tokens(b, s.prefix.clone()), tokens(b, s.kv.clone()));
            let own = |b: &PackedBatch| b.segments[b.segments.len() - b.n_prompts()..].to_vec();
            for (i, (was, is)) in own(&batch).iter().zip(own(&out)).enumerate() {
                assert_eq!(whole(&batch, was), whole(&out, &is));
                assert_eq!(out.last_rows[i], is.q.end - 1);
                assert!(is.q.start >= out.first_gradient && is.prefix.end <= out.first_gradient);
            }
            assert_eq!(out.last_segments().len(), 8);
            assert!(out.last_rows.iter().all(|&r| r >= out.first_gradient));
        }
    }

    #[test]
    fn a_batch_that_fits_is_left_as_it_is() {
        let ids: Vec<Vec<u32>> = vec![(0..16).collect(); 8];
        let prompts: Vec<_> = ids.iter().map(|ids| PromptRef { ids, slots: &[] }).collect();
        let batch = PackedBatch::new(&prompts, 1, GradientFrom::Start, 0);
        let out = filled(&batch);
        assert_eq!((out.n_rows(), out.segments, out.last_rows), (128, batch.segments, batch.last_rows));
        assert_eq!(filled_rows(128, false), (256, 256));
    }
}
