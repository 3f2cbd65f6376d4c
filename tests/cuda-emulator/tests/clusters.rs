//! Clusters: their special registers, memory and barriers of other blocks, multicast, and races between blocks.

mod common;

use common::{Bench, Numbers, distance, ways};
use cuda_emulator::memory::tensor_map::{Swizzle, TensorMap};
use cuda_emulator::{Config, Finding, Kind, Shape};

#[test]
fn blocks_know_their_place_in_the_cluster() {
    for config in ways() {
        let b = Bench::hopper(config);
        let out = b.empty(6 * 4 * 8 * 4);
        b.clean("cluster_names", Shape { grid: [6, 4, 1], block: [1, 1, 1], ..Shape::default() }, &[&out]);
        let got: Vec<u32> = b.get(out, 6 * 4 * 8);
        for (block, v) in got.chunks(8).enumerate() {
            let (x, y) = (block as u32 % 6, block as u32 / 6);
            assert_eq!(v, [x % 2, y % 2, 2, 4, x / 2, 3, x % 2 + 2 * (y % 2), y / 2], "block ({x},{y})");
        }
    }
}

fn exchange(config: Config, kernel: &str) -> Vec<Finding> {
    let b = Bench::hopper(config);
    let (out, count) = (b.put(&[0u32; 4 * 64]), b.put(&[0u32]));
    let shape = Shape { cluster: [4, 1, 1], ..Shape::linear(4, 64) };
    let outcome = b.run(kernel, shape, &[&out, &count]);
    if kernel.ends_with('0') {
        let got: Vec<u32> = b.get(out, 4 * 64);
        for (i, v) in got.iter().enumerate() {
            assert_eq!(*v as usize, (i / 64 + 1) % 4 * 1000 + ((i % 64) ^ 1));
        }
        assert_eq!(b.get::<u32>(count, 1), [256]);
    }
    outcome.findings
}

#[test]
fn memory_of_other_blocks_and_races_on_it() {
    for config in ways() {
        assert_eq!(exchange(config.clone(), "cluster_exchange_0"), []);
        for (bug, kinds) in [
            // No barrier before the neighbour's row is read; block 0 gone while others read it; a row rewritten too early.
            (1, &[Kind::SharedRace, Kind::UninitializedShared][..]),
            (2, &[Kind::UseAfterFree]),
            (3, &[Kind::SharedRace]),
        ] {
            let findings = exchange(config.clone(), &format!("cluster_exchange_{bug}"));
            assert!(findings.iter().any(|f| kinds.contains(&f.kind)), "{bug}: {findings:?}");
            println!("{bug}: {}", findings[0]);
            assert!(findings[0].detail.contains("the cluster's block"), "{}", findings[0]);
        }
    }
}

#[test]
fn a_barrier_of_another_block_carries_order() {
    for config in ways() {
        let b = Bench::hopper(config);
        let out = b.empty(256);
        b.clean("cluster_arrive_0", Shape::linear(2, 64), &[&out]);
        let expected: Vec<u32> = (0..64).map(|i| (i ^ 33) * 3).collect();
        assert_eq!(b.get::<u32>(out, 64), expected);
        let findings = b.run("cluster_arrive_1", Shape::linear(2, 64), &[&out]).findings;
        assert!(
            findings.iter().any(|f| matches!(f.kind, Kind::SharedRace | Kind::UninitializedShared)),
            "{findings:?}"
        );
    }
}

#[test]
fn one_copy_for_all_blocks_of_a_cluster() {
    for config in ways() {
        let b = Bench::hopper(config);
        let x: Vec<u8> = (0..64 * 16).map(|i| (i % 251) as u8).collect();
        let source = b.put(&x);
        let map = TensorMap::packed(0, source, &[64, 16], &[64, 16]).swizzled(Swizzle::B64).encode().unwrap().to_vec();
        let out = b.empty(8 * 1024);
        let outcome = b.clean("multicast_0", Shape::linear(8, 64).shared(1024), &[&map, &1024i32, &out]);
        let got: Vec<u8> = b.get(out, 8 * 1024);
        for (i, v) in got.iter().enumerate() {
            let (block, at) = (i / 1024, i % 1024);
            // The 64B swizzle is its own inverse.
            let from = at ^ (at >> 7 & 3) << 4;
            assert_eq!(*v, x[from].wrapping_add((block % 4) as u8));
        }
        assert_eq!(outcome.counters.global_loads.bytes, 2 * 1024, "read once a cluster");
        let findings = b.run("multicast_1", Shape::linear(8, 64).shared(1024), &[&map, &1024i32, &out]).findings;
        let kinds: Vec<Kind> = findings.iter().map(|f| f.kind).collect();
        assert!(
            kinds.iter().any(|k| matches!(k, Kind::AsyncCopyNotWaited | Kind::SharedRace | Kind::UninitializedShared)),
            "{kinds:?}"
        );
    }
}

fn pair(config: Config, kernel: &str, (m, n, k): (usize, usize, usize)) -> (f64, Vec<Finding>) {
    let b = Bench::hopper(config);
    let (x, y) = (Numbers(41).bf16(m * k), Numbers(42).bf16(n * k));
    let (dx, dy, dc) = (b.put(&x), b.put(&y), b.put(&vec![0f32; m * n]));
    let map = |address, rows: usize, per: u32| {
        let map = TensorMap::packed(9, address, &[k as u64, rows as u64], &[64, per]).swizzled(Swizzle::B128);
        map.encode().unwrap().to_vec()
    };
    let blocks = [(m as u32).div_ceil(128).next_multiple_of(2), (n as u32).div_ceil(64), 1];
    let shape = Shape { grid: blocks, ..Shape::linear(1, 288).shared(2 * (128 + 64) * 128) };
    let (ma, mb) = (map(dx, m, 128), map(dy, n, 32));
    let outcome = b.run(kernel, shape, &[&ma, &mb, &dc, &(m as i32), &(n as i32), &(k as i32)]);
    let wide = |v: &[half::bf16]| v.iter().map(|v| v.to_f64()).collect::<Vec<_>>();
    let (x, y) = (wide(&x), wide(&y));
    let product = |i: usize| (0..k).map(|l| x[i / n * k + l] * y[i % n * k + l]).sum::<f64>();
    let expected: Vec<f64> = (0..m * n).map(product).collect();
    (distance(&b.get::<f32>(dc, m * n), &expected), outcome.findings)
}

#[test]
fn a_gemm_whose_blocks_fetch_for_each_other() {
    for config in ways() {
        let (far, findings) = pair(config.clone(), "gemm_pair_0", (200, 100, 328));
        assert_eq!(findings, []);
        assert!(far < 1e-4, "{far}");
        for (bug, kinds) in [
            // The other block never hears that the stage is free; it does not wait for that; it exits before the last copy.
            (1, &[Kind::Deadlock][..]),
            (2, &[Kind::SharedRace, Kind::AsyncCopyNotWaited, Kind::InvalidBarrier, Kind::Deadlock]),
            (3, &[Kind::UseAfterFree]),
        ] {
            let (_, findings) = pair(config.clone(), &format!("gemm_pair_{bug}"), (200, 100, 328));
            let found = findings.iter().find(|f| kinds.contains(&f.kind));
            println!("{bug}: {}", found.unwrap_or_else(|| panic!("{bug}: {findings:?}")));
        }
    }
}

#[test]
fn a_cluster_that_does_not_meet_is_reported() {
    let text = ".version 8.0\n.target sm_90\n.address_size 64\n.entry k() .reqnctapercluster 2 {\n.reg .b32 r;\n.reg .pred p;\n\
                .shared .align 8 .b64 bar;\nmov.u32 r, %cluster_ctarank;\nsetp.eq.u32 p, r, 1;\n@p bra W;\n\
                barrier.cluster.arrive;\nbarrier.cluster.wait;\nret;\nW:\nmbarrier.init.shared.b64 [bar], 1;\nA:\n\
                mbarrier.try_wait.parity.shared.b64 p, [bar], 0;\n@!p bra A;\nret;\n}";
    let b = Bench::from_text(text, "H100", Config::default());
    let findings = b.run("k", Shape::linear(2, 32), &[]).findings;
    assert_eq!(findings[0].kind, Kind::Deadlock, "{findings:?}");
    assert!(findings[0].detail.contains("cluster barrier"), "{}", findings[0].detail);
    // Arrived long before the wait: the phase has opened meanwhile.
    let text = ".version 8.0\n.target sm_90\n.address_size 64\n.entry k() .reqnctapercluster 2 {\n.reg .b32 r;\n.reg .pred p;\n\
                barrier.cluster.arrive;\nmov.u32 r, 0;\nA:\nadd.u32 r, r, 1;\nsetp.lt.u32 p, r, 200000;\n@p bra A;\n\
                barrier.cluster.wait;\nbarrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;\nret;\n}";
    let b = Bench::from_text(text, "H100", Config::default());
    b.clean("k", Shape::linear(4, 64), &[]);
}
