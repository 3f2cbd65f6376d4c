//! `wgmma`.

use super::builder::Builder;
use super::warp::parse_shape;
use crate::program::{Class, Op, Pred, Reg, Wgmma, WgmmaA, WgmmaSync};
use crate::ptx::Error;
use crate::ptx::ast::{Instruction, Operand};
use crate::ptx::types::Type;

impl<'m> Builder<'m> {
    /// `wgmma.*`.
    pub fn wgmma(&mut self, i: &'m Instruction) -> Result<Class, Error> {
        if !i.has("sync") || !i.has("aligned") {
            return Err(self.unknown(i));
        }
        self.program.uses_wgmma = true;
        let sync = match i.opcode[1].as_str() {
            "mma_async" => return self.mma_async(i),
            "fence" => WgmmaSync::Fence,
            "commit_group" => WgmmaSync::Commit,
            "wait_group" => match self.operand_at(i, 0)? {
                Operand::Int(n @ 0..=7) => WgmmaSync::Wait(*n as u32),
                _ => return Err(self.unknown(i)),
            },
            _ => return Err(self.unknown(i)),
        };
        self.emit(Op::WgmmaSync(sync));
        Ok(Class::Barrier)
    }

    fn mma_async(&mut self, i: &'m Instruction) -> Result<Class, Error> {
        let [d_type, a_type, b_type] = i.types()[..] else { return Err(self.unknown(i)) };
        let shape = i.opcode[1..].iter().find_map(|m| parse_shape(m));
        let Some((64, n, k)) = shape else { return Err(self.unknown(i)) };
        let sixteen = matches!(a_type, Type::F16 | Type::BF16);
        let float8 = |t| matches!(t, Type::E4M3 | Type::E5M2);
        let integer = |t| matches!(t, Type::S8 | Type::U8);
        let fits = match a_type {
            Type::F16 => b_type == Type::F16 && matches!(d_type, Type::F16 | Type::F32) && k == 16,
            Type::BF16 => b_type == Type::BF16 && d_type == Type::F32 && k == 16,
            Type::TF32 => b_type == Type::TF32 && d_type == Type::F32 && k == 8,
            t if float8(t) => float8(b_type) && matches!(d_type, Type::F16 | Type::F32) && k == 32,
            t if integer(t) => integer(b_type) && d_type == Type::S32 && k == 32,
            _ => false,
        };
        let columns = if integer(a_type) { n == 8 || n == 24 || n % 16 == 0 } else { n % 8 == 0 };
        if !fits || !columns || !(8..=256).contains(&n) || i.has("sp") {
            return Err(self.unknown(i));
        }
        let d = self.narrow(i, 0)?;
        let in_registers = matches!(self.operand_at(i, 1)?, Operand::Vector(_));
        let a = if in_registers {
            WgmmaA::Registers(self.narrow(i, 1)?)
        } else {
            WgmmaA::Descriptor(self.source_at(i, 1, Type::B64)?)
        };
        let b = self.source_at(i, 2, Type::B64)?;
        let per = if d_type == Type::F16 { 4 } else { 2 };
        // The shorter form leaves out what the integer types do not have.
        let scale_d = match i.operands.get(3) {
            Some(operand) => self.pred_source(operand)?,
            None => Pred::NONE,
        };
        let mut numbers = Vec::new();
        for operand in i.operands.iter().skip(4) {
            match operand {
                Operand::Int(value) => numbers.push(*value),
                _ => return Err(self.unknown(i)),
            }
        }
        let count = if integer(a_type) { 0 } else { 2 + if sixteen { 2 - usize::from(in_registers) } else { 0 } };
        let is = |n: usize, value: i64| numbers.get(n) == Some(&value);
        let scales = integer(a_type) || (0..2).all(|n| is(n, 1) || is(n, -1));
        let bits = numbers.iter().skip(2).all(|v| matches!(v, 0 | 1));
        if d.len() * per != n
            || matches!(&a, WgmmaA::Registers(all) if all.len() != 4)
            || numbers.len() != count
            || !scales
            || !bits
        {
            return Err(self.unknown(i));
        }
        let transposed = if in_registers { (false, is(2, 1)) } else { (is(2, 1), is(3, 1)) };
        self.emit(Op::Wgmma(Box::new(Wgmma {
            n,
            k,
            a_type,
            b_type,
            d_type,
            d,
            a,
            b,
            scale_d,
            negate: (is(0, -1), is(1, -1)),
            transposed,
            saturate: i.has("satfinite"),
        })));
        Ok(Class::Tensor)
    }

    /// A vector of 32-bit registers.
    fn narrow(&self, i: &Instruction, n: usize) -> Result<Vec<Reg>, Error> {
        let Operand::Vector(parts) = self.operand_at(i, n)? else { return Err(self.unknown(i)) };
        let one = |part: &Operand| match part {
            Operand::Reg(id) if self.type_of(*id).bytes() == 4 && self.type_of(*id) != Type::Pred => Ok(self.slot(*id)),
            _ => Err(self.error("wgmma needs 32-bit registers here")),
        };
        parts.iter().map(one).collect()
    }
}
