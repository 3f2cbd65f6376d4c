//! Ranking candidates of a user: one prompt prefix, many targets, the best on top.

use super::Error;
use super::scoring::Scorer;

/// The `top` best of the candidates, best first, with their scores; equal scores in the order given. An item given twice counts
/// once.
pub fn rank(
    scorer: &mut Scorer,
    user: u32,
    candidates: &[u32],
    top: usize,
    keep_liked: bool,
) -> Result<Vec<(u32, f32)>, Error> {
    let mut seen = std::collections::HashSet::new();
    let candidates: Vec<u32> = candidates.iter().copied().filter(|i| seen.insert(*i)).collect();
    let rows = scorer.candidates(user, &candidates, keep_liked)?;
    let scores = scorer.score(&rows)?;
    let mut ranked: Vec<(u32, f32)> = rows.iid.iter().copied().zip(scores).collect();
    // Stable: ties stay in the order of the candidates.
    ranked.sort_by(|a, b| b.1.total_cmp(&a.1));
    ranked.truncate(top);
    Ok(ranked)
}
