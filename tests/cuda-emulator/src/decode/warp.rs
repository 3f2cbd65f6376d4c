//! Barriers, warp collectives, matrix instructions.

use super::builder::Builder;
use crate::program::{
    Barrier, BarrierOp, Class, Matrix, Mma, Op, Pred, ReduceOp, Reg, ShuffleMode, VoteMode, WarpKind, WarpOp,
};
use crate::ptx::Error;
use crate::ptx::ast::{Instruction, Operand};
use crate::ptx::types::{Space, Type};

impl<'m> Builder<'m> {
    /// `bar.*`, `barrier.*`.
    pub fn barrier(&mut self, i: &'m Instruction) -> Result<Class, Error> {
        if i.has("warp") {
            let members = Some(self.source_at(i, 0, Type::U32)?);
            self.emit(Op::Warp(Box::new(WarpOp { kind: WarpKind::Sync, members })));
            return Ok(Class::Barrier);
        }
        if i.has("cluster") {
            let (arrive, wait) = (i.has("arrive"), i.has("wait"));
            if !arrive && !wait {
                return Err(self.unknown(i));
            }
            self.emit(Op::ClusterBarrier { arrive, wait, relaxed: i.has("relaxed") });
            return Ok(Class::Barrier);
        }
        let aligned = i.opcode[0] == "bar" || i.has("aligned");
        let reduce = i.has("red");
        let op = if i.has("sync") {
            BarrierOp::Sync
        } else if i.has("arrive") {
            BarrierOp::Arrive
        } else if reduce && i.has("popc") {
            BarrierOp::Popc
        } else if reduce && i.has("and") {
            BarrierOp::And
        } else if reduce && i.has("or") {
            BarrierOp::Or
        } else {
            return Err(self.unknown(i));
        };
        let (mut p, mut d, mut at) = (Pred::NONE, None, 0);
        if reduce {
            at = 1;
            let to = self.operand_at(i, 0)?;
            if op == BarrierOp::Popc {
                d = Some(self.dest(to, Type::U32)?.reg);
            } else {
                p = self.pred_dest(to)?;
            }
        }
        let id = self.source_at(i, at, Type::U32)?;
        let mut rest: Vec<&Operand> = i.operands[at + 1..].iter().collect();
        let input = match (reduce, rest.pop_if(|_| reduce)) {
            (true, Some(operand)) => self.pred_source(operand)?,
            (true, None) => return Err(self.unknown(i)),
            _ => Pred::NONE,
        };
        let count = match rest.first() {
            Some(operand) => Some(self.source(operand, Type::U32)?),
            None => None,
        };
        self.emit(Op::Barrier(Box::new(Barrier { op, id, count, aligned, input, p, d })));
        Ok(Class::Barrier)
    }

    fn value_and_pred(&mut self, operand: &Operand, ty: Type) -> Result<(Option<Reg>, Pred), Error> {
        let (value, pred) = match operand {
            Operand::Pair(value, pred) => (&**value, self.pred_dest(pred)?),
            one => (one, Pred::NONE),
        };
        let reg = if *value == Operand::Sink { None } else { Some(self.dest(value, ty)?.reg) };
        Ok((reg, pred))
    }

    /// `shfl`, `vote`, `match`, `redux`, `elect`, `activemask`.
    pub fn collective(&mut self, i: &'m Instruction) -> Result<Class, Error> {
        let u32s = Type::U32;
        let to = self.operand_at(i, 0)?;
        let sync = i.has("sync");
        let (kind, members) = match i.opcode[0].as_str() {
            "activemask" => {
                let d = self.dest(to, u32s)?;
                self.emit(Op::ActiveMask(d.reg));
                return Ok(Class::WarpExchange);
            }
            "shfl" => {
                let mode = [
                    ("up", ShuffleMode::Up),
                    ("down", ShuffleMode::Down),
                    ("bfly", ShuffleMode::Butterfly),
                    ("idx", ShuffleMode::Index),
                ];
                let mode = mode.iter().find(|(m, _)| i.has(m)).ok_or_else(|| self.unknown(i))?.1;
                let (d, p) = self.value_and_pred(to, u32s)?;
                let (a, b, c) = (self.source_at(i, 1, u32s)?, self.source_at(i, 2, u32s)?, self.source_at(i, 3, u32s)?);
                (WarpKind::Shuffle { mode, d, p, a, b, c }, 4)
            }
            "vote" => {
                let mode = [
                    ("all", VoteMode::All),
                    ("any", VoteMode::Any),
                    ("uni", VoteMode::Uniform),
                    ("ballot", VoteMode::Ballot),
                ];
                let mode = mode.iter().find(|(m, _)| i.has(m)).ok_or_else(|| self.unknown(i))?.1;
                let from = self.operand_at(i, 1)?;
                let a = self.pred_source(from)?;
                let (d, p) = if mode == VoteMode::Ballot {
                    (Some(self.dest(to, u32s)?.reg), Pred::NONE)
                } else {
                    (None, self.pred_dest(to)?)
                };
                (WarpKind::Vote { mode, d, p, a }, 2)
            }
            "match" => {
                let ty = *i.types().last().ok_or_else(|| self.unknown(i))?;
                let (d, p) = self.value_and_pred(to, u32s)?;
                let a = self.source_at(i, 1, ty)?;
                (WarpKind::Match { all: i.has("all"), d, p, a, wide: ty.bytes() == 8 }, 2)
            }
            "redux" => {
                let ops = [
                    ("add", ReduceOp::Add),
                    ("min", ReduceOp::Min),
                    ("max", ReduceOp::Max),
                    ("and", ReduceOp::And),
                    ("or", ReduceOp::Or),
                    ("xor", ReduceOp::Xor),
                ];
                let op = ops.iter().find(|(m, _)| i.has(m)).ok_or_else(|| self.unknown(i))?.1;
                let ty = *i.types().last().ok_or_else(|| self.unknown(i))?;
                let (d, a) = (self.dest(to, ty)?.reg, self.source_at(i, 1, ty)?);
                (WarpKind::Reduce { op, ty, abs: i.has("abs"), nan: i.has("NaN"), d, a }, 2)
            }
            _ => {
                let (d, p) = self.value_and_pred(to, u32s)?;
                (WarpKind::Elect { d, p }, 1)
            }
        };
        let members = if sync { Some(self.source_at(i, members, u32s)?) } else { None };
        self.emit(Op::Warp(Box::new(WarpOp { kind, members })));
        Ok(Class::WarpExchange)
    }

    fn registers(&mut self, i: &Instruction, n: usize, ty: Type, dest: bool) -> Result<Vec<Reg>, Error> {
        let parts: Vec<&Operand> = match self.operand_at(i, n)? {
            Operand::Vector(parts) => parts.iter().collect(),
            one => vec![one],
        };
        let mut all = Vec::new();
        for part in parts {
            all.push(if dest { self.dest(part, ty)?.reg } else { self.source(part, ty)? });
        }
        Ok(all)
    }

    /// `ldmatrix`, `stmatrix`, `mma`.
    pub fn matrix(&mut self, i: &'m Instruction) -> Result<Class, Error> {
        if i.opcode[0] == "mma" {
            return self.mma(i);
        }
        let load = i.opcode[0] == "ldmatrix";
        let count = [("x1", 1), ("x2", 2), ("x4", 4)].iter().find(|(m, _)| i.has(m)).map_or(0, |(_, n)| *n);
        if !i.has("m8n8") || !i.has("b16") || count == 0 {
            return Err(self.unknown(i));
        }
        let (at, value) = if load { (1, 0) } else { (0, 1) };
        let (address, space) = self.place(i, at, i.space())?;
        let registers = self.registers(i, value, Type::B32, load)?;
        if registers.len() != count {
            return Err(self.unknown(i));
        }
        let matrix = Matrix { load, transposed: i.has("trans"), address, generic: space == Space::Generic, registers };
        self.emit(Op::Matrix(Box::new(matrix)));
        Ok(if load { Class::LoadShared } else { Class::StoreShared })
    }

    fn mma(&mut self, i: &'m Instruction) -> Result<Class, Error> {
        if !i.has("row") || !i.has("col") || i.has("sp") || i.has("popc") {
            return Err(self.unknown(i));
        }
        let [d_type, a_type, b_type, c_type] = i.types()[..] else { return Err(self.unknown(i)) };
        let shape = i.opcode[1..].iter().find_map(|m| parse_shape(m)).ok_or_else(|| self.unknown(i))?;
        let (m, n, k) = shape;
        let (per, bits) = match a_type {
            Type::F16 | Type::BF16 => (2, 16),
            Type::TF32 => (1, 32),
            Type::S8 | Type::U8 | Type::E4M3 | Type::E5M2 => (4, 8),
            Type::F64 => (1, 64),
            _ => return Err(self.unknown(i)),
        };
        let accumulates = match a_type {
            Type::S8 | Type::U8 => c_type == Type::S32,
            Type::F64 => c_type == Type::F64,
            Type::F16 => matches!(c_type, Type::F16 | Type::F32),
            Type::E4M3 | Type::E5M2 => matches!(c_type, Type::F16 | Type::F32),
            _ => c_type == Type::F32,
        };
        if !accumulates
            || d_type != c_type
            || n != 8
            || !(m == 16 || m == 8)
            || k * bits > 256 && bits != 64
            || k % (4 * per) != 0
        {
            return Err(self.unknown(i));
        }
        let element = if a_type == Type::F64 { Type::F64 } else { Type::B32 };
        let accumulator = if c_type == Type::F64 { Type::F64 } else { Type::B32 };
        let mma = Mma {
            shape,
            a_type,
            b_type,
            c_type,
            saturate: i.has("satfinite"),
            d: self.registers(i, 0, accumulator, true)?,
            a: self.registers(i, 1, element, false)?,
            b: self.registers(i, 2, element, false)?,
            c: self.registers(i, 3, accumulator, false)?,
        };
        let sums = m * n / 32 / if c_type == Type::F16 { 2 } else { 1 };
        let expected = (m * k / 32 / per, k * n / 32 / per, sums, sums);
        if (mma.a.len(), mma.b.len(), mma.c.len(), mma.d.len()) != expected {
            return Err(self.unknown(i));
        }
        self.emit(Op::Mma(Box::new(mma)));
        Ok(Class::Tensor)
    }
}

pub(super) fn parse_shape(text: &str) -> Option<(usize, usize, usize)> {
    let (m, rest) = text.strip_prefix('m')?.split_once('n')?;
    let (n, k) = rest.split_once('k')?;
    Some((m.parse().ok()?, n.parse().ok()?, k.parse().ok()?))
}
