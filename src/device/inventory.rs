//! What a machine has to compute on. Reads what the system and the driver tell; opens cards only to ask.

use super::cuda::context::{device_count, kernels_for};
use super::cuda::{Cuda, Error, Precision};
use super::{Device, cpu};

/// One device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// As `--device` takes it.
    pub device: Device,
    /// As its maker calls it.
    pub name: String,
    /// Compute capability and multiprocessors, or instruction set and threads.
    pub kind: String,
    /// Memory, bytes: all of it, and how much is free.
    pub memory_bytes: Option<[usize; 2]>,
    /// What it can run, or why nothing.
    pub runs: String,
}

/// All devices, the CPU first; and if there is no card, why.
pub fn list() -> (Vec<Entry>, Option<Error>) {
    let mut entries = vec![host()];
    let count = device_count();
    for ordinal in 0..count {
        entries.push(card(ordinal));
    }
    let why = if count == 0 { Cuda::open(0, Precision::Bf16).err() } else { None };
    (entries, why)
}

fn host() -> Entry {
    let field = |file: &str, key: &str| -> Option<String> {
        let text = std::fs::read_to_string(file).ok()?;
        let line = text.lines().find(|l| l.starts_with(key))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let memory = |key: &str| -> Option<usize> {
        let text = field("/proc/meminfo", key)?;
        Some(text.split_whitespace().next()?.parse::<usize>().ok()? << 10)
    };
    let sizes = memory("MemTotal").zip(memory("MemAvailable"));
    Entry {
        device: Device::Cpu,
        name: field("/proc/cpuinfo", "model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
        kind: format!("{}, {} threads", cpu::instruction_set(), rayon::current_num_threads()),
        memory_bytes: sizes.map(|(total, free)| [total, free]),
        runs: "everything, in float32".to_owned(),
    }
}

fn card(ordinal: usize) -> Entry {
    let device = Device::cuda(ordinal, Precision::Bf16);
    match Cuda::open(ordinal, Precision::Bf16) {
        Ok(cuda) => {
            let d = cuda.description();
            let (major, minor) = d.capability;
            let kernels = kernels_for(d.capability).unwrap_or_default();
            let emulated = if cuda.is_emulated() { "; the emulator on this CPU, for tests" } else { "" };
            Entry {
                device,
                name: d.name.clone(),
                kind: format!("compute capability {major}.{minor}, {} multiprocessors", d.sm_count),
                memory_bytes: Some([d.memory_bytes, d.free_bytes]),
                runs: format!("bf16 and, for checking, float32 ({kernels}{emulated})"),
            }
        }
        Err(e) => Entry {
            device,
            name: format!("card {ordinal}"),
            kind: "not usable".to_owned(),
            memory_bytes: None,
            runs: format!("nothing: {e}"),
        },
    }
}
