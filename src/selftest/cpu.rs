//! The CPU's operations through the same oracles and, where it is the shapes that matter, the same shapes as the kernels'.
//!
//! One limit for all: that of float32 elements. Outputs lie between sentinels where an operation writes through pointers.

use super::gemm::{factor, product, silu};
use super::{Outcome, attention, columns, epsilon, head, lightgcn, lora, mapping, mf, norm, optimizer, rope};
use super::{add_adapter, limit, random, relative_error};
use crate::cie::Mapping;
use crate::collab::mf::{Batch, Mf};
use crate::device::cpu::attention as attend;
use crate::device::cpu::gemm::{Dense, FrozenMatrix, Operand, Output, gemm};
use crate::device::cpu::head::{AnswerRows, bce};
use crate::device::cpu::lora as adapters;
use crate::device::cpu::lora::{Mask, Pair, PairGradient};
use crate::device::cpu::norm::{rms_norm, rms_norm_backward, rms_norm_saved};
use crate::device::cpu::optimizer::{Adam, Decay};
use crate::device::cpu::rope::{RopeTable, Rotation, rotate};
use crate::device::cpu::splice::{Source, splice, splice_backward};
use crate::device::cpu::swiglu::{swiglu, swiglu_backward};
use crate::device::cuda::Precision::{self, Bf16, F32};
use crate::device::cuda::gemm::Weight;
use crate::device::ops::{Dropout, Loss};
use crate::llm::weights::WeightMatrix;

/// Runs all cases.
pub fn run() -> Vec<Outcome> {
    let parts = [gemms, attentions, norms, ropes, swiglus, loras, splices, heads, masks, mappings, adams, mfs, graphs];
    parts.iter().flat_map(|part| part()).collect()
}

fn wide(x: &[f32]) -> Vec<f64> {
    columns(x, 1, 0, 1)
}

fn outcome(operation: &'static str, case: String, got: &[f32], want: &[f64], limit: f64) -> Outcome {
    Outcome { operation, case, error: relative_error(got, want), limit, contained: true }
}

/// A NaN that no operation computes.
const SENTINEL: u32 = 0x7fc0_dead;

/// What `write` leaves in `len` numbers that all begin as sentinels, and whether the numbers around them are untouched.
fn fenced(len: usize, write: impl FnOnce(&mut [f32])) -> (Vec<f32>, bool) {
    const MARGIN: usize = 64;
    let mut all = vec![f32::from_bits(SENTINEL); len + 2 * MARGIN];
    write(&mut all[MARGIN..MARGIN + len]);
    let after = all.split_off(MARGIN + len);
    let inside = all.split_off(MARGIN);
    let contained = all.iter().chain(&after).all(|x| x.to_bits() == SENTINEL);
    (inside, contained)
}

fn gemms() -> Vec<Outcome> {
    let mut outcomes = Vec::new();
    for (m, n, k) in [(1, 8, 8), (7, 72, 40), (63, 64, 64), (65, 136, 72), (257, 200, 104), (33, 97, 1030)] {
        for way in [Weight::Transposed, Weight::Plain] {
            for frozen in [None, Some(F32), Some(Bf16)] {
                let (a, b) = (random(F32, m * k, 1), random(frozen.unwrap_or(F32), n * k, 2));
                let (rows, width) = if way == Weight::Transposed { (n, k) } else { (k, n) };
                let weight = |p: Precision| match p {
                    F32 => WeightMatrix::from_f32(rows, width, b.clone()),
                    Bf16 => {
                        let bits = b.iter().map(|&x| half::bf16::from_f32(x).to_bits()).collect();
                        WeightMatrix::from_bf16(rows, width, bits)
                    }
                };
                let matrix = frozen.map(|p| FrozenMatrix::stack(vec![weight(p)]));
                let operand = match (&matrix, way) {
                    (Some(w), Weight::Transposed) => Operand::Transposed(w),
                    (Some(w), Weight::Plain) => Operand::Weight(w),
                    (None, Weight::Transposed) => Operand::Dense(Dense::transposed(&b, k)),
                    (None, Weight::Plain) => Operand::Dense(Dense::rows(&b, n)),
                };
                let stride = n + 5;
                let (rows, mut contained) =
                    fenced(m * stride, |c| gemm(m, n, k, Dense::rows(&a, k), operand, Output::set(c, stride)));
                let got: Vec<f32> = rows.chunks_exact(stride).flat_map(|row| &row[..n]).copied().collect();
                contained &= rows.chunks_exact(stride).flat_map(|row| &row[n..]).all(|x| x.to_bits() == SENTINEL);
                let kind = frozen.map_or("float32".to_owned(), |p| format!("frozen {p:?}"));
                let case = format!("{way:?} {kind} m {m} n {n} k {k}");
                let want = product(&a, &b, m, n, k, way);
                outcomes.push(Outcome { contained, ..outcome("gemm", case, &got, &want, limit(F32, k)) });
            }
        }
    }
    outcomes
}

fn attentions() -> Vec<Outcome> {
    let mut outcomes = Vec::new();
    for case in &attention::list() {
        let (shape, first_q) = (case.shape, case.first_q);
        let (width, heads, kv_columns) = (shape.q_width(), shape.n_heads, 2 * shape.kv_width());
        let [q, kv, d_out] = attention::made(F32, case);
        let mut lse = Vec::new();
        let (out, mut contained) = fenced(case.n_q() * width, |out| {
            let (values, _) =
                fenced(case.n_q() * heads, |lse| attend::attention(shape, &case.segments, &q, &kv, out, lse));
            lse = values;
        });
        let tail = first_q * width;
        let (n_q, n_kv) = (case.n_q() - first_q, case.n_kv() - case.first);
        let mut d_q = Vec::new();
        let (d_kv, inside) = fenced(n_kv * kv_columns, |d_kv| {
            // Added to.
            d_kv.fill(0.0);
            let (values, inside) = fenced(n_q * width, |d_q| {
                attend::attention_backward(
                    shape,
                    &case.backward,
                    &q[tail..],
                    &kv,
                    &out[tail..],
                    &lse[first_q * heads..],
                    &d_out[tail..],
                    case.first,
                    d_q,
                    d_kv,
                );
            });
            d_q = values;
            contained &= inside;
        });
        contained &= inside;
        let half = |first| columns(&d_kv, kv_columns, first, kv_columns / 2).iter().map(|&x| x as f32).collect();
        let computed = attention::Computed { out, lse, d_q, d_k: half(0), d_v: half(kv_columns / 2), contained };
        outcomes.extend(attention::judge(F32, case, [&q, &kv, &d_out], &computed));
    }
    outcomes
}

fn norms() -> Vec<Outcome> {
    let (mut outcomes, eps) = (Vec::new(), f64::from(norm::EPS));
    for (n, width) in [(1, 8), (3, 72), (7, 577), (2, 2056), (2, 8192)] {
        let [x, d_y, base] = [1, 2, 3].map(|seed| random(F32, n * width, seed));
        let w = random(F32, width, 4);
        let (mut y, mut again, mut r, mut d_x) = (vec![0.0; x.len()], vec![0.0; x.len()], vec![0.0; n], base.clone());
        rms_norm(&x, &w, eps, &mut y, &mut r);
        rms_norm_saved(&x, &w, &r, &mut again);
        rms_norm_backward(&x, &w, &r, &d_y, &mut d_x);
        let (x, w) = (wide(&x), wide(&w));
        let mut forward = outcome(
            "rms_norm",
            format!("forward n {n} width {width}"),
            &y,
            &norm::forward(&x, &w, eps),
            limit(F32, width) + 2.0 * epsilon(F32),
        );
        if y != again {
            forward.error = f64::INFINITY;
        }
        let mut want = norm::backward(&x, &w, eps, &wide(&d_y));
        want.iter_mut().zip(&base).for_each(|(w, b)| *w += f64::from(*b));
        let case = format!("backward n {n} width {width}");
        outcomes.extend([forward, outcome("rms_norm", case, &d_x, &want, limit(F32, width))]);
    }
    outcomes
}

fn ropes() -> Vec<Outcome> {
    let mut outcomes = Vec::new();
    for (head_dim, heads) in [(8, 3), (24, 5), (64, 9), (80, 4), (128, 3)] {
        let inv_freq: Vec<f64> = (0..head_dim / 2).map(|i| 1e4f64.powf(-2.0 * i as f64 / head_dim as f64)).collect();
        let (n, width) = (7, heads * head_dim);
        let positions: Vec<u32> = (0..n as u32).map(|t| (t * 37 + 11) % 64).collect();
        let table = RopeTable::new(&inv_freq, 64);
        let angles = rope::Angles { positions: positions.clone(), inv_freq };
        let oracle = rope::Oracle { column: 0, heads, turned: true, u: 0, rank: 0, b: Vec::new() };
        let x = random(F32, n * width, 1);
        for way in [Rotation::Forward, Rotation::Backward] {
            let mut y = x.clone();
            rotate(&table, &positions, heads, &mut y, width, way);
            let want = match way {
                Rotation::Forward => oracle.forward(&wide(&x), &[], &angles),
                Rotation::Backward => oracle.backward(&wide(&x), &angles).0,
            };
            let case = format!("{way:?} n {n} heads {heads} of {head_dim}");
            outcomes.push(outcome("rope", case, &y, &want, limit(F32, 2) + 2.0 * epsilon(F32)));
        }
    }
    outcomes
}

fn swiglus() -> Vec<Outcome> {
    let mut outcomes = Vec::new();
    for (n, width) in [(1, 8), (5, 72), (33, 65), (9, 1032)] {
        let (gate_up, d_y) = (random(F32, n * 2 * width, 1), random(F32, n * width, 2));
        let (mut y, mut d) = (vec![0.0; n * width], vec![0.0; n * 2 * width]);
        swiglu(&gate_up, &mut y, width);
        swiglu_backward(&gate_up, &d_y, &mut d, width);
        let (mut want, mut want_d) = (Vec::new(), Vec::new());
        for (gu, d) in wide(&gate_up).chunks_exact(2 * width).zip(wide(&d_y).chunks_exact(width)) {
            let (g, u) = gu.split_at(width);
            want.extend(g.iter().zip(u).map(|(g, u)| silu(*g) * u));
            let sigmoid = |g: f64| 1.0 / (1.0 + (-g).exp());
            want_d.extend((0..width).map(|i| d[i] * u[i] * sigmoid(g[i]) * (1.0 + g[i] * (1.0 - sigmoid(g[i])))));
            want_d.extend((0..width).map(|i| d[i] * silu(g[i])));
        }
        // Naive: the exponential, the sigmoid and the product are rounded.
        let limit = limit(F32, 1) + 2.0 * 3.0 * epsilon(F32);
        outcomes.push(outcome("swiglu", format!("forward n {n} width {width}"), &y, &want, limit));
        outcomes.push(outcome("swiglu", format!("backward n {n} width {width}"), &d, &want_d, limit));
    }
    outcomes
}

fn loras() -> Vec<Outcome> {
    let (mut outcomes, scaling) = (Vec::new(), 2.0f32);
    let dropout = Dropout { p: 0.3, seed: 77, step: 5 };
    for (n, width, out, rank) in [(1, 8, 16, 8), (33, 72, 40, 4), (70, 200, 136, 16), (5, 577, 64, 33)] {
        for dropped in [false, true] {
            let (x, a, b) = (random(F32, n * width, 1), random(F32, rank * width, 2), random(F32, out * rank, 3));
            let (base, d_y) = (random(F32, n * out, 4), random(F32, n * out, 5));
            let tokens: Vec<u32> = (0..n as u32).map(|t| 5 * t + 2).collect();
            let mask = dropped.then_some(Mask { dropout, module: 6, tokens: &tokens });
            let kept: Vec<f64> = (0..n * width)
                .map(|i| if dropped { factor(&dropout, 6, tokens[i / width], i % width, width) } else { 1.0 })
                .collect();
            let pair = Pair { a: &a, b: &b, rank, scaling };
            let (mut u, mut y, mut space) = (vec![0.0; rank * n], base.clone(), vec![0.0; n * width]);
            adapters::forward(pair, &x, mask, &mut u, &mut y, out, &mut space);
            let (mut g_a, mut g_b, mut d_x) = (vec![0.0; a.len()], vec![0.0; b.len()], vec![0.0; x.len()]);
            let gradient = PairGradient { a: &mut g_a, b: &mut g_b, u: &u, u_stride: n };
            adapters::backward(pair, &x, mask, &d_y, out, Some(gradient), Some(&mut d_x), &mut space);

            let scale = f64::from(scaling);
            let times_kept = |x: &[f64]| -> Vec<f64> { x.iter().zip(&kept).map(|(x, k)| x * k).collect() };
            let (x, a, b, d_y) = (times_kept(&wide(&x)), wide(&a), wide(&b), wide(&d_y));
            let want_u = products_of_rows(&x, &a, width);
            let mut want_y: Vec<f64> = vec![0.0; n * out];
            add_adapter(&mut want_y, out, &want_u, &b);
            want_y.iter_mut().zip(&base).for_each(|(w, b)| *w = *w * scale + f64::from(*b));
            let mut d_u = mapping::times(&d_y, &narrow(&b), out, rank);
            d_u.iter_mut().for_each(|d| *d *= scale);
            let want_b: Vec<f64> = lora::outer(&d_y, &want_u, n).iter().map(|g| g * scale).collect();
            let want_x = times_kept(&mapping::times(&d_u, &narrow(&a), rank, width));
            let mut push = |what: &str, got: &[f32], want: &[f64], terms: [usize; 2]| {
                let case = format!(
                    "{what} n {n} width {width} out {out} rank {rank}{}",
                    if dropped { " dropout" } else { "" }
                );
                // Two products, one of the other's result.
                outcomes.push(outcome("lora", case, got, want, limit(F32, terms[0]) + limit(F32, terms[1])));
            };
            push("y", &y, &want_y, [width, rank]);
            push("d_A", &g_a, &lora::outer(&d_u, &x, n), [out, n]);
            push("d_B", &g_b, &want_b, [width, n]);
            push("d_x", &d_x, &want_x, [out, rank]);
        }
    }
    outcomes
}

/// Every row of `x` times every row of `w`.
fn products_of_rows(x: &[f64], w: &[f64], k: usize) -> Vec<f64> {
    let row =
        |x: &[f64]| -> Vec<f64> { w.chunks_exact(k).map(|w| x.iter().zip(w).map(|(x, w)| x * w).sum()).collect() };
    x.chunks_exact(k).flat_map(row).collect()
}

fn narrow(x: &[f64]) -> Vec<f32> {
    x.iter().map(|&x| x as f32).collect()
}

fn splices() -> Vec<Outcome> {
    let mut outcomes = Vec::new();
    for (n, width) in [(1, 8), (7, 72), (40, 1032)] {
        let (embed, vectors) = (random(Bf16, 11 * width, 1), random(F32, n * width, 2));
        let bits = embed.iter().map(|&x| half::bf16::from_f32(x).to_bits()).collect();
        let table = WeightMatrix::from_bf16(11, width, bits);
        // Every third is a vector, the last vector first.
        let source = |t: usize| {
            if t.is_multiple_of(3) { Source::Vector((n - 1 - t) as u32) } else { Source::Token((t * 7 % 5 * 2) as u32) }
        };
        let sources: Vec<Source> = (0..n).map(source).collect();
        let (mut x, mut d) = (vec![0.0; n * width], vec![0.0; n * width]);
        splice(&sources, &table, &vectors, &mut x);
        let d_x = random(F32, n * width, 3);
        splice_backward(&sources, &d_x, width, &mut d);
        let (mut want, mut want_d) = (Vec::new(), vec![0.0; n * width]);
        for (t, source) in sources.iter().enumerate() {
            match *source {
                Source::Token(id) => want.extend(wide(&embed[id as usize * width..][..width])),
                Source::Vector(v) => {
                    want.extend(wide(&vectors[v as usize * width..][..width]));
                    want_d[v as usize * width..][..width].copy_from_slice(&wide(&d_x[t * width..][..width]));
                }
            }
        }
        outcomes.push(outcome("splice", format!("n {n} width {width}"), &x, &want, 0.0));
        outcomes.push(outcome("splice", format!("backward n {n} width {width}"), &d, &want_d, 0.0));
    }
    outcomes
}

fn heads() -> Vec<Outcome> {
    let (mut outcomes, eps, weight) = (Vec::new(), f64::from(norm::EPS), 0.125f32);
    for (n, width) in [(1, 8), (5, 72), (4, 576), (2, 2056)] {
        for loss in [Loss::YesLogitBce, Loss::YesNoSoftmax] {
            for size in [1.0, 30.0, 200.0] {
                let (x, w) = (random(F32, n * width, 1), random(F32, width, 2));
                let table: Vec<f32> =
                    random(F32, 2 * width, 4).iter().map(|a| a * size / (width as f32).sqrt()).collect();
                let labels: Vec<f32> = (0..n).map(|i| (i % 2) as f32).collect();
                let answers = AnswerRows::new(&WeightMatrix::from_f32(2, width, table.clone()), 0, 1);
                let (mut y, mut r) = (vec![0.0; x.len()], vec![0.0; n]);
                rms_norm(&x, &w, eps, &mut y, &mut r);
                let scores = answers.scores(&y, loss);
                let (mut d_scores, mut d_y, mut d_x) = (vec![0.0; n], vec![0.0; x.len()], vec![0.0; x.len()]);
                let sum = bce(&scores, &labels, weight, &mut d_scores);
                answers.backward(&d_scores, loss, &mut d_y);
                rms_norm_backward(&x, &w, &r, &d_y, &mut d_x);

                let (x, w, labels) = (wide(&x), wide(&w), wide(&labels));
                let no = if loss == Loss::YesNoSoftmax { 1.0 } else { 0.0 };
                let answer: Vec<f64> =
                    (0..width).map(|c| f64::from(table[c]) - no * f64::from(table[width + c])).collect();
                let z = head::logits(&x, &w, &answer);
                // Naive: the normed row is rounded before the dot product.
                let near = limit(F32, width) + 2.0 * epsilon(F32);
                let moved = near * z.iter().fold(1.0f64, |m, z| m.max(z.abs()));
                let want: f64 = z.iter().zip(&labels).map(|(z, l)| head::loss(*z, *l).0).sum();
                let gradient = head::gradient(&x, &w, &answer, &labels, &vec![f64::from(weight); labels.len()]);
                let mut push = |what: &str, got: &[f32], want: &[f64], limit: f64| {
                    let case = format!("{what} {loss:?} n {n} width {width} logits about {size}");
                    outcomes.push(outcome("yes_head", case, got, want, limit));
                };
                push("score", &scores, &z, near);
                push("loss", &[sum as f32], &[want], moved);
                push("d_x", &d_x, &gradient, limit(F32, width) + moved);
            }
        }
    }
    outcomes
}

fn masks() -> Vec<Outcome> {
    let mut outcomes = Vec::new();
    for p in [0.0, 0.05, 0.5, 0.999] {
        for (rows, width) in [(1, 8), (3, 72), (5, 137), (2, 2056)] {
            let dropout = Dropout { p, seed: 0x1234_5678_9abc_def0, step: 41 };
            let tokens: Vec<u32> = (0..rows as u32).map(|t| t.wrapping_mul(0x9e37_79b9)).collect();
            let mut got = vec![0.0; rows * width];
            Mask { dropout, module: 7, tokens: &tokens }.apply(&vec![1.0; rows * width], width, &mut got, false);
            let want: Vec<f64> =
                (0..got.len()).map(|i| factor(&dropout, 7, tokens[i / width], i % width, width)).collect();
            outcomes.push(outcome("mask", format!("p {p} rows {rows} width {width}"), &got, &want, 0.0));
        }
    }
    outcomes
}

fn mappings() -> Vec<Outcome> {
    let mut outcomes = Vec::new();
    for (n, dim, mid, out) in [(1, 8, 16, 8), (5, 20, 12, 28), (67, 64, 200, 136), (33, 16, 1300, 64)] {
        let host = Mapping::init(dim, mid, out, 1);
        let (x, d_y) = (random(F32, n * dim, 20), random(F32, n * out, 21));
        let pass = host.forward(&x);
        let mut gradient = Mapping::zeros(dim, mid, out);
        let d_x = host.backward(&x, &pass, &d_y, &mut gradient);
        let [w1, b1, w2, b2] = &host.tensors;
        let (x, d_y) = (wide(&x), wide(&d_y));
        let before = mapping::linear(&x, w1, b1, dim);
        let hidden: Vec<f64> = before.iter().map(|h| h.max(0.0)).collect();
        let mut d_hidden = mapping::times(&d_y, w2, out, mid);
        d_hidden.iter_mut().zip(&before).for_each(|(d, h)| *d *= f64::from(u8::from(*h > 0.0)));
        let ones = vec![1.0; n];
        let mut push = |what: &str, got: &[f32], want: &[f64], terms: [usize; 2]| {
            let case = format!("{what} n {n} dim {dim} mid {mid} out {out}");
            outcomes.push(outcome("mapping", case, got, want, limit(F32, terms[0]) + limit(F32, terms[1])));
        };
        push("y", &pass.output, &mapping::linear(&hidden, w2, b2, mid), [dim, mid]);
        push("d_x", &d_x, &mapping::times(&d_hidden, w1, mid, dim), [out, mid]);
        push("d_W1", &gradient.tensors[0], &lora::outer(&d_hidden, &x, n), [out, n]);
        push("d_b1", &gradient.tensors[1], &lora::outer(&ones, &d_hidden, n), [out, n]);
        push("d_W2", &gradient.tensors[2], &lora::outer(&d_y, &hidden, n), [dim, n]);
        push("d_b2", &gradient.tensors[3], &lora::outer(&ones, &d_y, n), [n, 1]);
    }
    outcomes
}

fn adams() -> Vec<Outcome> {
    let draw = |seed: usize| -> Vec<Vec<f32>> {
        let tensor = |(i, &n): (usize, &usize)| random(F32, n, (seed * 16 + i) as u64);
        optimizer::LENGTHS.iter().enumerate().map(tensor).collect()
    };
    let decay: Vec<f64> =
        optimizer::LENGTHS.iter().enumerate().flat_map(|(i, &n)| vec![optimizer::decay_of(i); n]).collect();
    let mut outcomes = Vec::new();
    for way in [Decay::Decoupled, Decay::Coupled] {
        let mut weights = draw(0);
        let mut adam = Adam::new(way, optimizer::LENGTHS);
        let start = || {
            let w = wide(&weights.concat());
            optimizer::Oracle { m: vec![0.0; w.len()], v: vec![0.0; w.len()], w }
        };
        let (mut exact, mut naive) = (start(), start());
        for t in 1..=optimizer::STEPS {
            let (lr, drawn) = (1e-2 / t as f64, draw(t));
            let g = wide(&drawn.concat());
            exact.step(t, lr, way, &decay, &g, |x| x);
            naive.step(t, lr, way, &decay, &g, |x| f64::from(x as f32));
            let tensors = weights.iter_mut().zip(&drawn).enumerate();
            adam.step(
                tensors.map(|(i, (w, g))| (w.as_mut_slice(), g.as_slice(), optimizer::decay_of(i))).collect(),
                lr,
            );
        }
        let limit = 2.0 * relative_error(&narrow(&naive.w), &exact.w);
        let case = format!("{way:?}, {} steps", optimizer::STEPS);
        outcomes.push(outcome("adam", case, &weights.concat(), &exact.w, limit));
    }
    outcomes
}

fn mfs() -> Vec<Outcome> {
    let mut outcomes = Vec::new();
    for (n_users, n_items, dim, n, scale) in [(5, 7, 8, 3, 1.0f32), (30, 41, 64, 301, 0.5), (50, 20, 256, 512, 4.0)] {
        let table =
            |rows: usize, seed: u64| -> Vec<f32> { random(F32, rows * dim, seed).iter().map(|x| x * scale).collect() };
        let model = Mf { dim, users: table(n_users, 1), items: table(n_items, 2) };
        let ids =
            |rows: usize, step: usize| -> Vec<u32> { (0..n).map(|r| (r * step % rows.div_ceil(2)) as u32).collect() };
        let batch = Batch {
            users: ids(n_users, 7),
            items: ids(n_items, 5),
            labels: (0..n).map(|i| (i % 3 == 0).into()).collect(),
        };
        let mut gradient = Mf { dim, users: vec![0.0; n_users * dim], items: vec![0.0; n_items * dim] };
        let loss = model.loss_and_gradient(&batch, &mut gradient);
        let formula = mf::Batch { dim, users: &batch.users, items: &batch.items, labels: &batch.labels };
        let exact = formula.formula(&model.users, &model.items, true, |x| x);
        let naive = formula.formula(&model.users, &model.items, true, |x| f64::from(x as f32));
        let mut push = |what: &str, got: &[f32], want: &[f64], naive: &[f64]| {
            let limit = (2.0 * relative_error(&narrow(naive), want)).max(limit(F32, 1));
            let case = format!("{what} users {n_users} items {n_items} dim {dim} rows {n}");
            outcomes.push(outcome("mf", case, got, want, limit));
        };
        push("loss", &[loss as f32], &[exact.loss], &[naive.loss]);
        push("d_users", &gradient.users, &exact.d_users, &naive.d_users);
        push("d_items", &gradient.items, &exact.d_items, &naive.d_items);
    }
    outcomes
}

fn graphs() -> Vec<Outcome> {
    let mut outcomes = Vec::new();
    for (n_users, n_items, edges, dim, layers) in lightgcn::SHAPES {
        let e = lightgcn::example(n_users, n_items, edges, dim, layers);
        let mut mean = vec![0.0; e.from.len()];
        e.graph.propagate(layers, dim, &e.from, &mut mean);
        let case = format!("users {n_users} items {n_items} edges {edges} dim {dim} layers {layers}");
        outcomes.push(outcome("lightgcn", case, &mean, &e.want, e.limit));
    }
    outcomes
}
