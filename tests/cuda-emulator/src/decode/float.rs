//! Floating-point arithmetic of every format.

use super::builder::Builder;
use crate::lanes::half_float::{self, Half};
use crate::lanes::{LaneFn, float};
use crate::numerics::rounding::Rounding;
use crate::program::{Class, Op, Reg};
use crate::ptx::Error;
use crate::ptx::ast::Instruction;
use crate::ptx::types::Type;

/// The rounding that an instruction names; nearest if none.
pub fn rounding(i: &Instruction) -> Rounding {
    if i.has("rz") || i.has("rzi") {
        Rounding::Zero
    } else if i.has("rm") || i.has("rmi") {
        Rounding::Down
    } else if i.has("rp") || i.has("rpi") {
        Rounding::Up
    } else if i.has("rna") {
        Rounding::Away
    } else {
        Rounding::Nearest
    }
}

impl<'m> Builder<'m> {
    /// Emits `d = f(sources)`, sources and result passed through further functions.
    fn around(
        &mut self,
        i: &Instruction,
        f: LaneFn,
        ty: Type,
        n: usize,
        before: Option<LaneFn>,
        after: &[LaneFn],
    ) -> Result<(), Error> {
        let wide = ty.bytes() == 8;
        let mut regs: Vec<Reg> = Vec::with_capacity(3);
        for k in 0..n {
            let mut reg = self.source_at(i, k + 1, ty)?;
            if let Some(before) = before {
                let temp = self.temp(wide);
                self.lane(before, temp, &[reg], wide);
                reg = temp;
            }
            regs.push(reg);
        }
        let d = self.dest_at(i, 0, ty)?;
        self.lane(f, d.reg, &regs, wide);
        for after in after {
            self.lane(*after, d.reg, &[d.reg], wide);
        }
        self.finish(d)
    }

    /// add, sub, mul, mad, fma, div, min, max, abs, neg, copysign, rcp, sqrt, rsqrt, sin, cos, lg2, ex2, tanh, testp.
    pub fn float_arithmetic(&mut self, i: &'m Instruction) -> Result<Class, Error> {
        let types = i.types();
        let ty = *types.last().ok_or_else(|| self.unknown(i))?;
        if types.len() > 1 && types[0] != ty {
            return self.mixed(i, types[0], ty);
        }
        if let Some(half) = Half::of(ty) {
            return self.half_arithmetic(i, half, ty);
        }
        let op = if i.opcode[0] == "mad" { "fma" } else { i.opcode[0].as_str() };
        let (ftz, sat, direction) = (i.has("ftz"), i.has("sat"), rounding(i));
        let flush = ftz.then(float::flush);
        let unknown = self.unknown(i);
        match (op, ty) {
            ("testp", _) => {
                let class = i.opcode.get(1).map_or("", String::as_str);
                let f = float::classify(class, ty == Type::F64).ok_or(unknown)?;
                let a = self.source_at(i, 1, ty)?;
                let temp = self.temp(false);
                self.lane(f, temp, &[a], false);
                let to = self.operand_at(i, 0)?;
                let d = self.pred_dest(to)?;
                self.emit(Op::NonZero { d, a: temp });
                Ok(Class::Compare)
            }
            ("abs" | "neg", _) => {
                self.around(i, float::sign(op, ty).ok_or(unknown)?, ty, 1, flush, &[])?;
                Ok(Class::Float32)
            }
            ("copysign", _) => {
                self.around(i, float::sign(op, ty).ok_or(unknown)?, ty, 2, None, &[])?;
                Ok(Class::Float32)
            }
            ("add" | "sub" | "mul", Type::F32) if direction == Rounding::Nearest => {
                self.around(i, float::binary32(op, ftz, sat).ok_or(unknown)?, ty, 2, None, &[])?;
                Ok(Class::Float32)
            }
            ("fma", Type::F32) if direction == Rounding::Nearest => {
                self.around(i, float::fma32(ftz, sat), ty, 3, None, &[])?;
                Ok(Class::Fma32)
            }
            ("min" | "max", Type::F32) => {
                let f = float::extremum32(op == "max", i.has("NaN"), i.has("xorsign"));
                if i.operands.len() == 4 {
                    let (a, b, c) = (self.source_at(i, 1, ty)?, self.source_at(i, 2, ty)?, self.source_at(i, 3, ty)?);
                    let temp = self.temp(false);
                    self.lane(f, temp, &[a, b], false);
                    let d = self.dest_at(i, 0, ty)?;
                    self.lane(f, d.reg, &[temp, c], false);
                    return Ok(Class::Float32);
                }
                self.around(i, f, ty, 2, flush, &[])?;
                Ok(Class::Float32)
            }
            ("min" | "max", Type::F64) => {
                self.around(i, float::extremum64(op == "max"), ty, 2, None, &[])?;
                Ok(Class::Float64)
            }
            (_, Type::F32) => {
                let approximate = i.has("approx") || i.has("full");
                let name = if i.has("full") { "div.full" } else { op };
                let f = if approximate { float::approximate(name) } else { float::rounded32(op, direction) };
                let n = match op {
                    "fma" => 3,
                    "add" | "sub" | "mul" | "div" => 2,
                    _ => 1,
                };
                let mut after = Vec::new();
                if sat {
                    after.push(float::saturate(false));
                }
                after.extend(flush);
                self.around(i, f.ok_or(unknown)?, ty, n, flush, &after)?;
                Ok(match op {
                    "fma" => Class::Fma32,
                    "add" | "sub" | "mul" => Class::Float32,
                    _ => Class::Special,
                })
            }
            (_, Type::F64) => {
                let f = if i.has("approx") { float::approximate64(op, ftz) } else { float::rounded64(op, direction) };
                let n = match op {
                    "fma" => 3,
                    "add" | "sub" | "mul" | "div" => 2,
                    _ => 1,
                };
                self.around(i, f.ok_or(unknown)?, ty, n, None, &[])?;
                Ok(if op == "fma" { Class::Fma64 } else { Class::Float64 })
            }
            _ => Err(unknown),
        }
    }

    fn half_arithmetic(&mut self, i: &'m Instruction, half: Half, ty: Type) -> Result<Class, Error> {
        let op = i.opcode[0].as_str();
        let unknown = self.unknown(i);
        let flush = i.has("ftz").then(|| half_float::flush(half));
        let mut after = Vec::new();
        if i.has("sat") {
            after.push(half_float::saturate(half));
        }
        if i.has("relu") {
            after.push(half_float::relu(half));
        }
        after.extend(flush);
        let (plain, fused) =
            if half.packed { (Class::HalfPacked, Class::HalfPackedFma) } else { (Class::Half, Class::HalfFma) };
        match op {
            "add" | "sub" | "mul" => {
                self.around(i, half_float::binary(op, half).ok_or(unknown)?, ty, 2, flush, &after)?;
                Ok(plain)
            }
            "fma" => {
                self.around(i, half_float::fma(half), ty, 3, flush, &after)?;
                Ok(fused)
            }
            "min" | "max" => {
                let f = half_float::min_max(op == "max", i.has("NaN"), i.has("xorsign"), half);
                self.around(i, f, ty, 2, flush, &[])?;
                Ok(plain)
            }
            "abs" | "neg" => {
                self.around(i, half_float::sign(op, half).ok_or(unknown)?, ty, 1, flush, &[])?;
                Ok(plain)
            }
            "ex2" | "tanh" => {
                self.around(i, half_float::approximate(op, half).ok_or(unknown)?, ty, 1, flush, &after)?;
                Ok(Class::Special)
            }
            _ => Err(unknown),
        }
    }

    /// `add.f32.f16 d, a, c` and `fma.f32.bf16`: narrow operands widened exactly, one f32 operation.
    fn mixed(&mut self, i: &'m Instruction, ty: Type, narrow: Type) -> Result<Class, Error> {
        let op = i.opcode[0].as_str();
        if ty != Type::F32 || Half::of(narrow).is_none_or(|h| h.packed) {
            return Err(self.unknown(i));
        }
        let widen = crate::lanes::convert::direct(narrow, Type::F32).ok_or_else(|| self.unknown(i))?;
        let n = if op == "fma" { 2 } else { 1 };
        let mut regs = Vec::new();
        for k in 0..n {
            let a = self.source_at(i, k + 1, narrow)?;
            let temp = self.temp(false);
            self.lane(widen, temp, &[a], false);
            regs.push(temp);
        }
        regs.push(self.source_at(i, n + 1, ty)?);
        let f = match rounding(i) {
            Rounding::Nearest if op == "fma" => Some(float::fma32(false, i.has("sat"))),
            Rounding::Nearest => float::binary32(op, false, i.has("sat")),
            direction => float::rounded32(op, direction),
        };
        let d = self.dest_at(i, 0, ty)?;
        let f = f.ok_or_else(|| self.unknown(i))?;
        self.lane(f, d.reg, &regs, false);
        self.finish(d)?;
        Ok(if op == "fma" { Class::Fma32 } else { Class::Float32 })
    }
}
