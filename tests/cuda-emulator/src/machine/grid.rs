//! A whole launch: blocks over threads, clusters and cooperative grids together, results gathered.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use super::block::{Block, Peer, Progress};
use super::mbarrier::Objects;
use super::{Launch, Outcome};
use crate::checks::clock::Entries;
use crate::checks::{Fault, Kind};
use crate::counts::Counters;

/// Turns that a block may wait for others before the next block is started beside it.
const WAITING_TURNS: u32 = 64;
/// Turns in which all resident blocks only test mbarriers, after which they are taken to hang. A loop that gives up
/// after some ten thousand tests has done so by then.
const IDLE_TURNS: u32 = 1000;
/// Blocks that a worker keeps in execution when they wait for each other.
const MAX_RESIDENT: usize = 512;

/// Runs a launch to its end.
pub fn run(launch: &Launch<'_>) -> Outcome {
    let begin = Instant::now();
    let blocks = launch.blocks();
    let cluster: u64 = launch.cluster.iter().map(|n| u64::from(*n)).product();
    let config = launch.config;
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let workers = match config.threads {
        _ if launch.cooperative || launch.l2.is_some() => 1,
        0 if launch.program.order_matters => 1,
        0 => cores,
        n => n,
    };
    let workers = (workers as u64).min(blocks / cluster).max(1);
    let next = AtomicU64::new(0);
    let outcome = Mutex::new(Outcome::default());
    let order = Order::new(blocks, cluster, launch);
    let work = || {
        let mut worker = Worker {
            launch,
            next: &next,
            order: &order,
            resident: Vec::new(),
            done: Vec::new(),
            counters: Counters::new(launch.program.code.len()),
        };
        let findings = worker.work(if launch.cooperative { blocks } else { cluster });
        let mut outcome = outcome.lock().unwrap_or_else(PoisonError::into_inner);
        outcome.counters.add(&worker.counters);
        outcome.findings.extend(findings);
    };
    if workers == 1 {
        work();
    } else {
        std::thread::scope(|scope| {
            for _ in 1..workers {
                scope.spawn(work);
            }
            work();
        });
    }
    let mut outcome = outcome.into_inner().unwrap_or_else(PoisonError::into_inner);
    // Threads finish in any order; reports do not depend on it.
    outcome.findings.sort_by_key(|f| {
        (f.ptx_line, f.kind, f.block[2], f.block[1], f.block[0], f.thread[2], f.thread[1], f.thread[0])
    });
    outcome.findings.dedup_by(|a, b| (a.ptx_line, a.kind) == (b.ptx_line, b.kind));
    outcome.findings.truncate(config.max_findings);
    for shadow in launch.shadows.iter().filter_map(|s| s.get()) {
        let (read, written) = shadow.touched();
        outcome.counters.distinct_read += read;
        outcome.counters.distinct_written += written;
    }
    if let Some(l2) = &launch.l2 {
        let traffic = l2.lock().unwrap_or_else(PoisonError::into_inner).traffic();
        (outcome.counters.memory_read, outcome.counters.memory_written) = traffic;
    }
    let mut printed = launch.printed.lock().unwrap_or_else(PoisonError::into_inner);
    printed.sort();
    outcome.printed = printed.drain(..).map(|(_, text)| text).collect();
    outcome.seconds = begin.elapsed().as_secs_f64();
    outcome
}

/// In which order blocks start.
struct Order {
    clusters: Vec<u64>,
    cluster: u64,
}

impl Order {
    fn new(blocks: u64, cluster: u64, launch: &Launch<'_>) -> Self {
        let mut clusters: Vec<u64> = Vec::new();
        if let Some(seed) = launch.config.seed {
            clusters = (0..blocks / cluster).collect();
            let mut state = seed | 1;
            for i in (1..clusters.len()).rev() {
                // Xorshift: any fixed mixing will do for an order.
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                clusters.swap(i, (state % (i as u64 + 1)) as usize);
            }
        }
        Order { clusters, cluster }
    }

    /// The linear number of the i-th block to start. Blocks of a cluster come one after the other.
    fn at(&self, launch: &Launch<'_>, i: u64) -> u64 {
        let (group, rank) = (i / self.cluster, i % self.cluster);
        let group = self.clusters.get(group as usize).copied().unwrap_or(group);
        if self.cluster == 1 {
            return group;
        }
        let c = launch.cluster.map(u64::from);
        let g = launch.grid.map(u64::from);
        let of = [g[0] / c[0], g[1] / c[1]];
        let base = [group % of[0] * c[0], group / of[0] % of[1] * c[1], group / of[0] / of[1] * c[2]];
        let at = [base[0] + rank % c[0], base[1] + rank / c[0] % c[1], base[2] + rank / c[0] / c[1]];
        at[0] + g[0] * (at[1] + g[1] * at[2])
    }
}

struct Worker<'l, 'a> {
    launch: &'a Launch<'a>,
    next: &'l AtomicU64,
    order: &'l Order,
    resident: Vec<Block<'a>>,
    /// Blocks that ended, for reuse.
    done: Vec<Block<'a>>,
    counters: Counters,
}

impl<'a> Worker<'_, 'a> {
    /// Runs blocks until none is left, `group` of them at once at least.
    fn work(&mut self, group: u64) -> Vec<crate::checks::Finding> {
        let mut waiting = 0;
        let mut cluster_phase = 0;
        let (mut idle, mut work) = (0, u64::MAX);
        while !self.launch.abort.load(Ordering::Relaxed) {
            if self.resident.is_empty() {
                if !self.start(group) {
                    break;
                }
                cluster_phase = 0;
                waiting = 0;
            }
            let mut progressed = false;
            let mut i = 0;
            while i < self.resident.len() {
                match self.resident[i].turn() {
                    Progress::Done => {
                        let block = self.resident.remove(i);
                        self.finish(block);
                        progressed = true;
                        continue;
                    }
                    Progress::More => progressed = true,
                    Progress::Waiting => {}
                }
                i += 1;
            }
            // All blocks of the cluster have arrived: the next phase opens for all of them.
            if group > 1 && !self.resident.is_empty() && self.resident.iter().all(|b| b.cluster_ready(cluster_phase)) {
                let any = self.resident.iter().any(|b| b.warps.iter().any(|w| w.cluster_phase > cluster_phase));
                if any {
                    cluster_phase += 1;
                    let mut clock = Entries::default();
                    self.resident.iter().for_each(|b| clock.join(&b.cluster_clock));
                    self.resident.iter_mut().for_each(|b| b.open_cluster(&clock));
                    progressed = true;
                }
            }
            if Instant::now() > self.launch.deadline {
                self.time_out();
            }
            if progressed {
                waiting = 0;
                idle = 0;
                continue;
            }
            // Nothing but tests of mbarriers that fail, turn after turn: they will fail for ever, and no other block can help.
            let now = self.resident.iter().map(Block::work).sum();
            idle = if now == work { idle + 1 } else { 0 };
            work = now;
            if idle > IDLE_TURNS
                && let Some(block) = self.resident.first_mut()
            {
                block.report_deadlock();
                self.launch.abort.store(true, Ordering::Relaxed);
            }
            waiting += u32::from(idle == 0);
            if waiting > WAITING_TURNS && group == 1 && self.resident.len() < MAX_RESIDENT && self.start(1) {
                waiting = 0;
            }
        }
        let mut findings = Vec::new();
        for block in self.resident.drain(..).chain(self.done.drain(..)) {
            self.counters.add(&block.counters);
            findings.extend(block.findings);
        }
        findings
    }

    /// Starts the next `group` blocks; false if none is left.
    fn start(&mut self, group: u64) -> bool {
        let first = self.next.fetch_add(group, Ordering::Relaxed);
        if first >= self.launch.blocks() {
            return false;
        }
        let from = self.resident.len();
        for i in first..(first + group).min(self.launch.blocks()) {
            let mut block = self.done.pop().unwrap_or_else(|| Block::new(self.launch));
            block.start(self.order.at(self.launch, i));
            self.resident.push(block);
        }
        let cluster = self.order.cluster as usize;
        if cluster > 1 {
            for chunk in self.resident[from..].chunks_mut(cluster) {
                let (barriers, strong) = (Objects::default(), Objects::default());
                let peers: Vec<Peer> = chunk.iter_mut().map(Block::peer).collect();
                for block in chunk {
                    block.peers = peers.clone();
                    block.mbarriers = barriers.clone();
                    block.strong = strong.clone();
                }
            }
        }
        true
    }

    fn finish(&mut self, mut block: Block<'a>) {
        let text = std::mem::take(&mut block.printed);
        if !text.is_empty() {
            let mut printed = self.launch.printed.lock().unwrap_or_else(PoisonError::into_inner);
            printed.push((block.linear, text));
        }
        self.done.push(block);
    }

    fn time_out(&mut self) {
        if let Some(block) = self.resident.first_mut() {
            let at = block.warps.iter().position(|w| w.alive != 0).unwrap_or(0);
            let warp = std::mem::take(&mut block.warps[at]);
            let group = warp.others.first().map_or((warp.pc, warp.active), |g| (g.pc, g.mask));
            let fault =
                Fault::new(Kind::Timeout, group.1.trailing_zeros().min(31), "the launch took longer than its limit");
            block.report(&warp, group.0, fault);
            block.warps[at] = warp;
        }
        self.launch.abort.store(true, Ordering::Relaxed);
    }
}
