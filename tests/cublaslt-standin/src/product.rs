//! A product in the stream: operands from the emulator's memory, float64 sums, the result back.

use std::ffi::{c_int, c_void};
use std::sync::OnceLock;
use std::time::Duration;

use half::bf16;
use libloading::Library;

use crate::{Desc, EXECUTION_FAILED, Layout, R_16BF, WORKSPACE, refuse};

/// The driver of this process.
struct Driver {
    launch: unsafe extern "C" fn(*mut c_void, extern "C" fn(*mut c_void), *mut c_void) -> c_int,
    download: unsafe extern "C" fn(*mut c_void, u64, usize) -> c_int,
    upload: unsafe extern "C" fn(u64, *const c_void, usize) -> c_int,
}

fn driver() -> Result<&'static Driver, c_int> {
    static DRIVER: OnceLock<Option<Driver>> = OnceLock::new();
    let open = || {
        // SAFETY: the driver is loaded already; the functions have these types.
        unsafe {
            let library: &Library = Box::leak(Box::new(Library::new("libcuda.so.1").ok()?));
            Some(Driver {
                launch: *library.get(b"cuLaunchHostFunc\0").ok()?,
                download: *library.get(b"cuMemcpyDtoH_v2\0").ok()?,
                upload: *library.get(b"cuMemcpyHtoD_v2\0").ok()?,
            })
        }
    };
    DRIVER.get_or_init(open).as_ref().ok_or_else(|| {
        eprintln!("[cublaslt-standin] no driver");
        EXECUTION_FAILED
    })
}

/// A column-major matrix in device memory.
#[derive(Clone, Debug)]
pub struct Matrix {
    pub address: u64,
    pub layout: Layout,
}

impl Layout {
    fn bytes(&self) -> usize {
        if self.element == R_16BF { 2 } else { 4 }
    }
}

impl Matrix {
    fn column(&self, c: usize) -> u64 {
        self.address + (c * self.layout.stride as usize * self.layout.bytes()) as u64
    }

    /// All columns, one after another.
    fn read(&self) -> Result<Vec<f64>, c_int> {
        let (rows, bytes) = (self.layout.rows as usize, self.layout.bytes());
        let mut all = Vec::new();
        for c in 0..self.layout.columns as usize {
            all.extend(read(self.column(c), rows, bytes)?);
        }
        Ok(all)
    }

    fn write(&self, values: &[f64]) -> Result<(), c_int> {
        for (c, column) in values.chunks_exact(self.layout.rows as usize).enumerate() {
            let bytes: Vec<u8> = match self.layout.bytes() {
                2 => column.iter().flat_map(|&v| bf16::from_f64(v).to_le_bytes()).collect(),
                _ => column.iter().flat_map(|&v| (v as f32).to_le_bytes()).collect(),
            };
            write(self.column(c), &bytes)?;
        }
        Ok(())
    }
}

fn read(address: u64, count: usize, bytes: usize) -> Result<Vec<f64>, c_int> {
    let mut raw = vec![0u8; count * bytes];
    // SAFETY: as many bytes as there is room for; the driver checks the address.
    match unsafe { (driver()?.download)(raw.as_mut_ptr().cast(), address, raw.len()) } {
        0 => Ok(match bytes {
            2 => raw.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f64()).collect(),
            _ => raw.chunks_exact(4).map(|b| f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]]))).collect(),
        }),
        code => Err(refuse(format_args!("reading {} bytes at {address:x}: driver error {code}", raw.len()))),
    }
}

fn write(address: u64, bytes: &[u8]) -> Result<(), c_int> {
    // SAFETY: the bytes are there; the driver checks the address.
    match unsafe { (driver()?.upload)(address, bytes.as_ptr().cast(), bytes.len()) } {
        0 => Ok(()),
        code => Err(refuse(format_args!("writing {} bytes at {address:x}: driver error {code}", bytes.len()))),
    }
}

/// A product, given to the stream.
pub struct Work {
    pub desc: Desc,
    pub alpha: f64,
    pub beta: f64,
    pub a: Matrix,
    pub b: Matrix,
    pub c: Matrix,
    pub d: Matrix,
    pub workspace: u64,
}

impl Work {
    /// Gives it to a stream.
    pub fn give(self, stream: *mut c_void) -> Result<(), c_int> {
        // Leaked: a captured graph may run it any number of times.
        let work = Box::leak(Box::new(self));
        // SAFETY: the function with its own data.
        match unsafe { (driver()?.launch)(stream, in_stream, std::ptr::from_mut(work).cast()) } {
            0 => Ok(()),
            code => {
                eprintln!("[cublaslt-standin] cuLaunchHostFunc: driver error {code}");
                Err(EXECUTION_FAILED)
            }
        }
    }

    fn run(&self) -> Result<(), c_int> {
        let (m, n) = (self.d.layout.rows as usize, self.d.layout.columns as usize);
        let k = self.b.layout.rows as usize;
        let (a, b) = (self.a.read()?, self.b.read()?);
        write(self.workspace, &[0xa5; WORKSPACE])?;
        let bias = if self.desc.epilogue == 4 { read(self.desc.bias, m, self.d.layout.bytes())? } else { vec![0.0; m] };
        let c = if self.beta == 0.0 { vec![0.0; m * n] } else { self.c.read()? };
        let mut d = vec![0.0; m * n];
        for (j, (d, c)) in d.chunks_exact_mut(m).zip(c.chunks_exact(m)).enumerate() {
            for (i, (d, (c, bias))) in d.iter_mut().zip(c.iter().zip(&bias)).enumerate() {
                let of_a = |l: usize| if self.desc.transa == 1 { a[i * k + l] } else { a[l * m + i] };
                let sum: f64 = (0..k).map(|l| of_a(l) * b[j * k + l]).sum();
                *d = self.alpha * sum + self.beta * c + bias;
            }
        }
        if std::env::var_os("CUBLASLT_STANDIN_WRONG").is_some() {
            d.iter_mut().for_each(|d| *d = -*d);
        }
        let delay = std::env::var("CUBLASLT_STANDIN_DELAY_US").ok().and_then(|us| us.parse().ok());
        std::thread::sleep(Duration::from_micros(delay.unwrap_or(0)));
        self.d.write(&d)
    }
}

extern "C" fn in_stream(work: *mut c_void) {
    // SAFETY: a leaked `Work`.
    let work = unsafe { &*work.cast::<Work>() };
    if work.run().is_err() {
        // A stream has no way to say so.
        std::process::abort();
    }
}
