//! The lists of work that attention's kernels go by: tiles of queries, and tiles of keys with all that read them.
//!
//! Where a tile is cut depends on its own segment alone, and the readers of a key come in the order of the segments: a prompt's
//! results do not depend on what else is in the batch, and the gradient of a shared prefix is summed over its readers in one
//! order. (A prefix that ends within its segment cuts that segment's key tiles there.)

use super::super::context::{Cuda, Precision};
use super::super::error::{Result, require};
use super::super::memory::Buffer;
use super::tile_rows;
use crate::device::ops::Segment;

/// Readers' `lead` for keys that all queries see.
const ALL_SEE: i32 = -(1 << 30);

/// The lists of work of one batch, on the device.
#[derive(Debug, Default)]
pub struct Tables {
    buffer: Option<Buffer<i32>>,
    pub(super) plan: Plan,
}

impl Tables {
    /// Makes the lists for `segments` (forward) and `backward`: the segments that carry gradients, whose query rows may be
    /// counted from elsewhere, while key rows are those of the forward. Key rows from `first` on get gradients.
    ///
    /// Without a backward pass, `backward` is empty and `first` is the number of key rows or more. Allocates only when a batch
    /// needs larger tables than any before.
    pub fn prepare(&mut self, cuda: &Cuda, segments: &[Segment], backward: &[Segment], first: usize) -> Result<()> {
        self.upload(cuda, plan(segments, backward, first, 0, tile_rows(cuda.precision()).0)?)
    }

    /// As [`Self::prepare`], for `rows` key rows, with empty tiles up to the number that any list of at most `most` segments
    /// has: all of them are served by the same launches.
    pub fn prepare_filled(
        &mut self,
        cuda: &Cuda,
        segments: &[Segment],
        backward: &[Segment],
        first: usize,
        rows: usize,
        most: usize,
    ) -> Result<()> {
        let tile = tile_rows(cuda.precision()).0;
        let mut plan = plan(segments, backward, first, rows, tile)?;
        plan.fill(tile, most);
        self.upload(cuda, plan)
    }

    /// Makes room for what [`Self::prepare_filled`] needs for so many queries, queries and keys with a gradient, and segments,
    /// unless prefixes are shared by several of those that have one.
    pub fn reserve(&mut self, cuda: &Cuda, n: usize, gradient: [usize; 2], most: usize) -> Result<()> {
        self.grow(cuda, words(tile_rows(cuda.precision()).0, n, gradient, most))
    }

    /// Bytes that [`Self::reserve`] takes.
    pub fn bytes(precision: Precision, n: usize, gradient: [usize; 2], most: usize) -> usize {
        words(tile_rows(precision).0, n, gradient, most).next_power_of_two() * size_of::<i32>()
    }

    /// Tiles of queries, of queries with a gradient, and of keys.
    pub fn tiles(&self) -> [usize; 3] {
        [self.plan.query_tiles.len(), self.plan.gradient_tiles.len(), self.plan.key_tiles.len()]
    }

    fn grow(&mut self, cuda: &Cuda, words: usize) -> Result<()> {
        if self.buffer.as_ref().is_none_or(|b| b.len() < words) {
            self.buffer = Some(Buffer::new(cuda, words.next_power_of_two(), "attention's tables")?);
        }
        Ok(())
    }

    fn upload(&mut self, cuda: &Cuda, plan: Plan) -> Result<()> {
        let words = [
            plan.query_tiles.as_flattened(),
            plan.gradient_tiles.as_flattened(),
            plan.key_tiles.as_flattened(),
            plan.readers.as_flattened(),
        ]
        .concat();
        self.grow(cuda, words.len())?;
        if let Some(buffer) = &mut self.buffer {
            buffer.upload(cuda, &words)?;
        }
        self.plan = plan;
        Ok(())
    }

    /// Address of the forward's query tiles; the other lists lie behind them.
    pub(super) fn query_tiles(&self) -> u64 {
        self.address(0)
    }

    pub(super) fn gradient_tiles(&self) -> u64 {
        self.address(self.plan.query_tiles.as_flattened().len())
    }

    pub(super) fn key_tiles(&self) -> u64 {
        let before = [&self.plan.query_tiles, &self.plan.gradient_tiles];
        self.address(before.iter().map(|l| l.as_flattened().len()).sum())
    }

    pub(super) fn readers(&self) -> u64 {
        self.key_tiles() + size_of_val(self.plan.key_tiles.as_slice()) as u64
    }

    fn address(&self, word: usize) -> u64 {
        self.buffer.as_ref().map_or(0, |b| b.at(word))
    }
}

/// [`Tables`] before they are on the device. The entries are described in attention.cu.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// First query row, queries, own keys of the first query, first own key row, first prefix row, prefix rows, 0, 0.
    pub query_tiles: Vec<[i32; 8]>,
    /// The same for backward.
    pub gradient_tiles: Vec<[i32; 8]>,
    /// First key row, rows, first reader, one past the last.
    pub key_tiles: Vec<[i32; 4]>,
    /// First query row, queries, lead, 0: query i of them sees key j of the tile if j + lead ≤ i.
    pub readers: Vec<[i32; 4]>,
    /// Query rows that the forward names.
    pub n_q: usize,
    /// Key rows that it names.
    pub n_kv: usize,
    /// Query rows that backward names.
    pub gradient_n_q: usize,
    /// Key rows with a gradient.
    pub gradient_n_kv: usize,
    /// The first of them.
    pub first: usize,
}

/// Tiles of so many rows, cut at the ends of so many pieces, at most.
fn tiles(tile: usize, rows: usize, pieces: usize) -> usize {
    rows / tile + pieces
}

/// Runs of keys with the same readers, of segments that lie one behind the other.
fn pieces(most: usize) -> usize {
    most + 1
}

/// Words of filled lists, each key tile having one reader.
fn words(tile: usize, n: usize, [gradient_n, gradient_n_kv]: [usize; 2], most: usize) -> usize {
    let keys = if gradient_n > 0 { tiles(tile, gradient_n_kv, pieces(most)) } else { 0 };
    let gradient = if gradient_n > 0 { tiles(tile, gradient_n, most) } else { 0 };
    8 * (tiles(tile, n, most) + gradient) + 8 * keys
}

impl Plan {
    /// Adds empty tiles. An empty tile reads and writes nothing.
    fn fill(&mut self, tile: usize, most: usize) {
        let len = |now: usize, rows: usize, pieces: usize| now.max(tiles(tile, rows, pieces));
        self.query_tiles.resize(len(self.query_tiles.len(), self.n_q, most), [0; 8]);
        if self.gradient_n_q > 0 {
            self.gradient_tiles.resize(len(self.gradient_tiles.len(), self.gradient_n_q, most), [0; 8]);
            self.key_tiles.resize(len(self.key_tiles.len(), self.gradient_n_kv, pieces(most)), [0; 4]);
            // The list of readers keeps its length, too, where each key tile has one.
            self.readers.resize(self.readers.len().max(self.key_tiles.len()), [0; 4]);
        }
    }
}

/// `rows`: key rows, if there are more than the segments name.
fn plan(segments: &[Segment], backward: &[Segment], first: usize, rows: usize, tile: usize) -> Result<Plan> {
    check(segments)?;
    check(backward)?;
    let most = |of: fn(&Segment) -> usize, list: &[Segment]| list.iter().map(of).max().unwrap_or(0);
    let keys = |list| most(|s| s.kv.end.max(s.prefix.end), list);
    let n_kv = keys(segments).max(keys(backward)).max(rows);
    let first = first.min(n_kv);
    let mut plan = Plan {
        query_tiles: query_tiles(segments, tile),
        gradient_tiles: query_tiles(backward, tile),
        n_q: most(|s| s.q.end, segments),
        n_kv,
        gradient_n_q: most(|s| s.q.end, backward),
        gradient_n_kv: n_kv - first,
        first,
        ..Plan::default()
    };
    // Between two neighbouring cuts, every key has the same readers.
    let mut cuts: Vec<usize> =
        backward.iter().flat_map(|s| [s.kv.start, s.kv.end, s.prefix.start, s.prefix.end]).collect();
    cuts.extend([first, n_kv]);
    cuts.retain(|c| (first..=n_kv).contains(c));
    cuts.sort_unstable();
    cuts.dedup();
    for piece in cuts.windows(2) {
        let read: Vec<&Segment> = backward
            .iter()
            .filter(|s| !s.q.is_empty() && (s.kv.contains(&piece[0]) || s.prefix.contains(&piece[0])))
            .collect();
        for start in (piece[0]..piece[1]).step_by(tile) {
            let first_reader = plan.readers.len() as i32;
            for s in &read {
                let (mut q, mut lead) = (s.q.clone(), ALL_SEE);
                if s.kv.contains(&start) {
                    // Query i sees own keys up to hidden + i; those before the tile do not see it.
                    let hidden = s.kv.len() - s.q.len();
                    let skipped = (start - s.kv.start).saturating_sub(hidden);
                    lead = (start - s.kv.start) as i32 - hidden as i32 - skipped as i32;
                    q.start += skipped;
                }
                plan.readers.push([q.start as i32, q.len() as i32, lead, 0]);
            }
            let n = tile.min(piece[1] - start);
            plan.key_tiles.push([start as i32, n as i32, first_reader, plan.readers.len() as i32]);
        }
    }
    Ok(plan)
}

fn query_tiles(segments: &[Segment], tile: usize) -> Vec<[i32; 8]> {
    let of = |s: &Segment| {
        let (s, hidden) = (s.clone(), s.kv.len() - s.q.len());
        (0..s.q.len()).step_by(tile).map(move |at| {
            let (row, n) = (s.q.start + at, tile.min(s.q.len() - at));
            [row, n, hidden + at + 1, s.kv.start, s.prefix.start, s.prefix.len(), 0, 0].map(|x| x as i32)
        })
    };
    segments.iter().flat_map(of).collect()
}

/// Refuses segments that no order of work could serve.
fn check(segments: &[Segment]) -> Result<()> {
    let mut queries: Vec<&Segment> = segments.iter().filter(|s| !s.q.is_empty()).collect();
    for s in segments {
        let refuse = |ok: bool, what: &str| require(ok, "attention", || format!("{s:?}: {what}"));
        refuse(s.q.start <= s.q.end && s.q.len() <= s.kv.len(), "the queries are the last tokens of their run")?;
        let apart = s.prefix.is_empty() || s.prefix.end <= s.kv.start || s.kv.end <= s.prefix.start;
        refuse(apart, "a prefix cannot overlap the run that reads it")?;
        let end = s.q.end.max(s.kv.end).max(s.prefix.end);
        refuse(end < -ALL_SEE as usize / 2, "too many rows")?;
    }
    queries.sort_unstable_by_key(|s| s.q.start);
    let twice = queries.windows(2).find(|w| w[0].q.end > w[1].q.start);
    require(twice.is_none(), "attention", || format!("query rows belong to two segments: {twice:?}"))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::rng::Rng;

    type Pairs = BTreeSet<(usize, usize)>;

    /// (query row, key row) of every key that a query sees: the definition of [`Segment`].
    fn visible(segments: &[Segment]) -> Pairs {
        let mut pairs = Pairs::new();
        for s in segments {
            for (i, q) in s.q.clone().enumerate() {
                let own = s.kv.start..s.kv.start + s.kv.len() - s.q.len() + i + 1;
                pairs.extend(s.prefix.clone().chain(own).map(|k| (q, k)));
            }
        }
        pairs
    }

    fn pairs_of_query_tiles(tiles: &[[i32; 8]], tile: usize) -> Pairs {
        let mut pairs = Pairs::new();
        for t in tiles {
            let [row, n, own, kv, prefix, n_prefix, ..] = t.map(|x| x as usize);
            assert!((1..=tile).contains(&n));
            for i in 0..n {
                for key in (prefix..prefix + n_prefix).chain(kv..kv + own + i) {
                    assert!(pairs.insert((row + i, key)), "computed twice");
                }
            }
        }
        pairs
    }

    fn pairs_of_key_tiles(plan: &Plan, tile: usize) -> Pairs {
        let mut pairs = Pairs::new();
        let mut next = plan.first;
        for &[row, n, first, last] in &plan.key_tiles {
            assert_eq!(row as usize, next, "every row is written once");
            assert!((1..=tile).contains(&(n as usize)));
            next += n as usize;
            for &[q, n_q, lead, _] in &plan.readers[first as usize..last as usize] {
                assert!(n_q > 0 && lead <= 0, "the first query sees the first key");
                for (i, j) in (0..n_q).flat_map(|i| (0..n).map(move |j| (i, j))).filter(|(i, j)| j + lead <= *i) {
                    assert!(pairs.insert(((q + i) as usize, (row + j) as usize)), "added twice");
                }
            }
        }
        assert_eq!(next, plan.n_kv);
        pairs
    }

    fn compare(segments: &[Segment], backward: &[Segment], first: usize, tile: usize) {
        let plan = plan(segments, backward, first, 0, tile).unwrap();
        assert_eq!(pairs_of_query_tiles(&plan.query_tiles, tile), visible(segments));
        let wanted = visible(backward);
        assert_eq!(pairs_of_query_tiles(&plan.gradient_tiles, tile), wanted);
        let wanted: Pairs = wanted.into_iter().filter(|p| p.1 >= first).collect();
        assert_eq!(pairs_of_key_tiles(&plan, tile), wanted);
    }

    #[test]
    fn work_covers_exactly_what_segments_see() {
        let mut rng = Rng::new(1, 2);
        for round in 0..200 {
            let below = |rng: &mut Rng, n: usize| (rng.next_u32() as usize) % n;
            let mut segments: Vec<Segment> = Vec::new();
            let n_prefixes = below(&mut rng, 3);
            let (mut row, mut query) = (0, 0);
            for i in 0..n_prefixes + 1 + below(&mut rng, 4) {
                let kv = row..row + 1 + below(&mut rng, 20);
                row = kv.end;
                let n_q = if round % 2 == 0 { kv.len() } else { 1 + below(&mut rng, kv.len()) };
                let mut prefix = 0..0;
                if i >= n_prefixes && n_prefixes > 0 {
                    let of = segments[below(&mut rng, n_prefixes)].kv.clone();
                    prefix = of.start..of.start + below(&mut rng, of.len() + 1);
                }
                segments.push(Segment { q: query..query + n_q, kv, prefix });
                query += n_q;
            }
            for tile in [4, 64] {
                compare(&segments, &segments, 0, tile);
                // The prefixes are frozen; queries are counted from the first that is not.
                let first = segments.get(n_prefixes).map_or(row, |s| s.kv.start);
                let first_q = segments[n_prefixes].q.start;
                let shift = |s: &Segment| Segment { q: s.q.start - first_q..s.q.end - first_q, ..s.clone() };
                let backward: Vec<Segment> = segments[n_prefixes..].iter().map(shift).collect();
                compare(&segments, &backward, first, tile);
                compare(&segments, &[], usize::MAX, tile);
            }
        }
    }

    /// Lists of few segments and of many have the same lengths, and what was added is empty.
    #[test]
    fn filled_lists_have_one_length() {
        let cut = |at: &[usize]| -> Vec<Segment> {
            at.windows(2).map(|w| Segment { q: w[0]..w[1], kv: w[0]..w[1], prefix: 0..0 }).collect()
        };
        let lists =
            [cut(&[0, 256]), cut(&[0, 1, 2, 3, 256]), cut(&[0, 65, 130, 195, 256]), cut(&[0, 64, 128, 192, 256])];
        let plans = lists.map(|segments| {
            let mut plan = plan(&segments, &segments, 0, 0, 64).unwrap();
            let before = (plan.query_tiles.len(), plan.key_tiles.len());
            plan.fill(64, 4);
            assert!(plan.query_tiles[before.0..].iter().all(|t| *t == [0; 8]));
            assert!(plan.key_tiles[before.1..].iter().all(|t| *t == [0; 4]));
            let lengths = [plan.query_tiles.len(), plan.gradient_tiles.len(), plan.key_tiles.len(), plan.readers.len()];
            let all = lengths.iter().zip([8, 8, 4, 4]).map(|(n, width)| n * width).sum::<usize>();
            assert_eq!(all, words(64, 256, [256, 256], 4));
            lengths
        });
        assert!(plans.iter().all(|p| *p == plans[0]), "{plans:?}");
    }

    #[test]
    fn a_key_that_nobody_reads_is_still_written() {
        let silent = Segment { q: 0..0, kv: 0..5, prefix: 0..0 };
        let reader = Segment { q: 0..2, kv: 5..8, prefix: 0..3 };
        let plan = plan(&[silent.clone(), reader.clone()], &[silent, reader], 0, 9, 64).unwrap();
        assert_eq!(plan.key_tiles, [[0, 3, 0, 1], [3, 2, 1, 1], [5, 3, 1, 2], [8, 1, 2, 2]]);
        assert_eq!(plan.readers, [[0, 2, ALL_SEE, 0], [0, 2, -1, 0]]);
    }

    #[test]
    fn impossible_segments_are_refused() {
        let good = Segment { q: 0..2, kv: 4..6, prefix: 0..4 };
        for (bad, why) in [
            (Segment { q: 0..3, ..good.clone() }, "last tokens of their run"),
            (Segment { prefix: 0..5, ..good.clone() }, "overlap"),
            (Segment { kv: 4..usize::MAX, ..good.clone() }, "too many rows"),
        ] {
            let error = plan(&[bad], &[], 0, 0, 64).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
        let error = plan(&[good.clone(), good], &[], 0, 0, 64).unwrap_err().to_string();
        assert!(error.contains("two segments"), "{error}");
    }
}
