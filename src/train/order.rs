//! The order in which a stage takes its rows: rows shuffled one by one, or groups of rows that begin alike shuffled whole.
//!
//! PARITY: the official order shuffles rows. Shuffled groups bring rows with the same prompt prefix (mostly one user's, with the same
//! history) into one batch, where the prefix is computed once, forward and backward. A batch has as many rows either way, but fewer
//! different users: its gradient is a noisier estimate of the same mean.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use crate::data::Samples;
use crate::llm::batch::GradientFrom;
use crate::llm::sharing::{Group, Sharing};
use crate::prompt::PromptSet;
use crate::rng::Rng;

/// What a pass over train shuffles.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Grouping {
    /// Rows; each prompt is computed whole.
    #[default]
    Off,
    /// Groups of rows that share a prompt prefix, which is computed once.
    ShuffleGroups,
}

/// The rows of a stage, and which of them are a group.
#[derive(Clone, Debug)]
pub struct Order {
    /// Rows; members of a group are neighbours.
    rows: Vec<usize>,
    /// Runs of `rows`; none where rows are shuffled.
    groups: Vec<Group>,
    group_of: HashMap<usize, usize>,
    seed: u64,
}

impl Order {
    /// Rows on their own.
    pub fn of_rows(rows: Vec<usize>, seed: u64) -> Self {
        Order { rows, groups: Vec::new(), group_of: HashMap::new(), seed }
    }

    /// Rows in the groups that share the most tokens ([`Sharing::best`]).
    pub fn of_groups(rows: Vec<usize>, samples: &Samples, prompts: &PromptSet, from: GradientFrom, seed: u64) -> Self {
        let refs: Vec<_> = rows.iter().map(|&r| prompts.get(r)).collect();
        let ids: Vec<_> = rows.iter().map(|&r| (samples.uid[r], samples.iid[r])).collect();
        let Sharing { order, groups } = Sharing::best(&refs, &ids, from);
        let rows: Vec<usize> = order.into_iter().map(|i| rows[i]).collect();
        let members = groups.iter().enumerate().flat_map(|(g, group)| group.members.clone().map(move |m| (m, g)));
        let group_of = members.map(|(place, g)| (rows[place], g)).collect();
        Order { rows, groups, group_of, seed }
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// No rows?
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The rows, in no order that matters.
    pub fn rows(&self) -> &[usize] {
        &self.rows
    }

    /// All rows in the order drawn for a pass.
    pub fn pass(&self, pass: u64) -> Vec<usize> {
        let mut rng = Rng::new(self.seed, 0x0bde_0000_0000 + pass);
        if self.groups.is_empty() {
            let mut rows = self.rows.clone();
            rng.shuffle(&mut rows);
            return rows;
        }
        let mut groups: Vec<&Group> = self.groups.iter().collect();
        rng.shuffle(&mut groups);
        groups.into_iter().flat_map(|g| &self.rows[g.members.clone()]).copied().collect()
    }

    /// How rows of a step, in an order that passes gave, are computed: neighbours of one group share its prefix.
    pub fn sharing(&self, rows: &[usize]) -> Sharing {
        if self.groups.is_empty() {
            return Sharing::none(rows.len());
        }
        let mut start = 0;
        let groups = rows.chunk_by(|a, b| self.group_of[a] == self.group_of[b]).map(|run| {
            let members = start..start + run.len();
            start = members.end;
            let prefix = if run.len() > 1 { self.groups[self.group_of[&run[0]]].prefix } else { 0 };
            Group { members, prefix }
        });
        Sharing { groups: groups.collect(), order: (0..rows.len()).collect() }
    }

    /// The fewest tokens that any row has for itself: the rest of its prompt may be shared.
    pub fn shortest_own(&self, prompts: &PromptSet) -> usize {
        let own = |&r: &usize| prompts.tokens(r) - self.group_of.get(&r).map_or(0, |&g| self.groups[g].prefix);
        self.rows.iter().map(own).min().unwrap_or(1).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order() -> Order {
        let groups = [(0..3, 7), (3..4, 0), (4..6, 5)].map(|(members, prefix)| Group { members, prefix });
        let rows = vec![4, 9, 2, 7, 1, 8];
        let group_of = [(4, 0), (9, 0), (2, 0), (7, 1), (1, 2), (8, 2)].into();
        Order { rows, groups: groups.into(), group_of, seed: 3 }
    }

    #[test]
    fn a_pass_has_every_row_once_and_groups_whole() {
        let order = order();
        let passes: Vec<Vec<usize>> = (0..20).map(|p| order.pass(p)).collect();
        for pass in &passes {
            let mut sorted = pass.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, [1, 2, 4, 7, 8, 9]);
            for group in [&[4, 9, 2][..], &[1, 8]] {
                assert!(pass.windows(group.len()).any(|w| w == group), "{pass:?}");
            }
        }
        assert!(passes.iter().any(|p| p != &passes[0]), "passes differ");
        assert_eq!(order.pass(5), passes[5]);
    }

    /// A group that a batch's end cuts shares on both sides; a row left alone shares nothing.
    #[test]
    fn neighbours_of_a_group_share_its_prefix() {
        let groups = |rows: &[usize]| -> Vec<_> {
            order().sharing(rows).groups.into_iter().map(|g| (g.members, g.prefix)).collect()
        };
        assert_eq!(groups(&[9, 2, 1, 8, 7, 4]), [(0..2, 7), (2..4, 5), (4..5, 0), (5..6, 0)]);
        let apart = Order::of_rows(vec![4, 9, 2], 3);
        assert_eq!(apart.sharing(&[9, 2]), Sharing::none(2));
    }
}
