//! Reading operands: sources as registers of the width that a type needs, destinations with the conversion back.

use super::builder::Builder;
use super::layout::Place;
use crate::lanes::{convert, logic};
use crate::program::{Address, Pred, RESERVED_SHARED, Reg, Special};
use crate::ptx::Error;
use crate::ptx::ast::{Instruction, Operand};
use crate::ptx::types::{Space, Type};

/// A destination that was asked for: where to write, and the register to convert to afterwards.
#[derive(Debug, Clone, Copy)]
pub struct Dest {
    /// Where the operation writes.
    pub reg: Reg,
    /// Whether it has 64-bit lanes.
    pub wide: bool,
    /// A wider register that receives the value, sign-extended or not.
    widen: Option<(Reg, bool)>,
}

impl<'m> Builder<'m> {
    /// A source operand as a register for values of `ty`.
    pub fn source(&mut self, operand: &Operand, ty: Type) -> Result<Reg, Error> {
        let wide = ty.bytes() > 4;
        match operand {
            Operand::Reg(id) => {
                if self.type_of(*id) == Type::Pred {
                    return Err(self.error(format!(
                        "predicate `{}` where a value is needed",
                        self.function.registers[*id as usize].name
                    )));
                }
                let reg = self.slot(*id);
                match (self.is_wide(*id), wide) {
                    (true, false) => {
                        let temp = self.temp(false);
                        self.lane(logic::half64(false), temp, &[reg], false);
                        Ok(temp)
                    }
                    (false, true) => {
                        let temp = self.temp(true);
                        let from = if ty.is_signed() { Type::S32 } else { Type::U32 };
                        let f = convert::integer(from, Type::U64, false).ok_or_else(|| self.error("operand width"))?;
                        self.lane(f, temp, &[reg], true);
                        Ok(temp)
                    }
                    _ => Ok(reg),
                }
            }
            Operand::Special(name) => self.special_operand(name, wide),
            Operand::Int(value) => {
                let bits = match ty {
                    Type::F32 | Type::F64 if *value != 0 => {
                        return Err(self.error("an integer constant where a float is needed"));
                    }
                    Type::S8 | Type::U8 | Type::B8 => *value as u64 & 0xff,
                    _ if ty.bytes() == 2 => *value as u64 & 0xffff,
                    _ => *value as u64,
                };
                Ok(self.constant(bits, wide))
            }
            Operand::F32(bits) => {
                let bits = if ty == Type::F64 { f64::from(f32::from_bits(*bits)).to_bits() } else { u64::from(*bits) };
                Ok(self.constant(bits, wide))
            }
            Operand::F64(bits) => {
                let bits = if wide { *bits } else { u64::from((f64::from_bits(*bits) as f32).to_bits()) };
                Ok(self.constant(bits, wide))
            }
            Operand::Var(..) | Operand::Symbol(..) => {
                let value = self.address_value(operand)?.1;
                Ok(self.constant(value, wide))
            }
            Operand::NotReg(_) | Operand::Vector(_) | Operand::Memory(..) | Operand::MemoryParts(_) => {
                Err(self.error("this kind of operand is not allowed here"))
            }
            Operand::Pair(..) | Operand::List(_) | Operand::Label(_) | Operand::Sink => {
                Err(self.error("a register or constant is needed here (is the name declared?)"))
            }
        }
    }

    /// The n-th operand of an instruction as a source.
    pub fn source_at(&mut self, i: &Instruction, n: usize, ty: Type) -> Result<Reg, Error> {
        let operand = self.operand_at(i, n)?;
        self.source(operand, ty)
    }

    /// The value of a variable's or symbol's address, and the space it is an address of.
    pub fn address_value(&self, operand: &Operand) -> Result<(Space, u64), Error> {
        match operand {
            Operand::Var(id, offset) => {
                let (space, at) = match self.places[*id as usize] {
                    Place::Param(at) => (Space::Param, u64::from(at)),
                    Place::Local(at) => (Space::Local, u64::from(at)),
                    Place::Shared(at) => (Space::Shared, u64::from(at)),
                    Place::Global(at) => (Space::Global, at),
                };
                Ok((space, at.wrapping_add(*offset as u64)))
            }
            Operand::Symbol(name, offset) => {
                let (space, at) = self.symbol(name)?;
                Ok((space, at.wrapping_add(*offset as u64)))
            }
            _ => Err(self.error("not a variable")),
        }
    }

    /// A destination for values of `ty`.
    pub fn dest(&mut self, operand: &Operand, ty: Type) -> Result<Dest, Error> {
        let wide = ty.bytes() > 4;
        match operand {
            Operand::Sink => Ok(Dest { reg: self.temp(wide), wide, widen: None }),
            Operand::Reg(id) => {
                let declared = self.type_of(*id);
                if declared == Type::Pred {
                    return Err(self.error("a predicate cannot receive this value"));
                }
                match (self.is_wide(*id), wide) {
                    (true, false) => {
                        let target = self.slot(*id);
                        Ok(Dest { reg: self.temp(false), wide, widen: Some((target, ty.is_signed())) })
                    }
                    (false, true) => Err(self.error("the destination register is too narrow")),
                    _ => Ok(Dest { reg: self.slot(*id), wide, widen: None }),
                }
            }
            _ => Err(self.error("the destination must be a register")),
        }
    }

    /// The n-th operand of an instruction as a destination.
    pub fn dest_at(&mut self, i: &Instruction, n: usize, ty: Type) -> Result<Dest, Error> {
        let operand = self.operand_at(i, n)?;
        self.dest(operand, ty)
    }

    /// Converts to the register proper, after the operation.
    pub fn finish(&mut self, dest: Dest) -> Result<(), Error> {
        if let Some((target, signed)) = dest.widen {
            let from = if signed { Type::S32 } else { Type::U32 };
            let f = convert::integer(from, Type::U64, false).ok_or_else(|| self.error("operand width"))?;
            self.lane(f, target, &[dest.reg], true);
        }
        Ok(())
    }

    /// A predicate source: a register, its negation, or a constant.
    pub fn pred_source(&mut self, operand: &Operand) -> Result<Pred, Error> {
        match operand {
            Operand::Reg(id) | Operand::NotReg(id) if self.type_of(*id) == Type::Pred => {
                Ok(Pred::new(self.slot(*id).0, matches!(operand, Operand::NotReg(_))))
            }
            // `1` is true; false is the negation of nothing, which has no number: a predicate that is never set.
            Operand::Int(0) => Ok(self.temp_pred_false()),
            Operand::Int(_) => Ok(Pred::NONE),
            _ => Err(self.error("a predicate is needed here")),
        }
    }

    fn temp_pred_false(&mut self) -> Pred {
        let p = self.temp_pred();
        self.emit(crate::program::Op::Logic { op: crate::program::BoolOp::Xor, d: p, a: Pred::NONE, b: Pred::NONE });
        p
    }

    /// A predicate destination, or none for `_`.
    pub fn pred_dest(&mut self, operand: &Operand) -> Result<Pred, Error> {
        match operand {
            Operand::Sink => Ok(Pred::NONE),
            Operand::Reg(id) if self.type_of(*id) == Type::Pred => Ok(Pred::new(self.slot(*id).0, false)),
            _ => Err(self.error("a predicate register is needed here")),
        }
    }

    /// A memory operand: its address and the space that the base belongs to, if a variable tells.
    pub fn memory(&mut self, operand: &Operand) -> Result<(Address, Option<Space>), Error> {
        let Operand::Memory(base, offset) = operand else {
            return Err(self.error("an address in brackets is needed here"));
        };
        match &**base {
            Operand::Reg(id) => {
                Ok((Address { base: Some(self.slot(*id)), wide: self.is_wide(*id), offset: *offset }, None))
            }
            Operand::Int(at) => Ok((Address { base: None, wide: true, offset: at.wrapping_add(*offset) }, None)),
            base => {
                let (space, at) = self.address_value(base)?;
                let offset = (at as i64).wrapping_add(*offset);
                Ok((Address { base: None, wide: true, offset }, Some(space)))
            }
        }
    }

    fn special_operand(&mut self, name: &str, wide: bool) -> Result<Reg, Error> {
        let (stem, part) = name.split_once('.').unwrap_or((name, ""));
        let axis = match part {
            "" | "x" => 0,
            "y" => 1,
            "z" => 2,
            // The fourth component of every vector is zero.
            "w" => return Ok(self.special(Special::Zero, wide)),
            _ => return Err(self.error(format!("unknown special register `{name}`"))),
        };
        let special = match stem {
            "%tid" => Special::Tid(axis),
            "%ntid" => Special::Ntid(axis),
            "%ctaid" => Special::Ctaid(axis),
            "%nctaid" => Special::Nctaid(axis),
            "%laneid" => Special::LaneId,
            "%warpid" => Special::WarpId,
            "%nwarpid" => Special::WarpCount,
            "%lanemask_eq" => Special::MaskEq,
            "%lanemask_lt" => Special::MaskLt,
            "%lanemask_le" => Special::MaskLe,
            "%lanemask_gt" => Special::MaskGt,
            "%lanemask_ge" => Special::MaskGe,
            "%smid" => Special::SmId,
            "%nsmid" => Special::SmCount,
            "%gridid" => Special::GridId,
            "%dynamic_smem_size" => Special::DynamicSharedBytes,
            "%total_smem_size" => Special::TotalSharedBytes,
            "%cluster_ctaid" => Special::ClusterCtaid(axis),
            "%cluster_nctaid" => Special::ClusterNctaid(axis),
            "%clusterid" => Special::ClusterId(axis),
            "%nclusterid" => Special::ClusterCount(axis),
            "%cluster_ctarank" => Special::ClusterRank,
            "%cluster_nctarank" => Special::ClusterSize,
            "%is_explicit_cluster" | "%reserved_smem_offset_begin" | "%reserved_smem_offset_0" => Special::Zero,
            "%reserved_smem_offset_end" | "%reserved_smem_offset_cap" => {
                return Ok(self.constant(u64::from(RESERVED_SHARED), wide));
            }
            "%reserved_smem_offset_1" => return Ok(self.constant(u64::from(RESERVED_SHARED) / 2, wide)),
            "%envreg1" => Special::GridWorkspace(true),
            "%envreg2" => Special::GridWorkspace(false),
            "%clock" | "%clock_hi" | "%clock64" | "%globaltimer" | "%globaltimer_lo" | "%globaltimer_hi" => {
                let d = self.temp(wide);
                self.emit(crate::program::Op::Clock { d, wide });
                return Ok(d);
            }
            _ if stem.starts_with("%pm") || stem.starts_with("%envreg") => Special::Zero,
            _ => {
                return Err(self.error(format!("`{name}` is neither a declared register nor a known special register")));
            }
        };
        Ok(self.special(special, wide))
    }
}
