//! Modules and kernels: loading, looking up, attributes, occupancy.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

use super::{Driver, Function, Handle, driver_calls, error, lock, store};

const STATIC_LIMIT: u32 = 49152;

impl Driver {
    unsafe fn load(&self, module: *mut Handle, image: *const u8) -> u32 {
        // SAFETY: see the module.
        match unsafe { self.load_image(image) } {
            Ok(handle) => unsafe { store(module, handle as Handle) },
            Err(code) => code,
        }
    }

    /// A kernel's state by handle.
    pub fn function(&self, handle: Handle) -> Option<Function> {
        lock(&self.functions).get(&(handle as usize)).cloned()
    }

    /// Blocks of a kernel that one multiprocessor holds, by threads and shared memory; registers are not known.
    pub(super) fn occupancy(&self, function: &Function, threads: u32, dynamic: usize) -> u32 {
        let card = self.device.card;
        if threads == 0 || threads > 1024 {
            return 0;
        }
        let shared = u64::from(function.program.own_shared()) + dynamic as u64;
        if shared > u64::from(card.shared_per_block) {
            return 0;
        }
        card.resident_blocks(threads, shared)
    }

    fn best_block(&self, function: &Function, dynamic: usize, limit: c_int) -> (c_int, c_int) {
        let most = function.program.max_threads.unwrap_or(1024).min(if limit > 0 { limit as u32 } else { 1024 });
        let mut best = (0, 0);
        for threads in (1..=most.max(32) / 32).rev().map(|warps| warps * 32) {
            let resident = self.occupancy(function, threads, dynamic) * threads;
            if resident > best.0 {
                best = (resident, threads);
            }
        }
        let blocks = best.0 / best.1.max(1) * self.device.card.sm_count;
        (blocks as c_int, best.1 as c_int)
    }
}

driver_calls! { lookup:
    fn cuModuleLoadData(module: *mut Handle, image: *const c_void) |d| { d.load(module, image.cast()) }
    fn cuModuleLoadDataEx(module: *mut Handle, image: *const c_void, _n: c_uint, _options: *mut c_int, _values: *mut *mut c_void) |d| {
        d.load(module, image.cast())
    }
    fn cuModuleLoadFatBinary(module: *mut Handle, image: *const c_void) |d| { d.load(module, image.cast()) }
    fn cuModuleLoad(module: *mut Handle, path: *const c_char) |d| {
        if path.is_null() {
            return error::INVALID_VALUE;
        }
        let path = CStr::from_ptr(path).to_string_lossy();
        match std::fs::read(&*path) {
            Ok(mut bytes) => {
                bytes.push(0);
                d.load(module, bytes.as_ptr())
            }
            Err(_) => error::FILE_NOT_FOUND,
        }
    }
    fn cuModuleUnload(module: Handle) |d| {
        let Some(gone) = lock(&d.modules).remove(&(module as usize)) else { return error::INVALID_HANDLE };
        gone.unload(&d.device.memory);
        lock(&d.functions).retain(|_, f| f.module != module as usize);
        error::SUCCESS
    }
    fn cuModuleGetFunction(function: *mut Handle, module: Handle, name: *const c_char) |d| {
        if name.is_null() {
            return error::INVALID_VALUE;
        }
        let modules = lock(&d.modules);
        let Some(found) = modules.get(&(module as usize)) else { return error::INVALID_HANDLE };
        let Some(program) = found.kernel(&CStr::from_ptr(name).to_string_lossy()) else { return error::NOT_FOUND };
        let mut functions = lock(&d.functions);
        let known = functions.iter().find(|(_, f)| f.module == module as usize && std::sync::Arc::ptr_eq(&f.program, program));
        let handle = match known {
            Some((handle, _)) => *handle,
            None => {
                let handle = d.handle();
                let state = Function {
                    program: program.clone(),
                    module: module as usize,
                    version: found.version,
                    target_sm: found.target_sm,
                    max_dynamic_shared: None,
                    cluster: [0; 3],
                };
                functions.insert(handle, state);
                handle
            }
        };
        store(function, handle as Handle)
    }
    fn cuModuleGetFunctionCount(count: *mut c_uint, module: Handle) |d| {
        match lock(&d.modules).get(&(module as usize)) {
            Some(found) => store(count, found.kernel_names().len() as c_uint),
            None => error::INVALID_HANDLE,
        }
    }
    fn cuModuleGetGlobal_v2(address: *mut u64, bytes: *mut usize, module: Handle, name: *const c_char) |d| {
        if name.is_null() {
            return error::INVALID_VALUE;
        }
        let modules = lock(&d.modules);
        let Some(found) = modules.get(&(module as usize)) else { return error::INVALID_HANDLE };
        let Some((at, size)) = found.variable(&CStr::from_ptr(name).to_string_lossy()) else { return error::NOT_FOUND };
        if !address.is_null() {
            store(address, at);
        }
        if bytes.is_null() { error::SUCCESS } else { store(bytes, size as usize) }
    }
    fn cuFuncGetAttribute(value: *mut c_int, attribute: c_uint, function: Handle) |d| {
        let Some(f) = d.function(function) else { return error::INVALID_HANDLE };
        let dynamic = f.max_dynamic_shared.unwrap_or(STATIC_LIMIT.saturating_sub(f.program.own_shared()));
        store(value, match attribute {
            0 => f.program.max_threads.unwrap_or(1024),              // MAX_THREADS_PER_BLOCK
            1 => f.program.own_shared(),                             // SHARED_SIZE_BYTES
            3 => f.program.local_bytes,                              // LOCAL_SIZE_BYTES
            4 => 32,                                                 // NUM_REGS: ptxas would tell
            5 => f.version.0 * 10 + f.version.1,                     // PTX_VERSION
            6 => f.target_sm,                                        // BINARY_VERSION
            8 => dynamic,                                            // MAX_DYNAMIC_SHARED_SIZE_BYTES
            _ => 0,
        } as c_int)
    }
    fn cuFuncSetAttribute(function: Handle, attribute: c_uint, value: c_int) |d| {
        let mut functions = lock(&d.functions);
        let Some(f) = functions.get_mut(&(function as usize)) else { return error::INVALID_HANDLE };
        match attribute {
            8 => {
                let most = d.device.card.shared_per_block.saturating_sub(f.program.own_shared());
                if value < 0 || value as u32 > most {
                    return error::INVALID_VALUE;
                }
                f.max_dynamic_shared = Some(value as u32);
            }
            11..=13 => f.cluster[attribute as usize - 11] = value.max(0) as u32,
            _ => {}
        }
        error::SUCCESS
    }
    fn cuFuncSetCacheConfig(_function: Handle, _config: c_uint) |_d| { error::SUCCESS }
    fn cuFuncSetSharedMemConfig(_function: Handle, _config: c_uint) |_d| { error::SUCCESS }
    fn cuFuncGetModule(module: *mut Handle, function: Handle) |d| {
        match d.function(function) {
            Some(f) => store(module, f.module as Handle),
            None => error::INVALID_HANDLE,
        }
    }
    fn cuOccupancyMaxActiveBlocksPerMultiprocessor(n: *mut c_int, function: Handle, threads: c_int, dynamic: usize) |d| {
        match d.function(function) {
            Some(f) => store(n, d.occupancy(&f, threads.max(0) as u32, dynamic) as c_int),
            None => error::INVALID_HANDLE,
        }
    }
    fn cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(n: *mut c_int, function: Handle, threads: c_int, dynamic: usize, _flags: c_uint) |d| {
        match d.function(function) {
            Some(f) => store(n, d.occupancy(&f, threads.max(0) as u32, dynamic) as c_int),
            None => error::INVALID_HANDLE,
        }
    }
    fn cuOccupancyMaxPotentialBlockSize(blocks: *mut c_int, threads: *mut c_int, function: Handle, shared: Option<unsafe extern "C" fn(c_int) -> usize>, dynamic: usize, limit: c_int) |d| {
        let Some(f) = d.function(function) else { return error::INVALID_HANDLE };
        let dynamic = shared.map_or(dynamic, |f| f(256));
        let (b, t) = d.best_block(&f, dynamic, limit);
        store(blocks, b);
        store(threads, t)
    }
    fn cuOccupancyMaxPotentialBlockSizeWithFlags(blocks: *mut c_int, threads: *mut c_int, function: Handle, shared: Option<unsafe extern "C" fn(c_int) -> usize>, dynamic: usize, limit: c_int, _flags: c_uint) |_d| {
        cuOccupancyMaxPotentialBlockSize(blocks, threads, function, shared, dynamic, limit)
    }
    fn cuOccupancyAvailableDynamicSMemPerBlock(bytes: *mut usize, function: Handle, blocks: c_int, _threads: c_int) |d| {
        let Some(f) = d.function(function) else { return error::INVALID_HANDLE };
        let share = d.device.card.shared_per_sm / blocks.max(1) as u32;
        let most = share.saturating_sub(1024).min(d.device.card.shared_per_block);
        store(bytes, most.saturating_sub(f.program.own_shared()) as usize)
    }
}
