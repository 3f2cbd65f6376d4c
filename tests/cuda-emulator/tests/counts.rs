//! What is counted and modelled, and that runs repeat bit for bit.

mod common;

use common::{Bench, Numbers};
use cuda_emulator::counts::report;
use cuda_emulator::program::Class;
use cuda_emulator::{Config, Shape};

const STRIDED: &str = ".version 7.0\n.target sm_80\n.address_size 64\n.entry k(.param .u64 px, .param .u32 pstride) {\n\
    .reg .b64 x, at; .reg .b32 i, s; .reg .f32 v; ld.param.u64 x, [px]; ld.param.u32 s, [pstride]; mov.u32 i, %tid.x; mul.lo.u32 i, i, s;\n\
    mul.wide.u32 at, i, 4; add.u64 x, x, at; ld.global.f32 v, [x]; fma.rn.f32 v, v, v, v; st.global.f32 [x], v; ret;\n}\n";

#[test]
fn sectors_efficiency_flops_and_classes() {
    let b = Bench::from_text(STRIDED, "A100", Config::default());
    let x = b.put(&vec![1f32; 32 * 32]);
    for (stride, sectors) in [(1u32, 4u64), (2, 8), (8, 32), (32, 32)] {
        let c = b.clean("k", Shape::linear(1, 32), &[&x, &stride]).counters;
        assert_eq!((c.global_loads.sectors, c.global_stores.sectors), (sectors, sectors), "stride {stride}");
        assert_eq!((c.global_loads.bytes, c.distinct_read, c.distinct_written), (128, 128, 128));
        assert_eq!(c.global_loads.efficiency(), 4.0 / sectors as f64);
        let classes = c.by_class(b.module.kernel("k").unwrap().code.iter().map(|i| i.class));
        assert_eq!(classes[Class::Fma32 as usize].lanes, 32);
        assert_eq!(classes[Class::LoadGlobal as usize].warps, 1);
        assert_eq!(classes.iter().skip(1).map(|e| e.warps).sum::<u64>(), 10, "the ten instructions of the text");
    }
}

#[test]
fn modelled_time_is_the_largest_part() {
    let n = 1 << 14;
    let b = Bench::new("basics", Config::default());
    let (x, y, z) = (b.put(&vec![1f32; n]), b.put(&vec![2f32; n]), b.empty(n * 4));
    let outcome = b.clean("vector_add", Shape::linear(64, 256), &[&x, &y, &z, &(n as i32)]);
    let program = b.module.kernel("vector_add").unwrap();
    let modelled = b.device.card.model(program, &outcome.counters);
    assert_eq!(modelled.bound(), "memory");
    let seconds = 12.0 * n as f64 / 2039e9;
    assert!((modelled.seconds() - seconds).abs() < seconds * 1e-9);
    let entry = report::launch(b.device.card, program, [64, 1, 1], [256, 1, 1], 0, &outcome);
    assert_eq!(entry.json["modelled"]["bound"], "memory");
    assert_eq!(entry.json["plain_flops"], n);
    assert!(entry.line.contains("(memory)"));
}

#[test]
fn runs_repeat_bit_for_bit_on_any_number_of_threads() {
    let n = 20_000;
    let x = Numbers(30).floats(n);
    let sum = || {
        let b = Bench::new("basics", Config::default());
        let (dx, total) = (b.put(&x), b.put(&[0f32]));
        let outcome = b.clean("reduce_shuffle", Shape::linear(16, 128), &[&dx, &total, &(n as i32)]);
        (b.get::<u32>(total, 1)[0], outcome.counters.global_loads, outcome.counters.lane_instructions)
    };
    let first = sum();
    for _ in 0..4 {
        assert_eq!(sum(), first, "float atomics from many blocks");
    }
}
