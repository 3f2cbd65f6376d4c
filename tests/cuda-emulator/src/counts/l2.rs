//! A model of the L2 cache, for what a launch moves from and to memory: lines of four 32-byte sectors, 16 ways, the least recently
//! used line goes. It is empty when a launch begins, and what has been written leaves it in the end.

/// Bytes of a sector, sectors of a line, lines of a set.
const SECTOR: u64 = 32;
const SECTORS: u64 = 4;
const WAYS: usize = 16;

#[derive(Debug, Clone, Copy)]
struct Line {
    /// Address over the line's size; `u64::MAX`: none.
    number: u64,
    used: u64,
    /// Sectors that are there, and those that memory does not have yet.
    valid: u8,
    dirty: u8,
}

/// The cache, and the bytes that have passed between it and memory.
#[derive(Debug)]
pub struct L2 {
    lines: Vec<Line>,
    clock: u64,
    read: u64,
    written: u64,
}

impl L2 {
    /// An empty cache of `bytes` bytes, whole sets.
    pub fn new(bytes: u64) -> Self {
        let sets = (bytes / (SECTOR * SECTORS) / WAYS as u64).max(1);
        let empty = Line { number: u64::MAX, used: 0, valid: 0, dirty: 0 };
        L2 { lines: vec![empty; sets as usize * WAYS], clock: 0, read: 0, written: 0 }
    }

    /// A warp's request: `bytes` bytes at each of these lanes' addresses.
    pub fn request(&mut self, addresses: &[u64; 32], active: u32, bytes: u32, store: bool) {
        let (mut line, mut sectors) = (u64::MAX, 0u8);
        for (lane, &address) in addresses.iter().enumerate() {
            if active >> lane & 1 == 0 || bytes == 0 {
                continue;
            }
            for sector in address / SECTOR..=(address + u64::from(bytes) - 1) / SECTOR {
                if sector / SECTORS != line {
                    self.touch(line, sectors, store);
                    (line, sectors) = (sector / SECTORS, 0);
                }
                sectors |= 1 << (sector % SECTORS);
            }
        }
        self.touch(line, sectors, store);
    }

    fn touch(&mut self, number: u64, sectors: u8, store: bool) {
        if sectors == 0 {
            return;
        }
        self.clock += 1;
        let sets = (self.lines.len() / WAYS) as u64;
        // Strides of a power of two spread over the sets, as hardware has it.
        let set = ((number ^ number >> 13).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) % sets;
        let ways = &mut self.lines[set as usize * WAYS..][..WAYS];
        let place = ways.iter().position(|l| l.number == number).unwrap_or_else(|| {
            let oldest = (0..WAYS).min_by_key(|&w| ways[w].used).unwrap_or(0);
            self.written += u64::from(ways[oldest].dirty.count_ones()) * SECTOR;
            ways[oldest] = Line { number, used: 0, valid: 0, dirty: 0 };
            oldest
        });
        let line = &mut ways[place];
        line.used = self.clock;
        if store {
            line.dirty |= sectors;
        } else {
            self.read += u64::from((sectors & !line.valid).count_ones()) * SECTOR;
        }
        line.valid |= sectors;
    }

    /// Bytes read from memory, and written to it once all is.
    pub fn traffic(&self) -> (u64, u64) {
        let left: u64 = self.lines.iter().map(|l| u64::from(l.dirty.count_ones()) * SECTOR).sum();
        (self.read, self.written + left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn warp(first: u64) -> [u64; 32] {
        std::array::from_fn(|i| first + 16 * i as u64)
    }

    #[test]
    fn what_fits_is_read_once_and_written_once() {
        let mut l2 = L2::new(1 << 20);
        for _ in 0..3 {
            (0..1000).for_each(|i| l2.request(&warp(4096 + 512 * i), u32::MAX, 16, false));
        }
        (0..10).for_each(|_| l2.request(&warp(4096), u32::MAX, 16, true));
        assert_eq!(l2.traffic(), (512_000, 512));
    }

    #[test]
    fn what_does_not_fit_is_read_again_and_written_when_it_goes() {
        let mut l2 = L2::new(1 << 16);
        for _ in 0..2 {
            (0..1000).for_each(|i| l2.request(&warp(512 * i), u32::MAX, 16, true));
        }
        (0..1000).for_each(|i| l2.request(&warp(512 * i), u32::MAX, 16, false));
        let (read, written) = l2.traffic();
        assert_eq!(written, 1_024_000, "all of it, twice");
        assert!(read > 0 && read <= 512_000, "{read}: in this order the last ones have gone before they are read");
    }

    #[test]
    fn half_a_sector_is_a_sector_and_inactive_lanes_ask_for_nothing() {
        let mut l2 = L2::new(1 << 20);
        l2.request(&warp(16), 1, 16, false);
        l2.request(&warp(16), 0, 16, false);
        l2.request(&warp(24), 1, 16, false);
        assert_eq!(l2.traffic().0, 64);
    }
}
