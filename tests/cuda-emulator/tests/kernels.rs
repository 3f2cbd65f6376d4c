//! Real kernels, compiled by nvcc, against float64 on the CPU; ragged sizes; every way of scheduling.

mod common;

use common::{Bench, Numbers, distance, ways};
use cuda_emulator::{Config, Shape};

#[test]
fn vector_add() {
    for config in ways() {
        let b = Bench::new("basics", config);
        for n in [1usize, 31, 256, 1000] {
            let (x, y) = (Numbers(1).floats(n), Numbers(2).floats(n));
            let (dx, dy, dz) = (b.put(&x), b.put(&y), b.empty(n * 4));
            let outcome =
                b.clean("vector_add", Shape::linear(n.div_ceil(256) as u32, 256), &[&dx, &dy, &dz, &(n as i32)]);
            let sum: Vec<f32> = x.iter().zip(&y).map(|(x, y)| x + y).collect();
            assert_eq!(b.get::<f32>(dz, n), sum);
            assert_eq!(outcome.counters.global_loads.bytes, 8 * n as u64);
            assert_eq!(
                (outcome.counters.distinct_read, outcome.counters.distinct_written),
                (8 * n as u64, 4 * n as u64)
            );
        }
    }
}

#[test]
fn reductions() {
    for config in ways() {
        let b = Bench::new("basics", config);
        let n = 5003;
        let x = Numbers(3).floats(n);
        let exact: f64 = x.iter().map(|v| f64::from(*v)).sum();
        let (dx, sums, total) = (b.put(&x), b.empty(4 * 4), b.put(&[0f32]));
        b.clean("reduce_shared", Shape::linear(4, 256), &[&dx, &sums, &(n as i32)]);
        let sum: f64 = b.get::<f32>(sums, 4).iter().map(|v| f64::from(*v)).sum();
        assert!((sum - exact).abs() < 1e-3, "{sum} {exact}");
        b.clean("reduce_shuffle", Shape::linear(3, 96), &[&dx, &total, &(n as i32)]);
        assert!((f64::from(b.get::<f32>(total, 1)[0]) - exact).abs() < 1e-3);
    }
}

#[test]
fn transposes_and_their_bank_conflicts() {
    let b = Bench::new("basics", Config::default());
    let (m, n) = (70usize, 45usize);
    let x = Numbers(4).floats(m * n);
    let (dx, dy) = (b.put(&x), b.empty(m * n * 4));
    let shape = Shape { grid: [2, 3, 1], block: [32, 8, 1], ..Shape::default() };
    let expected: Vec<f32> = (0..n * m).map(|i| x[i % m * n + i / m]).collect();
    let mut conflicts = Vec::new();
    for kernel in ["transpose_padded", "transpose_conflicts"] {
        let outcome = b.clean(kernel, shape, &[&dx, &dy, &(m as i32), &(n as i32)]);
        assert_eq!(b.get::<f32>(dy, m * n), expected);
        conflicts.push(outcome.counters.shared_passes - outcome.counters.shared_passes_least);
    }
    assert_eq!(conflicts[0], 0);
    assert!(conflicts[1] > 1000, "{conflicts:?}");
}

#[test]
fn scan_histogram_and_stencil() {
    for config in ways() {
        let b = Bench::new("basics", config);
        for n in [1usize, 33, 500] {
            let x: Vec<i32> = (0..n as i32).map(|i| i * 7 % 23 - 9).collect();
            let (dx, dy) = (b.put(&x), b.empty(n * 4));
            b.clean("scan_block", Shape::linear(1, 512).shared(4096), &[&dx, &dy, &(n as i32)]);
            let sums: Vec<i32> = x
                .iter()
                .scan(0, |s, v| {
                    *s += v;
                    Some(*s)
                })
                .collect();
            assert_eq!(b.get::<i32>(dy, n), sums);
        }
        let bytes: Vec<u8> = (0..9999u32).map(|i| (i * i % 251) as u8).collect();
        let (dx, bins) = (b.put(&bytes), b.put(&[0u32; 256]));
        b.clean("histogram", Shape::linear(5, 192), &[&dx, &bins, &(bytes.len() as i32)]);
        let mut expected = vec![0u32; 256];
        bytes.iter().for_each(|v| expected[usize::from(*v)] += 1);
        assert_eq!(b.get::<u32>(bins, 256), expected);

        let n = 700;
        let mut u: Vec<f64> = Numbers(5).floats(n).iter().map(|v| f64::from(*v)).collect();
        let (a, c, arrived) =
            (b.put(&u.iter().map(|v| *v as f32).collect::<Vec<_>>()), b.put(&vec![0f32; n]), b.put(&[0u32]));
        let shape = Shape { cooperative: true, ..Shape::linear(6, 128) };
        b.clean("stencil_cooperative", shape, &[&a, &c, &(n as i32), &4i32, &arrived]);
        for _ in 0..4 {
            let at = |i: isize| if i < 0 || i as usize >= n { 0.0 } else { u[i as usize] };
            u = (0..n as isize).map(|i| (at(i - 1) + at(i) + at(i + 1)) / 3.0).collect();
        }
        assert!(distance(&b.get::<f32>(a, n), &u) < 1e-6);
    }
}

#[test]
fn calls_direct_recursive_and_by_address() {
    let b = Bench::new("basics", Config::default());
    let n = 100usize;
    let (x, y, z) = (b.empty(n * 4), b.empty(n * 4), b.empty(n * 4));
    let outcome = b.clean("calls", Shape::linear(2, 64), &[&x, &y, &z, &(n as i32)]);
    let collatz = |mut k: u32| {
        let mut s = 0;
        while k != 1 {
            k = if k % 2 == 1 { 3 * k + 1 } else { k / 2 };
            s += 1
        }
        s
    };
    fn fibonacci(k: u32) -> u32 {
        if k < 2 { k } else { fibonacci(k - 1) + fibonacci(k - 2) }
    }
    let n32 = n as u32;
    assert_eq!(b.get::<u32>(x, n), (0..n32).map(|i| collatz(i + 1)).collect::<Vec<_>>());
    assert_eq!(b.get::<u32>(y, n), (0..n32).map(|i| fibonacci(i % 12)).collect::<Vec<_>>());
    let by_address: Vec<u32> =
        (0..n32).map(|i| if i & 1 == 0 { collatz(i % 10 + 1) } else { fibonacci(i % 10 + 1) }).collect();
    assert_eq!(b.get::<u32>(z, n), by_address);
    assert!(outcome.counters.divergent_branches > 0);
}

fn matrix_product(a: &[f64], b: &[f64], m: usize, n: usize, k: usize) -> Vec<f64> {
    (0..m * n).map(|i| (0..k).map(|j| a[i / n * k + j] * b[i % n * k + j]).sum()).collect()
}

#[test]
fn tiled_gemm() {
    let b = Bench::new("gemm", Config::default());
    for (m, n, k) in [(64usize, 64usize, 16usize), (65, 70, 33), (7, 130, 50)] {
        let (x, y) = (Numbers(6).floats(m * k), Numbers(7).floats(n * k));
        let (dx, dy, dz) = (b.put(&x), b.put(&y), b.empty(m * n * 4));
        let shape =
            Shape { grid: [n.div_ceil(64) as u32, m.div_ceil(64) as u32, 1], block: [256, 1, 1], ..Shape::default() };
        b.clean("gemm_tiled", shape, &[&dx, &dy, &dz, &(m as i32), &(n as i32), &(k as i32)]);
        let wide = |v: &[f32]| v.iter().map(|v| f64::from(*v)).collect::<Vec<_>>();
        let exact = matrix_product(&wide(&x), &wide(&y), m, n, k);
        assert!(distance(&b.get::<f32>(dz, m * n), &exact) < 1e-5);
    }
}

#[test]
fn tensor_core_gemm() {
    for config in ways() {
        let b = Bench::new("gemm", config);
        for (m, n, k) in [(64usize, 64usize, 64usize), (65, 72, 40), (130, 9, 104)] {
            let (x, y) = (Numbers(8).bf16(m * k), Numbers(9).bf16(n * k));
            let (dx, dy, dz) = (b.put(&x), b.put(&y), b.empty(m * n * 4));
            let shape = Shape {
                grid: [n.div_ceil(64) as u32, m.div_ceil(64) as u32, 1],
                block: [128, 1, 1],
                ..Shape::default()
            };
            let outcome = b.clean("gemm_mma_0", shape, &[&dx, &dy, &dz, &(m as i32), &(n as i32), &(k as i32)]);
            let wide = |v: &[half::bf16]| v.iter().map(|v| v.to_f64()).collect::<Vec<_>>();
            let exact = matrix_product(&wide(&x), &wide(&y), m, n, k);
            assert!(distance(&b.get::<f32>(dz, m * n), &exact) < 1e-5);
            let tiles = (n.div_ceil(64) * m.div_ceil(64)) as u64;
            assert_eq!(outcome.counters.tensor_flops, tiles * k.div_ceil(32) as u64 * 64 * 64 * 32 * 2);
        }
    }
}

#[test]
fn flash_attention() {
    for config in ways() {
        let b = Bench::new("attention", config);
        for n in [1usize, 63, 65, 150] {
            let (q, k, v) = (Numbers(10).bf16(n * 64), Numbers(11).bf16(n * 64), Numbers(12).bf16(n * 64));
            let (dq, dk, dv, dout) = (b.put(&q), b.put(&k), b.put(&v), b.empty(n * 64 * 4));
            let scale = 0.125 * std::f32::consts::LOG2_E;
            b.clean(
                "attention_fwd",
                Shape::linear(n.div_ceil(64) as u32, 128),
                &[&dq, &dk, &dv, &dout, &(n as i32), &scale],
            );
            let mut exact = vec![0.0; n * 64];
            for i in 0..n {
                let dot =
                    |j: usize| (0..64).map(|d| q[i * 64 + d].to_f64() * k[j * 64 + d].to_f64()).sum::<f64>() * 0.125;
                let weights: Vec<f64> = (0..=i).map(|j| dot(j).exp()).collect();
                let total: f64 = weights.iter().sum();
                for d in 0..64 {
                    exact[i * 64 + d] = (0..=i).map(|j| weights[j] * v[j * 64 + d].to_f64()).sum::<f64>() / total;
                }
            }
            // The probabilities are rounded to bf16: 2^-9 relative each, values below 1.
            assert!(distance(&b.get::<f32>(dout, n * 64), &exact) < 4e-3);
        }
    }
}
