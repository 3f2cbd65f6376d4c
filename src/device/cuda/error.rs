//! What can go wrong on a card.

use cudarc::driver::result::DriverError;
use thiserror::Error;

/// Errors of the CUDA implementation.
#[derive(Debug, Error)]
pub enum Error {
    /// No driver on this machine.
    #[error(
        "no CUDA driver (libcuda.so.1) was found: install the NVIDIA driver, or leave out --device cuda to run on the CPU"
    )]
    NoDriver,
    /// No such card.
    #[error("there is no CUDA device {ordinal}: {found} found (`collm-engine devices` lists them)")]
    NoDevice {
        /// Asked for.
        ordinal: usize,
        /// How many there are.
        found: usize,
    },
    /// The card is older than the kernels.
    #[error("{name} has compute capability {major}.{minor}; the kernels need 8.0 (A100, RTX 30) or newer")]
    TooOld {
        /// The card.
        name: String,
        /// Compute capability.
        major: i32,
        /// Compute capability.
        minor: i32,
    },
    /// A driver call failed.
    #[error("CUDA: {what}: {text}")]
    Driver {
        /// What was tried.
        what: String,
        /// The driver's name and text of the error.
        text: String,
    },
    /// Memory does not suffice.
    #[error("CUDA: {bytes} bytes of device memory for {what} could not be had ({free} of {total} are free): {hint}")]
    OutOfMemory {
        /// Asked for.
        bytes: usize,
        /// What they are for.
        what: String,
        /// Free on the card.
        free: usize,
        /// Of the card.
        total: usize,
        /// What to do.
        hint: &'static str,
    },
    /// cuBLASLt was asked for and is not there.
    #[error(
        "no cuBLASLt could be opened ({reasons}); with the CUDA toolkit or `pip install nvidia-cublas`, name its libcublasLt.so \
         in COLLM_CUBLASLT or its folder in LD_LIBRARY_PATH; `--gemm ours` does without it"
    )]
    NoCublasLt {
        /// What was tried, and why it failed.
        reasons: String,
    },
    /// cuBLASLt refused or failed.
    #[error("cuBLASLt: {what} (`--gemm ours` does without it)")]
    CublasLt {
        /// What was tried, and the library's answer.
        what: String,
    },
    /// Operands that a kernel cannot take.
    #[error("{operation}: {what}")]
    Operand {
        /// Which operation.
        operation: &'static str,
        /// Which operand, found and allowed.
        what: String,
    },
}

/// Of the CUDA implementation.
pub type Result<T> = std::result::Result<T, Error>;

/// A driver's answer with what was tried.
pub(super) trait Attempt<T> {
    /// Says what failed.
    fn attempt(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Attempt<T> for std::result::Result<T, DriverError> {
    fn attempt(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|e| {
            let name = e.error_name().map_or_else(|_| format!("{:?}", e.0), |n| n.to_string_lossy().into_owned());
            let text = e.error_string().map_or_else(|_| String::new(), |n| n.to_string_lossy().into_owned());
            Error::Driver { what: what(), text: format!("{name}: {text}") }
        })
    }
}

/// Refuses an operand.
pub(super) fn require(ok: bool, operation: &'static str, what: impl FnOnce() -> String) -> Result<()> {
    if ok { Ok(()) } else { Err(Error::Operand { operation, what: what() }) }
}
