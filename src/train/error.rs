//! What can go wrong in training.

use std::path::{Path, PathBuf};

use thiserror::Error;

/// Errors of the room `train`.
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
    /// A configuration is not usable.
    #[error("{origin}: {what}")]
    Config {
        /// File, preset or argument.
        origin: String,
        /// What is wrong and what would be right.
        what: String,
    },
    /// A checkpoint or a run directory does not fit.
    #[error("{}: {what}", path.display())]
    State {
        /// File or directory.
        path: PathBuf,
        /// What is wrong and what to do.
        what: String,
    },
    /// The loss or the gradient is not a number any more.
    #[error(
        "the {what} became {value} at step {step}; lower the learning rate (--set {stage}.learning_rate=…) or set {stage}.grad_clip"
    )]
    Diverged {
        /// Stage.
        stage: String,
        /// Optimizer step.
        step: u64,
        /// `loss` or `gradient norm`.
        what: &'static str,
        /// Its value.
        value: f64,
    },
    /// Ctrl-C: the step was finished and saved.
    #[error("interrupted; saved, resume with --resume")]
    Interrupted,
    /// Data.
    #[error(transparent)]
    Data(#[from] crate::data::Error),
    /// Prompts.
    #[error(transparent)]
    Prompt(#[from] crate::prompt::Error),
    /// Model.
    #[error(transparent)]
    Llm(#[from] crate::llm::Error),
    /// Metrics.
    #[error(transparent)]
    Eval(#[from] crate::eval::Error),
    /// Collaborative model.
    #[error(transparent)]
    Collab(#[from] crate::collab::Error),
}

impl Error {
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.into();
        move |source| Error::Io { path, source }
    }

    pub(crate) fn state(path: &Path, what: impl Into<String>) -> Error {
        Error::State { path: path.to_path_buf(), what: what.into() }
    }
}
