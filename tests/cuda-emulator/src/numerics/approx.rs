//! The `.approx` functions. Hardware computes them from tables; here they are computed in f64 and rounded once, which
//! stays within every error bound that the PTX manual states. Subnormal inputs and outputs of `.ftz` are the caller's.

/// `ex2.approx.f32`: 2^x.
pub fn exp2(x: f32) -> f32 {
    f64::from(x).exp2() as f32
}

/// `lg2.approx.f32`: log2(x); NaN below zero, -inf at zero.
pub fn log2(x: f32) -> f32 {
    canonical(f64::from(x).log2() as f32)
}

/// `rsqrt.approx.f32`: 1 / sqrt(x).
pub fn rsqrt(x: f32) -> f32 {
    canonical((1.0 / f64::from(x).sqrt()) as f32)
}

/// `rcp.approx.f32`: 1 / x.
pub fn rcp(x: f32) -> f32 {
    canonical((1.0 / f64::from(x)) as f32)
}

/// `sqrt.approx.f32`.
pub fn sqrt(x: f32) -> f32 {
    canonical(f64::from(x).sqrt() as f32)
}

/// `sin.approx.f32`.
pub fn sin(x: f32) -> f32 {
    canonical(f64::from(x).sin() as f32)
}

/// `cos.approx.f32`.
pub fn cos(x: f32) -> f32 {
    canonical(f64::from(x).cos() as f32)
}

/// `tanh.approx.f32`.
pub fn tanh(x: f32) -> f32 {
    canonical(f64::from(x).tanh() as f32)
}

/// `div.approx.f32` and `div.full.f32`: a / b.
pub fn div(a: f32, b: f32) -> f32 {
    canonical(a / b)
}

/// `div.approx.f32` outside its full range: for |b| between 2^126 and 2^128 the manual gives zero, or NaN for infinite a.
pub fn div_narrow(a: f32, b: f32) -> f32 {
    if b.is_finite() && b.abs() > f32::from_bits(0x7e80_0000) {
        return if a.is_infinite() { f32::from_bits(0x7fff_ffff) } else { canonical(a * 0.0 * b.signum()) };
    }
    div(a, b)
}

/// `rcp.approx.ftz.f64`: the high word of 1 / x, low word zero.
pub fn rcp_ftz_f64(x: f64) -> f64 {
    high_word(1.0 / flush(x))
}

/// `rsqrt.approx.ftz.f64`.
pub fn rsqrt_ftz_f64(x: f64) -> f64 {
    high_word(1.0 / flush(x).sqrt())
}

fn flush(x: f64) -> f64 {
    if x.is_subnormal() { 0.0f64.copysign(x) } else { x }
}

fn high_word(x: f64) -> f64 {
    let x = flush(x);
    if x.is_nan() { f64::from_bits(0x7fff_ffff_0000_0000) } else { f64::from_bits(x.to_bits() & 0xffff_ffff_0000_0000) }
}

/// Any NaN as NVIDIA's units write it.
#[inline(always)]
pub fn canonical(x: f32) -> f32 {
    if x.is_nan() { f32::from_bits(0x7fff_ffff) } else { x }
}
