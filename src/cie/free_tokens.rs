//! Token embeddings that are learnt directly, in place of mapped collaborative vectors: one for each user and item (the ablation
//! "w/ UI-token"), or the same for all (soft tokens of Prompt4NR).
//!
//! PARITY: officially both are a one-hot vector times a bias-free `nn.Linear`, hence the initial spread of ±1/√inputs.

use crate::checkpoint::Tensor;
use crate::collab::Collaborative;
use crate::collab::mf::Mf;
use crate::collab::slots::Tuned;
use crate::data::Samples;
use crate::rng::Rng;

/// Free tokens and their gradient.
#[derive(Clone, Debug)]
pub struct FreeTokens {
    /// Rows by id; one row each where they are the same for all.
    tables: Mf,
    gradient: Mf,
}

impl FreeTokens {
    /// A vector of `width` for each user and item; row 0 is padding, zero.
    pub fn per_id(n_users: usize, n_items: usize, width: usize, seed: u64) -> Self {
        let mut tokens = Self::spread(n_users, n_items, width, seed);
        tokens.tables.users[..width].fill(0.0);
        tokens.tables.items[..width].fill(0.0);
        tokens
    }

    /// One vector of `width` in the place of every user, one in the place of every item.
    pub fn shared(width: usize, seed: u64) -> Self {
        Self::spread(1, 1, width, seed)
    }

    fn spread(n_users: usize, n_items: usize, dim: usize, seed: u64) -> Self {
        let bound = 1.0 / ((n_users + n_items) as f64).sqrt();
        let mut rng = Rng::new(seed, 0xf4ee);
        let mut table = |n: usize| (0..n * dim).map(|_| ((2.0 * rng.uniform() - 1.0) * bound) as f32).collect();
        let tables = Mf { dim, users: table(n_users), items: table(n_items) };
        let zeros = |t: &[f32]| vec![0.0; t.len()];
        let gradient = Mf { dim, users: zeros(&tables.users), items: zeros(&tables.items) };
        FreeTokens { tables, gradient }
    }
}

impl Tuned for FreeTokens {
    fn tensors(&self) -> Vec<Tensor> {
        let dim = self.tables.dim;
        let tables = [("user_tokens", &self.tables.users), ("item_tokens", &self.tables.items)];
        tables.map(|(name, t)| Tensor::new(name, vec![t.len() / dim, dim], t.clone())).into()
    }

    fn values_mut(&mut self) -> Vec<&mut [f32]> {
        vec![&mut self.tables.users, &mut self.tables.items]
    }

    fn trained_mut(&mut self) -> Vec<(&mut [f32], &mut [f32])> {
        vec![(&mut self.tables.users, &mut self.gradient.users), (&mut self.tables.items, &mut self.gradient.items)]
    }

    fn slots(&mut self, samples: &Samples, rows: &[usize], _: u64) -> Vec<f32> {
        let pair = |&r: &usize| [self.tables.user_vector(samples.uid[r]), self.tables.item_vector(samples.iid[r])];
        rows.iter().flat_map(pair).flatten().copied().collect()
    }

    fn backward(&mut self, samples: &Samples, rows: &[usize], _: u64, d_slots: &[f32]) {
        let dim = self.tables.dim;
        let Mf { users, items, .. } = &mut self.gradient;
        for (table, ids, slot) in [(users, &samples.uid, 0), (items, &samples.iid, 1)] {
            let shared = table.len() == dim;
            table.fill(0.0);
            for (r, d) in rows.iter().zip(d_slots.chunks_exact(2 * dim)) {
                let id = if shared { 0 } else { ids[*r] as usize };
                let to = table.get_mut(id * dim..(id + 1) * dim).unwrap_or_default();
                to.iter_mut().zip(&d[slot * dim..]).for_each(|(t, d)| *t += d);
            }
            if !shared {
                table[..dim].fill(0.0);
            }
        }
    }

    /// Two tables: an id beyond a table takes its row 0, so one row stands for all ids.
    fn frozen(&self) -> Collaborative {
        Collaborative::Tables(self.tables.clone())
    }

    fn dim(&self) -> usize {
        self.tables.dim
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples() -> Samples {
        let mut s = Samples::empty();
        for (i, (user, item)) in [(1, 2), (3, 2), (1, 4)].into_iter().enumerate() {
            s.push(i as i64, user, item, 1, 0, &[]);
        }
        s
    }

    #[test]
    fn gradients_go_to_the_rows_that_were_taken() {
        let (samples, rows) = (samples(), [0, 1, 2]);
        let d: Vec<f32> = (0..12).map(|i| i as f32).collect();
        let mut each = FreeTokens::per_id(5, 6, 2, 1);
        each.backward(&samples, &rows, 0, &d);
        each.backward(&samples, &rows, 0, &d);
        assert_eq!(each.gradient.users, [0.0, 0.0, 8.0, 10.0, 0.0, 0.0, 4.0, 5.0, 0.0, 0.0]);
        assert_eq!(each.gradient.items, [0.0, 0.0, 0.0, 0.0, 8.0, 10.0, 0.0, 0.0, 10.0, 11.0, 0.0, 0.0]);
        let slots = each.slots(&samples, &rows, 0);
        assert_eq!(slots[..2], slots[8..10], "the same user");
        assert_ne!(slots[..2], slots[4..6]);
        let mut all = FreeTokens::shared(2, 1);
        all.backward(&samples, &rows, 0, &d);
        assert_eq!((&all.gradient.users[..], &all.gradient.items[..]), (&[12.0, 15.0][..], &[18.0, 21.0][..]));
        let slots = all.slots(&samples, &rows, 0);
        assert!(slots.chunks(4).all(|pair| pair == &slots[..4]));
        for tokens in [&mut each, &mut all] {
            assert_eq!(tokens.frozen().slot_vectors(&samples).take(&rows), tokens.slots(&samples, &rows, 0));
        }
    }
}
