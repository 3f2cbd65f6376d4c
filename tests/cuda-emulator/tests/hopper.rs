//! Tensor maps, a warp-specialised GEMM on them, and the mistakes that such kernels make. Expectations are f64 products, and
//! the manual's layouts written anew in [`common`].

mod common;

use common::{Bench, Numbers, distance, swizzled, ways};
use cuda_emulator::device::Argument;
use cuda_emulator::memory::tensor_map::{Swizzle, TensorMap};
use cuda_emulator::{Config, Finding, Kind, Shape};
use half::bf16;

fn bytes_of(map: &TensorMap) -> Vec<u8> {
    map.encode().unwrap().to_vec()
}

#[test]
fn boxes_lie_in_shared_memory_as_the_manual_says() {
    for config in ways() {
        let b = Bench::hopper(config);
        // 100 x 37 bf16 of which a box of (span) x 24 is taken at ragged corners.
        let (w, h) = (104usize, 37usize);
        let x: Vec<u16> = (0..w * h).map(|i| i as u16 + 1).collect();
        let source = b.put(&x);
        for (mode, swizzle) in [Swizzle::None, Swizzle::B32, Swizzle::B64, Swizzle::B128].into_iter().enumerate() {
            let columns = if mode == 0 { 24 } else { 8 << mode };
            let rows = 24usize;
            let bytes = columns * rows * 2;
            for (cx, cy) in [(0i32, 0i32), (80, 20), (-8, -5), (99, 36), (104, 0), (-64, 40)] {
                let target = b.put(&vec![0u16; w * h]);
                let map = TensorMap::packed(9, source, &[w as u64, h as u64], &[columns as u32, rows as u32]);
                let (from, to) =
                    (map.clone().swizzled(swizzle), TensorMap { address: target, ..map.swizzled(swizzle) });
                let raw = b.empty(bytes);
                let shape = Shape::linear(1, 64).shared(16384);
                let outcome = b.clean(
                    "box_0",
                    shape,
                    &[&bytes_of(&from), &bytes_of(&to), &cx, &cy, &(cx + 3), &(cy - 2), &(bytes as i32), &raw],
                );
                let got: Vec<u16> = b.get(raw, bytes / 2);
                let at = |i: i32, j: i32| {
                    let inside = (0..w as i32).contains(&i) && (0..h as i32).contains(&j);
                    if inside { x[j as usize * w + i as usize] } else { 0 }
                };
                let mut inside = 0;
                for j in 0..rows {
                    for i in 0..columns {
                        let place = swizzled(mode as u32, (j * columns + i) * 2) / 2;
                        let v = at(cx + i as i32, cy + j as i32);
                        inside += u64::from(v != 0);
                        assert_eq!(got[place], v, "{swizzle:?} ({cx},{cy}) {i} {j}");
                    }
                }
                assert_eq!(outcome.counters.global_loads.bytes, inside * 2);
                assert_eq!(outcome.counters.distinct_read, inside * 2);
                // Stored three to the right and two up; what falls outside stays away.
                let moved: Vec<u16> = b.get(target, w * h);
                for (n, v) in moved.into_iter().enumerate() {
                    let (i, j) = ((n % w) as i32 - 3, (n / w) as i32 + 2);
                    let in_box = (cx..cx + columns as i32).contains(&i) && (cy..cy + rows as i32).contains(&j);
                    assert_eq!(v, if in_box { at(i, j) } else { 0 });
                }
            }
        }
    }
}

#[test]
fn boxes_of_one_three_and_five_dimensions_with_element_strides() {
    let b = Bench::hopper(Config::default());
    let dims = [16usize, 3, 5, 4, 3];
    let x: Vec<f32> = (0..dims.iter().product()).map(|i| i as f32 + 1.0).collect();
    let source = b.put(&x);
    for (rank, boxes, strides, c) in [
        (1usize, vec![12usize], vec![1usize], vec![8i32]),
        (3, vec![8, 2, 4], vec![1, 1, 2], vec![4, -1, 1]),
        (5, vec![4, 2, 2, 3, 2], vec![1, 1, 1, 2, 1], vec![2, 1, 4, 0, 1]),
    ] {
        let lengths: Vec<u64> = dims[..rank].iter().map(|n| *n as u64).collect();
        let mut map = TensorMap::packed(7, source, &lengths, &boxes.iter().map(|n| *n as u32).collect::<Vec<_>>());
        map.element_strides = strides.iter().map(|n| *n as u32).collect();
        let counts: Vec<usize> = boxes.iter().zip(&strides).map(|(n, s)| n.div_ceil(*s)).collect();
        let total: usize = counts.iter().product();
        let (map_at, c_at, raw) = (b.put(&bytes_of(&map)), b.put(&c), b.empty(total * 4));
        let arguments: [&dyn Argument; 5] = [&map_at, &(rank as i32), &c_at, &((total * 4) as i32), &raw];
        b.clean("box_of", Shape::linear(1, 32).shared(16384), &arguments);
        let got: Vec<f32> = b.get(raw, total);
        for (n, got) in got.iter().enumerate() {
            let (mut rest, mut index, mut pitch, mut inside) = (n, 0i64, 1i64, true);
            for d in 0..rank {
                let at = i64::from(c[d]) + (rest % counts[d] * strides[d]) as i64;
                rest /= counts[d];
                inside &= at >= 0 && at < dims[d] as i64;
                index += at * pitch;
                pitch *= dims[d] as i64;
            }
            assert_eq!(*got, if inside { x[index as usize] } else { 0.0 }, "rank {rank} element {n}");
        }
    }
}

#[test]
fn reductions_of_boxes_and_ranges_add_up_over_blocks() {
    for config in ways() {
        let b = Bench::hopper(config);
        let (target, plain) = (b.put(&[0f32; 16 * 8]), b.put(&[1f32; 8]));
        let map = TensorMap::packed(7, target, &[16, 8], &[8, 8]);
        b.clean("box_add", Shape::linear(3, 32).shared(1024), &[&bytes_of(&map), &plain]);
        let got: Vec<f32> = b.get(target, 128);
        for (n, v) in got.iter().enumerate() {
            let covers = (0..3).filter(|i| (i * 4..i * 4 + 8).contains(&(n % 16))).count();
            assert_eq!(*v, covers as f32, "{n}");
        }
        assert_eq!(b.get::<f32>(plain, 8), [4f32; 8]);
    }
}

#[test]
fn mistakes_around_boxes_are_found() {
    for config in ways() {
        let b = Bench::hopper(config);
        let x = b.put(&vec![3u16; 64 * 64]);
        let target = b.put(&vec![0u16; 64 * 64]);
        let map = TensorMap::packed(9, x, &[64, 64], &[64, 64]).swizzled(Swizzle::B128);
        let to = TensorMap { address: target, ..map.clone() };
        let raw = b.empty(8192);
        let found = |kernel: &str, from: &TensorMap| {
            let shape = Shape::linear(1, 64).shared(16384);
            let arguments: [&dyn Argument; 8] =
                [&bytes_of(from), &bytes_of(&to), &0i32, &0i32, &0i32, &0i32, &8192i32, &raw];
            let findings = b.run(kernel, shape, &arguments).findings;
            findings.iter().map(|f| (f.kind, f.to_string())).collect::<Vec<_>>()
        };
        let has = |found: &[(Kind, String)], kind: Kind| {
            assert!(found.iter().any(|f| f.0 == kind), "{kind:?} in {found:?}");
        };
        let hang = found("box_1", &map);
        has(&hang, Kind::Deadlock);
        assert!(hang[0].1.contains("16 transaction bytes missing"), "{}", hang[0].1);
        // Threads other than the one that copies have no order with it; it itself finds the copy in flight.
        let early = found("box_2", &map);
        assert!(early.iter().any(|f| matches!(f.0, Kind::AsyncCopyNotWaited | Kind::SharedRace)), "{early:?}");
        has(&found("box_3", &map), Kind::MissingProxyFence);
        has(&found("box_4", &map), Kind::AsyncCopyNotWaited);
        has(&found("box_5", &map), Kind::AsyncCopyNotWaited);
        // A tensor larger than its allocation, one never written, one that is gone, and no map at all.
        has(
            &found("box_0", &TensorMap { dims: vec![64, 65], box_dims: vec![64, 65], ..map.clone() }),
            Kind::OutOfBounds,
        );
        let blank = b.empty(8192);
        has(&found("box_0", &TensorMap { address: blank, ..map.clone() }), Kind::UninitializedGlobal);
        b.device.memory.free(blank).unwrap();
        has(&found("box_0", &TensorMap { address: blank, ..map.clone() }), Kind::UseAfterFree);
        let shape = Shape::linear(1, 64).shared(16384);
        let none = vec![5u8; 128];
        let arguments: [&dyn Argument; 8] = [&none, &none, &0i32, &0i32, &0i32, &0i32, &8192i32, &raw];
        let finding = b.run("box_0", shape, &arguments).findings[0].clone();
        assert_eq!(finding.kind, Kind::IllegalInstruction, "{finding}");
    }
}

/// C = A B^T by the warp-specialised GEMM; the largest difference from f64, and the findings.
fn gemm(config: Config, kernel: &str, (m, n, k): (usize, usize, usize), blocks: u32) -> (f64, Vec<Finding>) {
    let b = Bench::hopper(config);
    let (x, y) = (Numbers(21).bf16(m * k), Numbers(22).bf16(n * k));
    let (dx, dy, dc) = (b.put(&x), b.put(&y), b.put(&vec![-1f32; m * n]));
    let map = |address, rows: usize| {
        TensorMap::packed(9, address, &[k as u64, rows as u64], &[64, 64]).swizzled(Swizzle::B128)
    };
    let c = TensorMap::packed(7, dc, &[n as u64, m as u64], &[64, 64]);
    let shape = Shape::linear(blocks, 160).shared(2 * 2 * 8192 + 16384);
    let arguments: [&dyn Argument; 6] =
        [&bytes_of(&map(dx, m)), &bytes_of(&map(dy, n)), &bytes_of(&c), &(m as i32), &(n as i32), &(k as i32)];
    let outcome = b.run(kernel, shape, &arguments);
    let wide = |v: &[bf16]| v.iter().map(|v| v.to_f64()).collect::<Vec<_>>();
    let (x, y) = (wide(&x), wide(&y));
    let mut expected = vec![0f64; m * n];
    for i in 0..m {
        for j in 0..n {
            expected[i * n + j] = (0..k).map(|l| x[i * k + l] * y[j * k + l]).sum();
        }
    }
    (distance(&b.get::<f32>(dc, m * n), &expected), outcome.findings)
}

#[test]
fn a_warp_specialised_gemm_with_ragged_sizes() {
    for config in ways() {
        for (size, blocks) in [((64, 64, 64), 1), ((77, 100, 136), 2), ((130, 196, 328), 3), ((1, 4, 8), 1)] {
            let (far, findings) = gemm(config.clone(), "gemm_0", size, blocks);
            assert_eq!(findings, [], "{size:?}");
            assert!(far < 1e-4, "{size:?}: {far}");
        }
        let (far, findings) = gemm(config.clone(), "gemm_8", (130, 196, 328), 3);
        assert_eq!((findings, far < 1e-4), (vec![], true), "one group in flight: {far}");
        let (far, findings) = gemm(Config { check: false, ..config }, "gemm_0", (77, 100, 136), 2);
        assert_eq!((findings, far < 1e-4), (vec![], true), "unchecked: {far}");
    }
}

#[test]
fn mistakes_of_a_warp_specialised_gemm_are_found() {
    let mut missed = Vec::new();
    for (bug, kinds) in [
        (1, &[Kind::WgmmaNotWaited][..]),
        (2, &[Kind::AsyncCopyNotWaited, Kind::SharedRace, Kind::UninitializedShared]),
        (3, &[Kind::Deadlock]),
        (4, &[Kind::AsyncCopyNotWaited, Kind::SharedRace]),
        (5, &[Kind::MissingWgmmaFence]),
        // The producer runs ahead of the phases: too many arrivals, or tiles that are never seen.
        (6, &[Kind::SharedRace, Kind::AsyncCopyNotWaited, Kind::InvalidBarrier, Kind::Deadlock]),
        (7, &[Kind::MissingProxyFence]),
        (9, &[Kind::AsyncCopyNotWaited]),
        (10, &[Kind::AsyncCopyNotWaited, Kind::SharedRace]),
    ] {
        for (way, config) in ways().into_iter().enumerate() {
            let (_, findings) = gemm(config, &format!("gemm_{bug}"), (130, 196, 328), 3);
            match findings.iter().find(|f| kinds.contains(&f.kind)) {
                Some(finding) => println!("{bug}: {finding}"),
                None => missed.push((bug, way, findings)),
            }
        }
    }
    assert!(missed.is_empty(), "{missed:?}");
}
