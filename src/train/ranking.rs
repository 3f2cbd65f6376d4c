//! Ranking candidates of a user: one prompt prefix, many targets, the best on top.

use std::fs::File;
use std::path::Path;

use super::Error;
use super::scoring::Scorer;
use crate::data::parquet_io::{integers, read_batches};

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

/// Column `name` of a CSV or Parquet file, as ids.
pub fn read_ids(path: &Path, name: &str) -> Result<Vec<u32>, Error> {
    let bad = |what: String| Error::state(path, what);
    let mut ids = Vec::new();
    if path.extension().is_some_and(|e| e == "parquet") {
        for batch in read_batches(path)? {
            let array = batch.column_by_name(name).ok_or_else(|| bad(format!("has no column {name}")))?;
            let values = integers(array).map_err(|e| bad(format!("column {name} {e}")))?;
            for (row, value) in values.into_iter().enumerate() {
                ids.push(
                    u32::try_from(value).map_err(|_| bad(format!("row {row}: {name} is {value}; expected an id")))?,
                );
            }
        }
        return Ok(ids);
    }
    let mut reader: csv::Reader<File> = csv::Reader::from_path(path).map_err(|e| bad(e.to_string()))?;
    let header = reader.headers().map_err(|e| bad(e.to_string()))?.clone();
    let names = || header.iter().collect::<Vec<_>>().join(", ");
    let at = header.iter().position(|h| h == name);
    let at = at.ok_or_else(|| bad(format!("has no column {name}; its columns are {}", names())))?;
    for record in reader.records() {
        let record = record.map_err(|e| bad(e.to_string()))?;
        let line = record.position().map_or(0, csv::Position::line);
        let id = record[at].trim().parse();
        ids.push(id.map_err(|_| bad(format!("line {line}: {name} {:?}; expected an id", &record[at])))?);
    }
    Ok(ids)
}
