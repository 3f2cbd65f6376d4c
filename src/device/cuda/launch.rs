//! Starting kernels.

use std::ffi::{CString, c_void};

use cudarc::driver::{result, sys};

use super::context::{Cuda, Precision};
use super::error::{Attempt, Error, Result};

/// A kernel's handle, resolved once.
#[derive(Clone, Copy, Debug)]
pub struct Kernel {
    function: sys::CUfunction,
    /// Its name in the module.
    pub name: &'static str,
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory, bytes.
    pub shared_bytes: u32,
}

// SAFETY: a handle is a number to the driver, which may be used from any thread.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

/// A kernel's argument: any plain value, which the driver copies when the kernel is started.
pub(super) trait Argument {
    fn address(&self) -> *mut c_void;
}

impl<T: Copy> Argument for T {
    fn address(&self) -> *mut c_void {
        std::ptr::from_ref(self).cast_mut().cast()
    }
}

/// Borrows values as arguments for [`Cuda::launch`].
macro_rules! arguments {
    ($($argument:expr),* $(,)?) => {
        &[$(&$argument as &dyn super::launch::Argument),*]
    };
}
pub(super) use arguments;

/// Most arguments of a kernel.
const MAX_ARGUMENTS: usize = 16;

impl Cuda {
    /// Finds kernel `name` (without the precision's suffix) in the module of file `file`.
    pub(super) fn kernel(
        &self,
        file: &'static str,
        name: &'static str,
        threads: u32,
        shared_bytes: usize,
    ) -> Result<Kernel> {
        let full = format!("{name}_{}", self.precision().suffix());
        let module = self.module(file)?;
        let symbol = CString::new(full.clone()).expect("a kernel's name");
        // SAFETY: the module is loaded as long as the context lives.
        let function = unsafe { result::module::get_function(module, symbol) }
            .attempt(|| format!("kernel {full} of kernels/{file}.cu"))?;
        if shared_bytes > 48 << 10 {
            let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the handle was just resolved.
            unsafe { result::function::set_function_attribute(function, attribute, shared_bytes as i32) }
                .attempt(|| format!("{shared_bytes} bytes of shared memory for {full}"))?;
        }
        Ok(Kernel { function, name, threads, shared_bytes: shared_bytes as u32 })
    }

    /// Starts a kernel; an empty grid starts nothing.
    ///
    /// # Safety
    /// The arguments are those of the kernel, in number, order and type, and the memory they name is large enough and lives
    /// until the stream has passed the launch.
    pub(super) unsafe fn launch(&self, kernel: Kernel, grid: [usize; 3], arguments: &[&dyn Argument]) -> Result<()> {
        if grid.contains(&0) {
            return Ok(());
        }
        let limit = [0x7fff_ffff, 65_535, 65_535];
        if grid.iter().zip(limit).any(|(g, l)| *g > l) {
            return Err(Error::Operand {
                operation: kernel.name,
                what: format!("a grid of {grid:?} blocks; at most {limit:?}"),
            });
        }
        let [x, y, z] = grid.map(|g| g as u32);
        let mut addresses = [std::ptr::null_mut(); MAX_ARGUMENTS];
        // A reference is plain too: what is asked for is the value behind it.
        addresses.iter_mut().zip(arguments).for_each(|(to, argument)| *to = <dyn Argument>::address(*argument));
        self.bind()?;
        // SAFETY: the caller's promise.
        unsafe {
            result::launch_kernel(
                kernel.function,
                (x, y, z),
                (kernel.threads, 1, 1),
                kernel.shared_bytes,
                self.stream(),
                &mut addresses[..arguments.len()],
            )
        }
        .attempt(|| format!("launching {}_{}", kernel.name, self.precision().suffix()))
    }
}

impl Precision {
    pub(super) fn suffix(self) -> &'static str {
        match self {
            Precision::Bf16 => "bf16",
            Precision::F32 => "f32",
        }
    }
}
