//! One loop, compiled for several instruction sets.
//!
//! The crate is built for the oldest machine of its architecture, so plain loops would use four lanes. [`per_isa`] wraps a
//! function that works on one row: its body is compiled again with AVX2 and with AVX-512 enabled, and the best version
//! the machine has is called. Rust never contracts `a * b + c`, so all versions give the same bits.

macro_rules! per_isa {
    ($(#[$doc:meta])* $vis:vis fn $name:ident $(<const $c:ident: $ct:ty>)? ($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$doc])*
        #[inline]
        #[allow(clippy::too_many_arguments)] // one row, its operands
        $vis fn $name $(<const $c: $ct>)? ($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn body $(<const $c: $ct>)? ($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                unsafe fn avx512 $(<const $c: $ct>)? ($($arg: $ty),*) $(-> $ret)? { body $(::<$c>)? ($($arg),*) }
                #[target_feature(enable = "avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                unsafe fn avx2 $(<const $c: $ct>)? ($($arg: $ty),*) $(-> $ret)? { body $(::<$c>)? ($($arg),*) }
                if is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                {
                    // SAFETY: the features were detected (AVX-512BW machines have AVX2 and FMA).
                    return unsafe { avx512 $(::<$c>)? ($($arg),*) };
                }
                if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                    // SAFETY: the features were detected.
                    return unsafe { avx2 $(::<$c>)? ($($arg),*) };
                }
            }
            body $(::<$c>)? ($($arg),*)
        }
    };
}
pub(super) use per_isa;

/// Sum of `f(0..n)` in sixteen float32 lanes: a fixed order that vectorises. Good for sums of like-signed or short data;
/// each lane adds n / 16 terms.
#[inline(always)]
pub(super) fn sum_lanes(n: usize, f: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0f32; 16];
    let whole = n / 16 * 16;
    for i in (0..whole).step_by(16) {
        for (j, lane) in lanes.iter_mut().enumerate() {
            *lane += f(i + j);
        }
    }
    for i in whole..n {
        lanes[i - whole] += f(i);
    }
    let mut width = 8;
    while width > 0 {
        for j in 0..width {
            lanes[j] += lanes[j + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// eˣ within 2 ulp for |x| ≤ 87; clamped beyond, where the callers' results no longer depend on it. No branches.
///
/// eˣ = 2ⁿ eʳ with n = round(x / ln 2) and |r| ≤ ln 2 / 2 (Cody–Waite reduction), eʳ by its Taylor polynomial of degree 7.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 · 2²³: adding and subtracting it rounds to an integer
    let x = x.clamp(-87.0, 88.0);
    let n = (x * std::f32::consts::LOG2_E + ROUND) - ROUND;
    let r = (x - n * 0.693_359_4) - n * -2.121_944_4e-4;
    let mut p = 1.0 / 5040.0;
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = p * r + c;
    }
    p * f32::from_bits(((n as i32 + 127) << 23) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulp() {
        let mut worst = 0.0f64;
        for i in -870_000..=880_000 {
            let x = i as f32 * 1e-4;
            let want = f64::from(x).exp();
            worst = worst.max(((f64::from(exp(x)) - want) / want).abs());
        }
        assert!(worst < 2.0 * f64::from(f32::EPSILON), "{worst:e}");
        assert!(exp(-1e30) < 1e-37 && exp(1e30) > 1e38);
    }

    #[test]
    fn lanes_sum_everything_once() {
        for n in [0, 1, 15, 16, 17, 257] {
            assert_eq!(sum_lanes(n, |i| i as f32), (0..n).sum::<usize>() as f32, "n = {n}");
        }
    }
}
