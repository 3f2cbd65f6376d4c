//! Attention over packed segments (`kernels/attention.cu`), forward and backward, and the tables that drive it.
//!
//! [`Tables`] turn a batch's [`Segment`]s into lists of work: tiles of queries, and tiles of keys with all that read them.
//! They are made once a batch and serve all its layers. Where a tile is cut depends on its own segment alone, and the readers
//! of a key come in the order of the segments: a prompt's results do not depend on what else is in the batch, and the gradient
//! of a shared prefix is summed over its readers in one order.

use super::context::{Cuda, Precision};
use super::error::{Error, Result, require};
use super::launch::{Kernel, arguments};
use super::memory::{Buffer, Rows};
use crate::device::ops::{HeadShape, Segment};

/// Head widths of the kernels: (width, forward, d_q, d_kv), bf16 and float32.
type Width = (usize, &'static str, &'static str, &'static str);
const WIDTHS: [Width; 3] = [
    (32, "attention_forward_32", "attention_d_q_32", "attention_d_kv_32"),
    (64, "attention_forward_64", "attention_d_q_64", "attention_d_kv_64"),
    (128, "attention_forward_128", "attention_d_q_128", "attention_d_kv_128"),
];

/// OWN and OTHER of attention.cu: rows of a tile, and rows of a step of its walk.
fn tile_rows(precision: Precision) -> (usize, usize) {
    match precision {
        Precision::Bf16 => (64, 32),
        Precision::F32 => (32, 16),
    }
}

/// Readers' `lead` for keys that all queries see.
const ALL_SEE: i32 = -(1 << 30);

/// The kernels' struct of the same name.
#[repr(C)]
#[derive(Clone, Copy)]
struct Arguments {
    query_tiles: u64,
    key_tiles: u64,
    readers: u64,
    q: u64,
    k: u64,
    v: u64,
    out: u64,
    d_out: u64,
    d_q: u64,
    d_k: u64,
    d_v: u64,
    lse: u64,
    delta: u64,
    ld_q: i32,
    ld_k: i32,
    ld_v: i32,
    ld_out: i32,
    ld_d_out: i32,
    ld_d_q: i32,
    ld_d_k: i32,
    ld_d_v: i32,
    n_q: i32,
    n_heads: i32,
    group: i32,
    head_dim: i32,
    first: i32,
    scale: f32,
}

/// Handles of the kernels for one head width.
#[derive(Debug)]
pub struct Attention {
    head_dim: usize,
    forward: Kernel,
    delta: Kernel,
    d_q: Kernel,
    d_kv: Kernel,
}

/// Operands of [`Attention::backward`]. Query rows are those of the backward segments, key rows those of the forward.
#[derive(Clone, Copy, Debug)]
pub struct Backward<'a> {
    /// `[n_q, q_width]`.
    pub q: Rows,
    /// `[n_kv, kv_width]`.
    pub k: Rows,
    /// `[n_kv, kv_width]`.
    pub v: Rows,
    /// What the forward returned, `[n_q, q_width]`.
    pub out: Rows,
    /// What the forward returned, `[rows of the forward, n_heads]`.
    pub lse: &'a Buffer<f32>,
    /// The row of `lse` that belongs to query row 0.
    pub lse_first: usize,
    /// `[n_q, q_width]`.
    pub d_out: Rows,
    /// Scratch for `[n_q, n_heads]`.
    pub delta: &'a Buffer<f32>,
    /// Set for the queries of the backward segments, `[n_q, q_width]`.
    pub d_q: Rows,
    /// Set for all key rows from `first` on, zero where nobody reads: `[n_kv − first, kv_width]`.
    pub d_k: Rows,
    /// As `d_k`.
    pub d_v: Rows,
}

impl Attention {
    /// Resolves the kernels. `head_dim`: a multiple of 8, at most 128.
    pub fn new(cuda: &Cuda, head_dim: usize) -> Result<Self> {
        let precision = cuda.precision();
        // The float32 build has no 32.
        let narrowest = if precision == Precision::F32 { 64 } else { 0 };
        let fitting = WIDTHS.into_iter().find(|w| w.0 >= head_dim.max(narrowest));
        let (width, forward, d_q, d_kv) =
            fitting.filter(|_| head_dim > 0 && head_dim % 8 == 0).ok_or_else(|| Error::Operand {
                operation: "attention",
                what: format!("head_dim is {head_dim}; the kernels take multiples of 8 up to 128"),
            })?;
        let (own, other) = tile_rows(precision);
        let threads = 2 * own as u32;
        let shared_bytes =
            |own_tiles: usize| (own_tiles * own + 4 * other) * (width + precision.vec()) * precision.bytes();
        Ok(Attention {
            head_dim,
            forward: cuda.kernel("attention", forward, threads, shared_bytes(1))?,
            delta: cuda.kernel("attention", "attention_delta", threads, 0)?,
            d_q: cuda.kernel("attention", d_q, threads, shared_bytes(2))?,
            d_kv: cuda.kernel("attention", d_kv, threads, shared_bytes(2) + 4 * other * size_of::<f32>())?,
        })
    }

    /// `out: [n_q, q_width]` and `lse: [n_q, n_heads]` (natural logarithm of Σ exp(scores)) from `q: [n_q, q_width]` and
    /// `k, v: [n_kv, kv_width]`, for the forward segments of `tables`.
    #[allow(clippy::too_many_arguments)] // one operation, its operands
    pub fn forward(
        &self,
        cuda: &Cuda,
        shape: HeadShape,
        tables: &Tables,
        q: Rows,
        k: Rows,
        v: Rows,
        out: Rows,
        lse: &Buffer<f32>,
    ) -> Result<()> {
        let plan = &tables.plan;
        let mut a = self.arguments(cuda, shape, plan.n_q, plan.n_kv, q, k, v)?;
        fits("out", cuda, out, plan.n_q, shape.q_width())?;
        holds("lse", lse.len(), plan.n_q * shape.n_heads)?;
        (a.out, a.ld_out, a.lse) = (out.address, out.stride as i32, lse.address());
        a.query_tiles = tables.address(0);
        // SAFETY: the struct is the kernel's; the operands were checked to hold the rows that the tables name.
        unsafe { cuda.launch(self.forward, [shape.n_heads, plan.query_tiles.len(), 1], arguments![a]) }
    }

    /// Gradients of [`Self::forward`] for the backward segments of `tables`.
    pub fn backward(&self, cuda: &Cuda, shape: HeadShape, tables: &Tables, b: &Backward) -> Result<()> {
        let plan = &tables.plan;
        let n_q = plan.gradient_n_q;
        let mut a = self.arguments(cuda, shape, n_q, plan.n_kv, b.q, b.k, b.v)?;
        for (name, rows) in [("out", b.out), ("d_out", b.d_out), ("d_q", b.d_q)] {
            fits(name, cuda, rows, n_q, shape.q_width())?;
        }
        for (name, rows) in [("d_k", b.d_k), ("d_v", b.d_v)] {
            fits(name, cuda, rows, plan.gradient_n_kv, shape.kv_width())?;
            // Further rows would not be set.
            require(rows.rows == plan.gradient_n_kv, "attention", || {
                format!(
                    "{name} has {} rows; the segments have {} from the first gradient on",
                    rows.rows, plan.gradient_n_kv
                )
            })?;
        }
        holds("lse", b.lse.len(), (b.lse_first + n_q) * shape.n_heads)?;
        holds("delta", b.delta.len(), n_q * shape.n_heads)?;
        (a.out, a.ld_out) = (b.out.address, b.out.stride as i32);
        (a.d_out, a.ld_d_out) = (b.d_out.address, b.d_out.stride as i32);
        (a.d_q, a.ld_d_q) = (b.d_q.address, b.d_q.stride as i32);
        (a.d_k, a.ld_d_k) = (b.d_k.address, b.d_k.stride as i32);
        (a.d_v, a.ld_d_v) = (b.d_v.address, b.d_v.stride as i32);
        (a.lse, a.delta) = (b.lse.at(b.lse_first * shape.n_heads), b.delta.address());
        a.first = plan.first as i32;
        let at_tiles = 8 * plan.query_tiles.len();
        let at_keys = at_tiles + 8 * plan.gradient_tiles.len();
        a.query_tiles = tables.address(at_tiles);
        a.key_tiles = tables.address(at_keys);
        a.readers = tables.address(at_keys + 4 * plan.key_tiles.len());
        let deltas = (n_q * shape.n_heads).div_ceil(self.delta.threads as usize / 8);
        // SAFETY: the struct is the kernels'; the operands were checked to hold the rows that the tables name.
        unsafe {
            cuda.launch(self.delta, [deltas, 1, 1], arguments![a])?;
            cuda.launch(self.d_q, [shape.n_heads, plan.gradient_tiles.len(), 1], arguments![a])?;
            cuda.launch(self.d_kv, [shape.n_kv_heads, plan.key_tiles.len(), 1], arguments![a])
        }
    }

    #[allow(clippy::too_many_arguments)] // one operation, its operands
    fn arguments(
        &self,
        cuda: &Cuda,
        shape: HeadShape,
        n_q: usize,
        n_kv: usize,
        q: Rows,
        k: Rows,
        v: Rows,
    ) -> Result<Arguments> {
        let heads = shape.n_kv_heads > 0 && shape.n_heads % shape.n_kv_heads == 0 && shape.head_dim == self.head_dim;
        require(heads, "attention", || format!("{shape:?} for kernels of head_dim {}", self.head_dim))?;
        require(n_q * shape.n_heads <= i32::MAX as usize, "attention", || {
            format!("{n_q} queries of {} heads are too many for one launch", shape.n_heads)
        })?;
        fits("q", cuda, q, n_q, shape.q_width())?;
        fits("k", cuda, k, n_kv, shape.kv_width())?;
        fits("v", cuda, v, n_kv, shape.kv_width())?;
        Ok(Arguments {
            query_tiles: 0,
            key_tiles: 0,
            readers: 0,
            q: q.address,
            k: k.address,
            v: v.address,
            out: 0,
            d_out: 0,
            d_q: 0,
            d_k: 0,
            d_v: 0,
            lse: 0,
            delta: 0,
            ld_q: q.stride as i32,
            ld_k: k.stride as i32,
            ld_v: v.stride as i32,
            ld_out: 0,
            ld_d_out: 0,
            ld_d_q: 0,
            ld_d_k: 0,
            ld_d_v: 0,
            n_q: n_q as i32,
            n_heads: shape.n_heads as i32,
            group: (shape.n_heads / shape.n_kv_heads) as i32,
            head_dim: shape.head_dim as i32,
            first: 0,
            scale: 1.0 / (shape.head_dim as f32).sqrt(),
        })
    }
}

fn fits(name: &str, cuda: &Cuda, rows: Rows, n: usize, width: usize) -> Result<()> {
    let ok = rows.rows >= n && rows.columns == width && rows.is_aligned() && rows.precision == cuda.precision();
    require(ok, "attention", || {
        format!("{name} must be [{n}, {width}] of {:?}, rows at 16-byte boundaries: {rows:?}", cuda.precision())
    })
}

fn holds(name: &str, len: usize, needed: usize) -> Result<()> {
    require(len >= needed, "attention", || format!("{name} holds {len} values; {needed} are needed"))
}

/// The lists of work of one batch, on the device.
#[derive(Debug, Default)]
pub struct Tables {
    buffer: Option<Buffer<i32>>,
    plan: Plan,
}

impl Tables {
    /// Makes the lists for `segments` (forward) and `backward`: the segments that carry gradients, whose query rows may be
    /// counted from elsewhere, while key rows are those of the forward. Key rows from `first` on get gradients.
    ///
    /// Without a backward pass, `backward` is empty and `first` is the number of key rows or more. Allocates only when a batch
    /// needs larger tables than any before.
    pub fn prepare(&mut self, cuda: &Cuda, segments: &[Segment], backward: &[Segment], first: usize) -> Result<()> {
        let plan = plan(segments, backward, first, tile_rows(cuda.precision()).0)?;
        let mut words = Vec::new();
        plan.query_tiles.iter().chain(&plan.gradient_tiles).for_each(|t| words.extend(t));
        plan.key_tiles.iter().chain(&plan.readers).for_each(|t| words.extend(t));
        if self.buffer.as_ref().is_none_or(|b| b.len() < words.len()) {
            self.buffer = Some(Buffer::new(cuda, words.len().next_power_of_two(), "attention's tables")?);
        }
        if let Some(buffer) = &mut self.buffer {
            buffer.upload(cuda, &words)?;
        }
        self.plan = plan;
        Ok(())
    }

    fn address(&self, word: usize) -> u64 {
        self.buffer.as_ref().map_or(0, |b| b.at(word))
    }
}

/// [`Tables`] before they are on the device. The entries are described in attention.cu.
#[derive(Debug, Default)]
struct Plan {
    /// First query row, queries, own keys of the first query, first own key row, first prefix row, prefix rows, 0, 0.
    query_tiles: Vec<[i32; 8]>,
    /// The same for backward.
    gradient_tiles: Vec<[i32; 8]>,
    /// First key row, rows, first reader, one past the last.
    key_tiles: Vec<[i32; 4]>,
    /// First query row, queries, lead, 0: query i of them sees key j of the tile if j + lead ≤ i.
    readers: Vec<[i32; 4]>,
    /// Query rows that the forward names.
    n_q: usize,
    /// Key rows that it names.
    n_kv: usize,
    /// Query rows that backward names.
    gradient_n_q: usize,
    /// Key rows with a gradient.
    gradient_n_kv: usize,
    /// The first of them.
    first: usize,
}

fn plan(segments: &[Segment], backward: &[Segment], first: usize, tile: usize) -> Result<Plan> {
    check(segments)?;
    check(backward)?;
    let rows = |of: fn(&Segment) -> usize, list: &[Segment]| list.iter().map(of).max().unwrap_or(0);
    let n_kv = rows(|s| s.kv.end.max(s.prefix.end), segments).max(rows(|s| s.kv.end.max(s.prefix.end), backward));
    let first = first.min(n_kv);
    let mut plan = Plan {
        query_tiles: query_tiles(segments, tile),
        gradient_tiles: query_tiles(backward, tile),
        n_q: rows(|s| s.q.end, segments),
        n_kv,
        gradient_n_q: rows(|s| s.q.end, backward),
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
        let plan = plan(segments, backward, first, tile).unwrap();
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

    #[test]
    fn a_key_that_nobody_reads_is_still_written() {
        let silent = Segment { q: 0..0, kv: 0..5, prefix: 0..0 };
        let reader = Segment { q: 0..2, kv: 5..8, prefix: 0..3 };
        let plan = plan(&[silent.clone(), reader.clone()], &[silent, reader], 0, 64).unwrap();
        assert_eq!(plan.key_tiles, [[0, 3, 0, 1], [3, 2, 1, 1], [5, 3, 1, 2]]);
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
            let error = plan(&[bad], &[], 0, 64).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
        let error = plan(&[good.clone(), good], &[], 0, 64).unwrap_err().to_string();
        assert!(error.contains("two segments"), "{error}");
    }
}
