//! The machine: runs a [`crate::program::Program`] on a grid of blocks of warps of 32 lanes in lockstep.
//!
//! [`grid`] spreads blocks over threads, [`block`] schedules the warps of one block, [`step`] executes a warp until it must
//! wait. Lanes that branch apart form groups; the group at the lowest instruction runs first and groups that meet merge
//! (the decoder orders the code so that this reconverges). The rest of the modules hold one family of instructions each.

pub mod access;
pub mod async_copy;
pub mod atomics;
pub mod barriers;
pub mod block;
pub mod bulk;
pub mod calls;
pub mod collective;
pub mod grid;
pub mod load_store;
pub mod matrix;
pub mod mbarrier;
pub mod mma;
pub mod printf;
pub mod report;
pub mod step;
pub mod tensor_copy;
pub mod warp;
pub mod warpgroup;
pub mod wgmma;

use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crate::checks::Finding;
use crate::checks::global_race::GlobalShadow;
use crate::counts::{Counters, L2};
use crate::memory::{Memory, Snapshot};
use crate::numerics::tensor::Accumulation;
use crate::program::Program;

/// How kernels are run.
#[derive(Debug, Clone)]
pub struct Config {
    /// Find races, uninitialised reads, copies not waited for. Bounds, alignment and deadlocks are always found.
    pub check: bool,
    /// Count memory traffic and executions of each instruction.
    pub count: bool,
    /// Threads that run blocks; 0 takes all cores. Kernels whose result depends on the order of blocks (float atomics,
    /// tickets) run in order on one thread unless a number is given.
    pub threads: usize,
    /// Permutes the order of blocks and warps; `None` runs them in order.
    pub seed: Option<u64>,
    /// `cp.async`, bulk copies and `wgmma` land when issued rather than at the last moment that the program allows.
    pub eager_copies: bool,
    /// How `mma` sums.
    pub accumulation: Accumulation,
    /// Longest time a launch may take.
    pub timeout: Duration,
    /// Findings kept of a launch.
    pub max_findings: usize,
    /// Bytes of an L2 cache to model, which takes one thread and blocks in order; 0: none.
    pub l2: u64,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            check: true,
            count: true,
            threads: 0,
            seed: None,
            eager_copies: false,
            accumulation: Accumulation::Exact,
            timeout: Duration::from_secs(600),
            max_findings: 32,
            l2: 0,
        }
    }
}

/// One launch.
pub struct Launch<'a> {
    /// The kernel.
    pub program: &'a Program,
    /// Blocks in each dimension.
    pub grid: [u32; 3],
    /// Threads of a block in each dimension.
    pub block: [u32; 3],
    /// Blocks of a cluster in each dimension.
    pub cluster: [u32; 3],
    /// Dynamic shared memory, bytes.
    pub dynamic_shared: u32,
    /// Parameter buffer.
    pub params: &'a [u8],
    /// All blocks are resident at once.
    pub cooperative: bool,
    /// Address of the memory in which a cooperative grid's barrier lies, or zero.
    pub workspace: u64,
    /// The device's memory, for explanations.
    pub memory: &'a Memory,
    /// Its allocations.
    pub snapshot: Snapshot,
    /// Shadows of the allocations, made when first touched.
    pub shadows: Vec<OnceLock<GlobalShadow>>,
    /// How to run.
    pub config: &'a Config,
    /// Number of multiprocessors told to kernels.
    pub sm_count: u32,
    /// Functions' addresses: index in `program.functions` by module function number.
    pub deadline: Instant,
    /// Set when a block has failed: the others stop.
    pub abort: AtomicBool,
    /// The modelled L2 cache.
    pub l2: Option<Mutex<L2>>,
    /// Printed text, in order of blocks.
    pub printed: Mutex<Vec<(u64, String)>>,
}

/// How a launch ended.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    /// What was found; empty for a clean run.
    pub findings: Vec<Finding>,
    /// What was counted.
    pub counters: Counters,
    /// Wall time of the emulation, seconds.
    pub seconds: f64,
    /// What the kernel printed.
    pub printed: String,
}

impl Launch<'_> {
    /// Threads of a block.
    pub fn threads(&self) -> u32 {
        self.block.iter().product()
    }
    /// Blocks of the grid.
    pub fn blocks(&self) -> u64 {
        self.grid.iter().map(|n| u64::from(*n)).product()
    }
    /// A request that the L2 cache sees, if one is modelled.
    pub fn cache(&self, addresses: &[u64; 32], lanes: u32, bytes: u32, store: bool) {
        if let Some(l2) = &self.l2 {
            l2.lock().unwrap_or_else(PoisonError::into_inner).request(addresses, lanes, bytes, store);
        }
    }
    /// Coordinates of a block by its linear number.
    pub fn block_at(&self, linear: u64) -> [u32; 3] {
        let (x, y) = (u64::from(self.grid[0]), u64::from(self.grid[1]));
        [(linear % x) as u32, (linear / x % y) as u32, (linear / x / y) as u32]
    }
}
