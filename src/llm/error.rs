//! What can go wrong with model files.

use std::path::PathBuf;

use thiserror::Error;

/// Errors of the room `llm`: each names the file, what was found, and what would be right.
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
    /// `config.json` does not describe a model this engine runs.
    #[error("{}: {what}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What and how to mend it.
        what: String,
    },
    /// Weight files do not fit the configuration. Names every problem.
    #[error("{}: {} problem(s):{}", path.display(), problems.len(), list(problems))]
    Weights {
        /// File or directory.
        path: PathBuf,
        /// One line each.
        problems: Vec<String>,
    },
    /// An adapter directory is not a LoRA adapter for this model.
    #[error("{}: {what}", path.display())]
    Adapter {
        /// The file.
        path: PathBuf,
        /// What and how to mend it.
        what: String,
    },
    /// A golden file is not of the documented form.
    #[error("{}: {what}", path.display())]
    Golden {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// The card, its driver or a kernel.
    #[error(transparent)]
    Cuda(#[from] crate::device::cuda::Error),
    /// The model has a shape that the kernels do not take.
    #[error("{what} (needed for --device cuda; the CPU runs this model)")]
    Shape {
        /// Which, found and allowed.
        what: String,
    },
    /// A GGUF file cannot be converted.
    #[error("{}: {what}", path.display())]
    Gguf {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
}

impl Error {
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.into();
        move |source| Error::Io { path, source }
    }
}

fn list(problems: &[String]) -> String {
    problems.iter().take(20).map(|p| format!("\n  {p}")).collect()
}
