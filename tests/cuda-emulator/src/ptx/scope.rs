//! Names inside one function: registers (singly, in families such as `%r<9>`, in vectors), variables and labels, with the
//! nested scopes that inline assembly opens.

use std::collections::HashMap;

use super::Error;
use super::ast::{Register, Variable};
use super::types::Type;

/// What a name stands for.
#[derive(Debug, Clone, PartialEq)]
pub enum Binding {
    /// A register by index.
    Reg(u32),
    /// The registers of a vector.
    Vector(Vec<u32>),
    /// A variable by index.
    Var(u32),
}

#[derive(Debug, Default)]
struct Scope {
    parent: usize,
    names: HashMap<String, Binding>,
    families: Vec<(String, u32, Type)>,
    labels: HashMap<String, usize>,
}

/// The names of a function while it is parsed.
#[derive(Debug)]
pub struct Scopes {
    scopes: Vec<Scope>,
    current: usize,
    /// Registers so far.
    pub registers: Vec<Register>,
    /// Variables so far.
    pub variables: Vec<Variable>,
    references: Vec<(usize, String, u32)>,
}

/// The components of a vector register.
pub const COMPONENTS: [&str; 4] = ["x", "y", "z", "w"];

impl Scopes {
    /// The scope of a function's parameters and body.
    pub fn new() -> Self {
        Self {
            scopes: vec![Scope::default()],
            current: 0,
            registers: Vec::new(),
            variables: Vec::new(),
            references: Vec::new(),
        }
    }

    /// Opens a nested scope.
    pub fn open(&mut self) {
        self.scopes.push(Scope { parent: self.current, ..Scope::default() });
        self.current = self.scopes.len() - 1;
    }

    /// Closes the innermost scope; false at the function's own.
    pub fn close(&mut self) -> bool {
        let inner = self.current;
        self.current = self.scopes[inner].parent;
        inner != 0
    }

    fn register(&mut self, name: String, ty: Type) -> u32 {
        self.registers.push(Register { name, ty });
        self.registers.len() as u32 - 1
    }

    /// Declares a register.
    pub fn declare_register(&mut self, name: &str, ty: Type) -> u32 {
        let id = self.register(name.to_string(), ty);
        self.scopes[self.current].names.insert(name.to_string(), Binding::Reg(id));
        id
    }

    /// Declares a vector register of `width` components.
    pub fn declare_vector(&mut self, name: &str, ty: Type, width: usize) {
        let ids: Vec<u32> = (0..width).map(|i| self.register(format!("{name}.{}", COMPONENTS[i]), ty)).collect();
        self.scopes[self.current].names.insert(name.to_string(), Binding::Vector(ids));
    }

    /// Declares `name<count>`.
    pub fn declare_family(&mut self, name: &str, count: u32, ty: Type) {
        self.scopes[self.current].families.push((name.to_string(), count, ty));
    }

    /// Declares a variable; its index.
    pub fn declare_variable(&mut self, variable: Variable) -> u32 {
        let id = self.variables.len() as u32;
        self.scopes[self.current].names.insert(variable.name.clone(), Binding::Var(id));
        self.variables.push(variable);
        id
    }

    /// What a name stands for, innermost scope first; registers of families come into being here.
    pub fn resolve(&mut self, name: &str) -> Option<Binding> {
        let stem = name.trim_end_matches(|c: char| c.is_ascii_digit());
        let number = name[stem.len()..].parse::<u32>().ok();
        let mut at = self.current;
        loop {
            if let Some(found) = self.scopes[at].names.get(name) {
                return Some(found.clone());
            }
            if let Some(n) = number {
                // The family's own name may end in digits: compare with every split that the digits allow.
                let family = self.scopes[at].families.iter().find(|(prefix, count, _)| {
                    name.strip_prefix(prefix.as_str()).is_some_and(|rest| {
                        if rest.len() == name.len() - stem.len() {
                            n < *count
                        } else {
                            rest.parse::<u32>().is_ok_and(|n| n < *count)
                        }
                    })
                });
                if let Some(&(_, _, ty)) = family {
                    let id = self.register(name.to_string(), ty);
                    self.scopes[at].names.insert(name.to_string(), Binding::Reg(id));
                    return Some(Binding::Reg(id));
                }
            }
            if at == 0 {
                return None;
            }
            at = self.scopes[at].parent;
        }
    }

    /// Defines a label before instruction `index`; false if the scope has it already.
    pub fn define_label(&mut self, name: &str, index: usize) -> bool {
        self.scopes[self.current].labels.insert(name.to_string(), index).is_none()
    }

    /// A reference to a label that may be defined later; its number in [`Scopes::resolve_labels`].
    pub fn refer_label(&mut self, name: &str, line: u32) -> u32 {
        self.references.push((self.current, name.to_string(), line));
        self.references.len() as u32 - 1
    }

    /// The instruction index of every reference.
    pub fn resolve_labels(&self) -> Result<Vec<usize>, Error> {
        let find = |(scope, name, line): &(usize, String, u32)| {
            let mut at = *scope;
            loop {
                if let Some(&index) = self.scopes[at].labels.get(name) {
                    return Ok(index);
                }
                if at == 0 {
                    return Err(Error::new(*line, format!("`{name}` is neither declared nor a label")));
                }
                at = self.scopes[at].parent;
            }
        };
        self.references.iter().map(find).collect()
    }
}

impl Default for Scopes {
    fn default() -> Self {
        Self::new()
    }
}
