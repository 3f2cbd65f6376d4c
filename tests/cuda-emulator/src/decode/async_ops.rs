//! `cp.async`, bulk copies, `mbarrier`.

use super::builder::Builder;
use crate::program::{Address, AtomicOp, Bulk, BulkOp, Class, CopyAsync, Mbarrier, MbarrierOp, Op, Pred, Reg};
use crate::ptx::Error;
use crate::ptx::ast::{Instruction, Operand};
use crate::ptx::types::{Space, Type};

impl<'m> Builder<'m> {
    fn count(&self, i: &Instruction, n: usize) -> Result<u32, Error> {
        match self.operand_at(i, n)? {
            Operand::Int(value) => u32::try_from(*value).map_err(|_| self.unknown(i)),
            _ => Err(self.unknown(i)),
        }
    }

    /// `cp.async.*`.
    pub fn copy_async(&mut self, i: &'m Instruction) -> Result<Class, Error> {
        if !i.has("async") {
            return Err(self.unknown(i));
        }
        if i.has("bulk") {
            return self.bulk(i);
        }
        if i.has("mbarrier") {
            let (address, space) = self.place(i, 0, i.space())?;
            let op = MbarrierOp::ArriveOnCopies { no_increment: i.has("noinc") };
            self.emit(Op::Mbarrier(Box::new(Mbarrier {
                op,
                address,
                space,
                dest: None,
                p: Pred::NONE,
                operand: None,
            })));
            return Ok(Class::AsyncCopy);
        }
        match i.opcode[2].as_str() {
            "commit_group" => self.emit(Op::CommitGroup),
            "wait_group" => {
                let n = self.count(i, 0)?;
                self.emit(Op::WaitGroup(n));
            }
            "wait_all" => self.emit(Op::WaitGroup(u32::MAX)),
            "ca" | "cg" => {
                let (to, _) = self.place(i, 0, Space::Shared)?;
                let (from, _) = self.place(i, 1, Space::Global)?;
                let bytes = self.count(i, 2)?;
                if !matches!(bytes, 4 | 8 | 16) || i.opcode[2] == "cg" && bytes != 16 {
                    return Err(self.error(format!("cp.async.{} of {bytes} bytes", i.opcode[2])));
                }
                // A predicate ignores the source; a number is the bytes read; a cache policy may follow.
                let (mut source_bytes, mut ignore) = (None, None);
                match i.operands.get(3) {
                    Some(operand @ (Operand::Reg(id) | Operand::NotReg(id))) if self.type_of(*id) == Type::Pred => {
                        ignore = Some(self.pred_source(operand)?);
                    }
                    Some(Operand::Reg(id)) if self.is_wide(*id) => {}
                    Some(operand) => source_bytes = Some(self.source(operand, Type::U32)?),
                    None => {}
                }
                self.emit(Op::CopyAsync(Box::new(CopyAsync { to, from, bytes, source_bytes, ignore })));
            }
            _ => return Err(self.unknown(i)),
        }
        Ok(Class::AsyncCopy)
    }

    fn bulk(&mut self, i: &'m Instruction) -> Result<Class, Error> {
        let none = Address { base: None, wide: true, offset: 0 };
        let mut bulk = Bulk {
            op: BulkOp::Commit,
            to: none,
            from: none,
            bytes: Reg::NONE,
            barrier: None,
            tensor: None,
            multicast: None,
            reduce: None,
        };
        let refused = ["im2col", "tile::gather4", "tile::scatter4", "cp_mask", "im2col::w", "im2col::w::128"];
        if refused.iter().any(|m| i.has(m)) {
            return Err(self.unknown(i));
        }
        let tensor = i.has("tensor");
        if i.has("commit_group") {
            bulk.op = BulkOp::Commit;
        } else if i.has("wait_group") {
            bulk.op = BulkOp::Wait(self.count(i, 0)?);
        } else if i.has("prefetch") {
            bulk.op = BulkOp::Prefetch;
        } else {
            let spaces: Vec<Space> = i.opcode[1..].iter().filter_map(|m| Space::parse(m)).collect();
            bulk.op = match spaces[..] {
                [Space::Shared | Space::SharedCluster, Space::Global] => BulkOp::ToShared,
                [Space::SharedCluster, Space::Shared] if !tensor => BulkOp::ToCluster,
                [Space::Global, Space::Shared] => BulkOp::ToGlobal,
                _ => return Err(self.unknown(i)),
            };
            // With a tensor map: to shared [place], [map], [barrier]; to global [map], [place].
            let store = bulk.op == BulkOp::ToGlobal;
            let mut next = 2;
            if tensor {
                bulk.to = self.place(i, usize::from(store), Space::SharedCluster)?.0;
                bulk.tensor = Some(self.tensor(i, usize::from(!store))?);
            } else {
                let destination = if store { Space::Global } else { Space::SharedCluster };
                bulk.to = self.place(i, 0, destination)?.0;
                let source = if bulk.op == BulkOp::ToShared { Space::Global } else { Space::Shared };
                bulk.from = self.place(i, 1, source)?.0;
                bulk.bytes = self.source_at(i, 2, Type::U32)?;
                next = 3;
            }
            if !store {
                bulk.barrier = Some(self.place(i, next, Space::SharedCluster)?.0);
                next += 1;
            }
            if i.has("multicast::cluster") {
                bulk.multicast = Some(self.source_at(i, next, Type::U16)?);
            }
            if i.opcode[1] == "reduce" {
                let op = [
                    ("add", AtomicOp::Add),
                    ("min", AtomicOp::Min),
                    ("max", AtomicOp::Max),
                    ("and", AtomicOp::And),
                    ("or", AtomicOp::Or),
                    ("xor", AtomicOp::Xor),
                    ("inc", AtomicOp::Increment),
                    ("dec", AtomicOp::Decrement),
                ];
                let op = op.iter().find(|(m, _)| i.has(m)).ok_or_else(|| self.unknown(i))?.1;
                let ty = i.types().last().copied();
                if !store || tensor == ty.is_some() || ty.is_some_and(|t| t.bytes() < 2 || t.bytes() > 8) {
                    return Err(self.unknown(i));
                }
                bulk.reduce = Some((op, ty));
                self.program.order_matters = true;
            }
        }
        self.emit(Op::Bulk(Box::new(bulk)));
        Ok(Class::AsyncCopy)
    }

    /// `[map, {coordinates}]`, as many of them as the instruction has dimensions.
    fn tensor(&mut self, i: &'m Instruction, n: usize) -> Result<(Address, Space, Vec<Reg>), Error> {
        let Operand::MemoryParts(parts) = self.operand_at(i, n)? else { return Err(self.unknown(i)) };
        let [map, coordinates] = &parts[..] else { return Err(self.unknown(i)) };
        let (address, space) = self.memory(&Operand::Memory(Box::new(map.clone()), 0))?;
        let coordinates: Vec<&Operand> = match coordinates {
            Operand::Vector(all) => all.iter().collect(),
            one => vec![one],
        };
        let rank = (1..=5).find(|d| i.has(&format!("{d}d"))).ok_or_else(|| self.unknown(i))?;
        if coordinates.len() != rank {
            return Err(self.error(format!("{} coordinates where `{rank}d` needs {rank}", coordinates.len())));
        }
        let mut registers = Vec::new();
        for coordinate in coordinates {
            registers.push(self.source(coordinate, Type::S32)?);
        }
        Ok((address, space.unwrap_or(Space::Generic), registers))
    }

    /// `mbarrier.*`.
    pub fn mbarrier(&mut self, i: &'m Instruction) -> Result<Class, Error> {
        let name = i.opcode.get(1).map_or("", String::as_str);
        let u32s = Type::U32;
        let spaced = |b: &mut Self, n: usize| b.place(i, n, i.space());
        let none = Address { base: None, wide: true, offset: 0 };
        let mut op = Mbarrier {
            op: MbarrierOp::Init,
            address: none,
            space: Space::Shared,
            dest: None,
            p: Pred::NONE,
            operand: None,
        };
        match name {
            "init" => {
                (op.address, op.space) = spaced(self, 0)?;
                op.operand = Some(self.source_at(i, 1, u32s)?);
            }
            "inval" => {
                (op.address, op.space) = spaced(self, 0)?;
                op.op = MbarrierOp::Invalidate;
            }
            "arrive" | "arrive_drop" => {
                let expect_bytes = i.has("expect_tx");
                op.op = MbarrierOp::Arrive { drop: name == "arrive_drop", expect_bytes };
                // The state is optional: `mbarrier.arrive.b64 _, [a]` or without it for remote barriers.
                let at = usize::from(!matches!(i.operands.first(), Some(Operand::Memory(..))));
                if at == 1 {
                    let d = self.dest_at(i, 0, Type::B64)?;
                    op.dest = Some(d.reg);
                }
                (op.address, op.space) = spaced(self, at)?;
                if i.operands.len() > at + 1 {
                    op.operand = Some(self.source_at(i, at + 1, u32s)?);
                }
            }
            "expect_tx" | "complete_tx" => {
                op.op = if name == "expect_tx" { MbarrierOp::ExpectBytes } else { MbarrierOp::CompleteBytes };
                (op.address, op.space) = spaced(self, 0)?;
                op.operand = Some(self.source_at(i, 1, u32s)?);
            }
            "test_wait" | "try_wait" => {
                let parity = i.has("parity");
                op.op = MbarrierOp::Test { parity };
                let to = self.operand_at(i, 0)?;
                op.p = self.pred_dest(to)?;
                (op.address, op.space) = spaced(self, 1)?;
                op.operand = Some(self.source_at(i, 2, if parity { u32s } else { Type::B64 })?);
            }
            "pending_count" => {
                op.op = MbarrierOp::PendingCount;
                op.operand = Some(self.source_at(i, 1, Type::B64)?);
                op.dest = Some(self.dest_at(i, 0, u32s)?.reg);
            }
            _ => return Err(self.unknown(i)),
        }
        self.emit(Op::Mbarrier(Box::new(op)));
        Ok(Class::Barrier)
    }
}
