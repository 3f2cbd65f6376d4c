//! A stand-in for cuBLASLt where there is no card: the calls that the engine makes, with the ABI of `cublasLt.h`.
//!
//! Products are computed in float64 by a function in the stream (`cuLaunchHostFunc`), so they come in order and can be captured;
//! operands go through the driver API, so the emulator checks their addresses. (Only an emulator allows driver calls there.) What
//! the real library would not take, and what the engine never asks for, is refused with a line on stderr.
//!
//! | variable | meaning |
//! |---|---|
//! | `CUBLASLT_STANDIN_DELAY_US` | each product takes that much longer |
//! | `CUBLASLT_STANDIN_WRONG` | products have the wrong sign: who uses them shows |
//! | `CUBLASLT_STANDIN_NONE` | there is no algorithm for any product |

mod product;

use std::ffi::{c_int, c_void};

use product::{Matrix, Work};

const SUCCESS: c_int = 0;
const INVALID_VALUE: c_int = 7;
const EXECUTION_FAILED: c_int = 13;
const NOT_SUPPORTED: c_int = 15;
const R_32F: c_int = 0;
const R_16BF: c_int = 14;
const MAGIC: u64 = 0x7374_616e_6469_6e21;
/// What each product takes of the workspace, and writes, so that it must be there.
const WORKSPACE: usize = 4096;

fn refuse(what: impl std::fmt::Display) -> c_int {
    eprintln!("[cublaslt-standin] refused: {what}");
    INVALID_VALUE
}

/// What a handle points to begins with its kind, so that one is not taken for another.
trait Object: Sized {
    const KIND: u64;
    fn kind(&self) -> u64;
}

macro_rules! objects {
    ($($name:ident = $kind:literal { $($field:ident: $type:ty),* })*) => {
        $(
            #[repr(C)] // the kind comes first
            #[derive(Clone, Debug)]
            struct $name { kind: u64, $($field: $type),* }

            impl Object for $name {
                const KIND: u64 = $kind;
                fn kind(&self) -> u64 {
                    self.kind
                }
            }
        )*
    };
}

objects! {
    Handle = 0xc0b1_0001 {}
    Desc = 0xc0b1_0002 { transa: i32, transb: i32, epilogue: u32, bias: u64 }
    Layout = 0xc0b1_0003 { element: c_int, rows: u64, columns: u64, stride: i64 }
    Preference = 0xc0b1_0004 { workspace: u64, reductions: u32, alignments: [u32; 4] }
}

/// # Safety
/// `object` is null or points to 8 readable bytes; with its kind, it is one.
unsafe fn get<'a, T: Object>(object: *mut c_void) -> Result<&'a mut T, c_int> {
    let whole = object.cast::<T>();
    // SAFETY: the caller's promise.
    if whole.is_null() || unsafe { object.cast::<u64>().read() } != T::KIND {
        return Err(refuse(format_args!("{object:p} is not a handle of kind {:x}", T::KIND)));
    }
    // SAFETY: made by `put`.
    let found = unsafe { &mut *whole };
    debug_assert_eq!(found.kind(), T::KIND);
    Ok(found)
}

/// # Safety
/// `to` is null or writable.
unsafe fn put<T: Object>(to: *mut *mut c_void, object: T) -> c_int {
    if to.is_null() {
        return refuse("nowhere to put a handle");
    }
    // SAFETY: the caller's promise.
    unsafe { to.write(Box::into_raw(Box::new(object)).cast()) };
    SUCCESS
}

/// # Safety
/// As of `get`; used no more.
unsafe fn destroy<T: Object>(object: *mut c_void) -> c_int {
    // SAFETY: the caller's promise.
    match unsafe { get::<T>(object) } {
        Ok(found) => {
            // SAFETY: made by `put`.
            drop(unsafe { Box::from_raw(found) });
            SUCCESS
        }
        Err(status) => status,
    }
}

/// # Safety
/// `from` is null or readable for `size` bytes.
unsafe fn value<T: Copy>(from: *const c_void, size: usize, what: &str) -> Result<T, c_int> {
    if from.is_null() || size != size_of::<T>() {
        return Err(refuse(format_args!("{what} has {} bytes, given were {size}", size_of::<T>())));
    }
    // SAFETY: the caller's promise.
    Ok(unsafe { from.cast::<T>().read_unaligned() })
}

/// A status of either kind of result.
fn status(result: Result<(), c_int>) -> c_int {
    result.err().unwrap_or(SUCCESS)
}

/// `cublasLtMatmulAlgo_t`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Algorithm([u64; 8]);

/// `cublasLtMatmulHeuristicResult_t`.
#[repr(C)]
#[derive(Debug)]
pub struct Found {
    algorithm: Algorithm,
    workspace: usize,
    state: c_int,
    waves: f32,
    reserved: [c_int; 4],
}

/// What both the heuristic and the product demand of layouts and description.
fn fits(desc: &Desc, a: &Layout, b: &Layout, c: &Layout, d: &Layout) -> Result<(), c_int> {
    let of_a = if desc.transa == 1 { (a.columns, a.rows) } else { (a.rows, a.columns) };
    let sizes = of_a == (d.rows, b.rows) && b.columns == d.columns && (c.rows, c.columns) == (d.rows, d.columns);
    if desc.transb != 0 || !sizes {
        return Err(refuse(format_args!("{desc:?} does not fit {a:?} {b:?} {c:?} {d:?}")));
    }
    let all = [a, b, c, d];
    if all.iter().any(|l| l.element != d.element || l.stride < l.rows as i64 || l.rows == 0 || l.columns == 0) {
        return Err(refuse(format_args!("strides or types of {all:?}")));
    }
    if desc.epilogue == 4 && desc.bias == 0 {
        return Err(refuse("a bias without an address"));
    }
    Ok(())
}

/// `cublasLtCreate`.
///
/// # Safety
/// As in `cublasLt.h`, here and below.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtCreate(handle: *mut *mut c_void) -> c_int {
    // SAFETY: the caller's promise, here and below.
    unsafe { put(handle, Handle { kind: Handle::KIND }) }
}

/// `cublasLtDestroy`.
///
/// # Safety
/// See `cublasLtCreate`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtDestroy(handle: *mut c_void) -> c_int {
    unsafe { destroy::<Handle>(handle) }
}

/// `cublasLtGetVersion`: none that there is.
#[unsafe(no_mangle)]
pub extern "C" fn cublasLtGetVersion() -> usize {
    990_000
}

/// `cublasLtMatmulDescCreate`.
///
/// # Safety
/// See `cublasLtCreate`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulDescCreate(desc: *mut *mut c_void, compute: c_int, scale: c_int) -> c_int {
    if (compute, scale) != (68, R_32F) {
        return refuse(format_args!("compute type {compute}, scale type {scale}: float32 sums only"));
    }
    unsafe { put(desc, Desc { kind: Desc::KIND, transa: 0, transb: 0, epilogue: 1, bias: 0 }) }
}

/// `cublasLtMatmulDescSetAttribute`.
///
/// # Safety
/// See `cublasLtCreate`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulDescSetAttribute(
    desc: *mut c_void,
    attribute: c_int,
    from: *const c_void,
    size: usize,
) -> c_int {
    status((|| {
        let desc = unsafe { get::<Desc>(desc) }?;
        match attribute {
            3 => desc.transa = unsafe { value(from, size, "TRANSA") }?,
            4 => desc.transb = unsafe { value(from, size, "TRANSB") }?,
            7 => desc.epilogue = unsafe { value(from, size, "EPILOGUE") }?,
            8 => desc.bias = unsafe { value(from, size, "BIAS_POINTER") }?,
            other => return Err(refuse(format_args!("attribute {other} of a product"))),
        }
        let known = (0..2).contains(&desc.transa) && [1, 4].contains(&desc.epilogue);
        if known { Ok(()) } else { Err(refuse(format_args!("{desc:?}"))) }
    })())
}

/// `cublasLtMatmulDescDestroy`.
///
/// # Safety
/// See `cublasLtCreate`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulDescDestroy(desc: *mut c_void) -> c_int {
    unsafe { destroy::<Desc>(desc) }
}

/// `cublasLtMatrixLayoutCreate`.
///
/// # Safety
/// See `cublasLtCreate`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatrixLayoutCreate(
    layout: *mut *mut c_void,
    element: c_int,
    rows: u64,
    columns: u64,
    stride: i64,
) -> c_int {
    if ![R_32F, R_16BF].contains(&element) {
        return refuse(format_args!("element type {element}"));
    }
    unsafe { put(layout, Layout { kind: Layout::KIND, element, rows, columns, stride }) }
}

/// `cublasLtMatrixLayoutSetAttribute`.
///
/// # Safety
/// See `cublasLtCreate`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatrixLayoutSetAttribute(
    layout: *mut c_void,
    attribute: c_int,
    from: *const c_void,
    size: usize,
) -> c_int {
    status((|| {
        let layout = unsafe { get::<Layout>(layout) }?;
        match attribute {
            2 => layout.rows = unsafe { value(from, size, "ROWS") }?,
            3 => layout.columns = unsafe { value(from, size, "COLS") }?,
            4 => layout.stride = unsafe { value(from, size, "LD") }?,
            other => return Err(refuse(format_args!("attribute {other} of a layout"))),
        }
        Ok(())
    })())
}

/// `cublasLtMatrixLayoutDestroy`.
///
/// # Safety
/// See `cublasLtCreate`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatrixLayoutDestroy(layout: *mut c_void) -> c_int {
    unsafe { destroy::<Layout>(layout) }
}

/// `cublasLtMatmulPreferenceCreate`.
///
/// # Safety
/// See `cublasLtCreate`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulPreferenceCreate(preference: *mut *mut c_void) -> c_int {
    // The library's defaults.
    unsafe { put(preference, Preference { kind: Preference::KIND, workspace: 0, reductions: 7, alignments: [256; 4] }) }
}

/// `cublasLtMatmulPreferenceSetAttribute`.
///
/// # Safety
/// See `cublasLtCreate`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulPreferenceSetAttribute(
    preference: *mut c_void,
    attribute: c_int,
    from: *const c_void,
    size: usize,
) -> c_int {
    status((|| {
        let preference = unsafe { get::<Preference>(preference) }?;
        match attribute {
            1 => preference.workspace = unsafe { value(from, size, "MAX_WORKSPACE_BYTES") }?,
            3 => preference.reductions = unsafe { value(from, size, "REDUCTION_SCHEME_MASK") }?,
            5..=8 => {
                let place = &mut preference.alignments[attribute as usize - 5];
                *place = unsafe { value(from, size, "MIN_ALIGNMENT_BYTES") }?;
            }
            other => return Err(refuse(format_args!("attribute {other} of a preference"))),
        }
        Ok(())
    })())
}

/// `cublasLtMatmulPreferenceDestroy`.
///
/// # Safety
/// See `cublasLtCreate`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulPreferenceDestroy(preference: *mut c_void) -> c_int {
    unsafe { destroy::<Preference>(preference) }
}

/// `cublasLtMatmulAlgoGetHeuristic`.
///
/// # Safety
/// See `cublasLtCreate`.
#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments)] // the library's
pub unsafe extern "C" fn cublasLtMatmulAlgoGetHeuristic(
    handle: *mut c_void,
    desc: *mut c_void,
    a: *mut c_void,
    b: *mut c_void,
    c: *mut c_void,
    d: *mut c_void,
    preference: *mut c_void,
    wanted: c_int,
    found: *mut Found,
    count: *mut c_int,
) -> c_int {
    status((|| {
        unsafe { get::<Handle>(handle) }?;
        let desc = unsafe { get::<Desc>(desc) }?;
        let [a, b, c, d] = [a, b, c, d].map(|l| unsafe { get::<Layout>(l) });
        fits(desc, a?, b?, c?, d?)?;
        let preference = unsafe { get::<Preference>(preference) }?;
        if wanted < 1 || found.is_null() || count.is_null() {
            return Err(refuse("no place for an algorithm"));
        }
        unsafe { count.write(0) };
        if std::env::var_os("CUBLASLT_STANDIN_NONE").is_some() || preference.workspace < WORKSPACE as u64 {
            return Err(NOT_SUPPORTED);
        }
        if preference.reductions & 5 != 0 {
            return Err(refuse("sums may be split in the elements' type"));
        }
        let [wa, wb, wc, wd] = preference.alignments.map(u64::from);
        let bias = if desc.epilogue == 4 { 1 << desc.bias.trailing_zeros().min(8) } else { 256 };
        let algorithm = Algorithm([MAGIC, wa, wb, wc, wd, bias, u64::from(desc.epilogue), desc.transa as u64]);
        let first = Found { algorithm, workspace: WORKSPACE, state: SUCCESS, waves: 1.0, reserved: [0; 4] };
        unsafe { (found.write(first), count.write(1)) };
        Ok(())
    })())
}

/// `cublasLtMatmul`.
///
/// # Safety
/// See `cublasLtCreate`.
#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments)] // the library's
pub unsafe extern "C" fn cublasLtMatmul(
    handle: *mut c_void,
    desc: *mut c_void,
    alpha: *const f32,
    a: u64,
    a_layout: *mut c_void,
    b: u64,
    b_layout: *mut c_void,
    beta: *const f32,
    c: u64,
    c_layout: *mut c_void,
    d: u64,
    d_layout: *mut c_void,
    algorithm: *const Algorithm,
    workspace: u64,
    workspace_bytes: usize,
    stream: *mut c_void,
) -> c_int {
    status((|| {
        unsafe { get::<Handle>(handle) }?;
        let desc = unsafe { get::<Desc>(desc) }?.clone();
        if alpha.is_null() || beta.is_null() || algorithm.is_null() {
            return Err(refuse("a null pointer"));
        }
        let (alpha, beta) = unsafe { (f64::from(*alpha), f64::from(*beta)) };
        let matrix = |address: u64, layout: *mut c_void| -> Result<Matrix, c_int> {
            Ok(Matrix { address, layout: unsafe { get::<Layout>(layout) }?.clone() })
        };
        let (a, b) = (matrix(a, a_layout)?, matrix(b, b_layout)?);
        let (c, d) = (matrix(c, c_layout)?, matrix(d, d_layout)?);
        fits(&desc, &a.layout, &b.layout, &c.layout, &d.layout)?;
        let Algorithm([magic, wa, wb, wc, wd, bias, epilogue, transa]) = unsafe { *algorithm };
        if magic != MAGIC || (epilogue, transa) != (u64::from(desc.epilogue), desc.transa as u64) {
            return Err(refuse("an algorithm for another product"));
        }
        for (name, address, alignment) in [
            ("A", a.address, wa),
            ("B", b.address, wb),
            ("C", c.address, wc),
            ("D", d.address, wd),
            ("bias", if epilogue == 4 { desc.bias } else { 0 }, bias),
        ] {
            if !address.is_multiple_of(alignment) || (address == 0 && name != "bias") {
                return Err(refuse(format_args!("{name} at {address:x}, promised were multiples of {alignment}")));
            }
        }
        if c.address == d.address && c.layout.stride != d.layout.stride {
            return Err(refuse("C and D in one place with different strides"));
        }
        if workspace == 0 || !workspace.is_multiple_of(256) || workspace_bytes < WORKSPACE {
            return Err(refuse(format_args!("a workspace of {workspace_bytes} bytes at {workspace:x}")));
        }
        Work { desc, alpha, beta, a, b, c, d, workspace }.give(stream)
    })())
}
