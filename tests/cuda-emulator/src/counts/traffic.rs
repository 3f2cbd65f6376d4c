//! How a warp's addresses fall on 32-byte sectors and on the 32 banks of shared memory.

/// Distinct 32-byte sectors that the active lanes touch with accesses of `bytes` bytes.
pub fn sectors(addresses: &[u64; 32], active: u32, bytes: u32) -> u32 {
    let mut lanes = [0u64; 32];
    let mut n = 0;
    let mut in_order = true;
    let mut last = 0;
    for (lane, &address) in addresses.iter().enumerate() {
        if active >> lane & 1 == 1 {
            in_order &= address >= last;
            last = address;
            lanes[n] = address;
            n += 1;
        }
    }
    let lanes = &mut lanes[..n];
    if !in_order {
        lanes.sort_unstable();
    }
    let (mut count, mut next) = (0, 0);
    for &mut address in lanes {
        let (first, end) = (address / 32, (address + u64::from(bytes) - 1) / 32 + 1);
        let first = first.max(next);
        if end > first {
            count += (end - first) as u32;
            next = end;
        }
    }
    count
}

/// Passes that the shared memory takes for one access of the warp, and the fewest that its bytes need. Accesses of 8
/// bytes go by half warps, of 16 bytes by quarters; lanes that name the same word share it.
pub fn shared_passes(addresses: &[u64; 32], active: u32, bytes: u32) -> (u32, u32) {
    let words = bytes.div_ceil(4).clamp(1, 4);
    let group = 32 / words as usize;
    let (mut passes, mut least) = (0, 0);
    for start in (0..32).step_by(group) {
        let mut list = [0u64; 32];
        let mut n = 0;
        for lane in (start..start + group).filter(|lane| active >> lane & 1 == 1) {
            for w in 0..u64::from(words) {
                list[n] = addresses[lane] / 4 + w;
                n += 1;
            }
        }
        if n == 0 {
            continue;
        }
        let list = &mut list[..n];
        let in_order = list.windows(2).all(|w| w[0] <= w[1]);
        if !in_order {
            list.sort_unstable();
        }
        let mut load = [0u32; 32];
        let mut last = u64::MAX;
        for &mut word in list {
            load[(word % 32) as usize] += u32::from(word != last);
            last = word;
        }
        passes += load.into_iter().max().unwrap_or(1);
        least += 1;
    }
    (passes, least)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strided(stride: u64) -> [u64; 32] {
        std::array::from_fn(|i| 4096 + i as u64 * stride)
    }

    #[test]
    fn sectors_of_textbook_patterns() {
        assert_eq!(sectors(&strided(4), u32::MAX, 4), 4);
        assert_eq!(sectors(&strided(8), u32::MAX, 4), 8);
        assert_eq!(sectors(&strided(32), u32::MAX, 4), 32);
        assert_eq!(sectors(&strided(16), u32::MAX, 16), 16);
        assert_eq!(sectors(&strided(0), u32::MAX, 4), 1);
        assert_eq!(sectors(&strided(4), 0xff, 4), 1);
        let mut reversed = strided(4);
        reversed.reverse();
        assert_eq!(sectors(&reversed, u32::MAX, 4), 4);
        assert_eq!(sectors(&strided(4).map(|a| a + 4), u32::MAX, 4), 5, "misaligned by one word");
    }

    #[test]
    fn bank_conflicts_of_textbook_patterns() {
        assert_eq!(shared_passes(&strided(4), u32::MAX, 4), (1, 1));
        assert_eq!(shared_passes(&strided(0), u32::MAX, 4), (1, 1), "broadcast");
        assert_eq!(shared_passes(&strided(8), u32::MAX, 4), (2, 1));
        assert_eq!(shared_passes(&strided(128), u32::MAX, 4), (32, 1), "a column of a 32-wide tile");
        assert_eq!(shared_passes(&strided(132), u32::MAX, 4), (1, 1), "the same with padding");
        assert_eq!(shared_passes(&strided(8), u32::MAX, 8), (2, 2));
        assert_eq!(shared_passes(&strided(16), u32::MAX, 16), (4, 4));
        assert_eq!(shared_passes(&strided(2), u32::MAX, 2), (1, 1), "two halves of a word");
    }
}
