//! A loaded module: its kernels decoded, its variables in device memory.

use std::collections::HashMap;
use std::sync::Arc;

use crate::decode;
use crate::memory::{Allocation, Memory, layout};
use crate::program::Program;
use crate::ptx;
use crate::ptx::types::Space;

/// Why a module was not loaded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The text is refused.
    #[error(transparent)]
    Ptx(#[from] ptx::Error),
    /// A variable does not fit into device memory.
    #[error("out of device memory for variable `{0}`")]
    Memory(String),
}

/// A module on the device.
#[derive(Debug)]
pub struct Module {
    /// `.version`.
    pub version: (u32, u32),
    /// `.target sm_NN`.
    pub target_sm: u32,
    /// The letter after it.
    pub target_suffix: Option<char>,
    kernels: HashMap<String, Arc<Program>>,
    variables: HashMap<String, Arc<Allocation>>,
}

impl Module {
    /// Parses PTX text, decodes all its kernels and places its variables in `memory`.
    pub fn parse(text: &str, memory: &Memory) -> Result<Self, Error> {
        let tree = ptx::parse(text)?;
        let mut module = Module {
            version: tree.version,
            target_sm: tree.target_sm,
            target_suffix: tree.target_suffix,
            kernels: HashMap::new(),
            variables: HashMap::new(),
        };
        let result = module.fill(&tree, memory);
        if result.is_err() {
            module.unload(memory);
        }
        result.map(|()| module)
    }

    fn fill(&mut self, tree: &ptx::Module, memory: &Memory) -> Result<(), Error> {
        let inner = tree.functions.iter().flat_map(|f| &f.variables);
        let placed = tree
            .variables
            .iter()
            .chain(inner)
            .filter(|v| matches!(v.space, Space::Global | Space::Const) && !v.is_extern);
        let placed: Vec<_> = placed.collect();
        let mut addresses = HashMap::new();
        for v in &placed {
            let name = if v.name.is_empty() { "unnamed" } else { &v.name };
            let allocation = memory
                .allocate(v.bytes.max(1), name, v.space == Space::Const)
                .ok_or_else(|| Error::Memory(v.name.clone()))?;
            addresses.insert(v.name.clone(), allocation.base);
            self.variables.insert(v.name.clone(), allocation);
        }
        for v in &placed {
            let allocation = &self.variables[&v.name];
            let mut bytes = v.init.clone();
            bytes.resize(v.bytes.max(1) as usize, 0);
            for r in &v.relocations {
                let function = tree.functions.iter().position(|f| f.name == r.symbol);
                let address = match (addresses.get(&r.symbol), function) {
                    (Some(address), _) => *address,
                    (None, Some(index)) => layout::FUNCTION + 16 * index as u64,
                    (None, None) => {
                        let message = format!("`{}` in the initial value of `{}` is not defined", r.symbol, v.name);
                        return Err(ptx::Error::new(0, message).into());
                    }
                };
                let value = address.wrapping_add(r.addend as u64).to_le_bytes();
                let (at, n) = (r.offset as usize, (r.bytes as usize).min(8));
                if let Some(place) = bytes.get_mut(at..at + n) {
                    place.copy_from_slice(&value[..n]);
                }
            }
            // SAFETY: the allocation has at least as many bytes.
            unsafe { allocation.host(allocation.base).copy_from(bytes.as_ptr(), bytes.len()) };
            allocation.mark_written(allocation.base, allocation.bytes);
        }
        for function in tree.functions.iter().filter(|f| f.is_entry && f.body.is_some()) {
            let program = decode::kernel(tree, &function.name, &addresses)?;
            self.kernels.insert(function.name.clone(), Arc::new(program));
        }
        Ok(())
    }

    /// A kernel by name.
    pub fn kernel(&self, name: &str) -> Option<&Arc<Program>> {
        self.kernels.get(name)
    }

    /// Names of the kernels, in alphabetical order.
    pub fn kernel_names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.kernels.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    /// A module variable's address and size.
    pub fn variable(&self, name: &str) -> Option<(u64, u64)> {
        self.variables.get(name).map(|a| (a.base, a.bytes))
    }

    /// Frees the variables.
    pub fn unload(&self, memory: &Memory) {
        for allocation in self.variables.values() {
            // Each is freed once: nobody else knows them as allocations of their own.
            let _ = memory.free(allocation.base);
        }
    }
}
