//! Allocation, copies, fills, host memory, pools.

use std::ffi::{c_int, c_uint, c_void};

use super::stream::enqueue;
use super::{Driver, Handle, driver_calls, error, lock, store};
use crate::memory::Allocation;

/// The one memory pool's handle.
const POOL: usize = 0x900_1000;

/// Parameters of `cuMemcpy2D`: `CUDA_MEMCPY2D`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Copy2D {
    src_x: usize,
    src_y: usize,
    src_type: c_uint,
    src_host: *const c_void,
    src_device: u64,
    src_array: Handle,
    src_pitch: usize,
    dst_x: usize,
    dst_y: usize,
    dst_type: c_uint,
    dst_host: *mut c_void,
    dst_device: u64,
    dst_array: Handle,
    dst_pitch: usize,
    width: usize,
    height: usize,
}

/// One end of a copy.
#[derive(Clone, Copy)]
enum End {
    Host(usize),
    Device(u64),
}

impl Driver {
    fn allocation(&self, address: u64, bytes: usize) -> Option<std::sync::Arc<Allocation>> {
        self.device.memory.find(address, bytes as u64)
    }

    fn transfer(&self, to: End, from: End, bytes: usize) -> u32 {
        if self.sticky() != 0 {
            return self.sticky();
        }
        if bytes == 0 {
            return error::SUCCESS;
        }
        let place = |end: End| match end {
            End::Host(address) => (address != 0).then_some((address as *mut u8, None)),
            End::Device(address) => self.allocation(address, bytes).map(|a| (a.host(address), Some((a, address)))),
        };
        let (Some((to, target)), Some((from, source))) = (place(to), place(from)) else {
            eprintln!("[cuda-emulator] a copy of {bytes} bytes leaves its allocation, or starts at a null pointer");
            return error::INVALID_VALUE;
        };
        // SAFETY: device ranges were found in live allocations (kept by the Arcs); host ranges are the caller's.
        unsafe { to.copy_from(from, bytes) };
        match (target, source) {
            (Some((to, at)), Some((from, start))) if !from.flags(start).is_null() && !to.flags(at).is_null() => {
                // Copies of uninitialised bytes stay uninitialised.
                // SAFETY: flags have the size of their allocation, in which the range lies.
                unsafe { to.flags(at).copy_from(from.flags(start), bytes) };
            }
            (Some((to, at)), _) => to.mark_written(at, bytes as u64),
            _ => {}
        }
        error::SUCCESS
    }

    fn fill(&self, to: u64, pattern: &[u8], count: usize) -> u32 {
        if self.sticky() != 0 {
            return self.sticky();
        }
        let Some(bytes) = count.checked_mul(pattern.len()) else { return error::INVALID_VALUE };
        if bytes == 0 {
            return error::SUCCESS;
        }
        let Some(allocation) = self.allocation(to, bytes) else { return error::INVALID_VALUE };
        // SAFETY: the range lies in the allocation.
        let target = unsafe { std::slice::from_raw_parts_mut(allocation.host(to), bytes) };
        target.chunks_exact_mut(pattern.len()).for_each(|c| c.copy_from_slice(pattern));
        allocation.mark_written(to, bytes as u64);
        error::SUCCESS
    }

    unsafe fn allocate(&self, address: *mut u64, bytes: usize) -> u32 {
        if bytes == 0 || address.is_null() {
            return error::INVALID_VALUE;
        }
        match self.device.memory.allocate(bytes as u64, "", false) {
            // SAFETY: not null.
            Some(allocation) => unsafe { store(address, allocation.base) },
            None => error::OUT_OF_MEMORY,
        }
    }

    fn free(&self, address: u64) -> u32 {
        if address == 0 {
            return error::SUCCESS;
        }
        match self.device.memory.free(address) {
            Ok(()) => error::SUCCESS,
            Err(finding) => {
                eprintln!("[cuda-emulator] {finding}");
                error::INVALID_VALUE
            }
        }
    }

    unsafe fn allocate_pinned(&self, address: *mut u64, bytes: usize) -> u32 {
        // SAFETY: the caller's promise.
        unsafe { self.allocate_shared(address, bytes, "pinned host memory", false) }
    }

    unsafe fn allocate_shared(&self, address: *mut u64, bytes: usize, name: &str, on_device: bool) -> u32 {
        if bytes == 0 || address.is_null() {
            return error::INVALID_VALUE;
        }
        match self.device.memory.allocate_shared(bytes as u64, name, on_device) {
            // SAFETY: not null.
            Some(allocation) => unsafe { store(address, allocation.base) },
            None => error::OUT_OF_MEMORY,
        }
    }

    fn copy_2d(&self, c: &Copy2D) -> u32 {
        let end = |kind: c_uint, host: usize, device: u64| match kind {
            1 => Some(End::Host(host)),
            2 | 4 => Some(End::Device(device)),
            _ => None,
        };
        let (Some(from), Some(to)) =
            (end(c.src_type, c.src_host as usize, c.src_device), end(c.dst_type, c.dst_host as usize, c.dst_device))
        else {
            return error::NOT_SUPPORTED;
        };
        let shift = |end: End, by: usize| match end {
            End::Host(a) => End::Host(a + by),
            End::Device(a) => End::Device(a + by as u64),
        };
        for row in 0..c.height {
            let code = self.transfer(
                shift(to, (c.dst_y + row) * c.dst_pitch + c.dst_x),
                shift(from, (c.src_y + row) * c.src_pitch + c.src_x),
                c.width,
            );
            if code != 0 {
                return code;
            }
        }
        error::SUCCESS
    }
}

/// Goes on if nothing was refused.
fn guarded(code: u32, work: impl FnOnce() -> u32) -> u32 {
    if code == error::SUCCESS { work() } else { code }
}

/// Allocation as the work of a graph is not there.
fn pool_in_capture(d: &Driver, stream: Handle) -> u32 {
    if !d.is_captured(stream) {
        return error::SUCCESS;
    }
    eprintln!("[cuda-emulator] graphs that allocate or free memory are not supported");
    error::NOT_SUPPORTED
}

driver_calls! { lookup:
    fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) |d| {
        let (used, capacity) = d.device.memory.usage();
        store(free, capacity.saturating_sub(used) as usize);
        store(total, capacity as usize)
    }
    fn cuMemAlloc_v2(address: *mut u64, bytes: usize) |d| { guarded(d.unsafe_in_capture("cuMemAlloc"), || d.allocate(address, bytes)) }
    fn cuMemAllocAsync(address: *mut u64, bytes: usize, stream: Handle) |d| { guarded(pool_in_capture(d, stream), || d.allocate(address, bytes)) }
    fn cuMemAllocFromPoolAsync(address: *mut u64, bytes: usize, _pool: Handle, stream: Handle) |d| { guarded(pool_in_capture(d, stream), || d.allocate(address, bytes)) }
    fn cuMemAllocPitch_v2(address: *mut u64, pitch: *mut usize, width: usize, height: usize, _element: c_uint) |d| {
        let row = width.next_multiple_of(512);
        store(pitch, row);
        match row.checked_mul(height) {
            Some(bytes) => guarded(d.unsafe_in_capture("cuMemAllocPitch"), || d.allocate(address, bytes)),
            None => error::OUT_OF_MEMORY,
        }
    }
    fn cuMemAllocManaged(address: *mut u64, bytes: usize, _flags: c_uint) |d| { guarded(d.unsafe_in_capture("cuMemAllocManaged"), || d.allocate_shared(address, bytes, "", true)) }
    fn cuMemFree_v2(address: u64) |d| { guarded(d.unsafe_in_capture("cuMemFree"), || d.free(address)) }
    fn cuMemFreeAsync(address: u64, stream: Handle) |d| { guarded(pool_in_capture(d, stream), || d.free(address)) }
    fn cuMemHostAlloc(host: *mut Handle, bytes: usize, _flags: c_uint) |d| { guarded(d.unsafe_in_capture("cuMemHostAlloc"), || d.allocate_pinned(host.cast(), bytes)) }
    fn cuMemAllocHost_v2(host: *mut Handle, bytes: usize) |d| { guarded(d.unsafe_in_capture("cuMemAllocHost"), || d.allocate_pinned(host.cast(), bytes)) }
    fn cuMemFreeHost(host: Handle) |d| { guarded(d.unsafe_in_capture("cuMemFreeHost"), || d.free(host as u64)) }
    fn cuMemHostGetDevicePointer_v2(address: *mut u64, host: Handle, _flags: c_uint) |_d| { store(address, host as u64) }
    fn cuMemHostGetFlags(flags: *mut c_uint, _host: Handle) |_d| { store(flags, 0) }
    fn cuMemHostRegister_v2(_host: Handle, _bytes: usize, _flags: c_uint) |_d| { error::SUCCESS }
    fn cuMemHostUnregister(_host: Handle) |_d| { error::SUCCESS }
    fn cuMemGetAddressRange_v2(base: *mut u64, bytes: *mut usize, address: u64) |d| {
        let Some(a) = d.allocation(address, 1) else { return error::NOT_FOUND };
        if !base.is_null() {
            store(base, a.base);
        }
        if bytes.is_null() { error::SUCCESS } else { store(bytes, a.bytes as usize) }
    }
    fn cuMemAdvise_v2(_address: u64, _bytes: usize, _advice: c_uint, _kind: c_uint, _id: c_int) |_d| { error::SUCCESS }
    fn cuMemPrefetchAsync_v2(_address: u64, _bytes: usize, _kind: c_uint, _id: c_int, _flags: c_uint, _stream: Handle) |_d| { error::SUCCESS }
    fn cuStreamAttachMemAsync(_stream: Handle, _address: u64, _bytes: usize, _flags: c_uint) |_d| { error::SUCCESS }
    fn cuMemcpy(to: u64, from: u64, bytes: usize) |d| {
        let end = |a: u64| if d.allocation(a, 1).is_some() { End::Device(a) } else { End::Host(a as usize) };
        guarded(d.synchronous_in_capture("cuMemcpy"), || d.transfer(end(to), end(from), bytes))
    }
    fn cuMemcpyAsync(to: u64, from: u64, bytes: usize, stream: Handle) |d| {
        let end = |a: u64| if d.allocation(a, 1).is_some() { End::Device(a) } else { End::Host(a as usize) };
        let (to, from) = (end(to), end(from));
        enqueue(d, stream, "cuMemcpyAsync", move |d| d.transfer(to, from, bytes))
    }
    fn cuMemcpyHtoD_v2(to: u64, from: *const c_void, bytes: usize) |d| { guarded(d.synchronous_in_capture("cuMemcpyHtoD"), || d.transfer(End::Device(to), End::Host(from as usize), bytes)) }
    fn cuMemcpyHtoDAsync_v2(to: u64, from: *const c_void, bytes: usize, stream: Handle) |d| {
        let from = from as usize;
        enqueue(d, stream, "cuMemcpyHtoDAsync_v2", move |d| d.transfer(End::Device(to), End::Host(from), bytes))
    }
    fn cuMemcpyDtoH_v2(to: *mut c_void, from: u64, bytes: usize) |d| { guarded(d.synchronous_in_capture("cuMemcpyDtoH"), || d.transfer(End::Host(to as usize), End::Device(from), bytes)) }
    fn cuMemcpyDtoHAsync_v2(to: *mut c_void, from: u64, bytes: usize, stream: Handle) |d| {
        let to = to as usize;
        enqueue(d, stream, "cuMemcpyDtoHAsync_v2", move |d| d.transfer(End::Host(to), End::Device(from), bytes))
    }
    fn cuMemcpyDtoD_v2(to: u64, from: u64, bytes: usize) |d| { guarded(d.synchronous_in_capture("cuMemcpyDtoD"), || d.transfer(End::Device(to), End::Device(from), bytes)) }
    fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: Handle) |d| {
        enqueue(d, stream, "cuMemcpyDtoDAsync_v2", move |d| d.transfer(End::Device(to), End::Device(from), bytes))
    }
    fn cuMemcpyPeerAsync(to: u64, _to_context: Handle, from: u64, _from_context: Handle, bytes: usize, stream: Handle) |d| {
        enqueue(d, stream, "cuMemcpyPeerAsync", move |d| d.transfer(End::Device(to), End::Device(from), bytes))
    }
    fn cuMemcpy2D_v2(copy: *const Copy2D) |d| { guarded(d.synchronous_in_capture("cuMemcpy2D"), || if copy.is_null() { error::INVALID_VALUE } else { d.copy_2d(&*copy) }) }
    fn cuMemcpy2DUnaligned_v2(copy: *const Copy2D) |d| { guarded(d.synchronous_in_capture("cuMemcpy2DUnaligned"), || if copy.is_null() { error::INVALID_VALUE } else { d.copy_2d(&*copy) }) }
    fn cuMemcpy2DAsync_v2(copy: *const Copy2D, stream: Handle) |d| {
        if copy.is_null() {
            return error::INVALID_VALUE;
        }
        let copy = SendCopy(*copy);
        enqueue(d, stream, "cuMemcpy2DAsync_v2", move |d| d.copy_2d(copy.get()))
    }
    fn cuMemsetD8_v2(to: u64, value: u8, n: usize) |d| { guarded(d.synchronous_in_capture("cuMemsetD8"), || d.fill(to, &[value], n)) }
    fn cuMemsetD16_v2(to: u64, value: u16, n: usize) |d| { guarded(d.synchronous_in_capture("cuMemsetD16"), || d.fill(to, &value.to_le_bytes(), n)) }
    fn cuMemsetD32_v2(to: u64, value: u32, n: usize) |d| { guarded(d.synchronous_in_capture("cuMemsetD32"), || d.fill(to, &value.to_le_bytes(), n)) }
    fn cuMemsetD8Async(to: u64, value: u8, n: usize, stream: Handle) |d| { enqueue(d, stream, "cuMemsetD8Async", move |d| d.fill(to, &[value], n)) }
    fn cuMemsetD16Async(to: u64, value: u16, n: usize, stream: Handle) |d| {
        enqueue(d, stream, "cuMemsetD16Async", move |d| d.fill(to, &value.to_le_bytes(), n))
    }
    fn cuMemsetD32Async(to: u64, value: u32, n: usize, stream: Handle) |d| {
        enqueue(d, stream, "cuMemsetD32Async", move |d| d.fill(to, &value.to_le_bytes(), n))
    }
    fn cuDeviceGetDefaultMemPool(pool: *mut Handle, _device: c_int) |_d| { store(pool, POOL as Handle) }
    fn cuDeviceGetMemPool(pool: *mut Handle, _device: c_int) |_d| { store(pool, POOL as Handle) }
    fn cuDeviceSetMemPool(_device: c_int, _pool: Handle) |_d| { error::SUCCESS }
    fn cuMemPoolCreate(pool: *mut Handle, _properties: *const c_void) |_d| { store(pool, POOL as Handle) }
    fn cuMemPoolDestroy(_pool: Handle) |_d| { error::SUCCESS }
    fn cuMemPoolTrimTo(_pool: Handle, _keep: usize) |_d| { error::SUCCESS }
    fn cuMemPoolGetAttribute(_pool: Handle, attribute: c_uint, value: *mut c_void) |d| {
        // 4 is the release threshold; 5 to 8 are bytes reserved and used, now and at most.
        match attribute {
            1..=3 => store(value.cast::<c_int>(), 1),
            4 => store(value.cast::<u64>(), *lock(&d.pool_release_threshold)),
            5..=8 => store(value.cast::<u64>(), d.device.memory.usage().0),
            _ => error::INVALID_VALUE,
        }
    }
    fn cuMemPoolSetAttribute(_pool: Handle, attribute: c_uint, value: *const c_void) |d| {
        if value.is_null() {
            return error::INVALID_VALUE;
        }
        if attribute == 4 {
            *lock(&d.pool_release_threshold) = value.cast::<u64>().read_unaligned();
        }
        error::SUCCESS
    }
    fn cuPointerGetAttribute(value: *mut c_void, attribute: c_uint, address: u64) |d| {
        let Some(a) = d.allocation(address, 1) else { return error::INVALID_VALUE };
        match attribute {
            2 => store(value.cast::<c_uint>(), 2),
            3 => store(value.cast::<u64>(), address),
            9 => store(value.cast::<c_int>(), 0),
            11 => store(value.cast::<u64>(), a.base),
            12 => store(value.cast::<usize>(), a.bytes as usize),
            _ => error::NOT_SUPPORTED,
        }
    }
}

/// The parameters of a copy, kept for a captured stream.
struct SendCopy(Copy2D);
// SAFETY: the addresses are only used when the graph runs, under the caller's contract that they are valid then.
unsafe impl Send for SendCopy {}
// SAFETY: as above; nothing is changed through it.
unsafe impl Sync for SendCopy {}
impl SendCopy {
    fn get(&self) -> &Copy2D {
        &self.0
    }
}
