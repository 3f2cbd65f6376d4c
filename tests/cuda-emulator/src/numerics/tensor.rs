//! Sums of tensor-core products.
//!
//! Products of f16, bf16, tf32 and fp8 values are exact. How their sum and the accumulator are added is not documented by
//! NVIDIA; published measurements (arXiv 2511.10909) find: aligned to the largest exponent, truncated to a number of bits
//! below it, added as integers, truncated to f32.

/// How `mma` adds products and accumulator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Accumulation {
    /// Sum in f64, one rounding to nearest. Not what any card does, and within 2e-5 relative of all.
    #[default]
    Exact,
    /// Ampere and Ada: blocks of 8 products (f16, bf16) or 4 (tf32), 24 bits below the largest exponent.
    Ampere,
    /// Hopper: blocks of 16 products (8 for tf32), 25 bits.
    Hopper,
}

/// Adds products to an accumulator by a card's model. `block` products are added at once.
pub fn accumulate(model: Accumulation, products: &[f64], accumulator: f32, block: usize) -> f32 {
    match model {
        Accumulation::Exact => {
            let mut sum = 0.0;
            for product in products {
                sum += product;
            }
            (sum + f64::from(accumulator)) as f32
        }
        Accumulation::Ampere => products.chunks(block).fold(accumulator, |c, p| aligned_sum(p, c, 24)),
        Accumulation::Hopper => products.chunks(block * 2).fold(accumulator, |c, p| aligned_sum(p, c, 25)),
    }
}

/// Terms aligned to the largest exponent, cut after `bits` fraction bits, summed exactly, cut to f32.
fn aligned_sum(products: &[f64], accumulator: f32, bits: i32) -> f32 {
    let c = f64::from(accumulator);
    let plain = products.iter().sum::<f64>() + c;
    if !plain.is_finite() {
        return super::approx::canonical(plain as f32);
    }
    let top = products.iter().chain([&c]).filter(|v| **v != 0.0).map(|v| exponent(*v)).max();
    let Some(top) = top else { return plain as f32 };
    let unit = top - bits;
    let sum: i64 = products.iter().chain([&c]).map(|v| scale(*v, -unit).trunc() as i64).sum();
    super::rounding::narrow(scale(sum as f64, unit), super::rounding::Rounding::Zero)
}

fn exponent(value: f64) -> i32 {
    ((value.to_bits() >> 52 & 0x7ff) as i32) - 1023
}

/// value * 2^n, in two steps so that the factor stays a normal number.
fn scale(value: f64, n: i32) -> f64 {
    let power = |n: i32| f64::from_bits(((1023 + n) as u64) << 52);
    value * power(n / 2) * power(n - n / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_models_differ_where_published_probes_say() {
        // 2^-24 beside 1: kept by 24 bits when alone with the accumulator; 2^-25 only by 25 bits.
        let probe = |model, small: f64| accumulate(model, &[small, small, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], 1.0, 8);
        let next = 1.0f32.next_up();
        assert_eq!(probe(Accumulation::Ampere, (-24f64).exp2()), next);
        assert_eq!(probe(Accumulation::Ampere, (-25f64).exp2()), 1.0, "cut before they can add up");
        assert_eq!(probe(Accumulation::Hopper, (-25f64).exp2() * 1.5), 1.0, "cut to f32 toward zero");
        assert_eq!(probe(Accumulation::Hopper, (-24f64).exp2()), next);
        assert_eq!(probe(Accumulation::Exact, (-24f64).exp2()), next);
    }

    #[test]
    fn infinities_and_nan_pass_through() {
        for model in [Accumulation::Exact, Accumulation::Ampere, Accumulation::Hopper] {
            assert_eq!(accumulate(model, &[f64::INFINITY, 1.0], 1.0, 8), f32::INFINITY);
            assert!(accumulate(model, &[f64::INFINITY, f64::NEG_INFINITY], 1.0, 8).is_nan());
            assert_eq!(accumulate(model, &[0.0, 0.0], 0.0, 8), 0.0);
        }
    }
}
