//! A reader of pickles that keeps them as data.
//!
//! A pickle is a program. This machine runs it only as far as building a tree: names of functions and classes stay names,
//! calls stay calls, nothing is imported or executed. Every opcode makes at most one node, every length is checked against
//! the input, so memory and time are linear in the file's size whatever it holds.

use std::borrow::Cow;

/// Index of a node.
pub type Id = u32;

/// A node of the tree. Text and bytes are borrowed from the input.
#[derive(Clone, Debug, PartialEq)]
pub enum Node<'a> {
    /// `None`.
    None,
    /// A boolean.
    Bool(bool),
    /// An integer (of at most 64 bits).
    Int(i64),
    /// A float.
    Float(f64),
    /// Text.
    Text(Cow<'a, str>),
    /// Bytes or a bytearray.
    Bytes(&'a [u8]),
    /// A tuple.
    Tuple(Vec<Id>),
    /// A list.
    List(Vec<Id>),
    /// A dictionary, as pairs.
    Dict(Vec<(Id, Id)>),
    /// A name: module and attribute.
    Global(Cow<'a, str>, Cow<'a, str>),
    /// A call that was not made, and the state the object would have been given.
    Call {
        /// What would be called.
        function: Id,
        /// Its arguments (a tuple).
        arguments: Id,
        /// The state of `BUILD`, if any.
        state: Option<Id>,
        /// The entries that the object would have been given, as pairs (an `OrderedDict` keeps what it holds here).
        entries: Vec<(Id, Id)>,
    },
    /// What the pickle's reader was to find by a persistent id (torch: a storage).
    Persistent(Id),
}

/// A parsed pickle.
#[derive(Debug)]
pub struct Pickle<'a> {
    nodes: Vec<Node<'a>>,
    root: Id,
}

impl<'a> Pickle<'a> {
    /// Parses protocols 2 to 5.
    pub fn parse(input: &'a [u8]) -> Result<Self, String> {
        let mut machine =
            Machine { input, at: 0, nodes: Vec::new(), stack: Vec::new(), marks: Vec::new(), memo: Vec::new() };
        let root = machine.run()?;
        Ok(Pickle { nodes: machine.nodes, root })
    }

    /// The whole.
    pub fn root(&self) -> Id {
        self.root
    }

    /// A node.
    pub fn node(&self, id: Id) -> &Node<'a> {
        &self.nodes[id as usize]
    }

    /// Items of a tuple or list.
    pub fn items(&self, id: Id) -> Option<&[Id]> {
        match self.node(id) {
            Node::Tuple(items) | Node::List(items) => Some(items),
            _ => None,
        }
    }

    /// The value of a dictionary's text key.
    pub fn entry(&self, id: Id, key: &str) -> Option<Id> {
        let Node::Dict(pairs) = self.node(id) else { return None };
        pairs.iter().rev().find(|(k, _)| matches!(self.node(*k), Node::Text(t) if t == key)).map(|p| p.1)
    }

    /// (last name of the function, arguments, state) of a call.
    pub fn call(&self, id: Id) -> Option<(&str, &[Id], Option<Id>)> {
        let Node::Call { function, arguments, state, .. } = self.node(id) else { return None };
        let Node::Global(_, name) = self.node(*function) else { return None };
        Some((name, self.items(*arguments)?, *state))
    }
}

struct Machine<'a> {
    input: &'a [u8],
    at: usize,
    nodes: Vec<Node<'a>>,
    stack: Vec<Id>,
    marks: Vec<usize>,
    memo: Vec<Option<Id>>,
}

impl<'a> Machine<'a> {
    fn run(&mut self) -> Result<Id, String> {
        loop {
            let at = self.at;
            let opcode = self.take(1)?[0];
            if opcode == b'.' {
                return self.pop();
            }
            self.step(opcode).map_err(|e| format!("{e} (opcode 0x{opcode:02x} at byte {at})"))?;
        }
    }

    fn step(&mut self, opcode: u8) -> Result<(), String> {
        match opcode {
            0x80 => {
                let protocol = self.take(1)?[0];
                if !(2..=5).contains(&protocol) {
                    return Err(format!("pickle protocol {protocol} is not supported; supported: 2 to 5"));
                }
            }
            0x95 => {
                self.take(8)?;
            }
            b'(' => self.marks.push(self.stack.len()),
            b'0' => {
                self.pop()?;
            }
            b'N' => self.push(Node::None),
            0x88 => self.push(Node::Bool(true)),
            0x89 => self.push(Node::Bool(false)),
            b'J' => {
                let v = i32::from_le_bytes(self.array()?);
                self.push(Node::Int(v.into()));
            }
            b'K' => {
                let v = self.take(1)?[0];
                self.push(Node::Int(v.into()));
            }
            b'M' => {
                let v = u16::from_le_bytes(self.array()?);
                self.push(Node::Int(v.into()));
            }
            0x8a => {
                let n = self.take(1)?[0] as usize;
                let bytes = self.take(n)?;
                if n > 8 {
                    return Err(format!("an integer of {n} bytes is not supported"));
                }
                let negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
                let mut wide = [if negative { 0xff } else { 0 }; 8];
                wide[..n].copy_from_slice(bytes);
                self.push(Node::Int(i64::from_le_bytes(wide)));
            }
            b'G' => {
                let v = f64::from_be_bytes(self.array()?);
                self.push(Node::Float(v));
            }
            0x8c | b'X' | 0x8d => {
                let n = self.length(opcode == 0x8c, opcode == 0x8d)?;
                let text = self.text(n)?;
                self.push(Node::Text(text));
            }
            b'C' | b'B' | 0x8e | 0x96 | b'U' | b'T' => {
                let n = self.length(matches!(opcode, b'C' | b'U'), matches!(opcode, 0x8e | 0x96))?;
                let bytes = self.take(n)?;
                self.push(Node::Bytes(bytes));
            }
            b')' => self.push(Node::Tuple(Vec::new())),
            0x85..=0x87 => {
                let n = (opcode - 0x84) as usize;
                let from = self.stack.len().checked_sub(n).ok_or("the stack is empty")?;
                let items = self.stack.split_off(from);
                self.push(Node::Tuple(items));
            }
            b't' => {
                let items = self.pop_mark()?;
                self.push(Node::Tuple(items));
            }
            b']' => self.push(Node::List(Vec::new())),
            b'l' => {
                let items = self.pop_mark()?;
                self.push(Node::List(items));
            }
            b'a' => {
                let item = self.pop()?;
                self.list()?.push(item);
            }
            b'e' => {
                let items = self.pop_mark()?;
                self.list()?.extend(items);
            }
            b'}' => self.push(Node::Dict(Vec::new())),
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.dict()?.push((key, value));
            }
            b'u' => {
                let items = self.pop_mark()?;
                self.dict()?.extend(items.chunks_exact(2).map(|p| (p[0], p[1])));
            }
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.push(Node::Global(module, name));
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                match (&self.nodes[module as usize], &self.nodes[name as usize]) {
                    (Node::Text(m), Node::Text(n)) => {
                        let global = Node::Global(m.clone(), n.clone());
                        self.push(global);
                    }
                    _ => return Err("a name that is not text".into()),
                }
            }
            b'R' | 0x81 => {
                let (arguments, function) = (self.pop()?, self.pop()?);
                self.push(Node::Call { function, arguments, state: None, entries: Vec::new() });
            }
            b'Q' => {
                let id = self.pop()?;
                self.push(Node::Persistent(id));
            }
            b'b' => {
                let given = self.pop()?;
                let object = *self.stack.last().ok_or("the stack is empty")?;
                match &mut self.nodes[object as usize] {
                    Node::Call { state, .. } => *state = Some(given),
                    _ => return Err("state for something that is not an object".into()),
                }
            }
            0x94 => {
                let top = *self.stack.last().ok_or("the stack is empty")?;
                self.memo.push(Some(top));
            }
            b'q' | b'r' => {
                let i =
                    if opcode == b'q' { self.take(1)?[0] as usize } else { u32::from_le_bytes(self.array()?) as usize };
                let top = *self.stack.last().ok_or("the stack is empty")?;
                // Entries are numbered as they are made; a number beyond the input's length is not honest.
                if i > self.input.len() {
                    return Err(format!("memo entry {i} is out of range"));
                }
                if self.memo.len() <= i {
                    self.memo.resize(i + 1, None);
                }
                self.memo[i] = Some(top);
            }
            b'h' | b'j' => {
                let i =
                    if opcode == b'h' { self.take(1)?[0] as usize } else { u32::from_le_bytes(self.array()?) as usize };
                let id = self.memo.get(i).copied().flatten().ok_or_else(|| format!("memo entry {i} does not exist"))?;
                self.stack.push(id);
            }
            _ => return Err("this opcode is not supported".into()),
        }
        Ok(())
    }

    fn push(&mut self, node: Node<'a>) {
        self.stack.push(self.nodes.len() as Id);
        self.nodes.push(node);
    }

    fn pop(&mut self) -> Result<Id, String> {
        self.stack.pop().ok_or_else(|| "the stack is empty".into())
    }

    fn pop_mark(&mut self) -> Result<Vec<Id>, String> {
        let mark = self.marks.pop().filter(|&m| m <= self.stack.len()).ok_or("no mark")?;
        Ok(self.stack.split_off(mark))
    }

    fn list(&mut self) -> Result<&mut Vec<Id>, String> {
        let id = *self.stack.last().ok_or("the stack is empty")?;
        match &mut self.nodes[id as usize] {
            Node::List(items) => Ok(items),
            _ => Err("an item for something that is not a list".into()),
        }
    }

    fn dict(&mut self) -> Result<&mut Vec<(Id, Id)>, String> {
        let id = *self.stack.last().ok_or("the stack is empty")?;
        match &mut self.nodes[id as usize] {
            Node::Dict(pairs) | Node::Call { entries: pairs, .. } => Ok(pairs),
            _ => Err("an entry for something that is not a dictionary".into()),
        }
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8], String> {
        let end = self.at.checked_add(n).filter(|&e| e <= self.input.len());
        let end = end.ok_or_else(|| format!("the pickle is cut short at byte {}", self.input.len()))?;
        let taken = &self.input[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut a = [0; N];
        a.copy_from_slice(self.take(N)?);
        Ok(a)
    }

    fn length(&mut self, short: bool, long: bool) -> Result<usize, String> {
        Ok(match (short, long) {
            (true, _) => self.take(1)?[0] as usize,
            (_, true) => usize::try_from(u64::from_le_bytes(self.array()?)).map_err(|e| e.to_string())?,
            _ => u32::from_le_bytes(self.array()?) as usize,
        })
    }

    fn text(&mut self, n: usize) -> Result<Cow<'a, str>, String> {
        let bytes = self.take(n)?;
        std::str::from_utf8(bytes).map(Cow::Borrowed).map_err(|_| "text that is not UTF-8".into())
    }

    fn line(&mut self) -> Result<Cow<'a, str>, String> {
        let rest = &self.input[self.at..];
        let end = rest.iter().position(|&b| b == b'\n').ok_or("a name without an end")?;
        let text = self.text(end)?;
        self.at += 1;
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// `pickle.dumps({"a": [1, -2, None], "b": collections.OrderedDict()}, 4)`
    const SMALL: &[u8] =
        b"\x80\x04\x958\x00\x00\x00\x00\x00\x00\x00}\x94(\x8c\x01a\x94]\x94(K\x01J\xfe\xff\xff\xffNe\x8c\x01b\x94\x8c\x0bcollections\x94\x8c\x0bOrderedDict\x94\x93\x94)R\x94u.";

    #[test]
    fn calls_stay_calls() {
        let p = Pickle::parse(SMALL).unwrap();
        let list = p.items(p.entry(p.root(), "a").unwrap()).unwrap();
        assert_eq!(
            list.iter().map(|&i| p.node(i).clone()).collect::<Vec<_>>(),
            [Node::Int(1), Node::Int(-2), Node::None]
        );
        assert_eq!(p.call(p.entry(p.root(), "b").unwrap()), Some(("OrderedDict", &[][..], None)));
    }

    #[test]
    fn damage_is_an_error() {
        for cut in 0..SMALL.len() {
            assert!(Pickle::parse(&SMALL[..cut]).is_err(), "cut at {cut}");
        }
        assert!(Pickle::parse(b"\x80\x09.").unwrap_err().contains("protocol 9"));
        assert!(Pickle::parse(b"\x80\x04P.").unwrap_err().contains("not supported (opcode 0x50 at byte 2)"));
    }

    proptest! {
        #[test]
        fn anything_is_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Pickle::parse(&bytes);
        }

        #[test]
        fn mutations_are_read_or_refused(at in 0..SMALL.len(), byte in any::<u8>()) {
            let mut bytes = SMALL.to_vec();
            bytes[at] = byte;
            let _ = Pickle::parse(&bytes);
        }
    }
}
