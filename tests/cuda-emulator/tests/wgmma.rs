//! `wgmma` with every layout of its operands, and the mistakes around one. Expectations are f64 products, and the manual's
//! layouts written anew here.

mod common;

use common::{Bench, Numbers, distance, swizzled, ways};
use cuda_emulator::device::Argument;
use cuda_emulator::numerics::tensor::Accumulation;
use cuda_emulator::{Config, Finding, Kind, Shape};
use half::{bf16, f16};

/// A matrix operand in shared memory.
struct Laid {
    image: Vec<u8>,
    descriptor: u64,
}

/// Lays out a matrix of `mn` by `k` elements (k 32 bytes deep) for a descriptor, atom by atom as in the manual's figures.
/// `mode` is 0 to 3 for none, 32B, 64B, 128B. `gap` bytes between atoms show that strides are honoured.
fn lay(elements: &[Vec<u8>], mn: usize, k: usize, mode: u32, mn_major: bool, gap: usize) -> Laid {
    let size = elements[0].len();
    let per = 16 / size;
    let span = 16usize << mode;
    let (leading, stride);
    let place: Box<dyn Fn(usize, usize) -> usize>;
    if !mn_major {
        // Atoms of 8 rows, `span` bytes wide; without swizzle two of 8 x 16 bytes beside each other.
        let atom = 8 * span + gap;
        if mode == 0 {
            (leading, stride) = (atom, 2 * atom);
            place = Box::new(move |i, j| i / 8 * 2 * atom + j / per * atom + i % 8 * 16 + j % per * size);
        } else {
            (leading, stride) = (16, atom);
            place = Box::new(move |i, j| i / 8 * atom + i % 8 * span + j * size);
        }
    } else {
        // Atoms of 8 k, each `span` bytes of MN: first along MN, then along k (the other way round without swizzle).
        let atom = 8 * span + gap;
        let across = mn.div_ceil(span / size);
        if mode == 0 {
            (leading, stride) = (atom, 2 * atom);
            place = Box::new(move |i, j| i / per * 2 * atom + j / 8 * atom + j % 8 * 16 + i % per * size);
        } else {
            (leading, stride) = (atom, across * atom);
            let wide = span / size;
            place = Box::new(move |i, j| j / 8 * across * atom + i / wide * atom + j % 8 * span + i % wide * size);
        }
    }
    let mut image = Vec::new();
    for i in 0..mn {
        for j in 0..k {
            let at = swizzled(mode, place(i, j));
            if image.len() < at + size {
                image.resize(at + size, 0xee);
            }
            image[at..at + size].copy_from_slice(&elements[i * k + j]);
        }
    }
    image.resize(image.len().next_multiple_of(1024), 0xee);
    let code = [0u64, 3, 2, 1][mode as usize];
    Laid { image, descriptor: code << 62 | ((stride >> 4) as u64) << 32 | ((leading >> 4) as u64) << 16 }
}

/// Row and column of register i of a thread, 32-bit accumulators (figure of D of `wgmma.m64nNk16`).
fn place(i: usize, thread: usize) -> (usize, usize) {
    let (warp, lane) = (thread / 32, thread % 32);
    (warp * 16 + lane / 4 + 8 * (i / 2 % 2), i / 4 * 8 + lane % 4 * 2 + i % 2)
}

struct Product<'a> {
    kernel: &'a str,
    n: usize,
    /// A, B and the accumulators as values, and as bytes.
    a: Vec<f64>,
    b: Vec<f64>,
    a_bytes: Vec<Vec<u8>>,
    b_bytes: Vec<Vec<u8>>,
    modes: (u32, u32),
    majors: (bool, bool),
    sign: f64,
    add: bool,
    gap: usize,
    /// Where the pattern of both begins, in units of 128 bytes from a multiple of 1024.
    shift: usize,
}

/// Runs one wgmma; its result and the f64 product, 64 x n.
fn run(b: &Bench, p: &Product, start: &[f64], registers_of_a: &[u32]) -> (Vec<u32>, Vec<f64>) {
    let k = p.a.len() / 64;
    let la = lay(&p.a_bytes, 64, k, p.modes.0, p.majors.0, p.gap);
    let lb = lay(&p.b_bytes, p.n, k, p.modes.1, p.majors.1, p.gap);
    let mut image = vec![0xee; p.shift * 128];
    image.extend(&la.image);
    image.resize(image.len().next_multiple_of(1024) + p.shift * 128, 0xee);
    let b_at = (image.len()) as i32;
    image.extend(&lb.image);
    let origin = (p.shift as u64) << 49;
    let half = p.kernel == "wgmma_f16";
    let integer = p.kernel == "wgmma_s8";
    let bits = |v: f64| if integer { v as i32 as u32 } else { (v as f32).to_bits() };
    let registers = if half { p.n / 4 } else { p.n / 2 };
    let at = |i: usize, t: usize| if half { place(i * 2, t) } else { place(i, t) };
    let mut old = vec![0u32; registers * 128];
    for (i, old) in old.iter_mut().enumerate() {
        let (row, column) = at(i / 128, i % 128);
        let v = |c: usize| start[row * p.n + c];
        *old = if half {
            u32::from(f16::from_f64(v(column)).to_bits()) | u32::from(f16::from_f64(v(column + 1)).to_bits()) << 16
        } else {
            bits(v(column))
        };
    }
    let (image_at, old_at, out) = (b.put(&image), b.put(&old), b.empty(registers * 512));
    let mut fragment = registers_of_a.to_vec();
    fragment.resize(512, 0);
    let fragment = b.put(&fragment);
    let shape = Shape::linear(1, 128).shared(image.len() as u32);
    let (bytes, a_at, add) = (image.len() as i32, (p.shift * 128) as i32, i32::from(p.add));
    let (da, db) = (la.descriptor | origin, lb.descriptor | origin);
    let arguments: [&dyn Argument; 10] = [&image_at, &bytes, &a_at, &b_at, &da, &db, &fragment, &old_at, &add, &out];
    let outcome = b.clean(p.kernel, shape, &arguments);
    assert_eq!(outcome.counters.tensor_flops, 2 * (64 * p.n * k) as u64);
    let raw: Vec<u32> = b.get(out, registers * 128);
    let mut got = vec![0u32; 64 * p.n];
    for (i, v) in raw.iter().enumerate() {
        let (row, column) = at(i / 128, i % 128);
        if half {
            got[row * p.n + column] = *v & 0xffff;
            got[row * p.n + column + 1] = *v >> 16;
        } else {
            got[row * p.n + column] = *v;
        }
    }
    let mut expected = vec![0f64; 64 * p.n];
    for i in 0..64 {
        for j in 0..p.n {
            let sum: f64 = (0..k).map(|l| p.a[i * k + l] * p.b[j * k + l]).sum();
            expected[i * p.n + j] = p.sign * sum + if p.add { start[i * p.n + j] } else { 0.0 };
        }
    }
    for at in [image_at, old_at, out, fragment] {
        b.device.memory.free(at).unwrap();
    }
    (got, expected)
}

fn floats(got: &[u32]) -> Vec<f32> {
    got.iter().map(|v| f32::from_bits(*v)).collect()
}

fn bf16_product(kernel: &str, n: usize, modes: (u32, u32), majors: (bool, bool), seed: u64) -> Product<'_> {
    let (a, b) = (Numbers(seed).bf16(64 * 16), Numbers(seed + 1).bf16(n * 16));
    Product {
        kernel,
        n,
        a: a.iter().map(|v| v.to_f64()).collect(),
        b: b.iter().map(|v| v.to_f64()).collect(),
        a_bytes: a.iter().map(|v| v.to_le_bytes().to_vec()).collect(),
        b_bytes: b.iter().map(|v| v.to_le_bytes().to_vec()).collect(),
        modes,
        majors,
        sign: 1.0,
        add: true,
        gap: 0,
        shift: 0,
    }
}

fn start(n: usize) -> Vec<f64> {
    Numbers(99).floats(64 * n).iter().map(|v| f64::from(*v)).collect()
}

#[test]
fn wgmma_with_every_swizzle_and_both_majors_of_both_operands() {
    for config in ways() {
        let b = Bench::hopper(config);
        for mode_a in 0..4 {
            for mode_b in 0..4 {
                for (kernel, majors) in [
                    ("wgmma_bf16_00", (false, false)),
                    ("wgmma_bf16_10", (true, false)),
                    ("wgmma_bf16_01", (false, true)),
                    ("wgmma_bf16_11", (true, true)),
                ] {
                    let p = bf16_product(kernel, 64, (mode_a, mode_b), majors, 5);
                    let (got, expected) = run(&b, &p, &start(64), &[]);
                    assert!(distance(&floats(&got), &expected) < 1e-5, "{kernel} {mode_a} {mode_b}");
                }
            }
        }
    }
}

#[test]
fn wgmma_of_other_widths_strides_signs_and_without_adding() {
    let b = Bench::hopper(Config::default());
    for mode in 0..4 {
        // Gaps keep the swizzle's pattern where it was: multiples of 1024.
        let mut p = bf16_product("wgmma_bf16_n8", 8, (mode, mode), (false, false), 7);
        p.gap = 1024;
        let (got, expected) = run(&b, &p, &start(8), &[]);
        assert!(distance(&floats(&got), &expected) < 1e-5, "n8 {mode}");
        let mut p = bf16_product("wgmma_bf16_n256", 256, (mode, mode), (false, true), 8);
        p.add = false;
        let (got, expected) = run(&b, &p, &start(256), &[]);
        assert!(distance(&floats(&got), &expected) < 1e-5, "n256 {mode}");
    }
    for (mode, shift) in [(1, 1), (2, 3), (3, 5)] {
        let mut p = bf16_product("wgmma_bf16_11", 64, (mode, mode), (true, true), 9);
        p.shift = shift;
        let (got, expected) = run(&b, &p, &start(64), &[]);
        assert!(distance(&floats(&got), &expected) < 1e-5, "base offset {shift}");
    }
    let mut p = bf16_product("wgmma_bf16_negated", 64, (3, 3), (false, false), 9);
    p.sign = -1.0;
    let (got, expected) = run(&b, &p, &start(64), &[]);
    assert!(distance(&floats(&got), &expected) < 1e-5);
}

#[test]
fn wgmma_with_a_in_registers() {
    for config in ways() {
        let b = Bench::hopper(config);
        let mut p = bf16_product("wgmma_bf16_registers", 64, (0, 3), (false, true), 10);
        p.sign = -1.0;
        // The figure of A: register i holds row g + 8 (i % 2), columns 8 (i / 2) + 2 t and the next.
        let mut fragment = vec![0u32; 512];
        for (at, value) in fragment.iter_mut().enumerate() {
            let (i, thread) = (at / 128, at % 128);
            let (row, column) = (thread / 32 * 16 + thread % 32 / 4 + 8 * (i % 2), 8 * (i / 2) + thread % 4 * 2);
            let bits = |c: usize| u32::from(bf16::from_f64(p.a[row * 16 + c]).to_bits());
            *value = bits(column) | bits(column + 1) << 16;
        }
        let (got, expected) = run(&b, &p, &start(64), &fragment);
        assert!(distance(&floats(&got), &expected) < 1e-5);
    }
}

#[test]
fn wgmma_of_the_other_types() {
    let b = Bench::hopper(Config::default());
    let product = |kernel, n: usize, k: usize, majors, make: &mut dyn FnMut(bool) -> (f64, Vec<u8>)| {
        let (mut a, mut b) = (Vec::new(), Vec::new());
        (0..64 * k).for_each(|_| a.push(make(true)));
        (0..n * k).for_each(|_| b.push(make(false)));
        let (a, a_bytes) = a.into_iter().unzip();
        let (b, b_bytes) = b.into_iter().unzip();
        Product { kernel, n, a, b, a_bytes, b_bytes, modes: (3, 2), majors, sign: 1.0, add: true, gap: 0, shift: 0 }
    };
    let mut source = Numbers(12);
    let mut half = |_| {
        let v = f16::from_f32(source.unit());
        (v.to_f64(), v.to_le_bytes().to_vec())
    };
    let p = product("wgmma_f16", 64, 16, (false, true), &mut half);
    let begin: Vec<f64> = start(64).iter().map(|v| f16::from_f64(*v).to_f64()).collect();
    let (got, expected) = run(&b, &p, &begin, &[]);
    for (got, expected) in got.iter().zip(&expected) {
        assert_eq!(f16::from_bits(*got as u16), f16::from_f64(*expected), "one rounding to f16");
    }
    let mut source = Numbers(13);
    let mut tf32 = |_| {
        let bits = source.unit().to_bits();
        // The low 13 bits are not read.
        (f64::from(f32::from_bits(bits & 0xffff_e000)), bits.to_le_bytes().to_vec())
    };
    let p = product("wgmma_tf32", 64, 8, (false, false), &mut tf32);
    let (got, expected) = run(&b, &p, &start(64), &[]);
    assert!(distance(&floats(&got), &expected) < 1e-5);
    let mut source = Numbers(14);
    let mut bytes = |signed| {
        let v = source.bits() as u8;
        (if signed { f64::from(v as i8) } else { f64::from(v) }, vec![v])
    };
    let p = product("wgmma_s8", 32, 32, (false, false), &mut bytes);
    let begin: Vec<f64> = start(32).iter().map(|v| (v * 1e6).trunc()).collect();
    let (got, expected) = run(&b, &p, &begin, &[]);
    for (got, expected) in got.iter().zip(&expected) {
        assert_eq!(f64::from(*got as i32), *expected);
    }
    // fp8: e4m3 for A (4 exponent bits, bias 7), e5m2 for B (bias 15), normal values only.
    let mut source = Numbers(15);
    let mut fp8 = |first| {
        let bits = source.bits();
        let (mantissa, bias) = if first { (3, 7) } else { (2, 15) };
        let exponent = (bits >> 8 & 3) as u32 + bias - 2;
        let (sign, fraction) = (bits as u8 & 0x80, (bits & ((1 << mantissa) - 1)) as u32);
        let value = (1.0 + f64::from(fraction) / f64::from(1 << mantissa)) * 2f64.powi(exponent as i32 - bias as i32);
        (if sign != 0 { -value } else { value }, vec![sign | (exponent << mantissa | fraction) as u8])
    };
    let p = product("wgmma_e4m3", 64, 32, (false, false), &mut fp8);
    let (got, expected) = run(&b, &p, &start(64), &[]);
    assert!(distance(&floats(&got), &expected) < 1e-4);
}

#[test]
fn wgmma_sums_as_the_model_says() {
    for model in [Accumulation::Ampere, Accumulation::Hopper] {
        let b = Bench::hopper(Config { accumulation: model, ..Config::default() });
        let mut p = bf16_product("wgmma_bf16_00", 64, (3, 3), (false, false), 31);
        // One row of large cancelling terms beside a small one, which the models cut off: 2^-25 beside 1.
        for l in 0..16 {
            let (a, w) = if l < 2 { (1.0 - 2.0 * l as f64, 1.0) } else { (2f64.powi(-13), 2f64.powi(-13)) };
            (p.a[l], p.b[l]) = (a, w);
            p.a_bytes[l] = bf16::from_f64(a).to_le_bytes().to_vec();
            p.b_bytes[l] = bf16::from_f64(w).to_le_bytes().to_vec();
        }
        p.add = false;
        let (got, expected) = run(&b, &p, &start(64), &[]);
        let got = floats(&got);
        assert!(distance(&got, &expected) < 1e-5, "within what truncation loses");
        // Fourteen products of 2^-26: gone below 24 or 25 bits in the blocks that hold the ones.
        let kept = match model {
            Accumulation::Ampere => 8.0,
            _ => 0.0,
        };
        assert_eq!(f64::from(got[0]), kept * 2f64.powi(-26), "{model:?}");
    }
}

const A_OF_MISTAKES: u64 = (256 >> 4) << 32 | (128 >> 4) << 16;

fn mistake(config: Config, n: u32) -> Vec<Finding> {
    let b = Bench::hopper(config);
    let (start, out) = (b.put(&[1f32; 4096]), b.empty(4096 * 4));
    let shape = Shape::linear(1, 128).shared(16384);
    let outcome = b.run(&format!("wgmma_mistake_{n}"), shape, &[&A_OF_MISTAKES, &A_OF_MISTAKES, &start, &out]);
    if n == 0 {
        assert_eq!(b.get::<f32>(out, 4096), [16f32; 4096]);
    }
    outcome.findings
}

#[test]
fn mistakes_around_wgmma_are_found_in_every_way_of_running() {
    for config in ways() {
        assert_eq!(mistake(config.clone(), 0), []);
        for (n, kinds) in [
            (1, &[Kind::MissingProxyFence][..]),
            (2, &[Kind::MissingWgmmaFence]),
            (3, &[Kind::MissingWgmmaFence]),
            (4, &[Kind::Deadlock]),
            (5, &[Kind::SharedRace, Kind::MissingProxyFence]),
            (6, &[Kind::WgmmaNotWaited]),
            (7, &[Kind::WgmmaNotWaited]),
        ] {
            let findings = mistake(config.clone(), n);
            assert!(findings.iter().any(|f| kinds.contains(&f.kind)), "{n}: {findings:?}");
            println!("{n}: {}", findings[0]);
        }
    }
}

#[test]
fn wgmma_that_cannot_be_is_refused() {
    let run = |body: &str, threads: u32| {
        let text = format!(
            ".version 8.0\n.target sm_90a\n.address_size 64\n.entry k() {{\n.reg .b64 d;\n.reg .f32 f<4>;\n.reg .pred p;\n\
             .shared .align 128 .b8 s[1024];\nmov.b64 d, 0x100000000;\nwgmma.fence.sync.aligned;\n{body}\nret;\n}}"
        );
        let b = Bench::from_text(&text, "H100", Config::default());
        b.run("k", Shape::linear(1, threads), &[]).findings
    };
    let mma = "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {f0,f1,f2,f3}, d, d, 0, 1, 1, 0, 0;";
    let found = run(mma, 96);
    assert_eq!(found[0].kind, Kind::IllegalInstruction, "three warps");
    let beyond = mma.replace("d, d", "0x100000040, d");
    assert_eq!(run(&beyond, 128)[0].kind, Kind::OutOfBounds);
    let bad = ".version 8.0\n.target sm_90a\n.address_size 64\n.entry k() {\n.reg .b64 d;\n.reg .f32 f<4>;\nMMA\n}";
    for wrong in [
        mma.replace("n8", "n12"),
        mma.replace("k16", "k8"),
        mma.replace("f16.f16", "bf16.f16"),
        mma.replace(",f3", ""),
        mma.replace(", 0, 0;", ", 0;"),
        mma.replace("0, 1, 1", "0, 2, 1"),
    ] {
        let memory = cuda_emulator::memory::Memory::new(1 << 20, false);
        assert!(cuda_emulator::Module::parse(&bad.replace("MMA", &wrong), &memory).is_err(), "{wrong}");
    }
}

#[test]
fn accumulators_may_be_renamed_while_in_flight() {
    // Two products into the same sums, with a move between them, as compilers write loops.
    let text = ".version 8.0\n.target sm_90a\n.address_size 64\n.entry k(.param .u64 out) {\n\
        .reg .b64 d, o;\n.reg .b32 t, v;\n.reg .f32 f<4>, g<4>, h<4>;\n.shared .align 128 .b8 s[3072];\n\
        mov.u32 t, %tid.x;\nshl.b32 t, t, 2;\nmov.b32 v, 0x3f803f80;\nst.shared.b32 [t], v;\n\
        st.shared.b32 [t+512], v;\nst.shared.b32 [t+1024], v;\nst.shared.b32 [t+1536], v;\nst.shared.b32 [t+2048], v;\n\
        st.shared.b32 [t+2560], v;\nfence.proxy.async;\nbar.sync 0;\n\
        mov.b64 d, 0x0000001000080000;\nmov.f32 f0, 0f3F800000;\nmov.f32 f1, f0;\nmov.f32 f2, f0;\nmov.f32 f3, f0;\n\
        wgmma.fence.sync.aligned;\n\
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {f0,f1,f2,f3}, d, d, 1, 1, 1, 0, 0;\n\
        mov.f32 g0, f0;\nmov.f32 g1, f1;\nmov.f32 g2, f2;\nmov.f32 g3, f3;\n\
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {g0,g1,g2,g3}, d, d, 1, 1, 1, 0, 0;\n\
        wgmma.commit_group.sync.aligned;\nmov.f32 h0, g0;\nwgmma.wait_group.sync.aligned 0;\n\
        ld.param.u64 o, [out];\ncvt.u64.u32 d, t;\nadd.u64 o, o, d;\nst.global.f32 [o], h0;\nst.global.f32 [o+512], g3;\n\
        ret;\n}";
    for mut config in ways() {
        for check in [true, false] {
            config.check = check;
            let b = Bench::from_text(text, "H100", config.clone());
            let out = b.empty(1024);
            b.clean("k", Shape::linear(1, 128), &[&out]);
            assert_eq!(b.get::<f32>(out, 256), [33f32; 256]);
        }
    }
}
