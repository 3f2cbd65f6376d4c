//! Findings of a block: where it happened, what lies at an address, and what everybody waits for when nobody goes on.

use super::block::Block;
use super::warp::{Group, Wait, Warp};
use crate::checks::{Fault, Finding, Kind};
use crate::memory::layout;

impl Block<'_> {
    /// Reports that no thread will ever go on, and what each waits for.
    pub fn report_deadlock(&mut self) {
        let mut detail = String::new();
        let mut first = None;
        for warp in &self.warps {
            let running = Group { pc: warp.pc, mask: warp.active, wait: Wait::No };
            for group in warp.others.iter().chain((warp.active != 0).then_some(&running)) {
                let line = self.program().code[group.pc as usize].line;
                let what = match group.wait {
                    Wait::Members(mask) => {
                        let missing = mask & warp.alive & !group.mask;
                        format!("waits for lanes {missing:#010x} that never arrive")
                    }
                    Wait::Warpgroup => "waits for the other warps of its warpgroup to issue the same wgmma".to_string(),
                    Wait::Barrier(id) => format!("waits at barrier {id}"),
                    Wait::Cluster => "waits at the cluster barrier".to_string(),
                    Wait::No => "spins, or waits for those that do".to_string(),
                    Wait::Convergence { .. } => "waits".to_string(),
                };
                // Lanes at a mask are the cause rather than the consequence: name them first.
                if first.is_none() || matches!(group.wait, Wait::Members(_)) {
                    first.get_or_insert((warp.id, group.pc, group.mask.trailing_zeros()));
                }
                if detail.len() < 600 {
                    detail += &format!("; warp {} lanes {:#010x} at PTX line {line} {what}", warp.id, group.mask);
                }
            }
        }
        detail += &self.describe_mbarriers();
        let (id, pc, lane) = first.unwrap_or((0, 0, 0));
        let warp = std::mem::take(&mut self.warps[id as usize]);
        self.report(&warp, pc, Fault::new(Kind::Deadlock, lane, detail.trim_start_matches("; ")));
        self.warps[id as usize] = warp;
    }

    /// Coordinates of a thread by its number in the block.
    pub fn thread_at(&self, thread: u32) -> [u32; 3] {
        let [x, y, _] = self.launch.block;
        [thread % x, thread / x % y, thread / x / y]
    }

    /// Records a finding, once for each instruction and kind.
    pub fn report(&mut self, warp: &Warp, pc: u32, fault: Fault) {
        if self.findings.len() >= self.config().max_findings || !self.reported.insert((pc, fault.kind)) {
            return;
        }
        let inst = &self.program().code[(pc as usize).min(self.program().code.len() - 1)];
        let (file, line) = inst.source;
        let source = self.program().files.iter().find(|(i, _)| *i == file).map(|(_, path)| (path.clone(), line));
        let allocation = fault.allocation.or_else(|| fault.address.and_then(|a| self.describe(a)));
        self.findings.push(Finding {
            kind: fault.kind,
            kernel: self.program().name.clone(),
            block: self.id,
            thread: self.thread_at(warp.id * 32 + fault.lane),
            ptx_line: inst.line,
            source: source.filter(|_| line > 0),
            address: fault.address,
            allocation,
            detail: fault.detail,
        });
    }

    /// What lies at a generic address.
    fn describe(&self, address: u64) -> Option<String> {
        if layout::within(address, layout::SHARED) {
            let offset = (address - layout::SHARED) as u32;
            let names = &self.program().shared_names;
            let found = names.iter().find(|(at, bytes, _)| offset >= *at && offset - at < *bytes);
            return Some(match found {
                Some((at, _, name)) => format!("shared `{name}` + {}", offset - at),
                None if offset < self.shared_bytes => {
                    format!("dynamic shared memory + {}", offset - self.program().shared_bytes.min(offset))
                }
                None => format!("shared memory has {} bytes", self.shared_bytes),
            });
        }
        if layout::within(address, layout::LOCAL) {
            return Some(format!("local memory of {} bytes", self.program().local_bytes));
        }
        let found = self.launch.snapshot.iter().find(|a| a.contains(address, 1));
        found.map(|a| format!("{} + {}", a.describe(), address - a.base))
    }
}
