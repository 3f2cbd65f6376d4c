//! Device memory: owning [`Buffer`]s, and [`Rows`], the matrix views that operations take.

use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytemuck::Pod;
use cudarc::driver::{CudaContext, result};

use super::context::{Cuda, Precision};
use super::error::{Attempt, Error, Result};

/// Types that lie in device memory as they lie in host memory.
pub trait Scalar: Pod + Send + Sync {}
impl<T: Pod + Send + Sync> Scalar for T {}

/// Device memory, freed when dropped. Holds `len` values of T.
#[derive(Debug)]
pub struct Buffer<T> {
    context: Arc<CudaContext>,
    allocated: Arc<AtomicUsize>,
    address: u64,
    len: usize,
    of: PhantomData<T>,
}

impl<T: Scalar> Buffer<T> {
    /// Uninitialised memory for `len` values; `what` names it when there is none left.
    pub fn new(cuda: &Cuda, len: usize, what: &str) -> Result<Self> {
        let bytes = (len * size_of::<T>()).max(16);
        cuda.bind()?;
        // SAFETY: only allocates; the context is current.
        let address = unsafe { result::malloc_sync(bytes) }.map_err(|e| {
            if e.0 != cudarc::driver::sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
                return Err::<(), _>(e).attempt(|| format!("allocating {bytes} bytes for {what}")).unwrap_err();
            }
            let (free, total) = result::mem_get_info().unwrap_or_default();
            let hint =
                "lower the tokens a micro-batch holds (train.max_tokens), or use a smaller model or a larger card";
            Error::OutOfMemory { bytes, what: what.to_owned(), free, total, hint }
        })?;
        let allocated = cuda.allocated.clone();
        allocated.fetch_add(len * size_of::<T>(), Ordering::Relaxed);
        cuda.allocations.fetch_add(1, Ordering::Relaxed);
        Ok(Buffer { context: cuda.context().clone(), allocated, address, len, of: PhantomData })
    }

    /// Memory with `values` in it.
    pub fn from_host(cuda: &Cuda, values: &[T], what: &str) -> Result<Self> {
        let mut buffer = Buffer::new(cuda, values.len(), what)?;
        buffer.upload(cuda, values)?;
        Ok(buffer)
    }

    /// Memory full of zero bytes.
    pub fn zeros(cuda: &Cuda, len: usize, what: &str) -> Result<Self> {
        let mut buffer = Buffer::new(cuda, len, what)?;
        buffer.clear(cuda, len)?;
        Ok(buffer)
    }

    /// Values it holds.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if it holds none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Its first byte, on the device.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// The address of value `index`.
    pub fn at(&self, index: usize) -> u64 {
        assert!(index <= self.len, "{index} of {} values", self.len);
        self.address + (index * size_of::<T>()) as u64
    }

    /// Copies `values` to its beginning, in the stream's order.
    pub fn upload(&mut self, cuda: &Cuda, values: &[T]) -> Result<()> {
        assert!(values.len() <= self.len, "{} values for {}", values.len(), self.len);
        if values.is_empty() {
            return Ok(());
        }
        // SAFETY: the destination holds that many values; freeing waits for the work that uses it.
        unsafe { cuda.copy_to_device(self.address, values) }
    }

    /// The first `len` values, after all work given so far.
    pub fn download(&self, cuda: &Cuda, len: usize) -> Result<Vec<T>> {
        let mut values = vec![T::zeroed(); len];
        self.download_to(cuda, &mut values)?;
        Ok(values)
    }

    /// As [`Self::download`], into memory that is there.
    pub fn download_to(&self, cuda: &Cuda, values: &mut [T]) -> Result<()> {
        assert!(values.len() <= self.len, "{} values of {}", values.len(), self.len);
        if values.is_empty() {
            return Ok(());
        }
        cuda.bind()?;
        // SAFETY: the source holds that many values; the stream is waited for before `values` is used.
        unsafe { result::memcpy_dtoh_async(values, self.address, cuda.stream()) }
            .attempt(|| format!("copying {} bytes from the device", size_of_val(values)))?;
        cuda.synchronize()
    }

    /// Copies the first `len` values of another buffer behind the first `at` of this one, on the card, in the stream's order.
    pub fn copy_from(&mut self, cuda: &Cuda, at: usize, from: &Buffer<T>, len: usize) -> Result<()> {
        assert!(at + len <= self.len && len <= from.len, "{len} values of {} to {at} of {}", from.len, self.len);
        let bytes = len * size_of::<T>();
        cuda.bind()?;
        // SAFETY: within both allocations.
        unsafe { result::memcpy_dtod_async(self.at(at), from.address, bytes, cuda.stream()) }
            .attempt(|| format!("copying {bytes} bytes on the device"))
    }

    /// Zeroes its first `len` values, in the stream's order.
    pub fn clear(&mut self, cuda: &Cuda, len: usize) -> Result<()> {
        assert!(len <= self.len, "{len} values of {}", self.len);
        cuda.bind()?;
        // SAFETY: within the allocation.
        unsafe { result::memset_d8_async(self.address, 0, len * size_of::<T>(), cuda.stream()) }
            .attempt(|| format!("zeroing {} bytes", len * size_of::<T>()))
    }
}

impl<T> Drop for Buffer<T> {
    fn drop(&mut self) {
        self.allocated.fetch_sub(self.len * size_of::<T>(), Ordering::Relaxed);
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: allocated by `new` and not freed since. The driver waits for the work that uses it.
            let _ = unsafe { result::free_sync(self.address) };
        }
    }
}

/// Elements on the device are bf16 or float32 as the kernels are ([`Precision`]): a buffer of bytes.
pub type Elements = Buffer<u8>;

/// A matrix of elements in device memory, row-major: where it lies, its rows and columns, and elements from row to row.
#[derive(Clone, Copy, Debug)]
pub struct Rows {
    /// Address of the first element; a multiple of 16 bytes for most operations.
    pub address: u64,
    /// Rows.
    pub rows: usize,
    /// Columns in use.
    pub columns: usize,
    /// Elements from row to row, at least `columns`.
    pub stride: usize,
    /// Element type.
    pub precision: Precision,
}

impl Rows {
    /// The first `rows` rows of `columns` elements of a buffer, dense.
    pub fn new(buffer: &Elements, precision: Precision, rows: usize, columns: usize) -> Self {
        let bytes = rows * columns * precision.bytes();
        assert!(bytes <= buffer.len(), "{rows} x {columns} elements in {} bytes", buffer.len());
        Rows { address: buffer.address(), rows, columns, stride: columns, precision }
    }

    /// `count` columns from `first` on.
    pub fn columns(self, first: usize, count: usize) -> Self {
        assert!(first + count <= self.columns, "columns {first}+{count} of {}", self.columns);
        Rows { address: self.address + (first * self.precision.bytes()) as u64, columns: count, ..self }
    }

    /// `count` rows from `first` on.
    pub fn rows(self, first: usize, count: usize) -> Self {
        assert!(first + count <= self.rows, "rows {first}+{count} of {}", self.rows);
        Rows { address: self.address + (first * self.stride * self.precision.bytes()) as u64, rows: count, ..self }
    }

    /// Base and stride are multiples of 16 bytes.
    pub fn is_aligned(&self) -> bool {
        self.address.is_multiple_of(16) && (self.stride * self.precision.bytes()).is_multiple_of(16)
    }
}

impl Cuda {
    /// The elements of rows, dense, after all work given so far.
    pub fn read(&self, rows: Rows) -> Result<Vec<u8>> {
        let bytes = rows.precision.bytes();
        let mut all = vec![0u8; rows.rows * rows.stride * bytes];
        // The last row need not be followed by a whole stride.
        let used = all.len() - (rows.stride - rows.columns) * bytes * usize::from(rows.rows > 0);
        if used > 0 {
            self.bind()?;
            // SAFETY: rows lie in live memory; the stream is waited for before the bytes are used.
            unsafe { result::memcpy_dtoh_async(&mut all[..used], rows.address, self.stream()) }
                .attempt(|| format!("copying {used} bytes from the device"))?;
            self.synchronize()?;
        }
        let row = rows.stride * bytes;
        Ok(all.chunks_exact(row.max(1)).flat_map(|r| &r[..rows.columns * bytes]).copied().collect())
    }
}

/// Host numbers as elements of the kernels' type.
pub fn to_elements(precision: Precision, values: &[f32]) -> Vec<u8> {
    match precision {
        Precision::Bf16 => values.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect(),
        Precision::F32 => bytemuck::cast_slice(values).to_vec(),
    }
}

/// Elements as host numbers.
pub fn from_elements(precision: Precision, bytes: &[u8]) -> Vec<f32> {
    match precision {
        Precision::Bf16 => bytes.chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        Precision::F32 => bytemuck::pod_collect_to_vec(bytes),
    }
}
