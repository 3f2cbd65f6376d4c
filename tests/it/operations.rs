//! Every CPU operation against a float64 oracle written straight from its formula; every gradient against central differences
//! of the oracle. Sizes are odd on purpose; outputs lie between sentinels.

use collm_engine::cie::Mapping;
use collm_engine::device::cpu::attention::{attention, attention_backward};
use collm_engine::device::cpu::head::{AnswerRows, bce};
use collm_engine::device::cpu::lightgcn::Adjacency;
use collm_engine::device::cpu::lora::{self, Mask, Pair, PairGradient};
use collm_engine::device::cpu::norm::{rms_norm, rms_norm_backward, rms_norm_saved};
use collm_engine::device::cpu::rope::{RopeTable, Rotation, rotate};
use collm_engine::device::cpu::splice::{Source, splice, splice_backward};
use collm_engine::device::cpu::swiglu::{swiglu, swiglu_backward};
use collm_engine::device::ops::{Dropout, HeadShape, Loss, Segment};
use collm_engine::llm::weights::WeightMatrix;
use collm_engine::rng::Rng;

fn random(n: usize, seed: u64) -> Vec<f32> {
    let mut rng = Rng::new(seed, 7);
    (0..n).map(|_| rng.normal() as f32).collect()
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| x.into()).collect()
}

/// max |a − b| ≤ limit · max |b|.
fn close(got: &[f32], want: &[f64], limit: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let largest = want.iter().fold(1e-30f64, |m, x| m.max(x.abs()));
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(g) - w).abs() / largest;
        assert!(error <= limit, "{what}: element {i} is {g}, oracle {w}, relative error {error:e} > {limit:e}");
    }
}

/// A buffer with a sentinel on each side of its `n` elements.
struct Guarded(Vec<f32>);

impl Guarded {
    fn new(n: usize) -> Self {
        Guarded(vec![f32::from_bits(0x7fc0_dead); n + 32])
    }
    fn slice(&mut self) -> &mut [f32] {
        let n = self.0.len();
        &mut self.0[16..n - 16]
    }
    fn check(&mut self, what: &str) -> Vec<f32> {
        let n = self.0.len();
        let untouched = |x: &f32| x.to_bits() == 0x7fc0_dead;
        assert!(
            self.0[..16].iter().all(untouched) && self.0[n - 16..].iter().all(untouched),
            "{what} wrote outside its output"
        );
        self.slice().to_vec()
    }
}

/// Central differences of `f` at `x`, for every element.
fn differences(x: &[f32], f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    let mut x = wide(x);
    let h = 1e-5;
    (0..x.len())
        .map(|i| {
            let at = x[i];
            x[i] = at + h;
            let up = f(&x);
            x[i] = at - h;
            let down = f(&x);
            x[i] = at;
            (up - down) / (2.0 * h)
        })
        .collect()
}

fn dot(a: &[f64], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, &b)| a * f64::from(b)).sum()
}

fn norm_oracle(x: &[f64], w: &[f32], eps: f64) -> Vec<f64> {
    let rows = x.chunks(w.len()).map(|x| {
        let r = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64 + eps).sqrt();
        x.iter().zip(w).map(move |(x, &w)| x * r * f64::from(w)).collect::<Vec<_>>()
    });
    rows.flatten().collect()
}

#[test]
fn rms_norm_both_ways() {
    for (n, width) in [(1, 1), (3, 7), (65, 33), (5, 576)] {
        let (x, w, d_y) = (random(n * width, 1), random(width, 2), random(n * width, 3));
        let (mut y, mut r) = (Guarded::new(n * width), Guarded::new(n));
        rms_norm(&x, &w, 1e-5, y.slice(), r.slice());
        let (y, r) = (y.check("rms_norm"), r.check("rms_norm"));
        close(&y, &norm_oracle(&wide(&x), &w, 1e-5), 1e-6, "rms_norm");
        let mut again = vec![0.0; y.len()];
        rms_norm_saved(&x, &w, &r, &mut again);
        assert_eq!(y, again);
        let base = random(n * width, 4);
        let mut d_x = base.clone();
        rms_norm_backward(&x, &w, &r, &d_y, &mut d_x);
        if n * width < 3000 {
            let want = differences(&x, |x| dot(&norm_oracle(x, &w, 1e-5), &d_y));
            let want: Vec<f64> = want.iter().zip(&base).map(|(w, &b)| w + f64::from(b)).collect();
            close(&d_x, &want, 3e-6, "rms_norm_backward adds to d_x");
        }
    }
}

fn swiglu_oracle(gu: &[f64], width: usize) -> Vec<f64> {
    gu.chunks(2 * width).flat_map(|r| (0..width).map(move |i| r[i] / (1.0 + (-r[i]).exp()) * r[width + i])).collect()
}

#[test]
fn swiglu_both_ways() {
    for (n, width) in [(1, 1), (7, 9), (33, 65)] {
        let (gu, d_y) = (random(n * 2 * width, 1), random(n * width, 2));
        let gu: Vec<f32> = gu.iter().map(|x| 4.0 * x).collect();
        let (mut y, mut d) = (Guarded::new(n * width), Guarded::new(n * 2 * width));
        swiglu(&gu, y.slice(), width);
        swiglu_backward(&gu, &d_y, d.slice(), width);
        close(&y.check("swiglu"), &swiglu_oracle(&wide(&gu), width), 1e-6, "swiglu");
        let want = differences(&gu, |x| dot(&swiglu_oracle(x, width), &d_y));
        close(&d.check("swiglu_backward"), &want, 3e-6, "swiglu_backward");
    }
    // Far from zero the sigmoid saturates and nothing overflows.
    let mut y = [0.0; 2];
    swiglu(&[-200.0, 200.0, 1.0, 1.0], &mut y, 2);
    assert!(y[0].abs() < 1e-30 && y[1] == 200.0, "{y:?}");
}

#[test]
fn rope_rotates_pairs_and_back() {
    let inv_freq = [1.0, 0.1, 0.01];
    let (heads, stride) = (2, 2 * 6 + 5);
    let positions = [0u32, 3, 200, 7];
    let table = RopeTable::new(&inv_freq, 201);
    let x = random(4 * stride, 1);
    let mut y = x.clone();
    rotate(&table, &positions, heads, &mut y, stride, Rotation::Forward);
    let mut want = wide(&x);
    for (row, &p) in want.chunks_mut(stride).zip(&positions) {
        for head in row[..12].chunks_mut(6) {
            for (i, f) in inv_freq.iter().enumerate() {
                let (a, b, angle) = (head[i], head[i + 3], f64::from(p) * f);
                (head[i], head[i + 3]) = (a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin());
            }
        }
    }
    close(&y, &want, 3e-7, "rotate");
    rotate(&table, &positions, heads, &mut y, stride, Rotation::Backward);
    close(&y, &wide(&x), 5e-7, "rotate back");
}

/// Attention in float64, straight from the formula.
fn attention_oracle(shape: HeadShape, segments: &[Segment], q: &[f64], kv: &[f64]) -> Vec<f64> {
    let (d, qw, kw) = (shape.head_dim, shape.q_width(), shape.kv_width());
    let mut out = vec![0.0; q.len()];
    for s in segments {
        for (i, row) in s.q.clone().enumerate() {
            let own = s.kv.len() - s.q.len() + i + 1;
            let keys: Vec<usize> = s.prefix.clone().chain(s.kv.start..s.kv.start + own).collect();
            for h in 0..shape.n_heads {
                let g = h / (shape.n_heads / shape.n_kv_heads);
                let score = |&k: &usize| {
                    let dot: f64 = (0..d).map(|j| q[row * qw + h * d + j] * kv[k * 2 * kw + g * d + j]).sum();
                    (dot / (d as f64).sqrt()).exp()
                };
                let p: Vec<f64> = keys.iter().map(score).collect();
                let sum: f64 = p.iter().sum();
                for j in 0..d {
                    let v = keys.iter().zip(&p).map(|(k, p)| p * kv[k * 2 * kw + kw + g * d + j]).sum::<f64>();
                    out[row * qw + h * d + j] = v / sum;
                }
            }
        }
    }
    out
}

#[test]
fn attention_both_ways_with_prefixes_groups_and_trimmed_queries() {
    let segment = |q: std::ops::Range<usize>, kv: std::ops::Range<usize>, prefix: std::ops::Range<usize>| Segment {
        q,
        kv,
        prefix,
    };
    let cases = [
        // (heads, kv heads, head_dim, query rows, key rows, first row with a gradient, segments)
        (2, 2, 4, 9, 9, 0, vec![segment(0..1, 0..1, 0..0), segment(1..9, 1..9, 0..0)]),
        // A prefix of 5 shared by two readers, and one run alone.
        (
            6,
            2,
            8,
            17,
            17,
            0,
            vec![
                segment(0..5, 0..5, 0..0),
                segment(5..9, 5..9, 0..5),
                segment(9..10, 9..10, 0..5),
                segment(10..17, 10..17, 0..0),
            ],
        ),
        // The same with a frozen prefix: queries are the rows from 5 on.
        (3, 1, 6, 5, 10, 5, vec![segment(0..4, 5..9, 0..5), segment(4..5, 9..10, 0..5)]),
        // Trimmed: one query a run.
        (4, 2, 4, 2, 14, 0, vec![segment(0..1, 3..9, 0..3), segment(1..2, 9..14, 0..0)]),
        // More queries than a block.
        (1, 1, 2, 211, 211, 0, vec![segment(0..211, 0..211, 0..0)]),
    ];
    for (n_heads, n_kv_heads, head_dim, n_q, n_kv, first, segments) in cases {
        let shape = HeadShape { n_heads, n_kv_heads, head_dim };
        let what = format!("{shape:?} {} segments", segments.len());
        let (qw, kw) = (shape.q_width(), 2 * shape.kv_width());
        let (q, kv, d_o) = (random(n_q * qw, 1), random(n_kv * kw, 2), random(n_q * qw, 3));
        let (mut out, mut lse) = (Guarded::new(n_q * qw), Guarded::new(n_q * n_heads));
        attention(shape, &segments, &q, &kv, out.slice(), lse.slice());
        let (out, lse) = (out.check(&what), lse.check(&what));
        close(&out, &attention_oracle(shape, &segments, &wide(&q), &wide(&kv)), 1e-6, &what);
        let (mut d_q, mut d_kv) = (Guarded::new(n_q * qw), Guarded::new((n_kv - first) * kw));
        d_kv.slice().fill(0.0);
        attention_backward(shape, &segments, &q, &kv, &out, &lse, &d_o, first, d_q.slice(), d_kv.slice());
        let value = |q: &[f64], kv: &[f64]| dot(&attention_oracle(shape, &segments, q, kv), &d_o);
        let want = differences(&q, |q| value(q, &wide(&kv)));
        close(&d_q.check(&what), &want, 1e-5, &format!("{what} d_q"));
        let want = differences(&kv, |kv| value(&wide(&q), kv));
        close(&d_kv.check(&what), &want[first * kw..], 1e-5, &format!("{what} d_kv"));
    }
}

#[test]
fn attention_of_a_sequence_does_not_depend_on_its_batch_mates() {
    let shape = HeadShape { n_heads: 3, n_kv_heads: 1, head_dim: 16 };
    let (q, kv) = (random(150 * 48, 1), random(150 * 32, 2));
    let run = |segments: &[Segment]| {
        let (mut out, mut lse) = (vec![0.0; 150 * 48], vec![0.0; 150 * 3]);
        attention(shape, segments, &q, &kv, &mut out, &mut lse);
        out
    };
    let segment = |r: std::ops::Range<usize>| Segment { q: r.clone(), kv: r, prefix: 0..0 };
    let together = run(&[segment(0..20), segment(20..150)]);
    let alone = run(&[segment(20..150)]);
    assert_eq!(together[20 * 48..], alone[20 * 48..]);
}

/// LoRA in float64 with a given mask.
fn lora_oracle(x: &[f64], a: &[f64], b: &[f64], mask: &[f64], rank: usize, scaling: f64) -> Vec<f64> {
    let width = a.len() / rank;
    let rows = x.chunks(width).zip(mask.chunks(width)).flat_map(|(x, m)| {
        let u: Vec<f64> = a.chunks(width).map(|a| (0..width).map(|i| a[i] * x[i] * m[i]).sum()).collect();
        b.chunks(rank).map(|b| scaling * b.iter().zip(&u).map(|(b, u)| b * u).sum::<f64>()).collect::<Vec<_>>()
    });
    rows.collect()
}

#[test]
fn lora_both_ways_with_and_without_dropout() {
    let (n, width, out, rank, scaling) = (13, 37, 29, 5, 2.0);
    let (x, a, b) = (random(n * width, 1), random(rank * width, 2), random(out * rank, 3));
    let (base, d_y) = (random(n * out, 4), random(n * out, 5));
    let tokens: Vec<u32> = (100..100 + n as u32).collect();
    let dropout = Dropout { p: 0.3, seed: 11, step: 4 };
    for with_dropout in [false, true] {
        let mask = with_dropout.then_some(Mask { dropout, module: 3, tokens: &tokens });
        let mut kept = vec![1.0f32; n * width];
        if let Some(mask) = mask {
            mask.apply(&vec![1.0; n * width], width, &mut kept, false);
            let dropped = kept.iter().filter(|&&k| k == 0.0).count() as f64 / kept.len() as f64;
            assert!((dropped - 0.3).abs() < 0.08, "{dropped}");
            assert!(kept.iter().all(|&k| k == 0.0 || (k - 1.0 / 0.7).abs() < 1e-6));
        }
        let kept = wide(&kept);
        let pair = Pair { a: &a, b: &b, rank, scaling: scaling as f32 };
        let (mut u, mut y, mut space) = (vec![0.0; rank * n], base.clone(), vec![0.0; n * width]);
        lora::forward(pair, &x, mask, &mut u, &mut y, out, &mut space);
        let oracle = |x: &[f64], a: &[f64], b: &[f64]| lora_oracle(x, a, b, &kept, rank, scaling);
        let want: Vec<f64> =
            oracle(&wide(&x), &wide(&a), &wide(&b)).iter().zip(&base).map(|(w, &b)| w + f64::from(b)).collect();
        close(&y, &want, 1e-6, "lora forward adds to y");
        let (mut g_a, mut g_b, mut d_x) = (vec![0.0; a.len()], vec![0.0; b.len()], vec![0.0; x.len()]);
        let gradient = PairGradient { a: &mut g_a, b: &mut g_b, u: &u, u_stride: n };
        lora::backward(pair, &x, mask, &d_y, out, Some(gradient), Some(&mut d_x), &mut space);
        close(&d_x, &differences(&x, |x| dot(&oracle(x, &wide(&a), &wide(&b)), &d_y)), 1e-5, "lora d_x");
        close(&g_a, &differences(&a, |a| dot(&oracle(&wide(&x), a, &wide(&b)), &d_y)), 1e-5, "lora d_a");
        close(&g_b, &differences(&b, |b| dot(&oracle(&wide(&x), &wide(&a), b), &d_y)), 1e-5, "lora d_b");
    }
}

#[test]
fn dropout_depends_on_the_token_not_on_its_place_in_the_batch() {
    let dropout = Dropout { p: 0.5, seed: 1, step: 9 };
    let x = vec![1.0; 6 * 50];
    let apply = |tokens: &[u32]| {
        let mut out = vec![0.0; tokens.len() * 50];
        Mask { dropout, module: 2, tokens }.apply(&x[..tokens.len() * 50], 50, &mut out, false);
        out
    };
    let all = apply(&[5, 6, 7, 8, 9, 10]);
    assert_eq!(all[3 * 50..4 * 50], apply(&[8])[..]);
    assert_ne!(all[..50], all[50..100]);
}

#[test]
fn splice_gathers_and_scatters() {
    let embed = WeightMatrix::from_bf16(3, 2, [0x3f80u16, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0].to_vec());
    let sources = [Source::Token(2), Source::Vector(1), Source::Token(0), Source::Vector(0)];
    let mut x = Guarded::new(8);
    splice(&sources, &embed, &[0.5, 0.25, -1.0, -2.0], x.slice());
    assert_eq!(x.check("splice"), [5.0, 6.0, -1.0, -2.0, 1.0, 2.0, 0.5, 0.25]);
    let mut d = [0.0; 4];
    splice_backward(&sources, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], 2, &mut d);
    assert_eq!(d, [7.0, 8.0, 3.0, 4.0]);
}

#[test]
fn head_and_losses() {
    let (vocab, hidden, n) = (5, 33, 4);
    let (table, y) = (random(vocab * hidden, 1), random(n * hidden, 2));
    let rows = AnswerRows::new(&WeightMatrix::from_f32(vocab, hidden, table.clone()), 3, 1);
    let labels = [1.0, 0.0, 0.0, 1.0];
    for loss in [Loss::YesLogitBce, Loss::YesNoSoftmax] {
        let oracle = |y: &[f64]| -> Vec<f64> {
            let logit = |y: &[f64], id: usize| dot(y, &table[id * hidden..(id + 1) * hidden]);
            y.chunks(hidden).map(|y| logit(y, 3) - if loss == Loss::YesNoSoftmax { logit(y, 1) } else { 0.0 }).collect()
        };
        let total = |y: &[f64]| -> f64 {
            oracle(y)
                .iter()
                .zip(labels)
                .map(|(z, l)| (1.0 + (-z).exp()).ln() * l + (1.0 + z.exp()).ln() * (1.0 - l))
                .sum()
        };
        let scores = rows.scores(&y, loss);
        close(&scores, &oracle(&wide(&y)), 1e-6, "scores");
        let mut d_scores = vec![0.0; n];
        let sum = bce(&scores, &labels.map(|l| l as f32), 0.25, &mut d_scores);
        assert!((sum - total(&wide(&y))).abs() < 1e-5);
        let mut d_y = Guarded::new(n * hidden);
        rows.backward(&d_scores, loss, d_y.slice());
        close(&d_y.check("head"), &differences(&y, |y| 0.25 * total(y)), 1e-5, "d_y");
    }
    // Extreme logits stay finite.
    let mut d = [0.0; 2];
    let sum = bce(&[1e4, -1e4], &[0.0, 1.0], 1.0, &mut d);
    assert_eq!((sum, d), (2e4, [1.0, -1.0]));
}

#[test]
fn mapping_both_ways() {
    let (dim, mid, out, n) = (5, 11, 7, 3);
    let mapping = Mapping::init(dim, mid, out, 1);
    let (x, d_y) = (random(n * dim, 1), random(n * out, 2));
    let oracle = |x: &[f64], t: &[Vec<f64>; 4]| -> Vec<f64> {
        let linear = |x: &[f64], w: &[f64], b: &[f64]| -> Vec<f64> {
            let k = w.len() / b.len();
            b.iter().zip(w.chunks(k)).map(|(b, w)| b + w.iter().zip(x).map(|(w, x)| w * x).sum::<f64>()).collect()
        };
        let row = |x: &[f64]| {
            let h: Vec<f64> = linear(x, &t[0], &t[1]).iter().map(|h| h.max(0.0)).collect();
            linear(&h, &t[2], &t[3])
        };
        x.chunks(dim).flat_map(row).collect()
    };
    let tensors = [0, 1, 2, 3].map(|i| wide(&mapping.tensors[i]));
    let pass = mapping.forward(&x);
    close(&pass.output, &oracle(&wide(&x), &tensors), 1e-6, "mapping");
    let mut gradient = Mapping::zeros(dim, mid, out);
    let d_x = mapping.backward(&x, &pass, &d_y, &mut gradient);
    close(&d_x, &differences(&x, |x| dot(&oracle(x, &tensors), &d_y)), 1e-5, "mapping d_x");
    for i in 0..4 {
        let with = |t: &[f64]| {
            let mut changed = tensors.clone();
            changed[i] = t.to_vec();
            changed
        };
        let want = differences(&mapping.tensors[i], |t| dot(&oracle(&wide(&x), &with(t)), &d_y));
        close(&gradient.tensors[i], &want, 1e-5, Mapping::NAMES[i]);
    }
}

/// Against the dense D^-½ A D^-½: an edge twice, a node without edges, no layer and several; the gradient is the same propagation.
#[test]
fn lightgcn_both_ways() {
    let (n_users, n_items, dim) = (19, 27, 13);
    let nodes = n_users + n_items;
    let mut rng = Rng::new(3, 1);
    let mut edges: Vec<(u32, u32)> =
        (0..90).map(|_| (rng.below(n_users as u32), 1 + rng.below(n_items as u32 - 1))).collect();
    edges.push(edges[0]);
    let mut a = vec![0.0f64; nodes * nodes];
    for &(u, i) in &edges {
        let (u, i) = (u as usize, n_users + i as usize);
        a[u * nodes + i] += 1.0;
        a[i * nodes + u] += 1.0;
    }
    let degrees: Vec<f64> = a.chunks(nodes).map(|row| row.iter().sum()).collect();
    assert_eq!(degrees[n_users], 0.0);
    let oracle = |x: &[f64], layers: usize| -> Vec<f64> {
        let (mut layer, mut sum) = (x.to_vec(), x.to_vec());
        for _ in 0..layers {
            let mut next = vec![0.0; nodes * dim];
            for (i, next) in next.iter_mut().enumerate() {
                let (row, d) = (i / dim, i % dim);
                let neighbours = (0..nodes).filter(|&c| a[row * nodes + c] > 0.0);
                *next = neighbours
                    .map(|c| a[row * nodes + c] / (degrees[row] * degrees[c]).sqrt() * layer[c * dim + d])
                    .sum();
            }
            layer = next;
            sum.iter_mut().zip(&layer).for_each(|(s, l)| *s += l);
        }
        sum.iter().map(|s| s / (layers + 1) as f64).collect()
    };
    let graph = Adjacency::new(n_users, n_items, &edges);
    let (x, d_y) = (random(nodes * dim, 1), random(nodes * dim, 2));
    for layers in 0..4 {
        let mut mean = Guarded::new(nodes * dim);
        graph.propagate(layers, dim, &x, mean.slice());
        close(&mean.check("propagation"), &oracle(&wide(&x), layers), 1e-6, "propagation");
    }
    let mut d_x = Guarded::new(nodes * dim);
    graph.propagate(2, dim, &d_y, d_x.slice());
    close(&d_x.check("propagation"), &differences(&x, |x| dot(&oracle(x, 2), &d_y)), 1e-6, "propagation d_x");
    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let mut mean = vec![0.0; nodes * dim];
        pool.install(|| graph.propagate(3, dim, &x, &mut mean));
        mean
    };
    assert_eq!(on(1), on(3));
}

/// The official LightGCN's propagated vectors.
#[test]
fn lightgcn_agrees_with_pytorch() {
    let bytes = include_bytes!("../fixtures/golden/collab-lightgcn/golden.safetensors");
    let file = safetensors::SafeTensors::deserialize(bytes).unwrap();
    let floats = |name: &str| -> Vec<f64> { bytemuck::pod_collect_to_vec(file.tensor(name).unwrap().data()) };
    let ids = |name: &str| -> Vec<i64> { bytemuck::pod_collect_to_vec(file.tensor(name).unwrap().data()) };
    let (users, items, dim) = (floats("embedding_user.weight"), floats("embedding_item.weight"), 16);
    let edges: Vec<(u32, u32)> =
        ids("edge_user").iter().zip(ids("edge_item")).map(|(&u, i)| (u as u32, i as u32)).collect();
    let graph = Adjacency::new(users.len() / dim, items.len() / dim, &edges);
    let from: Vec<f32> = users.iter().chain(&items).map(|&x| x as f32).collect();
    let mut mean = vec![0.0; from.len()];
    graph.propagate(ids("n_layers")[0] as usize, dim, &from, &mut mean);
    close(&mean, &[floats("all_users"), floats("all_items")].concat(), 1e-6, "LightGCN");
    // The matrix itself, entry by entry.
    let mut want: Vec<(u32, u32, f64)> = ids("norm_adj.row")
        .iter()
        .zip(ids("norm_adj.col"))
        .zip(floats("norm_adj.val"))
        .map(|((&row, column), value)| (row as u32, column as u32, value))
        .collect();
    want.sort_by_key(|&(row, column, _)| (row, column));
    let rows =
        (0..graph.nodes()).flat_map(|row| vec![row as u32; (graph.starts[row + 1] - graph.starts[row]) as usize]);
    assert!(rows.zip(&graph.columns).eq(want.iter().map(|(row, column, _)| (*row, column))));
    close(&graph.values, &want.iter().map(|w| w.2).collect::<Vec<_>>(), 1e-7, "norm_adj");
}
