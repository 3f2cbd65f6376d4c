//! The file of a prefix cache: entries appended one after another, each checksummed, none trusted.
//!
//! Form, little endian: magic, key (SHA-256 of what the entries were made from); then entries of a header (bytes of the payload `u64`,
//! name `[32]`, SHA-256 of the payload `[32]`, the first 8 bytes of the SHA-256 of all that) and the payload. A file of another key
//! is emptied. At opening the headers are read; what begins with a bad header, or ends beyond the file, was being written when the
//! process died, and is cut off. A payload is checked when it is first read; where it is damaged, it counts as absent, and is
//! written anew in its place. So a kill or a power cut needs no sync: at worst some entries are made again.
//!
//! Entries are read, not mapped: the file grows while it is used, and a page that its disk cannot give is an error here, not a signal.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use half::f16;
use sha2::{Digest, Sha256};

use super::Error;

/// The name of an entry.
pub type Name = [u8; 32];

const MAGIC: [u8; 8] = *b"collmKV1";
const FILE_HEADER: u64 = 40;
const HEADER: usize = 8 + 32 + 32 + 8;

struct Entry {
    /// Where its header is.
    at: u64,
    bytes: u64,
    checksum: [u8; 32],
    checked: bool,
}

/// An open file; no other process has it open.
pub struct PrefixFile {
    path: PathBuf,
    file: File,
    end: u64,
    entries: HashMap<Name, Entry>,
}

fn header(name: &Name, bytes: u64, checksum: &[u8; 32]) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..8].copy_from_slice(&bytes.to_le_bytes());
    header[8..40].copy_from_slice(name);
    header[40..72].copy_from_slice(checksum);
    let check = Sha256::digest(&header[..72]);
    header[72..].copy_from_slice(&check[..8]);
    header
}

impl PrefixFile {
    /// Opens or makes the file for entries of `key`. Fails where another process has it.
    pub fn open(path: &Path, key: &[u8; 32]) -> Result<Self, Error> {
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
        }
        let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
        let file = open.map_err(Error::io(path))?;
        file.try_lock().map_err(|e| {
            let what = format!("another process uses this prefix cache ({e}); wait for it, or set prefix_cache=memory");
            Error::io(path)(std::io::Error::other(what))
        })?;
        let mut this = PrefixFile { path: path.to_path_buf(), file, end: FILE_HEADER, entries: HashMap::new() };
        this.scan(key).map_err(Error::io(path))?;
        Ok(this)
    }

    fn scan(&mut self, key: &[u8; 32]) -> std::io::Result<()> {
        let len = self.file.metadata()?.len();
        let mut start = [0; FILE_HEADER as usize];
        if len < FILE_HEADER
            || self.file.read_exact(&mut start).is_err()
            || start[..8] != MAGIC
            || start[8..] != key[..]
        {
            self.file.set_len(0)?;
            self.file.rewind()?;
            return self.file.write_all(&[&MAGIC[..], key].concat());
        }
        while self.end + HEADER as u64 <= len {
            self.file.seek(SeekFrom::Start(self.end))?;
            let mut found = [0; HEADER];
            self.file.read_exact(&mut found)?;
            let bytes = u64::from_le_bytes(std::array::from_fn(|i| found[i]));
            let (name, checksum) = (std::array::from_fn(|i| found[8 + i]), std::array::from_fn(|i| found[40 + i]));
            let next = bytes.checked_add(self.end + HEADER as u64).filter(|&next| next <= len);
            let (Some(next), true) = (next, found == header(&name, bytes, &checksum)) else { break };
            self.entries.insert(name, Entry { at: self.end, bytes, checksum, checked: false });
            self.end = next;
        }
        self.file.set_len(self.end)
    }

    /// Bytes of the file.
    pub fn bytes(&self) -> u64 {
        self.end
    }

    /// An entry's payload; `None` if there is none, or a damaged one.
    pub fn get(&mut self, name: &Name) -> Result<Option<Vec<f16>>, Error> {
        let Some(entry) = self.entries.get_mut(name) else { return Ok(None) };
        let mut payload = vec![f16::ZERO; entry.bytes as usize / size_of::<f16>()];
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut payload);
        let read = self.file.seek(SeekFrom::Start(entry.at + HEADER as u64)).and_then(|_| self.file.read_exact(bytes));
        match read {
            Err(e) if e.kind() == ErrorKind::UnexpectedEof => return Ok(None),
            other => other.map_err(Error::io(&self.path))?,
        }
        entry.checked = entry.checked || Sha256::digest(&*bytes)[..] == entry.checksum;
        Ok(entry.checked.then_some(payload))
    }

    /// Adds an entry, or puts one in the place of a damaged one. An error where the disk is full: the file stays whole.
    pub fn put(&mut self, name: &Name, payload: &[f16]) -> Result<(), Error> {
        let bytes: &[u8] = bytemuck::cast_slice(payload);
        let checksum: [u8; 32] = Sha256::digest(bytes).into();
        let at = self.entries.get(name).filter(|e| e.bytes == bytes.len() as u64).map_or(self.end, |e| e.at);
        let whole = [&header(name, bytes.len() as u64, &checksum)[..], bytes].concat();
        let written = self.file.seek(SeekFrom::Start(at)).and_then(|_| self.file.write_all(&whole));
        if let Err(e) = written {
            if at == self.end {
                self.file.set_len(self.end).map_err(Error::io(&self.path))?;
            }
            return Err(Error::io(&self.path)(e));
        }
        self.end = self.end.max(at + whole.len() as u64);
        self.entries.insert(*name, Entry { at, bytes: bytes.len() as u64, checksum, checked: true });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn payload(n: u8) -> Vec<f16> {
        (0..40).map(|i| f16::from_f32(f32::from(n) + i as f32)).collect()
    }

    fn held(path: &Path, key: u8) -> Vec<u8> {
        let mut file = PrefixFile::open(path, &[key; 32]).unwrap();
        (0..4).filter(|&n| file.get(&[n; 32]).unwrap().is_some_and(|p| p == payload(n))).collect()
    }

    #[test]
    fn entries_survive_and_damaged_ones_are_never_used() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/prefixes.kv");
        let mut file = PrefixFile::open(&path, &[1; 32]).unwrap();
        (0..3).for_each(|n| file.put(&[n; 32], &payload(n)).unwrap());
        assert_eq!(file.get(&[1; 32]).unwrap().unwrap(), payload(1));
        let e = PrefixFile::open(&path, &[1; 32]).err().unwrap().to_string();
        assert!(e.contains("another process uses this prefix cache"), "{e}");
        drop(file);
        assert_eq!(held(&path, 1), [0, 1, 2]);
        let whole = std::fs::read(&path).unwrap();
        assert_eq!(whole.len(), 40 + 3 * (80 + 80));

        // Every single damaged byte: what it belongs to is lost, nothing wrong is ever returned.
        for at in (0..whole.len()).step_by(7) {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x20;
            std::fs::write(&path, &bytes).unwrap();
            let (entry, in_header) = (at.saturating_sub(40) / 160, at.saturating_sub(40) % 160 < 80);
            let want: Vec<u8> = match (at < 40, in_header) {
                (true, _) => vec![],
                // Nobody knows where the next one begins.
                (_, true) => (0..entry as u8).collect(),
                (_, false) => (0..3).filter(|&n| usize::from(n) != entry).collect(),
            };
            assert_eq!(held(&path, 1), want, "byte {at}");
        }
        // Cut at any length, as by a kill: whole entries remain, and the file can be added to.
        for len in (0..whole.len()).step_by(13) {
            std::fs::write(&path, &whole[..len]).unwrap();
            let want: Vec<u8> = (0..(len.saturating_sub(40) / 160) as u8).collect();
            assert_eq!(held(&path, 1), want, "{len} bytes");
            PrefixFile::open(&path, &[1; 32]).unwrap().put(&[3; 32], &payload(3)).unwrap();
            assert_eq!(held(&path, 1), [want, vec![3]].concat());
        }
        // A damaged payload is replaced where it lies.
        let mut bytes = whole.clone();
        bytes[40 + 160 + 100] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        let mut file = PrefixFile::open(&path, &[1; 32]).unwrap();
        assert!(file.get(&[1; 32]).unwrap().is_none());
        file.put(&[1; 32], &payload(1)).unwrap();
        drop(file);
        assert_eq!(std::fs::read(&path).unwrap(), whole);
        // Another key: stale, all of it.
        assert_eq!(held(&path, 2), [0; 0]);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 40);
    }
}
