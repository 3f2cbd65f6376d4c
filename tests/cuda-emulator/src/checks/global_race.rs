//! The shadow of global memory during one launch: who touched each word, for races between blocks, and which bytes were
//! touched at all, for the least traffic that a card must carry.
//!
//! One 64-bit cell a 4-byte word: last writing block (28 bits), last reading block (28 bits), masks of the bytes written
//! and read (4 bits each). Pages come into being when touched. Blocks that have executed a fence wider than the block are
//! taken to synchronise with others (locks, last-block patterns, grid barriers); their accesses are recorded, not judged.

use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

const PAGE_WORDS: usize = 1024;
const BLOCK_BITS: u32 = 28;
const BLOCK_MASK: u64 = (1 << BLOCK_BITS) - 1;
/// Reading block number that stands for more than one block.
const SEVERAL: u64 = BLOCK_MASK;

type Page = [AtomicU64; PAGE_WORDS];

/// The shadow of one allocation.
#[derive(Debug)]
pub struct GlobalShadow {
    pages: Vec<AtomicPtr<Page>>,
}

/// A conflict with another block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conflict {
    /// The other block's linear number, where one is known.
    pub other: Option<u64>,
    /// The other access was a write.
    pub other_wrote: bool,
    /// Byte offset in the allocation.
    pub offset: u64,
}

/// How an access enters the shadow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// A plain read.
    Read,
    /// A plain write.
    Write,
    /// An atomic or strong access: touched, never judged.
    Strong,
}

impl GlobalShadow {
    /// A shadow of an allocation of `bytes` bytes.
    pub fn new(bytes: u64) -> Self {
        let pages = (bytes as usize).div_ceil(PAGE_WORDS * 4);
        GlobalShadow { pages: (0..pages).map(|_| AtomicPtr::default()).collect() }
    }

    fn page(&self, index: usize) -> &Page {
        let slot = &self.pages[index];
        let mut page = slot.load(Ordering::Acquire);
        if page.is_null() {
            let fresh: Box<Page> = Box::new([const { AtomicU64::new(0) }; PAGE_WORDS]);
            let fresh = Box::into_raw(fresh);
            match slot.compare_exchange(std::ptr::null_mut(), fresh, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => page = fresh,
                Err(theirs) => {
                    // SAFETY: `fresh` came from `Box::into_raw` just above and was not published.
                    drop(unsafe { Box::from_raw(fresh) });
                    page = theirs;
                }
            }
        }
        // SAFETY: a published page lives until the shadow is dropped.
        unsafe { &*page }
    }

    /// Records an access of `n` bytes at `offset` by a block (linear number); `judge` asks for conflicts.
    #[inline]
    pub fn access(&self, block: u64, offset: u64, n: u32, access: Access, judge: bool) -> Option<Conflict> {
        let mut conflict = None;
        let (mut at, end) = (offset, offset + u64::from(n));
        let block = block.min(SEVERAL - 2) + 1;
        while at < end {
            let word = (at / 4) as usize;
            let (first, last) = (at % 4, (end - at + at % 4).min(4));
            let bytes = ((1u64 << last) - 1) & !((1u64 << first) - 1);
            let cell = &self.page(word / PAGE_WORDS)[word % PAGE_WORDS];
            let mut old = cell.load(Ordering::Relaxed);
            loop {
                let new = merge(old, block, bytes, access);
                if new == old {
                    break;
                }
                match cell.compare_exchange_weak(old, new, Ordering::Relaxed, Ordering::Relaxed) {
                    Ok(_) => break,
                    Err(seen) => old = seen,
                }
            }
            if judge && access != Access::Strong && conflict.is_none() {
                let (writer, reader) = (old >> (8 + BLOCK_BITS), old >> 8 & BLOCK_MASK);
                if old >> 4 & 15 & bytes != 0 && writer != 0 && writer != block {
                    conflict = Some(Conflict { other: Some(writer - 1), other_wrote: true, offset: at });
                } else if access == Access::Write && old & 15 & bytes != 0 && reader != 0 && reader != block {
                    let other = (reader != SEVERAL).then(|| reader - 1);
                    conflict = Some(Conflict { other, other_wrote: false, offset: at });
                }
            }
            at = (word as u64 + 1) * 4;
        }
        conflict
    }

    /// Bytes read and bytes written at least once.
    pub fn touched(&self) -> (u64, u64) {
        let (mut read, mut written) = (0, 0);
        for slot in &self.pages {
            let page = slot.load(Ordering::Acquire);
            if page.is_null() {
                continue;
            }
            // SAFETY: a published page lives until the shadow is dropped.
            for cell in unsafe { &*page } {
                let cell = cell.load(Ordering::Relaxed);
                read += u64::from((cell & 15).count_ones());
                written += u64::from((cell >> 4 & 15).count_ones());
            }
        }
        (read, written)
    }
}

fn merge(old: u64, block: u64, bytes: u64, access: Access) -> u64 {
    let (mut writer, mut reader) = (old >> (8 + BLOCK_BITS), old >> 8 & BLOCK_MASK);
    let mut masks = old & 0xff;
    match access {
        Access::Read => {
            reader = if reader == 0 || reader == block { block } else { SEVERAL };
            masks |= bytes;
        }
        Access::Write => {
            writer = block;
            masks |= bytes << 4;
        }
        // Touched both ways, owned by nobody: strong accesses are no party to a race.
        Access::Strong => masks |= bytes | bytes << 4,
    }
    writer << (8 + BLOCK_BITS) | reader << 8 | masks
}

impl Drop for GlobalShadow {
    fn drop(&mut self) {
        for slot in &self.pages {
            let page = slot.load(Ordering::Acquire);
            if !page.is_null() {
                // SAFETY: published pages came from `Box::into_raw` and are dropped once, here.
                drop(unsafe { Box::from_raw(page) });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_race_where_one_writes() {
        let shadow = GlobalShadow::new(10_000);
        assert_eq!(shadow.access(0, 5000, 8, Access::Read, true), None);
        assert_eq!(shadow.access(1, 5000, 8, Access::Read, true), None, "two readers");
        let found = shadow.access(1, 5004, 4, Access::Write, true).unwrap();
        assert_eq!((found.other, found.other_wrote), (None, false));
        let found = shadow.access(2, 5006, 2, Access::Read, true).unwrap();
        assert_eq!((found.other, found.other_wrote, found.offset), (Some(1), true, 5006));
    }

    #[test]
    fn different_bytes_of_a_word_do_not_race() {
        let shadow = GlobalShadow::new(16);
        assert_eq!(shadow.access(0, 0, 2, Access::Write, true), None);
        assert_eq!(shadow.access(1, 2, 2, Access::Write, true), None);
        assert_eq!(shadow.touched(), (0, 4));
    }

    #[test]
    fn atomics_and_fenced_blocks_are_not_judged() {
        let shadow = GlobalShadow::new(16);
        shadow.access(0, 0, 4, Access::Strong, true);
        assert_eq!(shadow.access(1, 0, 4, Access::Strong, true), None);
        shadow.access(1, 4, 4, Access::Write, true);
        assert_eq!(shadow.access(2, 4, 4, Access::Read, false), None);
        assert_eq!(shadow.touched(), (8, 8));
    }
}
