//! What can go wrong with collaborative models.

use std::path::PathBuf;

use thiserror::Error;

/// Errors of the room `collab`.
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
    /// A saved model does not fit.
    #[error("{}: {what}", path.display())]
    Model {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// Training was told to stop; it can go on from its checkpoint.
    #[error("interrupted; saved, resume with --resume")]
    Interrupted,
    /// A torch file.
    #[error(transparent)]
    Torch(#[from] crate::pth::Error),
    /// The card, its driver or a kernel.
    #[error(transparent)]
    Cuda(#[from] crate::device::cuda::Error),
    /// The scores are not numbers.
    #[error(transparent)]
    Eval(#[from] crate::eval::Error),
}
