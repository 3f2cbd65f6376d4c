//! The table that a run ends in: methods × (all, warm, cold) × (AUC, UAUC, NDCG).

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Error;
use super::metrics::{Metrics, Subset, evaluate_subset};
use crate::data::Samples;

/// One method's results.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MethodResult {
    /// Its name.
    pub method: String,
    /// Metrics on all, warm and cold rows.
    pub all: Metrics,
    /// User and item known well.
    pub warm: Metrics,
    /// User or item new.
    pub cold: Metrics,
}

impl MethodResult {
    /// Judges scores of all rows of a split.
    pub fn new(method: &str, samples: &Samples, scores: &[f32]) -> Result<Self, Error> {
        let [all, warm, cold] = Subset::ALL.map(|s| evaluate_subset(samples, scores, s));
        Ok(MethodResult { method: method.into(), all: all?, warm: warm?, cold: cold? })
    }
}

/// A metric with four digits, or a dash.
pub fn digits(value: Option<f64>) -> String {
    value.map_or_else(|| "-".into(), |v| format!("{v:.4}"))
}

/// The results as a Markdown table.
pub fn markdown(results: &[MethodResult]) -> String {
    let mut text = String::from(
        "| method | AUC | UAUC | NDCG | warm AUC | warm UAUC | cold AUC | cold UAUC |\n|---|---|---|---|---|---|---|---|\n",
    );
    for r in results {
        let cells = [r.all.auc, r.all.uauc, r.all.ndcg, r.warm.auc, r.warm.uauc, r.cold.auc, r.cold.uauc].map(digits);
        text += &format!("| {} | {} |\n", r.method, cells.join(" | "));
    }
    if let Some(r) = results.first() {
        text += &format!("rows: all {}, warm {}, cold {}\n", r.all.rows, r.warm.rows, r.cold.rows);
    }
    text
}

/// Seconds with a sensible number of digits.
pub fn seconds(d: Duration) -> String {
    let s = d.as_secs_f64();
    if s >= 100.0 { format!("{s:.0} s") } else { format!("{s:.1} s") }
}
