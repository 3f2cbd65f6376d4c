//! The columns of a pickled pandas `DataFrame` (pandas 1 and 2; blocks of numbers, lists and text).

use super::pickle::{Id, Node, Pickle};

/// A column.
#[derive(Clone, Debug, PartialEq)]
pub enum Column {
    /// Integers (or booleans).
    Int(Vec<i64>),
    /// Floats.
    Float(Vec<f64>),
    /// Text.
    Text(Vec<String>),
    /// Lists of integers.
    IntList(Vec<Vec<i64>>),
    /// Lists of text.
    TextList(Vec<Vec<String>>),
}

/// A frame: named columns, and the row index if it holds integers.
#[derive(Clone, Debug, Default)]
pub struct Frame {
    /// (name, values) in order.
    pub columns: Vec<(String, Column)>,
    /// The index.
    pub index: Vec<i64>,
}

/// Largest number of rows believed.
const MAX_ROWS: i64 = 1 << 28;

/// Reads a pickled frame.
pub fn read_frame(bytes: &[u8]) -> Result<Frame, String> {
    let pickle = Pickle::parse(bytes)?;
    Reader { p: &pickle, limit: bytes.len() }.frame()
}

struct Reader<'p, 'a> {
    p: &'p Pickle<'a>,
    /// Most list entries of a column: a file holds each in at least a byte, unless it repeats one list over and over to
    /// exhaust memory.
    limit: usize,
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
    fn frame(&self) -> Result<Frame, String> {
        let p = self.p;
        let not = || "not a pickled pandas DataFrame of pandas 1 or 2".to_string();
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
            let [k, n] = shape[..] else { return Err("a block that is not two-dimensional".into()) };
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
            if step <= 0 || stop.saturating_sub(start) > MAX_ROWS.saturating_mul(step) {
                return Err("a RangeIndex that is too long".into());
            }
            return Ok(Column::Int((start..stop).step_by(step as usize).collect()));
        }
        let (shape, data) = self.array(entry("data").ok_or("an index without data")?)?;
        let [n] = shape[..] else { return Err("an index that is not one-dimensional".into()) };
        data.row(self, 0, 1, n)
    }

    /// A numpy array: shape and storage.
    fn array(&self, id: Id) -> Result<(Vec<usize>, Data<'_>), String> {
        let p = self.p;
        let (name, arguments, state) = p.call(id).ok_or("values that are not an array")?;
        match (name, arguments, state) {
            ("_frombuffer", &[buffer, dtype, shape, order], _) => {
                let Node::Bytes(bytes) = p.node(buffer) else { return Err("an array without bytes".into()) };
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

    fn shape(&self, id: Id) -> Result<Vec<usize>, String> {
        let dims = self.p.items(id).ok_or("an array without shape")?;
        let dim = |&d: &Id| self.int(d).filter(|d| (0..=MAX_ROWS).contains(d)).map(|d| d as usize);
        dims.iter().map(dim).collect::<Option<_>>().ok_or_else(|| "an array with an impossible shape".into())
    }

    fn placement(&self, id: Id, k: usize) -> Result<Vec<usize>, String> {
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
        let n = shape.iter().product();
        match data.row(self, 0, 1, n)? {
            Column::Int(places) if places.len() == k => {
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

    /// Text: plain, or a numpy string scalar.
    fn text(&self, id: Id) -> Option<String> {
        match self.p.node(id) {
            Node::Text(t) => Some(t.to_string()),
            Node::Call { .. } => match self.scalar(id)? {
                (Kind::Utf32 { .. }, data) => utf32(data),
                _ => None,
            },
            _ => None,
        }
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
}

impl Data<'_> {
    /// Row `i` of an array `[k, n]` as a column.
    fn row(&self, reader: &Reader, i: usize, k: usize, n: usize) -> Result<Column, String> {
        let at = |j: usize| if self.fortran { j * k + i } else { i * n + j };
        let total = k.checked_mul(n).ok_or("an array that is too large")?;
        match (&self.storage, self.kind) {
            (Storage::Objects(items), _) => {
                if items.len() != total {
                    return Err(format!("{} values for {total} places", items.len()));
                }
                object_column(reader, n, |j| items[at(j)])
            }
            (Storage::Bytes(data), Kind::Int { bytes, .. }) if data.len() == total * bytes => {
                let value = |j: usize| decode_int(self.kind, &data[at(j) * bytes..][..bytes]);
                (0..n)
                    .map(value)
                    .collect::<Option<_>>()
                    .map(Column::Int)
                    .ok_or_else(|| "an integer out of range".into())
            }
            (Storage::Bytes(data), Kind::Float { bytes }) if data.len() == total * bytes => {
                let value = |j: usize| {
                    let b = &data[at(j) * bytes..][..bytes];
                    match b.try_into() {
                        Ok(b) => f64::from_le_bytes(b),
                        Err(_) => f32::from_le_bytes([b[0], b[1], b[2], b[3]]).into(),
                    }
                };
                Ok(Column::Float((0..n).map(value).collect()))
            }
            (Storage::Bytes(data), Kind::Utf32 { chars }) if data.len() == total * chars * 4 => {
                let value = |j: usize| utf32(&data[at(j) * chars * 4..][..chars * 4]);
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
    if lists.iter().map(|l| l.len()).sum::<usize>() > reader.limit {
        return Err("lists that hold more entries than the file has bytes".into());
    }
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
    let text: Option<String> = chars.map(char::from_u32).collect();
    text.map(|t| t.trim_end_matches('\0').to_string())
}
