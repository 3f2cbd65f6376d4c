//! `mov` with packing and unpacking, address conversions.

use super::builder::Builder;
use crate::lanes::{integer, logic};
use crate::memory::layout;
use crate::program::{BoolOp, Class, IsSpace, MapCluster, Op, Pred, Reg};
use crate::ptx::Error;
use crate::ptx::ast::{Instruction, Operand};
use crate::ptx::types::{Space, Type};

fn bits(n: u32) -> Type {
    match n {
        1 => Type::B8,
        2 => Type::B16,
        4 => Type::B32,
        8 => Type::B64,
        _ => Type::B128,
    }
}

impl<'m> Builder<'m> {
    /// `mov`.
    pub fn mov(&mut self, i: &'m Instruction) -> Result<Class, Error> {
        let ty = *i.types().last().ok_or_else(|| self.unknown(i))?;
        let (to, from) = (self.operand_at(i, 0)?, self.operand_at(i, 1)?);
        if ty == Type::Pred {
            let (d, a) = (self.pred_dest(to)?, self.pred_source(from)?);
            self.emit(Op::Logic { op: BoolOp::And, d, a, b: Pred::NONE });
            return Ok(Class::Move);
        }
        match (to, from) {
            (Operand::Vector(parts), from) => {
                let part = bits(ty.bytes() / (parts.len() as u32).max(1));
                let pieces = match from {
                    Operand::Vector(all) if all.len() == parts.len() => {
                        all.iter().map(|o| self.source(o, part)).collect::<Result<Vec<_>, _>>()?
                    }
                    _ => {
                        let whole = self.source(from, ty)?;
                        self.unpack(whole, ty.bytes(), parts.len()).ok_or_else(|| self.unknown(i))?
                    }
                };
                // Sources may be destinations too: read all before writing any.
                let mut held = Vec::new();
                for piece in pieces {
                    let temp = self.temp(part.bytes() > 4);
                    self.copy(temp, piece, part.bytes() > 4);
                    held.push(temp);
                }
                for (piece, to) in held.into_iter().zip(parts) {
                    let d = self.dest(to, part)?;
                    self.copy(d.reg, piece, d.wide);
                    self.finish(d)?;
                }
            }
            (to, Operand::Vector(parts)) => {
                let part = bits(ty.bytes() / (parts.len() as u32).max(1));
                let pieces = parts.iter().map(|o| self.source(o, part)).collect::<Result<Vec<_>, _>>()?;
                if ty == Type::B128 {
                    let Operand::Reg(id) = to else { return Err(self.unknown(i)) };
                    let d = self.slot(*id);
                    let halves = if pieces.len() == 2 {
                        pieces
                    } else {
                        vec![self.pack(&pieces[..2], 8), self.pack(&pieces[2..], 8)]
                            .into_iter()
                            .collect::<Option<Vec<_>>>()
                            .ok_or_else(|| self.unknown(i))?
                    };
                    self.copy(d, halves[0], true);
                    self.copy(Reg(d.0 + 2), halves[1], true);
                    return Ok(Class::Move);
                }
                let whole = self.pack(&pieces, ty.bytes()).ok_or_else(|| self.unknown(i))?;
                let d = self.dest(to, ty)?;
                self.copy(d.reg, whole, d.wide);
                self.finish(d)?;
            }
            (Operand::Reg(d), Operand::Reg(a)) if ty == Type::B128 => {
                let (d, a) = (self.slot(*d), self.slot(*a));
                self.copy(d, a, true);
                self.copy(Reg(d.0 + 2), Reg(a.0 + 2), true);
            }
            _ => {
                let a = self.source(from, ty)?;
                let d = self.dest(to, ty)?;
                self.copy(d.reg, a, d.wide);
                self.finish(d)?;
            }
        }
        Ok(Class::Move)
    }

    /// Splits a value of `bytes` bytes into equal parts, low first.
    fn unpack(&mut self, whole: Reg, bytes: u32, parts: usize) -> Option<Vec<Reg>> {
        let half = |b: &mut Self, from: Reg, from_bytes: u32, high: bool| -> Option<Reg> {
            let temp = b.temp(from_bytes > 8);
            let f = match from_bytes {
                8 => logic::half64(high),
                4 => logic::half32(high),
                2 => logic::byte_of(usize::from(high)),
                _ => return None,
            };
            b.lane(f, temp, &[from], false);
            Some(temp)
        };
        match (bytes, parts) {
            (_, 1) => Some(vec![whole]),
            (16, 2) => Some(vec![whole, Reg(whole.0 + 2)]),
            (16, 4) => {
                let mut all = self.unpack(whole, 8, 2)?;
                all.extend(self.unpack(Reg(whole.0 + 2), 8, 2)?);
                Some(all)
            }
            (8 | 4 | 2, 2) => Some(vec![half(self, whole, bytes, false)?, half(self, whole, bytes, true)?]),
            (8 | 4, 4) => {
                let (low, high) = (half(self, whole, bytes, false)?, half(self, whole, bytes, true)?);
                let mut all = self.unpack(low, bytes / 2, 2)?;
                all.extend(self.unpack(high, bytes / 2, 2)?);
                Some(all)
            }
            (8, 8) => {
                let (low, high) = (half(self, whole, 8, false)?, half(self, whole, 8, true)?);
                let mut all = self.unpack(low, 4, 4)?;
                all.extend(self.unpack(high, 4, 4)?);
                Some(all)
            }
            _ => None,
        }
    }

    /// Joins parts, low first, to a value of `bytes` bytes.
    fn pack(&mut self, parts: &[Reg], bytes: u32) -> Option<Reg> {
        match parts {
            [] => None,
            [one] => Some(*one),
            [low, high] => {
                let f = match bytes {
                    8 => logic::join64(),
                    4 => logic::join32(),
                    2 => logic::join16(),
                    _ => return None,
                };
                let temp = self.temp(bytes > 4);
                self.lane(f, temp, &[*low, *high], bytes > 4);
                Some(temp)
            }
            _ => {
                let middle = parts.len() / 2;
                let (low, high) = (self.pack(&parts[..middle], bytes / 2)?, self.pack(&parts[middle..], bytes / 2)?);
                self.pack(&[low, high], bytes)
            }
        }
    }

    /// `cvta`, `isspacep`, `mapa`, `getctarank`.
    pub fn address_conversion(&mut self, i: &'m Instruction) -> Result<Class, Error> {
        let space = i.space();
        match i.opcode[0].as_str() {
            "cvta" => {
                let window = match space {
                    Space::Global | Space::Const => 0,
                    Space::Shared | Space::SharedCluster => layout::SHARED,
                    Space::Local => layout::LOCAL,
                    // A parameter of a device function lies in local memory.
                    Space::Param if !self.function.is_entry => layout::LOCAL,
                    Space::Param => layout::PARAM,
                    Space::Generic => return Err(self.unknown(i)),
                };
                let a = self.source_at(i, 1, Type::U64)?;
                let d = self.dest_at(i, 0, Type::U64)?;
                let op = if i.has("to") { "sub" } else { "add" };
                if window == 0 {
                    self.copy(d.reg, a, true);
                } else {
                    let window = self.constant(window, true);
                    let f = integer::binary(op, Type::U64).ok_or_else(|| self.unknown(i))?;
                    self.lane(f, d.reg, &[a, window], true);
                }
                self.finish(d)?;
            }
            "isspacep" => {
                let to = self.operand_at(i, 0)?;
                let d = self.pred_dest(to)?;
                let a = self.source_at(i, 1, Type::U64)?;
                self.emit(Op::IsSpace(Box::new(IsSpace { d, a, space })));
            }
            _ => {
                let rank_of = i.opcode[0] == "getctarank";
                let ty = *i.types().last().ok_or_else(|| self.unknown(i))?;
                let wide = ty.bytes() == 8;
                let a = self.source_at(i, 1, ty)?;
                let b = if rank_of { Reg::NONE } else { self.source_at(i, 2, Type::U32)? };
                let d = self.dest_at(i, 0, if rank_of { Type::U32 } else { ty })?;
                let map = MapCluster { rank_of, d: d.reg, a, b, wide, generic: space == Space::Generic };
                self.emit(Op::MapCluster(Box::new(map)));
                self.finish(d)?;
            }
        }
        Ok(Class::Move)
    }
}
