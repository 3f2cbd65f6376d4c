//! A card: its context, one stream, the modules of kernels.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::{CudaContext, result, sys};

use super::error::{Attempt, Error, Result};
use super::gemm_choice::GemmChoice;
use super::staging::Staging;

/// One image of kernels a `.cu` file and precision (`gemm_bf16`): a fatbin, or PTX text that ends in NUL.
static IMAGES: &[(&str, &[u8])] = &include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// What the kernels' images were made with: a path to nvcc, or "kept PTX".
pub const KERNELS_ORIGIN: &str = env!("COLLM_KERNELS_ORIGIN");

/// Compute capabilities, as `80`, that the images hold machine code for, with commas between; empty with kept PTX.
const ARCHITECTURES: &str = env!("COLLM_KERNELS_ARCHITECTURES");

/// How a card of compute capability `(major, minor)` gets the kernels; `None` if it is too old for them.
pub fn kernels_for((major, minor): (i32, i32)) -> Option<String> {
    if major < OLDEST {
        return None;
    }
    // Machine code runs on cards of the same major number, from its minor number on.
    let versions = ARCHITECTURES.split(',').filter_map(|a| a.parse::<i32>().ok());
    let fitting = versions.filter(|a| a / 10 == major && a % 10 <= minor).max();
    Some(fitting.map_or_else(
        || "PTX, compiled by the driver when first loaded".to_owned(),
        |a| format!("machine code for sm_{a}"),
    ))
}

/// Major compute capability from which the kernels run: tensor cores for bf16, asynchronous copies.
const OLDEST: i32 = 8;

/// Type of activations and weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// bfloat16: what ships.
    #[default]
    Bf16,
    /// float32, for checking: the same kernels without tensor cores.
    F32,
}

impl Precision {
    /// Bytes of an element.
    pub fn bytes(self) -> usize {
        match self {
            Precision::Bf16 => 2,
            Precision::F32 => 4,
        }
    }

    /// Elements of a 16-byte access: what widths and strides are multiples of.
    pub fn vec(self) -> usize {
        16 / self.bytes()
    }
}

/// What there is to know about a card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// Number among the machine's cards.
    pub ordinal: usize,
    /// As the driver calls it.
    pub name: String,
    /// Compute capability.
    pub capability: (i32, i32),
    /// Multiprocessors.
    pub sm_count: usize,
    /// Memory, bytes.
    pub memory_bytes: usize,
    /// Free memory, bytes.
    pub free_bytes: usize,
}

/// An open card with one stream. Dropping it releases everything.
#[derive(Debug)]
pub struct Cuda {
    context: Arc<CudaContext>,
    stream: sys::CUstream,
    precision: Precision,
    gemm: GemmChoice,
    modules: Mutex<BTreeMap<&'static str, usize>>,
    description: Description,
    pub(super) allocated: Arc<AtomicUsize>,
    pub(super) allocations: AtomicUsize,
    graphs: bool,
    /// Made by the first upload.
    staging: Mutex<Option<Staging>>,
}

// SAFETY: the stream's handle is used by one thread at a time through the driver, which locks.
unsafe impl Send for Cuda {}
// SAFETY: as above.
unsafe impl Sync for Cuda {}

/// How many cards the driver sees; none without a driver.
pub fn device_count() -> usize {
    // SAFETY: only looks for the library.
    if !unsafe { sys::is_culib_present() } || result::init().is_err() {
        return 0;
    }
    result::device::get_count().unwrap_or(0).max(0) as usize
}

impl Cuda {
    /// Opens card `ordinal` for kernels of the given precision.
    pub fn open(ordinal: usize, precision: Precision) -> Result<Self> {
        // SAFETY: only looks for the library. Without this, cudarc panics where there is no driver.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::NoDriver);
        }
        result::init().attempt(|| "starting the driver".to_owned())?;
        let found = device_count();
        if ordinal >= found {
            return Err(Error::NoDevice { ordinal, found });
        }
        let open = || format!("opening device {ordinal}");
        let context = CudaContext::new(ordinal).attempt(open)?;
        let (major, minor) = context.compute_capability().attempt(open)?;
        let name = context.name().attempt(open)?;
        if major < OLDEST {
            return Err(Error::TooOld { name, major, minor });
        }
        let sm_count = context.attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
        let (free_bytes, memory_bytes) = result::mem_get_info().attempt(open)?;
        let description = Description {
            ordinal,
            name,
            capability: (major, minor),
            sm_count: sm_count.attempt(open)? as usize,
            memory_bytes,
            free_bytes,
        };
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking).attempt(open)?;
        Ok(Cuda {
            context,
            stream,
            precision,
            gemm: GemmChoice::Ours,
            modules: Mutex::default(),
            description,
            allocated: Arc::default(),
            allocations: AtomicUsize::new(0),
            graphs: std::env::var_os("COLLM_GRAPHS").is_none_or(|v| v != "off"),
            staging: Mutex::default(),
        })
    }

    /// Leaves products to whom it says, from the next [`super::gemm::Gemm::new`] on. At first they are ours.
    pub fn with_gemm(mut self, gemm: GemmChoice) -> Self {
        self.gemm = gemm;
        self
    }

    /// Who computes products.
    pub fn gemm(&self) -> GemmChoice {
        self.gemm
    }

    /// Type of the elements.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// The card.
    pub fn description(&self) -> &Description {
        &self.description
    }

    /// True on the emulator of this repository: its times mean nothing.
    pub fn is_emulated(&self) -> bool {
        self.description.name.contains("(emulated)")
    }

    /// Bytes of the buffers that live.
    pub fn allocated(&self) -> usize {
        self.allocated.load(Ordering::Relaxed)
    }

    /// Buffers that were ever made: as long as this stays, none has moved.
    pub fn allocations(&self) -> usize {
        self.allocations.load(Ordering::Relaxed)
    }

    /// Whether passes that come again are run as graphs: unless `COLLM_GRAPHS=off` when the card was opened.
    pub fn uses_graphs(&self) -> bool {
        self.graphs
    }

    /// Switches graphs on or off.
    pub fn use_graphs(&mut self, graphs: bool) {
        self.graphs = graphs;
    }

    /// Free and total memory of the card, bytes.
    pub fn memory(&self) -> Result<(usize, usize)> {
        self.bind()?;
        result::mem_get_info().attempt(|| "asking for free memory".to_owned())
    }

    /// Waits for all work given so far.
    pub fn synchronize(&self) -> Result<()> {
        self.bind()?;
        // SAFETY: the stream lives as long as `self`.
        unsafe { result::stream::synchronize(self.stream) }.attempt(|| "running the kernels".to_owned())
    }

    pub(super) fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    pub(super) fn stream(&self) -> sys::CUstream {
        self.stream
    }

    /// Where uploads pass through.
    pub(super) fn staging(&self) -> MutexGuard<'_, Option<Staging>> {
        self.staging.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the context this thread's.
    pub(super) fn bind(&self) -> Result<()> {
        self.context.bind_to_thread().attempt(|| format!("using device {}", self.description.ordinal))
    }

    /// The module of one `.cu` file, loaded when first asked for.
    pub(super) fn module(&self, file: &'static str) -> Result<sys::CUmodule> {
        let mut modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&module) = modules.get(file) {
            return Ok(module as sys::CUmodule);
        }
        let image = format!("{file}_{}", self.precision.suffix());
        let found = IMAGES.iter().find(|(name, _)| *name == image);
        let (_, bytes) = found.unwrap_or_else(|| panic!("kernels/{file}.cu is built in"));
        self.bind()?;
        // SAFETY: a fatbin knows its length, PTX ends in NUL (build.rs).
        let module = unsafe { result::module::load_data(bytes.as_ptr().cast::<c_void>()) }
            .attempt(|| format!("loading the kernels of {file}.cu (built with {KERNELS_ORIGIN})"))?;
        modules.insert(file, module as usize);
        Ok(module)
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_err() {
            return;
        }
        // SAFETY: stream and modules were made by this object and are not used after it.
        unsafe {
            let _ = result::stream::synchronize(self.stream);
            drop(self.staging().take());
            let modules = self.modules.get_mut().unwrap_or_else(PoisonError::into_inner);
            for module in modules.values() {
                let _ = result::module::unload(*module as sys::CUmodule);
            }
            let _ = result::stream::destroy(self.stream);
        }
    }
}
