//! All prompts of a split, tokenised once into a memory-mapped file.
//!
//! The file is named by what it was made from (data, split, template, style, tokenizer, form of the file), so a changed
//! input is another file. A damaged one is made again, never used: its contents are checksummed.
//!
//! Form, little endian: magic, key, checksum (SHA-256 of the rest), counts, then `offsets: u64[rows + 1]`,
//! `slot_offsets: u64[rows + 1]`, `slots: [position u32, kind u16, part u16]`, `ids: u32`.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use bytemuck::{Pod, Zeroable};
use memmap2::Mmap;
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::{Error, PromptBuilder, PromptRef, Slot, SlotKind};
use crate::data::{Dataset, Samples, Split};
use crate::files::{sha256, write_atomic};

const MAGIC: [u8; 8] = *b"collmPS1";
const HEADER: usize = 8 + 32 + 32 + 3 * 8;

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct StoredSlot {
    position: u32,
    kind: u16,
    part: u16,
}

enum Backing {
    Mapped(Mmap),
    /// Kept in words, so that it is aligned as a map is; the length in bytes.
    Owned(Vec<u64>, usize),
}

impl Backing {
    fn owned(bytes: &[u8]) -> Self {
        let mut words = vec![0u64; bytes.len().div_ceil(8)];
        bytemuck::cast_slice_mut(&mut words)[..bytes.len()].copy_from_slice(bytes);
        Backing::Owned(words, bytes.len())
    }
}

/// The prompts of a list of rows.
pub struct PromptSet {
    backing: Backing,
    n_rows: usize,
    n_slots: usize,
    n_ids: usize,
    slots: Vec<Slot>,
}

impl PromptSet {
    /// Number of prompts.
    pub fn len(&self) -> usize {
        self.n_rows
    }

    /// No prompts?
    pub fn is_empty(&self) -> bool {
        self.n_rows == 0
    }

    /// Tokens of all prompts together.
    pub fn n_tokens(&self) -> usize {
        self.n_ids
    }

    /// Prompt `row`.
    pub fn get(&self, row: usize) -> PromptRef<'_> {
        let (offsets, slot_offsets) = (self.u64s(0), self.u64s(1));
        let range = |o: &[u64]| o[row] as usize..o[row + 1] as usize;
        PromptRef { ids: &self.ids()[range(offsets)], slots: &self.slots[range(slot_offsets)] }
    }

    /// Tokens of prompt `row`.
    pub fn tokens(&self, row: usize) -> usize {
        let offsets = self.u64s(0);
        (offsets[row + 1] - offsets[row]) as usize
    }

    fn bytes(&self) -> &[u8] {
        match &self.backing {
            Backing::Mapped(map) => map,
            Backing::Owned(words, len) => &bytemuck::cast_slice(words)[..*len],
        }
    }

    fn u64s(&self, which: usize) -> &[u64] {
        let len = 8 * (self.n_rows + 1);
        bytemuck::cast_slice(&self.bytes()[HEADER + which * len..][..len])
    }

    fn ids(&self) -> &[u32] {
        let at = HEADER + 16 * (self.n_rows + 1) + 8 * self.n_slots;
        bytemuck::cast_slice(&self.bytes()[at..][..4 * self.n_ids])
    }

    /// Checks form, key and checksum.
    fn open(backing: Backing, key: &[u8; 32]) -> Option<Self> {
        let mut set = PromptSet { backing, n_rows: 0, n_slots: 0, n_ids: 0, slots: Vec::new() };
        let bytes = set.bytes();
        if bytes.len() < HEADER || bytes[..8] != MAGIC || bytes[8..40] != *key {
            return None;
        }
        let count =
            |at: usize| -> Option<usize> { Some(u64::from_le_bytes(bytes[at..at + 8].try_into().ok()?) as usize) };
        let (n_rows, n_slots, n_ids) = (count(72)?, count(80)?, count(88)?);
        let body = n_rows
            .checked_add(1)?
            .checked_mul(16)?
            .checked_add(n_slots.checked_mul(8)?)?
            .checked_add(n_ids.checked_mul(4)?)?;
        if bytes.len() != HEADER.checked_add(body)? || Sha256::digest(&bytes[72..])[..] != bytes[40..72] {
            return None;
        }
        let stored: &[StoredSlot] = bytemuck::cast_slice(&bytes[HEADER + 16 * (n_rows + 1)..][..8 * n_slots]);
        let kind = |k: u16| if k == 0 { SlotKind::User } else { SlotKind::Item };
        let slots =
            stored.iter().map(|s| Slot { position: s.position, kind: kind(s.kind), part: s.part as u8 }).collect();
        (set.n_rows, set.n_slots, set.n_ids, set.slots) = (n_rows, n_slots, n_ids, slots);
        Some(set)
    }
}

/// Tokenises all rows of a split, or maps the cache file in `cache_dir` that holds them. `progress` is called with the
/// number of rows done.
pub fn tokenize_split(
    dataset: &Dataset,
    split: Split,
    builder: &PromptBuilder,
    cache_dir: &Path,
    progress: &(dyn Fn(usize) + Sync),
) -> Result<PromptSet, Error> {
    let style = serde_json::to_string(builder.style()).unwrap_or_default();
    let parts =
        [&dataset.fingerprint, split.name(), builder.template().text(), &style, builder.tokenizer().fingerprint()];
    let mut text = parts.join("\0").into_bytes();
    text.extend_from_slice(bytemuck::cast_slice(builder.examples()));
    let key: [u8; 32] = Sha256::digest(text).into();
    let path: PathBuf = cache_dir.join(format!("prompts-{}-{}.bin", split.name(), &sha256(&key)[..16]));
    if path.exists()
        && let Some(set) = map(&path, &key)?
    {
        return Ok(set);
    }
    let bytes = encode(&dataset.titles, dataset.split(split), builder, &key, progress)?;
    std::fs::create_dir_all(cache_dir).map_err(Error::io(cache_dir))?;
    write_atomic(&path, |w| w.write_all(&bytes)).map_err(Error::io(&path))?;
    drop(bytes);
    map(&path, &key)?.ok_or_else(|| {
        Error::io(&path)(std::io::Error::other("was written and does not read back; is the disk sound?"))
    })
}

/// The prompts of a cache file, unless it is damaged or made from something else.
fn map(path: &Path, key: &[u8; 32]) -> Result<Option<PromptSet>, Error> {
    let file = File::open(path).map_err(Error::io(path))?;
    // SAFETY: cache files are only ever replaced whole, by rename.
    let map = unsafe { Mmap::map(&file) }.map_err(Error::io(path))?;
    Ok(PromptSet::open(Backing::Mapped(map), key))
}

/// Tokenises rows that are not a split of a dataset (scoring requests), in memory.
pub fn encode_rows(titles: &[String], rows: &Samples, builder: &PromptBuilder) -> Result<PromptSet, Error> {
    let key = [0; 32];
    let bytes = encode(titles, rows, builder, &key, &|_| ())?;
    Ok(PromptSet::open(Backing::owned(&bytes), &key).unwrap_or_else(|| unreachable!("just made")))
}

/// Ids and slots of one prompt.
type Encoded = (Vec<u32>, Vec<Slot>);

fn encode(
    titles: &[String],
    rows: &Samples,
    builder: &PromptBuilder,
    key: &[u8; 32],
    progress: &(dyn Fn(usize) + Sync),
) -> Result<Vec<u8>, Error> {
    let done = std::sync::atomic::AtomicUsize::new(0);
    let prompts: Result<Vec<Encoded>, Error> = (0..rows.len())
        .into_par_iter()
        .with_min_len(64)
        .map(|i| {
            let history: Vec<&str> = rows.history(i).iter().map(|&item| titles[item as usize].as_str()).collect();
            let prompt = builder.encode(&history, &titles[rows.iid[i] as usize]);
            progress(done.fetch_add(1, std::sync::atomic::Ordering::Relaxed) + 1);
            prompt
        })
        .collect();
    let prompts = prompts?;
    let offsets = |len: &dyn Fn(&Encoded) -> usize| {
        let mut at = 0u64;
        let mut offsets = vec![0];
        offsets.extend(prompts.iter().map(|p| {
            at += len(p) as u64;
            at
        }));
        offsets
    };
    let (id_offsets, slot_offsets) = (offsets(&|p| p.0.len()), offsets(&|p| p.1.len()));
    let counts = [rows.len() as u64, slot_offsets[rows.len()], id_offsets[rows.len()]];
    let mut bytes =
        Vec::with_capacity(HEADER + 16 * id_offsets.len() + 8 * counts[1] as usize + 4 * counts[2] as usize);
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(key);
    bytes.extend_from_slice(&[0; 32]);
    bytes.extend_from_slice(bytemuck::cast_slice(&counts));
    bytes.extend_from_slice(bytemuck::cast_slice(&id_offsets));
    bytes.extend_from_slice(bytemuck::cast_slice(&slot_offsets));
    for slot in prompts.iter().flat_map(|p| &p.1) {
        let stored = StoredSlot { position: slot.position, kind: slot.kind as u16, part: slot.part.into() };
        bytes.extend_from_slice(bytemuck::bytes_of(&stored));
    }
    for (ids, _) in prompts {
        bytes.extend_from_slice(bytemuck::cast_slice(&ids));
    }
    let checksum = Sha256::digest(&bytes[72..]);
    bytes[40..72].copy_from_slice(&checksum);
    Ok(bytes)
}
