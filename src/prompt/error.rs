//! What can go wrong between a template and token ids.

use std::path::PathBuf;

use thiserror::Error;

/// Errors of the room `prompt`.
#[derive(Debug, Error)]
pub enum Error {
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A template is not usable.
    #[error("template {name}: {what}")]
    Template {
        /// Name or path.
        name: String,
        /// What is wrong and what would be right.
        what: String,
    },
    /// A tokenizer file is not usable, or a text cannot be tokenised.
    #[error("{}: {what}", path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A prompt is longer than allowed even without history.
    #[error(
        "prompt of {tokens} tokens for {title:?} exceeds prompt.style.max_tokens = {limit} even with an empty history; raise it"
    )]
    TooLong {
        /// Its length.
        tokens: usize,
        /// The limit.
        limit: usize,
        /// The target's title.
        title: String,
    },
}

impl Error {
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.into();
        move |source| Error::Io { path, source }
    }
}
