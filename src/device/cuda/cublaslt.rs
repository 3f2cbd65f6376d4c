//! cuBLASLt, loaded at run time where the user has it: nothing of it is needed to build or to run.
//!
//! Owns the library (found, resolved, its workspace) and single products; which product goes to it is `gemm_choice.rs`'s
//! affair. Names and values are those of `cublasLt.h` (11.0 to 13.4; no value used here has changed among them). A row-major
//! matrix is a column-major one transposed, so `C = A op(B)` is asked for as `Cᵀ = op(B)ᵀ Aᵀ`.

use std::error::Error as _;
use std::ffi::{c_int, c_void};
use std::mem::ManuallyDrop;
use std::sync::Arc;

use cudarc::driver::sys;
use libloading::Library;

use super::context::{Cuda, Precision};
use super::error::{Error, Result, require};
use super::memory::{Buffer, Rows};

/// Looked for in this order, newest first: the first that loads and accepts the driver is taken.
const NAMES: [&str; 4] = ["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so.11", "libcublasLt.so"];
/// Names one library instead.
pub const VARIABLE: &str = "COLLM_CUBLASLT";

/// A handle or descriptor of the library.
type Opaque = *mut c_void;
/// `cublasStatus_t`.
type Status = c_int;

const SUCCESS: Status = 0;
const NOT_SUPPORTED: Status = 15;
/// `cudaDataType_t`.
const R_32F: c_int = 0;
const R_16BF: c_int = 14;
/// `cublasComputeType_t`: float32 sums, no TF32.
const COMPUTE_32F: c_int = 68;
/// `cublasOperation_t`.
const OP_T: i32 = 1;
/// `cublasLtMatmulDescAttributes_t`.
const DESC_TRANSA: c_int = 3;
const DESC_EPILOGUE: c_int = 7;
const DESC_BIAS_POINTER: c_int = 8;
/// `cublasLtEpilogue_t`.
const EPILOGUE_BIAS: u32 = 4;
/// `cublasLtMatrixLayoutAttribute_t`.
const LAYOUT_COLS: c_int = 3;
/// `cublasLtMatmulPreferenceAttributes_t`; alignments of A, B, C and D have the numbers 5 to 8.
const PREF_MAX_WORKSPACE_BYTES: c_int = 1;
const PREF_REDUCTION_SCHEME_MASK: c_int = 3;
const PREF_MIN_ALIGNMENTS: [c_int; 4] = [5, 6, 7, 8];
/// `cublasLtReductionScheme_t`: parts of a sum split along K meet in float32, never in the elements' type.
const REDUCTION_COMPUTE_TYPE: u32 = 2;

/// `cublasLtMatmulAlgo_t`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Algorithm([u64; 8]);

/// `cublasLtMatmulHeuristicResult_t`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Found {
    algorithm: Algorithm,
    workspace: usize,
    state: Status,
    waves: f32,
    reserved: [c_int; 4],
}

/// Declares the functions that are used, and finds them.
macro_rules! functions {
    ($($field:ident = $name:literal ($($argument:ty),*) -> $result:ty;)*) => {
        struct Functions { $($field: unsafe extern "C" fn($($argument),*) -> $result,)* }

        impl Functions {
            /// # Safety
            /// The library is cuBLASLt: its functions have these types.
            unsafe fn resolve(library: &Library) -> std::result::Result<Self, libloading::Error> {
                // SAFETY: the caller's promise.
                Ok(unsafe { Functions { $($field: *library.get(concat!($name, "\0").as_bytes())?,)* } })
            }
        }
    };
}

functions! {
    create = "cublasLtCreate"(*mut Opaque) -> Status;
    destroy = "cublasLtDestroy"(Opaque) -> Status;
    version = "cublasLtGetVersion"() -> usize;
    desc_create = "cublasLtMatmulDescCreate"(*mut Opaque, c_int, c_int) -> Status;
    desc_set = "cublasLtMatmulDescSetAttribute"(Opaque, c_int, *const c_void, usize) -> Status;
    desc_destroy = "cublasLtMatmulDescDestroy"(Opaque) -> Status;
    layout_create = "cublasLtMatrixLayoutCreate"(*mut Opaque, c_int, u64, u64, i64) -> Status;
    layout_set = "cublasLtMatrixLayoutSetAttribute"(Opaque, c_int, *const c_void, usize) -> Status;
    layout_destroy = "cublasLtMatrixLayoutDestroy"(Opaque) -> Status;
    preference_create = "cublasLtMatmulPreferenceCreate"(*mut Opaque) -> Status;
    preference_set = "cublasLtMatmulPreferenceSetAttribute"(Opaque, c_int, *const c_void, usize) -> Status;
    preference_destroy = "cublasLtMatmulPreferenceDestroy"(Opaque) -> Status;
    heuristic = "cublasLtMatmulAlgoGetHeuristic"(
        Opaque, Opaque, Opaque, Opaque, Opaque, Opaque, Opaque, c_int, *mut Found, *mut c_int) -> Status;
    matmul = "cublasLtMatmul"(
        Opaque, Opaque, *const f32, u64, Opaque, u64, Opaque, *const f32, u64, Opaque, u64, Opaque,
        *const Algorithm, u64, usize, sys::CUstream) -> Status;
}

/// What a status says.
fn answer(status: Status) -> std::result::Result<(), String> {
    let name = match status {
        SUCCESS => return Ok(()),
        1 => "not initialized: it may be newer than the driver",
        3 => "allocation failed",
        7 => "invalid value",
        8 => "architecture mismatch",
        11 => "mapping error",
        13 => "execution failed",
        14 => "internal error",
        NOT_SUPPORTED => "not supported",
        _ => "unknown status",
    };
    Err(format!("{name} ({status})"))
}

fn check(status: Status, what: &str) -> Result<()> {
    answer(status).map_err(|why| Error::CublasLt { what: format!("{what}: {why}") })
}

/// The open library. Everything made by it keeps it loaded.
struct Loaded {
    handle: Opaque,
    functions: Functions,
    /// Never unloaded: kernels of it may still be known to the driver.
    _library: ManuallyDrop<Library>,
}

// SAFETY: the library may be used from any thread; a descriptor is used by one at a time.
unsafe impl Send for Loaded {}
// SAFETY: as above.
unsafe impl Sync for Loaded {}

impl Loaded {
    /// Loads one library and makes a handle for the card whose context is current; else says why not.
    fn open(name: &str) -> std::result::Result<Self, String> {
        // SAFETY: cuBLASLt's constructors are harmless, and its functions have the types of its header.
        let (library, functions) = unsafe {
            // The cause names the file.
            let cause = |e: libloading::Error| e.source().map_or_else(|| e.to_string(), ToString::to_string);
            let library = Library::new(name).map_err(cause)?;
            let functions = Functions::resolve(&library).map_err(|e| format!("{name}: {e}"))?;
            (library, functions)
        };
        let mut handle = std::ptr::null_mut();
        // SAFETY: a place for the handle.
        let made = unsafe { (functions.create)(&mut handle) };
        answer(made).map_err(|why| format!("{name}: making a handle: {why}"))?;
        Ok(Loaded { handle, functions, _library: ManuallyDrop::new(library) })
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        // SAFETY: made by `open`, used no more.
        let _ = unsafe { (self.functions.destroy)(self.handle) };
    }
}

/// A descriptor, destroyed when dropped.
struct Descriptor {
    object: Opaque,
    set: unsafe extern "C" fn(Opaque, c_int, *const c_void, usize) -> Status,
    destroy: unsafe extern "C" fn(Opaque) -> Status,
    _library: Arc<Loaded>,
}

// SAFETY: plain host memory, used by one thread at a time.
unsafe impl Send for Descriptor {}

impl Descriptor {
    fn product(library: &Arc<Loaded>) -> Result<Self> {
        let (f, mut object) = (&library.functions, std::ptr::null_mut());
        // SAFETY: a place for the descriptor.
        check(unsafe { (f.desc_create)(&mut object, COMPUTE_32F, R_32F) }, "describing a product")?;
        Ok(Descriptor { object, set: f.desc_set, destroy: f.desc_destroy, _library: library.clone() })
    }

    /// Column-major.
    fn layout(library: &Arc<Loaded>, kind: c_int, rows: usize, columns: usize, stride: usize) -> Result<Self> {
        let (f, mut object) = (&library.functions, std::ptr::null_mut());
        // SAFETY: as above.
        let status = unsafe { (f.layout_create)(&mut object, kind, rows as u64, columns as u64, stride as i64) };
        check(status, "describing a matrix")?;
        Ok(Descriptor { object, set: f.layout_set, destroy: f.layout_destroy, _library: library.clone() })
    }

    fn preference(library: &Arc<Loaded>) -> Result<Self> {
        let (f, mut object) = (&library.functions, std::ptr::null_mut());
        // SAFETY: as above.
        check(unsafe { (f.preference_create)(&mut object) }, "making a preference")?;
        Ok(Descriptor { object, set: f.preference_set, destroy: f.preference_destroy, _library: library.clone() })
    }

    fn set<T: Copy>(&self, attribute: c_int, value: T) -> Result<()> {
        // SAFETY: the value is copied; the library refuses a size that is not the attribute's.
        let status = unsafe { (self.set)(self.object, attribute, (&raw const value).cast(), size_of::<T>()) };
        check(status, "setting an attribute")
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        // SAFETY: made with its destructor, used no more.
        let _ = unsafe { (self.destroy)(self.object) };
    }
}

/// What the library has to know of a product before it runs: `C[m, n] = A[m, k] op(B) (+ addend) (+ bias)`, strides in elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Shape {
    /// `Weight::Transposed`: B is `[n, k]`.
    pub transposed: bool,
    /// Most rows.
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub lda: usize,
    pub ldb: usize,
    pub ldc: usize,
    pub ld_addend: Option<usize>,
    pub bias: bool,
}

/// The library with its workspace on a card.
pub(super) struct CublasLt {
    workspace: Buffer<u8>,
    library: Arc<Loaded>,
    name: String,
}

impl std::fmt::Debug for CublasLt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CublasLt({self})")
    }
}

impl std::fmt::Display for CublasLt {
    /// `cuBLASLt 13.4.1 (libcublasLt.so.13)`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // SAFETY: takes nothing.
        let v = unsafe { (self.library.functions.version)() };
        write!(f, "cuBLASLt {}.{}.{} ({})", v / 10_000, v / 100 % 100, v % 100, self.name)
    }
}

impl CublasLt {
    /// The library that `COLLM_CUBLASLT` names, else the newest that the system's search finds and that works with the driver.
    pub fn open(cuda: &Cuda) -> Result<Self> {
        cuda.bind()?;
        let named = std::env::var(VARIABLE).ok().filter(|name| !name.is_empty());
        let names = named.as_deref().map_or(NAMES.to_vec(), |name| vec![name]);
        let mut reasons = Vec::new();
        for name in names {
            match Loaded::open(name) {
                Ok(library) => {
                    // As NVIDIA recommends for each generation.
                    let bytes = if cuda.description().capability.0 >= 9 { 32 << 20 } else { 4 << 20 };
                    let workspace = Buffer::new(cuda, bytes, "cuBLASLt's workspace")?;
                    return Ok(CublasLt { workspace, library: Arc::new(library), name: name.to_owned() });
                }
                Err(reason) => reasons.push(reason),
            }
        }
        if named.is_none() && reasons.iter().all(|reason| reason.contains("cannot open shared object file")) {
            reasons = vec![format!("there is no {}", NAMES.join(", no "))];
        }
        Err(Error::NoCublasLt { reasons: reasons.join("; ") })
    }

    /// Bytes of the workspace.
    pub fn workspace(&self) -> usize {
        self.workspace.len()
    }

    /// Prepares a product of up to `shape.m` rows with the algorithm that the library thinks best; `None` if it has none. Every
    /// operand lies at a 16-byte boundary.
    pub fn plan(&self, precision: Precision, shape: Shape) -> Result<Option<Planned>> {
        let kind = if precision == Precision::Bf16 { R_16BF } else { R_32F };
        let (library, Shape { m, n, k, .. }) = (&self.library, shape);
        let (rows, columns) = if shape.transposed { (k, n) } else { (n, k) };
        let product = Descriptor::product(library)?;
        if shape.transposed {
            product.set(DESC_TRANSA, OP_T)?;
        }
        if shape.bias {
            product.set(DESC_EPILOGUE, EPILOGUE_BIAS)?;
            // Its alignment is what the choice of the algorithm may rely on.
            product.set(DESC_BIAS_POINTER, 16u64)?;
        }
        let weight = Descriptor::layout(library, kind, rows, columns, shape.ldb)?;
        let a = Descriptor::layout(library, kind, k, m, shape.lda)?;
        let addend = Descriptor::layout(library, kind, n, m, shape.ld_addend.unwrap_or(shape.ldc))?;
        let c = Descriptor::layout(library, kind, n, m, shape.ldc)?;
        let preference = Descriptor::preference(library)?;
        preference.set(PREF_MAX_WORKSPACE_BYTES, self.workspace.len() as u64)?;
        preference.set(PREF_REDUCTION_SCHEME_MASK, REDUCTION_COMPUTE_TYPE)?;
        PREF_MIN_ALIGNMENTS.iter().try_for_each(|&attribute| preference.set(attribute, 16u32))?;
        let (mut found, mut count) = (Found::default(), 0);
        // SAFETY: live descriptors, and places for one result.
        let status = unsafe {
            (library.functions.heuristic)(
                library.handle,
                product.object,
                weight.object,
                a.object,
                addend.object,
                c.object,
                preference.object,
                1,
                &mut found,
                &mut count,
            )
        };
        if status == NOT_SUPPORTED || count == 0 || found.state != SUCCESS {
            return Ok(None);
        }
        check(status, "asking for an algorithm")?;
        Ok(Some(Planned { shape, rows: m, product, weight, a, addend, c, found }))
    }

    /// `C = A op(B) + addend + bias` in the stream, up to the planned rows. False, and nothing done, if the algorithm does not
    /// take this number of rows. Allocates nothing; may be captured.
    #[allow(clippy::too_many_arguments)] // one product, its operands
    pub fn run(
        &self,
        cuda: &Cuda,
        planned: &mut Planned,
        a: Rows,
        b: Rows,
        c: Rows,
        bias: u64,
        addend: Option<Rows>,
    ) -> Result<bool> {
        let shape = planned.shape;
        let of_b = if shape.transposed { (shape.n, shape.k) } else { (shape.k, shape.n) };
        let fits = a.rows <= shape.m && a.columns == shape.k && (b.rows, b.columns) == of_b && c.rows >= a.rows;
        let strides = (a.stride, b.stride, c.stride) == (shape.lda, shape.ldb, shape.ldc);
        let fits =
            fits && strides && addend.map(|addend| addend.stride) == shape.ld_addend && (bias != 0) == shape.bias;
        require(fits, "gemm", || format!("{shape:?} is not that of {a:?}, {b:?}, {c:?}"))?;
        if planned.rows != a.rows {
            [&planned.a, &planned.addend, &planned.c].iter().try_for_each(|l| l.set(LAYOUT_COLS, a.rows as u64))?;
            planned.rows = a.rows;
        }
        if shape.bias {
            planned.product.set(DESC_BIAS_POINTER, bias)?;
        }
        let beta = f32::from(u8::from(addend.is_some()));
        cuda.bind()?;
        // SAFETY: descriptors and algorithm belong together; the operands are as they say and lie in live memory, so does the
        // workspace, which products use one after the other in the stream.
        let status = unsafe {
            (self.library.functions.matmul)(
                self.library.handle,
                planned.product.object,
                &1.0,
                b.address,
                planned.weight.object,
                a.address,
                planned.a.object,
                &beta,
                addend.unwrap_or(c).address,
                planned.addend.object,
                c.address,
                planned.c.object,
                &planned.found.algorithm,
                self.workspace.address(),
                self.workspace.len(),
                cuda.stream(),
            )
        };
        if status == NOT_SUPPORTED {
            return Ok(false);
        }
        check(status, &format!("a product of {shape:?}, {} rows", a.rows))?;
        Ok(true)
    }
}

/// A product that the library is ready to run.
pub(super) struct Planned {
    pub shape: Shape,
    /// What the layouts say now.
    rows: usize,
    product: Descriptor,
    weight: Descriptor,
    a: Descriptor,
    addend: Descriptor,
    c: Descriptor,
    found: Found,
}

impl std::fmt::Debug for Planned {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Planned({:?})", self.shape)
    }
}
