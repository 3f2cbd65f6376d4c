//! Gives every variable of a kernel and its functions its place in shared and local memory.

use super::builder::Builder;
use super::layout::{self, Arena, Place};
use crate::program::RESERVED_SHARED;
use crate::ptx::Error;
use crate::ptx::types::Space;

/// Largest static shared memory and local memory that decode accepts, bytes.
pub const MAX_STATIC: u64 = 1 << 24;

impl Builder<'_> {
    pub(super) fn place_shared(&mut self, functions: &[usize]) -> Result<(), Error> {
        let mut arena = Arena::default();
        if functions.iter().any(|i| layout::mentions_reserved(&self.module.functions[*i])) {
            let at = arena.place(u64::from(RESERVED_SHARED), 16);
            self.program.shared_names.push((at as u32, RESERVED_SHARED, "reserved".to_string()));
            self.program.reserved_shared = RESERVED_SHARED;
        }
        let mut dynamic: Vec<(String, u32)> = Vec::new();
        for &index in functions {
            let function = &self.module.functions[index];
            for name in &layout::calls(function).symbols {
                let Some(v) = self.module.variables.iter().find(|v| v.name == *name && v.space == Space::Shared) else {
                    continue;
                };
                if v.is_extern || v.bytes == 0 {
                    dynamic.push((v.name.clone(), v.align));
                }
            }
        }
        // In the order of the module, so that offsets do not depend on hashing.
        let mentioned: std::collections::HashSet<String> =
            functions.iter().flat_map(|i| layout::calls(&self.module.functions[*i]).symbols).collect();
        for v in &self.module.variables {
            if v.space == Space::Shared && mentioned.contains(&v.name) && !v.is_extern && v.bytes > 0 {
                let at = arena.place(v.bytes, v.align);
                self.program.shared_names.push((at as u32, v.bytes as u32, v.name.clone()));
                self.shared.insert(v.name.clone(), at);
            }
        }
        for &index in functions {
            for (n, v) in self.module.functions[index].variables.iter().enumerate() {
                if v.space == Space::Shared && v.bytes > 0 {
                    let at = arena.place(v.bytes, v.align);
                    self.program.shared_names.push((at as u32, v.bytes as u32, v.name.clone()));
                    self.shared.insert(format!("{index}:{n}"), at);
                }
            }
        }
        if arena.used > MAX_STATIC {
            return Err(Error::new(0, format!("static shared memory of {} bytes is too much", arena.used)));
        }
        let align = dynamic.iter().map(|(_, a)| *a).max().unwrap_or(1).max(16);
        let total = if dynamic.is_empty() { arena.used } else { arena.used.next_multiple_of(u64::from(align)) };
        for (name, _) in dynamic {
            self.shared.insert(name, total);
        }
        self.program.shared_bytes = total as u32;
        Ok(())
    }

    pub(super) fn place_local(&mut self, index: usize, arena: &mut Arena) -> Result<Vec<Place>, Error> {
        let function = &self.module.functions[index];
        let mut places = Vec::new();
        let start = arena.used.next_multiple_of(16);
        arena.used = start;
        let is_return = |name: &str| function.returns.iter().any(|r| r.name == name);
        for (n, v) in function.variables.iter().enumerate() {
            places.push(match v.space {
                Space::Param if function.is_entry && n < self.program.params.len() => {
                    Place::Param(self.program.params[n].0)
                }
                Space::Shared => Place::Shared(
                    self.shared.get(&format!("{index}:{n}")).copied().unwrap_or(u64::from(self.program.shared_bytes))
                        as u32,
                ),
                Space::Global | Space::Const => Place::Global(self.addresses.get(&v.name).copied().unwrap_or(0)),
                _ if is_return(&v.name) => Place::Local(0),
                _ => Place::Local(arena.place(v.bytes, v.align.max(8)) as u32),
            });
        }
        let end = arena.used;
        for (n, v) in function.variables.iter().enumerate() {
            if v.space == Space::Param && is_return(&v.name) && !function.is_entry {
                places[n] = Place::Local(arena.place(v.bytes, v.align.max(8)) as u32);
            }
        }
        let place_of = |name: &str| {
            let n = function.variables.iter().position(|v| v.name == name);
            match n.map(|n| places[n]) {
                Some(Place::Local(at)) => Some(at),
                _ => None,
            }
        };
        let mut ranges = |variables: &[crate::ptx::Variable]| -> Vec<(u32, u32)> {
            variables
                .iter()
                .map(|v| (place_of(&v.name).unwrap_or_else(|| arena.place(v.bytes, 8) as u32), v.bytes as u32))
                .collect()
        };
        if !function.is_entry {
            let (params, returns) = (ranges(&function.params), ranges(&function.returns));
            let info = &mut self.program.functions[index];
            info.params = params;
            info.returns = returns;
        }
        self.program.functions[index].name = function.name.clone();
        self.program.functions[index].local = (start as u32, (end - start) as u32);
        Ok(places)
    }
}
