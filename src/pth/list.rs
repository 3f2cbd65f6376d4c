//! Finds the tensors in a torch file's pickle: below dictionaries and lists, under bounds that a hostile one cannot pass.

use std::collections::HashSet;

use super::{Entry, Layout};
use crate::data::pickle::{Id, Node, Pickle};

/// Bounds on what names may cost.
const MOST_TENSORS: usize = 100_000;
const LONGEST_NAME: usize = 1024;
const DEEPEST: usize = 64;

/// All tensors in dictionaries and lists below the root.
pub(super) fn list(p: &Pickle) -> Result<Vec<Entry>, String> {
    let mut walk = Walk { p, path: Vec::new(), seen: HashSet::new(), entries: Vec::new() };
    walk.visit(p.root())?;
    if walk.entries.is_empty()
        && let Node::Call { function, .. } = p.node(p.root())
        && let Node::Global(module, name) = p.node(*function)
        && name != "OrderedDict"
    {
        let (module, name) = (module.escape_debug(), name.escape_debug());
        return Err(format!("holds an object of class {module}.{name}; save its state_dict() instead"));
    }
    Ok(walk.entries)
}

struct Walk<'p, 'a> {
    p: &'p Pickle<'a>,
    /// Keys so far; numbers are list places.
    path: Vec<Key<'p>>,
    /// Containers are entered once: a pickle may name one again and again.
    seen: HashSet<Id>,
    entries: Vec<Entry>,
}

#[derive(Clone, Copy)]
enum Key<'p> {
    Text(&'p str),
    Number(i64),
}

impl<'p> Walk<'p, '_> {
    fn visit(&mut self, id: Id) -> Result<(), String> {
        let p = self.p;
        match p.node(id) {
            Node::Dict(pairs) => self.pairs(id, pairs),
            Node::List(items) | Node::Tuple(items) => {
                if !self.seen.insert(id) {
                    return Ok(());
                }
                items.iter().enumerate().try_for_each(|(i, &item)| self.below(Key::Number(i as i64), item))
            }
            Node::Call { function, arguments, entries, .. } => {
                let Node::Global(module, name) = p.node(*function) else { return Ok(()) };
                let arguments = p.items(*arguments).unwrap_or_default();
                match (&**module, &**name) {
                    ("collections", "OrderedDict" | "defaultdict") => self.pairs(id, entries),
                    ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state") => match arguments.first()
                    {
                        // One wrapper, not a chain of them: its argument is a tensor.
                        Some(&inner) if p.call(inner).is_some_and(|c| c.0 == "_rebuild_tensor_v2") => self.visit(inner),
                        _ => self.push(Err("is a parameter without a tensor".into())),
                    },
                    ("torch._utils", "_rebuild_tensor_v2") => self.push(Layout::new(p, arguments)),
                    (module, name) if module.starts_with("torch") && name.starts_with("_rebuild") => self
                        .push(Err(format!("is made by {module}.{name}, which is not supported; save plain tensors"))),
                    _ => Ok(()),
                }
            }
            _ => Ok(()),
        }
    }

    fn pairs(&mut self, id: Id, pairs: &'p [(Id, Id)]) -> Result<(), String> {
        if !self.seen.insert(id) {
            return Ok(());
        }
        for &(key, value) in pairs {
            match self.p.node(key) {
                Node::Text(t) => self.below(Key::Text(t), value)?,
                Node::Int(i) => self.below(Key::Number(*i), value)?,
                _ => {}
            }
        }
        Ok(())
    }

    fn below(&mut self, key: Key<'p>, id: Id) -> Result<(), String> {
        if self.path.len() == DEEPEST {
            return Err(format!("nested deeper than {DEEPEST}"));
        }
        self.path.push(key);
        let done = self.visit(id);
        self.path.pop();
        done
    }

    fn push(&mut self, layout: Result<Layout, String>) -> Result<(), String> {
        if self.entries.len() == MOST_TENSORS {
            return Err(format!("holds more than {MOST_TENSORS} tensors"));
        }
        let length = |k: &Key| if let Key::Text(t) = k { t.len() + 1 } else { 21 };
        if self.path.iter().map(length).sum::<usize>() > LONGEST_NAME {
            return Err(format!("a tensor's name is longer than {LONGEST_NAME} bytes"));
        }
        let parts = self.path.iter().map(|k| match k {
            Key::Text(t) => t.to_string(),
            Key::Number(i) => i.to_string(),
        });
        let name = parts.collect::<Vec<_>>().join(".");
        self.entries.push(Entry { name, layout });
        Ok(())
    }
}
