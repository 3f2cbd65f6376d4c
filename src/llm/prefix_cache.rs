//! Keys and values of frozen text, kept from pass to pass: in memory, or in a file that the next run of the stage finds.
//!
//! In stage 2 the text before a prompt's first slot goes through frozen weights and a frozen adapter only, so its keys and values
//! are the same in every epoch and evaluation. They enter a batch as [`Given`] instead of rows to compute.
//!
//! An entry is named by the SHA-256 of its token ids, in a store that belongs to one set of weights, configuration, adapter and
//! engine version: data, template and tokenizer act through the tokens alone. Values are rounded to f16 (relative error 2⁻¹¹); one
//! just computed is used rounded too, so results are the same bits whatever the cache held before.
//!
//! A cache that is full stays as it is: a pass goes over all rows in a random order, and keeping any fixed part of them hits as
//! often as that part is large; evicting the least recently used would hit less.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;

use half::f16;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::Error;
use super::batch::{Given, GradientFrom, PackedBatch, micro_batches};
use super::model::{Model, Workspace};
use super::peft::LoraTensors;
use super::prefix_file::{Name, PrefixFile};
use crate::prompt::PromptRef;

/// Tokens of absent prefixes computed at once.
const TOKENS_AT_ONCE: usize = 2048;

/// Where keys and values are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PrefixCacheMode {
    /// Nowhere: they are computed in every pass, in float32.
    #[default]
    Off,
    /// In memory.
    Memory,
    /// In a file of the run directory.
    Disk,
    /// In memory if all fit in half of what is available, else where more of them fit.
    Auto,
}

/// Where, and how much.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// In a file rather than in memory.
    pub disk: bool,
    /// Most bytes to keep.
    pub limit: u64,
    /// What all prefixes would take.
    pub needed: u64,
}

impl std::fmt::Display for Plan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
        let place = if self.disk { "on disk" } else { "in memory" };
        write!(f, "prefix cache {place}: all prefixes take {:.2} GiB", gib(self.needed))?;
        if self.limit < self.needed {
            write!(f, ", {:.2} of them are kept", gib(self.limit))?;
        }
        Ok(())
    }
}

impl Plan {
    /// Decides. `limit`: most bytes, 0 for half of the memory available or of the disk free at `path`. `None` for `Off`.
    pub fn new(mode: PrefixCacheMode, limit: u64, needed: u64, path: &Path) -> Option<Plan> {
        let memory = if limit > 0 { limit } else { available_memory() / 2 };
        // What the file holds already is not free, but is the cache's.
        let held = || std::fs::metadata(path).map_or(0, |m| m.len());
        let disk = || if limit > 0 { limit } else { held() + free_disk(path) / 2 };
        Self::choose(mode, needed, memory, disk)
    }

    fn choose(mode: PrefixCacheMode, needed: u64, memory: u64, disk: impl Fn() -> u64) -> Option<Plan> {
        let disk = match mode {
            PrefixCacheMode::Off => return None,
            PrefixCacheMode::Memory => None,
            PrefixCacheMode::Disk => Some(disk()),
            PrefixCacheMode::Auto if needed <= memory => None,
            PrefixCacheMode::Auto => Some(disk()).filter(|&disk| disk > memory),
        };
        Some(Plan { disk: disk.is_some(), limit: disk.unwrap_or(memory), needed })
    }
}

/// Bytes of memory that the system could give; 0 where it does not tell.
fn available_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"));
    line.and_then(|l| l.trim().trim_end_matches("kB").trim().parse::<u64>().ok()).map_or(0, |kb| kb * 1024)
}

/// Bytes free for us on the disk of the nearest directory above `path` that exists; 0 where the system does not tell.
#[cfg(unix)]
fn free_disk(path: &Path) -> u64 {
    let found = path.ancestors().skip(1).find_map(|dir| rustix::fs::statvfs(dir).ok());
    let here = || rustix::fs::statvfs(".").ok();
    found.or_else(here).map_or(0, |s| s.f_bavail * s.f_frsize)
}

#[cfg(not(unix))]
fn free_disk(_: &Path) -> u64 {
    0
}

enum Store {
    Memory(HashMap<Name, Arc<[f16]>>),
    Disk(PrefixFile),
}

/// Keys and values of frozen text under one model and one adapter.
pub struct PrefixCache<'a> {
    model: &'a Model,
    lora: Option<&'a LoraTensors>,
    workspace: Workspace,
    store: Store,
    /// Bytes that may still be kept.
    room: u64,
    found: u64,
    computed: u64,
}

impl<'a> PrefixCache<'a> {
    /// An empty cache, or what the file at `path` holds for this model and adapter. The model must be on the CPU.
    pub fn open(model: &'a Model, lora: Option<&'a LoraTensors>, plan: Plan, path: &Path) -> Result<Self, Error> {
        let (store, used) = if plan.disk {
            let file = PrefixFile::open(path, &key(model, lora))?;
            let used = file.bytes();
            (Store::Disk(file), used)
        } else {
            (Store::Memory(HashMap::new()), 0)
        };
        let room = plan.limit.saturating_sub(used);
        Ok(PrefixCache { model, lora, workspace: Workspace::default(), store, room, found: 0, computed: 0 })
    }

    /// Prefixes found and computed so far, of those asked for.
    pub fn counts(&self) -> (u64, u64) {
        (self.found, self.computed)
    }

    /// Keys and values of each prefix: kept ones, or computed, and kept if there is room.
    pub fn fetch(&mut self, prefixes: &[&[u32]]) -> Result<Vec<Given>, Error> {
        let names: Vec<Name> =
            prefixes.iter().map(|ids| Sha256::digest(bytemuck::cast_slice::<_, u8>(ids)).into()).collect();
        let width = 2 * self.model.config().n_kv_heads * self.model.config().head_dim;
        let mut all: HashMap<Name, Given> = HashMap::new();
        let mut absent: Vec<usize> = Vec::new();
        for (i, name) in names.iter().enumerate() {
            if all.contains_key(name) {
                continue;
            }
            let tokens = prefixes[i].len();
            let kept = match &mut self.store {
                _ if tokens == 0 => Some(Arc::default()),
                Store::Memory(entries) => entries.get(name).cloned(),
                Store::Disk(file) => file.get(name)?.map(Arc::from),
            };
            let kept = kept.filter(|kv| kv.len() == self.model.config().n_layers * tokens * width);
            match &kept {
                Some(_) => self.found += 1,
                None => absent.push(i),
            }
            all.insert(*name, Given { tokens, kv: kept.unwrap_or_default() });
        }
        let lengths: Vec<usize> = absent.iter().map(|&i| prefixes[i].len()).collect();
        for run in micro_batches(&lengths, TOKENS_AT_ONCE) {
            let here = &absent[run];
            let refs: Vec<_> = here.iter().map(|&i| PromptRef { ids: prefixes[i], slots: &[] }).collect();
            let batch = PackedBatch::new(&refs, 1, GradientFrom::Start, 0);
            let blocks = self.model.keys_values(self.lora, &batch, &mut self.workspace).ok_or_else(|| {
                Error::Shape { what: "a prefix cache needs the model on the CPU; set prefix_cache=off".into() }
            })?;
            for (&i, segment) in here.iter().zip(&batch.segments) {
                let rows = segment.q.start * width..segment.q.end * width;
                let kv: Arc<[f16]> = blocks.iter().flat_map(|block| &block[rows.clone()]).copied().collect();
                self.keep(&names[i], &kv);
                all.insert(names[i], Given { tokens: prefixes[i].len(), kv });
                self.computed += 1;
            }
        }
        Ok(names.iter().map(|name| all[name].clone()).collect())
    }

    fn keep(&mut self, name: &Name, kv: &Arc<[f16]>) {
        let bytes = size_of_val(&**kv) as u64;
        if bytes > self.room {
            return;
        }
        let kept = match &mut self.store {
            Store::Memory(entries) => {
                entries.insert(*name, kv.clone());
                Ok(())
            }
            Store::Disk(file) => file.put(name, kv),
        };
        // A disk that takes no more is a full cache, not a failed run.
        self.room = if kept.is_ok() { self.room - bytes } else { 0 };
    }
}

/// Bytes that the distinct ones of some prefixes take.
pub fn needed<'p>(model: &Model, prefixes: impl Iterator<Item = &'p [u32]>) -> u64 {
    let c = model.config();
    let distinct: HashSet<&[u32]> = prefixes.collect();
    let tokens: usize = distinct.iter().map(|p| p.len()).sum();
    (tokens * c.n_layers * 2 * c.n_kv_heads * c.head_dim * size_of::<f16>()) as u64
}

/// Everything that keys and values depend on, but the tokens.
fn key(model: &Model, lora: Option<&LoraTensors>) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(format!("{} {} {:?}", env!("CARGO_PKG_VERSION"), model.fingerprint(), model.config()));
    if let Some(lora) = lora {
        hash.update(lora.fingerprint());
    }
    hash.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use PrefixCacheMode::*;

    #[test]
    fn auto_takes_memory_where_all_fits_else_where_more_fits() {
        let chosen = |mode, memory, disk| Plan::choose(mode, 100, memory, || disk).map(|p| (p.disk, p.limit));
        assert_eq!(chosen(Off, 1000, 1000), None);
        assert_eq!(chosen(Auto, 100, 1000), Some((false, 100)));
        assert_eq!(chosen(Auto, 99, 1000), Some((true, 1000)));
        assert_eq!(chosen(Auto, 99, 50), Some((false, 99)));
        assert_eq!(chosen(Disk, 1000, 50), Some((true, 50)));
        assert_eq!(chosen(Memory, 10, 50), Some((false, 10)));
        let said = Plan { disk: true, limit: 1 << 30, needed: 3 << 29 }.to_string();
        assert_eq!(said, "prefix cache on disk: all prefixes take 1.50 GiB, 1.00 of them are kept");
    }
}
