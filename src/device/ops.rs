//! What the implementations of the operations share: shapes, masks, losses. No arithmetic on tensors.

use std::ops::Range;

use serde::{Deserialize, Serialize};

/// Who attends to whom, for one run of tokens of a packed batch.
///
/// The queries `q` (rows of the query buffer) are the *last* `q.len()` tokens of the run `kv` (rows of the key/value
/// buffer). Query i of `n` sees all of `prefix`, and of `kv` everything up to itself: the first `kv.len() - n + i + 1`
/// rows. Without padding, a batch is a list of these; a prefix shared by several runs is computed once; a trimmed last
/// layer is a run with one query.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Query rows.
    pub q: Range<usize>,
    /// Own key/value rows, at least as many as query rows.
    pub kv: Range<usize>,
    /// Key/value rows of another segment, seen by all queries; empty if none.
    pub prefix: Range<usize>,
}

/// Head counts of an attention layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadShape {
    /// Query heads.
    pub n_heads: usize,
    /// Key/value heads; divides `n_heads` (grouped-query attention).
    pub n_kv_heads: usize,
    /// Elements of one head; even.
    pub head_dim: usize,
}

impl HeadShape {
    /// Columns of the query buffer.
    pub fn q_width(&self) -> usize {
        self.n_heads * self.head_dim
    }

    /// Columns of the keys (or of the values).
    pub fn kv_width(&self) -> usize {
        self.n_kv_heads * self.head_dim
    }
}

/// What the last position's vocabulary logits are turned into.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Loss {
    /// Binary cross-entropy on the raw logit of "Yes": the official loss and score (reference, section 3).
    #[default]
    YesLogitBce,
    /// Cross-entropy of the softmax over "Yes" and "No" (TALLRec's own head): BCE on `yes − no`.
    YesNoSoftmax,
}

impl Loss {
    /// Vocabulary rows it takes.
    pub fn rows(self) -> usize {
        match self {
            Loss::YesLogitBce => 1,
            Loss::YesNoSoftmax => 2,
        }
    }
}

/// Dropout on the input of one LoRA pair: element (token, feature) is dropped iff a Philox word is below `p · 2³²`.
///
/// The word is a pure function of (seed, step, module, token, feature), so the same element is dropped however the step
/// is cut into micro-batches, on any device, and after a resume. One Philox block serves four features a quarter of the
/// row apart (`quarter = ⌈width / 4⌉`): feature f takes word `f / quarter` of block `f mod quarter`, so neighbours come from
/// neighbouring blocks and the work runs along the row.
#[derive(Clone, Copy, Debug)]
pub struct Dropout {
    /// Probability of dropping, 0 ≤ p < 1.
    pub p: f32,
    /// Seed of the run.
    pub seed: u64,
    /// Optimizer step.
    pub step: u64,
}

impl Dropout {
    /// Factor of the elements that stay.
    pub fn scale(&self) -> f32 {
        1.0 / (1.0 - self.p)
    }

    /// Words below this are dropped.
    pub fn threshold(&self) -> u32 {
        (f64::from(self.p) * 4_294_967_296.0) as u32
    }

    /// Philox key: the seed, set apart from other uses of it.
    pub fn key(&self) -> [u32; 2] {
        [self.seed as u32 ^ 0x10ca_0d20, (self.seed >> 32) as u32]
    }

    /// Philox counter of block `block` of token `token` (its number within the step) in LoRA module `module`.
    pub fn counter(&self, module: u32, token: u32, block: u32) -> [u32; 4] {
        [block, token, module, self.step as u32]
    }
}

/// Binary cross-entropy of logit `z` against `label` in {0, 1}, and its derivative with respect to z.
pub fn bce_with_logits(z: f64, label: f64) -> (f64, f64) {
    // In this order z and label · z cancel exactly, so that a loss near zero keeps its digits.
    (z.max(0.0) - label * z + (-z.abs()).exp().ln_1p(), 1.0 / (1.0 + (-z).exp()) - label)
}
