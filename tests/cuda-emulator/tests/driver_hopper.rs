//! The driver calls that Hopper kernels need, by cudarc on an emulated H100: tensor maps, launches with clusters.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::mem::MaybeUninit;

use cudarc::driver::{CudaContext, DevicePtr, sys};
use half::bf16;

unsafe extern "C" {
    fn dlopen(path: *const c_char, flags: c_int) -> *mut c_void;
}

/// A map of a row-major matrix with boxes of 64 x 64.
fn map(
    data_type: sys::CUtensorMapDataType,
    address: u64,
    rows: usize,
    columns: usize,
    swizzle: u32,
) -> sys::CUtensorMap {
    let element = if data_type == sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32 { 4 } else { 2 };
    let (dims, strides) = ([columns as u64, rows as u64], [(columns * element) as u64]);
    let (box_dims, element_strides) = ([64u32, 64], [1u32, 1]);
    let mut out = MaybeUninit::<sys::CUtensorMap>::uninit();
    let swizzle = match swizzle {
        0 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
        _ => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
    };
    // SAFETY: arrays as long as the rank says; the map is written on success.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            out.as_mut_ptr(),
            data_type,
            2,
            address as *mut c_void,
            dims.as_ptr(),
            strides.as_ptr(),
            box_dims.as_ptr(),
            element_strides.as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
        .result()
        .unwrap();
        out.assume_init()
    }
}

fn config(grid: u32, block: u32, shared: u32, attributes: &mut [sys::CUlaunchAttribute]) -> sys::CUlaunchConfig {
    sys::CUlaunchConfig {
        gridDimX: grid,
        gridDimY: 1,
        gridDimZ: 1,
        blockDimX: block,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: shared,
        hStream: std::ptr::null_mut(),
        attrs: attributes.as_mut_ptr(),
        numAttrs: attributes.len() as u32,
    }
}

#[test]
fn tensor_maps_and_clusters_by_the_driver_api() {
    // SAFETY: no other thread runs: this is the only test of its binary.
    unsafe { std::env::set_var("CUEMU_CARD", "H100") };
    let exe = std::env::current_exe().unwrap();
    let deps = exe.parent().unwrap();
    let library = [deps, deps.parent().unwrap()]
        .iter()
        .map(|d| d.join("libcuda_emulator.so"))
        .find(|p| p.exists())
        .expect("the cdylib beside the tests");
    let path = CString::new(library.to_str().unwrap()).unwrap();
    // SAFETY: RTLD_NOW | RTLD_GLOBAL of our own library.
    assert!(!unsafe { dlopen(path.as_ptr(), 0x102) }.is_null());
    let ctx = CudaContext::new(0).unwrap();
    assert_eq!(ctx.compute_capability().unwrap(), (9, 0));
    let text = std::fs::read_to_string(format!("{}/tests/kernels/hopper.ptx", env!("CARGO_MANIFEST_DIR"))).unwrap();
    let text = CString::new(text).unwrap();
    let mut module = std::ptr::null_mut();
    // SAFETY: the text ends with a zero; the handle is written on success.
    unsafe { sys::cuModuleLoadData(&mut module, text.as_ptr().cast()).result().unwrap() };
    let function = |name: &CStr| {
        let mut f = std::ptr::null_mut();
        // SAFETY: the name ends with a zero; the handle is written on success.
        unsafe { sys::cuModuleGetFunction(&mut f, module, name.as_ptr()).result().unwrap() };
        f
    };
    let stream = ctx.default_stream();

    // A GEMM of ragged sizes whose operands are tensor maps passed by value.
    let (m, n, k) = (77usize, 100usize, 72usize);
    let x: Vec<bf16> = (0..m * k).map(|i| bf16::from_f32((i * 7 % 13) as f32 - 6.0)).collect();
    let y: Vec<bf16> = (0..n * k).map(|i| bf16::from_f32((i * 5 % 11) as f32 - 5.0)).collect();
    let (dx, dy) = (stream.clone_htod(&x).unwrap(), stream.clone_htod(&y).unwrap());
    let dc = stream.alloc_zeros::<f32>(m * n).unwrap();
    let (ax, ay, ac) = (dx.device_ptr(&stream).0, dy.device_ptr(&stream).0, dc.device_ptr(&stream).0);
    use sys::CUtensorMapDataType::{CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 as BF16, CU_TENSOR_MAP_DATA_TYPE_FLOAT32 as F32};
    let (mut ma, mut mb, mut mc) = (map(BF16, ax, m, k, 3), map(BF16, ay, n, k, 3), map(F32, ac, m, n, 0));
    let mut sizes = [m as i32, n as i32, k as i32];
    let gemm = function(c"gemm_0");
    let mut params: [*mut c_void; 6] = [
        (&raw mut ma).cast(),
        (&raw mut mb).cast(),
        (&raw mut mc).cast(),
        (&raw mut sizes[0]).cast(),
        (&raw mut sizes[1]).cast(),
        (&raw mut sizes[2]).cast(),
    ];
    // SAFETY: parameters are those of the kernel.
    unsafe {
        let dynamic = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        sys::cuFuncSetAttribute(gemm, dynamic, 49152).result().unwrap();
        sys::cuLaunchKernelEx(&config(2, 160, 49152, &mut []), gemm, params.as_mut_ptr(), std::ptr::null_mut())
            .result()
            .unwrap();
    }
    stream.synchronize().unwrap();
    let got = stream.clone_dtoh(&dc).unwrap();
    for i in 0..m {
        for j in 0..n {
            let expected: f32 = (0..k).map(|l| x[i * k + l].to_f32() * y[j * k + l].to_f32()).sum();
            assert_eq!(got[i * n + j], expected, "({i},{j})");
        }
    }

    // A launch whose cluster is an attribute.
    let exchange = function(c"cluster_exchange_0");
    let (out, count) = (stream.alloc_zeros::<u32>(256).unwrap(), stream.alloc_zeros::<u32>(1).unwrap());
    let (mut out_at, mut count_at) = (out.device_ptr(&stream).0, count.device_ptr(&stream).0);
    // SAFETY: plain numbers; zeros are valid for every value of the union.
    let mut attribute: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
    attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    attribute.value.clusterDim.x = 4;
    attribute.value.clusterDim.y = 1;
    attribute.value.clusterDim.z = 1;
    let mut attributes = [attribute];
    let launch = config(4, 64, 0, &mut attributes);
    let mut params: [*mut c_void; 2] = [(&raw mut out_at).cast(), (&raw mut count_at).cast()];
    let mut clusters = 0;
    // SAFETY: parameters are those of the kernel.
    unsafe {
        sys::cuOccupancyMaxActiveClusters(&mut clusters, exchange, &launch).result().unwrap();
        sys::cuLaunchKernelEx(&launch, exchange, params.as_mut_ptr(), std::ptr::null_mut()).result().unwrap();
    }
    assert_eq!(clusters, 132 * 32 / 4);
    stream.synchronize().unwrap();
    assert_eq!(stream.clone_dtoh(&count).unwrap(), [256]);

    // What the manual forbids is refused.
    let mut bad = MaybeUninit::<sys::CUtensorMap>::uninit();
    // SAFETY: as in `map`.
    let refused = unsafe {
        sys::cuTensorMapEncodeTiled(
            bad.as_mut_ptr(),
            BF16,
            2,
            ax as *mut c_void,
            [72u64, 77].as_ptr(),
            [100u64].as_ptr(),
            [64u32, 64].as_ptr(),
            [1u32, 1].as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_NONE,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    assert_eq!(refused, sys::cudaError_enum::CUDA_ERROR_INVALID_VALUE, "a stride of 100 bytes");
}
