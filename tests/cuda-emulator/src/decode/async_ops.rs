//! `cp.async`, bulk copies, `mbarrier`.

use super::builder::Builder;
use crate::program::{Address, Bulk, BulkOp, Class, CopyAsync, Mbarrier, MbarrierOp, Op, Pred, Reg};
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
            coordinates: vec![],
            multicast: None,
        };
        let spaces: Vec<Space> = i.opcode[1..].iter().filter_map(|m| Space::parse(m)).collect();
        if i.has("commit_group") {
            bulk.op = BulkOp::Commit;
        } else if i.has("wait_group") {
            bulk.op = BulkOp::Wait(self.count(i, 0)?);
        } else if i.has("prefetch") {
            bulk.op = BulkOp::Prefetch;
        } else if i.has("tensor") || i.has("reduce") || i.has("multicast::cluster") || i.has("cp_mask") {
            return Err(self.unknown(i));
        } else {
            bulk.to = self.place(i, 0, Space::SharedCluster)?.0;
            bulk.from = self.place(i, 1, Space::Global)?.0;
            bulk.bytes = self.source_at(i, 2, Type::U32)?;
            bulk.op = match spaces[..] {
                [Space::Shared | Space::SharedCluster, Space::Global] => BulkOp::ToShared,
                [Space::SharedCluster, Space::Shared] => BulkOp::ToCluster,
                [Space::Global, Space::Shared] => BulkOp::ToGlobal,
                _ => return Err(self.unknown(i)),
            };
            if bulk.op != BulkOp::ToGlobal {
                bulk.barrier = Some(self.place(i, 3, Space::SharedCluster)?.0);
            }
        }
        self.emit(Op::Bulk(Box::new(bulk)));
        Ok(Class::AsyncCopy)
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
