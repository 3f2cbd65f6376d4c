//! What the tests share: a device with a module of `tests/kernels`, and made numbers.
#![allow(dead_code)] // each test binary uses its own part

use cuda_emulator::device::Argument;
use cuda_emulator::{Card, Config, Device, Module, Outcome, Shape};

/// A device with one module loaded.
pub struct Bench {
    /// The device.
    pub device: Device,
    /// The module.
    pub module: Module,
}

impl Bench {
    /// The module `tests/kernels/<name>.ptx` on an A100.
    pub fn new(name: &str, config: Config) -> Self {
        let path = format!("{}/tests/kernels/{name}.ptx", env!("CARGO_MANIFEST_DIR"));
        Self::from_text(&std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}")), "A100", config)
    }

    /// The module `tests/kernels/hopper.ptx` on an H100.
    pub fn hopper(config: Config) -> Self {
        let path = format!("{}/tests/kernels/hopper.ptx", env!("CARGO_MANIFEST_DIR"));
        Self::from_text(&std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}")), "H100", config)
    }

    /// A module from text on a card.
    pub fn from_text(text: &str, card: &str, config: Config) -> Self {
        let device = Device::new(Card::find(card).unwrap(), config);
        let module = Module::parse(text, &device.memory).unwrap_or_else(|e| panic!("{e}"));
        Bench { device, module }
    }

    /// Launches a kernel.
    pub fn run(&self, kernel: &str, shape: Shape, arguments: &[&dyn Argument]) -> Outcome {
        self.device.launch(self.module.kernel(kernel).unwrap_or_else(|| panic!("no kernel {kernel}")), shape, arguments)
    }

    /// Launches a kernel that must be clean.
    pub fn clean(&self, kernel: &str, shape: Shape, arguments: &[&dyn Argument]) -> Outcome {
        let outcome = self.run(kernel, shape, arguments);
        assert!(outcome.findings.is_empty(), "{kernel}: {}", outcome.findings[0]);
        outcome
    }

    /// Uninitialised memory.
    pub fn empty(&self, bytes: usize) -> u64 {
        self.device.memory.allocate(bytes as u64, "", false).unwrap().base
    }

    pub fn put<T: Copy>(&self, values: &[T]) -> u64 {
        // SAFETY: plain numbers as bytes.
        let bytes = unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size_of_val(values)) };
        self.device.upload(bytes).unwrap()
    }

    pub fn get<T: Copy + Default>(&self, at: u64, n: usize) -> Vec<T> {
        let bytes = self.device.read(at, n * size_of::<T>()).unwrap();
        let mut out = vec![T::default(); n];
        // SAFETY: as many bytes as numbers need.
        unsafe { out.as_mut_ptr().cast::<u8>().copy_from(bytes.as_ptr(), bytes.len()) };
        out
    }
}

/// Made numbers: SplitMix64.
pub struct Numbers(pub u64);

impl Numbers {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
    /// In [-1, 1).
    pub fn unit(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
    pub fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.unit()).collect()
    }
    pub fn bf16(&mut self, n: usize) -> Vec<half::bf16> {
        (0..n).map(|_| half::bf16::from_f32(self.unit())).collect()
    }
}

/// The swizzle as the manual defines it on byte addresses: bits 4.. are exchanged by the bits from 7 up, as many of them as
/// the mode has (128B: 4-6 by 7-9; 64B: 4-5 by 7-8; 32B: 4 by 7).
pub fn swizzled(mode: u32, address: usize) -> usize {
    let bits = (0..mode).map(|b| (address >> (7 + b) & 1) << (4 + b)).sum::<usize>();
    address ^ bits
}

/// Largest absolute difference.
pub fn distance(a: &[f32], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(a, b)| (f64::from(*a) - b).abs())
        .fold(0.0, |m, d| if d.is_nan() { f64::INFINITY } else { m.max(d) })
}

/// The four ways that tests run a kernel: no single one catches every mistake.
pub fn ways() -> Vec<Config> {
    let base = Config { threads: 2, ..Config::default() };
    vec![
        base.clone(),
        Config { eager_copies: true, ..base.clone() },
        Config { seed: Some(7), ..base.clone() },
        Config { seed: Some(11), eager_copies: true, ..base },
    ]
}
