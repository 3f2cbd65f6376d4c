//! Counters of one launch.

use crate::program::Class;

/// Number of instruction classes.
pub const CLASSES: usize = Class::ALL.len();

/// Executions of one instruction of the program.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Executed {
    /// Times a warp executed it.
    pub warps: u64,
    /// Lanes that did.
    pub lanes: u64,
}

/// Traffic of one kind of memory access.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Requests of warps.
    pub requests: u64,
    /// Bytes that the lanes asked for.
    pub bytes: u64,
    /// 32-byte sectors moved.
    pub sectors: u64,
}

impl Traffic {
    /// Bytes asked for by bytes moved; above 1 when lanes share.
    pub fn efficiency(&self) -> f64 {
        if self.sectors == 0 { 1.0 } else { self.bytes as f64 / (self.sectors * 32) as f64 }
    }
    fn add(&mut self, other: &Traffic) {
        self.requests += other.requests;
        self.bytes += other.bytes;
        self.sectors += other.sectors;
    }
}

/// What one worker, and summed one launch, has counted.
#[derive(Debug, Clone, Default)]
pub struct Counters {
    /// By instruction index.
    pub executed: Vec<Executed>,
    /// Warp instructions executed, hidden ones included; always counted.
    pub warp_instructions: u64,
    /// Thread instructions executed; always counted.
    pub lane_instructions: u64,
    /// Global loads (asynchronous copies included).
    pub global_loads: Traffic,
    /// Global stores.
    pub global_stores: Traffic,
    /// Local memory accesses, bytes.
    pub local_bytes: u64,
    /// Passes of shared memory.
    pub shared_passes: u64,
    /// Passes that the same bytes need without conflicts.
    pub shared_passes_least: u64,
    /// Shared bytes asked for.
    pub shared_bytes: u64,
    /// Atomic operations on global memory, lanes.
    pub global_atomics: u64,
    /// Atomic operations on shared memory, lanes.
    pub shared_atomics: u64,
    /// Barriers completed by a block.
    pub barriers: u64,
    /// Branches executed by warps.
    pub branches: u64,
    /// Branches on which a warp's lanes parted.
    pub divergent_branches: u64,
    /// Tensor-core flops.
    pub tensor_flops: u64,
    /// The same by [`super::card::TensorKind`].
    pub tensor_by_kind: [u64; 4],
    /// Distinct bytes of global memory read; 0 without checks.
    pub distinct_read: u64,
    /// Distinct bytes of global memory written; 0 without checks.
    pub distinct_written: u64,
    /// Bytes that the modelled L2 cache read from memory; 0 without one.
    pub memory_read: u64,
    /// Bytes that it wrote.
    pub memory_written: u64,
}

impl Counters {
    /// Counters of a program of `n` instructions.
    pub fn new(n: usize) -> Self {
        Counters { executed: vec![Executed::default(); n], ..Counters::default() }
    }

    /// Adds another worker's.
    pub fn add(&mut self, other: &Counters) {
        if self.executed.len() < other.executed.len() {
            self.executed.resize(other.executed.len(), Executed::default());
        }
        for (a, b) in self.executed.iter_mut().zip(&other.executed) {
            a.warps += b.warps;
            a.lanes += b.lanes;
        }
        for (a, b) in self.tensor_by_kind.iter_mut().zip(other.tensor_by_kind) {
            *a += b;
        }
        self.global_loads.add(&other.global_loads);
        self.global_stores.add(&other.global_stores);
        for (a, b) in [
            (&mut self.warp_instructions, other.warp_instructions),
            (&mut self.lane_instructions, other.lane_instructions),
            (&mut self.local_bytes, other.local_bytes),
            (&mut self.shared_passes, other.shared_passes),
            (&mut self.shared_passes_least, other.shared_passes_least),
            (&mut self.shared_bytes, other.shared_bytes),
            (&mut self.global_atomics, other.global_atomics),
            (&mut self.shared_atomics, other.shared_atomics),
            (&mut self.barriers, other.barriers),
            (&mut self.branches, other.branches),
            (&mut self.divergent_branches, other.divergent_branches),
            (&mut self.tensor_flops, other.tensor_flops),
            (&mut self.distinct_read, other.distinct_read),
            (&mut self.distinct_written, other.distinct_written),
        ] {
            *a += b;
        }
    }

    /// Executions by class of a program's instructions.
    pub fn by_class(&self, classes: impl Iterator<Item = Class>) -> [Executed; CLASSES] {
        let mut sums = [Executed::default(); CLASSES];
        for (executed, class) in self.executed.iter().zip(classes) {
            let sum = &mut sums[class as usize];
            sum.warps += executed.warps;
            sum.lanes += executed.lanes;
        }
        sums
    }
}
