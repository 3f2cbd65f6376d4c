//! Every kind of mistake is found and named: kernel, thread, lines, address, allocation.

mod common;

use common::{Bench, ways};
use cuda_emulator::{Config, Finding, Kind, Shape};

fn found(b: &Bench, kernel: &str, shape: Shape, arguments: &[&dyn cuda_emulator::device::Argument]) -> Finding {
    let outcome = b.run(kernel, shape, arguments);
    let finding = outcome.findings.first().unwrap_or_else(|| panic!("{kernel}: nothing found")).clone();
    println!("{finding}");
    assert_eq!(finding.kernel, kernel);
    assert!(finding.ptx_line > 0);
    let (file, line) = finding.source.clone().expect("a source line");
    assert!(file == "bugs.cu" && line > 4 || file.starts_with("device_atomic"), "{file}:{line}");
    finding
}

fn bench() -> Bench {
    Bench::new("bugs", Config::default())
}

#[test]
fn accesses_out_of_bounds_in_every_space() {
    let b = bench();
    let x = b.put(&[0f32; 100]);
    let f = found(&b, "out_of_bounds", Shape::linear(4, 32), &[&x, &100i32]);
    assert_eq!((f.kind, f.block, f.thread, f.address), (Kind::OutOfBounds, [3, 0, 0], [4, 0, 0], Some(x + 400)));
    assert!(f.allocation.unwrap().contains("0 bytes past the end of allocation"));
    let f = found(&b, "shared_out_of_bounds", Shape::linear(1, 32), &[&x, &1i32]);
    assert_eq!((f.kind, f.thread), (Kind::OutOfBounds, [31, 0, 0]));
    assert_eq!(found(&b, "local_out_of_bounds", Shape::linear(1, 32), &[&x, &4000i32]).kind, Kind::OutOfBounds);
    assert_eq!(found(&b, "const_out_of_bounds", Shape::linear(1, 8), &[&x, &9i32]).kind, Kind::OutOfBounds);
    assert_eq!(found(&b, "copy_element", Shape::linear(1, 8), &[&0u64, &x]).address, Some(0), "the null pointer");
}

#[test]
fn misaligned_access() {
    let b = bench();
    let x = b.put(&[0f32; 64]);
    let f = found(&b, "misaligned", Shape::linear(1, 32), &[&x]);
    assert_eq!((f.kind, f.address), (Kind::Misaligned, Some(x + 2)));
}

#[test]
fn use_after_free_double_free_and_leak() {
    let b = bench();
    let (x, y) = (b.put(&[0f32; 64]), b.put(&[0f32; 64]));
    b.device.memory.free(x).unwrap();
    let f = found(&b, "copy_element", Shape::linear(1, 32), &[&x, &y]);
    assert_eq!((f.kind, f.address), (Kind::UseAfterFree, Some(x)));
    assert_eq!(b.device.memory.free(x).unwrap_err().kind, Kind::DoubleFree);
    let leaks = b.device.memory.leaks();
    assert_eq!((leaks.len(), leaks[0].kind, leaks[0].address), (1, Kind::Leak, Some(y)));
}

#[test]
fn uninitialised_memory() {
    let b = bench();
    let (x, y) = (b.empty(128), b.empty(128));
    let f = found(&b, "copy_element", Shape::linear(1, 32), &[&x, &y]);
    assert_eq!((f.kind, f.address), (Kind::UninitializedGlobal, Some(x)));
    let f = found(&b, "shared_uninitialised", Shape::linear(1, 32), &[&y]);
    assert_eq!(f.kind, Kind::UninitializedShared);
    assert!(f.allocation.unwrap().contains("+ 128"));
}

#[test]
fn shared_memory_races() {
    for config in ways() {
        let b = Bench::new("bugs", config);
        let y = b.put(&[0f32; 64]);
        let f = found(&b, "shared_race", Shape::linear(1, 64), &[&y]);
        assert_eq!(f.kind, Kind::SharedRace);
        assert_eq!(found(&b, "write_after_read", Shape::linear(1, 64), &[&y]).kind, Kind::SharedRace);
        assert_eq!(found(&b, "warp_race", Shape::linear(1, 32), &[&y]).kind, Kind::SharedRace);
        b.clean("warp_synchronised", Shape::linear(1, 32), &[&y]);
    }
}

#[test]
fn races_between_blocks() {
    for config in ways() {
        let b = Bench::new("bugs", config);
        let y = b.put(&[0f32; 64]);
        let f = found(&b, "block_race", Shape::linear(2, 32), &[&y]);
        assert_eq!((f.kind, f.address.unwrap() < y + 64), (Kind::GlobalRace, true));
        let (total, ticket, part) = (b.put(&[0f32]), b.put(&[0u32]), b.empty(8 * 32 * 4));
        b.clean("last_block", Shape::linear(8, 32), &[&part, &total, &ticket]);
        assert_eq!(b.get::<f32>(total, 1), [256.0]);
    }
}

#[test]
fn asynchronous_copies_touched_too_early() {
    for config in ways() {
        let b = Bench::new("bugs", config);
        let (x, y) = (b.put(&[1f32; 256]), b.put(&[0f32; 64]));
        let f = found(&b, "copy_not_waited", Shape::linear(1, 32), &[&x, &y]);
        assert_eq!(f.kind, Kind::AsyncCopyNotWaited);
        let f = b.run("copy_without_barrier", Shape::linear(1, 64), &[&x, &y]).findings;
        let kinds: Vec<Kind> = f.iter().map(|f| f.kind).collect();
        assert!(
            kinds.iter().any(|k| matches!(k, Kind::SharedRace | Kind::AsyncCopyNotWaited | Kind::UninitializedShared)),
            "{kinds:?}"
        );
    }
}

#[test]
fn divergent_barriers_and_lawful_early_exits() {
    let b = bench();
    let y = b.put(&[0f32; 64]);
    let f = found(&b, "divergent_barrier", Shape::linear(1, 32), &[&y]);
    assert_eq!(f.kind, Kind::DivergentBarrier);
    b.clean("early_exit", Shape::linear(1, 64), &[&y, &40i32]);
}

#[test]
fn deadlocks_are_reported_not_hung() {
    let b = bench();
    let y = b.put(&[0i32; 64]);
    let f = found(&b, "mask_never_arrives", Shape::linear(1, 32), &[&y]);
    assert!(matches!(f.kind, Kind::Deadlock | Kind::DivergentBarrier), "{f}");
    let f = found(&b, "barrier_deadlock", Shape::linear(1, 64), &[&y]);
    assert_eq!(f.kind, Kind::Deadlock);
    let b = Bench::new("bugs", Config { timeout: std::time::Duration::from_millis(300), ..Config::default() });
    let y = b.put(&[0i32; 1]);
    assert_eq!(found(&b, "spin", Shape::linear(1, 32), &[&y]).kind, Kind::Timeout);
}

#[test]
fn fair_schedules_let_locks_and_pipelines_work() {
    for config in ways() {
        let b = Bench::new("bugs", config);
        let (lock, count) = (b.put(&[0i32]), b.put(&[0i32]));
        b.clean("lock_per_lane", Shape::linear(2, 64), &[&lock, &count]);
        assert_eq!(b.get::<i32>(count, 1), [128]);
        let x: Vec<f32> = (0..96).map(|i| i as f32).collect();
        let (dx, dy) = (b.put(&x), b.empty(96 * 4));
        b.clean("producer_consumer", Shape::linear(1, 64), &[&dx, &dy]);
        let expected: Vec<f32> = (0..96).map(|i| x[i / 32 * 32 + 31 - i % 32]).collect();
        assert_eq!(b.get::<f32>(dy, 96), expected);
    }
}

#[test]
fn launches_beyond_the_card() {
    let b = bench();
    let y = b.put(&[0f32; 64]);
    let refused = |shape: Shape| {
        let f = b.run("copy_element", shape, &[&y, &y]).findings;
        assert_eq!(f[0].kind, Kind::LaunchLimit, "{shape:?}");
        f[0].detail.clone()
    };
    assert!(refused(Shape::linear(1, 1025)).contains("at most 1024"));
    assert!(refused(Shape::linear(0, 32)).contains("empty"));
    assert!(refused(Shape { grid: [1, 70000, 1], block: [32, 1, 1], ..Shape::default() }).contains("65535"));
    assert!(refused(Shape::linear(1, 32).shared(200_000)).contains("shared memory"));
    assert!(refused(Shape { cluster: [2, 1, 1], ..Shape::linear(2, 32) }).contains("cluster"));
    let text = ".version 7.0\n.target sm_80\n.address_size 64\n.entry k() .maxnreg 128 { ret; }";
    let few = Bench::from_text(text, "A100", Config::default());
    few.clean("k", Shape::linear(1, 512), &[]);
    assert!(few.run("k", Shape::linear(1, 1024), &[]).findings[0].detail.contains("registers"));
    assert!(refused(Shape { cooperative: true, ..Shape::linear(1_000_000, 32) }).contains("resident"));
}
