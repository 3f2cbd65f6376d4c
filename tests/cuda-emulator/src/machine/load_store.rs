//! `ld` and `st` of every space and width.

use super::access::{Region, Span, addresses};
use super::block::Block;
use super::mbarrier::lock;
use super::step::{lanes32, lanes64, set32};
use super::warp::{Warp, lanes};
use crate::checks::{Fault, Kind};
use crate::counts::traffic;
use crate::memory::layout;
use crate::program::{Load, Order, Reg, Store};
use crate::ptx::types::Space;

impl Block<'_> {
    /// Counts one memory request.
    #[inline(always)]
    pub fn count_access(&mut self, span: &Span, at: &[u64; 32], bytes: u32, store: bool) {
        if !self.config().count {
            return;
        }
        let asked = u64::from(span.lanes.count_ones() * bytes);
        match span.region {
            Region::Global(_) => {
                let traffic = if store { &mut self.counters.global_stores } else { &mut self.counters.global_loads };
                traffic.requests += 1;
                traffic.bytes += asked;
                traffic.sectors += u64::from(traffic::sectors(at, span.lanes, bytes));
                self.launch.cache(at, span.lanes, bytes, store);
            }
            Region::Shared | Region::Peer(_) => {
                let (passes, least) = traffic::shared_passes(at, span.lanes, bytes);
                self.counters.shared_passes += u64::from(passes);
                self.counters.shared_passes_least += u64::from(least);
                self.counters.shared_bytes += asked;
            }
            Region::Local => self.counters.local_bytes += asked,
            Region::Param => {}
        }
    }

    /// `ld`.
    pub fn load(&mut self, warp: &mut Warp, load: &Load, active: u32) -> Result<(), Fault> {
        warp.work += 1;
        let at = addresses(warp, &self.program().constants, &load.address);
        let bytes = load.size * load.dest.len() as u32;
        self.aligned(&at, active, bytes.min(16))?;
        if load.order == Order::Strong {
            self.acquire_strong(warp, &at, active, load.space);
        }
        let mut left = active;
        while left != 0 {
            let span = self.span(warp, load.space, &at, left, bytes)?;
            left &= !span.lanes;
            if self.config().check {
                self.check_read(warp, &span, &at, bytes, load.order == Order::Strong);
            }
            self.count_access(&span, &at, bytes, false);
            for (e, dest) in load.dest.iter().enumerate() {
                let Some((reg, wide)) = *dest else { continue };
                let offset = e * load.size as usize;
                // SAFETY: `span` checked that `bytes` bytes at every lane of it lie inside host memory that outlives the
                // launch; concurrent writers are the emulated program's own race.
                unsafe {
                    match (load.size, wide, load.signed) {
                        (4, false, _) => gather32(warp, reg, &span, &at, offset),
                        (1, false, false) => each(warp, reg, &span, &at, offset, |p| u32::from(p.read())),
                        (1, false, true) => {
                            each(warp, reg, &span, &at, offset, |p| p.cast::<i8>().read_unaligned() as u32)
                        }
                        (2, false, false) => {
                            each(warp, reg, &span, &at, offset, |p| u32::from(p.cast::<u16>().read_unaligned()))
                        }
                        (2, false, true) => {
                            each(warp, reg, &span, &at, offset, |p| p.cast::<i16>().read_unaligned() as u32)
                        }
                        (8, false, _) => {
                            each(warp, reg, &span, &at, offset, |p| p.cast::<u64>().read_unaligned() as u32)
                        }
                        (1, true, false) => each64(warp, reg, &span, &at, offset, |p| u64::from(p.read())),
                        (1, true, true) => {
                            each64(warp, reg, &span, &at, offset, |p| p.cast::<i8>().read_unaligned() as u64)
                        }
                        (2, true, false) => {
                            each64(warp, reg, &span, &at, offset, |p| u64::from(p.cast::<u16>().read_unaligned()))
                        }
                        (2, true, true) => {
                            each64(warp, reg, &span, &at, offset, |p| p.cast::<i16>().read_unaligned() as u64)
                        }
                        (4, true, false) => {
                            each64(warp, reg, &span, &at, offset, |p| u64::from(p.cast::<u32>().read_unaligned()))
                        }
                        (4, true, true) => {
                            each64(warp, reg, &span, &at, offset, |p| p.cast::<i32>().read_unaligned() as u64)
                        }
                        (8, true, _) => each64(warp, reg, &span, &at, offset, |p| p.cast::<u64>().read_unaligned()),
                        // 128 bits: two 64-bit registers, low first.
                        _ => {
                            each64(warp, reg, &span, &at, offset, |p| p.cast::<u64>().read_unaligned());
                            each64(warp, Reg(reg.0 + 2), &span, &at, offset + 8, |p| p.cast::<u64>().read_unaligned());
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// `st`.
    pub fn store(&mut self, warp: &mut Warp, store: &Store, active: u32) -> Result<(), Fault> {
        warp.work += 1;
        let constants = &self.program().constants;
        let at = addresses(warp, constants, &store.address);
        let bytes = store.size * store.source.len() as u32;
        self.aligned(&at, active, bytes.min(16))?;
        if let (4, [(reg, false)], Order::Weak) = (store.size, &store.source[..], store.order) {
            return self.store_words(warp, store.space, &at, active, *reg);
        }
        // All values side by side, as memory will hold them.
        let mut values = [[0u8; 64]; 32];
        for (e, &(reg, wide)) in store.source.iter().enumerate() {
            let offset = e * store.size as usize;
            if wide {
                let words = lanes64(warp, constants, reg);
                let high = if store.size == 16 { lanes64(warp, constants, Reg(reg.0 + 2)) } else { [0; 32] };
                for lane in 0..32 {
                    values[lane][offset..offset + 8].copy_from_slice(&words[lane].to_le_bytes());
                    if store.size == 16 {
                        values[lane][offset + 8..offset + 16].copy_from_slice(&high[lane].to_le_bytes());
                    }
                }
            } else {
                let words = lanes32(warp, constants, reg);
                for lane in 0..32 {
                    values[lane][offset..offset + 4].copy_from_slice(&words[lane].to_le_bytes());
                }
            }
        }
        if store.order == Order::Strong {
            self.release_strong(warp, &at, active, store.space);
        }
        let mut left = active;
        while left != 0 {
            let span = self.span(warp, store.space, &at, left, bytes)?;
            left &= !span.lanes;
            self.writable(&span, &at)?;
            if self.config().check {
                let new = |lane: u32, byte: u32| values[lane as usize][byte as usize];
                self.check_write(warp, &span, &at, bytes, store.order == Order::Strong, new);
            } else if let Region::Global(index) = span.region {
                self.mark_written(index, &span, &at, bytes);
            }
            self.count_access(&span, &at, bytes, true);
            // SAFETY: as for loads, and `writable` refused constants and parameters.
            unsafe {
                match bytes {
                    4 => scatter::<4>(&span, &at, &values),
                    2 => scatter::<2>(&span, &at, &values),
                    8 => scatter::<8>(&span, &at, &values),
                    16 => scatter::<16>(&span, &at, &values),
                    1 => scatter::<1>(&span, &at, &values),
                    _ => {
                        for lane in lanes(span.lanes) {
                            let to = span.host(at[lane as usize], lane);
                            to.copy_from_nonoverlapping(values[lane as usize].as_ptr(), bytes as usize);
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// The store that kernels use most: one 32-bit value a lane.
    fn store_words(
        &mut self,
        warp: &mut Warp,
        space: Space,
        at: &[u64; 32],
        active: u32,
        reg: Reg,
    ) -> Result<(), Fault> {
        let words = lanes32(warp, &self.program().constants, reg);
        let mut left = active;
        while left != 0 {
            let span = self.span(warp, space, at, left, 4)?;
            left &= !span.lanes;
            self.writable(&span, at)?;
            if self.config().check {
                let new = |lane: u32, byte: u32| words[lane as usize].to_le_bytes()[byte as usize];
                self.check_write(warp, &span, at, 4, false, new);
            } else if let Region::Global(index) = span.region {
                self.mark_written(index, &span, at, 4);
            }
            self.count_access(&span, at, 4, true);
            for lane in lanes(span.lanes) {
                // SAFETY: `span` checked 4 bytes at every lane of it, `writable` that they may be written.
                unsafe { span.host(at[lane as usize], lane).cast::<u32>().write_unaligned(words[lane as usize]) };
            }
        }
        Ok(())
    }

    /// Refuses constants and parameters.
    pub fn writable(&self, span: &Span, at: &[u64; 32]) -> Result<(), Fault> {
        let constant = match span.region {
            Region::Global(index) => self.launch.snapshot[index].constant,
            Region::Param => true,
            _ => false,
        };
        if !constant {
            return Ok(());
        }
        let lane = span.lanes.trailing_zeros();
        Err(Fault::at(Kind::WriteToConstant, lane, at[lane as usize], ""))
    }

    /// A strong read of shared memory takes over what strong writes of the word published; of global memory, it makes
    /// this block one that synchronises with others.
    fn acquire_strong(&mut self, warp: &mut Warp, at: &[u64; 32], active: u32, space: Space) {
        self.polled = true;
        if matches!(space, Space::Global | Space::Generic) {
            self.fenced = true;
        }
        if self.shadow.is_some() {
            for lane in lanes(active) {
                if let Some(key) = self.strong_key(at[lane as usize], space)
                    && let Some(object) = lock(&self.strong).get(&key)
                {
                    warp.clock.acquire(object);
                }
            }
        }
    }

    fn release_strong(&mut self, warp: &mut Warp, at: &[u64; 32], active: u32, space: Space) {
        if self.shadow.is_some() {
            for lane in lanes(active) {
                if let Some(key) = self.strong_key(at[lane as usize], space) {
                    warp.clock.release(lock(&self.strong).entry(key).or_default());
                }
            }
        }
    }

    /// Rank and word of a strong access to shared memory; `None` for other memory.
    pub fn strong_key(&self, address: u64, space: Space) -> Option<(u32, u32)> {
        let shared = match space {
            Space::Shared | Space::SharedCluster => true,
            Space::Generic => layout::within(address, layout::SHARED),
            _ => false,
        };
        let offset = address as u32;
        let rank = (offset >> layout::CLUSTER_SHIFT).checked_sub(1).unwrap_or_else(|| self.cluster_rank());
        shared.then_some((rank, (offset & ((1 << layout::CLUSTER_SHIFT) - 1)) / 4))
    }
}

/// # Safety
/// Every lane of the span has 4 readable bytes at `offset` from its address.
#[inline(always)]
unsafe fn gather32(warp: &mut Warp, reg: Reg, span: &Span, at: &[u64; 32], offset: usize) {
    if span.lanes == u32::MAX {
        let mut out = [0u32; 32];
        let stride = at[1].wrapping_sub(at[0]);
        let contiguous =
            stride == 4 && (0..32).all(|i| at[i] == at[0].wrapping_add(4 * i as u64)) && span.region != Region::Local;
        // SAFETY: the caller's promise; contiguous lanes together are one range of 128 bytes.
        unsafe {
            if contiguous {
                out = span.host(at[0], 0).add(offset).cast::<[u32; 32]>().read_unaligned();
            } else {
                for i in 0..32 {
                    out[i] = span.host(at[i], i as u32).add(offset).cast::<u32>().read_unaligned();
                }
            }
        }
        warp.slots[reg.0 as usize].0 = out;
        return;
    }
    // SAFETY: the caller's promise.
    unsafe { each(warp, reg, span, at, offset, |p| p.cast::<u32>().read_unaligned()) }
}

/// # Safety
/// `read` may read at `offset` from the address of every lane of the span.
#[inline(always)]
unsafe fn each(warp: &mut Warp, reg: Reg, span: &Span, at: &[u64; 32], offset: usize, read: impl Fn(*mut u8) -> u32) {
    let mut out = [0; 32];
    for lane in lanes(span.lanes) {
        out[lane as usize] = read(span.host(at[lane as usize], lane).wrapping_add(offset));
    }
    set32(warp, reg, &out, span.lanes);
}

/// # Safety
/// As [`each`].
#[inline(always)]
unsafe fn each64(warp: &mut Warp, reg: Reg, span: &Span, at: &[u64; 32], offset: usize, read: impl Fn(*mut u8) -> u64) {
    let mut out = [0; 32];
    for lane in lanes(span.lanes) {
        out[lane as usize] = read(span.host(at[lane as usize], lane).wrapping_add(offset));
    }
    super::step::set64(warp, reg, &out, span.lanes);
}

/// # Safety
/// Every lane of the span has N writable bytes at its address.
#[inline(always)]
unsafe fn scatter<const N: usize>(span: &Span, at: &[u64; 32], values: &[[u8; 64]; 32]) {
    for lane in lanes(span.lanes) {
        // SAFETY: the caller's promise.
        unsafe {
            span.host(at[lane as usize], lane)
                .cast::<[u8; N]>()
                .write(values[lane as usize][..N].try_into().unwrap_or([0; N]))
        };
    }
}
