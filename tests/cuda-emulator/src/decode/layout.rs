//! Places of variables: local memory of functions, shared memory of the block, kernel parameters.

use std::collections::{HashMap, HashSet};

use crate::ptx::ast::{Function, Module, Operand, Variable};
use crate::ptx::types::Space;

/// Where a function's variable lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Offset in the kernel's parameter buffer.
    Param(u32),
    /// Offset in local memory.
    Local(u32),
    /// Offset in shared memory.
    Shared(u32),
    /// A device address (function-scope `.global` or `.const`).
    Global(u64),
}

/// Calls that a function makes.
#[derive(Debug, Default, Clone)]
pub struct Calls {
    /// Functions called by name.
    pub direct: Vec<String>,
    /// Whether it calls addresses.
    pub indirect: bool,
    /// Module symbols it mentions.
    pub symbols: HashSet<String>,
}

fn collect(operand: &Operand, symbols: &mut HashSet<String>) {
    match operand {
        Operand::Symbol(name, _) => {
            symbols.insert(name.clone());
        }
        Operand::Memory(base, _) => collect(base, symbols),
        Operand::Pair(a, b) => {
            collect(a, symbols);
            collect(b, symbols);
        }
        Operand::Vector(all) | Operand::List(all) | Operand::MemoryParts(all) => {
            all.iter().for_each(|o| collect(o, symbols))
        }
        _ => {}
    }
}

/// What a function calls and mentions.
pub fn calls(function: &Function) -> Calls {
    let mut calls = Calls::default();
    for instruction in function.body.iter().flatten() {
        if instruction.opcode[0] == "call" {
            match instruction.operands.iter().find(|o| !matches!(o, Operand::List(_))) {
                Some(Operand::Symbol(name, _)) => calls.direct.push(name.clone()),
                Some(Operand::Reg(_)) => calls.indirect = true,
                _ => {}
            }
        }
        instruction.operands.iter().for_each(|o| collect(o, &mut calls.symbols));
    }
    calls
}

/// Whether a function asks where the shared memory lies that is reserved for the system.
pub fn mentions_reserved(function: &Function) -> bool {
    let reserved = |o: &Operand| matches!(o, Operand::Special(name) if name.starts_with("%reserved_smem_offset"));
    function.body.iter().flatten().any(|i| i.operands.iter().any(reserved))
}

/// Indices of the functions that a kernel may run, itself first; all device functions if any is called by address.
pub fn reachable(module: &Module, kernel: usize) -> Vec<usize> {
    let by_name: HashMap<&str, usize> =
        module.functions.iter().enumerate().map(|(i, f)| (f.name.as_str(), i)).collect();
    let mut found = vec![kernel];
    let mut at = 0;
    let mut all_added = false;
    while at < found.len() {
        let calls = calls(&module.functions[found[at]]);
        at += 1;
        let mut wanted: Vec<usize> = calls.direct.iter().filter_map(|n| by_name.get(n.as_str()).copied()).collect();
        if calls.indirect && !all_added {
            all_added = true;
            wanted.extend((0..module.functions.len()).filter(|i| !module.functions[*i].is_entry));
        }
        for index in wanted {
            if module.functions[index].body.is_some() && !found.contains(&index) {
                found.push(index);
            }
        }
    }
    found
}

/// Functions that may be called while they are active: those on a cycle of calls, and all if calls go by address.
pub fn recursive(module: &Module, functions: &[usize]) -> HashSet<usize> {
    let by_name: HashMap<&str, usize> = functions.iter().map(|i| (module.functions[*i].name.as_str(), *i)).collect();
    let edges: HashMap<usize, Vec<usize>> = functions
        .iter()
        .map(|&i| {
            let calls = calls(&module.functions[i]);
            let direct = calls.direct.iter().filter_map(|n| by_name.get(n.as_str()).copied());
            let any = functions.iter().copied().filter(|f| calls.indirect && !module.functions[*f].is_entry);
            (i, direct.chain(any).collect())
        })
        .collect();
    functions
        .iter()
        .copied()
        .filter(|start| {
            let (mut seen, mut work) = (HashSet::new(), edges[start].clone());
            while let Some(at) = work.pop() {
                if at == *start {
                    return true;
                }
                if seen.insert(at) {
                    work.extend(&edges[&at]);
                }
            }
            false
        })
        .collect()
}

/// Hands out aligned places one after the other.
#[derive(Debug, Default, Clone, Copy)]
pub struct Arena {
    /// Bytes handed out.
    pub used: u64,
}

impl Arena {
    /// A place for a variable.
    pub fn place(&mut self, bytes: u64, align: u32) -> u64 {
        let at = self.used.next_multiple_of(u64::from(align.max(1)));
        self.used = at + bytes;
        at
    }
}

/// The places of kernel parameters: offset and size.
pub fn params(params: &[Variable]) -> (Vec<(u32, u32)>, u32) {
    let mut arena = Arena::default();
    let places = params.iter().map(|p| (arena.place(p.bytes, p.align) as u32, p.bytes as u32)).collect();
    (places, arena.used as u32)
}

/// Whether a variable of a function lies in local memory.
pub fn is_local(function: &Function, index: usize, variable: &Variable) -> bool {
    match variable.space {
        Space::Local => true,
        Space::Param => !function.is_entry || index >= function.params.len(),
        _ => false,
    }
}
