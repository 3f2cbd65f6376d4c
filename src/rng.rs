//! Counter-based random numbers (Philox4x32-10, Salmon et al., SC 2011).
//!
//! A number is a pure function of a key and a counter, so a run that resumes draws what it would have drawn, threads
//! need no state of their own, and a CUDA kernel can compute the very same bits. Everything random in the engine
//! (initialisation, shuffles, dropout) comes from here.

/// Ten rounds of Philox4x32 on `counter` under `key`.
#[inline]
pub fn philox4x32(key: [u32; 2], counter: [u32; 4]) -> [u32; 4] {
    let [mut k0, mut k1] = key;
    let [mut c0, mut c1, mut c2, mut c3] = counter;
    for _ in 0..10 {
        let p0 = 0xD251_1F53_u64 * u64::from(c0);
        let p1 = 0xCD9E_8D57_u64 * u64::from(c2);
        (c0, c1, c2, c3) = ((p1 >> 32) as u32 ^ c1 ^ k0, p1 as u32, (p0 >> 32) as u32 ^ c3 ^ k1, p0 as u32);
        k0 = k0.wrapping_add(0x9E37_79B9);
        k1 = k1.wrapping_add(0xBB67_AE85);
    }
    [c0, c1, c2, c3]
}

/// [`philox4x32`] of `N` counters that differ in their first word, which counts up from `counter[0]`: word j of counter i is
/// at `[j][i]`. Written so that the lanes are computed side by side.
#[inline(always)]
pub fn philox4x32_lanes<const N: usize>(key: [u32; 2], counter: [u32; 4]) -> [[u32; N]; 4] {
    let [mut k0, mut k1] = key;
    let mut c0: [u32; N] = std::array::from_fn(|i| counter[0].wrapping_add(i as u32));
    let (mut c1, mut c2, mut c3) = ([counter[1]; N], [counter[2]; N], [counter[3]; N]);
    for _ in 0..10 {
        for i in 0..N {
            let p0 = 0xD251_1F53_u64 * u64::from(c0[i]);
            let p1 = 0xCD9E_8D57_u64 * u64::from(c2[i]);
            c0[i] = (p1 >> 32) as u32 ^ c1[i] ^ k0;
            c2[i] = (p0 >> 32) as u32 ^ c3[i] ^ k1;
            c1[i] = p1 as u32;
            c3[i] = p0 as u32;
        }
        k0 = k0.wrapping_add(0x9E37_79B9);
        k1 = k1.wrapping_add(0xBB67_AE85);
    }
    [c0, c1, c2, c3]
}

/// A stream of random numbers: one seed, one stream id, one position.
///
/// Streams of the same seed with different ids are independent. `position` can be stored and restored.
#[derive(Clone, Debug)]
pub struct Rng {
    key: [u32; 2],
    stream: u64,
    position: u64,
    buffer: [u32; 4],
}

impl Rng {
    /// The stream `stream` of `seed`, at its beginning.
    pub fn new(seed: u64, stream: u64) -> Self {
        Rng { key: [seed as u32, (seed >> 32) as u32], stream, position: 0, buffer: [0; 4] }
    }

    /// The next 32 random bits.
    pub fn next_u32(&mut self) -> u32 {
        let lane = (self.position % 4) as usize;
        if lane == 0 {
            let block = self.position / 4;
            let counter = [block as u32, (block >> 32) as u32, self.stream as u32, (self.stream >> 32) as u32];
            self.buffer = philox4x32(self.key, counter);
        }
        self.position += 1;
        self.buffer[lane]
    }

    /// Uniform in [0, 1) with 32 random bits.
    pub fn uniform(&mut self) -> f64 {
        f64::from(self.next_u32()) / 4_294_967_296.0
    }

    /// Uniform integer in 0..n (n ≥ 1), without modulo bias (Lemire's multiply and reject).
    pub fn below(&mut self, n: u32) -> u32 {
        let threshold = n.wrapping_neg() % n;
        loop {
            let m = u64::from(self.next_u32()) * u64::from(n);
            if m as u32 >= threshold {
                return (m >> 32) as u32;
            }
        }
    }

    /// A standard normal number (Box–Muller; one of the pair is used).
    pub fn normal(&mut self) -> f64 {
        let u = (f64::from(self.next_u32()) + 1.0) / 4_294_967_296.0;
        let v = self.uniform();
        (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
    }

    /// Fisher–Yates shuffle.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i as u32 + 1) as usize);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers of the Random123 distribution (`kat_vectors`, philox4x32 10).
    #[test]
    fn philox_known_answers() {
        assert_eq!(philox4x32([0, 0], [0; 4]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox4x32([u32::MAX; 2], [u32::MAX; 4]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox4x32([0xa409_3822, 0x299f_31d0], [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn lanes_are_the_single_ones() {
        let lanes = philox4x32_lanes::<16>([3, 4], [u32::MAX - 5, 6, 7, 8]);
        for i in 0..16u32 {
            let one = philox4x32([3, 4], [(u32::MAX - 5).wrapping_add(i), 6, 7, 8]);
            assert_eq!(one, [0, 1, 2, 3].map(|j: usize| lanes[j][i as usize]));
        }
    }

    #[test]
    fn below_is_uniform_and_shuffle_is_a_permutation() {
        let mut rng = Rng::new(7, 1);
        let mut counts = [0u32; 7];
        for _ in 0..70_000 {
            counts[rng.below(7) as usize] += 1;
        }
        assert!(counts.iter().all(|&c| (9_600..10_400).contains(&c)), "{counts:?}");
        let mut v: Vec<u32> = (0..257).collect();
        rng.shuffle(&mut v);
        assert_ne!(v, (0..257).collect::<Vec<_>>());
        v.sort_unstable();
        assert_eq!(v, (0..257).collect::<Vec<_>>());
    }

    #[test]
    fn normal_has_mean_zero_and_variance_one() {
        let mut rng = Rng::new(2023, 0);
        let n = 100_000;
        let (mut s, mut s2) = (0.0, 0.0);
        for _ in 0..n {
            let x = rng.normal();
            s += x;
            s2 += x * x;
        }
        assert!((s / n as f64).abs() < 0.01 && (s2 / n as f64 - 1.0).abs() < 0.02);
    }
}
