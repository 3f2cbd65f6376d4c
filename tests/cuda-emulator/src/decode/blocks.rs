//! Basic blocks and their order.
//!
//! The machine runs the group of lanes at the lowest instruction first, so lanes that parted meet again if code that can
//! reach a point lies before it and every loop lies together. That is a weak topological order (Bourdoncle, "Efficient
//! chaotic iteration strategies with widenings"): components of the graph in topological order, each loop with its head
//! first and its body ordered the same way.

use crate::ptx::Error;
use crate::ptx::ast::{Function, Instruction, Operand};

/// Deepest nest of loops that is ordered; deeper ones keep the order of the text.
const MAX_NEST: u32 = 100;

/// A basic block.
#[derive(Debug, Clone, Default)]
pub struct Block {
    /// First instruction.
    pub first: usize,
    /// One past the last.
    pub end: usize,
    /// Blocks it may go to.
    pub successors: Vec<usize>,
    /// The block after it in the text, if control can fall through.
    pub falls_to: Option<usize>,
}

/// A function's blocks in the order of the text, and the order to lay them out in.
#[derive(Debug, Clone, Default)]
pub struct Blocks {
    /// The blocks.
    pub blocks: Vec<Block>,
    /// Their order; unreachable ones come last.
    pub order: Vec<usize>,
}

/// Labels that an instruction may jump to.
pub fn targets<'f>(function: &'f Function, instruction: &'f Instruction) -> Result<Vec<u32>, Error> {
    let bad = || Error::new(instruction.line, format!("`{}` needs a label of this function", instruction.mnemonic()));
    match (instruction.opcode[0].as_str(), instruction.operands.as_slice()) {
        ("bra", [Operand::Label(label)]) => Ok(vec![*label]),
        ("brx", [_, Operand::Label(table)]) => {
            let index = function.labels.get(*table as usize).copied().unwrap_or(0);
            let table = usize::MAX.wrapping_sub(1).wrapping_sub(index);
            function.branch_targets.get(table).map(|(_, labels)| labels.clone()).ok_or_else(bad)
        }
        ("bra" | "brx", _) => Err(bad()),
        _ => Ok(vec![]),
    }
}

fn ends_block(instruction: &Instruction) -> bool {
    matches!(instruction.opcode[0].as_str(), "bra" | "brx") || !falls_through(instruction)
}

fn falls_through(instruction: &Instruction) -> bool {
    instruction.guard.is_some() || !matches!(instruction.opcode[0].as_str(), "bra" | "brx" | "ret" | "exit" | "trap")
}

impl Blocks {
    /// Splits a function's body.
    pub fn of(function: &Function, body: &[Instruction]) -> Result<Self, Error> {
        let mut leader = vec![false; body.len() + 1];
        leader[0] = true;
        for (i, instruction) in body.iter().enumerate() {
            if ends_block(instruction) {
                leader[i + 1] = true;
            }
            for label in targets(function, instruction)? {
                let at = function.labels.get(label as usize).copied().unwrap_or(usize::MAX);
                if at > body.len() {
                    return Err(Error::new(instruction.line, "a branch to something that is no code label"));
                }
                leader[at] = true;
            }
        }
        let starts: Vec<usize> = (0..body.len()).filter(|i| leader[*i]).collect();
        // A label at the very end is a block of its own without instructions.
        let mut blocks: Vec<Block> = starts
            .iter()
            .enumerate()
            .map(|(n, &first)| Block {
                first,
                end: starts.get(n + 1).copied().unwrap_or(body.len()),
                ..Block::default()
            })
            .collect();
        blocks.push(Block { first: body.len(), end: body.len(), ..Block::default() });
        let block_of = |at: usize| blocks.partition_point(|b| b.first < at).min(blocks.len() - 1);
        let mut edges = vec![Vec::new(); blocks.len()];
        let mut falls = vec![None; blocks.len()];
        for (n, block) in blocks.iter().enumerate() {
            if block.end > block.first {
                let last = &body[block.end - 1];
                for label in targets(function, last)? {
                    edges[n].push(block_of(function.labels[label as usize]));
                }
                if falls_through(last) {
                    falls[n] = Some(n + 1);
                    edges[n].push(n + 1);
                }
            }
        }
        for (block, (successors, fall)) in blocks.iter_mut().zip(edges.into_iter().zip(falls)) {
            block.successors = successors;
            block.falls_to = fall;
        }
        let mut all = Blocks { blocks, order: vec![] };
        all.sort();
        Ok(all)
    }

    fn sort(&mut self) {
        let n = self.blocks.len();
        let mut order = Vec::with_capacity(n);
        let members: Vec<usize> = (0..n).collect();
        self.place(&members, &[0], None, 0, &mut order);
        let mut placed = vec![false; n];
        order.iter().for_each(|b| placed[*b] = true);
        order.extend((0..n).filter(|b| !placed[*b]));
        self.order = order;
    }

    /// Appends the blocks of `members` reachable from `entries`, without edges to `removed`.
    fn place(&self, members: &[usize], entries: &[usize], removed: Option<usize>, depth: u32, order: &mut Vec<usize>) {
        let mut inside = vec![false; self.blocks.len()];
        members.iter().for_each(|b| inside[*b] = true);
        if let Some(head) = removed {
            inside[head] = false;
        }
        let mut components = self.components(entries, &inside);
        components.reverse();
        for mut component in components {
            component.sort_unstable();
            let head = component[0];
            let is_loop = component.len() > 1 || self.blocks[head].successors.contains(&head);
            if !is_loop || depth >= MAX_NEST {
                order.extend(component);
                continue;
            }
            // The head is where control enters: a block with a predecessor outside, the first in the text if several.
            let enters = |b: &usize| {
                entries.contains(b)
                    || (0..self.blocks.len())
                        .any(|p| component.binary_search(&p).is_err() && self.blocks[p].successors.contains(b))
            };
            let head =
                if component.len() <= 64 { component.iter().copied().find(enters).unwrap_or(head) } else { head };
            order.push(head);
            self.place(&component, &self.blocks[head].successors.clone(), Some(head), depth + 1, order);
        }
    }

    /// Strongly connected components in reverse topological order (Tarjan, without recursion).
    fn components(&self, entries: &[usize], inside: &[bool]) -> Vec<Vec<usize>> {
        let n = self.blocks.len();
        let (mut index, mut low) = (vec![usize::MAX; n], vec![0; n]);
        let (mut on_stack, mut stack, mut found) = (vec![false; n], Vec::new(), Vec::new());
        let mut counter = 0;
        for &entry in entries {
            if !inside[entry] || index[entry] != usize::MAX {
                continue;
            }
            let mut work = vec![(entry, 0)];
            while let Some(top) = work.last_mut() {
                let (node, next) = *top;
                if next == 0 {
                    index[node] = counter;
                    low[node] = counter;
                    counter += 1;
                    stack.push(node);
                    on_stack[node] = true;
                }
                top.1 += 1;
                if let Some(&successor) = self.blocks[node].successors.get(next) {
                    if !inside[successor] {
                        continue;
                    }
                    if index[successor] == usize::MAX {
                        work.push((successor, 0));
                    } else if on_stack[successor] {
                        low[node] = low[node].min(index[successor]);
                    }
                    continue;
                }
                work.pop();
                if let Some(&(parent, _)) = work.last() {
                    low[parent] = low[parent].min(low[node]);
                }
                if low[node] == index[node] {
                    let at = stack.iter().rposition(|b| *b == node).unwrap_or(0);
                    let component = stack.split_off(at);
                    component.iter().for_each(|b| on_stack[*b] = false);
                    found.push(component);
                }
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order_of(text: &str) -> Vec<usize> {
        let module = crate::ptx::parse(&format!(
            ".version 7.0\n.target sm_80\n.address_size 64\n.entry k() {{\n.reg .pred p;\n{text}\n}}"
        ))
        .unwrap();
        let function = &module.functions[0];
        Blocks::of(function, function.body.as_ref().unwrap()).unwrap().order
    }

    #[test]
    fn a_slow_path_at_the_end_moves_before_its_join() {
        // 0: branch to SLOW(3); 1: JOIN; ...; SLOW jumps back to JOIN.
        let order = order_of("@p bra SLOW;\nJOIN: ret;\nSLOW: bra JOIN;");
        let at = |b: usize| order.iter().position(|x| *x == b).unwrap();
        assert!(at(2) < at(1), "{order:?}");
    }

    #[test]
    fn a_loop_stays_together_before_its_exit() {
        let order = order_of("bra HEAD;\nOUT: ret;\nHEAD: @p bra OUT;\nBODY: bra HEAD;");
        let at = |b: usize| order.iter().position(|x| *x == b).unwrap();
        assert!(at(0) < at(2) && at(2) < at(3) && at(3) < at(1), "{order:?}");
    }
}
