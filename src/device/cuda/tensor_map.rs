//! Tensor maps (compute capability 9.0 on): a matrix in device memory and the box of it that one copy fetches.
//!
//! The driver writes a map on the host in well under a microsecond; a kernel takes it by value. Nothing is kept.

use cudarc::driver::sys;

use super::context::Precision;
use super::error::{Attempt, Result, require};
use super::memory::Rows;

/// Columns of a box: the 128 bytes of a swizzled row, in bf16.
pub(super) const BOX_COLUMNS: usize = 64;

/// `CUtensorMap`, at the alignment that later toolkits ask for.
#[repr(C, align(128))]
#[derive(Clone, Copy)]
pub(super) struct TensorMap(sys::CUtensorMap);

impl TensorMap {
    /// A bf16 matrix in boxes of `box_rows` rows of 64 columns, rows of a box swizzled by 128 bytes; what lies outside reads as
    /// zeros. The matrix is not empty, its rows lie at 16-byte boundaries.
    pub fn new(rows: Rows, box_rows: usize) -> Result<Self> {
        require(
            rows.precision == Precision::Bf16
                && rows.is_aligned()
                && rows.rows > 0
                && rows.columns > 0
                && (1..=256).contains(&box_rows),
            "tensor map",
            || format!("boxes of {box_rows} rows of {rows:?}"),
        )?;
        let mut map = TensorMap(sys::CUtensorMap { opaque: [0; 16] });
        // Innermost first.
        let sizes = [rows.columns as u64, rows.rows as u64];
        let strides = [(rows.stride * rows.precision.bytes()) as u64];
        let box_sizes = [BOX_COLUMNS as u32, box_rows as u32];
        // SAFETY: the arrays have as many entries as the call reads for two dimensions; the driver looks at the address as a
        // number only. `gemm_sm90::is_available` found a driver that has the call.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut map.0,
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                2,
                rows.address as *mut std::ffi::c_void,
                sizes.as_ptr(),
                strides.as_ptr(),
                box_sizes.as_ptr(),
                [1u32, 1].as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        }
        .result()
        .attempt(|| format!("a tensor map of {rows:?}"))?;
        Ok(map)
    }
}
