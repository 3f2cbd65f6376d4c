//! The matrix product against float64, for every layout, storage type, instruction set and odd size.

use super::*;
use crate::rng::Rng;
use half::{bf16, f16};

fn random(n: usize, seed: u64) -> Vec<f32> {
    let mut rng = Rng::new(seed, 0);
    (0..n).map(|_| rng.normal() as f32).collect()
}

fn transpose(rows: usize, cols: usize, x: &[f32]) -> Vec<f32> {
    (0..rows * cols).map(|i| x[i % rows * cols + i / rows]).collect()
}

/// float64 product of row-major matrices, and the sum of |a·b| that bounds its float32 error.
fn oracle(m: usize, n: usize, k: usize, a: &[f32], b: &[f32]) -> Vec<(f64, f64)> {
    (0..m * n)
        .map(|at| {
            let terms = (0..k).map(|p| f64::from(a[at / n * k + p]) * f64::from(b[p * n + at % n]));
            terms.fold((0.0, 0.0), |(s, t), x| (s + x, t + x.abs()))
        })
        .collect()
}

fn check(name: &str, got: &[f32], want: &[(f64, f64)]) {
    for (i, (&g, &(w, size))) in got.iter().zip(want).enumerate() {
        let limit = size * 40.0 * f64::from(f32::EPSILON) + 1e-30;
        assert!((f64::from(g) - w).abs() <= limit, "{name}: element {i}: {g} against {w}, limit {limit:e}");
    }
}

fn isas() -> Vec<Isa> {
    let mut isas = vec![Isa::Portable];
    let best = Isa::detect();
    if best != Isa::Portable {
        isas.push(Isa::Avx2);
    }
    if best == Isa::Avx512 {
        isas.push(Isa::Avx512);
    }
    isas
}

const SHAPES: [(usize, usize, usize); 10] = [
    (1, 1, 1),
    (7, 47, 63),
    (8, 48, 64),
    (9, 49, 65),
    (97, 95, 513),
    (13, 8, 1030),
    (8, 200, 17),
    (257, 31, 5),
    (3, 576, 96),
    (100, 144, 1100),
];

#[test]
fn dense_products_in_every_layout() {
    for isa in isas() {
        for (i, (m, n, k)) in SHAPES.into_iter().enumerate() {
            let (a, b) = (random(m * k, i as u64), random(k * n, 100 + i as u64));
            let want = oracle(m, n, k, &a, &b);
            let (at, bt) = (transpose(m, k, &a), transpose(k, n, &b));
            for (a, a_name) in [(Dense::rows(&a, k), "A"), (Dense::transposed(&at, m), "Aᵀ")] {
                for (b, b_name) in [(Dense::rows(&b, n), "B"), (Dense::transposed(&bt, k), "Bᵀ")] {
                    for parallel in [false, true] {
                        let stride = n + 3;
                        let mut c = vec![f32::NAN; m * stride];
                        gemm_with(isa, parallel, m, n, k, a, Operand::Dense(b), Output::set(&mut c, stride));
                        let name = format!("{isa:?} {a_name} {b_name} {m}x{n}x{k} parallel {parallel}");
                        for (r, row) in c.chunks_exact(stride).enumerate() {
                            check(&name, &row[..n], &want[r * n..(r + 1) * n]);
                            assert!(row[n..].iter().all(|x| x.is_nan()), "{name}: wrote outside C in row {r}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn frozen_weights_in_every_type_and_over_a_seam() {
    let (m, k) = (21, 70);
    let (rows_q, rows_k) = (50, 37);
    for isa in isas() {
        for kind in ["f32", "bf16", "f16"] {
            let part = |rows: usize, seed: u64| {
                let values = random(rows * k, seed);
                match kind {
                    "f32" => (values.clone(), WeightMatrix::from_f32(rows, k, values)),
                    "bf16" => {
                        let bits: Vec<u16> = values.iter().map(|&x| bf16::from_f32(x).to_bits()).collect();
                        let values = bits.iter().map(|&b| bf16::from_bits(b).to_f32()).collect();
                        (values, WeightMatrix::from_bf16(rows, k, bits))
                    }
                    _ => {
                        let bits: Vec<u16> = values.iter().map(|&x| f16::from_f32(x).to_bits()).collect();
                        let values = bits.iter().map(|&b| f16::from_bits(b).to_f32()).collect();
                        (values, WeightMatrix::from_f16(rows, k, bits))
                    }
                }
            };
            let ((mut w, q), (w_k, key)) = (part(rows_q, 1), part(rows_k, 2));
            w.extend(w_k);
            let n = rows_q + rows_k;
            let stacked = FrozenMatrix::stack(vec![q, key]);
            let (x, d) = (random(m * k, 3), random(m * n, 4));
            let mut y = vec![0.0; m * n];
            let forward = Operand::Transposed(&stacked);
            gemm_with(isa, true, m, n, k, Dense::rows(&x, k), forward, Output::set(&mut y, n));
            check(&format!("{isa:?} {kind} forward"), &y, &oracle(m, n, k, &x, &transpose(n, k, &w)));
            let mut d_x = vec![0.0; m * k];
            let backward = Operand::Weight(&stacked);
            gemm_with(isa, true, m, k, n, Dense::rows(&d, n), backward, Output::set(&mut d_x, k));
            check(&format!("{isa:?} {kind} backward"), &d_x, &oracle(m, k, n, &d, &w));
        }
    }
}

#[test]
fn accumulates_and_scales() {
    let (m, n, k) = (19, 60, 700);
    let (a, b, c0) = (random(m * k, 1), random(k * n, 2), random(m * n, 3));
    let want: Vec<(f64, f64)> = oracle(m, n, k, &a, &b)
        .iter()
        .zip(&c0)
        .map(|((w, s), &c)| (f64::from(c) - 0.5 * w, f64::from(c).abs() + 0.5 * s))
        .collect();
    for isa in isas() {
        let mut c = c0.clone();
        let b = Operand::Dense(Dense::rows(&b, n));
        gemm_with(isa, true, m, n, k, Dense::rows(&a, k), b, Output::add(&mut c, n).scaled(-0.5));
        check(&format!("{isa:?}"), &c, &want);
    }
}

#[test]
fn an_empty_inner_dimension_gives_zeros() {
    let mut c = vec![1.0; 6];
    gemm(2, 3, 0, Dense::rows(&[], 0), Operand::Dense(Dense::rows(&[], 3)), Output::set(&mut c, 3));
    assert_eq!(c, [0.0; 6]);
}

/// The same bits for a row alone, in a batch, on one thread, on many, with either vector instruction set.
#[test]
fn bits_do_not_depend_on_tiling() {
    let (m, n, k) = (203, 150, 1111);
    let (a, b) = (random(m * k, 1), random(k * n, 2));
    let b = Operand::Dense(Dense::rows(&b, n));
    let mut whole = vec![0.0; m * n];
    gemm(m, n, k, Dense::rows(&a, k), b, Output::set(&mut whole, n));
    let mut serial = vec![0.0; m * n];
    gemm_serial(m, n, k, Dense::rows(&a, k), b, Output::set(&mut serial, n));
    assert_eq!(whole, serial);
    for r in [0, 100, 202] {
        let mut row = vec![0.0; n];
        gemm_serial(1, n, k, Dense::rows(&a[r * k..], k), b, Output::set(&mut row, n));
        assert_eq!(row, whole[r * n..(r + 1) * n], "row {r}");
    }
    if Isa::detect() == Isa::Avx512 {
        gemm_with(Isa::Avx2, true, m, n, k, Dense::rows(&a, k), b, Output::set(&mut serial, n));
        assert_eq!(whole, serial);
    }
}
