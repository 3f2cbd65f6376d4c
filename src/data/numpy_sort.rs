//! NumPy's unstable `argsort`: quicksort by indices, as far as the official preprocessing depends on where it leaves ties.
//!
//! PARITY: the official Amazon splits put December in order with `sort_values("timestamp")`, which is not stable. Amazon's times
//! are whole days, so the halves of December, and the order of one user's day, follow from how this sort moves equal keys. This
//! is the algorithm of NumPy up to 1.24 (and of later ones on processors without the vector sorts they bring), but for its retreat to
//! heapsort on keys made to defeat it.

/// Ranges of at most this many are sorted by insertion.
const SMALL: usize = 16;

/// Indices that put `keys` in order, ties as NumPy leaves them.
pub fn argsort(keys: &[i64]) -> Vec<u32> {
    let mut order: Vec<u32> = (0..keys.len() as u32).collect();
    sort(&mut order, |i| keys[i as usize]);
    order
}

fn sort(mut order: &mut [u32], key: impl Fn(u32) -> i64 + Copy) {
    while order.len() > SMALL {
        let last = order.len() - 1;
        let middle = last / 2;
        // The median of first, middle and last becomes the pivot, kept at the last but one place; keys equal to it stop both
        // scans and change sides.
        for (a, b) in [(middle, 0), (last, middle), (middle, 0)] {
            if key(order[a]) < key(order[b]) {
                order.swap(a, b);
            }
        }
        let pivot = key(order[middle]);
        order.swap(middle, last - 1);
        let (mut i, mut j) = (0, last - 1);
        loop {
            i += 1;
            while key(order[i]) < pivot {
                i += 1;
            }
            j -= 1;
            while pivot < key(order[j]) {
                j -= 1;
            }
            if i >= j {
                break;
            }
            order.swap(i, j);
        }
        order.swap(i, last - 1);
        let (left, right) = order.split_at_mut(i);
        let right = &mut right[1..];
        // The smaller side by recursion: the stack stays logarithmic.
        let (smaller, larger) = if left.len() < right.len() { (left, right) } else { (right, left) };
        sort(smaller, key);
        order = larger;
    }
    for i in 1..order.len() {
        let mut j = i;
        while j > 0 && key(order[j]) < key(order[j - 1]) {
            order.swap(j, j - 1);
            j -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(n: usize, below: u64) -> Vec<i64> {
        let mut x = 12345u64;
        let mut next = || {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((x >> 33) % below) as i64
        };
        (0..n).map(|_| next()).collect()
    }

    fn hash(order: &[u32]) -> u64 {
        order.iter().fold(0u64, |h, &i| h.wrapping_mul(1_000_003).wrapping_add(i.into()))
    }

    /// `numpy.argsort` of the same keys as float64: NumPy 1.24.4, and 2.4.6 with NPY_DISABLE_CPU_FEATURES="X86_V4 X86_V3".
    #[test]
    fn equals_numpy() {
        for (n, below, want) in [
            (40, 7, 17_795_331_550_006_057_098),
            (1000, 31, 12_636_373_947_956_670_014),
            (20_000, 31, 16_948_111_950_734_035_844),
            (20_000, 1, 11_796_520_092_521_006_754),
            (5_000, 1_000_000_000, 196_059_028_929_355_878),
        ] {
            assert_eq!(hash(&argsort(&keys(n, below))), want, "{n} keys below {below}");
        }
        let mut sorted = keys(3000, 31);
        sorted.sort_unstable();
        assert_eq!(hash(&argsort(&sorted)), 1_423_086_885_028_045_260);
        assert!(argsort(&[]).is_empty());
    }
}
