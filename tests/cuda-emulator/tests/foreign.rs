//! PTX as code from elsewhere has it: what CUDA's own headers and nvcc's runtime routines rely on. Written by hand, each
//! for something that such code was refused for or computed wrongly by.

mod common;

use common::{Bench, Numbers, ways};
use cuda_emulator::{Config, Shape};

fn module(params: &str, body: &str) -> String {
    format!(".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k({params})\n{{\n{body}\nret;\n}}\n")
}

/// The division of 128-bit integers that nvcc emits adds the flag of a `subc.cc`: 1 where nothing was borrowed.
#[test]
fn flag_of_a_subtraction_is_set_where_nothing_is_borrowed() {
    let text = module(
        ".param .u64 p",
        ".reg .u64 %p, %a, %b, %x; .reg .u32 %i, %lo, %hi, %f, %al, %ah, %bl, %bh, %g;
         ld.param.u64 %p, [p]; mov.u32 %i, %tid.x; mad.wide.u32 %p, %i, 40, %p;
         ld.global.u64 %a, [%p]; ld.global.u64 %b, [%p+8];
         mov.b64 {%al, %ah}, %a; mov.b64 {%bl, %bh}, %b;
         sub.cc.u32 %lo, %al, %bl;
         subc.cc.u32 %hi, %ah, %bh;
         addc.u32 %f, 0, 0;
         sub.cc.u64 %x, %a, %b;
         subc.u32 %g, 0, 0;
         mov.b64 %a, {%lo, %hi};
         st.global.u64 [%p+16], %a; st.global.u64 [%p+24], %x; st.global.u32 [%p+32], %f; st.global.u32 [%p+36], %g;",
    );
    let b = Bench::from_text(&text, "A100", Config::default());
    let mut numbers = Numbers(5);
    let mut pairs: Vec<[u64; 2]> =
        vec![[0, 0], [0, 1], [1, 0], [1 << 32, 1], [5, 1 << 32], [u64::MAX, u64::MAX], [0, u64::MAX]];
    pairs.resize_with(32, || [numbers.bits(), numbers.bits()]);
    let rows: Vec<u64> = pairs.iter().flat_map(|[x, y]| [*x, *y, 0, 0, 0]).collect();
    let at = b.put(&rows);
    b.clean("k", Shape::linear(1, 32), &[&at]);
    for ([x, y], row) in pairs.iter().zip(b.get::<u64>(at, rows.len()).chunks(5)) {
        assert_eq!(row[2..4], [x.wrapping_sub(*y); 2], "{x} - {y}");
        let (no_borrow, less_borrow) = (row[4] as u32, (row[4] >> 32) as u32);
        assert_eq!(no_borrow, u32::from(x >= y), "{x} - {y}");
        assert_eq!(less_borrow, if x >= y { 0 } else { u32::MAX }, "{x} - {y}");
    }
}

/// Cooperative groups of several warps keep their barriers in shared memory that is reserved for them.
#[test]
fn reserved_shared_memory_is_apart_from_the_kernels_own() {
    let text = module(
        ".param .u64 p",
        ".shared .align 4 .b32 mine; .reg .u64 %p; .reg .u32 %r, %m, %x, %end, %total;
         ld.param.u64 %p, [p]; mov.u32 %r, %reserved_smem_offset_1; mov.u32 %end, %reserved_smem_offset_end;
         mov.u32 %m, mine; mov.u32 %total, %total_smem_size;
         st.shared.u32 [%m], 1; st.shared.u32 [%r], 2; st.shared.u32 [%r+284], 3;
         ld.shared.u32 %x, [%r+16]; st.global.u32 [%p+16], %x;
         ld.shared.u32 %x, [%m]; st.global.u32 [%p], %x;
         ld.shared.u32 %x, [%r]; st.global.u32 [%p+4], %x;
         sub.u32 %x, %end, %r; st.global.u32 [%p+8], %x; st.global.u32 [%p+12], %total;",
    );
    let b = Bench::from_text(&text, "A100", Config::default());
    let at = b.put(&[9u32; 5]);
    b.clean("k", Shape::linear(1, 1), &[&at]);
    let [mine, reserved, room, total, untouched] = b.get::<u32>(at, 5)[..] else { unreachable!() };
    assert_eq!((mine, reserved, total, untouched), (1, 2, 4, 0), "the reserved part begins with zeros");
    assert!(room >= 288, "{room}");
}

/// `grid_group::sync` finds its barrier through `%envreg1` (upper half) and `%envreg2`, and traps where they hold zero.
#[test]
fn cooperative_launch_has_memory_for_its_barrier() {
    let text = module(
        ".param .u64 p",
        ".reg .u64 %p, %w; .reg .u32 %lo, %hi, %old; .reg .pred %none;
         ld.param.u64 %p, [p]; mov.u32 %hi, %envreg1; mov.u32 %lo, %envreg2; mov.b64 %w, {%lo, %hi};
         setp.eq.u64 %none, %w, 0; @%none bra END;
         atom.add.release.gpu.u32 %old, [%w+4], 1; red.global.add.u32 [%p], 1; red.global.max.u32 [%p+4], %old;
         END:",
    );
    let b = Bench::from_text(&text, "A100", Config::default());
    let at = b.put(&[0u32; 2]);
    for _ in 0..2 {
        b.clean("k", Shape { cooperative: true, ..Shape::linear(3, 1) }, &[&at]);
    }
    assert_eq!(b.get::<u32>(at, 2), [6, 2], "each launch begins with a zero");
    b.clean("k", Shape::linear(3, 1), &[&at]);
    assert_eq!(b.get::<u32>(at, 2), [6, 2], "a plain launch has none");
    assert!(b.device.memory.leaks().iter().all(|f| !f.to_string().contains("grid barrier")));
}

/// `vabsdiff4`, which CUDA's byte intrinsics use, and its relatives.
#[test]
fn simd_video_instructions() {
    type Element = fn(i32, i32) -> i32;
    let cases: [(&str, u32, bool, Element); 8] = [
        ("vabsdiff4.u32.u32.u32", 8, false, |a, b| (a - b).abs()),
        ("vabsdiff2.u32.s32.s32", 16, true, |a, b| (a - b).abs()),
        ("vadd4.u32.u32.u32", 8, false, |a, b| a + b),
        ("vadd4.s32.s32.s32.sat", 8, true, |a, b| (a + b).clamp(-128, 127)),
        ("vsub2.u32.u32.u32.sat", 16, false, |a, b| (a - b).clamp(0, 65535)),
        ("vmax4.s32.s32.s32", 8, true, |a, b| a.max(b)),
        ("vmin2.u32.u32.u32", 16, false, |a, b| a.min(b)),
        ("vavrg4.u32.u32.u32", 8, false, |a, b| (a + b + 1) >> 1),
    ];
    let element = |word: u32, at: u32, width: u32, signed: bool| {
        let up = word << (32 - width - at);
        if signed { up as i32 >> (32 - width) } else { (up >> (32 - width)) as i32 }
    };
    for (name, width, signed, f) in cases {
        for sum in [false, true] {
            let add = if sum { ".add" } else { "" };
            // Saturation stands before the accumulation.
            let body = format!(
                ".reg .u64 %p; .reg .u32 %i, %a, %b, %d;
                 ld.param.u64 %p, [p]; mov.u32 %i, %tid.x; mad.wide.u32 %p, %i, 12, %p;
                 ld.global.u32 %a, [%p]; ld.global.u32 %b, [%p+4];
                 {name}{add} %d, %a, %b, 1000; st.global.u32 [%p+8], %d;"
            );
            if sum && name.ends_with(".sat") {
                continue; // `.sat` and `.add` exclude each other
            }
            let b = Bench::from_text(&module(".param .u64 p", &body), "A100", Config::default());
            let mut numbers = Numbers(9);
            let rows: Vec<u32> = (0..96).map(|_| numbers.bits() as u32).collect();
            let at = b.put(&rows);
            b.clean("k", Shape::linear(1, 32), &[&at]);
            for (row, out) in rows.chunks(3).zip(b.get::<u32>(at, 96).chunks(3)) {
                let (mut joined, mut total) = (0u32, 1000i32);
                for at in (0..32).step_by(width as usize) {
                    let value = f(element(row[0], at, width, signed), element(row[1], at, width, signed));
                    joined |= (value as u32 & ((1 << width) - 1)) << at;
                    total += element(value as u32, 0, width, name.contains(".s32.s32.s32"));
                }
                assert_eq!(out[2], if sum { total as u32 } else { joined }, "{name}{add} {:x} {:x}", row[0], row[1]);
            }
        }
    }
}

/// `.relu` holds for packed halves too: compute_90 has it for `__vimin3_s16x2_relu` and the like.
#[test]
fn relu_of_packed_minimum_and_maximum() {
    let text = module(
        ".param .u64 p",
        ".reg .u64 %p; .reg .u32 %i, %a, %b, %d;
         ld.param.u64 %p, [p]; mov.u32 %i, %tid.x; mad.wide.u32 %p, %i, 16, %p;
         ld.global.u32 %a, [%p]; ld.global.u32 %b, [%p+4];
         min.relu.s16x2 %d, %a, %b; st.global.u32 [%p+8], %d;
         max.relu.s16x2 %d, %a, %b; st.global.u32 [%p+12], %d;",
    )
    .replace("sm_80", "sm_90");
    let b = Bench::from_text(&text, "H100", Config::default());
    let mut numbers = Numbers(3);
    let rows: Vec<i16> = (0..256).map(|_| numbers.bits() as i16).collect();
    let at = b.put(&rows);
    b.clean("k", Shape::linear(1, 32), &[&at]);
    for (row, out) in rows.chunks(8).zip(b.get::<i16>(at, 256).chunks(8)) {
        for half in 0..2 {
            let (x, y) = (row[half], row[2 + half]);
            assert_eq!((out[4 + half], out[6 + half]), (x.min(y).max(0), x.max(y).max(0)), "{x} {y}");
        }
    }
}

/// Lanes that spin on an mbarrier leave their turn to the lanes of their warp that have still to arrive, as
/// `cuda::barrier::arrive_and_drop` of some has it, before the block is taken to hang.
#[test]
fn spinning_lanes_let_the_others_of_their_warp_arrive() {
    let text = module(
        ".param .u64 p",
        ".shared .align 8 .b64 bar; .reg .u64 %p; .reg .u32 %i, %bar; .reg .pred %first, %late, %done;
         ld.param.u64 %p, [p]; mov.u32 %i, %tid.x; mov.u32 %bar, bar; setp.eq.u32 %first, %i, 0;
         @%first mbarrier.init.shared.b64 [%bar], 16;
         bar.sync 0;
         setp.ge.u32 %late, %i, 16; @%late bra ARRIVE;
         WAIT:
         mbarrier.test_wait.parity.shared.b64 %done, [%bar], 0; @!%done bra WAIT;
         bra.uni END;
         ARRIVE:
         mbarrier.arrive.shared.b64 _, [%bar];
         END:
         red.global.add.u32 [%p], 1;",
    );
    for config in ways() {
        let b = Bench::from_text(&text, "A100", config);
        let at = b.put(&[0u32]);
        b.clean("k", Shape::linear(1, 32), &[&at]);
        assert_eq!(b.get::<u32>(at, 1), [32]);
    }
}
