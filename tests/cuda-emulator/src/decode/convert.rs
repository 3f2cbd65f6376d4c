//! `cvt`.

use super::builder::Builder;
use super::float::rounding;
use crate::lanes::half_float::{self, Half};
use crate::lanes::{convert, float, logic};
use crate::numerics::rounding::Rounding;
use crate::program::{Class, Reg};
use crate::ptx::Error;
use crate::ptx::ast::{Instruction, Operand};
use crate::ptx::types::Type;

fn is_integral_rounding(i: &Instruction) -> bool {
    ["rni", "rzi", "rmi", "rpi"].iter().any(|m| i.has(m))
}

impl<'m> Builder<'m> {
    /// `cvt.mods.dtype.atype`.
    pub fn cvt(&mut self, i: &'m Instruction) -> Result<Class, Error> {
        let types = i.types();
        let [to, from] = types[..] else { return Err(self.unknown(i)) };
        if matches!(to, Type::F16x2 | Type::BF16x2 | Type::E4M3x2 | Type::E5M2x2) {
            self.cvt_packed(i, to, from)?;
            return Ok(Class::Convert);
        }
        let a = self.source_at(i, 1, from)?;
        // A destination wider than the type receives the extended value.
        let wide_register = matches!(i.operands.first(), Some(Operand::Reg(id)) if self.is_wide(*id));
        match (from.is_float(), to.is_float()) {
            (false, false) => {
                let register = match (wide_register, to.is_signed()) {
                    (true, true) => Type::S64,
                    (true, false) => Type::U64,
                    (false, true) => Type::S32,
                    (false, false) => Type::U32,
                };
                let narrow_register =
                    matches!(i.operands.first(), Some(Operand::Reg(id)) if self.type_of(*id).bytes() <= 2);
                let f = convert::integer(from, to, i.has("sat")).ok_or_else(|| self.unknown(i))?;
                if to.bytes() >= register.bytes() || narrow_register && to.bytes() == 2 {
                    let d = self.dest_at(i, 0, to)?;
                    self.lane(f, d.reg, &[a], d.wide);
                    self.finish(d)?;
                } else {
                    let temp = self.temp(to.bytes() == 8);
                    self.lane(f, temp, &[a], to.bytes() == 8);
                    let extend = convert::integer(to, register, false).ok_or_else(|| self.unknown(i))?;
                    let d = self.dest_at(i, 0, register)?;
                    self.lane(extend, d.reg, &[temp], d.wide);
                }
            }
            (true, false) => {
                let value = self.integral(i, a, from)?;
                let source = if from == Type::F64 { Type::F64 } else { Type::F32 };
                let f = convert::float_to_integer(source, to).ok_or_else(|| self.unknown(i))?;
                if to.bytes() < 4 && to.is_signed() {
                    let temp = self.temp(false);
                    self.lane(f, temp, &[value], false);
                    let extend = convert::integer(to, Type::S32, false).ok_or_else(|| self.unknown(i))?;
                    let d = self.dest_at(i, 0, Type::S32)?;
                    self.lane(extend, d.reg, &[temp], false);
                    self.finish(d)?;
                } else {
                    let d = self.dest_at(i, 0, to)?;
                    self.lane(f, d.reg, &[value], d.wide);
                    self.finish(d)?;
                }
            }
            (false, true) => {
                let value = self.integer_to_float(i, a, from, to)?;
                self.store_float(i, value, to)?;
            }
            (true, true) => {
                let value = self.float_to_float(i, a, from, to)?;
                self.store_float(i, value, to)?;
            }
        }
        Ok(Class::Convert)
    }

    fn store_float(&mut self, i: &Instruction, value: Reg, to: Type) -> Result<(), Error> {
        let d = self.dest_at(i, 0, to)?;
        let f = match (i.has("sat"), to) {
            (true, Type::F32) => Some(float::saturate(false)),
            (true, Type::F64) => Some(float::saturate(true)),
            (true, _) => Half::of(to).map(half_float::saturate),
            _ => None,
        };
        self.lane(f.unwrap_or(logic::copy(d.wide)), d.reg, &[value], d.wide);
        if i.has("relu")
            && let Some(half) = Half::of(to)
        {
            self.lane(half_float::relu(half), d.reg, &[d.reg], false);
        }
        if i.has("ftz") && to == Type::F32 {
            self.lane(float::flush(), d.reg, &[d.reg], false);
        }
        self.finish(d)
    }

    /// A float source of any format as an integral f32 or f64.
    fn integral(&mut self, i: &Instruction, a: Reg, from: Type) -> Result<Reg, Error> {
        let wide = from == Type::F64;
        let mut value = a;
        if matches!(from, Type::F16 | Type::BF16) {
            let temp = self.temp(false);
            let f = convert::direct(from, Type::F32).ok_or_else(|| self.unknown(i))?;
            self.lane(f, temp, &[value], false);
            value = temp;
        }
        let base = if wide { Type::F64 } else { Type::F32 };
        if i.has("ftz") && from == Type::F32 {
            let temp = self.temp(false);
            self.lane(float::flush(), temp, &[value], false);
            value = temp;
        }
        let temp = self.temp(wide);
        let f = convert::integral(base, rounding(i)).ok_or_else(|| self.unknown(i))?;
        self.lane(f, temp, &[value], wide);
        Ok(temp)
    }

    fn integer_to_float(&mut self, i: &Instruction, a: Reg, from: Type, to: Type) -> Result<Reg, Error> {
        let direction = rounding(i);
        let temp = self.temp(to == Type::F64);
        if to == Type::F64 {
            let f = convert::integer_to_f64(from, direction).ok_or_else(|| self.unknown(i))?;
            self.lane(f, temp, &[a], true);
        } else if to == Type::F32 && direction == Rounding::Nearest {
            let f = convert::integer_to_f32(from).ok_or_else(|| self.unknown(i))?;
            self.lane(f, temp, &[a], false);
        } else {
            let odd = self.temp(true);
            let f = convert::integer_to_odd(from).ok_or_else(|| self.unknown(i))?;
            self.lane(f, odd, &[a], true);
            let f = convert::narrow(to, direction, false).ok_or_else(|| self.unknown(i))?;
            self.lane(f, temp, &[odd], false);
        }
        Ok(temp)
    }

    fn float_to_float(&mut self, i: &Instruction, a: Reg, from: Type, to: Type) -> Result<Reg, Error> {
        let direction = rounding(i);
        let mut a = a;
        if i.has("ftz") && from == Type::F32 {
            let temp = self.temp(false);
            self.lane(float::flush(), temp, &[a], false);
            a = temp;
        }
        if is_integral_rounding(i) && from == to {
            let value = self.integral(i, a, from)?;
            if !matches!(from, Type::F16 | Type::BF16) {
                return Ok(value);
            }
            let temp = self.temp(false);
            let f = convert::direct(Type::F32, to).ok_or_else(|| self.unknown(i))?;
            self.lane(f, temp, &[value], false);
            return Ok(temp);
        }
        if from == to {
            return Ok(a);
        }
        let temp = self.temp(to == Type::F64);
        if to == Type::TF32 {
            self.lane(convert::tf32(direction), temp, &[a], false);
            if i.has("relu") {
                self.lane(float::relu(), temp, &[temp], false);
            }
            return Ok(temp);
        }
        let saturate = i.has("satfinite");
        let direct = convert::direct(from, to).filter(|_| direction == Rounding::Nearest && !saturate);
        if let Some(f) = direct {
            self.lane(f, temp, &[a], to == Type::F64);
            return Ok(temp);
        }
        self.through_f64(i, a, from, to, temp, saturate)?;
        Ok(temp)
    }

    /// Widens to f64 exactly, then rounds once.
    fn through_f64(
        &mut self,
        i: &Instruction,
        a: Reg,
        from: Type,
        to: Type,
        d: Reg,
        saturate: bool,
    ) -> Result<(), Error> {
        let mut value = a;
        if from != Type::F64 {
            value = if to == Type::F64 { d } else { self.temp(true) };
            let f = convert::widen(from).ok_or_else(|| self.unknown(i))?;
            self.lane(f, value, &[a], true);
        }
        if to != Type::F64 {
            let f = convert::narrow(to, rounding(i), saturate).ok_or_else(|| self.unknown(i))?;
            self.lane(f, d, &[value], false);
        }
        Ok(())
    }

    /// `cvt.rn.bf16x2.f32 d, a, b` (a to the high half), pairs of fp8, and pairs from fp8.
    fn cvt_packed(&mut self, i: &'m Instruction, to: Type, from: Type) -> Result<(), Error> {
        let nearest = rounding(i) == Rounding::Nearest && !i.has("satfinite");
        let d = self.dest_at(i, 0, to)?;
        if from == Type::F32 {
            let (a, b) = (self.source_at(i, 1, from)?, self.source_at(i, 2, from)?);
            if nearest && let Some(f) = convert::pack_f32(to) {
                self.lane(f, d.reg, &[a, b], false);
            } else {
                let part = part_of(to).ok_or_else(|| self.unknown(i))?;
                let (high, low) = (self.temp(false), self.temp(false));
                self.through_f64(i, a, from, part, high, i.has("satfinite"))?;
                self.through_f64(i, b, from, part, low, i.has("satfinite"))?;
                let join = if part.bytes() == 2 { logic::join32() } else { logic::join16() };
                self.lane(join, d.reg, &[low, high], false);
            }
        } else {
            let a = self.source_at(i, 1, from)?;
            let (source, target) =
                (part_of(from).ok_or_else(|| self.unknown(i))?, part_of(to).ok_or_else(|| self.unknown(i))?);
            let mut parts = [Reg::NONE; 2];
            for (n, part) in parts.iter_mut().enumerate() {
                let piece = self.temp(false);
                let split = if source.bytes() == 2 { logic::half32(n == 1) } else { logic::byte_of(n) };
                self.lane(split, piece, &[a], false);
                *part = self.temp(false);
                self.through_f64(i, piece, source, target, *part, i.has("satfinite"))?;
            }
            let join = if target.bytes() == 2 { logic::join32() } else { logic::join16() };
            self.lane(join, d.reg, &parts, false);
        }
        if i.has("relu")
            && let Some(half) = Half::of(to)
        {
            self.lane(half_float::relu(half), d.reg, &[d.reg], false);
        }
        self.finish(d)
    }
}

fn part_of(pair: Type) -> Option<Type> {
    Some(match pair {
        Type::F16x2 => Type::F16,
        Type::BF16x2 => Type::BF16,
        Type::E4M3x2 => Type::E4M3,
        Type::E5M2x2 => Type::E5M2,
        _ => return None,
    })
}
