//! Where the time of a pass on the CPU goes, by group of operations, and how much arithmetic each does.
//!
//! Every operation on the CPU opens a [`span`] on the thread that calls it; while no tally is kept on that thread, which is always
//! but in `bench overhead`, a span is one look at a flag. Spans are not nested: what an operation does inside is its own. Time
//! outside of all spans (moving rows together, the loss, building batches) is the difference to the clock. Nothing is counted on
//! a card.

use std::cell::{Cell, RefCell};
use std::time::Instant;

use serde::{Deserialize, Serialize};

/// A group of operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Group {
    /// Products with the frozen weights of the blocks, biases included.
    Linear,
    /// LoRA's products and dropout.
    Adapter,
    /// Scores, softmax, values, and their gradients.
    Attention,
    /// RMSNorm, RoPE, SwiGLU, the splice, copies.
    Elementwise,
    /// Answer rows or vocabulary logits, and their gradient.
    Head,
    /// The mapping MLP of CIE.
    Mapping,
    /// Propagation over the graph of a collaborative model.
    Collaborative,
    /// Clipping and Adam.
    Optimizer,
}

impl Group {
    /// All, in order.
    pub const ALL: [Group; 8] = [
        Group::Linear,
        Group::Adapter,
        Group::Attention,
        Group::Elementwise,
        Group::Head,
        Group::Mapping,
        Group::Collaborative,
        Group::Optimizer,
    ];

    /// For tables.
    pub fn title(self) -> &'static str {
        match self {
            Group::Linear => "linear layers",
            Group::Adapter => "LoRA",
            Group::Attention => "attention",
            Group::Elementwise => "norm, RoPE, SwiGLU",
            Group::Head => "head",
            Group::Mapping => "CIE mapping",
            Group::Collaborative => "collaborative model",
            Group::Optimizer => "optimizer",
        }
    }
}

/// What a group has taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// Wall time.
    pub seconds: f64,
    /// Arithmetic of matrix products, as it was done; a multiply-add is two. Groups without products count none.
    pub flop: f64,
}

/// Sums since [`start`].
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Tally {
    /// One for each of [`Group::ALL`].
    pub groups: [Cost; Group::ALL.len()],
    /// Rows (tokens) that entered a model.
    pub rows: usize,
}

thread_local! {
    static ON: Cell<bool> = const { Cell::new(false) };
    static TALLY: RefCell<Tally> = RefCell::default();
}

/// Begins a tally of what this thread calls.
pub fn start() {
    TALLY.set(Tally::default());
    ON.set(true);
}

/// Ends it.
pub fn stop() -> Tally {
    ON.set(false);
    TALLY.take()
}

/// An operation in progress: it ends where this is dropped.
#[must_use = "the operation ends where the span is dropped"]
pub struct Span(Option<(Group, f64, Instant)>);

/// Begins an operation. `flop` is asked for only while a tally is kept.
#[inline]
pub fn span(group: Group, flop: impl FnOnce() -> f64) -> Span {
    Span(ON.get().then(|| (group, flop(), Instant::now())))
}

impl Drop for Span {
    fn drop(&mut self) {
        if let Some((group, flop, began)) = self.0 {
            let seconds = began.elapsed().as_secs_f64();
            TALLY.with_borrow_mut(|t| {
                let cost = &mut t.groups[group as usize];
                cost.seconds += seconds;
                cost.flop += flop;
            });
        }
    }
}

/// `n` rows enter a model.
pub fn rows(n: usize) {
    if ON.get() {
        TALLY.with_borrow_mut(|t| t.rows += n);
    }
}

/// Arithmetic of a product `[m, k] [k, n]`.
pub fn product(m: usize, n: usize, k: usize) -> f64 {
    2.0 * m as f64 * n as f64 * k as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_between_start_and_stop_on_its_own_thread_only() {
        drop(span(Group::Head, || unreachable!("no tally is kept")));
        start();
        drop(span(Group::Head, || product(2, 3, 5)));
        drop(span(Group::Head, || 1.0));
        std::thread::spawn(|| drop(span(Group::Head, || 7.0))).join().unwrap();
        rows(4);
        let tally = stop();
        assert_eq!((tally.groups[Group::Head as usize].flop, tally.rows), (61.0, 4));
        assert!(tally.groups[Group::Head as usize].seconds > 0.0);
        assert_eq!(tally.groups[Group::Linear as usize], Cost::default());
        drop(span(Group::Head, || 1.0));
        assert_eq!(stop(), Tally::default());
    }
}
