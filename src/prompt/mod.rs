//! Template text becomes token ids with explicit slots. Knows nothing of models.
//!
//! Slots are positions known from the template, never found by searching for an id, so a title that happens to contain
//! `<unk>` is harmless.

mod builder;
mod cache;
mod error;
mod template;
mod tokenizer;

pub use builder::{Example, PromptBuilder, PromptStyle};
pub use cache::{PromptSet, encode_rows, tokenize_split};
pub use error::Error;
pub use template::{Piece, Template};
pub use tokenizer::{LlmTokenizer, Stretch};

/// Which collaborative vector a slot takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum SlotKind {
    /// `<UserID>`: the mapped user vector.
    User = 0,
    /// `<TargetItemID>`: the mapped vector of the target item.
    Item = 1,
}

/// A token position that is not looked up in the vocabulary but filled with a vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Index into the prompt's `ids`.
    pub position: u32,
    /// What goes there.
    pub kind: SlotKind,
    /// Which of the `tokens_per_vector` embeddings of that vector (0 when there is one).
    pub part: u8,
}

/// One tokenised prompt. `ids` at slot positions hold the placeholder id and are never looked up.
#[derive(Clone, Copy, Debug)]
pub struct PromptRef<'a> {
    /// Token ids, no padding.
    pub ids: &'a [u32],
    /// Slots in order of position (empty for text-only prompts).
    pub slots: &'a [Slot],
}
