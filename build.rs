//! Compiles `kernels/*.cu`: one fatbin a file, PTX for every card from sm_80 on and machine code for the common ones.
//!
//! Without nvcc the PTX kept in `kernels/ptx` is embedded instead, which a driver compiles when it loads it; the build never
//! fails for want of a toolkit. `COLLM_KERNELS=ptx` does that on purpose; `COLLM_KERNELS=update` (with nvcc) also writes
//! `kernels/ptx` and the table of registers and spills, `kernels/ptxas.tsv`, anew. Toolkit facts: README, "CUDA kernels".

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Machine code is made for these; other cards take the PTX.
const ARCHITECTURES: [&str; 6] = ["80", "86", "89", "90", "100", "120"];
/// The PTX version that the kernels need; nvcc writes its own newest, which older drivers would refuse.
const PTX_VERSION: &str = "7.0";
/// Each kernel is built for bf16 elements, and for float32 ones to tell rounding from mistakes.
const PRECISIONS: [(&str, &str); 2] = [("bf16", ""), ("f32", "-DCOLLM_F32")];

fn main() {
    println!("cargo::rerun-if-changed=kernels");
    for variable in ["NVCC", "CUDA_HOME", "COLLM_KERNELS"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let mode = std::env::var("COLLM_KERNELS").unwrap_or_default();
    let nvcc = if mode == "ptx" { None } else { find_nvcc() };
    let sources = sources();
    let mut listing = String::from("[\n");
    let mut table = BTreeMap::new();
    for source in &sources {
        let name = source.file_stem().expect("a .cu file").to_str().expect("an ASCII name").to_owned();
        let digest = digest(source);
        for (precision, define) in PRECISIONS {
            let image = format!("{name}_{precision}");
            let kept = PathBuf::from(format!("kernels/ptx/{image}.ptx"));
            let made = match &nvcc {
                Some(nvcc) => {
                    let ptx = compile(nvcc, source, define, &out.join(format!("{image}.ptx")), &digest);
                    if mode == "update" {
                        fs::copy(&ptx, &kept).expect("kernels/ptx is writable");
                    }
                    // The float32 kernels are for checking: no machine code.
                    let architectures = if precision == "bf16" { &ARCHITECTURES[..] } else { &ARCHITECTURES[..1] };
                    fatbin(nvcc, &ptx, architectures, precision == "bf16", &mut table)
                }
                None => {
                    let text = fs::read_to_string(&kept).unwrap_or_else(|e| panic!("{}: {e}", kept.display()));
                    if !text.starts_with(&format!("// kernels {digest}\n")) {
                        println!(
                            "cargo::warning={} is older than the kernels' sources: build once with nvcc and \
                             COLLM_KERNELS=update",
                            kept.display()
                        );
                    }
                    // A driver wants a NUL at the end of PTX.
                    let path = out.join(format!("{image}.image"));
                    fs::write(&path, text + "\0").expect("OUT_DIR is writable");
                    path
                }
            };
            listing += &format!("(\"{image}\", include_bytes!({:?})),\n", made.canonicalize().expect("just written"));
        }
    }
    fs::write(out.join("images.rs"), listing + "]\n").expect("OUT_DIR is writable");
    let origin = nvcc.as_ref().map_or("kept PTX".to_owned(), |n| n.display().to_string());
    println!("cargo::rustc-env=COLLM_KERNELS_ORIGIN={origin}");
    let architectures = if nvcc.is_some() { ARCHITECTURES.join(",") } else { String::new() };
    println!("cargo::rustc-env=COLLM_KERNELS_ARCHITECTURES={architectures}");
    if mode == "update" && nvcc.is_some() {
        let rows: Vec<String> =
            table.into_iter().map(|((kernel, arch), r)| format!("{kernel}\tsm_{arch}\t{r}\n")).collect();
        let head = "kernel\tarch\tregisters\tshared_bytes\tstack_bytes\tspill_store_bytes\tspill_load_bytes\n";
        fs::write("kernels/ptxas.tsv", head.to_owned() + &rows.concat()).expect("kernels is writable");
    }
}

fn sources() -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir("kernels")
        .expect("kernels/ is part of the source")
        .filter_map(|e| Some(e.ok()?.path()))
        .filter(|p| p.extension().is_some_and(|e| e == "cu"))
        .collect();
    found.sort();
    found
}

/// FNV-1a over a source and all includes: what the kept PTX was made from.
fn digest(source: &Path) -> String {
    let includes = fs::read_dir("kernels/include").expect("kernels/include is part of the source");
    let mut files: Vec<PathBuf> = includes.filter_map(|e| Some(e.ok()?.path())).collect();
    files.sort();
    files.push(source.to_owned());
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for byte in files.iter().flat_map(|f| fs::read(f).expect("a readable source")) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    format!("{hash:016x}")
}

/// `NVCC`, `CUDA_HOME`, `PATH`, the usual place, then what `pip install nvidia-cuda-nvcc` leaves in the active environment.
fn find_nvcc() -> Option<PathBuf> {
    let named = std::env::var_os("NVCC").map(PathBuf::from);
    let home = std::env::var_os("CUDA_HOME").map(|h| Path::new(&h).join("bin/nvcc"));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let on_path = std::env::split_paths(&path).map(|d| d.join("nvcc"));
    let script = "import sysconfig; print(sysconfig.get_paths()['purelib'])";
    let python = Command::new("python3").args(["-c", script]).output().ok();
    let site = python.and_then(|o| String::from_utf8(o.stdout).ok());
    let wheel = site.map(|s| Path::new(s.trim()).join("nvidia/cu13/bin/nvcc"));
    let candidates = named.into_iter().chain(home).chain(on_path).chain([PathBuf::from("/usr/local/cuda/bin/nvcc")]);
    candidates.chain(wheel).find(|p| p.is_file())
}

/// Runs a tool; on failure its whole output ends the build.
fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "{command:?} failed:\n{text}");
    text
}

/// Source to PTX: no debug sections and no absolute paths, but the source lines stay.
fn compile(nvcc: &Path, source: &Path, define: &str, ptx: &Path, digest: &str) -> PathBuf {
    let mut command = Command::new(nvcc);
    command.args(["-ptx", "-O3", "-std=c++17", "-lineinfo", "-arch=compute_80", "-Ikernels/include"]);
    command.args(Some(define).filter(|d| !d.is_empty())).arg(source).arg("-o").arg(ptx);
    let warnings = run(&mut command);
    for line in warnings.lines() {
        println!("cargo::warning={line}");
    }
    let text = fs::read_to_string(ptx).expect("nvcc wrote it");
    let mut lines = vec![format!("// kernels {digest}")];
    // Which bytes of a load are used is a hint that ptxas of this PTX version does not know.
    let unwanted = |line: &str| line.starts_with("//") || line.contains("used_bytes_mask");
    for line in text.lines().take_while(|l| !l.trim_start().starts_with(".section")) {
        if unwanted(line) {
            continue;
        }
        // The line in the innermost function is enough.
        let line = line.split(", function_name").next().unwrap_or(line);
        if line.trim_start().starts_with(".loc") && lines.last().is_some_and(|l| l.trim_start().starts_with(".loc")) {
            lines.pop();
        }
        if line.starts_with(".version") {
            lines.push(format!(".version {PTX_VERSION}"));
        } else if line.trim_start().starts_with(".file") {
            let (before, path) = line.split_once('"').expect(".file N \"path\"");
            let path = path.trim_end_matches('"');
            lines.push(format!("{before}\"{}\"", path.rsplit('/').next().unwrap_or(path)));
        } else {
            lines.push(line.to_owned());
        }
    }
    fs::write(ptx, lines.join("\n") + "\n").expect("OUT_DIR is writable");
    ptx.to_owned()
}

/// PTX and its machine code in one file. ptxas is also the check that the PTX is good.
fn fatbin(
    nvcc: &Path,
    ptx: &Path,
    architectures: &[&str],
    keep_code: bool,
    table: &mut BTreeMap<(String, String), String>,
) -> PathBuf {
    let bin = nvcc.parent().expect("nvcc lies in a folder");
    let fatbin = ptx.with_extension("image");
    let mut bind = Command::new(bin.join("fatbinary"));
    bind.arg(format!("--create={}", fatbin.display())).args(["-64", "--compress=false"]);
    bind.arg(format!("--image3=kind=ptx,sm=80,file={}", ptx.display()));
    for arch in architectures {
        let cubin = ptx.with_extension(format!("{arch}.cubin"));
        let mut assemble = Command::new(bin.join("ptxas"));
        assemble.args(["-O3", "-v", &format!("-arch=sm_{arch}")]).arg(ptx).arg("-o").arg(&cubin);
        usage(&run(&mut assemble), arch, table);
        if keep_code {
            bind.arg(format!("--image3=kind=elf,sm={arch},file={}", cubin.display()));
        }
    }
    run(&mut bind);
    fatbin
}

/// Registers, shared memory and spills of each kernel from what `ptxas -v` says.
fn usage(text: &str, arch: &str, table: &mut BTreeMap<(String, String), String>) {
    let mut kernel = String::new();
    let mut frame = [0u32; 3];
    for line in text.lines() {
        let number = |end: &str| -> u32 {
            let before = line.split(end).next().unwrap_or("").trim_end();
            before.rsplit(|c: char| !c.is_ascii_digit()).next().and_then(|n| n.parse().ok()).unwrap_or(0)
        };
        if let Some(rest) = line.split("Compiling entry function '").nth(1) {
            kernel = rest.split('\'').next().unwrap_or("").to_owned();
        } else if line.contains("bytes stack frame") {
            frame = [number(" bytes stack frame"), number(" bytes spill stores"), number(" bytes spill loads")];
        } else if line.contains("Used ") {
            let shared = if line.contains(" bytes smem") { number(" bytes smem") } else { 0 };
            let [stack, stores, loads] = frame;
            let row = format!("{}\t{shared}\t{stack}\t{stores}\t{loads}", number(" registers"));
            table.insert((kernel.clone(), arch.to_owned()), row);
        }
    }
}
