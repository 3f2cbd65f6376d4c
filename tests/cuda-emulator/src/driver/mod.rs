//! The CUDA driver API: what `libcuda.so.1` exports, on the emulated device.
//!
//! Everything runs when it is called, so streams are in order by nature; a stream that is captured collects its work into
//! a graph instead. Errors of kernels are sticky, as on a device: they are returned by the next call that waits or copies.
//! The functions are called from C: their arguments are as valid as the CUDA manual demands of its callers, and null
//! pointers are refused; that is the safety argument of this module.

#![allow(missing_docs, non_snake_case, clippy::missing_safety_doc)] // names and contracts are those of the CUDA manual

pub mod attributes;
pub mod capture;
pub mod context;
pub mod environment;
pub mod error;
pub mod function;
pub mod graph;
pub mod image;
pub mod launch;
pub mod memory;
pub mod stream;
pub mod tensor_map;
pub mod unsupported;

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::counts::report::LaunchReport;
use crate::{Device, Module};
use environment::Environment;

/// A handle as C sees it.
pub type Handle = *mut c_void;

/// A kernel handle's contents.
#[derive(Debug, Clone)]
pub struct Function {
    pub program: Arc<crate::program::Program>,
    pub module: usize,
    pub version: (u32, u32),
    pub target_sm: u32,
    /// `MAX_DYNAMIC_SHARED_SIZE_BYTES`, once set.
    pub max_dynamic_shared: Option<u32>,
    pub cluster: [u32; 3],
}

/// The driver's state.
pub struct Driver {
    pub environment: Environment,
    pub device: Device,
    pub modules: Mutex<HashMap<usize, Module>>,
    pub functions: Mutex<HashMap<usize, Function>>,
    pub streams: Mutex<HashMap<usize, stream::Stream>>,
    pub events: Mutex<HashMap<usize, stream::Mark>>,
    pub graphs: Mutex<HashMap<usize, graph::Graph>>,
    pub contexts: Mutex<Vec<usize>>,
    pub primary_count: Mutex<u32>,
    pub pool_release_threshold: Mutex<u64>,
    pub reports: Mutex<Vec<LaunchReport>>,
    initialised: AtomicU32,
    sticky: AtomicU32,
    next: AtomicUsize,
}

/// Locks; a panic elsewhere leaves maps whole.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The driver.
pub fn driver() -> &'static Driver {
    static DRIVER: OnceLock<Driver> = OnceLock::new();
    DRIVER.get_or_init(|| {
        let environment = Environment::read();
        let device = Device::new(environment.card, environment.config.clone());
        Driver {
            environment,
            device,
            modules: Mutex::default(),
            functions: Mutex::default(),
            streams: Mutex::default(),
            events: Mutex::default(),
            graphs: Mutex::default(),
            contexts: Mutex::default(),
            primary_count: Mutex::default(),
            pool_release_threshold: Mutex::default(),
            reports: Mutex::default(),
            initialised: AtomicU32::new(0),
            sticky: AtomicU32::new(0),
            next: AtomicUsize::new(0x1000),
        }
    })
}

impl Driver {
    /// A fresh handle.
    pub fn handle(&self) -> usize {
        self.next.fetch_add(16, Ordering::Relaxed)
    }
    /// The error that a kernel left, 0 if none.
    pub fn sticky(&self) -> u32 {
        self.sticky.load(Ordering::Relaxed)
    }
    /// Leaves an error to all later calls.
    pub fn fail(&self, code: u32) {
        self.sticky.store(code, Ordering::Relaxed);
    }
    /// `cuInit` has been called.
    pub fn is_initialised(&self) -> bool {
        self.initialised.load(Ordering::Relaxed) != 0
    }
    /// `cuInit`.
    pub fn initialise(&self) {
        self.initialised.store(1, Ordering::Relaxed);
    }
    /// Forgets the present context's memory, modules and error: its end.
    pub fn reset(&self) {
        self.report_leaks();
        lock(&self.functions).clear();
        lock(&self.modules).clear();
        lock(&self.streams).clear();
        lock(&self.events).clear();
        lock(&self.graphs).clear();
        self.device.memory.clear();
        self.sticky.store(0, Ordering::Relaxed);
        self.write_report();
    }

    fn report_leaks(&self) {
        if self.environment.config.check {
            for leak in self.device.memory.leaks() {
                eprintln!("[cuda-emulator] {leak}");
            }
        }
    }

    /// Writes `CUEMU_REPORT`, whole or not at all.
    pub fn write_report(&self) {
        let Some(path) = &self.environment.report else { return };
        let launches: Vec<_> = lock(&self.reports).iter().map(|r| r.json.clone()).collect();
        let report = serde_json::json!({
            "card": self.device.card.name,
            "card_source": self.device.card.source,
            "note": "times named modelled are computed from the card's published rates, not measured",
            "launches": launches,
        });
        let temporary = path.with_extension("tmp");
        let written =
            std::fs::write(&temporary, format!("{report:#}\n")).and_then(|()| std::fs::rename(&temporary, path));
        if let Err(error) = written {
            eprintln!("[cuda-emulator] the report {} cannot be written: {error}", path.display());
        }
    }
}

/// Runs the body of a driver call: traced, and never unwinding into C.
pub fn enter(name: &str, body: impl FnOnce(&'static Driver) -> u32) -> u32 {
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| body(driver())));
    let code = result.unwrap_or_else(|_| {
        eprintln!("[cuda-emulator] internal error in {name}");
        error::UNKNOWN
    });
    if driver().environment.trace {
        eprintln!("[cuda-emulator] {name} -> {code}");
    }
    code
}

/// Stores a result through a pointer of the caller; refuses null.
pub unsafe fn store<T>(to: *mut T, value: T) -> u32 {
    if to.is_null() {
        return error::INVALID_VALUE;
    }
    // SAFETY: not null, and the caller of the driver API owns what it points to.
    unsafe { to.write(value) };
    error::SUCCESS
}

/// Defines exported driver calls and a look-up of their addresses.
macro_rules! driver_calls {
    ($lookup:ident: $(fn $name:ident($($a:ident: $t:ty),* $(,)?) |$d:ident| $body:block)*) => {
        $(
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name($($a: $t),*) -> u32 {
                crate::driver::enter(stringify!($name), |$d| {
                    // SAFETY: see the module: C callers keep the CUDA manual's contract.
                    #[allow(unused_unsafe)]
                    unsafe { $body }
                })
            }
        )*
        /// The address of a call of this file.
        pub fn $lookup(name: &str) -> Option<*const std::ffi::c_void> {
            match name {
                $(stringify!($name) => Some($name as *const std::ffi::c_void),)*
                _ => None,
            }
        }
    };
}
pub(crate) use driver_calls;

/// The address of a driver call by name: the implemented one, or the one that says it is not.
pub fn find(name: &str) -> Option<*const c_void> {
    context::lookup(name)
        .or_else(|| memory::lookup(name))
        .or_else(|| function::lookup(name))
        .or_else(|| launch::lookup(name))
        .or_else(|| stream::lookup(name))
        .or_else(|| capture::lookup(name))
        .or_else(|| graph::lookup(name))
        .or_else(|| tensor_map::lookup(name))
        .or_else(|| unsupported::lookup(name))
}
