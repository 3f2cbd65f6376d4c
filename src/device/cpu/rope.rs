//! Rotary position embedding, "half" layout of Hugging Face's LLaMA: element i of a head pairs with i + head_dim / 2.

use rayon::prelude::*;

use super::ROWS_PER_TASK;
use super::simd::per_isa;
use crate::device::profile::{Group, span};

/// cos and sin of every (position, frequency), `[n_positions, head_dim / 2]` each, computed in float64.
#[derive(Clone, Debug)]
pub struct RopeTable {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
}

impl RopeTable {
    /// Angles `position · inv_freq[i]` for positions `0..n_positions`.
    pub fn new(inv_freq: &[f64], n_positions: usize) -> Self {
        let half = inv_freq.len();
        let (mut cos, mut sin) = (Vec::with_capacity(n_positions * half), Vec::with_capacity(n_positions * half));
        for position in 0..n_positions {
            for f in inv_freq {
                let angle = position as f64 * f;
                cos.push(angle.cos() as f32);
                sin.push(angle.sin() as f32);
            }
        }
        RopeTable { cos, sin, half }
    }

    /// Positions the table covers.
    pub fn n_positions(&self) -> usize {
        self.cos.len() / self.half
    }
}

/// Direction of the rotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rotation {
    /// By the angle.
    Forward,
    /// By minus the angle: the transpose, for gradients.
    Backward,
}

/// Rotates the first `n_heads` heads of every row of `x: [n_rows, stride]` in place; `positions[t]` belongs to row t.
pub fn rotate(table: &RopeTable, positions: &[u32], n_heads: usize, x: &mut [f32], stride: usize, direction: Rotation) {
    let _span = span(Group::Elementwise, || 0.0);
    let half = table.half;
    let sign = if direction == Rotation::Forward { 1.0 } else { -1.0 };
    x.par_chunks_mut(stride).zip(positions).with_min_len(ROWS_PER_TASK).for_each(|(row, &position)| {
        let at = position as usize * half;
        let (cos, sin) = (&table.cos[at..at + half], &table.sin[at..at + half]);
        rotate_row(&mut row[..n_heads * 2 * half], cos, sin, sign);
    });
}

per_isa! {
    fn rotate_row(row: &mut [f32], cos: &[f32], sin: &[f32], sign: f32) {
        let half = cos.len();
        for head in row.chunks_exact_mut(2 * half) {
            let (low, high) = head.split_at_mut(half);
            for (((a, b), c), s) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                let s = sign * s;
                (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
            }
        }
    }
}
