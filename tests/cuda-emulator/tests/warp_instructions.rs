//! Instructions of warps, blocks and clusters, in hand-written PTX: votes, matches, reductions, jump tables, barriers with
//! counts and reductions, vector accesses, matrix moves, mbarriers, bulk copies, clusters, tensor-core shapes.

mod common;

use common::{Bench, Numbers};
use cuda_emulator::numerics::tensor::Accumulation;
use cuda_emulator::{Config, Shape};

fn bench(card: &str, body: &str) -> Bench {
    bench_with(card, body, Config::default())
}

fn bench_with(card: &str, body: &str, config: Config) -> Bench {
    let sm = if card == "H100" { "90" } else { "80" };
    let text = format!(
        ".version 8.6\n.target sm_{sm}\n.address_size 64\n.entry k(.param .u64 pin, .param .u64 pout) {{\n\
         .reg .b64 in, out, own, at, s64, t64; .reg .b32 lane, tid, a, b, c, d, e, f, n; .reg .pred p, q; .reg .b16 h, g;\n\
         ld.param.u64 in, [pin]; ld.param.u64 out, [pout]; mov.u32 tid, %tid.x; mov.u32 lane, %laneid;\n\
         mul.wide.u32 own, tid, 4; add.u64 at, in, own; add.u64 own, out, own;\n{body}\nret;\n}}\n"
    );
    Bench::from_text(&text, card, config)
}

/// Runs `body` with `in` as given and one 32-bit result a thread.
fn results(card: &str, body: &str, threads: u32, input: &[u32]) -> Vec<u32> {
    let b = bench(card, body);
    let (x, y) = (b.put(input), b.empty(threads as usize * 4));
    b.clean("k", Shape::linear(1, threads), &[&x, &y]);
    b.get(y, threads as usize)
}

#[test]
fn votes_matches_reductions_elections() {
    let input: Vec<u32> = (0..32).map(|i| i * 7 % 5).collect();
    let load = "ld.global.u32 a, [at];";
    let ballot = results(
        "A100",
        &format!("{load} setp.gt.u32 p, a, 2; vote.sync.ballot.b32 d, p, -1; st.global.u32 [own], d;"),
        32,
        &input,
    );
    let expected = (0..32).fold(0u32, |m, i| m | u32::from(input[i] > 2) << i);
    assert_eq!(ballot, [expected; 32]);
    let any =
        results("A100", &format!("{load} match.any.sync.b32 d, a, 0xffffffff; st.global.u32 [own], d;"), 32, &input);
    for i in 0..32 {
        assert_eq!(any[i], (0..32).fold(0u32, |m, j| m | u32::from(input[j] == input[i]) << j));
    }
    for (op, value) in [
        ("add.u32", input.iter().sum::<u32>()),
        ("min.s32", 0),
        ("max.u32", 4),
        ("or.b32", 7),
        ("xor.b32", input.iter().fold(0, |a, b| a ^ b)),
    ] {
        let out =
            results("A100", &format!("{load} redux.sync.{op} d, a, 0xffffffff; st.global.u32 [own], d;"), 32, &input);
        assert_eq!(out, [value; 32], "{op}");
    }
    let elected =
        results("H100", "elect.sync d|p, 0xffffffff; selp.u32 e, 1, 0, p; st.global.u32 [own], e;", 32, &input);
    assert_eq!(elected.iter().sum::<u32>(), 1);
    // Halves of a warp, each with its own mask, in one instruction.
    let halves = "setp.lt.u32 p, lane, 16; selp.b32 b, 0x0000ffff, 0xffff0000, p; shfl.sync.idx.b32 d|q, tid, 3, 0x100f, b; st.global.u32 [own], d;";
    let out = results("A100", halves, 32, &input);
    assert_eq!((out[0], out[20]), (3, 19));
    // Lanes that part, shuffle among themselves with their own masks, and meet again.
    let parted = "setp.lt.u32 p, lane, 10; @p bra LOW; shfl.sync.bfly.b32 d, tid, 1, 31, 0xfffffc00; add.u32 d, d, 100; bra JOIN;\n\
                  LOW: shfl.sync.bfly.b32 d, tid, 1, 31, 0x000003ff;\nJOIN: bar.warp.sync 0xffffffff; activemask.b32 e; sub.u32 e, e, 0xffffffff; add.u32 d, d, e; st.global.u32 [own], d;";
    let out = results("A100", parted, 32, &input);
    for i in 0..32u32 {
        assert_eq!(
            out[i as usize],
            (i ^ 1) + if i < 10 { 0 } else { 100 },
            "lane {i}, all 32 active again after the join"
        );
    }
}

#[test]
fn jump_tables_and_carry_of_guards() {
    let body = "and.b32 a, tid, 3;\nT: .branchtargets L0, L1, L2, L3;\nbrx.idx a, T;\nL0: mov.u32 d, 10; bra E;\nL1: mov.u32 d, 11; bra E;\n\
                L2: mov.u32 d, 12; bra E;\nL3: mov.u32 d, 13;\nE: st.global.u32 [own], d;";
    let out = results("A100", body, 64, &[0; 64]);
    assert!(out.iter().enumerate().all(|(i, v)| *v == 10 + i as u32 % 4));
}

#[test]
fn barriers_reduce() {
    let body = "setp.lt.u32 p, tid, 40; barrier.red.popc.aligned.u32 d, 0, p; bar.red.or.pred q, 1, !p; selp.u32 e, 1000, 0, q; add.u32 d, d, e; \
                bar.red.and.pred q, 2, p; selp.u32 e, 5000, 0, q; add.u32 d, d, e; st.global.u32 [own], d;";
    assert_eq!(results("A100", body, 96, &[0; 96]), [1040; 96]);
}

#[test]
fn vectors_and_mixed_widths() {
    let body = "shl.b32 a, tid, 4; cvt.u64.u32 s64, a; add.u64 at, in, s64; ld.global.v4.u32 {a, b, c, d}, [at]; xor.b32 a, a, d; xor.b32 b, b, c; \
                add.u32 a, a, b; mov.b32 {h, g}, a; mov.b32 a, {g, h}; st.global.u32 [own], a;";
    let input: Vec<u32> = Numbers(3).floats(128).iter().map(|f| f.to_bits()).collect();
    let out = results("A100", body, 32, &input);
    for (i, v) in out.iter().enumerate() {
        let x = &input[i * 4..i * 4 + 4];
        assert_eq!(*v, (x[0] ^ x[3]).wrapping_add(x[1] ^ x[2]).rotate_left(16));
    }
    // A signed byte into a 32-bit and a 64-bit register.
    let body = "cvt.u64.u32 s64, tid; add.u64 at, in, s64; ld.global.s8 a, [at]; ld.global.s8 t64, [at]; cvt.u32.u64 b, t64; shr.u64 t64, t64, 32; \
                cvt.u32.u64 c, t64; setp.eq.u32 p, a, b; selp.u32 d, a, 77, p; setp.lt.s32 p, a, 0; selp.u32 e, 0xffffffff, 0, p; setp.ne.u32 q, c, e; @q mov.u32 d, 78; st.global.u32 [own], d;";
    let out = results("A100", body, 32, &[0x80ff_017f; 8]);
    assert!(out.iter().enumerate().all(|(i, v)| *v == [0x7f, 1, 0xffff_ffff, 0xffff_ff80][i % 4]), "{out:x?}");
}

#[test]
fn atomics_of_half_pairs_vectors_and_swaps() {
    // 32 lanes add (1, 0.5) in bf16x2 to one word of the output, which `in` initialises.
    let b = bench(
        "H100",
        "red.global.add.noftz.bf16x2 [in], 0x3f003f80; red.global.v2.f32.add [in+8], {0f3F800000, 0f40000000}; atom.global.cas.b32 d, [in+4], tid, 99; atom.global.exch.b32 d, [in+16], d;",
    );
    let x = b.put(&[0u32, 5, 0, 0, 7]);
    let y = b.put(&[0u32; 32]);
    b.clean("k", Shape::linear(1, 32), &[&x, &y]);
    let out = b.get::<u32>(x, 5);
    let halves = [half::bf16::from_bits(out[0] as u16).to_f32(), half::bf16::from_bits((out[0] >> 16) as u16).to_f32()];
    assert_eq!(halves, [32.0, 16.0]);
    assert_eq!(out[1], 99);
    assert_eq!((f32::from_bits(out[2]), f32::from_bits(out[3])), (32.0, 64.0));
}

#[test]
fn stmatrix_undoes_ldmatrix() {
    for trans in ["", ".trans"] {
        let body = format!(
            ".shared .align 16 .b8 s[1024]; .reg .b32 base, row; mov.u32 base, s; shl.b32 row, lane, 4; add.u32 row, row, base;\n\
             ld.global.u32 a, [at]; add.u32 b, a, 1000; add.u32 c, a, 2000; add.u32 d, a, 3000; stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [row], {{a, b, c, d}}; \
             bar.sync 0; ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{e, f, n, d}}, [row]; xor.b32 e, e, a; xor.b32 f, f, b; or.b32 e, e, f; st.global.u32 [own], e;"
        );
        assert_eq!(results("H100", &body, 32, &(0..32).map(|i| i * 70001).collect::<Vec<_>>()), [0; 32]);
    }
}

#[test]
fn bulk_copies_complete_on_an_mbarrier() {
    for eager_copies in [false, true] {
        let body = ".shared .align 128 .b8 s[256]; .shared .align 8 .b8 bar[8]; .reg .b32 sb, bb; mov.u32 sb, s; mov.u32 bb, bar;\n\
                    setp.ne.u32 p, tid, 0; @p bra WAIT; mbarrier.init.shared::cta.b64 [bb], 1; fence.mbarrier_init.release.cluster; fence.proxy.async;\n\
                    mbarrier.arrive.expect_tx.shared::cta.b64 s64, [bb], 256; cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [sb], [in], 256, [bb];\n\
                    WAIT: bar.sync 0;\nTRY: mbarrier.try_wait.parity.shared::cta.b64 q, [bb], 0; @!q bra TRY;\n\
                    shl.b32 a, tid, 2; add.u32 a, a, sb; ld.shared.u32 d, [a]; add.u32 d, d, 1; st.global.u32 [own], d;";
        let b = bench_with("H100", body, Config { eager_copies, ..Config::default() });
        let input: Vec<u32> = (0..64).map(|i| i * 3).collect();
        let (x, y) = (b.put(&input), b.empty(256));
        b.clean("k", Shape::linear(1, 64), &[&x, &y]);
        assert_eq!(b.get::<u32>(y, 64), input.iter().map(|v| v + 1).collect::<Vec<_>>());
    }
}

#[test]
fn a_cluster_reads_its_neighbour_s_shared_memory() {
    let body = ".shared .align 4 .b8 s[128]; .reg .b32 base, mine, rank, other, cta; .reg .b64 offset; mov.u32 base, s; shl.b32 mine, tid, 2; add.u32 mine, mine, base;\n\
                mov.u32 rank, %cluster_ctarank; mul.lo.u32 a, rank, 100; add.u32 a, a, tid; st.shared.u32 [mine], a;\n\
                barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned; xor.b32 other, rank, 1; mapa.shared::cluster.u32 b, mine, other; ld.shared::cluster.u32 d, [b];\n\
                mov.u32 cta, %ctaid.x; mul.wide.u32 offset, cta, 128; add.u64 own, own, offset; st.global.u32 [own], d; barrier.cluster.arrive; barrier.cluster.wait;";
    let b = bench("H100", body);
    let (x, y) = (b.put(&[0u32]), b.empty(4 * 128));
    b.clean("k", Shape { cluster: [2, 1, 1], ..Shape::linear(4, 32) }, &[&x, &y]);
    let out = b.get::<u32>(y, 128);
    for (i, v) in out.iter().enumerate() {
        let (block, thread) = (i as u32 / 32, i as u32 % 32);
        assert_eq!(*v, ((block % 2) ^ 1) * 100 + thread);
    }
}

/// D = A B + C for one shape with A, B of small integers: exact in every format and model.
fn tensor(
    shape: &str,
    a_bits: u32,
    types: (&str, &str, &str),
    registers: [usize; 4],
    encode: impl Fn(i32) -> u64,
    (m, k): (usize, usize),
) {
    let per = (32 / a_bits).max(1) as usize;
    let list = |name: &str, n: usize| (0..n).map(|i| format!("{name}{i}")).collect::<Vec<_>>().join(", ");
    let declare = |name: &str, n: usize, bits: u32| format!(".reg .b{bits} {};\n", list(name, n));
    let (ab, cb) = (a_bits.max(32), if types.2 == "f64" { 64 } else { 32 });
    let mut body = declare("ra", registers[0], ab)
        + &declare("rb", registers[1], ab)
        + &declare("rc", registers[2], cb)
        + &declare("rd", registers[3], cb);
    let inputs: usize = registers[0] + registers[1] + registers[2];
    body += &format!("mul.lo.u32 a, lane, {};\ncvt.u64.u32 s64, a; add.u64 at, in, s64;\n", inputs * 8);
    let mut offset = 0;
    for (name, n, bits) in [("ra", registers[0], ab), ("rb", registers[1], ab), ("rc", registers[2], cb)] {
        for i in 0..n {
            body += &format!("ld.global.b{bits} {name}{i}, [at+{offset}];\n");
            offset += 8;
        }
    }
    body += &format!(
        "mma.sync.aligned.{shape}.row.col.{}.{}.{}.{} {{{}}}, {{{}}}, {{{}}}, {{{}}};\n",
        types.2,
        types.0,
        types.1,
        types.2,
        list("rd", registers[3]),
        list("ra", registers[0]),
        list("rb", registers[1]),
        list("rc", registers[2])
    );
    body += &format!("mul.lo.u32 a, lane, {}; cvt.u64.u32 s64, a; add.u64 out, out, s64;\n", registers[3] * 8);
    for i in 0..registers[3] {
        body += &format!("st.global.b{cb} [out+{}], rd{i};\n", i * 8);
    }
    let value = |r: usize, c: usize| (r * 5 + c * 3) as i32 % 7 - 3;
    let (a, b, c) = (value, |r: usize, c: usize| value(c + 2, r), |r: usize, c: usize| value(r, c + 1) * 2);
    // The manual's fragment figures.
    let mut words = Vec::new();
    for lane in 0..32 {
        let (g, t) = (lane / 4, lane % 4);
        let pack =
            |f: &dyn Fn(usize) -> i32| (0..per).fold(0u64, |w, e| w | encode(f(e)) << (e as u32 * a_bits).min(63));
        for i in 0..registers[0] {
            let (row, block) = if m == 8 { (g, i) } else { (g + 8 * (i % 2), i / 2) };
            words.push(pack(&|e| a(row, t * per + 4 * per * block + e)));
        }
        for i in 0..registers[1] {
            words.push(pack(&|e| b(t * per + 4 * per * i + e, g)));
        }
        for i in 0..registers[2] {
            let v =
                |e: usize| if types.2 == "f16" { c(g + 8 * i, t * 2 + e) } else { c(g + 8 * (i / 2), t * 2 + i % 2) };
            words.push(match types.2 {
                "f16" => (0..2).fold(0, |w, e| w | u64::from(half::f16::from_f32(v(e) as f32).to_bits()) << (16 * e)),
                "f64" => f64::from(v(0)).to_bits(),
                "s32" => u64::from(v(0) as u32),
                _ => u64::from((v(0) as f32).to_bits()),
            });
        }
    }
    for accumulation in [Accumulation::Exact, Accumulation::Ampere, Accumulation::Hopper] {
        let bench = bench_with("H100", &body, Config { accumulation, check: false, ..Config::default() });
        let (x, y) = (bench.put(&words), bench.empty(32 * registers[3] * 8));
        let outcome = bench.clean("k", Shape::linear(1, 32), &[&x, &y]);
        assert_eq!(outcome.counters.tensor_flops, 2 * (m * 8 * k) as u64);
        let out = bench.get::<u64>(y, 32 * registers[3]);
        for lane in 0..32 {
            for i in 0..registers[3] {
                let word = out[lane * registers[3] + i];
                for e in 0..if types.2 == "f16" { 2 } else { 1 } {
                    let (row, column) = if types.2 == "f16" {
                        (lane / 4 + 8 * i, lane % 4 * 2 + e)
                    } else {
                        (lane / 4 + 8 * (i / 2), lane % 4 * 2 + i % 2)
                    };
                    let expected = c(row, column) + (0..k).map(|j| a(row, j) * b(j, column)).sum::<i32>();
                    let actual = match types.2 {
                        "f16" => f64::from(half::f16::from_bits((word >> (16 * e)) as u16).to_f32()),
                        "f64" => f64::from_bits(word),
                        "s32" => f64::from(word as u32 as i32),
                        _ => f64::from(f32::from_bits(word as u32)),
                    };
                    assert_eq!(
                        actual,
                        f64::from(expected),
                        "{shape} {types:?} {accumulation:?} row {row} column {column}"
                    );
                }
            }
        }
    }
}

#[test]
fn tensor_core_shapes() {
    let f16 = |v: i32| u64::from(half::f16::from_f32(v as f32).to_bits());
    let bf16 = |v: i32| u64::from(half::bf16::from_f32(v as f32).to_bits());
    let f32s = |v: i32| u64::from((v as f32).to_bits());
    let s8 = |v: i32| u64::from(v as i8 as u8);
    // 1.mmm: sign, exponent, mantissa of small integers in e4m3
    let e4m3 = |v: i32| {
        if v == 0 {
            0
        } else {
            let m = v.unsigned_abs();
            let e = m.ilog2();
            u64::from(u32::from(v < 0) << 7 | (7 + e) << 3 | ((m << 3 >> e) & 7))
        }
    };
    tensor("m16n8k16", 16, ("f16", "f16", "f32"), [4, 2, 4, 4], f16, (16, 16));
    tensor("m16n8k16", 16, ("f16", "f16", "f16"), [4, 2, 2, 2], f16, (16, 16));
    tensor("m16n8k8", 16, ("f16", "f16", "f32"), [2, 1, 4, 4], f16, (16, 8));
    tensor("m16n8k16", 16, ("bf16", "bf16", "f32"), [4, 2, 4, 4], bf16, (16, 16));
    tensor("m16n8k8", 16, ("bf16", "bf16", "f32"), [2, 1, 4, 4], bf16, (16, 8));
    tensor("m16n8k8", 32, ("tf32", "tf32", "f32"), [4, 2, 4, 4], f32s, (16, 8));
    tensor("m16n8k4", 32, ("tf32", "tf32", "f32"), [2, 1, 4, 4], f32s, (16, 4));
    tensor("m16n8k32", 8, ("s8", "s8", "s32"), [4, 2, 4, 4], s8, (16, 32));
    tensor("m16n8k16", 8, ("s8", "s8", "s32"), [2, 1, 4, 4], s8, (16, 16));
    tensor("m8n8k16", 8, ("s8", "s8", "s32"), [1, 1, 2, 2], s8, (8, 16));
    tensor("m16n8k32", 8, ("e4m3", "e4m3", "f32"), [4, 2, 4, 4], e4m3, (16, 32));
    tensor("m8n8k4", 64, ("f64", "f64", "f64"), [1, 1, 2, 2], |v| f64::from(v).to_bits(), (8, 4));
}
