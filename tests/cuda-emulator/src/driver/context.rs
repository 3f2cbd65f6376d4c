//! Initialisation, devices, contexts, errors, entry points.

use std::cell::Cell;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

use super::error::{self, describe};
use super::{Handle, attributes, driver_calls, find, lock, store};

/// The handle of the primary context.
const PRIMARY: usize = 0xc0de0;

thread_local! {
    static CURRENT: Cell<usize> = const { Cell::new(0) };
}

/// Whether the calling thread has a context.
pub fn is_current() -> bool {
    CURRENT.get() != 0
}

extern "C" fn at_exit() {
    super::driver().write_report();
}

unsafe extern "C" {
    fn atexit(callback: extern "C" fn()) -> c_int;
}

fn create(d: &super::Driver, context: *mut Handle) -> u32 {
    let handle = d.handle();
    lock(&d.contexts).push(handle);
    CURRENT.set(handle);
    // SAFETY: see the module.
    unsafe { store(context, handle as Handle) }
}

driver_calls! { lookup:
    fn cuInit(flags: c_uint) |d| {
        if flags != 0 {
            return error::INVALID_VALUE;
        }
        if !d.is_initialised() {
            d.initialise();
            if d.environment.report.is_some() {
                atexit(at_exit);
            }
        }
        error::SUCCESS
    }
    fn cuDriverGetVersion(version: *mut c_int) |_d| { store(version, 13050) }
    fn cuGetErrorName(code: u32, text: *mut *const c_char) |_d| {
        let Some((name, _)) = describe(code) else {
            store(text, std::ptr::null());
            return error::INVALID_VALUE;
        };
        store(text, name.as_ptr())
    }
    fn cuGetErrorString(code: u32, text: *mut *const c_char) |_d| {
        let Some((_, words)) = describe(code) else {
            store(text, std::ptr::null());
            return error::INVALID_VALUE;
        };
        store(text, words.as_ptr())
    }
    fn cuGetProcAddress_v2(name: *const c_char, address: *mut *const c_void, _version: c_int, _flags: u64, status: *mut c_int) |_d| {
        if name.is_null() || address.is_null() {
            return error::INVALID_VALUE;
        }
        let name = CStr::from_ptr(name).to_str().unwrap_or("");
        // The newest variant of a call is the one that a program built today means.
        let found = ["_v4", "_v3", "_v2", ""].iter().find_map(|suffix| find(&format!("{name}{suffix}")));
        if !status.is_null() {
            store(status, c_int::from(found.is_none()));
        }
        store(address, found.unwrap_or(std::ptr::null()));
        if found.is_some() { error::SUCCESS } else { error::NOT_FOUND }
    }
    fn cuGetProcAddress(name: *const c_char, address: *mut *const c_void, version: c_int, flags: u64) |_d| {
        cuGetProcAddress_v2(name, address, version, flags, std::ptr::null_mut())
    }
    fn cuDeviceGetCount(count: *mut c_int) |d| {
        if d.is_initialised() { store(count, 1) } else { error::NOT_INITIALIZED }
    }
    fn cuDeviceGet(device: *mut c_int, ordinal: c_int) |d| {
        match (d.is_initialised(), ordinal) {
            (false, _) => error::NOT_INITIALIZED,
            (true, 0) => store(device, 0),
            _ => error::INVALID_DEVICE,
        }
    }
    fn cuDeviceGetName(text: *mut c_char, length: c_int, device: c_int) |d| {
        if text.is_null() || length <= 0 {
            return error::INVALID_VALUE;
        }
        if device != 0 {
            return error::INVALID_DEVICE;
        }
        let name = format!("{} (emulated)", d.device.card.name);
        let n = name.len().min(length as usize - 1);
        text.copy_from(name.as_ptr().cast(), n);
        text.add(n).write(0);
        error::SUCCESS
    }
    fn cuDeviceGetUuid(uuid: *mut [u8; 16], _device: c_int) |_d| { store(uuid, *b"cuda-emulator-00") }
    fn cuDeviceGetUuid_v2(uuid: *mut [u8; 16], _device: c_int) |_d| { store(uuid, *b"cuda-emulator-00") }
    fn cuDeviceGetPCIBusId(text: *mut c_char, length: c_int, _device: c_int) |_d| {
        let id = c"0000:00:00.0".to_bytes_with_nul();
        if text.is_null() || (length as usize) < id.len() {
            return error::INVALID_VALUE;
        }
        text.copy_from(id.as_ptr().cast(), id.len());
        error::SUCCESS
    }
    fn cuDeviceTotalMem_v2(bytes: *mut usize, _device: c_int) |d| { store(bytes, d.device.card.memory as usize) }
    fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, device: c_int) |d| {
        if device != 0 { error::INVALID_DEVICE } else { store(value, attributes::value(d.device.card, attribute)) }
    }
    fn cuDeviceComputeCapability(major: *mut c_int, minor: *mut c_int, _device: c_int) |d| {
        store(major, (d.device.card.sm / 10) as c_int);
        store(minor, (d.device.card.sm % 10) as c_int)
    }
    fn cuDeviceCanAccessPeer(can: *mut c_int, _a: c_int, _b: c_int) |_d| { store(can, 0) }
    fn cuDevicePrimaryCtxRetain(context: *mut Handle, device: c_int) |d| {
        if device != 0 {
            return error::INVALID_DEVICE;
        }
        *lock(&d.primary_count) += 1;
        store(context, PRIMARY as Handle)
    }
    fn cuDevicePrimaryCtxRelease_v2(_device: c_int) |d| {
        let left = {
            let mut count = lock(&d.primary_count);
            if *count == 0 {
                return error::INVALID_CONTEXT;
            }
            *count -= 1;
            *count
        };
        if left == 0 {
            d.reset();
        }
        error::SUCCESS
    }
    fn cuDevicePrimaryCtxReset_v2(_device: c_int) |d| {
        d.reset();
        error::SUCCESS
    }
    fn cuDevicePrimaryCtxSetFlags_v2(_device: c_int, _flags: c_uint) |_d| { error::SUCCESS }
    fn cuDevicePrimaryCtxGetState(_device: c_int, flags: *mut c_uint, active: *mut c_int) |d| {
        store(flags, 0);
        store(active, c_int::from(*lock(&d.primary_count) > 0))
    }
    fn cuCtxCreate_v2(context: *mut Handle, _flags: c_uint, _device: c_int) |d| { create(d, context) }
    fn cuCtxCreate_v3(context: *mut Handle, _params: *mut c_void, _n: c_int, _flags: c_uint, _device: c_int) |d| { create(d, context) }
    fn cuCtxCreate_v4(context: *mut Handle, _params: *mut c_void, _flags: c_uint, _device: c_int) |d| { create(d, context) }
    fn cuCtxDestroy_v2(context: Handle) |d| {
        let mut contexts = lock(&d.contexts);
        let Some(at) = contexts.iter().position(|c| *c == context as usize) else { return error::INVALID_CONTEXT };
        contexts.swap_remove(at);
        let last = contexts.is_empty() && *lock(&d.primary_count) == 0;
        drop(contexts);
        if CURRENT.get() == context as usize {
            CURRENT.set(0);
        }
        if last {
            d.reset();
        }
        error::SUCCESS
    }
    fn cuCtxGetCurrent(context: *mut Handle) |_d| { store(context, CURRENT.get() as Handle) }
    fn cuCtxSetCurrent(context: Handle) |_d| {
        CURRENT.set(context as usize);
        error::SUCCESS
    }
    fn cuCtxPushCurrent_v2(context: Handle) |_d| {
        CURRENT.set(context as usize);
        error::SUCCESS
    }
    fn cuCtxPopCurrent_v2(context: *mut Handle) |_d| {
        let current = CURRENT.replace(0);
        if context.is_null() { error::SUCCESS } else { store(context, current as Handle) }
    }
    fn cuCtxGetDevice(device: *mut c_int) |_d| { if is_current() { store(device, 0) } else { error::INVALID_CONTEXT } }
    fn cuCtxGetApiVersion(_context: Handle, version: *mut c_uint) |_d| { store(version, 13050) }
    fn cuCtxGetFlags(flags: *mut c_uint) |_d| { store(flags, 0) }
    fn cuCtxSetFlags(_flags: c_uint) |_d| { error::SUCCESS }
    fn cuCtxSynchronize() |d| {
        if !is_current() {
            return error::INVALID_CONTEXT;
        }
        match d.context_waits_in_capture("cuCtxSynchronize") {
            0 => d.sticky(),
            code => code,
        }
    }
    fn cuCtxGetLimit(value: *mut usize, limit: c_uint) |_d| { store(value, if limit == 1 { 1 << 20 } else { 1024 }) }
    fn cuCtxSetLimit(_limit: c_uint, _value: usize) |_d| { error::SUCCESS }
    fn cuCtxGetCacheConfig(config: *mut c_uint) |_d| { store(config, 0) }
    fn cuCtxSetCacheConfig(_config: c_uint) |_d| { error::SUCCESS }
    fn cuCtxGetStreamPriorityRange(least: *mut c_int, greatest: *mut c_int) |_d| {
        store(least, 0);
        store(greatest, -5)
    }
    fn cuProfilerStart() |_d| { error::SUCCESS }
    fn cuProfilerStop() |d| {
        d.write_report();
        error::SUCCESS
    }
}
