//! The embedding splice: token rows and collaborative vectors gathered into the packed input in one pass.

use rayon::prelude::*;

use super::ROWS_PER_TASK;
use crate::device::profile::{Group, rows, span};
use crate::llm::weights::WeightMatrix;

/// What an input row is made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A row of the embedding table.
    Token(u32),
    /// A row of the vectors to splice.
    Vector(u32),
}

/// `x[t] = embed[id]` or `vectors[v]`, widened to float32. `x: [n_rows, hidden]`, `vectors: [n, hidden]`.
pub fn splice(sources: &[Source], embed: &WeightMatrix, vectors: &[f32], x: &mut [f32]) {
    let _span = span(Group::Elementwise, || 0.0);
    rows(sources.len());
    let hidden = embed.cols();
    x.par_chunks_mut(hidden).zip(sources).with_min_len(ROWS_PER_TASK).for_each(|(x, source)| match *source {
        Source::Token(id) => embed.read_row(id as usize, x),
        Source::Vector(v) => x.copy_from_slice(&vectors[v as usize * hidden..][..hidden]),
    });
}

/// `d_vectors[v] = d_x[t]` for every spliced row; `sources` belong to the rows of `d_x`. Token rows are frozen.
pub fn splice_backward(sources: &[Source], d_x: &[f32], hidden: usize, d_vectors: &mut [f32]) {
    let _span = span(Group::Elementwise, || 0.0);
    for (source, d_x) in sources.iter().zip(d_x.chunks_exact(hidden)) {
        if let Source::Vector(v) = *source {
            d_vectors[v as usize * hidden..][..hidden].copy_from_slice(d_x);
        }
    }
}
