//! Launches: the checks a driver makes, the run, and what becomes of its findings.

use std::ffi::{c_int, c_uint, c_void};

use super::stream::enqueue;
use super::{Driver, Function, Handle, driver_calls, error, lock, store};
use crate::Shape;
use crate::counts::report;

/// `CUlaunchConfig`.
#[repr(C)]
pub struct LaunchConfig {
    grid: [c_uint; 3],
    block: [c_uint; 3],
    shared: c_uint,
    stream: Handle,
    attributes: *const LaunchAttribute,
    count: c_uint,
}

/// `CUlaunchAttribute`: an id and a value of 64 bytes.
#[repr(C)]
pub struct LaunchAttribute {
    id: c_uint,
    pad: c_uint,
    value: [c_uint; 16],
}

impl LaunchConfig {
    /// The shape of the launch, its attributes included.
    unsafe fn shape(&self) -> Shape {
        let mut shape = Shape { grid: self.grid, block: self.block, dynamic_shared: self.shared, ..Shape::default() };
        for i in 0..self.count as usize {
            // SAFETY: the caller gives as many attributes as it counts.
            let a = unsafe { &*self.attributes.add(i) };
            match a.id {
                2 => shape.cooperative = a.value[0] != 0,
                4 => shape.cluster = [a.value[0], a.value[1], a.value[2]],
                _ => {}
            }
        }
        shape
    }
}

impl Driver {
    /// The parameter buffer from either way of passing parameters.
    unsafe fn params(&self, f: &Function, params: *mut *mut c_void, extra: *mut *mut c_void) -> Option<Vec<u8>> {
        let program = &f.program;
        let mut buffer = vec![0u8; program.param_bytes as usize];
        if !params.is_null() {
            for (i, &(at, bytes)) in program.params.iter().enumerate() {
                // SAFETY: the caller passes one pointer for each parameter, to at least its size.
                unsafe {
                    let from = (*params.add(i)).cast::<u8>();
                    if from.is_null() {
                        return None;
                    }
                    buffer[at as usize..][..bytes as usize].as_mut_ptr().copy_from(from, bytes as usize);
                }
            }
        } else if !extra.is_null() {
            // Pairs of keys (1 buffer, 2 pointer to its size) and values, ended by 0.
            let (mut from, mut bytes, mut i) = (std::ptr::null::<u8>(), 0usize, 0);
            // SAFETY: the caller ends the list.
            unsafe {
                loop {
                    match *extra.add(i) as usize {
                        1 => from = (*extra.add(i + 1)).cast(),
                        2 => bytes = (*extra.add(i + 1)).cast::<usize>().read_unaligned(),
                        _ => break,
                    }
                    i += 2;
                }
                if from.is_null() {
                    return None;
                }
                buffer.as_mut_ptr().copy_from(from, bytes.min(buffer.len()));
            }
        } else if !program.params.is_empty() {
            return None;
        }
        Some(buffer)
    }

    unsafe fn launch(
        &self,
        function: Handle,
        shape: Shape,
        stream: Handle,
        params: *mut *mut c_void,
        extra: *mut *mut c_void,
    ) -> u32 {
        if self.sticky() != 0 {
            return self.sticky();
        }
        let Some(f) = self.function(function) else { return error::INVALID_HANDLE };
        // SAFETY: see the module.
        let Some(buffer) = (unsafe { self.params(&f, params, extra) }) else { return error::INVALID_VALUE };
        let allowed = f.max_dynamic_shared.unwrap_or(49152u32.saturating_sub(f.program.own_shared()));
        if shape.dynamic_shared > allowed {
            eprintln!(
                "[cuda-emulator] launch of {}: {} bytes of dynamic shared memory where {allowed} are allowed (cuFuncSetAttribute \
                 MAX_DYNAMIC_SHARED_SIZE_BYTES raises it)",
                f.program.name, shape.dynamic_shared
            );
            return error::INVALID_VALUE;
        }
        let shape = if shape.cluster[0] == 0 && f.cluster[0] > 0 {
            Shape { cluster: f.cluster.map(|n| n.max(1)), ..shape }
        } else {
            shape
        };
        let cluster = if shape.cluster[0] == 0 { f.program.required_cluster.unwrap_or([1; 3]) } else { shape.cluster };
        if let Some(problem) = self.device.limits(&f.program, shape, cluster) {
            eprintln!("[cuda-emulator] launch of {}: {problem}", f.program.name);
            let over_maxntid = problem.contains(".maxntid") || problem.contains(".reqntid");
            return if over_maxntid { error::LAUNCH_OUT_OF_RESOURCES } else { error::INVALID_VALUE };
        }
        enqueue(self, stream, "cuLaunchKernel", move |d| d.execute(&f, shape, &buffer))
    }

    /// Runs a launch. Its errors are left for the next call that waits, as on a device.
    fn execute(&self, f: &Function, shape: Shape, params: &[u8]) -> u32 {
        if self.sticky() != 0 {
            return self.sticky();
        }
        let outcome = self.device.launch_raw(&f.program, shape, params);
        print!("{}", outcome.printed);
        for finding in &outcome.findings {
            eprintln!("[cuda-emulator] {finding}");
        }
        if let Some(worst) = outcome.findings.first() {
            self.fail(worst.kind.code());
        }
        if self.environment.table || self.environment.report.is_some() {
            let shared = f.program.own_shared() + shape.dynamic_shared;
            let entry = report::launch(self.device.card, &f.program, shape.grid, shape.block, shared, &outcome);
            let mut reports = lock(&self.reports);
            if self.environment.table {
                if reports.is_empty() {
                    eprintln!("[cuda-emulator] {}", report::TABLE_HEADING);
                }
                eprintln!("[cuda-emulator] {}", entry.line);
            }
            reports.push(entry);
        }
        error::SUCCESS
    }
}

driver_calls! { lookup:
    fn cuLaunchKernel(f: Handle, gx: c_uint, gy: c_uint, gz: c_uint, bx: c_uint, by: c_uint, bz: c_uint, shared: c_uint, stream: Handle, params: *mut *mut c_void, extra: *mut *mut c_void) |d| {
        let shape = Shape { grid: [gx, gy, gz], block: [bx, by, bz], dynamic_shared: shared, ..Shape::default() };
        d.launch(f, shape, stream, params, extra)
    }
    fn cuLaunchCooperativeKernel(f: Handle, gx: c_uint, gy: c_uint, gz: c_uint, bx: c_uint, by: c_uint, bz: c_uint, shared: c_uint, stream: Handle, params: *mut *mut c_void) |d| {
        let shape = Shape { grid: [gx, gy, gz], block: [bx, by, bz], dynamic_shared: shared, cooperative: true, ..Shape::default() };
        d.launch(f, shape, stream, params, std::ptr::null_mut())
    }
    fn cuLaunchKernelEx(config: *const LaunchConfig, f: Handle, params: *mut *mut c_void, extra: *mut *mut c_void) |d| {
        if config.is_null() {
            return error::INVALID_VALUE;
        }
        let c = &*config;
        d.launch(f, c.shape(), c.stream, params, extra)
    }
    fn cuOccupancyMaxActiveClusters(n: *mut c_int, function: Handle, config: *const LaunchConfig) |d| {
        if config.is_null() {
            return error::INVALID_VALUE;
        }
        let Some(f) = d.function(function) else { return error::INVALID_HANDLE };
        let shape = (*config).shape();
        let cluster = [shape.cluster, f.cluster, f.program.required_cluster.unwrap_or([1; 3])];
        let cluster = cluster.into_iter().find(|c| c[0] > 0).unwrap_or([1; 3]);
        let shape = Shape { grid: cluster, ..shape };
        if d.device.limits(&f.program, shape, cluster).is_some() {
            return store(n, 0);
        }
        let threads = shape.block.iter().product();
        let blocks = d.occupancy(&f, threads, shape.dynamic_shared as usize) * d.device.card.sm_count;
        store(n, (blocks / cluster.iter().product::<u32>()) as c_int)
    }
}
