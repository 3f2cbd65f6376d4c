//! The CPU operations at the shapes of SmolLM2-135M (hidden 576, 9/3 heads of 64, MLP 1536), GFLOP/s beside the time.
//!
//! `cargo bench --bench operations`; compare with the machine's ceiling, the `gemm/1024x2048x2048` row.
use collm_engine::device::cpu::gemm::{Dense, FrozenMatrix, Operand, Output, gemm};
use collm_engine::llm::weights::WeightMatrix;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

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

criterion_group!(benches, products);
criterion_main!(benches);
