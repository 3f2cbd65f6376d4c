//! AUC, UAUC, NDCG and log-loss as the reference defines them (section 3, "Metrics each eval").

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use super::Error;
use crate::data::Samples;
use crate::device::ops::bce_with_logits;

/// Quality of scores on a set of rows. A metric is `None` where it is not defined (one class only, no rows).
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// Rows.
    pub rows: usize,
    /// Rows with label 1.
    pub positives: usize,
    /// Area under the ROC curve over all rows; ties count half.
    pub auc: Option<f64>,
    /// Unweighted mean of the AUC of each user with both classes.
    pub uauc: Option<f64>,
    /// Unweighted mean of the NDCG of the same users.
    pub ndcg: Option<f64>,
    /// Users with both classes.
    pub uauc_users: usize,
    /// Mean binary cross-entropy of the scores as logits.
    pub log_loss: Option<f64>,
}

/// Which test rows are judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subset {
    /// All rows.
    All,
    /// User and item with more than 3 train rows each.
    Warm,
    /// User or item absent from train.
    ///
    /// PARITY: not the complement of warm. Of the three definitions in the official code this is the one that the paper's
    /// figures most likely used (reference, section 1.5).
    Cold,
}

impl Subset {
    /// All, warm, cold.
    pub const ALL: [Subset; 3] = [Subset::All, Subset::Warm, Subset::Cold];

    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Subset::All => "all",
            Subset::Warm => "warm",
            Subset::Cold => "cold",
        }
    }

    /// Rows of the subset.
    pub fn rows(self, samples: &Samples) -> Vec<usize> {
        let inside = |&i: &usize| match self {
            Subset::All => true,
            Subset::Warm => samples.warm[i],
            Subset::Cold => !samples.not_cold[i],
        };
        (0..samples.len()).filter(inside).collect()
    }
}

/// All metrics of `scores` on the rows of a subset.
pub fn evaluate_subset(samples: &Samples, scores: &[f32], subset: Subset) -> Result<Metrics, Error> {
    if samples.len() != scores.len() {
        return Err(Error::Lengths { users: samples.len(), labels: samples.len(), scores: scores.len() });
    }
    let rows = subset.rows(samples);
    let users: Vec<u32> = rows.iter().map(|&i| samples.uid[i]).collect();
    let labels: Vec<u8> = rows.iter().map(|&i| samples.label[i]).collect();
    let scores: Vec<f32> = rows.iter().map(|&i| scores[i]).collect();
    evaluate(&users, &labels, &scores)
}

/// All metrics of `scores`; labels are 0 or 1.
pub fn evaluate(users: &[u32], labels: &[u8], scores: &[f32]) -> Result<Metrics, Error> {
    if users.len() != labels.len() || labels.len() != scores.len() {
        return Err(Error::Lengths { users: users.len(), labels: labels.len(), scores: scores.len() });
    }
    if let Some((row, &score)) = scores.iter().enumerate().find(|(_, s)| !s.is_finite()) {
        return Err(Error::NotFinite { row, score });
    }
    let mut by_user: HashMap<u32, Vec<(f32, u8)>> = HashMap::new();
    let mut order = Vec::new();
    for ((&user, &label), &score) in users.iter().zip(labels).zip(scores) {
        by_user.entry(user).or_insert_with(|| {
            order.push(user);
            Vec::new()
        });
        if let Some(rows) = by_user.get_mut(&user) {
            rows.push((score, label));
        }
    }
    let (mut uauc, mut gain, mut n) = (0.0, 0.0, 0usize);
    for user in &order {
        let rows = &mut by_user.get_mut(user).map(std::mem::take).unwrap_or_default();
        if let Some(auc) = auc_of(rows) {
            uauc += auc;
            gain += ndcg_of(rows);
            n += 1;
        }
    }
    let mut all: Vec<(f32, u8)> = scores.iter().copied().zip(labels.iter().copied()).collect();
    let loss = scores.iter().zip(labels).map(|(&s, &l)| bce_with_logits(s.into(), l.into()).0).sum::<f64>();
    let mean = |sum: f64, n: usize| (n > 0).then(|| sum / n as f64);
    Ok(Metrics {
        rows: labels.len(),
        positives: labels.iter().filter(|&&l| l == 1).count(),
        auc: auc_of(&mut all),
        uauc: mean(uauc, n),
        ndcg: mean(gain, n),
        uauc_users: n,
        log_loss: mean(loss, labels.len()),
    })
}

/// Sorts by score, falling, equal scores in the order of input, and counts the pairs in order; ties count half. Exact: counts
/// are integers.
fn auc_of(rows: &mut [(f32, u8)]) -> Option<f64> {
    // Adding 0 makes -0 and 0 the tie that they are.
    rows.sort_by(|a, b| (b.0 + 0.0).total_cmp(&(a.0 + 0.0)));
    let positives = rows.iter().filter(|r| r.1 == 1).count() as u64;
    let negatives = rows.len() as u64 - positives;
    if positives == 0 || negatives == 0 {
        return None;
    }
    // Twice the number of pairs, so that half a pair is an integer.
    let (mut doubled, mut above) = (0u64, 0u64);
    for tied in rows.chunk_by(|a, b| a.0 == b.0) {
        let up = tied.iter().filter(|r| r.1 == 1).count() as u64;
        let down = tied.len() as u64 - up;
        doubled += down * (2 * above + up);
        above += up;
    }
    Some(doubled as f64 / (2 * positives * negatives) as f64)
}

/// NDCG of the whole list by falling score: gain = label, discount 1 / log2(rank + 1).
///
/// Equal scores stay in the order of input. The official code sorts the negated scores with NumPy's default sort, which does the
/// same for lists of up to 16 and leaves the order of ties open for longer ones.
fn ndcg_of(falling: &[(f32, u8)]) -> f64 {
    let discount = |rank: usize| 1.0 / (rank as f64 + 2.0).log2();
    let gain: f64 = falling.iter().enumerate().filter(|(_, r)| r.1 == 1).map(|(rank, _)| discount(rank)).sum();
    let ideal: f64 = (0..falling.iter().filter(|r| r.1 == 1).count()).map(discount).sum();
    gain / ideal
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use safetensors::SafeTensors;

    /// scikit-learn's AUC and the official UAUC on scores with ties.
    #[test]
    fn golden_metrics() {
        let bytes = include_bytes!("../../tests/fixtures/golden/collab-metrics/golden.safetensors");
        let file = SafeTensors::deserialize(bytes).unwrap();
        let ints = |name: &str| -> Vec<i64> {
            let t = file.tensor(name).unwrap();
            match t.dtype() {
                safetensors::Dtype::I64 => bytemuck::pod_collect_to_vec(t.data()),
                _ => bytemuck::pod_collect_to_vec::<u8, f64>(t.data()).into_iter().map(|x| x as i64).collect(),
            }
        };
        let one = |name: &str| bytemuck::pod_collect_to_vec::<u8, f64>(file.tensor(name).unwrap().data())[0];
        let users: Vec<u32> = ints("users").iter().map(|&u| u as u32).collect();
        let labels: Vec<u8> = ints("labels").iter().map(|&l| l as u8).collect();
        let scores: Vec<f32> = bytemuck::pod_collect_to_vec::<u8, f64>(file.tensor("scores").unwrap().data())
            .iter()
            .map(|&s| s as f32)
            .collect();
        let m = evaluate(&users, &labels, &scores).unwrap();
        assert!((m.auc.unwrap() - one("auc")).abs() < 1e-12, "{m:?}");
        assert!((m.uauc.unwrap() - one("uauc")).abs() < 1e-12, "{m:?}");
        assert_eq!(m.uauc_users as i64, ints("uauc_users")[0]);
    }

    #[test]
    fn undefined_is_none_and_nonsense_is_an_error() {
        let m = evaluate(&[1, 1, 2], &[1, 1, 1], &[0.1, 0.2, 0.3]).unwrap();
        assert_eq!((m.auc, m.uauc, m.ndcg, m.uauc_users, m.positives), (None, None, None, 0, 3));
        assert_eq!(evaluate(&[], &[], &[]).unwrap().log_loss, None);
        assert!(matches!(evaluate(&[1, 1], &[0, 1], &[0.0, f32::NAN]), Err(Error::NotFinite { row: 1, .. })));
        assert!(matches!(evaluate(&[1], &[0, 1], &[0.0]), Err(Error::Lengths { .. })));
    }

    #[test]
    fn ndcg_by_hand() {
        // Falling scores give labels 0 1 1: (1/log2(3) + 1/log2(4)) / (1 + 1/log2(3)).
        let m = evaluate(&[5; 3], &[1, 0, 1], &[0.1, 0.9, 0.5]).unwrap();
        let want = (1.0 / 3f64.log2() + 0.5) / (1.0 + 1.0 / 3f64.log2());
        assert!((m.ndcg.unwrap() - want).abs() < 1e-15);
        assert_eq!(m.auc, Some(0.0));
        // A tie stays in the order of input: 1 0 is perfect, 0 1 is not. Minus zero is zero.
        for (labels, want) in [([1, 0], 1.0), ([0, 1], 1.0 / 3f64.log2())] {
            for scores in [[0.0, 0.0], [0.0, -0.0], [-0.0, 0.0]] {
                let m = evaluate(&[5; 2], &labels, &scores).unwrap();
                assert_eq!((m.ndcg, m.auc), (Some(want), Some(0.5)), "{labels:?} {scores:?}");
            }
        }
    }

    proptest! {
        #[test]
        fn auc_counts_pairs(rows in proptest::collection::vec((0u8..2, -3i8..4), 0..60)) {
            let labels: Vec<u8> = rows.iter().map(|r| r.0).collect();
            let scores: Vec<f32> = rows.iter().map(|r| f32::from(r.1) / 2.0).collect();
            let (mut pairs, mut won) = (0, 0.0);
            for (i, &li) in labels.iter().enumerate() {
                for (j, &lj) in labels.iter().enumerate() {
                    if li == 1 && lj == 0 {
                        pairs += 1;
                        won += if scores[i] > scores[j] { 1.0 } else if scores[i] == scores[j] { 0.5 } else { 0.0 };
                    }
                }
            }
            let m = evaluate(&vec![1; labels.len()], &labels, &scores).unwrap();
            prop_assert_eq!(m.auc, (pairs > 0).then(|| won / f64::from(pairs)));
            prop_assert_eq!(m.uauc, m.auc);
        }
    }
}
