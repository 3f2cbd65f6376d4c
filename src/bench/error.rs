//! What can go wrong in measuring.

use std::path::{Path, PathBuf};

use thiserror::Error;

/// Errors of the room `bench`.
#[derive(Debug, Error)]
pub enum Error {
    /// A file could not be read or written, or a process not started.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// What was asked for cannot be measured.
    #[error("{0}")]
    Options(String),
    /// A configuration's process failed; it has said why on stderr.
    #[error("{name}: {what}")]
    Worker {
        /// Mode, method and phase.
        name: String,
        /// How it ended.
        what: String,
    },
    /// Data.
    #[error(transparent)]
    Data(#[from] crate::data::Error),
    /// Prompts.
    #[error(transparent)]
    Prompt(#[from] crate::prompt::Error),
    /// Model.
    #[error(transparent)]
    Llm(#[from] crate::llm::Error),
    /// Collaborative model.
    #[error(transparent)]
    Collab(#[from] crate::collab::Error),
    /// Training.
    #[error(transparent)]
    Train(#[from] crate::train::Error),
}

impl Error {
    /// For `map_err`: an input or output error at a path.
    pub fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Error + '_ {
        move |source| Error::Io { path: path.to_path_buf(), source }
    }
}
