//! The emulated device as a Rust API: memory, a card's limits, launches.

use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, OnceLock};
use std::time::Instant;

use crate::checks::{Finding, Kind};
use crate::counts::{Card, L2};
use crate::machine::{Config, Launch, Outcome, grid};
use crate::memory::{Memory, host_finding};
use crate::program::{Program, Special};

/// The shape of a launch.
#[derive(Debug, Clone, Copy, Default)]
pub struct Shape {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Blocks of a cluster; zeros for the kernel's own, or none.
    pub cluster: [u32; 3],
    /// Dynamic shared memory, bytes.
    pub dynamic_shared: u32,
    /// All blocks resident at once.
    pub cooperative: bool,
}

impl Shape {
    /// A one-dimensional launch.
    pub fn linear(blocks: u32, threads: u32) -> Self {
        Shape { grid: [blocks, 1, 1], block: [threads, 1, 1], ..Shape::default() }
    }
    /// With dynamic shared memory.
    pub fn shared(self, bytes: u32) -> Self {
        Shape { dynamic_shared: bytes, ..self }
    }
}

/// A value that can be passed to a kernel.
pub trait Argument {
    /// Its bytes as the kernel reads them.
    fn bytes(&self) -> Vec<u8>;
}

macro_rules! arguments {
    ($($t:ty)*) => {$(
        impl Argument for $t {
            fn bytes(&self) -> Vec<u8> {
                self.to_le_bytes().to_vec()
            }
        }
    )*};
}
arguments! { u8 i8 u16 i16 u32 i32 u64 i64 f32 f64 }

impl Argument for Vec<u8> {
    fn bytes(&self) -> Vec<u8> {
        self.clone()
    }
}

/// The device.
#[derive(Debug)]
pub struct Device {
    /// Its memory.
    pub memory: Memory,
    /// What it pretends to be.
    pub card: &'static Card,
    /// How it runs kernels.
    pub config: Config,
}

impl Device {
    /// A device that is a card of `cards.json`.
    pub fn new(card: &'static Card, config: Config) -> Self {
        Device { memory: Memory::new(card.memory, config.check), card, config }
    }

    /// Allocates and fills memory; its address. `None` if it does not fit.
    pub fn upload(&self, bytes: &[u8]) -> Option<u64> {
        let allocation = self.memory.allocate(bytes.len() as u64, "", false)?;
        self.write(allocation.base, bytes).then_some(allocation.base)
    }

    /// Writes memory; false if the range is no allocation's.
    pub fn write(&self, address: u64, bytes: &[u8]) -> bool {
        let Some(allocation) = self.memory.find(address, bytes.len() as u64) else { return false };
        // SAFETY: `find` checked the range.
        unsafe { allocation.host(address).copy_from(bytes.as_ptr(), bytes.len()) };
        allocation.mark_written(address, bytes.len() as u64);
        true
    }

    /// Reads memory; `None` if the range is no allocation's.
    pub fn read(&self, address: u64, bytes: usize) -> Option<Vec<u8>> {
        let allocation = self.memory.find(address, bytes as u64)?;
        let mut out = vec![0; bytes];
        // SAFETY: `find` checked the range.
        unsafe { out.as_mut_ptr().copy_from(allocation.host(address), bytes) };
        Some(out)
    }

    /// Launches a kernel with its arguments and waits for it.
    pub fn launch(&self, program: &Program, shape: Shape, arguments: &[&dyn Argument]) -> Outcome {
        let mut params = vec![0u8; program.param_bytes as usize];
        if arguments.len() != program.params.len() {
            let detail = format!("{} arguments for {} parameters", arguments.len(), program.params.len());
            return refused(program, &detail);
        }
        for (argument, &(at, room)) in arguments.iter().zip(&program.params) {
            let bytes = argument.bytes();
            let n = bytes.len().min(room as usize);
            params[at as usize..at as usize + n].copy_from_slice(&bytes[..n]);
        }
        self.launch_raw(program, shape, &params)
    }

    /// Launches a kernel with a parameter buffer.
    pub fn launch_raw(&self, program: &Program, shape: Shape, params: &[u8]) -> Outcome {
        let cluster = match (shape.cluster, program.required_cluster) {
            ([0, ..], Some(required)) => required,
            ([0, ..], None) => [1; 3],
            (given, _) => given,
        };
        if let Some(problem) = self.limits(program, shape, cluster) {
            return refused(program, &problem);
        }
        let workspace = match self.workspace(program, shape) {
            Ok(workspace) => workspace,
            Err(problem) => return refused(program, &problem),
        };
        let snapshot = self.memory.snapshot();
        let shadows =
            if self.config.check { (0..snapshot.len()).map(|_| OnceLock::new()).collect() } else { Vec::new() };
        let launch = Launch {
            program,
            grid: shape.grid,
            block: shape.block,
            cluster,
            dynamic_shared: shape.dynamic_shared,
            params,
            cooperative: shape.cooperative,
            workspace,
            memory: &self.memory,
            snapshot,
            shadows,
            config: &self.config,
            sm_count: self.card.sm_count,
            deadline: Instant::now() + self.config.timeout,
            abort: AtomicBool::new(false),
            l2: (self.config.l2 > 0).then(|| Mutex::new(L2::new(self.config.l2))),
            printed: Default::default(),
        };
        let outcome = grid::run(&launch);
        if workspace != 0 {
            // It was allocated above: there is nothing to find.
            let _ = self.memory.free(workspace);
        }
        outcome
    }

    /// Zeroed memory for the grid barrier of a cooperative launch whose kernel asks for it, else zero: the driver's part in
    /// cooperative groups' `grid_group::sync`.
    fn workspace(&self, program: &Program, shape: Shape) -> Result<u64, String> {
        let asked = program.specials.iter().any(|(s, ..)| matches!(s, Special::GridWorkspace(_)));
        if !(asked && shape.cooperative) {
            return Ok(0);
        }
        let made = self.memory.allocate(64, "grid barrier", false);
        let made = made.ok_or("no memory left for the barrier of a cooperative launch")?;
        self.write(made.base, &[0; 64]);
        Ok(made.base)
    }

    /// Why a launch is beyond the card, if it is.
    pub fn limits(&self, program: &Program, shape: Shape, cluster: [u32; 3]) -> Option<String> {
        let Shape { grid, block, dynamic_shared, cooperative, .. } = shape;
        let threads: u64 = block.iter().map(|n| u64::from(*n)).product();
        if grid.contains(&0) || block.contains(&0) {
            return Some(format!("grid {grid:?} and block {block:?} must not be empty"));
        }
        if threads > 1024 || block[0] > 1024 || block[1] > 1024 || block[2] > 64 {
            return Some(format!("a block of {block:?} = {threads} threads: at most 1024, and 1024 x 1024 x 64"));
        }
        if grid[0] > 0x7fff_ffff || grid[1] > 65535 || grid[2] > 65535 {
            return Some(format!("a grid of {grid:?} blocks: at most 2147483647 x 65535 x 65535"));
        }
        if let Some(most) = program.max_threads
            && threads > u64::from(most)
        {
            return Some(format!("{threads} threads where .maxntid allows {most}"));
        }
        if let Some(required) = program.required_threads
            && required != block
        {
            return Some(format!("a block of {block:?} where .reqntid demands {required:?}"));
        }
        let shared = u64::from(program.own_shared()) + u64::from(dynamic_shared);
        let most = if dynamic_shared == 0 { 49152 } else { self.card.shared_per_block };
        if shared > u64::from(most) {
            return Some(format!("{shared} bytes of shared memory a block: {} has {most}", self.card.name));
        }
        // 65536 registers a block on every card; ptxas rounds up to 8 a thread.
        if let Some(registers) = program.max_registers
            && u64::from(registers.next_multiple_of(8)) * threads.next_multiple_of(32) > 65536
        {
            return Some(format!("{threads} threads of {registers} registers (.maxnreg): a block has 65536"));
        }
        let members: u32 = cluster.iter().product();
        if members > 1 {
            if self.card.sm < 90 {
                return Some(format!("a cluster of {cluster:?} blocks: {} has none (sm_90 and later)", self.card.name));
            }
            if members > 8 || (0..3).any(|i| cluster[i] == 0 || grid[i] % cluster[i] != 0) {
                return Some(format!(
                    "a cluster of {cluster:?} blocks in a grid of {grid:?}: at most 8, and it must divide the grid"
                ));
            }
        }
        if cooperative {
            let blocks: u64 = grid.iter().map(|n| u64::from(*n)).product();
            let resident = u64::from(self.card.resident_blocks(threads as u32, shared)) * u64::from(self.card.sm_count);
            if blocks > resident {
                return Some(format!("{blocks} blocks of a cooperative launch: {resident} are resident at once"));
            }
        }
        None
    }
}

fn refused(program: &Program, detail: &str) -> Outcome {
    let finding = Finding { kernel: program.name.clone(), ..host_finding(Kind::LaunchLimit, None, None, detail) };
    Outcome { findings: vec![finding], ..Outcome::default() }
}
