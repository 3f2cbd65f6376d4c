//! What can go wrong between raw interactions and samples.

use std::path::{Path, PathBuf};

use thiserror::Error;

/// Errors of the room `data`.
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
    /// A file as a whole is not what it should be.
    #[error("{}: {what}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong and what would be right.
        what: String,
    },
    /// Rows that cannot be used.
    #[error("{} unusable row(s); mend them, or pass --skip-bad-rows to leave them out:{}", .0.len(), first_lines(.0))]
    BadRows(Vec<BadRow>),
    /// An argument does not fit the data.
    #[error("{0}")]
    Argument(String),
}

impl Error {
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.into();
        move |source| Error::Io { path, source }
    }

    pub(crate) fn file(path: &Path, what: impl Into<String>) -> Error {
        Error::File { path: path.to_path_buf(), what: what.into() }
    }
}

/// A row of an input file that was not used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadRow {
    /// The file.
    pub path: PathBuf,
    /// Line number, from 1.
    pub line: u64,
    /// What was expected, and what was found.
    pub reason: String,
    /// The row as it stands in the file (the first 200 characters).
    pub text: String,
}

fn first_lines(rows: &[BadRow]) -> String {
    let shown = rows.iter().take(10).map(|r| format!("\n  {}:{}: {}", r.path.display(), r.line, r.reason));
    let more = if rows.len() > 10 { format!("\n  and {} more", rows.len() - 10) } else { String::new() };
    shown.collect::<String>() + &more
}
