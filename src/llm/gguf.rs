//! The GGUF container (versions 2 and 3): metadata and tensors, memory-mapped, every length checked against the file.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use rayon::prelude::*;

use super::Error;
use super::dequant::GgmlType;

/// A metadata value; all integers widened.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Any integer type.
    Int(i128),
    /// float32 or float64.
    Float(f64),
    /// Boolean.
    Bool(bool),
    /// Text.
    Text(String),
    /// An array.
    List(Vec<Value>),
}

/// One tensor's place in the file.
#[derive(Clone, Debug)]
pub struct TensorInfo {
    /// One to four dimensions, none of them 0, as Hugging Face writes them (rows first; the file stores the reverse).
    pub shape: Vec<usize>,
    /// Storage type.
    pub kind: GgmlType,
    start: usize,
    end: usize,
}

/// An open GGUF file.
pub struct Gguf {
    path: PathBuf,
    map: Mmap,
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, TensorInfo>,
}

/// Bounds that no real file reaches: a damaged length must not become an allocation.
const MAX_ENTRIES: u64 = 1 << 20;
const MAX_LIST: u64 = 1 << 24;

impl Gguf {
    /// Opens and checks a file.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let file = File::open(path).map_err(Error::io(path))?;
        // SAFETY: the map is read only; changing the file under a running process is the user's to avoid.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(path))?;
        let (metadata, tensors) = parse(&map).map_err(|what| Error::Gguf { path: path.to_path_buf(), what })?;
        Ok(Gguf { path: path.to_path_buf(), map, metadata, tensors })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn error(&self, what: impl Into<String>) -> Error {
        Error::Gguf { path: self.path.clone(), what: what.into() }
    }

    /// A metadata entry.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// A text entry, or an error naming the key.
    pub fn text(&self, key: &str) -> Result<&str, Error> {
        match self.get(key) {
            Some(Value::Text(s)) => Ok(s),
            other => Err(self.error(format!("metadata {key} is {other:?}; expected text"))),
        }
    }

    /// A non-negative integer entry, if it is there.
    pub fn size(&self, key: &str) -> Result<Option<usize>, Error> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Int(i)) if (0..=i128::from(u32::MAX)).contains(i) => Ok(Some(*i as usize)),
            Some(other) => Err(self.error(format!("metadata {key} is {other:?}; expected a size"))),
        }
    }

    /// A number entry, if it is there.
    pub fn number(&self, key: &str) -> Result<Option<f64>, Error> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Float(x)) => Ok(Some(*x)),
            Some(Value::Int(i)) => Ok(Some(*i as f64)),
            Some(other) => Err(self.error(format!("metadata {key} is {other:?}; expected a number"))),
        }
    }

    /// A boolean entry, if it is there.
    pub fn flag(&self, key: &str) -> Option<bool> {
        if let Some(Value::Bool(b)) = self.get(key) { Some(*b) } else { None }
    }

    /// A list entry, or an error naming the key.
    pub fn list(&self, key: &str) -> Result<&[Value], Error> {
        match self.get(key) {
            Some(Value::List(l)) => Ok(l),
            _ => Err(self.error(format!("metadata {key} is missing or not a list"))),
        }
    }

    /// All tensors by name.
    pub fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    /// All values of a tensor as float32, decoded on all cores.
    pub fn decode(&self, info: &TensorInfo) -> Vec<f32> {
        const BLOCKS: usize = 256;
        let (elements, size) = info.kind.block();
        let bytes = &self.map[info.start..info.end];
        let mut values = vec![0.0; bytes.len() / size * elements];
        values
            .par_chunks_mut(BLOCKS * elements)
            .zip(bytes.par_chunks(BLOCKS * size))
            .for_each(|(values, bytes)| info.kind.decode(bytes, values));
        values
    }
}

type Parsed = (BTreeMap<String, Value>, BTreeMap<String, TensorInfo>);

fn parse(bytes: &[u8]) -> Result<Parsed, String> {
    let mut r = Reader { bytes, at: 0 };
    if r.take(4)? != b"GGUF" {
        return Err("not a GGUF file: it does not begin with the letters GGUF".into());
    }
    let version = r.u32()?;
    if !(2..=3).contains(&version) {
        return Err(format!("GGUF version {version} is not supported; supported: 2 and 3 (little endian)"));
    }
    let (n_tensors, n_entries) = (r.u64()?, r.u64()?);
    if n_tensors > MAX_ENTRIES || n_entries > MAX_ENTRIES {
        return Err(format!("{n_tensors} tensors and {n_entries} metadata entries: the header is damaged"));
    }
    let mut metadata = BTreeMap::new();
    for _ in 0..n_entries {
        let key = r.text()?;
        let kind = r.u32()?;
        let value = r.value(kind, 0).map_err(|e| format!("metadata {key}: {e}"))?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(format!("metadata {key} occurs twice"));
        }
    }
    let mut infos = Vec::new();
    for _ in 0..n_tensors {
        let name = r.text()?;
        let n_dims = r.u32()?;
        if !(1..=4).contains(&n_dims) {
            return Err(format!("tensor {name} has {n_dims} dimensions; expected 1 to 4"));
        }
        let mut shape = Vec::new();
        for _ in 0..n_dims {
            shape.push(usize::try_from(r.u64()?).map_err(|_| format!("tensor {name} is too large"))?);
        }
        shape.reverse();
        if shape.contains(&0) {
            return Err(format!("tensor {name} of shape {shape:?} is empty"));
        }
        let kind = GgmlType::from_id(r.u32()?).map_err(|e| format!("tensor {name}: {e}"))?;
        infos.push((name, shape, kind, r.u64()?));
    }
    let alignment = match metadata.get("general.alignment") {
        Some(Value::Int(a)) if (1..=1 << 16).contains(a) => *a as usize,
        None => 32,
        Some(other) => return Err(format!("general.alignment is {other:?}")),
    };
    let data = r.at.next_multiple_of(alignment);
    let mut tensors = BTreeMap::new();
    for (name, shape, kind, offset) in infos {
        let (elements, size) = kind.block();
        let count = shape.iter().try_fold(1usize, |a, &b| a.checked_mul(b));
        let last = shape.last().copied().unwrap_or(1);
        if count.is_none() || last % elements != 0 {
            return Err(format!("tensor {name} of shape {shape:?} does not fit blocks of {elements}"));
        }
        let len = count.and_then(|c| (c / elements).checked_mul(size));
        let start = usize::try_from(offset).ok().and_then(|o| data.checked_add(o));
        let end = start.zip(len).and_then(|(s, l)| s.checked_add(l)).filter(|&e| e <= bytes.len());
        let (Some(start), Some(end)) = (start, end) else {
            return Err(format!(
                "tensor {name} ends beyond the file's {} bytes: the file is cut short; copy it again",
                bytes.len()
            ));
        };
        let info = TensorInfo { shape, kind, start, end };
        if tensors.insert(name.clone(), info).is_some() {
            return Err(format!("tensor {name} occurs twice"));
        }
    }
    Ok((metadata, tensors))
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], String> {
        let end = self.at.checked_add(n).filter(|&e| e <= self.bytes.len());
        let end = end.ok_or_else(|| format!("the file is cut short at byte {}; copy it again", self.bytes.len()))?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut a = [0; N];
        a.copy_from_slice(self.take(N)?);
        Ok(a)
    }

    fn u32(&mut self) -> Result<u32, String> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, String> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn text(&mut self) -> Result<String, String> {
        let len = usize::try_from(self.u64()?).map_err(|e| e.to_string())?;
        let at = self.at;
        String::from_utf8(self.take(len)?.to_vec()).map_err(|_| format!("text at byte {at} is not UTF-8"))
    }

    fn value(&mut self, kind: u32, depth: u32) -> Result<Value, String> {
        Ok(match kind {
            0 => Value::Int(self.array::<1>()?[0].into()),
            1 => Value::Int((self.array::<1>()?[0] as i8).into()),
            2 => Value::Int(u16::from_le_bytes(self.array()?).into()),
            3 => Value::Int(i16::from_le_bytes(self.array()?).into()),
            4 => Value::Int(self.u32()?.into()),
            5 => Value::Int((self.u32()? as i32).into()),
            6 => Value::Float(decimal(f32::from_bits(self.u32()?))),
            7 => Value::Bool(self.array::<1>()?[0] != 0),
            8 => Value::Text(self.text()?),
            9 if depth < 2 => {
                let (kind, n) = (self.u32()?, self.u64()?);
                if n > MAX_LIST {
                    return Err(format!("a list of {n} entries: the header is damaged"));
                }
                let mut list = Vec::new();
                for _ in 0..n {
                    list.push(self.value(kind, depth + 1)?);
                }
                Value::List(list)
            }
            10 => Value::Int(self.u64()?.into()),
            11 => Value::Int((self.u64()? as i64).into()),
            12 => Value::Float(f64::from_bits(self.u64()?)),
            other => return Err(format!("value type {other} is not known")),
        })
    }
}

/// A float32 as the decimal number it was written from: 1e-5, not 9.99999974737875e-6.
fn decimal(x: f32) -> f64 {
    x.to_string().parse().unwrap_or(f64::from(x))
}
