//! Prompts that begin alike: which of them share a prefix, so that it is computed once.
//!
//! Prompts are sorted by their tokens, so that the longest common prefixes lie between neighbours, and the sorted list is cut into
//! groups such that the fewest tokens are computed: a group of n prompts with a common prefix of l tokens saves (n − 1) · l. The cut
//! is optimal (dynamic programming over the sorted list) among groups of up to [`MAX_GROUP`] prompts with one level of sharing.

use std::ops::Range;

use super::batch::GradientFrom;
use crate::prompt::PromptRef;

/// Most prompts of a group: more save little (the prefix is a 64th of each already), and cost the search time.
pub const MAX_GROUP: usize = 64;

/// Prompts that begin alike, neighbours in [`Sharing::order`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Places in the order.
    pub members: Range<usize>,
    /// Tokens computed once for all members; fewer than any member has.
    pub prefix: usize,
}

/// How prompts are computed together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sharing {
    /// Numbers of the prompts in the order of the groups.
    pub order: Vec<usize>,
    /// Consecutive runs of it.
    pub groups: Vec<Group>,
}

/// Tokens that two prompts have in common from the start: equal ids, and slots only where both take the same vector.
fn common(a: &PromptRef, b: &PromptRef, same_user: bool, same_item: bool) -> usize {
    let equal = a.ids.iter().zip(b.ids).take_while(|(x, y)| x == y).count();
    let same = |kind| if kind == crate::prompt::SlotKind::User { same_user } else { same_item };
    // The first slot that only one has, or that takes another vector, ends it.
    let mut slots = (a.slots.iter(), b.slots.iter());
    let end = loop {
        match (slots.0.next(), slots.1.next()) {
            (Some(x), Some(y)) if x == y && same(x.kind) => {}
            (Some(x), Some(y)) => break x.position.min(y.position) as usize,
            (Some(x), None) | (None, Some(x)) => break x.position as usize,
            (None, None) => break usize::MAX,
        }
    };
    equal.min(end).min(a.ids.len() - 1).min(b.ids.len() - 1)
}

impl Sharing {
    /// Every prompt on its own, in the order given.
    pub fn none(n: usize) -> Self {
        Sharing { order: (0..n).collect(), groups: (0..n).map(|i| Group { members: i..i + 1, prefix: 0 }).collect() }
    }

    /// The sharing that computes the fewest tokens. `ids`: user and item of each prompt, whose vectors fill its slots.
    ///
    /// With [`GradientFrom::FirstSlot`] only the whole text before the first slot is shared: it is what needs no gradient.
    pub fn best(prompts: &[PromptRef], ids: &[(u32, u32)], from: GradientFrom) -> Self {
        assert_eq!(prompts.len(), ids.len(), "a user and an item for each prompt");
        let mut order: Vec<usize> = (0..prompts.len()).collect();
        order.sort_by(|&a, &b| prompts[a].ids.cmp(prompts[b].ids).then(ids[a].cmp(&ids[b])).then(a.cmp(&b)));
        let neighbours: Vec<usize> = order
            .windows(2)
            .map(|w| {
                let (a, b) = (&prompts[w[0]], &prompts[w[1]]);
                let (x, y) = (ids[w[0]], ids[w[1]]);
                let shared = common(a, b, x.0 == y.0, x.1 == y.1);
                let slot = |p: &PromptRef| p.slots.first().map_or(0, |s| s.position as usize);
                match from {
                    GradientFrom::Start => shared,
                    // All of the frozen text, or nothing.
                    GradientFrom::FirstSlot if slot(a) == slot(b) && shared >= slot(a) => slot(a),
                    GradientFrom::FirstSlot => 0,
                }
            })
            .collect();
        Sharing { groups: cut(&neighbours, prompts.len()), order }
    }

    /// Tokens that are computed.
    pub fn tokens(&self, lengths: impl Fn(usize) -> usize) -> usize {
        let own: usize = self.order.iter().map(|&i| lengths(i)).sum();
        own - self.groups.iter().map(|g| (g.members.len() - 1) * g.prefix).sum::<usize>()
    }

    /// Consecutive runs of places, each of at most `max_tokens` computed tokens, of whole groups where they fit. A group that alone
    /// is larger is split, and its prefix computed with each part. `lengths`: tokens of the prompt at a place.
    pub fn batches(&self, lengths: impl Fn(usize) -> usize, max_tokens: usize) -> Vec<Range<usize>> {
        let mut batches: Vec<Range<usize>> = Vec::new();
        let mut used = 0;
        let mut push = |part: Range<usize>, cost: usize| match batches.last_mut() {
            Some(batch) if used + cost <= max_tokens => {
                batch.end = part.end;
                used += cost;
            }
            _ => {
                batches.push(part);
                used = cost;
            }
        };
        for group in &self.groups {
            let (mut start, mut cost) = (group.members.start, group.prefix);
            for place in group.members.clone() {
                let own = lengths(place) - group.prefix;
                if place > start && cost + own > max_tokens {
                    push(start..place, cost);
                    (start, cost) = (place, group.prefix);
                }
                cost += own;
            }
            push(start..group.members.end, cost);
        }
        batches
    }
}

/// The groups that have members among `places`, and those members.
pub fn within(groups: &[Group], places: Range<usize>) -> impl Iterator<Item = (&Group, Range<usize>)> {
    let first = groups.partition_point(|g| g.members.end <= places.start);
    let here = groups[first..].iter().take_while(move |g| g.members.start < places.end);
    here.map(move |g| (g, g.members.start.max(places.start)..g.members.end.min(places.end)))
}

/// Cuts n sorted prompts, whose neighbours share `common` tokens, into groups that save the most.
fn cut(common: &[usize], n: usize) -> Vec<Group> {
    // best[i]: most tokens saved among the first i prompts, and where the last group begins.
    let mut best = vec![(0usize, 0usize, 0usize)];
    for end in 1..=n {
        let mut choice = (best[end - 1].0, end - 1, 0);
        let mut prefix = usize::MAX;
        for start in (end.saturating_sub(MAX_GROUP)..end.saturating_sub(1)).rev() {
            prefix = prefix.min(common[start]);
            if prefix == 0 {
                break;
            }
            let saved = best[start].0 + (end - start - 1) * prefix;
            if saved > choice.0 {
                choice = (saved, start, prefix);
            }
        }
        best.push(choice);
    }
    let mut groups = Vec::new();
    let mut end = n;
    while end > 0 {
        let (_, start, prefix) = best[end];
        groups.push(Group { members: start..end, prefix });
        end = start;
    }
    groups.reverse();
    groups
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prompt::{Slot, SlotKind};
    use crate::rng::Rng;

    /// All ways to cut: the dynamic programme finds the best of them.
    #[test]
    fn no_other_cut_saves_more() {
        let mut rng = Rng::new(1, 0);
        for n in 1..=9usize {
            for _ in 0..20 {
                let common: Vec<usize> = (1..n).map(|_| rng.below(12) as usize).collect();
                let saved = |groups: &[Group]| groups.iter().map(|g| (g.members.len() - 1) * g.prefix).sum::<usize>();
                let found = cut(&common, n);
                assert!(found.iter().map(|g| g.members.len()).sum::<usize>() == n);
                let most = (0..1u32 << (n - 1)).map(|cuts| {
                    let (mut start, mut total) = (0, 0);
                    for end in 1..=n {
                        if end == n || cuts >> (end - 1) & 1 == 1 {
                            let prefix = common[start..end - 1].iter().min().copied().unwrap_or(0);
                            total += (end - start - 1) * prefix;
                            start = end;
                        }
                    }
                    total
                });
                assert_eq!(Some(saved(&found)), most.max(), "{common:?}");
            }
        }
    }

    #[test]
    fn slots_end_what_is_common_unless_their_vectors_are_the_same() {
        let slots = |user: u32, item: u32| {
            [SlotKind::User, SlotKind::Item].map(|kind| {
                let position = if kind == SlotKind::User { user } else { item };
                Slot { position, kind, part: 0 }
            })
        };
        let (a, b) = (slots(2, 4), slots(2, 5));
        let one = PromptRef { ids: &[1, 2, 0, 3, 0, 9], slots: &a };
        let other = PromptRef { ids: &[1, 2, 0, 3, 0, 8, 9], slots: &a };
        assert_eq!(common(&one, &other, true, true), 5);
        assert_eq!(common(&one, &other, true, false), 4);
        assert_eq!(common(&one, &other, false, true), 2);
        assert_eq!(common(&one, &PromptRef { ids: &[1, 2, 0, 3, 0, 0, 9], slots: &b }, true, true), 4);
        // The last token is never shared.
        assert_eq!(common(&one, &one, true, true), 5);
        let prompts = [other, one, PromptRef { ids: &[7, 7], slots: &[] }];
        let ids = [(5, 1), (5, 2), (6, 3)];
        let sharing = Sharing::best(&prompts, &ids, GradientFrom::Start);
        assert_eq!(sharing.order, [0, 1, 2]);
        assert_eq!(sharing.groups[0], Group { members: 0..2, prefix: 4 });
        assert_eq!(sharing.tokens(|i| prompts[i].ids.len()), 7 + 6 + 2 - 4);
        assert_eq!(Sharing::best(&prompts, &ids, GradientFrom::FirstSlot).groups[0].prefix, 2);
    }

    #[test]
    fn batches_keep_their_budget_and_all_members() {
        let sharing = Sharing {
            order: (0..7).collect(),
            groups: vec![
                Group { members: 0..5, prefix: 6 },
                Group { members: 5..6, prefix: 0 },
                Group { members: 6..7, prefix: 0 },
            ],
        };
        // Lengths 8: the first group costs 6 + 5 · 2 = 16.
        let batches = sharing.batches(|_| 8, 12);
        assert_eq!(batches, [0..3, 3..5, 5..6, 6..7]);
        for batch in batches {
            let cost: usize =
                within(&sharing.groups, batch.clone()).map(|(g, m)| g.prefix + m.len() * (8 - g.prefix)).sum();
            assert!(cost <= 12, "{batch:?} costs {cost}");
        }
        assert_eq!(sharing.batches(|_| 8, 18), [0..5, 5..7]);
        assert_eq!(sharing.batches(|_| 8, 1000).len(), 1);
    }
}
