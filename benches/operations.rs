//! The CPU operations at the shapes of SmolLM2-135M (hidden 576, 9/3 heads of 64, MLP 1536) and about a thousand tokens.
//!
//! `cargo bench --bench operations`. Products report operations a second (a multiply-add is two); the ceiling of the machine is
//! the largest product, `gemm/forward 1024x2048x2048`. Row-wise operations report bytes read and written a second.

use collm_engine::device::cpu::attention::{attention, attention_backward};
use collm_engine::device::cpu::gemm::{Dense, FrozenMatrix, Operand, Output, gemm};
use collm_engine::device::cpu::lora::{self, Mask, Pair, PairGradient};
use collm_engine::device::cpu::norm::{rms_norm, rms_norm_backward};
use collm_engine::device::cpu::swiglu::{swiglu, swiglu_backward};
use collm_engine::device::ops::{Dropout, HeadShape, Segment};
use collm_engine::llm::weights::WeightMatrix;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

const TOKENS: usize = 1024;
const HIDDEN: usize = 576;

fn weight(rows: usize, cols: usize) -> FrozenMatrix {
    FrozenMatrix::stack(vec![WeightMatrix::from_bf16(rows, cols, vec![0x3c00; rows * cols])])
}

fn products(c: &mut Criterion) {
    let mut group = c.benchmark_group("gemm");
    group.sample_size(20);
    for (m, n, k) in [(1024, 576, 576), (1024, 384, 576), (1024, 3072, 576), (1024, 576, 1536), (1024, 2048, 2048)] {
        group.throughput(Throughput::Elements((2 * m * n * k) as u64));
        let x = vec![0.5f32; m * k];
        let mut y = vec![0.0f32; m * n];
        let w = weight(n, k);
        group.bench_function(format!("forward {m}x{n}x{k}"), |b| {
            b.iter(|| gemm(m, n, k, Dense::rows(&x, k), Operand::Transposed(&w), Output::set(&mut y, n)))
        });
        let w = weight(k, n);
        group.bench_function(format!("backward {m}x{n}x{k}"), |b| {
            b.iter(|| gemm(m, n, k, Dense::rows(&x, k), Operand::Weight(&w), Output::set(&mut y, n)))
        });
    }
    group.finish();
}

fn rows(c: &mut Criterion) {
    let mut group = c.benchmark_group("rows");
    group.sample_size(20);
    let (x, w) = (vec![0.5f32; TOKENS * HIDDEN], vec![1.0f32; HIDDEN]);
    let (mut y, mut r) = (x.clone(), vec![0.0f32; TOKENS]);
    group.throughput(Throughput::Bytes((2 * 4 * x.len()) as u64));
    group.bench_function("rms_norm", |b| b.iter(|| rms_norm(&x, &w, 1e-5, &mut y, &mut r)));
    group.throughput(Throughput::Bytes((4 * 4 * x.len()) as u64));
    group.bench_function("rms_norm_backward", |b| b.iter(|| rms_norm_backward(&x, &w, &r, &x, &mut y)));
    let inter = 1536;
    let (gate_up, mut act) = (vec![0.5f32; TOKENS * 2 * inter], vec![0.0f32; TOKENS * inter]);
    let mut d_gate_up = gate_up.clone();
    group.throughput(Throughput::Bytes((3 * 4 * act.len()) as u64));
    group.bench_function("swiglu", |b| b.iter(|| swiglu(&gate_up, &mut act, inter)));
    group.throughput(Throughput::Bytes((5 * 4 * act.len()) as u64));
    group.bench_function("swiglu_backward", |b| b.iter(|| swiglu_backward(&gate_up, &act, &mut d_gate_up, inter)));
    let tokens: Vec<u32> = (0..TOKENS as u32).collect();
    let mask = Mask { dropout: Dropout { p: 0.05, seed: 1, step: 1 }, module: 0, tokens: &tokens };
    group.throughput(Throughput::Bytes((2 * 4 * x.len()) as u64));
    group.bench_function("dropout", |b| b.iter(|| mask.apply(&x, HIDDEN, &mut y, false)));
    group.finish();
}

fn adapters(c: &mut Criterion) {
    let mut group = c.benchmark_group("lora rank 8, 576 to 576");
    group.sample_size(20);
    let rank = 8;
    let (a, b) = (vec![0.1f32; rank * HIDDEN], vec![0.1f32; HIDDEN * rank]);
    let pair = Pair { a: &a, b: &b, rank, scaling: 2.0 };
    let x = vec![0.5f32; TOKENS * HIDDEN];
    let (mut y, mut space, mut u) = (x.clone(), x.clone(), vec![0.0; rank * TOKENS]);
    let tokens: Vec<u32> = (0..TOKENS as u32).collect();
    let mask = Mask { dropout: Dropout { p: 0.05, seed: 1, step: 1 }, module: 0, tokens: &tokens };
    group.bench_function("forward with dropout", |bench| {
        bench.iter(|| lora::forward(pair, &x, Some(mask), &mut u, &mut y, HIDDEN, &mut space))
    });
    let (mut g_a, mut g_b) = (a.clone(), b.clone());
    group.bench_function("backward with dropout", |bench| {
        bench.iter(|| {
            let gradient = PairGradient { a: &mut g_a, b: &mut g_b, u: &u, u_stride: TOKENS };
            lora::backward(pair, &x, Some(mask), &x, HIDDEN, Some(gradient), Some(&mut y), &mut space)
        })
    });
    group.finish();
}

fn attentions(c: &mut Criterion) {
    let mut group = c.benchmark_group("attention 9/3 heads of 64, 6 prompts of 170 tokens");
    group.sample_size(20);
    let shape = HeadShape { n_heads: 9, n_kv_heads: 3, head_dim: 64 };
    let n = 6 * 170;
    let segments: Vec<Segment> =
        (0..6).map(|i| Segment { q: i * 170..(i + 1) * 170, kv: i * 170..(i + 1) * 170, prefix: 0..0 }).collect();
    let (q, kv) = (vec![0.1f32; n * 576], vec![0.1f32; n * 384]);
    let (mut out, mut lse) = (q.clone(), vec![0.0f32; n * 9]);
    group.bench_function("forward", |b| b.iter(|| attention(shape, &segments, &q, &kv, &mut out, &mut lse)));
    let (mut d_q, mut d_kv) = (q.clone(), kv.clone());
    let (o, l) = (out.clone(), lse.clone());
    group.bench_function("backward", |b| {
        b.iter(|| attention_backward(shape, &segments, &q, &kv, &o, &l, &q, 0, &mut d_q, &mut d_kv))
    });
    group.finish();
}

criterion_group!(benches, products, rows, adapters, attentions);
criterion_main!(benches);
