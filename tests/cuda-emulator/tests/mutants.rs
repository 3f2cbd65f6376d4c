//! Seven classical mistakes in a GEMM on tensor cores. Each must be caught, by a check or by wrong values, in the ways that
//! tests run a kernel; no single way catches all.

mod common;

use common::{Bench, Numbers, distance, ways};
use cuda_emulator::{Config, Kind, Shape};

/// What a run shows: kinds found, and whether the values are right.
fn run(mutant: u32, config: Config) -> (Vec<Kind>, bool) {
    let b = Bench::new("gemm", config);
    let (m, n, k) = (65usize, 64usize, 96usize);
    // Exactly m rows in the allocation: reading one more is out of bounds.
    let (x, y) = (Numbers(20).bf16(m * k), Numbers(21).bf16(n * k));
    let (dx, dy, dz) = (b.put(&x), b.put(&y), b.put(&vec![0f32; m * n]));
    let shape = Shape { grid: [1, 2, 1], block: [128, 1, 1], ..Shape::default() };
    let outcome = b.run(&format!("gemm_mma_{mutant}"), shape, &[&dx, &dy, &dz, &(m as i32), &(n as i32), &(k as i32)]);
    let exact: Vec<f64> =
        (0..m * n).map(|i| (0..k).map(|j| x[i / n * k + j].to_f64() * y[i % n * k + j].to_f64()).sum()).collect();
    let right = distance(&b.get::<f32>(dz, m * n), &exact) < 1e-4;
    (outcome.findings.iter().map(|f| f.kind).collect(), right)
}

#[test]
fn the_original_is_clean_in_every_way() {
    for config in ways() {
        assert_eq!(run(0, config), (vec![], true));
    }
}

#[test]
fn missing_barrier_before_the_products_is_a_race_or_an_early_read() {
    for config in ways() {
        let (kinds, _) = run(1, config);
        assert!(kinds.contains(&Kind::SharedRace) || kinds.contains(&Kind::AsyncCopyNotWaited), "{kinds:?}");
    }
}

#[test]
fn missing_barrier_after_the_products_is_a_race() {
    for config in ways() {
        let (kinds, _) = run(2, config);
        assert!(kinds.contains(&Kind::SharedRace) || kinds.contains(&Kind::AsyncCopyNotWaited), "{kinds:?}");
    }
}

#[test]
fn missing_and_weak_waits_are_early_reads_and_late_copies_show_wrong_values() {
    for mutant in [3, 4] {
        for config in ways() {
            let eager = config.eager_copies;
            let (kinds, right) = run(mutant, config);
            assert!(kinds.contains(&Kind::AsyncCopyNotWaited), "{mutant}: {kinds:?}");
            assert!(eager || !right, "late copies must not look right");
        }
    }
}

#[test]
fn wrong_lane_formula_gives_wrong_values() {
    assert_eq!(run(5, Config::default()), (vec![], false));
}

#[test]
fn bound_off_by_one_is_out_of_bounds() {
    assert_eq!(run(6, Config::default()).0, [Kind::OutOfBounds]);
}

#[test]
fn warps_storing_the_same_rows_give_wrong_values() {
    assert!(!run(7, Config::default()).1);
}
