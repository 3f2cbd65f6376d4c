//! Device memory: allocations in an address space of the emulator's own.
//!
//! Addresses are handed out in order, with gaps that catch overruns, and never again after a free, so that a stale pointer
//! is known for what it is. The host never dereferences a device address; kernels and copies translate through
//! [`Allocation`]. Fresh memory holds 0xCD, and a flag per byte tells what has been written since.

pub mod layout;
pub mod tensor_map;

use std::alloc::Layout;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::checks::{Finding, Kind};

/// First address handed out.
const FIRST: u64 = 0x7_0000_0000;
/// Alignment of allocations, that of a driver.
const ALIGN: u64 = 512;

/// A live allocation.
#[derive(Debug)]
pub struct Allocation {
    /// Its first device address.
    pub base: u64,
    /// Its size, bytes.
    pub bytes: u64,
    /// Its number, from 1.
    pub id: u64,
    /// A name for reports: a variable's, or empty.
    pub name: String,
    /// Bytes of the device's memory that it takes: none for host memory.
    taken: u64,
    /// Kernels may not write it (`.const`).
    pub constant: bool,
    data: *mut u8,
    flags: *mut u8,
}

// SAFETY: `data` and `flags` are memory that only this value owns; kernels and copies race on it only as the emulated
// program races, through raw pointers and without references.
unsafe impl Send for Allocation {}
// SAFETY: as above.
unsafe impl Sync for Allocation {}

fn layout(bytes: u64) -> Option<Layout> {
    Layout::from_size_align(usize::try_from(bytes).ok()?.max(1), 256).ok()
}

impl Allocation {
    fn new(base: u64, bytes: u64, id: u64, name: String, track: bool) -> Option<Self> {
        let layout = layout(bytes)?;
        // SAFETY: the size is not zero.
        let data = unsafe { std::alloc::alloc_zeroed(layout) };
        if data.is_null() {
            return None;
        }
        let mut flags = std::ptr::null_mut();
        if track {
            // SAFETY: the size is not zero; `data` has `layout.size()` bytes.
            unsafe {
                flags = std::alloc::alloc_zeroed(layout);
                if flags.is_null() {
                    std::alloc::dealloc(data, layout);
                    return None;
                }
                data.write_bytes(0xcd, layout.size());
            }
        }
        Some(Allocation { base, bytes, id, name, taken: bytes, constant: false, data, flags })
    }

    /// Host address of a device address inside the allocation.
    #[inline]
    pub fn host(&self, address: u64) -> *mut u8 {
        self.data.wrapping_add((address - self.base) as usize)
    }

    /// Flags of a device address, one byte each, 1 where written; null when not tracked.
    #[inline]
    pub fn flags(&self, address: u64) -> *mut u8 {
        if self.flags.is_null() { self.flags } else { self.flags.wrapping_add((address - self.base) as usize) }
    }

    /// Whether `[address, address + n)` lies inside.
    #[inline]
    pub fn contains(&self, address: u64, n: u64) -> bool {
        address >= self.base && address - self.base <= self.bytes && n <= self.bytes - (address - self.base)
    }

    /// Marks bytes as written.
    pub fn mark_written(&self, address: u64, n: u64) {
        if !self.flags.is_null() && self.contains(address, n) {
            // SAFETY: inside the allocation, checked just above.
            unsafe { self.flags(address).write_bytes(1, n as usize) };
        }
    }

    /// For reports.
    pub fn describe(&self) -> String {
        let name = if self.name.is_empty() { String::new() } else { format!(" `{}`", self.name) };
        format!("allocation {}{name} of {} bytes at {:#x}", self.id, self.bytes, self.base)
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        if let Some(layout) = layout(self.bytes) {
            // SAFETY: both came from the allocator with this layout.
            unsafe {
                std::alloc::dealloc(self.data, layout);
                if !self.flags.is_null() {
                    std::alloc::dealloc(self.flags, layout);
                }
            }
        }
    }
}

/// The allocations at one moment, ordered by address.
pub type Snapshot = Arc<[Arc<Allocation>]>;

#[derive(Debug, Default)]
struct State {
    live: BTreeMap<u64, Arc<Allocation>>,
    freed: BTreeMap<u64, (u64, String)>,
    next: u64,
    count: u64,
    used: u64,
    snapshot: Option<Snapshot>,
}

/// The device's memory.
#[derive(Debug)]
pub struct Memory {
    state: Mutex<State>,
    capacity: u64,
    track: bool,
}

impl Memory {
    /// Memory of `capacity` bytes; `track` keeps the flags that find uninitialised reads.
    pub fn new(capacity: u64, track: bool) -> Self {
        Memory { state: Mutex::new(State { next: FIRST, ..State::default() }), capacity, track }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere cannot leave the maps half-written: every change is one insertion or removal.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Allocates; `None` if the device has not that much left.
    pub fn allocate(&self, bytes: u64, name: &str, constant: bool) -> Option<Arc<Allocation>> {
        let mut state = self.state();
        if bytes > self.capacity.saturating_sub(state.used) {
            return None;
        }
        let mut allocation = Allocation::new(state.next, bytes, state.count + 1, name.to_string(), self.track)?;
        allocation.constant = constant;
        let allocation = Arc::new(allocation);
        state.count += 1;
        state.next += bytes.div_ceil(ALIGN) * ALIGN + ALIGN;
        state.used += bytes;
        state.live.insert(allocation.base, allocation.clone());
        state.snapshot = None;
        Some(allocation)
    }

    /// Allocates memory that host and device share: its device address is its host address. All of it counts as written,
    /// for nobody sees the host write. `on_device`: it takes of the device's memory (managed, not pinned).
    pub fn allocate_shared(&self, bytes: u64, name: &str, on_device: bool) -> Option<Arc<Allocation>> {
        let mut state = self.state();
        let mut allocation = Allocation::new(0, bytes, state.count + 1, name.to_string(), false)?;
        allocation.base = allocation.data as u64;
        allocation.taken = if on_device { bytes } else { 0 };
        let allocation = Arc::new(allocation);
        state.count += 1;
        state.freed.remove(&allocation.base);
        state.used += allocation.taken;
        state.live.insert(allocation.base, allocation.clone());
        state.snapshot = None;
        Some(allocation)
    }

    /// Frees everything: the end of a context.
    pub fn clear(&self) {
        let mut state = self.state();
        let live = std::mem::take(&mut state.live);
        for (address, gone) in live {
            state.freed.insert(address, (gone.bytes, gone.describe()));
        }
        state.used = 0;
        state.snapshot = None;
    }

    /// Frees the allocation that starts at `address`.
    pub fn free(&self, address: u64) -> Result<(), Box<Finding>> {
        let mut state = self.state();
        if let Some(gone) = state.live.remove(&address) {
            state.used -= gone.taken;
            state.freed.insert(address, (gone.bytes, gone.describe()));
            state.snapshot = None;
            return Ok(());
        }
        let (kind, allocation) = match state.freed.get(&address) {
            Some((_, description)) => (Kind::DoubleFree, Some(description.clone())),
            None => (Kind::OutOfBounds, None),
        };
        let detail =
            if allocation.is_some() { "freed before" } else { "free of an address that no allocation starts at" };
        drop(state);
        Err(Box::new(host_finding(kind, Some(address), allocation, detail)))
    }

    /// Bytes allocated and bytes there are.
    pub fn usage(&self) -> (u64, u64) {
        (self.state().used, self.capacity)
    }

    /// The allocations now.
    pub fn snapshot(&self) -> Snapshot {
        let mut state = self.state();
        if let Some(snapshot) = &state.snapshot {
            return snapshot.clone();
        }
        let snapshot: Snapshot = state.live.values().cloned().collect();
        state.snapshot = Some(snapshot.clone());
        snapshot
    }

    /// The allocation that holds `[address, address + n)`.
    pub fn find(&self, address: u64, n: u64) -> Option<Arc<Allocation>> {
        let state = self.state();
        let (_, found) = state.live.range(..=address).next_back()?;
        found.contains(address, n).then(|| found.clone())
    }

    /// What is known of an address that no live allocation holds: the kind of error, and the allocation meant.
    pub fn explain(&self, address: u64) -> (Kind, String) {
        let state = self.state();
        if let Some((base, (bytes, description))) = state.freed.range(..=address).next_back()
            && address - base < (*bytes).max(1)
        {
            return (Kind::UseAfterFree, format!("in freed {description}"));
        }
        let below = state.live.range(..=address).next_back().map(|(_, a)| a);
        let above = state.live.range(address..).next().map(|(_, a)| a);
        let text = match (below, above) {
            (Some(a), _) if address - (a.base + a.bytes).min(address) < 1 << 20 => {
                format!("{} bytes past the end of {}", address.saturating_sub(a.base + a.bytes), a.describe())
            }
            (_, Some(a)) if a.base - address < 1 << 20 => format!("{} bytes before {}", a.base - address, a.describe()),
            _ => "far from every allocation".to_string(),
        };
        (Kind::OutOfBounds, text)
    }

    /// Allocations without a name that are still live: leaks, when a context ends.
    pub fn leaks(&self) -> Vec<Finding> {
        let state = self.state();
        let leaked = state.live.values().filter(|a| a.name.is_empty());
        leaked
            .map(|a| host_finding(Kind::Leak, Some(a.base), Some(a.describe()), "still allocated at the end"))
            .collect()
    }
}

/// A finding that no kernel is to blame for.
pub fn host_finding(kind: Kind, address: Option<u64>, allocation: Option<String>, detail: &str) -> Finding {
    Finding {
        kind,
        kernel: String::new(),
        block: [0; 3],
        thread: [0; 3],
        ptx_line: 0,
        source: None,
        address,
        allocation,
        detail: detail.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn freed_addresses_are_remembered_and_not_reused() {
        let memory = Memory::new(1 << 20, true);
        let a = memory.allocate(100, "", false).unwrap();
        let base = a.base;
        assert!(memory.find(base + 96, 4).is_some() && memory.find(base + 97, 4).is_none());
        assert_eq!(memory.explain(base + 100).0, Kind::OutOfBounds);
        assert!(memory.explain(base + 104).1.starts_with("4 bytes past the end of allocation 1"));
        memory.free(base).unwrap();
        assert_eq!(memory.free(base).unwrap_err().kind, Kind::DoubleFree);
        assert_eq!(memory.explain(base + 5).0, Kind::UseAfterFree);
        assert_ne!(memory.allocate(100, "", false).unwrap().base, base);
        assert_eq!(memory.leaks().len(), 1);
        assert!(memory.allocate(1 << 20, "", false).is_none(), "only what is left");
    }
}
