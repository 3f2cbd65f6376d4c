//! Speed of the machine: thread instructions a second on the tiled GEMM with checks off and on, one thread and all; flops a
//! second of `mma.sync` and of `wgmma`. `cargo bench -p cuda-emulator`

#[path = "../tests/common/mod.rs"]
mod common;

use std::time::Duration;

use common::{Bench, Numbers};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use cuda_emulator::memory::tensor_map::{Swizzle, TensorMap};
use cuda_emulator::program::Class;
use cuda_emulator::{Config, Shape};

fn config(check: bool, threads: usize) -> Config {
    Config { check, count: check, threads, ..Config::default() }
}

fn tiled(c: &mut Criterion) {
    let (m, n, k) = (128usize, 128usize, 128usize);
    let (x, y) = (Numbers(1).floats(m * k), Numbers(2).floats(n * k));
    let shape = Shape { grid: [2, 2, 1], block: [256, 1, 1], ..Shape::default() };
    // PTX instructions, not the emulator's own steps.
    let b = Bench::new("gemm", config(true, 1));
    let (dx, dy, dz) = (b.put(&x), b.put(&y), b.empty(m * n * 4));
    let outcome = b.clean("gemm_tiled", shape, &[&dx, &dy, &dz, &(m as i32), &(n as i32), &(k as i32)]);
    let program = b.module.kernel("gemm_tiled").unwrap();
    let classes = outcome.counters.by_class(program.code.iter().map(|i| i.class));
    let instructions: u64 =
        classes.iter().enumerate().filter(|(i, _)| *i != Class::Hidden as usize).map(|(_, e)| e.lanes).sum();
    let mut group = c.benchmark_group("gemm_tiled thread instructions");
    group
        .throughput(Throughput::Elements(instructions))
        .sample_size(10)
        .measurement_time(Duration::from_secs(2))
        .warm_up_time(Duration::from_millis(300));
    for (name, check, threads) in [
        ("checks off, 1 thread", false, 1),
        ("checks off, 2 threads", false, 2),
        ("checks on, 1 thread", true, 1),
        ("checks on, 2 threads", true, 2),
    ] {
        let b = Bench::new("gemm", config(check, threads));
        let (dx, dy, dz) = (b.put(&x), b.put(&y), b.empty(m * n * 4));
        group.bench_function(BenchmarkId::from_parameter(name), |bench| {
            bench.iter(|| b.clean("gemm_tiled", shape, &[&dx, &dy, &dz, &(m as i32), &(n as i32), &(k as i32)]));
        });
    }
    group.finish();
}

fn tensor(c: &mut Criterion) {
    let (m, n, k) = (128usize, 128usize, 256usize);
    let (x, y) = (Numbers(3).bf16(m * k), Numbers(4).bf16(n * k));
    let shape = Shape { grid: [2, 2, 1], block: [128, 1, 1], ..Shape::default() };
    let mut group = c.benchmark_group("gemm_mma flops");
    group
        .throughput(Throughput::Elements(2 * (m * n * k) as u64))
        .sample_size(10)
        .measurement_time(Duration::from_secs(2))
        .warm_up_time(Duration::from_millis(300));
    for (name, check) in [("checks off, 1 thread", false), ("checks on, 1 thread", true)] {
        let b = Bench::new("gemm", config(check, 1));
        let (dx, dy, dz) = (b.put(&x), b.put(&y), b.empty(m * n * 4));
        group.bench_function(BenchmarkId::from_parameter(name), |bench| {
            bench.iter(|| b.clean("gemm_mma_0", shape, &[&dx, &dy, &dz, &(m as i32), &(n as i32), &(k as i32)]));
        });
    }
    group.finish();
}

fn hopper(c: &mut Criterion) {
    let (m, n, k) = (128usize, 128usize, 512usize);
    let (x, y) = (Numbers(3).bf16(m * k), Numbers(4).bf16(n * k));
    let shape = Shape::linear(4, 160).shared(2 * 2 * 8192 + 16384);
    let mut group = c.benchmark_group("gemm of wgmma and tensor maps, flops");
    group
        .throughput(Throughput::Elements(2 * (m * n * k) as u64))
        .sample_size(10)
        .measurement_time(Duration::from_secs(2))
        .warm_up_time(Duration::from_millis(300));
    for (name, check) in [("checks off, 1 thread", false), ("checks on, 1 thread", true)] {
        let b = Bench::hopper(config(check, 1));
        let (dx, dy, dz) = (b.put(&x), b.put(&y), b.empty(m * n * 4));
        let map = |address, rows: usize| TensorMap::packed(9, address, &[k as u64, rows as u64], &[64, 64]);
        let a = map(dx, m).swizzled(Swizzle::B128).encode().unwrap().to_vec();
        let w = map(dy, n).swizzled(Swizzle::B128).encode().unwrap().to_vec();
        let z = TensorMap::packed(7, dz, &[n as u64, m as u64], &[64, 64]).encode().unwrap().to_vec();
        group.bench_function(BenchmarkId::from_parameter(name), |bench| {
            bench.iter(|| b.clean("gemm_0", shape, &[&a, &w, &z, &(m as i32), &(n as i32), &(k as i32)]));
        });
    }
    group.finish();
}

criterion_group!(benches, tiled, tensor, hopper);
criterion_main!(benches);
