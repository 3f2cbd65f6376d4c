//! The kernels under version control: kept PTX made from these sources, and what ptxas says of every kernel on every card.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Cards that machine code is made for (build.rs).
const ARCHITECTURES: [&str; 6] = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"];

/// Kernels that may spill or use a stack on an architecture: bytes of stack and of spilled stores and loads, and why.
const ALLOWED: [(&str, &str, [u32; 3], &str); 1] = [(
    "attention_d_kv_32_bf16",
    "sm_100",
    [8, 8, 4],
    "ptxas keeps one number of the loop in memory there, a load a step; no supported model has heads of 32 or less",
)];

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels").join(name)
}

fn files(dir: &Path, extension: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
    let mut found: Vec<PathBuf> = entries.filter(|p| p.extension().is_some_and(|e| e == extension)).collect();
    found.sort();
    found
}

/// Kernel and architecture to registers, shared, stack, spilled stores, spilled loads.
fn table() -> BTreeMap<(String, String), [u32; 5]> {
    let text = fs::read_to_string(folder("ptxas.tsv")).unwrap();
    let mut lines = text.lines();
    let heading = "kernel\tarch\tregisters\tshared_bytes\tstack_bytes\tspill_store_bytes\tspill_load_bytes";
    assert_eq!(lines.next(), Some(heading));
    let row = |line: &str| {
        let fields: Vec<&str> = line.split('\t').collect();
        let numbers: Vec<u32> = fields[2..].iter().map(|n| n.parse().unwrap()).collect();
        ((fields[0].to_owned(), fields[1].to_owned()), numbers.try_into().unwrap())
    };
    lines.map(row).collect()
}

/// Kernels of a kept PTX file, and the card it is for.
fn entries(text: &str) -> (Vec<&str>, &str) {
    let names = text.lines().filter_map(|l| l.split(".entry ").nth(1)).map(|l| l.split('(').next().unwrap().trim());
    let target = text.lines().find_map(|l| l.strip_prefix(".target ")).unwrap();
    (names.collect(), target.split(',').next().unwrap().trim())
}

#[test]
fn every_kernel_is_in_the_table_and_none_spills() {
    let (table, mut seen) = (table(), BTreeSet::new());
    for file in files(&folder("ptx"), "ptx") {
        let text = fs::read_to_string(&file).unwrap();
        let (kernels, target) = entries(&text);
        assert!(!kernels.is_empty(), "{} has no kernels", file.display());
        for kernel in kernels {
            let architectures: Vec<&str> = if target.ends_with('a') {
                vec![target]
            } else if kernel.ends_with("_f32") {
                vec![ARCHITECTURES[0]]
            } else {
                ARCHITECTURES.to_vec()
            };
            for arch in architectures {
                let key = (kernel.to_owned(), arch.to_owned());
                let Some(&[registers, _, stack, stores, loads]) = table.get(&key) else {
                    panic!("{kernel} on {arch} is not in kernels/ptxas.tsv: build with nvcc and COLLM_KERNELS=update")
                };
                seen.insert(key);
                assert!(registers > 0 && registers <= 255, "{kernel} on {arch}: {registers} registers");
                // The float32 build is for checking: it may be slow.
                let shipped = kernel.ends_with("_bf16") || target.ends_with('a');
                let allowed = ALLOWED.iter().find(|a| (a.0, a.1) == (kernel, arch)).map_or([0; 3], |a| a.2);
                assert!(
                    !shipped || [stack, stores, loads] == allowed,
                    "{kernel} on {arch}: {stack} bytes of stack, {stores} spilled, {loads} loaded again; allowed {allowed:?}"
                );
            }
        }
    }
    let left: Vec<_> = table.keys().filter(|k| !seen.contains(*k)).collect();
    assert!(left.is_empty(), "kernels that are gone are still in the table: {left:?}");
}

#[test]
fn kept_ptx_is_that_of_the_sources() {
    let mut names = BTreeSet::new();
    for source in files(&folder(""), "cu") {
        let mut hash = 0xcbf2_9ce4_8422_2325u64;
        // As build.rs has it: FNV-1a over the includes, then the source.
        let mut parts: Vec<PathBuf> = fs::read_dir(folder("include")).unwrap().map(|e| e.unwrap().path()).collect();
        parts.sort();
        parts.push(source.clone());
        for byte in parts.iter().flat_map(|p| fs::read(p).unwrap()) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        let name = source.file_stem().unwrap().to_str().unwrap();
        let kept: Vec<PathBuf> = ["bf16", "f32"].map(|p| folder("ptx").join(format!("{name}_{p}.ptx"))).to_vec();
        let kept: Vec<PathBuf> = kept.into_iter().filter(|p| p.exists()).collect();
        assert!(!kept.is_empty(), "{name}.cu has no kept PTX");
        for path in kept {
            let text = fs::read_to_string(&path).unwrap();
            let made_from = text.lines().next().unwrap();
            assert_eq!(
                made_from,
                format!("// kernels {hash:016x}"),
                "{} is not of these sources: build once with nvcc and COLLM_KERNELS=update",
                path.display()
            );
            names.insert(path);
        }
    }
    let stray: Vec<_> = files(&folder("ptx"), "ptx").into_iter().filter(|p| !names.contains(p)).collect();
    assert!(stray.is_empty(), "PTX without a source: {stray:?}");
}
