//! Which rows are train, valid and test: by rank in time, or by dates.

use super::Error;
use super::interactions::Interactions;
use super::samples::Split;
use super::time::{EXPECTED, date, seconds};

/// Where valid and test begin.
#[derive(Clone, Debug, PartialEq)]
pub enum SplitRule {
    /// Shares of the rows in order of time, in percent: train, valid, test. Rows of one second keep the order of the file.
    Fractions(f64, f64, f64),
    /// Unix seconds from which rows are valid, and from which they are test.
    Dates(i64, i64),
}

impl SplitRule {
    /// From `60/20/20`.
    pub fn parse_fractions(text: &str) -> Result<Self, Error> {
        let parts: Option<Vec<f64>> = text.split('/').map(|p| p.trim().parse().ok()).collect();
        match parts.as_deref() {
            Some(&[a, b, c]) if [a, b, c].iter().all(|x| *x > 0.0) && (a + b + c - 100.0).abs() < 1e-9 => {
                Ok(SplitRule::Fractions(a, b, c))
            }
            _ => Err(Error::Argument(format!(
                "--split {text:?}: expected three percentages that add up to 100, like 60/20/20"
            ))),
        }
    }

    /// From two dates.
    pub fn parse_dates(valid: &str, test: &str) -> Result<Self, Error> {
        let date = |flag: &str, text: &str| {
            seconds(text).ok_or_else(|| Error::Argument(format!("{flag} {text:?} is not a date; {EXPECTED}")))
        };
        let (valid, test) = (date("--valid-from", valid)?, date("--test-from", test)?);
        if valid >= test {
            return Err(Error::Argument("--valid-from must be before --test-from".into()));
        }
        Ok(SplitRule::Dates(valid, test))
    }

    /// The rule in words.
    pub fn describe(&self) -> String {
        match self {
            SplitRule::Fractions(a, b, c) => {
                format!("split by rank in time: {a} % train, {b} % valid, {c} % test; ties keep the order of the file")
            }
            SplitRule::Dates(v, t) => {
                format!("split by time: valid from Unix second {v} ({}), test from {t} ({})", date(*v), date(*t))
            }
        }
    }

    /// Sets the split of every row.
    pub fn assign(&self, source: &mut Interactions) {
        match *self {
            SplitRule::Dates(valid, test) => source.rows.iter_mut().for_each(|r| {
                let later = if r.timestamp >= test { Split::Test } else { Split::Valid };
                r.split = Some(if r.timestamp < valid { Split::Train } else { later });
            }),
            SplitRule::Fractions(train, valid, _) => {
                let mut order: Vec<usize> = (0..source.rows.len()).collect();
                order.sort_by_key(|&i| source.rows[i].timestamp);
                let bound = |percent: f64| (percent / 100.0 * order.len() as f64).round() as usize;
                let (valid_from, test_from) = (bound(train), bound(train + valid));
                for (rank, &i) in order.iter().enumerate() {
                    let later = if rank >= test_from { Split::Test } else { Split::Valid };
                    source.rows[i].split = Some(if rank < valid_from { Split::Train } else { later });
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::interactions::Interaction;

    fn splits(rule: &SplitRule, times: &[i64]) -> String {
        let row = |&timestamp| Interaction { user: 0, item: 0, label: true, timestamp, split: None };
        let mut source = Interactions { rows: times.iter().map(row).collect(), ..Interactions::default() };
        rule.assign(&mut source);
        source.rows.iter().filter_map(|r| Some(&r.split?.name()[..2])).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn fractions_go_by_rank_and_file_order() {
        let rule = SplitRule::parse_fractions("60/20/20").unwrap();
        assert_eq!(splits(&rule, &[50, 10, 40, 20, 30]), "te tr va tr tr");
        assert_eq!(splits(&rule, &[7, 7, 7, 7, 7]), "tr tr tr va te");
    }

    #[test]
    fn dates_begin_their_split() {
        let rule = SplitRule::parse_dates("1970-01-02", "86401").unwrap();
        assert_eq!(splits(&rule, &[86_399, 86_400, 86_401, 0]), "tr va te tr");
    }

    #[test]
    fn impossible_rules_are_refused() {
        for text in ["60/20", "60/20/30", "100/0/0", "a/b/c", "-20/60/60", "NaN/50/50"] {
            let message = SplitRule::parse_fractions(text).unwrap_err().to_string();
            assert!(message.contains(text) && message.contains("like 60/20/20"), "{message}");
        }
        let message = SplitRule::parse_dates("2001-31-05", "2002-01-01").unwrap_err().to_string();
        assert!(message.contains("--valid-from \"2001-31-05\" is not a date"), "{message}");
        assert!(SplitRule::parse_dates("2002-01-01", "2002-01-01").is_err());
    }
}
