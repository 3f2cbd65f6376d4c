//! Attention over packed segments: grouped heads, shared prefixes, the trimmed last layer, ragged tiles, large scores.

use std::ops::Range;

use super::{Guarded, Outcome, limit, random, relative_error, round};
use crate::device::cuda::attention::{Attention, Backward, Tables};
use crate::device::cuda::{Buffer, Cuda, Precision, Result};
use crate::device::ops::{HeadShape, Segment};

/// How numbers are kept: exactly, or as a naive version on the device would.
struct Arithmetic {
    /// After each step.
    element: fn(f64) -> f64,
    /// After each addition of a sum.
    sum: fn(f64) -> f64,
}

const EXACT: Arithmetic = Arithmetic { element: |x| x, sum: |x| x };

fn naive(precision: Precision) -> Arithmetic {
    let element = match precision {
        Precision::Bf16 => |x| f64::from(round(Precision::Bf16, x as f32)),
        Precision::F32 => |x| f64::from(x as f32),
    };
    Arithmetic { element, sum: |x| f64::from(x as f32) }
}

impl Arithmetic {
    fn dot(&self, a: &[f64], b: &[f64]) -> f64 {
        a.iter().zip(b).fold(0.0, |sum, (a, b)| (self.sum)(sum + a * b))
    }

    fn add(&self, to: &mut [f64], factor: f64, row: &[f64]) {
        to.iter_mut().zip(row).for_each(|(t, x)| *t = (self.sum)(*t + factor * x));
    }
}

/// What attention computes, in rows of all heads; `d_k` and `d_v` for all key rows.
#[derive(Clone, Default)]
struct Results {
    out: Vec<f64>,
    lse: Vec<f64>,
    d_q: Vec<f64>,
    d_k: Vec<f64>,
    d_v: Vec<f64>,
}

struct Inputs<'a> {
    q: &'a [f64],
    k: &'a [f64],
    v: &'a [f64],
    d_out: &'a [f64],
}

/// The formulas, one query of one head at a time.
fn reference(arithmetic: &Arithmetic, shape: HeadShape, segments: &[Segment], x: &Inputs) -> Results {
    let (d, width, kv_width) = (shape.head_dim, shape.q_width(), shape.kv_width());
    let scale = 1.0 / (d as f64).sqrt();
    let element = arithmetic.element;
    let mut r = Results {
        out: vec![0.0; x.q.len()],
        lse: vec![0.0; x.q.len() / d],
        d_q: vec![0.0; x.q.len()],
        d_k: vec![0.0; x.k.len()],
        d_v: vec![0.0; x.v.len()],
    };
    for s in segments {
        for (i, row) in s.q.clone().enumerate() {
            let seen: Vec<usize> = s.prefix.clone().chain(s.kv.clone().take(s.kv.len() - s.q.len() + i + 1)).collect();
            for head in 0..shape.n_heads {
                let at = row * width + head * d..row * width + (head + 1) * d;
                let place = |key: usize| {
                    let start = key * kv_width + head / (shape.n_heads / shape.n_kv_heads) * d;
                    start..start + d
                };
                let (q, d_out) = (&x.q[at.clone()], &x.d_out[at.clone()]);
                let scores: Vec<f64> =
                    seen.iter().map(|&key| element(arithmetic.dot(q, &x.k[place(key)]) * scale)).collect();
                let highest = scores.iter().fold(f64::NEG_INFINITY, |m, &s| m.max(s));
                let sum = scores.iter().fold(0.0, |sum, s| (arithmetic.sum)(sum + (s - highest).exp()));
                let lse = (arithmetic.sum)(highest + sum.ln());
                r.lse[row * shape.n_heads + head] = lse;
                let p: Vec<f64> = scores.iter().map(|s| element((s - highest).exp() / sum)).collect();
                let mut out = vec![0.0; d];
                for (&key, &p) in seen.iter().zip(&p) {
                    arithmetic.add(&mut out, p, &x.v[place(key)]);
                }
                out.iter_mut().for_each(|o| *o = element(*o));
                let delta = element(arithmetic.dot(&out, d_out));
                r.out[at.clone()].copy_from_slice(&out);
                for (&key, &s) in seen.iter().zip(&scores) {
                    // Backward has the scores and the saved log-sum-exp.
                    let p = element((s - lse).exp());
                    let d_p = element(arithmetic.dot(d_out, &x.v[place(key)]));
                    let d_s = element(p * (d_p - delta));
                    arithmetic.add(&mut r.d_v[place(key)], p, d_out);
                    arithmetic.add(&mut r.d_k[place(key)], d_s * scale, q);
                    arithmetic.add(&mut r.d_q[at.clone()], d_s * scale, &x.k[place(key)]);
                }
            }
        }
    }
    for gradient in [&mut r.d_q, &mut r.d_k, &mut r.d_v] {
        gradient.iter_mut().for_each(|g| *g = element(*g));
    }
    r
}

/// One batch. Backward goes over `backward`, whose query row 0 is row `first_q` of the forward.
pub(super) struct Case {
    name: String,
    pub shape: HeadShape,
    pub segments: Vec<Segment>,
    pub backward: Vec<Segment>,
    pub first_q: usize,
    /// First key row with a gradient.
    pub first: usize,
    /// Of q and k.
    magnitude: f32,
}

fn heads(n_heads: usize, n_kv_heads: usize, head_dim: usize) -> HeadShape {
    HeadShape { n_heads, n_kv_heads, head_dim }
}

/// Runs of the given lengths one after the other, all rows queries. Each reads the prefix beside it.
fn runs(list: &[(usize, Range<usize>)]) -> Vec<Segment> {
    let mut row = 0;
    let mut segments = Vec::new();
    for (len, prefix) in list {
        segments.push(Segment { q: row..row + len, kv: row..row + len, prefix: prefix.clone() });
        row += len;
    }
    segments
}

fn plain(lengths: &[usize]) -> Vec<Segment> {
    runs(&lengths.iter().map(|&n| (n, 0..0)).collect::<Vec<_>>())
}

impl Case {
    /// All rows have gradients.
    fn whole(name: &str, shape: HeadShape, segments: Vec<Segment>) -> Case {
        let name = format!("{name}, heads {}/{} of {}", shape.n_heads, shape.n_kv_heads, shape.head_dim);
        Case { name, shape, backward: segments.clone(), segments, first_q: 0, first: 0, magnitude: 1.0 }
    }

    /// Rows before `first` have none, and their segments no backward.
    fn frozen(name: &str, shape: HeadShape, segments: Vec<Segment>, first: usize) -> Case {
        let moved = |s: &Segment| Segment { q: s.q.start - first..s.q.end - first, ..s.clone() };
        let backward = segments.iter().filter(|s| s.q.start >= first).map(moved).collect();
        Case { backward, first_q: first, first, ..Case::whole(name, shape, segments) }
    }

    /// The last layer: one query a run, of the runs from number `n_prefixes` on.
    fn last(name: &str, shape: HeadShape, segments: Vec<Segment>, n_prefixes: usize, first: usize) -> Case {
        let own = segments[n_prefixes..].iter().enumerate();
        let segments = own.map(|(i, s)| Segment { q: i..i + 1, ..s.clone() }).collect();
        Case { first, ..Case::whole(name, shape, segments) }
    }

    fn large_scores(self) -> Case {
        Case { magnitude: 6.0, ..self }
    }

    pub fn n_q(&self) -> usize {
        self.segments.iter().map(|s| s.q.end).max().unwrap_or(0)
    }

    pub fn n_kv(&self) -> usize {
        self.segments.iter().map(|s| s.kv.end).max().unwrap_or(0)
    }
}

/// All batches.
pub(super) fn list() -> Vec<Case> {
    let shared = || runs(&[(70, 0..0), (20, 0..70), (33, 0..70), (1, 0..70), (9, 0..0)]);
    let two = || runs(&[(37, 0..0), (50, 0..0), (64, 37..87), (3, 0..37), (40, 37..87)]);
    vec![
        Case::whole("1 + 7 + 63 + 65 tokens", heads(2, 1, 16), plain(&[1, 7, 63, 65])),
        Case::whole("65 + 7 tokens", heads(3, 1, 64), plain(&[65, 7])),
        Case::whole("63 + 1 + 33 tokens", heads(8, 2, 80), plain(&[63, 1, 33])),
        Case::whole("65 + 3 tokens", heads(2, 2, 96), plain(&[65, 3])),
        Case::whole("7 + 40 tokens", heads(8, 1, 128), plain(&[7, 40])),
        Case::whole("257 tokens", heads(2, 1, 128), plain(&[257])),
        Case::whole("257 tokens", heads(1, 1, 24), plain(&[257])),
        Case::whole("prefix of 70 for three", heads(4, 2, 64), shared()),
        Case::frozen("frozen prefix of 70 for three", heads(4, 2, 64), shared(), 70),
        Case::frozen("two frozen prefixes", heads(2, 1, 128), two(), 87),
        Case::whole("half a prefix", heads(2, 1, 32), runs(&[(70, 0..0), (20, 0..35), (5, 10..70)])),
        Case::last("last layer", heads(4, 1, 64), plain(&[1, 65, 130]), 0, 0),
        Case::last("last layer, prefixes", heads(3, 1, 128), two(), 2, 0),
        Case::last("last layer, frozen prefixes", heads(3, 1, 128), two(), 2, 87),
        Case::last("last layer, half a prefix unread", heads(2, 1, 64), runs(&[(99, 0..0), (20, 0..35)]), 1, 0),
        Case::whole("scores to 100", heads(2, 1, 64), shared()).large_scores(),
        Case::whole("scores to 100, 150 tokens", heads(2, 1, 128), plain(&[150])).large_scores(),
    ]
}

/// All cases.
pub fn cases(cuda: &Cuda) -> Result<Vec<Outcome>> {
    let p = cuda.precision();
    let mut outcomes = Vec::new();
    for case in &list() {
        let [q, kv, d_out] = made(p, case);
        let computed = compute(cuda, case, &q, &kv, &d_out)?;
        outcomes.extend(judge(p, case, [&q, &kv, &d_out], &computed));
    }
    outcomes.push(batch_mates(cuda)?);
    Ok(outcomes)
}

/// What the device computed. Gradients of keys are those from `first` on.
pub(super) struct Computed {
    pub out: Vec<f32>,
    pub lse: Vec<f32>,
    pub d_q: Vec<f32>,
    pub d_k: Vec<f32>,
    pub d_v: Vec<f32>,
    pub contained: bool,
}

/// Further values of float32 outputs, which nothing may write.
const MARGIN: usize = 64;
const SENTINEL: f32 = -12345.0;

/// Forward, then backward. Keys and values lie side by side in rows with room to spare, as do their gradients.
fn compute(cuda: &Cuda, case: &Case, q: &[f32], kv: &[f32], d_out: &[f32]) -> Result<Computed> {
    let (shape, width, kv_width) = (case.shape, case.shape.q_width(), case.shape.kv_width());
    let (n_q, n_kv, first_q) = (case.n_q(), case.n_kv(), case.first_q);
    let filled = |n: usize, width: usize, values: &[f32]| Guarded::filled(cuda, n, width, width + 8, values);
    let (q, kv, d_out) = (filled(n_q, width, q)?, filled(n_kv, 2 * kv_width, kv)?, filled(n_q, width, d_out)?);
    let (k, v) = (kv.rows().columns(0, kv_width), kv.rows().columns(kv_width, kv_width));
    let out = Guarded::new(cuda, n_q, width, width + 16)?;
    let d_q = Guarded::new(cuda, n_q - first_q, width, width)?;
    let d_kv = Guarded::new(cuda, n_kv - case.first, 2 * kv_width, 2 * kv_width + 24)?;
    let numbers = |n: usize| Buffer::from_host(cuda, &vec![SENTINEL; n * shape.n_heads + MARGIN], "a test");
    let (lse, delta) = (numbers(n_q)?, numbers(n_q - first_q)?);
    let attention = Attention::new(cuda, shape.head_dim)?;
    let mut tables = Tables::default();
    // Used before by a smaller batch.
    tables.prepare(cuda, &plain(&[3]), &[], 3)?;
    tables.prepare(cuda, &case.segments, &case.backward, case.first)?;
    attention.forward(cuda, shape, &tables, q.rows(), k, v, out.rows(), &lse)?;
    let tail = n_q - first_q;
    let backward = Backward {
        q: q.rows().rows(first_q, tail),
        k,
        v,
        out: out.rows().rows(first_q, tail),
        lse: &lse,
        lse_first: first_q,
        d_out: d_out.rows().rows(first_q, tail),
        delta: &delta,
        d_q: d_q.rows(),
        d_k: d_kv.rows().columns(0, kv_width),
        d_v: d_kv.rows().columns(kv_width, kv_width),
    };
    attention.backward(cuda, shape, &tables, &backward)?;
    let mut contained = true;
    let mut read = |matrix: &Guarded| -> Result<Vec<f32>> {
        let (values, inside) = matrix.read(cuda)?;
        contained &= inside;
        Ok(values)
    };
    let (out, d_q, d_kv) = (read(&out)?, read(&d_q)?, read(&d_kv)?);
    let mut number = |buffer: &Buffer<f32>| -> Result<Vec<f32>> {
        let mut values = buffer.download(cuda, buffer.len())?;
        contained &= values.split_off(buffer.len() - MARGIN).iter().all(|&x| x == SENTINEL);
        Ok(values)
    };
    // [n_heads, n_q], as the oracle has it.
    let by_head = number(&lse)?;
    let lse = (0..n_q).flat_map(|q| (0..shape.n_heads).map(move |h| h * n_q + q)).map(|i| by_head[i]).collect();
    number(&delta)?;
    let half = |at: usize| d_kv.chunks_exact(2 * kv_width).flat_map(|r| &r[at..at + kv_width]).copied().collect();
    Ok(Computed { out, lse, d_q, d_k: half(0), d_v: half(kv_width), contained })
}

/// Inputs of a case: q, [k | v], d_out.
pub(super) fn made(precision: Precision, case: &Case) -> [Vec<f32>; 3] {
    let (n_q, n_kv) = (case.n_q() * case.shape.q_width(), case.n_kv() * 2 * case.shape.kv_width());
    let mut q = random(precision, n_q, 1);
    let mut kv = random(precision, n_kv, 2);
    q.iter_mut().for_each(|x| *x = round(precision, *x * case.magnitude));
    for row in kv.chunks_exact_mut(2 * case.shape.kv_width()) {
        row[..case.shape.kv_width()].iter_mut().for_each(|x| *x = round(precision, *x * case.magnitude));
    }
    [q, kv, random(precision, n_q, 3)]
}

/// Holds what was computed from q, [k | v] and d_out against the formulas.
pub(super) fn judge(p: Precision, case: &Case, [q, kv, d_out]: [&[f32]; 3], computed: &Computed) -> Vec<Outcome> {
    let (width, kv_width) = (case.shape.q_width(), case.shape.kv_width());
    let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
    let half = |at: usize| kv.chunks_exact(2 * kv_width).flat_map(|r| wide(&r[at..at + kv_width])).collect::<Vec<_>>();
    let (q, k, v, d_out) = (wide(q), half(0), half(kv_width), wide(d_out));
    let results = |arithmetic: &Arithmetic| {
        let forward = reference(arithmetic, case.shape, &case.segments, &Inputs { q: &q, k: &k, v: &v, d_out: &d_out });
        let from = case.first_q * width;
        let x = Inputs { q: &q[from..], k: &k, v: &v, d_out: &d_out[from..] };
        let mut all = reference(arithmetic, case.shape, &case.backward, &x);
        all.d_k.drain(..case.first * kv_width);
        all.d_v.drain(..case.first * kv_width);
        Results { out: forward.out, lse: forward.lse, ..all }
    };
    let (want, naive) = (results(&EXACT), results(&naive(p)));
    let terms = case.n_kv().max(case.n_q());
    let outcome = |operation: &'static str, got: &[f32], want: &[f64], naive: &[f64], least: f64| {
        let naive: Vec<f32> = naive.iter().map(|&x| x as f32).collect();
        Outcome {
            operation,
            case: case.name.clone(),
            error: relative_error(got, want),
            // By chance the naive version may be better than it should.
            limit: (2.0 * relative_error(&naive, want)).max(least),
            contained: computed.contained,
        }
    };
    let least = limit(p, terms);
    // The log-sum-exp is never an element: only its sums may err.
    vec![
        outcome("attention", &computed.out, &want.out, &naive.out, least),
        outcome("attention lse", &computed.lse, &want.lse, &want.lse, limit(Precision::F32, terms)),
        outcome("attention d_q", &computed.d_q, &want.d_q, &naive.d_q, least),
        outcome("attention d_k", &computed.d_k, &want.d_k, &naive.d_k, least),
        outcome("attention d_v", &computed.d_v, &want.d_v, &naive.d_v, least),
    ]
}

/// The same prompts, first alone, then behind others and between other readers of their prefix: not a bit may differ.
fn batch_mates(cuda: &Cuda) -> Result<Outcome> {
    let shape = heads(4, 2, 64);
    let alone = Case::frozen("alone", shape, runs(&[(40, 0..0), (70, 0..40), (33, 0..0)]), 40);
    let crowd = runs(&[(51, 0..0), (40, 0..0), (5, 0..51), (70, 51..91), (90, 51..91), (33, 0..0), (2, 51..91)]);
    let crowd = Case::frozen("in company", shape, crowd, 91);
    // Rows of the two batches that are the same token, in order.
    let pairs: Vec<(usize, usize)> = (0..40)
        .map(|i| (i, 51 + i))
        .chain((40..110).map(|i| (i, 56 + i)))
        .chain((110..143).map(|i| (i, 146 + i)))
        .collect();
    let [q, kv, d_out] = made(cuda.precision(), &alone);
    let mut other = made(cuda.precision(), &crowd);
    let (width, kv_width) = (shape.q_width(), shape.kv_width());
    for &(from, to) in &pairs {
        for ((from_rows, to_rows), width) in
            [&q, &kv, &d_out].into_iter().zip(&mut other).zip([width, 2 * kv_width, width])
        {
            to_rows[to * width..][..width].copy_from_slice(&from_rows[from * width..][..width]);
        }
    }
    let one = compute(cuda, &alone, &q, &kv, &d_out)?;
    let many = compute(cuda, &crowd, &other[0], &other[1], &other[2])?;
    let mut different = 0;
    let mut count = |a: &[f32], b: &[f32], width: usize, skip: [usize; 2]| {
        for &(from, to) in pairs.iter().filter(|p| p.0 >= skip[0]) {
            let (a, b) = (&a[(from - skip[0]) * width..][..width], &b[(to - skip[1]) * width..][..width]);
            different += a.iter().zip(b).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
        }
    };
    count(&one.out, &many.out, width, [0, 0]);
    count(&one.lse, &many.lse, shape.n_heads, [0, 0]);
    count(&one.d_q, &many.d_q, width, [40, 91]);
    count(&one.d_k, &many.d_k, kv_width, [40, 91]);
    count(&one.d_v, &many.d_v, kv_width, [40, 91]);
    let contained = one.contained && many.contained;
    Ok(Outcome {
        operation: "attention",
        case: "batch mates".to_owned(),
        error: different as f64,
        limit: 0.0,
        contained,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The oracle's gradients are the derivatives of its output.
    #[test]
    fn oracle_agrees_with_finite_differences() {
        let shape = heads(4, 2, 4);
        let segments = runs(&[(3, 0..0), (5, 0..3), (2, 1..3)]);
        let (n, width, kv_width) = (10, shape.q_width(), shape.kv_width());
        let numbers =
            |n: usize, seed: u64| -> Vec<f64> { random(Precision::F32, n, seed).into_iter().map(f64::from).collect() };
        let mut x = [numbers(n * width, 1), numbers(n * kv_width, 2), numbers(n * kv_width, 3)];
        let d_out = numbers(n * width, 4);
        let run = |x: &[Vec<f64>; 3]| {
            reference(&EXACT, shape, &segments, &Inputs { q: &x[0], k: &x[1], v: &x[2], d_out: &d_out })
        };
        let loss = |x: &[Vec<f64>; 3]| -> f64 { run(x).out.iter().zip(&d_out).map(|(o, d)| o * d).sum() };
        let results = run(&x);
        for (which, gradient) in [&results.d_q, &results.d_k, &results.d_v].into_iter().enumerate() {
            for (i, &gradient) in gradient.iter().enumerate() {
                let (value, h) = (x[which][i], 1e-5);
                x[which][i] = value + h;
                let above = loss(&x);
                x[which][i] = value - h;
                let below = loss(&x);
                x[which][i] = value;
                let slope = (above - below) / (2.0 * h);
                assert!((slope - gradient).abs() < 1e-8, "{which} {i}: {slope} {gradient}");
            }
        }
    }
}
