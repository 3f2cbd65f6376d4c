//! Arithmetic instructions against expectations that are not the emulator's own code: LLVM's soft floats (`rustc_apfloat`),
//! `half`, and exact integers of 128 bits. Exhaustive where inputs have 16 bits or fewer, else edge cases squared and
//! random numbers.

mod common;

use common::{Bench, Numbers};
use cuda_emulator::{Config, Shape};
use rustc_apfloat::ieee::{BFloat, Double, Float8E4M3FN, Float8E5M2, Half, Single};
use rustc_apfloat::{Float, FloatConvert, Round};

/// Runs `body` on registers a, b, c (bits of the given widths, bytes) and returns d for each row of inputs.
fn run(body: &str, inputs: [u32; 3], output: u32, rows: &[[u64; 3]]) -> Vec<u64> {
    let mut text = String::from(
        ".version 8.6\n.target sm_90\n.address_size 64\n.entry k(.param .u64 pa, .param .u64 pb, .param .u64 pc, .param .u64 pd, .param .u32 pn) {\n\
         .reg .pred p, q; .reg .b64 at, base, off; .reg .b32 n, t0, t1; .reg .b32 i, x, y; .reg .b64 w;\n",
    );
    for (name, bytes) in ["a", "b", "c", "d"].iter().zip(inputs.iter().chain([&output])) {
        text += &format!(".reg .b{} {name};\n", (bytes * 8).max(16));
    }
    text += "mov.u32 t0, %ctaid.x; mov.u32 t1, %ntid.x; mov.u32 i, %tid.x; mad.lo.u32 i, t0, t1, i;\n\
             ld.param.u32 n, [pn]; setp.ge.u32 p, i, n; @p ret;\n";
    for (name, bytes) in ["a", "b", "c"].iter().zip(inputs) {
        text += &format!(
            "ld.param.u64 base, [p{name}]; mul.wide.u32 off, i, {bytes}; add.u64 at, base, off; ld.global.b{} {name}, [at];\n",
            bytes * 8
        );
    }
    text += body;
    text += &format!(
        "\nld.param.u64 base, [pd]; mul.wide.u32 off, i, {output}; add.u64 at, base, off; st.global.b{} [at], d;\nret;\n}}\n",
        output * 8
    );
    let b = Bench::from_text(&text, "H100", Config { count: false, ..Config::default() });
    let column = |k: usize| -> u64 {
        let bytes: Vec<u8> = rows.iter().flat_map(|r| r[k].to_le_bytes()[..inputs[k] as usize].to_vec()).collect();
        b.put(&bytes)
    };
    let (pa, pb, pc, pd) = (column(0), column(1), column(2), b.empty(rows.len() * output as usize));
    b.clean("k", Shape::linear(rows.len().div_ceil(128) as u32, 128), &[&pa, &pb, &pc, &pd, &(rows.len() as u32)]);
    let out = b.get::<u8>(pd, rows.len() * output as usize);
    let word = |c: &[u8]| c.iter().rev().fold(0u64, |v, b| v << 8 | u64::from(*b));
    out.chunks(output as usize).map(word).collect()
}

/// Edge cases of a float format in every combination with each other, and random bits.
fn float_rows(bits: u32, fraction: u32) -> Vec<[u64; 3]> {
    let exponent = bits - 1 - fraction;
    let top = ((1u64 << exponent) - 1) << fraction;
    let one = ((1u64 << (exponent - 1)) - 1) << fraction;
    let mut edges = vec![
        0,
        1,
        (1 << fraction) - 1,
        1 << fraction,
        one,
        one + 1,
        one - 1,
        top - 1,
        top,
        top + (1 << (fraction - 1)),
        one + (1 << fraction) + 3,
    ];
    edges.extend(edges.clone().iter().map(|e| e | 1 << (bits - 1)));
    let mut rows = Vec::new();
    for a in &edges {
        for b in &edges {
            for c in &edges[..] {
                rows.push([*a, *b, *c]);
            }
        }
    }
    let mut numbers = Numbers(u64::from(bits));
    let mask = if bits == 64 { u64::MAX } else { (1 << bits) - 1 };
    for i in 0..6000 {
        let mut row = [numbers.bits() & mask, numbers.bits() & mask, numbers.bits() & mask];
        // Half of them with exponents near each other, where rounding is decided.
        if i % 2 == 0 {
            let near = (one >> fraction) + numbers.bits() % 7;
            row = row.map(|v| v & !top | near << fraction);
        }
        rows.push(row);
    }
    rows
}

fn same_float(actual: u64, expected: u64, bits: u32, fraction: u32, what: &str) {
    let top = ((1u64 << (bits - 1 - fraction)) - 1) << fraction;
    let magnitude = |v: u64| v & !(1 << (bits - 1));
    let (nan_a, nan_e) = (magnitude(actual) > top, magnitude(expected) > top);
    if nan_e && nan_a {
        // NVIDIA's units write one NaN.
        assert!(bits == 64 || actual == (1 << (bits - 1)) - 1, "{what}: NaN {actual:#x}");
        return;
    }
    assert_eq!(actual, expected, "{what}: {actual:#x}, expected {expected:#x}");
}

const MODES: [(&str, Round); 4] = [
    ("rn", Round::NearestTiesToEven),
    ("rz", Round::TowardZero),
    ("rm", Round::TowardNegative),
    ("rp", Round::TowardPositive),
];

fn arithmetic<F: Float>(ty: &str, bits: u32, fraction: u32, modes: &[(&str, Round)], ops: &[&str]) {
    let rows = float_rows(bits, fraction);
    let bytes = bits / 8;
    let f = |v: u64| F::from_bits(u128::from(v));
    for (mode, round) in modes {
        for op in ops {
            let operands = match *op {
                "fma" => "a, b, c",
                _ => "a, b",
            };
            let out = run(&format!("{op}.{mode}.{ty} d, {operands};"), [bytes; 3], bytes, &rows);
            for (row, actual) in rows.iter().zip(out) {
                let [a, b, c] = row.map(f);
                let expected = match *op {
                    "add" => a.add_r(b, *round),
                    "sub" => a.sub_r(b, *round),
                    "mul" => a.mul_r(b, *round),
                    "div" => a.div_r(b, *round),
                    _ => a.mul_add_r(b, c, *round),
                };
                let expected = expected.value.to_bits() as u64;
                same_float(actual, expected, bits, fraction, &format!("{op}.{mode}.{ty} {row:x?}"));
            }
        }
    }
}

#[test]
fn f32_arithmetic_in_every_rounding() {
    arithmetic::<Single>("f32", 32, 23, &MODES, &["add", "sub", "mul", "div", "fma"]);
}

#[test]
fn f64_arithmetic_in_every_rounding() {
    arithmetic::<Double>("f64", 64, 52, &MODES, &["add", "sub", "mul", "div", "fma"]);
}

#[test]
fn f16_and_bf16_arithmetic() {
    arithmetic::<Half>("f16", 16, 10, &MODES[..1], &["add", "sub", "mul", "fma"]);
    arithmetic::<BFloat>("bf16", 16, 7, &MODES[..1], &["add", "sub", "mul", "fma"]);
}

#[test]
fn square_roots_and_reciprocals() {
    let rows: Vec<[u64; 3]> = float_rows(32, 23).into_iter().step_by(7).collect();
    for (mode, round) in MODES {
        let roots = run(&format!("sqrt.{mode}.f32 d, a;"), [4; 3], 4, &rows);
        let inverses = run(&format!("rcp.{mode}.f32 d, a;"), [4; 3], 4, &rows);
        for ((row, root), inverse) in rows.iter().zip(roots).zip(inverses) {
            let a = Single::from_bits(u128::from(row[0]));
            let one = Single::from_bits(u128::from(1f32.to_bits()));
            same_float(
                inverse,
                one.div_r(a, round).value.to_bits() as u64,
                32,
                23,
                &format!("rcp.{mode} {:#x}", row[0]),
            );
            let (x, r) = (f32::from_bits(row[0] as u32), f32::from_bits(root as u32));
            if x > 0.0 && x.is_finite() {
                // r is right if x lies between the squares that the direction allows, exactly in f64 (48 bits) or beyond.
                let square = |v: f32| f64::from(v) * f64::from(v);
                let x = f64::from(x);
                let ok = match mode {
                    "rz" | "rm" => square(r) <= x && square(r.next_up()) > x,
                    "rp" => square(r) >= x && square(r.next_down()) < x,
                    _ => {
                        let middle = |a: f32, b: f32| (f64::from(a) + f64::from(b)) / 2.0;
                        let (low, high) = (middle(r.next_down(), r), middle(r, r.next_up()));
                        low * low <= x && x <= high * high
                    }
                };
                assert!(ok, "sqrt.{mode} {x:e} gave {r:e}");
            } else if x.is_nan() || x < 0.0 {
                assert_eq!(root, 0x7fff_ffff);
            } else {
                assert_eq!(root as u32, x.to_bits());
            }
        }
    }
}

#[test]
fn conversions_of_16_bit_floats_are_exhaustive() {
    let all: Vec<[u64; 3]> = (0..65536u64).map(|a| [a, 0, 0]).collect();
    let wide = run("cvt.f32.f16 d, a;", [2; 3], 4, &all);
    let wide_b = run("cvt.f32.bf16 d, a;", [2; 3], 4, &all);
    for (a, (w, wb)) in wide.iter().zip(wide_b).enumerate() {
        let (h, b) = (half::f16::from_bits(a as u16), half::bf16::from_bits(a as u16));
        assert!(h.is_nan() && f32::from_bits(*w as u32).is_nan() || *w as u32 == h.to_f32().to_bits(), "{a:#x}");
        assert!(b.is_nan() && f32::from_bits(wb as u32).is_nan() || wb as u32 == b.to_f32().to_bits(), "{a:#x}");
    }
    for (mode, round) in [
        ("rni", Round::NearestTiesToEven),
        ("rzi", Round::TowardZero),
        ("rmi", Round::TowardNegative),
        ("rpi", Round::TowardPositive),
    ] {
        let out = run(&format!("cvt.{mode}.s32.f16 d, a;"), [2; 3], 4, &all);
        for (a, actual) in out.iter().enumerate() {
            let h = Half::from_bits(a as u128);
            let expected = if h.is_nan() { 0 } else { h.to_i128_r(32, round, &mut false).value };
            assert_eq!(*actual as u32 as i32, expected as i32, "cvt.{mode}.s32.f16 {a:#x}");
        }
    }
}

#[test]
fn conversions_to_narrow_floats() {
    let mut rows = float_rows(32, 23);
    // Every exponent with the fractions around the halfway points of f16 and bf16.
    for high in 0..512u64 {
        for low in [0, 1, 0xfff, 0x1000, 0x1001, 0x1fff, 0x2000, 0x3000, 0x7fff, 0x8000, 0x8001, 0x18000, 0x7f_ffff] {
            rows.push([high << 23 | low, 0, 0]);
        }
    }
    let single = |row: &[u64; 3]| Single::from_bits(u128::from(row[0]));
    for (mode, round) in MODES {
        for (ty, is_half) in [("f16", true), ("bf16", false)] {
            let out = run(&format!("cvt.{mode}.{ty}.f32 d, a;"), [4; 3], 2, &rows);
            for (row, actual) in rows.iter().zip(out) {
                let lost = &mut false;
                let expected = if is_half {
                    let h: Half = single(row).convert_r(round, lost).value;
                    h.to_bits()
                } else {
                    let b: BFloat = single(row).convert_r(round, lost).value;
                    b.to_bits()
                };
                same_float(
                    actual,
                    expected as u64,
                    16,
                    if is_half { 10 } else { 7 },
                    &format!("cvt.{mode}.{ty}.f32 {:#x}", row[0]),
                );
            }
        }
        let doubles = float_rows(64, 52);
        let out = run(&format!("cvt.{mode}.f32.f64 d, a;"), [8; 3], 4, &doubles);
        for (row, actual) in doubles.iter().zip(out) {
            let expected: Single = Double::from_bits(u128::from(row[0])).convert_r(round, &mut false).value;
            same_float(actual, expected.to_bits() as u64, 32, 23, &format!("cvt.{mode}.f32.f64 {:#x}", row[0]));
        }
    }
    let packed = run("cvt.rn.bf16x2.f32 d, a, b;", [4; 3], 4, &rows);
    for (row, actual) in rows.iter().zip(packed) {
        let bits = |v: u64| half::bf16::from_f32(f32::from_bits(v as u32)).to_bits();
        for (part, source) in [(actual >> 16, row[0]), (actual & 0xffff, row[1])] {
            let source_nan = f32::from_bits(source as u32).is_nan();
            assert_eq!(part as u16, if source_nan { 0x7fff } else { bits(source) }, "{row:x?}");
        }
    }
    for (pair, max) in [("e4m3x2", 448.0f32), ("e5m2x2", 57344.0)] {
        let out = run(&format!("cvt.rn.satfinite.{pair}.f32 d, a, b;"), [4; 3], 2, &rows);
        for (row, actual) in rows.iter().zip(out) {
            let value = f32::from_bits(row[1] as u32).clamp(-max, max);
            let clamped = Single::from_bits(u128::from(value.to_bits()));
            let expected = if value.is_nan() {
                0x7f
            } else if pair == "e4m3x2" {
                let e: Float8E4M3FN = clamped.convert_r(Round::NearestTiesToEven, &mut false).value;
                e.to_bits()
            } else {
                let e: Float8E5M2 = clamped.convert_r(Round::NearestTiesToEven, &mut false).value;
                e.to_bits()
            };
            assert_eq!(actual & 0xff, expected as u64, "{pair} {:#x}", row[1]);
        }
    }
}

#[test]
fn conversions_from_8_bit_floats_are_exhaustive() {
    let all: Vec<[u64; 3]> = (0..65536u64).map(|a| [a, 0, 0]).collect();
    for pair in ["e4m3x2", "e5m2x2"] {
        let out = run(&format!("cvt.rn.f16x2.{pair} d, a;"), [2; 3], 4, &all);
        for (a, actual) in out.iter().enumerate() {
            for (byte, part) in [(a & 255, actual & 0xffff), (a >> 8, actual >> 16)] {
                let h: Half = if pair == "e4m3x2" {
                    Float8E4M3FN::from_bits(byte as u128).convert(&mut false).value
                } else {
                    Float8E5M2::from_bits(byte as u128).convert(&mut false).value
                };
                same_float(part, h.to_bits() as u64, 16, 10, &format!("{pair} {byte:#x}"));
            }
        }
    }
}

#[test]
fn float_to_integer_saturates_and_integer_to_float_rounds() {
    let rows = float_rows(32, 23);
    for (mode, round) in [
        ("rni", Round::NearestTiesToEven),
        ("rzi", Round::TowardZero),
        ("rmi", Round::TowardNegative),
        ("rpi", Round::TowardPositive),
    ] {
        for (ty, width, signed) in [
            ("s32", 32, true),
            ("u32", 32, false),
            ("s64", 64, true),
            ("u64", 64, false),
            ("s16", 16, true),
            ("u8", 8, false),
        ] {
            let register = if width == 64 { 8 } else { 4 };
            let out = run(&format!("cvt.{mode}.{ty}.f32 d, a;"), [4; 3], register, &rows);
            for (row, actual) in rows.iter().zip(out) {
                let a = Single::from_bits(u128::from(row[0]));
                let value = if a.is_nan() { 0 } else { a.to_i128_r(128, round, &mut false).value };
                let (min, max) = if signed {
                    (-(1i128 << (width - 1)), (1i128 << (width - 1)) - 1)
                } else {
                    (0, (1i128 << width) - 1)
                };
                let value = value.clamp(min, max) as u64;
                assert_eq!(
                    actual,
                    if register == 4 { value & 0xffff_ffff } else { value },
                    "cvt.{mode}.{ty}.f32 {:#x}",
                    row[0]
                );
            }
        }
    }
    let mut numbers = Numbers(77);
    let integers: Vec<[u64; 3]> = (0..5000).map(|i| [numbers.bits() >> (i % 64), 0, 0]).collect();
    for (mode, round) in MODES {
        for (ty, from, bytes) in
            [("s32", "f32", 4), ("u64", "f32", 8), ("s64", "f64", 8), ("u32", "f16", 4), ("s64", "bf16", 8)]
        {
            let width = match from {
                "f32" => 4,
                "f64" => 8,
                _ => 2,
            };
            if width == 2 && mode != "rn" {
                continue;
            }
            let out = run(&format!("cvt.{mode}.{from}.{ty} d, a;"), [bytes; 3], width, &integers);
            for (row, actual) in integers.iter().zip(out) {
                let value = match ty {
                    "s32" => i128::from(row[0] as i32),
                    "u32" => i128::from(row[0] as u32),
                    "s64" => i128::from(row[0] as i64),
                    _ => i128::from(row[0]),
                };
                let expected = match from {
                    "f32" => Single::from_i128_r(value, round).value.to_bits(),
                    "f64" => Double::from_i128_r(value, round).value.to_bits(),
                    "f16" => Half::from_i128_r(value, round).value.to_bits(),
                    _ => BFloat::from_i128_r(value, round).value.to_bits(),
                };
                assert_eq!(actual, expected as u64, "cvt.{mode}.{from}.{ty} {value}");
            }
        }
    }
}

#[test]
fn flush_saturate_and_extremes_of_f32() {
    let rows = float_rows(32, 23);
    let f = |v: u64| f32::from_bits(v as u32);
    let flush = |x: f32| if x.is_subnormal() { 0f32.copysign(x) } else { x };
    let sat = |x: f32| if x.is_nan() { 0.0 } else { x.clamp(0.0, 1.0) + 0.0 };
    type Expected<'a> = &'a dyn Fn(f32, f32) -> f32;
    let checks: [(&str, Expected); 6] = [
        ("add.ftz.f32", &|a, b| flush(flush(a) + flush(b))),
        ("mul.ftz.f32", &|a, b| flush(flush(a) * flush(b))),
        ("add.sat.f32", &|a, b| sat(a + b)),
        ("mul.rn.ftz.sat.f32", &|a, b| flush(sat(flush(a) * flush(b)))),
        ("min.f32", &|a, b| {
            if a.is_nan() {
                b
            } else if b.is_nan() || a < b || a == b && a.is_sign_negative() {
                a
            } else {
                b
            }
        }),
        ("max.NaN.f32", &|a, b| {
            if a.is_nan() || b.is_nan() {
                f32::NAN
            } else if a > b || a == b && a.is_sign_positive() {
                a
            } else {
                b
            }
        }),
    ];
    for (op, expected) in checks {
        let out = run(&format!("{op} d, a, b;"), [4; 3], 4, &rows);
        for (row, actual) in rows.iter().zip(out) {
            same_float(actual, u64::from(expected(f(row[0]), f(row[1])).to_bits()), 32, 23, &format!("{op} {row:x?}"));
        }
    }
}

#[test]
fn approximations_stay_within_the_manual_s_bounds() {
    let mut numbers = Numbers(5);
    let rows: Vec<[u64; 3]> = (0..4000).map(|_| [u64::from((numbers.unit() * 100.0).to_bits()), 0, 0]).collect();
    type Exact = fn(f64) -> f64;
    let checks: [(&str, Exact, f64, f64); 7] = [
        ("ex2.approx.f32", f64::exp2, 3e-7, 0.0),
        ("lg2.approx.f32", f64::log2, 3e-7, 2.4e-7),
        ("rsqrt.approx.f32", |x| 1.0 / x.sqrt(), 2e-7, 0.0),
        ("rcp.approx.f32", |x| 1.0 / x, 1.2e-7, 0.0),
        ("sin.approx.f32", f64::sin, 0.0, 5e-7),
        ("cos.approx.f32", f64::cos, 0.0, 5e-7),
        ("tanh.approx.f32", f64::tanh, 4.9e-4, 0.0),
    ];
    for (op, exact, relative, absolute) in checks {
        let out = run(&format!("{op} d, a;"), [4; 3], 4, &rows);
        for (row, actual) in rows.iter().zip(out) {
            let (x, y) = (f64::from(f32::from_bits(row[0] as u32)), f64::from(f32::from_bits(actual as u32)));
            let e = exact(x);
            assert!(
                e.is_nan() && y.is_nan() || (y - e).abs() <= e.abs() * relative + absolute,
                "{op} {x}: {y}, exactly {e}"
            );
        }
    }
}

fn integer_rows(bits: u32) -> Vec<[u64; 3]> {
    let mask = if bits == 64 { u64::MAX } else { (1 << bits) - 1 };
    let edges =
        [0, 1, 2, 31, 32, 63, 64, 255, mask, mask - 1, mask >> 1, (mask >> 1) + 1, 0x5555_5555_5555_5555 & mask];
    let mut rows = Vec::new();
    for a in edges {
        for b in edges {
            for c in edges {
                rows.push([a, b, c]);
            }
        }
    }
    let mut numbers = Numbers(u64::from(bits) + 100);
    rows.extend((0..3000).map(|_| [numbers.bits() & mask, numbers.bits() & mask, numbers.bits() & mask]));
    rows
}

#[test]
fn integer_arithmetic_of_every_width() {
    for bits in [16u32, 32, 64] {
        let rows = integer_rows(bits);
        let bytes = bits / 8;
        let mask = if bits == 64 { u64::MAX } else { (1 << bits) - 1 };
        for signed in [false, true] {
            let ty = format!("{}{bits}", if signed { 's' } else { 'u' });
            let value = |v: u64| {
                if signed && v >> (bits - 1) & 1 == 1 { i128::from(v) - (1i128 << bits) } else { i128::from(v) }
            };
            type Expected = dyn Fn(i128, i128, i128) -> Option<i128>;
            let checks: [(&str, &str, &Expected); 12] = [
                ("add", "a, b", &move |a, b, _| Some(a + b)),
                ("sub", "a, b", &move |a, b, _| Some(a - b)),
                ("mul.lo", "a, b", &move |a, b, _| Some(a.wrapping_mul(b))),
                ("mul.hi", "a, b", &move |a, b, _| Some(a.wrapping_mul(b) >> bits)),
                ("mad.lo", "a, b, c", &move |a, b, c| Some(a.wrapping_mul(b).wrapping_add(c))),
                ("mad.hi", "a, b, c", &move |a, b, c| Some((a.wrapping_mul(b) >> bits) + c)),
                ("div", "a, b", &move |a, b, _| (b != 0).then(|| a / b)),
                ("rem", "a, b", &move |a, b, _| (b != 0).then(|| a % b)),
                ("min", "a, b", &move |a, b, _| Some(a.min(b))),
                ("max", "a, b", &move |a, b, _| Some(a.max(b))),
                ("sad", "a, b, c", &move |a, b, c| Some((a - b).abs() + c)),
                ("shr", "a, sh", &move |a, _, c| Some(a >> c)),
            ];
            for (op, operands, expected) in checks {
                // u64 products of 128 bits fit u128 only: their high half is checked below.
                if bits == 64 && !signed && op.ends_with("hi") {
                    continue;
                }
                let body = if op == "shr" {
                    format!("cvt.u32.u{bits} x, c; and.b32 x, x, 127; shr.{ty} d, a, x;")
                } else {
                    format!("{op}.{ty} d, {operands};")
                };
                let out = run(&body, [bytes; 3], bytes, &rows);
                for (row, actual) in rows.iter().zip(out) {
                    let [a, b, c] = row.map(value);
                    let c = if op == "shr" { i128::from(row[2] & 127) } else { c };
                    if let Some(e) = expected(a, b, c) {
                        assert_eq!(actual, e as u64 & mask, "{op}.{ty} {row:x?}");
                    }
                }
            }
        }
    }
    let rows = integer_rows(64);
    let out = run("mul.hi.u64 d, a, b;", [8; 3], 8, &rows);
    for (row, actual) in rows.iter().zip(out) {
        assert_eq!(actual, ((u128::from(row[0]) * u128::from(row[1])) >> 64) as u64);
    }
    let out = run("mul.wide.s32 d, a, b;", [4; 3], 8, &integer_rows(32));
    for (row, actual) in integer_rows(32).iter().zip(out) {
        assert_eq!(actual as i64, i64::from(row[0] as i32) * i64::from(row[1] as i32));
    }
    let out = run("mad24.hi.s32 d, a, b, c;", [4; 3], 4, &integer_rows(32));
    for (row, actual) in integer_rows(32).iter().zip(out) {
        let low24 = |v: u64| i64::from((v as i32) << 8 >> 8);
        assert_eq!(actual as u32, ((low24(row[0]) * low24(row[1])) >> 16).wrapping_add(row[2] as i64) as u32);
    }
}

#[test]
fn carries_through_128_bits() {
    let rows = integer_rows(64);
    // (a:b) + (c:a), the high word.
    let out = run("add.cc.u64 w, b, a; addc.u64 d, a, c;", [8; 3], 8, &rows);
    for (row, actual) in rows.iter().zip(out) {
        let [a, b, c] = row.map(u128::from);
        assert_eq!(actual, (((a << 64 | b).wrapping_add(c << 64 | a)) >> 64) as u64, "{row:x?}");
    }
    let out = run("sub.cc.u64 w, b, a; subc.u64 d, a, c;", [8; 3], 8, &rows);
    for (row, actual) in rows.iter().zip(out) {
        let [a, b, c] = row.map(u128::from);
        assert_eq!(actual, (((a << 64 | b).wrapping_sub(c << 64 | a)) >> 64) as u64, "{row:x?}");
    }
}

#[test]
fn bit_operations() {
    for bits in [32u32, 64] {
        let rows = integer_rows(bits);
        let bytes = bits / 8;
        let mask = if bits == 64 { u64::MAX } else { 0xffff_ffff };
        let fields = format!("cvt.u32.u{bits} x, b; cvt.u32.u{bits} y, c;");
        for signed in [false, true] {
            let ty = format!("{}{bits}", if signed { 's' } else { 'u' });
            let out = run(&format!("{fields} bfe.{ty} d, a, x, y;"), [bytes; 3], bytes, &rows);
            for (row, actual) in rows.iter().zip(out) {
                // The manual's loop, bit by bit.
                let (pos, len) = (row[1] & 255, row[2] & 255);
                let sign = if !signed || len == 0 { 0 } else { row[0] >> (pos + len - 1).min(u64::from(bits) - 1) & 1 };
                let bit = |i: u64| if i < len && pos + i < u64::from(bits) { row[0] >> (pos + i) & 1 } else { sign };
                let expected = (0..u64::from(bits)).fold(0, |d, i| d | bit(i) << i);
                assert_eq!(actual, expected, "bfe.{ty} {row:x?}");
            }
        }
        let out = run(&format!("{fields} bfi.b{bits} d, a, c, x, y;"), [bytes; 3], bytes, &rows);
        for (row, actual) in rows.iter().zip(out) {
            let (pos, len) = (row[1] & 255, row[2] & 255);
            let mut expected = row[2];
            for i in 0..len {
                if pos + i < u64::from(bits) {
                    expected = expected & !(1 << (pos + i)) | (if i < 64 { row[0] >> i & 1 } else { 0 }) << (pos + i);
                }
            }
            assert_eq!(actual, expected & mask, "bfi.b{bits} {row:x?}");
        }
    }
    let rows = integer_rows(32);
    let w = |v: u64| v as u32;
    type Expected = dyn Fn(u32, u32, u32) -> u32;
    let nibble = |a: u32, b: u32, c: u32| {
        let pool = u64::from(b) << 32 | u64::from(a);
        (0..4).fold(0u32, |d, i| {
            let s = c >> (4 * i) & 15;
            let byte = (pool >> (8 * (s & 7))) as u8;
            d | u32::from(if s & 8 != 0 { ((byte as i8) >> 7) as u8 } else { byte }) << (8 * i)
        })
    };
    let dot = |a: u32, b: u32, c: u32| {
        (0..4).fold(c as i32, |s, i| s.wrapping_add(i32::from((a >> (8 * i)) as i8) * i32::from((b >> (8 * i)) as u8)))
            as u32
    };
    let checks: [(&str, &Expected); 9] = [
        ("popc.b32 d, a;", &|a, _, _| (0..32).map(|i| a >> i & 1).sum()),
        ("clz.b32 d, a;", &|a, _, _| (0..32).rev().take_while(|i| a >> i & 1 == 0).count() as u32),
        ("brev.b32 d, a;", &|a, _, _| (0..32).fold(0, |d, i| d | (a >> i & 1) << (31 - i))),
        ("prmt.b32 d, a, b, c;", &nibble),
        ("lop3.b32 d, a, b, c, 0xE8;", &|a, b, c| a & b | a & c | b & c),
        ("shf.l.wrap.b32 d, a, b, c;", &|a, b, c| if c & 31 == 0 { b } else { b << (c & 31) | a >> (32 - (c & 31)) }),
        ("shf.r.clamp.b32 d, a, b, c;", &|a, b, c| match c.min(32) {
            0 => a,
            32 => b,
            n => a >> n | b << (32 - n),
        }),
        ("dp4a.s32.u32 d, a, b, c;", &dot),
        ("bfind.s32 d, a;", &|a, _, _| (0..31).rev().find(|i| (a >> i ^ a >> 31) & 1 == 1).unwrap_or(u32::MAX)),
    ];
    for (body, expected) in checks {
        let out = run(body, [4; 3], 4, &rows);
        for (row, actual) in rows.iter().zip(out) {
            assert_eq!(w(actual), expected(w(row[0]), w(row[1]), w(row[2])), "{body} {row:x?}");
        }
    }
}

/// `setp` on floats: the plain spellings are false where an operand is NaN, those that end in `u` are true.
#[test]
fn comparisons_of_floats_know_nan() {
    fn check<F: Float>(ty: &str, bits: u32, fraction: u32, ftz: bool) {
        let rows: Vec<[u64; 3]> = float_rows(bits, fraction).into_iter().step_by(7).collect();
        let top = ((1u64 << (bits - 1 - fraction)) - 1) << fraction;
        let sign = 1u64 << (bits - 1);
        let value = |v: u64| F::from_bits(u128::from(if ftz && v & top == 0 { v & sign } else { v }));
        for op in ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"] {
            let body = format!("setp.{op}{}.{ty} q, a, b; selp.u32 d, 1, 0, q;", if ftz { ".ftz" } else { "" });
            for (row, actual) in rows.iter().zip(run(&body, [bits / 8; 3], 4, &rows)) {
                let order = value(row[0]).partial_cmp(&value(row[1]));
                let expected = match (op, order) {
                    ("num", order) => order.is_some(),
                    ("nan", order) => order.is_none(),
                    (op, None) => op.ends_with('u'),
                    (op, Some(order)) => match &op[..2] {
                        "eq" => order.is_eq(),
                        "ne" => order.is_ne(),
                        "lt" => order.is_lt(),
                        "le" => order.is_le(),
                        "gt" => order.is_gt(),
                        _ => order.is_ge(),
                    },
                };
                assert_eq!(actual == 1, expected, "{body} {row:x?}");
            }
        }
    }
    check::<Single>("f32", 32, 23, false);
    check::<Single>("f32", 32, 23, true);
    check::<Double>("f64", 64, 52, false);
    check::<Half>("f16", 16, 10, false);
    check::<Half>("f16", 16, 10, true);
    check::<BFloat>("bf16", 16, 7, false);
}

#[test]
fn integer_conversions_extend_to_the_register() {
    let rows = integer_rows(32);
    type Expected = fn(u32) -> u32;
    let checks: [(&str, Expected); 5] = [
        ("cvt.s16.s8 d, a;", |a| a as i8 as u32),
        ("cvt.u32.u8 d, a;", |a| a as u8 as u32),
        ("cvt.s32.s16 d, a;", |a| a as i16 as u32),
        ("cvt.sat.s8.s32 d, a;", |a| (a as i32).clamp(-128, 127) as u32),
        ("cvt.sat.u16.s32 d, a;", |a| (a as i32).clamp(0, 65535) as u32),
    ];
    for (body, expected) in checks {
        for (row, actual) in rows.iter().zip(run(body, [4; 3], 4, &rows)) {
            assert_eq!(actual as u32, expected(row[0] as u32), "{body} {:#x}", row[0]);
        }
    }
}
