//! `ld`, `st`, `atom`, `red`, fences and hints.

use super::builder::Builder;
use crate::program::{Address, Atomic, AtomicOp, Class, Load, Op, Order, Reg, Store};
use crate::ptx::Error;
use crate::ptx::ast::{Instruction, Operand};
use crate::ptx::types::{Space, Type};

impl<'m> Builder<'m> {
    /// An address with the space that is really meant: parameters of device functions live in local memory, and the base
    /// variable's own space wins over a generic access.
    pub fn place(&mut self, i: &Instruction, n: usize, space: Space) -> Result<(Address, Space), Error> {
        let operand = self.operand_at(i, n)?;
        let (mut address, base) = self.memory(operand)?;
        let space = match (space, base) {
            (Space::Param, Some(Space::Local)) => Space::Local,
            (Space::Param, None) if !self.function.is_entry => Space::Local,
            (Space::Generic, Some(Space::Local | Space::Shared | Space::Param)) => base.unwrap_or(space),
            (Space::Const, _) => Space::Const,
            (space, _) => space,
        };
        if matches!(space, Space::Global | Space::Generic) && address.base.is_some() && !address.wide {
            // 32-bit addresses of global memory: zero-extended.
            let Operand::Memory(inner, _) = operand else { return Err(self.unknown(i)) };
            address.base = Some(self.source(inner, Type::U64)?);
            address.wide = true;
        }
        Ok((address, space))
    }

    fn order(i: &Instruction) -> Order {
        let strong = ["volatile", "relaxed", "acquire", "release", "mmio"].iter().any(|m| i.has(m));
        if strong { Order::Strong } else { Order::Weak }
    }

    fn vector_width(i: &Instruction) -> usize {
        [("v2", 2), ("v4", 4), ("v8", 8)].iter().find(|(m, _)| i.has(m)).map_or(1, |(_, n)| *n)
    }

    /// `ld`.
    pub fn load(&mut self, i: &'m Instruction) -> Result<Class, Error> {
        let ty = *i.types().last().ok_or_else(|| self.unknown(i))?;
        let (address, space) = self.place(i, 1, i.space())?;
        let width = Self::vector_width(i);
        let parts: Vec<&Operand> = match self.operand_at(i, 0)? {
            Operand::Vector(parts) if parts.len() == width || width == 1 => parts.iter().collect(),
            one if width == 1 => vec![one],
            _ => return Err(self.unknown(i)),
        };
        let mut dest = Vec::new();
        for part in parts {
            dest.push(match part {
                Operand::Sink => None,
                Operand::Reg(id) if self.type_of(*id) != Type::Pred => {
                    if ty.bytes() > self.type_of(*id).bytes() {
                        return Err(self.error("the destination register is too narrow"));
                    }
                    Some((self.slot(*id), self.is_wide(*id)))
                }
                _ => return Err(self.unknown(i)),
            });
        }
        let order = Self::order(i);
        self.program.order_matters |= order == Order::Strong && space != Space::Shared;
        self.emit(Op::Load(Box::new(Load { address, space, size: ty.bytes(), signed: ty.is_signed(), dest, order })));
        Ok(match space {
            Space::Shared | Space::SharedCluster => Class::LoadShared,
            Space::Global | Space::Generic => Class::LoadGlobal,
            _ => Class::LoadStoreOther,
        })
    }

    /// `st`.
    pub fn store(&mut self, i: &'m Instruction) -> Result<Class, Error> {
        if i.has("async") || i.has("bulk") {
            return Err(self.unknown(i));
        }
        let ty = *i.types().last().ok_or_else(|| self.unknown(i))?;
        let (address, space) = self.place(i, 0, i.space())?;
        let width = Self::vector_width(i);
        let parts: Vec<&Operand> = match self.operand_at(i, 1)? {
            Operand::Vector(parts) if parts.len() == width || width == 1 => parts.iter().collect(),
            one if width == 1 => vec![one],
            _ => return Err(self.unknown(i)),
        };
        let mut source = Vec::new();
        for part in parts {
            source.push((self.source(part, ty)?, ty.bytes() > 4));
        }
        let order = Self::order(i);
        self.program.order_matters |= order == Order::Strong && space != Space::Shared;
        self.emit(Op::Store(Box::new(Store { address, space, size: ty.bytes(), source, order })));
        Ok(match space {
            Space::Shared | Space::SharedCluster => Class::StoreShared,
            Space::Global | Space::Generic => Class::StoreGlobal,
            _ => Class::LoadStoreOther,
        })
    }

    /// `atom` and `red`.
    pub fn atomic(&mut self, i: &'m Instruction) -> Result<Class, Error> {
        if i.has("async") {
            return Err(self.unknown(i));
        }
        let returns = i.opcode[0] == "atom";
        let ty = *i.types().last().ok_or_else(|| self.unknown(i))?;
        let op = i.opcode[1..].iter().find_map(|m| {
            Some(match m.as_str() {
                "add" => AtomicOp::Add,
                "min" => AtomicOp::Min,
                "max" => AtomicOp::Max,
                "and" => AtomicOp::And,
                "or" => AtomicOp::Or,
                "xor" => AtomicOp::Xor,
                "exch" => AtomicOp::Exchange,
                "cas" => AtomicOp::CompareAndSwap,
                "inc" => AtomicOp::Increment,
                "dec" => AtomicOp::Decrement,
                _ => return None,
            })
        });
        let op = op.ok_or_else(|| self.unknown(i))?;
        let arithmetic = matches!(op, AtomicOp::Add | AtomicOp::Min | AtomicOp::Max);
        let fits = match ty {
            Type::B128 | Type::Pred => false,
            Type::F16 | Type::BF16 | Type::F16x2 | Type::BF16x2 | Type::F32 | Type::F64 => {
                arithmetic || op == AtomicOp::Exchange
            }
            _ if ty.bytes() == 2 => op == AtomicOp::CompareAndSwap,
            _ => ty.bytes() >= 4,
        };
        if !fits {
            return Err(self.unknown(i));
        }
        let at = usize::from(returns);
        let (address, space) = self.place(i, at, i.space())?;
        // Release before, acquire after: with a scope beyond the block this block synchronises with others.
        if i.has("acq_rel") || i.has("acquire") || i.has("release") {
            let beyond_block = !i.has("cta") && space != Space::Shared;
            self.emit(Op::Fence { beyond_block, proxy: false });
        }
        let operands: Vec<&Operand> = match self.operand_at(i, at + 1)? {
            Operand::Vector(parts) => parts.iter().collect(),
            one => vec![one],
        };
        let mut b = Vec::new();
        for operand in operands {
            b.push(self.source(operand, ty)?);
        }
        let c = if op == AtomicOp::CompareAndSwap { self.source_at(i, at + 2, ty)? } else { Reg::NONE };
        let mut dest = Vec::new();
        let mut finish = Vec::new();
        if returns {
            let to: Vec<&Operand> = match self.operand_at(i, 0)? {
                Operand::Vector(parts) => parts.iter().collect(),
                one => vec![one],
            };
            for operand in to {
                let d = self.dest(operand, ty)?;
                dest.push(d.reg);
                finish.push(d);
            }
        }
        if space != Space::Shared {
            self.program.order_matters |=
                returns || ty.is_float() || matches!(op, AtomicOp::Exchange | AtomicOp::CompareAndSwap);
        }
        self.emit(Op::Atomic(Box::new(Atomic { address, space, op, ty, dest, b, c })));
        for d in finish {
            self.finish(d)?;
        }
        Ok(Class::Atomic)
    }

    /// `fence`, `membar`.
    pub fn fence(&mut self, i: &'m Instruction) -> Result<Class, Error> {
        let known = [
            "sc",
            "acq_rel",
            "acquire",
            "release",
            "cta",
            "gl",
            "gpu",
            "sys",
            "cluster",
            "proxy",
            "mbarrier_init",
            "alias",
            "async",
        ];
        if !i.opcode[1..].iter().all(|m| {
            known.contains(&m.as_str())
                || m.starts_with("sync_restrict")
                || Space::parse(m).is_some()
                || m.contains("proxy")
                || m.contains("async")
                || m == "tensormap::generic"
        }) {
            return Err(self.unknown(i));
        }
        let beyond_block = ["gl", "gpu", "sys"].iter().any(|m| i.has(m));
        self.program.order_matters |= beyond_block;
        let proxy = i.has("proxy") && i.opcode[1..].iter().any(|m| m.starts_with("async"));
        self.emit(Op::Fence { beyond_block, proxy });
        Ok(Class::Barrier)
    }

    /// Instructions that change nothing a program can see.
    pub fn hint(&mut self, i: &'m Instruction) -> Result<Class, Error> {
        if i.opcode[0] == "createpolicy" {
            let d = self.dest_at(i, 0, Type::B64)?;
            let zero = self.constant(0, true);
            self.copy(d.reg, zero, true);
        }
        Ok(Class::Control)
    }
}
