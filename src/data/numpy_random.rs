//! NumPy's legacy generator, as far as `DataFrame.sample` uses it: MT19937, and the permutation of `RandomState`.
//!
//! PARITY: `valid_small` is `valid.sample(frac, random_state=2023)` in the official preprocessing; the same rows in the same
//! order come out here.

/// Mersenne Twister 19937 (Matsumoto & Nishimura 1998).
struct Mt19937 {
    state: [u32; 624],
    at: usize,
}

impl Mt19937 {
    fn new(seed: u32) -> Self {
        let mut state = [seed; 624];
        for i in 1..624 {
            let last = state[i - 1];
            state[i] = 1_812_433_253u32.wrapping_mul(last ^ (last >> 30)).wrapping_add(i as u32);
        }
        Mt19937 { state, at: 624 }
    }

    fn next(&mut self) -> u32 {
        if self.at == 624 {
            for i in 0..624 {
                let y = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % 624] & 0x7fff_ffff);
                let odd = if y & 1 == 1 { 0x9908_b0df } else { 0 };
                self.state[i] = self.state[(i + 397) % 624] ^ (y >> 1) ^ odd;
            }
            self.at = 0;
        }
        let mut y = self.state[self.at];
        self.at += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// Uniform in 0..=max: masked, then rejected.
    fn interval(&mut self, max: u32) -> u32 {
        let mask = u32::MAX.checked_shr(max.leading_zeros()).unwrap_or(0);
        loop {
            let value = self.next() & mask;
            if value <= max {
                return value;
            }
        }
    }
}

/// `RandomState(seed).permutation(n)`.
fn permutation(n: u32, seed: u32) -> Vec<u32> {
    let mut rng = Mt19937::new(seed);
    let mut items: Vec<u32> = (0..n).collect();
    for i in (1..n).rev() {
        items.swap(i as usize, rng.interval(i) as usize);
    }
    items
}

/// Row numbers that `DataFrame.sample(frac, random_state=seed)` picks out of `n`, in its order.
pub fn sample(n: usize, frac: f64, seed: u32) -> Vec<usize> {
    // Python's round: half to even.
    let size = (frac * n as f64).round_ties_even() as usize;
    permutation(n as u32, seed).into_iter().take(size).map(|i| i as usize).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equals_numpy() {
        // numpy.random.RandomState(2023).permutation(10), and pandas.Series(range(7)).sample(frac=.5, random_state=1).index
        assert_eq!(permutation(10, 2023), PERMUTATION);
        assert_eq!(sample(7, 0.5, 1), SAMPLE);
        assert_eq!(sample(5, 0.5, 1).len(), 2);
        assert!(sample(0, 0.5, 1).is_empty());
    }

    include!("../../tests/fixtures/numpy_random.rs");
}
