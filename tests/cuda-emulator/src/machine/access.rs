//! From lane addresses to host memory: state spaces, bounds, alignment, and the checks of each access.
//!
//! An access is resolved a span at a time: all active lanes that fall into one allocation (or window) as the first do.
//! Nearly always that is all of them, and one comparison of the lowest and highest address covers the warp.

use std::sync::atomic::Ordering;

use super::block::Block;
use super::step::{lanes32, lanes64};
use super::warp::{Warp, lanes};
use crate::checks::global_race::{Access, GlobalShadow};
use crate::checks::shared_race::{Conflict, SharedShadow};
use crate::checks::{Fault, Kind};
use crate::memory::layout;
use crate::program::{Address, Slot};
use crate::ptx::types::Space;

/// Where a span lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Region {
    /// An allocation by its index in the snapshot.
    Global(usize),
    /// This block's shared memory.
    Shared,
    /// Shared memory of the cluster's block of a rank.
    Peer(usize),
    /// The thread's local memory.
    Local,
    /// The kernel's parameters.
    Param,
}

/// Lanes whose addresses lie in one region.
#[derive(Debug, Clone, Copy)]
pub struct Span {
    /// The region.
    pub region: Region,
    /// The lanes.
    pub lanes: u32,
    pub(super) base: *mut u8,
    pub(super) stride: usize,
    /// Subtracted from an address to give the offset in the region.
    pub origin: u64,
}

impl Span {
    /// Host address of a lane's address.
    #[inline(always)]
    pub fn host(&self, address: u64, lane: u32) -> *mut u8 {
        self.base.wrapping_add((address - self.origin) as usize).wrapping_add(self.stride * lane as usize)
    }
}

/// Whether a generic address belongs to a space.
pub fn is_space(address: u64, space: Space) -> bool {
    let shared = layout::within(address, layout::SHARED);
    let local = layout::within(address, layout::LOCAL);
    let param = layout::within(address, layout::PARAM);
    match space {
        Space::Shared => shared && (address - layout::SHARED) >> layout::CLUSTER_SHIFT == 0,
        Space::SharedCluster => shared,
        Space::Local => local,
        Space::Param => param,
        Space::Global => !shared && !local && !param,
        Space::Const | Space::Generic => false,
    }
}

/// Lane addresses of an operand.
#[inline(always)]
pub fn addresses(warp: &Warp, constants: &[Slot], address: &Address) -> [u64; 32] {
    let offset = address.offset as u64;
    match address.base {
        None => [offset; 32],
        Some(reg) if address.wide => lanes64(warp, constants, reg).map(|a| a.wrapping_add(offset)),
        // 32-bit addresses are offsets of shared, local or constant windows and wrap at 32 bits.
        Some(reg) => lanes32(warp, constants, reg).map(|a| u64::from(a.wrapping_add(offset as u32))),
    }
}

impl Block<'_> {
    /// The first span of an access of `bytes` bytes at the lanes of `mask`.
    #[inline(always)]
    pub fn span(
        &mut self,
        warp: &mut Warp,
        space: Space,
        at: &[u64; 32],
        mask: u32,
        bytes: u32,
    ) -> Result<Span, Fault> {
        let leader = mask.trailing_zeros();
        let first = at[leader as usize];
        if matches!(space, Space::Global | Space::Generic | Space::Const) {
            let cached = self.cache[warp.pc as usize] as usize;
            if let Some(allocation) = self.launch.snapshot.get(cached)
                && allocation.contains(first, u64::from(bytes))
            {
                let base = allocation.host(allocation.base);
                return Ok(in_range(at, mask, Region::Global(cached), base, allocation.base, allocation.bytes, bytes));
            }
        }
        self.find_span(warp, space, at, mask, bytes)
    }

    fn find_span(
        &mut self,
        warp: &mut Warp,
        space: Space,
        at: &[u64; 32],
        mask: u32,
        bytes: u32,
    ) -> Result<Span, Fault> {
        let leader = mask.trailing_zeros();
        let first = at[leader as usize];
        let inside = |origin: u64, size: u64| {
            let offset = first.wrapping_sub(origin);
            offset <= size && u64::from(bytes) <= size - offset
        };
        let window =
            |origin: u64| if matches!(space, Space::Generic) || layout::within(first, origin) { origin } else { 0 };
        let is_shared = matches!(space, Space::Shared | Space::SharedCluster)
            || space == Space::Generic && layout::within(first, layout::SHARED);
        if is_shared {
            let origin = window(layout::SHARED);
            let rank = first.wrapping_sub(origin) >> layout::CLUSTER_SHIFT;
            if rank > 0 && rank <= self.peers.len() as u64 {
                let peer = &self.peers[rank as usize - 1];
                let (base, size) = (peer.base, u64::from(peer.bytes));
                let origin = origin + (rank << layout::CLUSTER_SHIFT);
                if peer.gone.load(Ordering::Relaxed) {
                    let detail = format!("the cluster's block {} has exited: its shared memory is gone", rank - 1);
                    return Err(Fault::at(Kind::UseAfterFree, leader, layout::SHARED + first - origin, detail));
                }
                if inside(origin, size) {
                    let own = rank - 1 == u64::from(self.cluster_rank());
                    let region = if own { Region::Shared } else { Region::Peer(rank as usize - 1) };
                    return Ok(in_range(at, mask, region, base, origin, size, bytes));
                }
            }
            let size = u64::from(self.shared_bytes);
            if !inside(origin, size) {
                let address = layout::SHARED + first.wrapping_sub(origin);
                let detail = format!(
                    "{bytes} bytes at offset {:#x} of shared memory of {size} bytes",
                    first.wrapping_sub(origin)
                );
                return Err(Fault::at(Kind::OutOfBounds, leader, address, detail));
            }
            let base = self.shared_base();
            return Ok(in_range(at, mask, Region::Shared, base, origin, size, bytes));
        }
        if space == Space::Local || space == Space::Generic && layout::within(first, layout::LOCAL) {
            let origin = window(layout::LOCAL);
            let size = u64::from(self.program().local_bytes);
            if !inside(origin, size) {
                let detail = format!(
                    "{bytes} bytes at offset {:#x} of local memory of {size} bytes",
                    first.wrapping_sub(origin)
                );
                return Err(Fault::at(Kind::OutOfBounds, leader, layout::LOCAL + first.wrapping_sub(origin), detail));
            }
            let base = warp.local.as_mut_ptr();
            let span = in_range(at, mask, Region::Local, base, origin, size, bytes);
            return Ok(Span { stride: size as usize, ..span });
        }
        if space == Space::Param || space == Space::Generic && layout::within(first, layout::PARAM) {
            let origin = window(layout::PARAM);
            let size = self.launch.params.len() as u64;
            if !inside(origin, size) {
                let detail =
                    format!("{bytes} bytes at offset {:#x} of {size} bytes of parameters", first.wrapping_sub(origin));
                return Err(Fault::at(Kind::OutOfBounds, leader, first, detail));
            }
            // Stores to parameters are refused before they get here.
            let base = self.launch.params.as_ptr().cast_mut();
            return Ok(in_range(at, mask, Region::Param, base, origin, size, bytes));
        }
        let snapshot = &self.launch.snapshot;
        let index = snapshot.partition_point(|a| a.base <= first).wrapping_sub(1);
        match snapshot.get(index) {
            Some(allocation) if allocation.contains(first, u64::from(bytes)) => {
                self.cache[warp.pc as usize] = index as u32;
                let base = allocation.host(allocation.base);
                Ok(in_range(at, mask, Region::Global(index), base, allocation.base, allocation.bytes, bytes))
            }
            _ => {
                let (kind, text) = self.launch.memory.explain(first);
                let mut fault = Fault::at(kind, leader, first, format!("{bytes} bytes"));
                fault.allocation = Some(text);
                Err(fault)
            }
        }
    }

    /// Every active address is a multiple of `bytes`.
    #[inline(always)]
    pub fn aligned(&self, at: &[u64; 32], mask: u32, bytes: u32) -> Result<(), Fault> {
        let low = u64::from(bytes) - 1;
        let mut all = 0;
        for (i, address) in at.iter().enumerate() {
            all |= if mask >> i & 1 == 1 { *address } else { 0 };
        }
        if all & low == 0 {
            return Ok(());
        }
        let lane = lanes(mask).find(|l| at[*l as usize] & low != 0).unwrap_or(0);
        Err(Fault::at(Kind::Misaligned, lane, at[lane as usize], format!("access of {bytes} bytes")))
    }

    /// The shadow of shared memory, this block's or another's of the cluster.
    pub fn shadow_of(&mut self, region: Region) -> Option<&mut SharedShadow> {
        match region {
            Region::Shared => self.shadow.as_deref_mut(),
            // SAFETY: shadows keep their place while the launch lives, and the blocks of a cluster run on one thread: nobody
            // else uses it now.
            Region::Peer(rank) => self.peers[rank].shadow.map(|shadow| unsafe { &mut *shadow }),
            _ => None,
        }
    }

    /// The shadow of an allocation for this launch.
    pub fn global_shadow(&self, index: usize) -> &GlobalShadow {
        self.launch.shadows[index].get_or_init(|| GlobalShadow::new(self.launch.snapshot[index].bytes))
    }

    /// Checks and records reads of a span.
    pub fn check_read(&mut self, warp: &Warp, span: &Span, at: &[u64; 32], bytes: u32, strong: bool) {
        match span.region {
            Region::Shared | Region::Peer(_) => {
                let Some(shadow) = self.shadow_of(span.region) else { return };
                let mut found = None;
                for lane in lanes(span.lanes) {
                    let offset = (at[lane as usize] - span.origin) as u32;
                    if let Some(conflict) = shadow.read(&warp.clock, lane, offset, bytes, strong)
                        && found.is_none()
                    {
                        found = Some((lane, conflict));
                    }
                }
                if let Some((lane, conflict)) = found {
                    self.report_shared(warp, lane, conflict, false);
                }
            }
            Region::Global(index) => {
                self.check_global(warp, index, span, at, bytes, if strong { Access::Strong } else { Access::Read })
            }
            _ => {}
        }
    }

    fn check_global(&mut self, warp: &Warp, index: usize, span: &Span, at: &[u64; 32], bytes: u32, access: Access) {
        let judge = !self.fenced;
        let block = self.linear;
        let launch = self.launch;
        let allocation = &launch.snapshot[index];
        let (mut raced, mut unread) = (None, None);
        let shadow = self.global_shadow(index);
        for lane in lanes(span.lanes) {
            let address = at[lane as usize];
            if access != Access::Write {
                let flags = allocation.flags(address);
                // SAFETY: the span's lanes lie inside the allocation; flags have its size.
                let written = flags.is_null()
                    || unsafe { std::slice::from_raw_parts(flags, bytes as usize) }.iter().all(|f| *f != 0);
                if !written && unread.is_none() {
                    unread = Some((lane, address));
                }
            }
            // Constants are read by all and written by none.
            if !allocation.constant
                && let Some(conflict) = shadow.access(block, address - allocation.base, bytes, access, judge)
                && raced.is_none()
            {
                raced = Some((lane, conflict));
            }
        }
        if let Some((lane, address)) = unread {
            let fault = Fault::at(
                Kind::UninitializedGlobal,
                lane,
                address,
                "nothing has written these bytes since the allocation",
            );
            self.report(warp, warp.pc, fault);
        }
        if let Some((lane, conflict)) = raced {
            let other = match conflict.other {
                Some(linear) => format!("block {:?}", launch.block_at(linear)),
                None => "several other blocks".to_string(),
            };
            let (mine, theirs) = (
                if access == Access::Write { "writes" } else { "reads" },
                if conflict.other_wrote { "wrote" } else { "read" },
            );
            let detail = format!("this block {mine} what {other} {theirs}; no order between them");
            self.report(warp, warp.pc, Fault::at(Kind::GlobalRace, lane, allocation.base + conflict.offset, detail));
        }
    }

    /// Checks and records writes of a span; the memory still holds the old bytes, `new` tells the byte to be written.
    pub fn check_write(
        &mut self,
        warp: &Warp,
        span: &Span,
        at: &[u64; 32],
        bytes: u32,
        strong: bool,
        new: impl Fn(u32, u32) -> u8,
    ) {
        match span.region {
            Region::Shared | Region::Peer(_) => {
                let Some(shadow) = self.shadow_of(span.region) else { return };
                let base = span.base;
                let mut found = None;
                for lane in lanes(span.lanes) {
                    let offset = (at[lane as usize] - span.origin) as u32;
                    // SAFETY: the span lies inside shared memory.
                    let same = |byte: u32| unsafe { *base.add(byte as usize) } == new(lane, byte - offset);
                    if let Some(conflict) = shadow.write(&warp.clock, lane, offset, bytes, strong, same)
                        && found.is_none()
                    {
                        found = Some((lane, conflict));
                    }
                    // Later lanes of this instruction compare with what this one writes.
                    for byte in 0..bytes {
                        // SAFETY: as above; the store proper writes the same bytes.
                        unsafe { *base.add((offset + byte) as usize) = new(lane, byte) };
                    }
                }
                if let Some((lane, conflict)) = found {
                    self.report_shared(warp, lane, conflict, true);
                }
            }
            Region::Global(index) => {
                self.check_global(warp, index, span, at, bytes, if strong { Access::Strong } else { Access::Write });
                self.mark_written(index, span, at, bytes);
            }
            _ => {}
        }
    }

    /// Marks global bytes as initialised.
    pub fn mark_written(&self, index: usize, span: &Span, at: &[u64; 32], bytes: u32) {
        let allocation = &self.launch.snapshot[index];
        for lane in lanes(span.lanes) {
            allocation.mark_written(at[lane as usize], u64::from(bytes));
        }
    }

    /// Reports a conflict in shared memory.
    pub fn report_shared(&mut self, warp: &Warp, lane: u32, conflict: Conflict, writes: bool) {
        let mine = if writes { "writes" } else { "reads" };
        let mut other = match conflict.other {
            Some(thread) => {
                let [x, y, z] = self.thread_at(thread);
                format!("thread ({x},{y},{z})")
            }
            None => "several other threads".to_string(),
        };
        if conflict.rank != self.cluster_rank() {
            let which = if conflict.other.is_some() { format!("{other} of ") } else { String::new() };
            other = format!("{which}the cluster's block {}", conflict.rank);
        }
        let detail = match conflict.kind {
            Kind::UninitializedShared => "nothing has written these bytes in this block".to_string(),
            Kind::AsyncCopyNotWaited if !conflict.other_wrote => {
                format!("this thread writes the source of a copy of {other} that has not been waited for")
            }
            Kind::MissingProxyFence => {
                format!("the asynchronous proxy reads what {other} wrote; no proxy fence between them")
            }
            Kind::AsyncCopyNotWaited => {
                format!("this thread {mine} the target of a copy of {other} that has not been waited for")
            }
            _ => {
                let theirs = if conflict.other_wrote { "wrote" } else { "read" };
                format!("this thread {mine} what {other} {theirs}; no barrier between them")
            }
        };
        self.report(warp, warp.pc, Fault::at(conflict.kind, lane, layout::SHARED + u64::from(conflict.offset), detail));
    }
}

#[inline(always)]
fn in_range(at: &[u64; 32], mask: u32, region: Region, base: *mut u8, origin: u64, size: u64, bytes: u32) -> Span {
    // The leader fits, so `size >= bytes`: a lane fits if its offset is at most the difference.
    let room = size - u64::from(bytes);
    let mut fit = 0u32;
    for (i, address) in at.iter().enumerate() {
        fit |= u32::from(address.wrapping_sub(origin) <= room) << i;
    }
    Span { region, lanes: mask & fit, base, stride: 0, origin }
}
