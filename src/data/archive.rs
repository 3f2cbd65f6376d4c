//! Files inside zip archives (the published pickles, Python wheels), found by name in whatever folder.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use zip::ZipArchive;

use super::Error;

/// Far above the files that are looked for: an entry that claims, or grows to, more is not one of them.
const LARGEST_BYTES: u64 = 4 << 30;

/// A zip archive.
pub struct Archive {
    path: PathBuf,
    zip: ZipArchive<File>,
}

impl Archive {
    /// Opens an archive.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let file = File::open(path).map_err(Error::io(path))?;
        let zip = ZipArchive::new(file)
            .map_err(|e| Error::file(path, format!("neither a directory nor a zip archive ({e})")))?;
        Ok(Archive { path: path.to_path_buf(), zip })
    }

    /// Contents of the first entry with this file name; `None` if there is none.
    pub fn read(&mut self, name: &str) -> Result<Option<Vec<u8>>, Error> {
        let wanted = |entry: &str| entry.rsplit('/').next() == Some(name);
        let found = self.zip.file_names().find_map(|n| n.ok().filter(|n| wanted(n)).map(|n| n.to_string()));
        let Some(found) = found else { return Ok(None) };
        let bad = |what: String| Error::file(&self.path, format!("{name}: {what}"));
        let entry = self.zip.by_name(&found).map_err(|e| bad(e.to_string()))?;
        let claimed = entry.size();
        let mut bytes = Vec::with_capacity(claimed.min(LARGEST_BYTES / 64) as usize);
        entry.take(LARGEST_BYTES + 1).read_to_end(&mut bytes).map_err(|e| bad(format!("cannot be unpacked ({e})")))?;
        if claimed > LARGEST_BYTES || bytes.len() as u64 > LARGEST_BYTES {
            return Err(bad(format!("is larger than {LARGEST_BYTES} bytes")));
        }
        Ok(Some(bytes))
    }
}
