//! Tensors of the files that `torch.save` writes (`.pth`, `.pt`), read as data: nothing in them is executed.
//!
//! Such a file is a zip archive: `data.pkl` says which tensors there are, `data/N` are their storages. The pickle stays a tree
//! ([`crate::data::pickle`]); what is found in it are calls of torch's own rebuilding functions, whose arguments tell a tensor's
//! storage, offset, shape and strides. Everything is checked against the file: no claim makes more memory than the file has.

use std::fs::File;
use std::io::{Read, Seek};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use thiserror::Error;
use zip::{CompressionMethod, ZipArchive};

use crate::data::pickle::{Id, Node, Pickle};

mod list;
#[cfg(test)]
mod tests;

/// What can go wrong with a torch file.
#[derive(Debug, Error)]
pub enum Error {
    /// The file could not be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// It is not what it should be.
    #[error("{}: {what}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong and what to do.
        what: String,
    },
}

/// Types of elements that are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// torch.float32
    Float32,
    /// torch.float64
    Float64,
    /// torch.float16
    Float16,
    /// torch.bfloat16
    BFloat16,
    /// torch.int64
    Int64,
}

impl Dtype {
    fn of_storage(class: &str) -> Option<Self> {
        Some(match class {
            "FloatStorage" => Dtype::Float32,
            "DoubleStorage" => Dtype::Float64,
            "HalfStorage" => Dtype::Float16,
            "BFloat16Storage" => Dtype::BFloat16,
            "LongStorage" => Dtype::Int64,
            _ => return None,
        })
    }

    fn n_bytes(self) -> usize {
        match self {
            Dtype::Float16 | Dtype::BFloat16 => 2,
            Dtype::Float32 => 4,
            Dtype::Float64 | Dtype::Int64 => 8,
        }
    }
}

/// A tensor's values in row-major order of its shape.
#[derive(Clone, Debug, PartialEq)]
pub enum Values {
    /// Of any floating type; float64 is rounded.
    Floats(Vec<f32>),
    /// Of int64.
    Integers(Vec<i64>),
}

/// A tensor of the file.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Keys of the dictionaries around it, joined by dots.
    pub name: String,
    /// How it lies in the file; else why it cannot be read.
    pub layout: Result<Layout, String>,
}

/// Which elements of which storage a tensor is.
#[derive(Clone, Debug)]
pub struct Layout {
    /// Type of the elements.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
    strides: Vec<usize>,
    offset: usize,
    /// Name in the archive, and elements.
    storage: (String, usize),
}

/// An open file.
#[derive(Debug)]
pub struct TorchFile<R> {
    path: PathBuf,
    zip: ZipArchive<R>,
    /// What stands before `data.pkl` in the archive.
    folder: String,
    big_endian: bool,
    /// Its tensors, in the order of the file.
    pub entries: Vec<Entry>,
}

/// `torch.save` before 1.6 began with a pickle of this number; after that with a zip archive.
const LEGACY: &[u8] = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19";

impl TorchFile<File> {
    /// Opens a file and lists its tensors.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let file = File::open(path).map_err(|source| Error::Io { path: path.into(), source })?;
        Self::new(file, path)
    }
}

impl<R: Read + Seek> TorchFile<R> {
    /// Lists the tensors of an open file; `path` is for messages.
    pub fn new(mut file: R, path: &Path) -> Result<Self, Error> {
        let bad = |what: String| Error::File { path: path.into(), what };
        let io = |source| Error::Io { path: path.into(), source };
        let mut head = Vec::new();
        file.by_ref().take(LEGACY.len() as u64).read_to_end(&mut head).map_err(io)?;
        if head == LEGACY {
            let what = "is in torch's form from before version 1.6; in Python, torch.save(torch.load(FILE), FILE) writes today's";
            return Err(bad(what.into()));
        }
        let zip =
            ZipArchive::new(file).map_err(|e| bad(format!("not a whole file of torch.save, a zip archive ({e})")))?;
        let pickled = zip.file_names().flatten().find(|n| *n == "data.pkl" || n.ends_with("/data.pkl"));
        let pickled = pickled
            .map(|n| n.into_owned())
            .ok_or_else(|| bad("a zip archive without data.pkl; torch.save wrote no such file".into()))?;
        let folder = pickled.strip_suffix("data.pkl").unwrap_or_default().to_string();
        let mut found = TorchFile { path: path.into(), zip, folder, big_endian: false, entries: Vec::new() };
        if found.zip.index_for_name(&format!("{}byteorder", found.folder)).is_some() {
            found.big_endian = found.part("byteorder")? == b"big";
        }
        let pickle = found.part("data.pkl")?;
        found.entries =
            Pickle::parse(&pickle).and_then(|p| list::list(&p)).map_err(|e| bad(format!("data.pkl: {e}")))?;
        Ok(found)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn bad(&self, what: String) -> Error {
        Error::File { path: self.path.clone(), what }
    }

    /// A file of the archive.
    fn part(&mut self, name: &str) -> Result<Vec<u8>, Error> {
        let path = &self.path;
        let bad = |what: String| Error::File { path: path.clone(), what: format!("{name} {what}") };
        let entry =
            self.zip.by_name(&format!("{}{name}", self.folder)).map_err(|e| bad(format!("cannot be read ({e})")))?;
        // torch never compresses, and stored bytes cannot be more than the file's.
        if entry.compression() != CompressionMethod::Stored {
            return Err(bad("is compressed; torch.save does not".into()));
        }
        let size = entry.size();
        let mut bytes = Vec::new();
        entry.take(size + 1).read_to_end(&mut bytes).map_err(|e| bad(format!("is damaged ({e})")))?;
        if bytes.len() as u64 != size {
            return Err(bad(format!("is cut short: {} of {size} bytes", bytes.len())));
        }
        Ok(bytes)
    }

    /// The values of the tensor at `index` of [`Self::entries`].
    pub fn read(&mut self, index: usize) -> Result<Values, Error> {
        let Entry { name, layout } = self.entries[index].clone();
        let layout = layout.map_err(|e| self.bad(format!("{name}: {e}")))?;
        let (part, n) = &layout.storage;
        let bytes = self.part(part)?;
        let size = layout.dtype.n_bytes();
        if n.checked_mul(size) != Some(bytes.len()) {
            return Err(self.bad(format!("{name}: {part} has {} bytes; expected {n} values of {size}", bytes.len())));
        }
        let big = self.big_endian;
        Ok(match layout.dtype {
            Dtype::Float32 => Values::Floats(layout.gather(&bytes, big, f32::from_le_bytes)),
            Dtype::Float64 => Values::Floats(layout.gather(&bytes, big, |b| f64::from_le_bytes(b) as f32)),
            Dtype::Float16 => Values::Floats(layout.gather(&bytes, big, |b| f16::from_le_bytes(b).to_f32())),
            Dtype::BFloat16 => Values::Floats(layout.gather(&bytes, big, |b| bf16::from_le_bytes(b).to_f32())),
            Dtype::Int64 => Values::Integers(layout.gather(&bytes, big, i64::from_le_bytes)),
        })
    }
}

impl Layout {
    /// The tensor's elements out of its storage's bytes, which are as many as it has been checked against.
    fn gather<const N: usize, T>(&self, bytes: &[u8], big_endian: bool, value: impl Fn([u8; N]) -> T) -> Vec<T> {
        let (elements, _) = bytes.as_chunks::<N>();
        let at = |i: usize| {
            let mut element = elements[i];
            if big_endian {
                element.reverse();
            }
            value(element)
        };
        let n: usize = self.shape.iter().product();
        let mut out = Vec::with_capacity(n);
        let mut place = vec![0; self.shape.len()];
        let mut element = self.offset;
        for _ in 0..n {
            out.push(at(element));
            for axis in (0..place.len()).rev() {
                place[axis] += 1;
                element += self.strides[axis];
                if place[axis] < self.shape[axis] {
                    break;
                }
                element -= self.strides[axis] * self.shape[axis];
                place[axis] = 0;
            }
        }
        out
    }

    /// From the arguments of `_rebuild_tensor_v2`: storage, offset, shape, strides, and what does not matter here.
    fn new(p: &Pickle, arguments: &[Id]) -> Result<Self, String> {
        let [storage, offset, shape, strides, ..] = *arguments else { return Err("is built of too few parts".into()) };
        let Node::Persistent(id) = p.node(storage) else { return Err("has no storage".into()) };
        let (class, key, n) = match p.items(*id) {
            Some(&[kind, class, key, _, n]) if text(p, kind) == Some("storage") => (class, key, n),
            _ => return Err("has a storage of an unknown form".into()),
        };
        let dtype = match p.node(class) {
            Node::Global(_, class) => Dtype::of_storage(class)
                .ok_or_else(|| format!("is of type {class}; read are float32, float64, float16, bfloat16 and int64"))?,
            _ => return Err("has a storage of an unknown form".into()),
        };
        let key = text(p, key).filter(|k| !k.is_empty() && k.bytes().all(|b| b.is_ascii_digit()));
        let key = key.ok_or("has a storage without a number")?;
        let count = |id: Id| match p.node(id) {
            Node::Int(i) => usize::try_from(*i).map_err(|_| format!("has a negative size or stride, {i}")),
            _ => Err("has a size that is not a number".to_string()),
        };
        let counts =
            |id: Id| p.items(id).ok_or("has no shape")?.iter().map(|&i| count(i)).collect::<Result<Vec<_>, _>>();
        let (n, offset, shape, strides) = (count(n)?, count(offset)?, counts(shape)?, counts(strides)?);
        if shape.len() != strides.len() || shape.len() > 16 {
            return Err(format!("has {} sizes and {} strides", shape.len(), strides.len()));
        }
        let values = if shape.contains(&0) { Some(0) } else { shape.iter().try_fold(1usize, |n, &s| n.checked_mul(s)) };
        let last = shape
            .iter()
            .zip(&strides)
            .try_fold(offset, |at, (&s, &stride)| at.checked_add(s.saturating_sub(1).checked_mul(stride)?));
        match (values, last) {
            (Some(0), _) => {}
            // More values than elements: strides of 0, with which a small file could claim any size.
            (Some(values), Some(last)) if values <= n && last < n => {}
            _ => return Err(format!("of shape {shape:?} does not fit its storage of {n} values")),
        }
        Ok(Layout { dtype, shape, strides, offset, storage: (format!("data/{key}"), n) })
    }
}

fn text<'p>(p: &'p Pickle, id: Id) -> Option<&'p str> {
    if let Node::Text(t) = p.node(id) { Some(t) } else { None }
}
