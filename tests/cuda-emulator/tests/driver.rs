//! Unmodified cudarc on the emulator as `libcuda.so.1`: allocation, copies, launches, streams, events, graphs, errors.
//!
//! The library is opened by its path; its name is then known to the process, and cudarc's own search finds it.

use std::ffi::{CString, c_char, c_int, c_void};
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

use cudarc::driver::{CudaContext, LaunchConfig, PushKernelArg, sys};
use cudarc::nvrtc::Ptx;

unsafe extern "C" {
    fn dlopen(path: *const c_char, flags: c_int) -> *mut c_void;
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
}

fn library() -> PathBuf {
    let exe = std::env::current_exe().unwrap();
    let deps = exe.parent().unwrap();
    // `cargo test` writes the library beside the tests; one a directory up may be of an older `cargo build`.
    [deps, deps.parent().unwrap()]
        .iter()
        .map(|d| d.join("libcuda_emulator.so"))
        .find(|p| p.exists())
        .expect("the cdylib beside the tests")
}

/// The emulator as the process's CUDA driver. One context, one stream of errors: tests take turns.
fn driver() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let path = CString::new(library().to_str().unwrap()).unwrap();
    // SAFETY: RTLD_NOW | RTLD_GLOBAL of our own library.
    assert!(!unsafe { dlopen(path.as_ptr(), 0x102) }.is_null());
    // SAFETY: only asks.
    assert!(unsafe { sys::is_culib_present() });
    turn
}

fn kernels(name: &str) -> Ptx {
    Ptx::from_src(std::fs::read_to_string(format!("{}/tests/kernels/{name}.ptx", env!("CARGO_MANIFEST_DIR"))).unwrap())
}

#[test]
fn allocation_copies_and_a_launch() {
    let _turn = driver();
    let ctx = CudaContext::new(0).unwrap();
    assert!(ctx.name().unwrap().contains("A100"));
    assert_eq!(ctx.compute_capability().unwrap(), (8, 0));
    let stream = ctx.default_stream();
    let f = ctx.load_module(kernels("basics")).unwrap().load_function("vector_add").unwrap();
    let x: Vec<f32> = (0..1000).map(|i| i as f32).collect();
    let a = stream.clone_htod(&x).unwrap();
    let b = a.clone();
    let mut c = stream.alloc_zeros::<f32>(1000).unwrap();
    let n = 1000i32;
    // SAFETY: the arguments are those of the kernel.
    unsafe { stream.launch_builder(&f).arg(&a).arg(&b).arg(&mut c).arg(&n).launch(LaunchConfig::for_num_elems(1000)) }
        .unwrap();
    let out = stream.clone_dtoh(&c).unwrap();
    assert!(out.iter().enumerate().all(|(i, v)| *v == 2.0 * i as f32));
    let part = c.slice(10..20);
    assert_eq!(stream.clone_dtoh(&part).unwrap()[0], 20.0);
    assert!(ctx.load_module(kernels("basics")).unwrap().load_function("nothing").is_err());
}

#[test]
fn streams_events_and_pinned_memory() {
    let _turn = driver();
    let ctx = CudaContext::new(0).unwrap();
    let first = ctx.new_stream().unwrap();
    let second = ctx.new_stream().unwrap();
    let start = first.record_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT)).unwrap();
    let f = ctx.load_module(kernels("basics")).unwrap().load_function("scan_block").unwrap();
    let x = first.clone_htod(&vec![1i32; 100]).unwrap();
    let mut y = first.alloc_zeros::<i32>(100).unwrap();
    let n = 100i32;
    let shape = LaunchConfig { grid_dim: (1, 1, 1), block_dim: (128, 1, 1), shared_mem_bytes: 1024 };
    // SAFETY: the arguments are those of the kernel.
    unsafe { first.launch_builder(&f).arg(&x).arg(&mut y).arg(&n).launch(shape) }.unwrap();
    second.join(&first).unwrap();
    let out = second.clone_dtoh(&y).unwrap();
    assert_eq!(out[99], 100);
    let end = first.record_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT)).unwrap();
    assert!(start.elapsed_ms(&end).unwrap() >= 0.0);
    // SAFETY: written before it is read.
    let mut pinned = unsafe { ctx.alloc_pinned::<i32>(100) }.unwrap();
    pinned.as_mut_slice().unwrap().fill(3);
    let z = first.clone_htod(&pinned).unwrap();
    assert_eq!(first.clone_dtoh(&z).unwrap(), vec![3; 100]);
    first.synchronize().unwrap();
}

#[test]
fn graphs_replay_what_a_stream_captured() {
    let _turn = driver();
    let ctx = CudaContext::new(0).unwrap();
    // SAFETY: one stream.
    unsafe { ctx.disable_event_tracking() };
    let stream = ctx.new_stream().unwrap();
    let f = ctx.load_module(kernels("basics")).unwrap().load_function("vector_add").unwrap();
    let one = stream.clone_htod(&[1f32; 64]).unwrap();
    let mut sum = stream.alloc_zeros::<f32>(64).unwrap();
    let n = 64i32;
    stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    let address = {
        use cudarc::driver::DevicePtrMut;
        sum.device_ptr_mut(&stream).0
    };
    // SAFETY: sum += one, with the address of the sum twice.
    unsafe {
        stream.launch_builder(&f).arg(&one).arg(&address).arg(&address).arg(&n).launch(LaunchConfig::for_num_elems(64))
    }
    .unwrap();
    let graph = stream
        .end_capture(sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH)
        .unwrap()
        .unwrap();
    assert_eq!(stream.clone_dtoh(&sum).unwrap()[5], 0.0, "captured, not run");
    for _ in 0..3 {
        graph.launch().unwrap();
    }
    assert_eq!(stream.clone_dtoh(&sum).unwrap(), vec![3.0; 64]);
}

/// A raw stream that a test captures.
fn capturing(flags: u32, mode: sys::CUstreamCaptureMode) -> sys::CUstream {
    let mut stream = std::ptr::null_mut();
    // SAFETY: pointers to locals.
    unsafe {
        assert_eq!(sys::cuStreamCreate(&mut stream, flags) as u32, 0);
        assert_eq!(sys::cuStreamBeginCapture_v2(stream, mode) as u32, 0);
    }
    stream
}

/// The answer of the end of a capture; nothing but its graph is checked.
fn end_capture(stream: sys::CUstream) -> u32 {
    let mut graph = std::ptr::null_mut();
    // SAFETY: pointers to locals.
    unsafe {
        let code = sys::cuStreamEndCapture(stream, &mut graph) as u32;
        assert_eq!(code == 0, !graph.is_null());
        if code == 0 {
            assert_eq!(sys::cuGraphDestroy(graph) as u32, 0);
        }
        assert_eq!(sys::cuStreamDestroy_v2(stream) as u32, 0);
        code
    }
}

#[test]
fn a_capture_refuses_what_a_driver_refuses() {
    use sys::CUstreamCaptureMode as Mode;
    let _turn = driver();
    let ctx = CudaContext::new(0).unwrap();
    ctx.bind_to_thread().unwrap();
    // SAFETY: pointers to locals, memory and events that live.
    unsafe {
        let mut memory = 0;
        let (mut before, mut inside) = (std::ptr::null_mut(), std::ptr::null_mut());
        assert_eq!(sys::cuMemAlloc_v2(&mut memory, 64) as u32, 0);
        assert_eq!(sys::cuEventCreate(&mut before, 0) as u32, 0);
        assert_eq!(sys::cuEventCreate(&mut inside, 0) as u32, 0);
        assert_eq!(sys::cuEventRecord(before, std::ptr::null_mut()) as u32, 0);
        let mut other = 0;
        let bytes = [0u8; 64];
        type Call<'a> = (&'a str, u32, &'a mut dyn FnMut(sys::CUstream) -> u32);
        let mut module = std::ptr::null_mut();
        let calls: [Call; 8] = [
            ("cuStreamSynchronize", 900, &mut |s| sys::cuStreamSynchronize(s) as u32),
            ("cuStreamQuery", 900, &mut |s| sys::cuStreamQuery(s) as u32),
            ("cuCtxSynchronize", 900, &mut |_| sys::cuCtxSynchronize() as u32),
            ("cuMemAlloc", 900, &mut |_| sys::cuMemAlloc_v2(&mut other, 64) as u32),
            ("cuMemcpyHtoD", 900, &mut |_| sys::cuMemcpyHtoD_v2(memory, bytes.as_ptr().cast(), 64) as u32),
            ("cuEventSynchronize", 900, &mut |_| sys::cuEventSynchronize(before) as u32),
            ("cuModuleLoadData", 900, &mut |_| {
                sys::cuModuleLoadData(&mut module, c".version 7.0\n.target sm_80\n.address_size 64\n".as_ptr().cast())
                    as u32
            }),
            ("cuStreamWaitEvent", 905, &mut |s| sys::cuStreamWaitEvent(s, before, 0) as u32),
        ];
        for (name, code, call) in calls {
            let stream = capturing(1, Mode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
            assert_eq!(call(stream), code, "{name}");
            let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
            assert_eq!(sys::cuStreamIsCapturing(stream, &mut status) as u32, 0);
            assert_eq!(status as u32, 2, "{name}");
            assert_eq!(sys::cuMemsetD8Async(memory, 1, 64, stream) as u32, 901, "{name}");
            assert_eq!(end_capture(stream), 901, "{name}");
        }
        // What breaks nothing: an event of the capture itself, asked about or waited for.
        let stream = capturing(1, Mode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
        assert_eq!(sys::cuEventRecord(inside, stream) as u32, 0);
        assert_eq!(sys::cuStreamWaitEvent(stream, inside, 0) as u32, 0);
        assert_eq!(sys::cuEventQuery(inside) as u32, 907);
        assert_eq!(sys::cuStreamBeginCapture_v2(stream, Mode::CU_STREAM_CAPTURE_MODE_RELAXED) as u32, 401);
        assert_eq!(end_capture(stream), 0);
        // Modes: a relaxed capture forbids nobody, a global one all threads, a thread's own only itself.
        let allocates = || {
            let mut address = 0;
            let code = sys::cuMemAlloc_v2(&mut address, 64) as u32;
            if code == 0 { sys::cuMemFree_v2(address) as u32 } else { code }
        };
        let elsewhere = || std::thread::scope(|s| s.spawn(allocates).join().unwrap());
        let stream = capturing(1, Mode::CU_STREAM_CAPTURE_MODE_RELAXED);
        assert_eq!((allocates(), elsewhere()), (0, 0));
        assert_eq!(end_capture(stream), 0);
        let stream = capturing(1, Mode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
        assert_eq!(elsewhere(), 0);
        let address = stream as usize;
        let wrong = std::thread::spawn(move || {
            let mut graph = std::ptr::null_mut();
            sys::cuStreamEndCapture(address as sys::CUstream, &mut graph) as u32
        });
        assert_eq!(wrong.join().unwrap(), 908);
        let mut mode = Mode::CU_STREAM_CAPTURE_MODE_RELAXED;
        assert_eq!(sys::cuThreadExchangeStreamCaptureMode(&mut mode) as u32, 0);
        assert_eq!(mode, Mode::CU_STREAM_CAPTURE_MODE_GLOBAL);
        assert_eq!(allocates(), 0);
        assert_eq!(sys::cuThreadExchangeStreamCaptureMode(&mut mode) as u32, 0);
        assert_eq!(end_capture(stream), 0);
        let stream = capturing(1, Mode::CU_STREAM_CAPTURE_MODE_GLOBAL);
        assert_eq!(elsewhere(), 900);
        assert_eq!(end_capture(stream), 901);
        // A blocking stream and the legacy one wait for each other.
        let stream = capturing(0, Mode::CU_STREAM_CAPTURE_MODE_RELAXED);
        assert_eq!(sys::cuMemsetD8Async(memory, 1, 64, std::ptr::null_mut()) as u32, 906);
        assert_eq!(end_capture(stream), 901);
        assert_eq!(
            sys::cuStreamBeginCapture_v2(std::ptr::null_mut(), Mode::CU_STREAM_CAPTURE_MODE_RELAXED) as u32,
            900
        );
        assert_eq!(sys::cuMemFree_v2(memory) as u32, 0);
        for event in [before, inside] {
            assert_eq!(sys::cuEventDestroy_v2(event) as u32, 0);
        }
    }
}

#[test]
fn shared_memory_limits_and_occupancy() {
    let _turn = driver();
    let ctx = CudaContext::new(0).unwrap();
    let stream = ctx.default_stream();
    let f = ctx.load_module(kernels("basics")).unwrap().load_function("scan_block").unwrap();
    let x = stream.clone_htod(&[1i32; 8]).unwrap();
    let mut y = stream.alloc_zeros::<i32>(8).unwrap();
    let n = 8i32;
    let shape = LaunchConfig { grid_dim: (1, 1, 1), block_dim: (32, 1, 1), shared_mem_bytes: 100_000 };
    // SAFETY: the arguments are those of the kernel.
    let launch = |y: &mut cudarc::driver::CudaSlice<i32>| unsafe {
        stream.launch_builder(&f).arg(&x).arg(y).arg(&n).launch(shape)
    };
    assert!(launch(&mut y).is_err(), "more than 48 KiB must be asked for");
    f.set_attribute(sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, 100_000).unwrap();
    launch(&mut y).unwrap();
    assert_eq!(stream.clone_dtoh(&y).unwrap()[7], 8);
    assert_eq!(f.occupancy_max_active_blocks_per_multiprocessor(1024, 0, None).unwrap(), 2);
    assert_eq!(f.occupancy_max_active_blocks_per_multiprocessor(128, 100_000, None).unwrap(), 1);
}

#[test]
fn calls_that_are_not_there_say_so_and_every_call_exists() {
    let _turn = driver();
    let path = CString::new(library().to_str().unwrap()).unwrap();
    // SAFETY: opened before.
    let library = unsafe { dlopen(path.as_ptr(), 0x102) };
    // SAFETY: functions of no arguments.
    let call = |name: &str| -> u32 {
        let name = CString::new(name).unwrap();
        let f = unsafe { dlsym(library, name.as_ptr()) };
        assert!(!f.is_null(), "{name:?}");
        unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn() -> u32>(f)() }
    };
    assert_eq!(call("cuTexRefCreate"), 801);
    assert_eq!(call("cuArrayCreate_v2"), 801);
    // SAFETY: pointers to locals.
    unsafe {
        let mut address = std::ptr::null_mut();
        let mut status = sys::CUdriverProcAddressQueryResult::CU_GET_PROC_ADDRESS_SUCCESS;
        assert_eq!(
            sys::cuGetProcAddress_v2(c"cuMemAlloc".as_ptr(), &mut address, 12000, 0, &mut status).result(),
            Ok(())
        );
        assert!(!address.is_null());
        assert!(sys::cuGetProcAddress_v2(c"cuNothing".as_ptr(), &mut address, 12000, 0, &mut status).result().is_err());
    }
}

#[test]
fn images_that_cannot_run_are_refused_with_the_driver_s_codes() {
    let _turn = driver();
    let ctx = CudaContext::new(0).unwrap();
    ctx.bind_to_thread().unwrap();
    let load = |image: &[u8]| {
        let mut module = std::ptr::null_mut();
        // SAFETY: images end in NUL or carry their size.
        unsafe { sys::cuModuleLoadData(&mut module, image.as_ptr().cast()) as u32 }
    };
    assert_eq!(load(b"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\0"), 209);
    assert_eq!(load(b"nonsense\0"), 200);
    assert_eq!(load(b".version 7.0\n.target sm_80\n.address_size 64\n.entry k() { nonsense.u32 %r1; }\0"), 218);
    assert_eq!(load(b".version 8.0\n.target sm_90\n.address_size 64\n\0"), 209);
    assert_eq!(load(b".version 7.0\n.target sm_80\n.address_size 64\n\0"), 0);
}

/// Runs this test binary again for one of the cases below, with an environment.
fn child(case: &str, environment: &[(&str, &str)]) -> (bool, String) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "child_process", "--nocapture"])
        .env("CUEMU_TEST_CASE", case)
        .envs(environment.iter().copied());
    let output = command.output().unwrap();
    (
        output.status.success(),
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr),
    )
}

#[test]
fn child_process() {
    let Ok(case) = std::env::var("CUEMU_TEST_CASE") else { return };
    let _turn = driver();
    let ctx = CudaContext::new(0).unwrap();
    let stream = ctx.default_stream();
    let one = LaunchConfig { grid_dim: (1, 1, 1), block_dim: (64, 1, 1), shared_mem_bytes: 0 };
    match case.as_str() {
        "race" => {
            let f = ctx.load_module(kernels("bugs")).unwrap().load_function("shared_race").unwrap();
            let mut y = stream.alloc_zeros::<f32>(64).unwrap();
            // SAFETY: the arguments are those of the kernel.
            unsafe { stream.launch_builder(&f).arg(&mut y).launch(one) }.unwrap();
            println!("result {:?}", stream.synchronize().map_err(|e| e.0 as u32));
        }
        "graph_race" => {
            let stream = ctx.new_stream().unwrap();
            let f = ctx.load_module(kernels("bugs")).unwrap().load_function("shared_race").unwrap();
            let y = stream.alloc_zeros::<f32>(64).unwrap();
            // SAFETY: one stream.
            unsafe { ctx.disable_event_tracking() };
            let address = {
                use cudarc::driver::DevicePtr;
                y.device_ptr(&stream).0
            };
            stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
            // SAFETY: the arguments are those of the kernel.
            unsafe { stream.launch_builder(&f).arg(&address).launch(one) }.unwrap();
            let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
            let graph = stream.end_capture(flags).unwrap().unwrap();
            println!("captured {:?}", stream.synchronize().map_err(|e| e.0 as u32));
            graph.launch().unwrap();
            println!("result {:?}", stream.synchronize().map_err(|e| e.0 as u32));
        }
        "memory" => {
            // Page-locked memory of the host takes none of the card's.
            // SAFETY: not read.
            let pinned = unsafe { ctx.alloc_pinned::<u8>(1 << 20) }.unwrap();
            println!("free {:?}", cudarc::driver::result::mem_get_info().unwrap());
            // SAFETY: only allocates.
            println!("more {:?}", unsafe { cudarc::driver::result::malloc_sync(1 << 20) }.map_err(|e| e.0 as u32));
            drop(pinned);
        }
        "double_free" => {
            // SAFETY: the second free is the mistake that must be answered.
            unsafe {
                let p = cudarc::driver::result::malloc_sync(64).unwrap();
                cudarc::driver::result::free_sync(p).unwrap();
                println!("result {:?}", cudarc::driver::result::free_sync(p).map_err(|e| e.0 as u32));
                cudarc::driver::result::malloc_sync(4096).unwrap();
            }
        }
        _ => {
            println!("card {} {:?}", ctx.name().unwrap(), ctx.compute_capability().unwrap());
            let f = ctx.load_module(kernels("basics")).unwrap().load_function("histogram").unwrap();
            let x = stream.clone_htod(&[7u8; 100]).unwrap();
            let mut bins = stream.alloc_zeros::<u32>(256).unwrap();
            let n = 100i32;
            // SAFETY: the arguments are those of the kernel.
            unsafe { stream.launch_builder(&f).arg(&x).arg(&mut bins).arg(&n).launch(one) }.unwrap();
            assert_eq!(stream.clone_dtoh(&bins).unwrap()[7], 100);
        }
    }
}

#[test]
fn findings_become_sticky_errors_and_checks_can_be_off() {
    let (ok, text) = child("race", &[]);
    assert!(
        ok && text.contains("result Err(719)") && text.contains("data race in shared memory in shared_race"),
        "{text}"
    );
    assert!(text.contains("bugs.cu:"), "{text}");
    let (ok, text) = child("race", &[("CUEMU_CHECK", "off")]);
    assert!(ok && text.contains("result Ok(())"), "{text}");
    // The checks hold in a graph: when it runs, not when it is captured.
    let (ok, text) = child("graph_race", &[]);
    assert!(ok && text.contains("captured Ok(())") && text.contains("result Err(719)"), "{text}");
    assert!(text.contains("data race in shared memory in shared_race"), "{text}");
    let (ok, text) = child("memory", &[("CUEMU_MEMORY", "768KiB")]);
    assert!(ok && text.contains("free (786432, 786432)") && text.contains("more Err(2)"), "{text}");
    let (ok, text) = child("double_free", &[]);
    assert!(ok && text.contains("result Err(1)") && text.contains("double free"), "{text}");
    assert!(text.contains("memory not freed") && text.contains("4096 bytes"), "{text}");
}

#[test]
fn reports_cards_and_tables() {
    let path = std::env::temp_dir().join(format!("cuemu-report-{}.json", std::process::id()));
    let (ok, text) =
        child("report", &[("CUEMU_CARD", "H100"), ("CUEMU_REPORT", path.to_str().unwrap()), ("CUEMU_TABLE", "1")]);
    assert!(ok && text.contains("card NVIDIA H100") && text.contains("(9, 0)") && text.contains("modelled"), "{text}");
    let report: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    std::fs::remove_file(&path).unwrap();
    let launch = &report["launches"][0];
    assert_eq!(launch["kernel"], "histogram");
    assert_eq!(launch["atomics"]["shared"], 100);
    assert_eq!(launch["atomics"]["global"], 1);
    assert!(launch["modelled"]["seconds"].as_f64().unwrap() > 0.0);
    assert_eq!(launch["cards"]["H100"]["seconds"], launch["modelled"]["seconds"]);
    assert!(launch["cards"]["A100"]["seconds"].as_f64() > launch["cards"]["H100"]["seconds"].as_f64());
    let (part, whole) = (launch["main_loop"]["warps"].as_u64().unwrap(), launch["instructions"].as_object().unwrap());
    let all: u64 = whole.values().map(|class| class["warps"].as_u64().unwrap()).sum();
    assert!(part > 0 && part <= all && launch["main_loop"]["tensor_warps"] == 0, "{launch}");
    assert_eq!(launch["findings"].as_array().unwrap().len(), 0);
}
