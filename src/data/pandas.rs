//! The columns of a pickled pandas `DataFrame`: blocks of numbers, lists and text, as pandas 1 to 3 write them.
//!
//! A pickle may name one value any number of times, so a small file can describe a huge frame. Text is therefore decoded
//! once a value and shared, and everything that is built is paid from a budget of the file's size.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::sync::Arc;

use super::pickle::{Id, Node, Pickle};

/// A column.
#[derive(Clone, Debug, PartialEq)]
pub enum Column {
    /// Integers (or booleans).
    Int(Vec<i64>),
    /// Floats.
    Float(Vec<f64>),
    /// Text.
    Text(Vec<Arc<str>>),
    /// Lists of integers.
    IntList(Vec<Vec<i64>>),
    /// Lists of text.
    TextList(Vec<Vec<Arc<str>>>),
}

/// A frame: named columns, and the row index if it holds integers.
#[derive(Clone, Debug, Default)]
pub struct Frame {
    /// (name, values) in order.
    pub columns: Vec<(Arc<str>, Column)>,
    /// The row index.
    pub index: Vec<i64>,
}

/// Most numbers, list entries and bytes of decoded text that are believed of a byte of the file. Honest files have at most
/// one cell a byte, and decode each text once.
const CELLS_PER_BYTE: usize = 2;

/// Reads a pickled frame.
pub fn read_frame(bytes: &[u8]) -> Result<Frame, String> {
    let pickle = Pickle::parse(bytes)?;
    let budget = Cell::new(bytes.len().saturating_mul(CELLS_PER_BYTE));
    Reader { p: &pickle, budget, texts: RefCell::default() }.frame()
}

struct Reader<'p, 'a> {
    p: &'p Pickle<'a>,
    budget: Cell<usize>,
    /// Texts by node, each decoded once.
    texts: RefCell<HashMap<Id, Arc<str>>>,
}

/// A numpy dtype as far as it matters here.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Int { bytes: usize, signed: bool },
    Float { bytes: usize },
    Object,
    Utf32 { chars: usize },
}

impl Reader<'_, '_> {
    fn pay(&self, cells: usize) -> Result<(), String> {
        let left = self.budget.get().checked_sub(cells);
        self.budget.set(left.ok_or("the frame claims more cells than its file can hold")?);
        Ok(())
    }

    fn frame(&self) -> Result<Frame, String> {
        let p = self.p;
        let not = || "not a pickled pandas DataFrame".to_string();
        let (name, _, state) = p.call(p.root()).ok_or_else(not)?;
        if name != "DataFrame" {
            return Err(format!("a pickled {name}, not a DataFrame"));
        }
        let manager = state.and_then(|s| p.entry(s, "_mgr").or_else(|| p.entry(s, "_data"))).ok_or_else(not)?;
        let (name, arguments, _) = p.call(manager).ok_or_else(not)?;
        let [blocks, axes] = *arguments else { return Err(not()) };
        if name != "BlockManager" {
            return Err(format!("a {name} inside the DataFrame; expected a BlockManager"));
        }
        let axes = p.items(axes).filter(|a| a.len() == 2).ok_or_else(not)?;
        let Column::Text(names) = self.index(axes[0])? else { return Err("column names that are not text".into()) };
        let index = match self.index(axes[1])? {
            Column::Int(index) => index,
            _ => return Err("a row index that is not of integers".into()),
        };
        let mut columns: Vec<Option<Column>> = vec![None; names.len()];
        for &block in p.items(blocks).ok_or_else(not)? {
            let (_, arguments, _) = p.call(block).ok_or_else(not)?;
            let [values, placement, _] = *arguments else { return Err("a block without values and placement".into()) };
            let (shape, data) = self.array(values)?;
            // A block of pandas' own string type has one dimension and one column.
            let (k, n) = match shape[..] {
                [k, n] => (k, n),
                [n] => (1, n),
                _ => return Err("a block of more than two dimensions".into()),
            };
            if n != index.len() {
                return Err(format!("a block of {n} rows in a frame of {}", index.len()));
            }
            let places = self.placement(placement, k)?;
            for (i, place) in places.into_iter().enumerate() {
                let slot = columns.get_mut(place).ok_or("a block beyond the columns")?;
                *slot = Some(data.row(self, i, k, n)?);
            }
        }
        let columns: Option<Vec<Column>> = columns.into_iter().collect();
        let columns = columns.ok_or("a column without values")?;
        Ok(Frame { columns: names.into_iter().zip(columns).collect(), index })
    }

    fn index(&self, id: Id) -> Result<Column, String> {
        let p = self.p;
        let (name, arguments, _) = p.call(id).ok_or("an index that is not one")?;
        let &[class, settings] = arguments else { return Err(format!("an index made by {name}")) };
        let entry = |key: &str| p.entry(settings, key);
        if matches!(p.node(class), Node::Global(_, c) if c == "RangeIndex") {
            let int = |key: &str| entry(key).and_then(|i| self.int(i)).ok_or(format!("a RangeIndex without {key}"));
            let (start, stop, step) = (int("start")?, int("stop")?, int("step")?);
            if step <= 0 {
                return Err("a RangeIndex that does not count upwards".into());
            }
            let rows = stop.abs_diff(start.min(stop)).div_ceil(step as u64);
            self.pay(usize::try_from(rows).unwrap_or(usize::MAX))?;
            return Ok(Column::Int((start..stop).step_by(step as usize).collect()));
        }
        let (shape, data) = self.array(entry("data").ok_or("an index without data")?)?;
        let [n] = shape[..] else { return Err("an index that is not one-dimensional".into()) };
        data.row(self, 0, 1, n)
    }

    /// A numpy array, or pandas' array of text: shape and storage.
    fn array(&self, id: Id) -> Result<(Vec<usize>, Data<'_>), String> {
        let p = self.p;
        let (name, arguments, state) = p.call(id).ok_or("values that are not an array")?;
        match (name, arguments, state) {
            ("ArrowStringArray", _, Some(state)) => {
                let array = p.entry(state, "_pa_array").ok_or("an array of text without values")?;
                let (length, arrow) = self.arrow_text(array)?;
                Ok((vec![length], Data { kind: Kind::Object, storage: Storage::Arrow(arrow), fortran: false }))
            }
            ("_frombuffer", &[buffer, dtype, shape, order], _) => {
                let bytes = self.bytes(buffer).ok_or("an array without bytes")?;
                let fortran = matches!(p.node(order), Node::Text(t) if t == "F");
                Ok((self.shape(shape)?, Data { kind: self.dtype(dtype)?, storage: Storage::Bytes(bytes), fortran }))
            }
            ("_reconstruct", _, Some(state)) => {
                let &[_, shape, dtype, fortran, values] = p.items(state).ok_or("an array without state")? else {
                    return Err("an array with unknown state".into());
                };
                let kind = self.dtype(dtype)?;
                let storage = match p.node(values) {
                    Node::Bytes(bytes) => Storage::Bytes(bytes),
                    Node::List(items) => Storage::Objects(items),
                    _ => return Err("an array without values".into()),
                };
                Ok((self.shape(shape)?, Data { kind, storage, fortran: p.node(fortran) == &Node::Bool(true) }))
            }
            (name, ..) => {
                Err(format!("values made by {name}, which is not known here; save the frame as Parquet instead"))
            }
        }
    }

    /// Text as Arrow holds it (pandas 3): offsets into one buffer. Arrays in several chunks are not read.
    fn arrow_text(&self, id: Id) -> Result<(usize, ArrowText<'_>), String> {
        let p = self.p;
        let unknown =
            || "text in an Arrow layout that is not known here; save the frame as Parquet instead".to_string();
        let mut array = p.call(id).ok_or_else(unknown)?;
        if let ("chunked_array", &[chunks, ..], _) = array {
            let &[only] = p.items(chunks).ok_or_else(unknown)? else { return Err(unknown()) };
            array = p.call(only).ok_or_else(unknown)?;
        }
        let (name, arguments, _) = array;
        // The array itself, or the tuple of arguments to rebuild it.
        let parts = match arguments {
            &[parts] if name == "_restore_array" => p.items(parts).ok_or_else(unknown)?,
            parts => parts,
        };
        let &[class, length, nulls, offset, buffers, ..] = parts else { return Err(unknown()) };
        let width = match p.call(class).and_then(|(_, a, _)| a.first().and_then(|&a| self.text(a))).as_deref() {
            Some("large_string") => 8,
            Some("string") => 4,
            _ => return Err(unknown()),
        };
        if self.int(nulls) != Some(0) {
            return Err("a column of text with missing values".into());
        }
        let size = |id: Id| self.int(id).and_then(|v| usize::try_from(v).ok()).ok_or_else(unknown);
        let &[_, ends, text] = p.items(buffers).ok_or_else(unknown)? else { return Err(unknown()) };
        let bytes = |id: Id| p.call(id).and_then(|(_, a, _)| self.bytes(*a.first()?)).ok_or_else(unknown);
        Ok((size(length)?, ArrowText { width, first: size(offset)?, ends: bytes(ends)?, text: bytes(text)? }))
    }

    fn shape(&self, id: Id) -> Result<Vec<usize>, String> {
        let dims = self.p.items(id).ok_or("an array without shape")?;
        let dim = |&d: &Id| self.int(d).and_then(|d| usize::try_from(d).ok());
        dims.iter().map(dim).collect::<Option<_>>().ok_or_else(|| "an array with an impossible shape".into())
    }

    fn placement(&self, id: Id, k: usize) -> Result<Vec<usize>, String> {
        self.pay(k)?;
        if let Some(("slice", &[start, stop, step], _)) = self.p.call(id) {
            let ints = [start, stop, step].map(|i| self.int(i));
            if let [Some(start), Some(stop), Some(step)] = ints
                && step != 0
            {
                let places: Vec<i64> = (0..k as i64).map(|i| start.saturating_add(i.saturating_mul(step))).collect();
                let inside = places.iter().all(|&x| x >= 0 && if step > 0 { x < stop } else { x > stop });
                if inside {
                    return Ok(places.into_iter().map(|x| x as usize).collect());
                }
            }
            return Err("a block with an impossible placement".into());
        }
        let (shape, data) = self.array(id)?;
        match data.row(self, 0, 1, k)? {
            Column::Int(places) if shape == [k] => {
                places.iter().map(|&x| usize::try_from(x).map_err(|e| e.to_string())).collect()
            }
            _ => Err("a block with an impossible placement".into()),
        }
    }

    fn dtype(&self, id: Id) -> Result<Kind, String> {
        let (_, arguments, state) = self.p.call(id).ok_or("an array without dtype")?;
        let Some(Node::Text(code)) = arguments.first().map(|&a| self.p.node(a)) else {
            return Err("a dtype without code".into());
        };
        let big = state.and_then(|s| self.p.items(s)).and_then(|s| s.get(1));
        if big.is_some_and(|&b| matches!(self.p.node(b), Node::Text(t) if t == ">")) {
            return Err("big-endian values are not supported".into());
        }
        let (letter, size) = code.split_at(code.chars().next().map_or(0, char::len_utf8));
        let size: usize = size.parse().unwrap_or(0);
        match (letter, size) {
            ("i", 1 | 2 | 4 | 8) => Ok(Kind::Int { bytes: size, signed: true }),
            ("u" | "b", 1 | 2 | 4 | 8) => Ok(Kind::Int { bytes: size, signed: false }),
            ("f", 4 | 8) => Ok(Kind::Float { bytes: size }),
            ("O", _) => Ok(Kind::Object),
            ("U", 1..=65_536) => Ok(Kind::Utf32 { chars: size }),
            _ => Err(format!("values of type {code:?} are not supported")),
        }
    }

    /// An integer: plain, or a numpy scalar.
    fn int(&self, id: Id) -> Option<i64> {
        match self.p.node(id) {
            Node::Int(i) => Some(*i),
            Node::Bool(b) => Some(i64::from(*b)),
            Node::Call { .. } => match self.scalar(id)? {
                (kind @ Kind::Int { bytes, .. }, data) if data.len() == bytes => decode_int(kind, data),
                _ => None,
            },
            _ => None,
        }
    }

    /// Bytes: plain, or `bytearray(bytes)` as protocols before 5 have it.
    fn bytes(&self, id: Id) -> Option<&[u8]> {
        match (self.p.node(id), self.p.call(id)) {
            (Node::Bytes(bytes), _) => Some(bytes),
            (_, Some(("bytearray", &[argument], _))) => match self.p.node(argument) {
                Node::Bytes(bytes) => Some(bytes),
                _ => None,
            },
            _ => None,
        }
    }

    /// Text: plain, or a numpy string scalar.
    fn text(&self, id: Id) -> Option<Arc<str>> {
        if let Some(text) = self.texts.borrow().get(&id) {
            return Some(text.clone());
        }
        let text: Arc<str> = match self.p.node(id) {
            Node::Text(t) => {
                self.pay(t.len()).ok()?;
                Arc::from(&**t)
            }
            Node::Call { .. } => match self.scalar(id)? {
                (Kind::Utf32 { .. }, data) => {
                    self.pay(data.len()).ok()?;
                    utf32(data)?.into()
                }
                _ => return None,
            },
            _ => return None,
        };
        self.texts.borrow_mut().insert(id, text.clone());
        Some(text)
    }

    fn scalar(&self, id: Id) -> Option<(Kind, &[u8])> {
        let ("scalar", &[dtype, data], _) = self.p.call(id)? else { return None };
        let Node::Bytes(data) = self.p.node(data) else { return None };
        Some((self.dtype(dtype).ok()?, data))
    }
}

struct Data<'p> {
    kind: Kind,
    storage: Storage<'p>,
    fortran: bool,
}

enum Storage<'p> {
    Bytes(&'p [u8]),
    Objects(&'p [Id]),
    Arrow(ArrowText<'p>),
}

/// Text in Arrow's layout: value `i` is `text[end(i)..end(i + 1)]`, ends being little-endian integers of `width` bytes, from
/// the `first` on.
struct ArrowText<'p> {
    width: usize,
    first: usize,
    ends: &'p [u8],
    text: &'p [u8],
}

impl ArrowText<'_> {
    fn end(&self, i: usize) -> Option<usize> {
        let at = self.first.checked_add(i)?.checked_mul(self.width)?;
        let bytes = self.ends.get(at..at.checked_add(self.width)?)?;
        let mut wide = [0; 8];
        wide[..self.width].copy_from_slice(bytes);
        usize::try_from(u64::from_le_bytes(wide)).ok()
    }

    fn value(&self, i: usize) -> Option<&str> {
        std::str::from_utf8(self.text.get(self.end(i)?..self.end(i.checked_add(1)?)?)?).ok()
    }
}

impl Data<'_> {
    /// Row `i` of an array `[k, n]` as a column.
    fn row(&self, reader: &Reader, i: usize, k: usize, n: usize) -> Result<Column, String> {
        let at = |j: usize| if self.fortran { j * k + i } else { i * n + j };
        let total = k.checked_mul(n).ok_or("an array that is too large")?;
        let cost = if let Kind::Utf32 { chars } = self.kind { n.saturating_mul(chars) } else { n };
        reader.pay(cost)?;
        match (&self.storage, self.kind) {
            (Storage::Arrow(arrow), _) => {
                let value = |j: usize| {
                    let text = arrow.value(at(j)).ok_or("text beyond its buffer, or not UTF-8")?;
                    reader.pay(text.len())?;
                    Ok(Arc::from(text))
                };
                (0..n).map(value).collect::<Result<_, String>>().map(Column::Text)
            }
            (Storage::Objects(items), _) => {
                if items.len() != total {
                    return Err(format!("{} values for {total} places", items.len()));
                }
                object_column(reader, n, |j| items[at(j)])
            }
            (Storage::Bytes(data), Kind::Int { bytes, .. }) if Some(data.len()) == total.checked_mul(bytes) => {
                let value = |j: usize| decode_int(self.kind, &data[at(j) * bytes..][..bytes]);
                (0..n)
                    .map(value)
                    .collect::<Option<_>>()
                    .map(Column::Int)
                    .ok_or_else(|| "an integer out of range".into())
            }
            (Storage::Bytes(data), Kind::Float { bytes }) if Some(data.len()) == total.checked_mul(bytes) => {
                let value = |j: usize| {
                    let b = &data[at(j) * bytes..][..bytes];
                    match b.try_into() {
                        Ok(b) => f64::from_le_bytes(b),
                        Err(_) => f32::from_le_bytes([b[0], b[1], b[2], b[3]]).into(),
                    }
                };
                Ok(Column::Float((0..n).map(value).collect()))
            }
            (Storage::Bytes(data), Kind::Utf32 { chars }) if Some(data.len()) == total.checked_mul(chars * 4) => {
                let value = |j: usize| utf32(&data[at(j) * chars * 4..][..chars * 4]).map(Arc::from);
                (0..n)
                    .map(value)
                    .collect::<Option<_>>()
                    .map(Column::Text)
                    .ok_or_else(|| "text that is not Unicode".into())
            }
            _ => Err("an array whose bytes do not fit its shape".into()),
        }
    }
}

fn object_column(reader: &Reader, n: usize, id: impl Fn(usize) -> Id) -> Result<Column, String> {
    let error = |j: usize| format!("row {j}: expected text, or a list of integers or of text");
    if n == 0 || reader.p.items(id(0)).is_none() {
        return (0..n).map(|j| reader.text(id(j)).ok_or_else(|| error(j))).collect::<Result<_, _>>().map(Column::Text);
    }
    let lists: Option<Vec<&[Id]>> = (0..n).map(|j| reader.p.items(id(j))).collect();
    let lists = lists.ok_or("a column that mixes lists and other values")?;
    lists.iter().try_for_each(|l| reader.pay(l.len()))?;
    let first = lists.iter().find_map(|l| l.first());
    if first.is_some_and(|&f| reader.text(f).is_some()) {
        let list =
            |(j, l): (usize, &&[Id])| l.iter().map(|&i| reader.text(i)).collect::<Option<_>>().ok_or_else(|| error(j));
        return lists.iter().enumerate().map(list).collect::<Result<_, _>>().map(Column::TextList);
    }
    let list =
        |(j, l): (usize, &&[Id])| l.iter().map(|&i| reader.int(i)).collect::<Option<_>>().ok_or_else(|| error(j));
    lists.iter().enumerate().map(list).collect::<Result<_, _>>().map(Column::IntList)
}

fn decode_int(kind: Kind, data: &[u8]) -> Option<i64> {
    let Kind::Int { bytes, signed } = kind else { return None };
    let negative = signed && data.last()? & 0x80 != 0;
    let mut wide = [if negative { 0xff } else { 0 }; 8];
    wide[..bytes].copy_from_slice(data);
    let value = i64::from_le_bytes(wide);
    (signed || value >= 0).then_some(value)
}

fn utf32(data: &[u8]) -> Option<String> {
    let chars = data.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    let mut text: String = chars.map(char::from_u32).collect::<Option<_>>()?;
    text.truncate(text.trim_end_matches('\0').len());
    Some(text)
}
