//! `cuTensorMapEncodeTiled` and `cuTensorMapReplaceAddress`: the caller's arrays to the 128 bytes of a map.

use std::ffi::{c_uint, c_void};

use super::{driver_calls, error};
use crate::memory::tensor_map::{BYTES, Swizzle, TensorMap};

/// Writes a map to the caller; what the driver's manual forbids is `CUDA_ERROR_INVALID_VALUE`, with the reason on stderr.
unsafe fn put(to: *mut c_void, map: &TensorMap) -> u32 {
    match map.encode() {
        Ok(bytes) => {
            // SAFETY: the caller's `CUtensorMap` has 128 bytes.
            unsafe { to.cast::<[u8; BYTES]>().write(bytes) };
            error::SUCCESS
        }
        Err(problem) => {
            eprintln!("[cuda-emulator] tensor map: {problem}");
            error::INVALID_VALUE
        }
    }
}

driver_calls! { lookup:
    fn cuTensorMapEncodeTiled(map: *mut c_void, data_type: c_uint, rank: c_uint, address: u64, dims: *const u64, strides: *const u64, box_dims: *const u32, element_strides: *const u32, interleave: c_uint, swizzle: c_uint, _promotion: c_uint, fill: c_uint) |_d| {
        let rank = rank as usize;
        if map.is_null() || !(map as usize).is_multiple_of(64) || dims.is_null() || box_dims.is_null() || element_strides.is_null()
            || !(1..=5).contains(&rank) || strides.is_null() && rank > 1
        {
            return error::INVALID_VALUE;
        }
        let swizzle = match (interleave, swizzle) {
            (0, 0) => Swizzle::None,
            (0, 1) => Swizzle::B32,
            (0, 2) => Swizzle::B64,
            (0, 3) => Swizzle::B128,
            _ => {
                eprintln!("[cuda-emulator] tensor map: interleave {interleave} with swizzle {swizzle} is not supported");
                return error::NOT_SUPPORTED;
            }
        };
        let list = |from: *const u32| std::slice::from_raw_parts(from, rank).to_vec();
        put(map, &TensorMap {
            data_type: data_type.min(255) as u8,
            address,
            dims: std::slice::from_raw_parts(dims, rank).to_vec(),
            strides: (0..rank - 1).map(|i| *strides.add(i)).collect(),
            box_dims: list(box_dims),
            element_strides: list(element_strides),
            swizzle,
            nan_fill: fill == 1,
        })
    }
    fn cuTensorMapReplaceAddress(map: *mut c_void, address: u64) |_d| {
        if map.is_null() {
            return error::INVALID_VALUE;
        }
        match TensorMap::decode(&map.cast::<[u8; BYTES]>().read()) {
            Some(old) => put(map, &TensorMap { address, ..old }),
            None => error::INVALID_VALUE,
        }
    }
}
