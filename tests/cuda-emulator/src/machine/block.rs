//! One block: shared memory, warps, barriers, and the order in which the warps run.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::barriers::NamedBarrier;
use super::mbarrier::{MbarrierState, Objects};
use super::warp::{Wait, Warp};
use super::warpgroup::Warpgroup;
use super::{Config, Launch};
use crate::checks::clock::{Clock, Entries};
use crate::checks::shared_race::SharedShadow;
use crate::checks::{Finding, Kind};
use crate::counts::Counters;
use crate::program::{Program, Slot, Special};

/// Instructions that a warp runs before others get their turn.
const TURN: i64 = 100_000;
/// The same with permuted scheduling, before a random part is added.
const SHORT_TURN: i64 = 50;

/// What a block did with its turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// All threads have exited.
    Done,
    /// It can go on.
    More,
    /// It polls or waits for other blocks.
    Waiting,
}

/// Why a warp stopped running.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pause {
    /// No group can run.
    Waits,
    /// Its turn is over.
    Turn,
}

/// What a block of a cluster may reach of another.
#[derive(Debug, Clone)]
pub struct Peer {
    /// Its shared memory.
    pub base: *mut u8,
    /// Its size, bytes.
    pub bytes: u32,
    /// Its shadow, with checks.
    pub shadow: Option<*mut SharedShadow>,
    /// Whether it has ended.
    pub gone: Arc<AtomicBool>,
}

/// A block in execution.
pub struct Block<'a> {
    /// The launch it belongs to.
    pub launch: &'a Launch<'a>,
    /// Linear number.
    pub linear: u64,
    /// Coordinates.
    pub id: [u32; 3],
    shared: Vec<u128>,
    /// Shared memory in use, bytes.
    pub shared_bytes: u32,
    /// The warps; one that runs is taken out.
    pub warps: Vec<Warp>,
    /// What the warpgroups have issued of `wgmma`.
    pub warpgroups: Vec<Warpgroup>,
    /// Named barriers.
    pub barriers: [NamedBarrier; 16],
    /// `mbarrier` objects of the cluster.
    pub mbarriers: Objects<MbarrierState>,
    /// Shadow of shared memory, with checks.
    pub shadow: Option<Box<SharedShadow>>,
    /// Clocks carried by strong accesses, by shared word.
    pub strong: Objects<Entries>,
    /// Executed a fence wider than the block: its global accesses are not judged.
    pub fenced: bool,
    /// Counters of the worker.
    pub counters: Counters,
    /// Findings of the worker.
    pub findings: Vec<Finding>,
    /// Instructions and kinds reported by the worker.
    pub reported: HashSet<(u32, Kind)>,
    /// Allocation last used by each instruction.
    pub cache: Vec<u32>,
    /// The blocks of the cluster by rank, this one included; empty without a cluster.
    pub peers: Vec<Peer>,
    /// Phases of the cluster barrier that have opened.
    pub cluster_open: u64,
    /// What arrived at the cluster barrier.
    pub cluster_clock: Entries,
    /// All threads have exited: its shared memory is gone.
    pub gone: Arc<AtomicBool>,
    /// Text printed so far.
    pub printed: String,
    random: u64,
    /// The running warp executed something that spins.
    pub polled: bool,
}

impl<'a> Block<'a> {
    /// Space for a block of the launch; [`Block::start`] makes it a particular one.
    pub fn new(launch: &'a Launch<'a>) -> Self {
        let program = launch.program;
        let shared_bytes = program.shared_bytes + launch.dynamic_shared;
        let warps = launch.threads().div_ceil(32);
        Block {
            launch,
            linear: 0,
            id: [0; 3],
            shared: vec![0; (shared_bytes as usize).div_ceil(16)],
            shared_bytes,
            warps: (0..warps).map(|_| Warp::default()).collect(),
            warpgroups: Vec::new(),
            barriers: Default::default(),
            mbarriers: Objects::default(),
            shadow: launch.config.check.then(|| Box::new(SharedShadow::new(shared_bytes as usize))),
            strong: Objects::default(),
            fenced: false,
            counters: Counters::new(program.code.len()),
            findings: Vec::new(),
            reported: HashSet::new(),
            cache: vec![0; program.code.len()],
            peers: Vec::new(),
            cluster_open: 0,
            cluster_clock: Entries::default(),
            gone: Arc::default(),
            printed: String::new(),
            random: 0,
            polled: false,
        }
    }

    /// The program.
    pub fn program(&self) -> &'a Program {
        self.launch.program
    }

    /// How to run.
    pub fn config(&self) -> &'a Config {
        self.launch.config
    }

    /// First byte of shared memory.
    pub fn shared_base(&mut self) -> *mut u8 {
        self.shared.as_mut_ptr().cast()
    }

    /// What the other blocks of the cluster may reach of this one.
    pub fn peer(&mut self) -> Peer {
        Peer {
            base: self.shared_base(),
            bytes: self.shared_bytes,
            shadow: self.shadow.as_mut().map(|s| &raw mut **s),
            gone: self.gone.clone(),
        }
    }

    /// Becomes the block with a linear number, at its first instruction.
    pub fn start(&mut self, linear: u64) {
        self.linear = linear;
        self.id = self.launch.block_at(linear);
        self.random = self.config().seed.unwrap_or(0) ^ linear.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let rank = self.cluster_rank();
        self.shared.fill(0xcdcd_cdcd_cdcd_cdcd_cdcd_cdcd_cdcd_cdcd);
        if let Some(shadow) = &mut self.shadow {
            shadow.clear();
            shadow.set_rank(rank as usize);
        }
        // Cooperative groups rely on barriers that begin at zero in what is reserved for them.
        let reserved = self.program().reserved_shared;
        self.shared[..reserved as usize / 16].fill(0);
        if let Some(shadow) = &mut self.shadow {
            shadow.initialise(0, reserved);
        }
        self.warpgroups.clear();
        self.barriers = Default::default();
        self.mbarriers = Objects::default();
        self.strong = Objects::default();
        self.cluster_open = 0;
        self.cluster_clock = Entries::default();
        self.peers.clear();
        self.gone = Arc::default();
        self.fenced = false;
        let program = self.program();
        let threads = self.launch.threads();
        for id in 0..self.warps.len() as u32 {
            let mut warp = std::mem::take(&mut self.warps[id as usize]);
            let (mut slots, mut preds, mut local) = (warp.slots, warp.preds, warp.local);
            slots.clear();
            slots.resize(program.slots as usize, Slot([0; 32]));
            preds.clear();
            preds.resize(program.preds as usize, 0);
            local.clear();
            local.resize(program.local_bytes as usize * 32, 0xcd);
            let born = (threads - id * 32).min(32);
            warp = Warp { id, slots, preds, local, ..Warp::default() };
            warp.alive = if born == 32 { u32::MAX } else { (1 << born) - 1 };
            warp.active = warp.alive;
            warp.clock = Clock::new(rank as usize, id as usize);
            self.set_watch(&mut warp);
            self.fill_specials(&mut warp);
            self.warps[id as usize] = warp;
        }
    }

    fn fill_specials(&self, warp: &mut Warp) {
        let [bx, by, _] = self.launch.block;
        let launch = self.launch;
        let cluster = launch.cluster;
        let in_cluster: [u32; 3] = std::array::from_fn(|i| self.id[i] % cluster[i]);
        let rank = in_cluster[0] + cluster[0] * (in_cluster[1] + cluster[1] * in_cluster[2]);
        for &(special, slot, wide) in &self.program().specials {
            let value = |lane: u32| -> u64 {
                let thread = warp.id * 32 + lane;
                u64::from(match special {
                    Special::Tid(0) => thread % bx,
                    Special::Tid(1) => thread / bx % by,
                    Special::Tid(_) => thread / bx / by,
                    Special::Ntid(i) => launch.block[i as usize],
                    Special::Ctaid(i) => self.id[i as usize],
                    Special::Nctaid(i) => launch.grid[i as usize],
                    Special::LaneId => lane,
                    Special::WarpId => warp.id,
                    Special::WarpCount => self.warps.len() as u32,
                    Special::MaskEq => 1 << lane,
                    Special::MaskLt => (1u32 << lane) - 1,
                    Special::MaskLe => u32::MAX >> (31 - lane),
                    Special::MaskGt => !(u32::MAX >> (31 - lane)),
                    Special::MaskGe => u32::MAX << lane,
                    Special::SmId => (self.linear % u64::from(launch.sm_count.max(1))) as u32,
                    Special::SmCount => launch.sm_count,
                    Special::DynamicSharedBytes => launch.dynamic_shared,
                    Special::TotalSharedBytes => self.shared_bytes - self.program().reserved_shared,
                    Special::ClusterCtaid(i) => in_cluster[i as usize],
                    Special::ClusterNctaid(i) => cluster[i as usize],
                    Special::ClusterId(i) => self.id[i as usize] / cluster[i as usize],
                    Special::ClusterCount(i) => launch.grid[i as usize] / cluster[i as usize],
                    Special::ClusterRank => rank,
                    Special::ClusterSize => cluster.iter().product(),
                    Special::GridWorkspace(true) => (launch.workspace >> 32) as u32,
                    Special::GridWorkspace(false) => launch.workspace as u32,
                    Special::GridId | Special::Zero => 0,
                })
            };
            if wide {
                // SAFETY: a wide register has two slots, that is 32 lanes of 64 bits.
                let lanes64 = unsafe { &mut *warp.slots[slot as usize..][..2].as_mut_ptr().cast::<[u64; 32]>() };
                *lanes64 = std::array::from_fn(|lane| value(lane as u32));
            } else {
                warp.slots[slot as usize].0 = std::array::from_fn(|lane| value(lane as u32) as u32);
            }
        }
    }

    fn next_random(&mut self) -> u64 {
        // SplitMix64.
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// Gives each warp a turn. A fault is recorded as a finding and ends the launch.
    pub fn turn(&mut self) -> Progress {
        let n = self.warps.len();
        let permuted = self.config().seed.is_some();
        let mut order: Vec<usize> = (0..n).collect();
        if permuted {
            for i in (1..n).rev() {
                order.swap(i, (self.next_random() % (i as u64 + 1)) as usize);
            }
        }
        let (mut ran, mut waiting) = (false, true);
        for i in order {
            let mut warp = std::mem::take(&mut self.warps[i]);
            if warp.alive == 0 {
                self.warps[i] = warp;
                continue;
            }
            let fuel = if permuted { SHORT_TURN + (self.next_random() % 500) as i64 } else { TURN };
            let could_run = warp.active != 0 || warp.others.iter().any(|g| g.wait == Wait::No);
            self.polled = false;
            let result = self.run(&mut warp, fuel);
            let polled = self.polled;
            let at = (warp.pc, warp.active);
            self.warps[i] = warp;
            match result {
                Ok(pause) => {
                    ran |= could_run;
                    waiting &= pause == Pause::Waits || polled;
                }
                Err(fault) => {
                    let warp = std::mem::take(&mut self.warps[i]);
                    self.report(&warp, at.0, fault);
                    self.warps[i] = warp;
                    self.launch.abort.store(true, std::sync::atomic::Ordering::Relaxed);
                    return Progress::Done;
                }
            }
            self.complete_barriers();
        }
        if self.warps.iter().all(|w| w.alive == 0) {
            self.gone.store(true, std::sync::atomic::Ordering::Relaxed);
            return Progress::Done;
        }
        if !ran && !self.complete_barriers() && !self.settle() {
            let waits_for_cluster = self.warps.iter().any(|w| w.others.iter().any(|g| g.wait == Wait::Cluster));
            if waits_for_cluster {
                return Progress::Waiting;
            }
            self.report_deadlock();
            self.launch.abort.store(true, std::sync::atomic::Ordering::Relaxed);
            return Progress::Done;
        }
        if waiting { Progress::Waiting } else { Progress::More }
    }

    /// Nothing runs: lanes that wait for convergence that will not come arrive as they are, with a finding. True if any did.
    fn settle(&mut self) -> bool {
        let mut settled = false;
        for i in 0..self.warps.len() {
            let mut warp = std::mem::take(&mut self.warps[i]);
            if let Some(at) = warp.others.iter().position(|g| matches!(g.wait, Wait::Convergence { .. })) {
                let group = warp.others.swap_remove(at);
                self.divergent_arrival(&mut warp, group);
                settled = true;
            }
            self.warps[i] = warp;
            if settled {
                self.complete_barriers();
                break;
            }
        }
        settled
    }

    /// Work done by all warps: a block whose sum stays the same over a turn only waits.
    pub fn work(&self) -> u64 {
        self.warps.iter().map(|w| w.work).sum()
    }

    /// All lanes of a mask have exited.
    pub fn exit(&mut self, warp: &mut Warp, mask: u32) {
        warp.alive &= !mask;
        if warp.alive == 0 {
            self.copies_at_exit(warp);
            self.stores_at_exit(warp);
        }
    }
}
