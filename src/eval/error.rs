//! What can go wrong when scores are judged.

use thiserror::Error;

/// Errors of the room `eval`.
#[derive(Debug, Error)]
pub enum Error {
    /// A score is not a number.
    #[error("score of row {row} is {score}; a model diverged or a file is damaged")]
    NotFinite {
        /// Row, from 0.
        row: usize,
        /// The score.
        score: f32,
    },
    /// Columns of different lengths.
    #[error("{users} users, {labels} labels and {scores} scores; expected one of each for every row")]
    Lengths {
        /// Users.
        users: usize,
        /// Labels.
        labels: usize,
        /// Scores.
        scores: usize,
    },
}
