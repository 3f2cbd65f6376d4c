//! Integer arithmetic, logic, comparisons and selections.

use super::builder::Builder;
use crate::lanes::half_float::Half;
use crate::lanes::{LaneFn, compare, integer, logic, video};
use crate::program::{BoolOp, Class, CompareOut, Op, Pred, Reg};
use crate::ptx::Error;
use crate::ptx::ast::{Instruction, Operand};
use crate::ptx::types::Type;

impl<'m> Builder<'m> {
    /// Emits `d = f(sources)` with the operands after the first, all of `ty` unless given.
    pub fn simple(&mut self, i: &Instruction, f: Option<LaneFn>, d: Type, sources: &[Type]) -> Result<(), Error> {
        let f = f.ok_or_else(|| self.unknown(i))?;
        let mut regs = Vec::with_capacity(3);
        for (n, ty) in sources.iter().enumerate() {
            regs.push(self.source_at(i, n + 1, *ty)?);
        }
        let d = self.dest_at(i, 0, d)?;
        self.lane(f, d.reg, &regs, d.wide);
        self.finish(d)
    }

    /// Integer arithmetic and bit operations.
    pub fn integer_arithmetic(&mut self, i: &'m Instruction) -> Result<Class, Error> {
        let op = i.opcode[0].as_str();
        let types = i.types();
        let ty = *types.last().ok_or_else(|| self.unknown(i))?;
        if i.has("cc") {
            return self.carry_arithmetic(i);
        }
        let u32s = Type::U32;
        match op {
            "min" | "max" if i.has("relu") => {
                let packed = matches!(ty, Type::U16x2 | Type::S16x2);
                let pick = |op| if packed { video::packed(op, ty) } else { integer::binary(op, ty) };
                self.simple(i, pick(op), ty, &[ty; 2])?;
                let Operand::Reg(d) = self.operand_at(i, 0)? else { return Err(self.unknown(i)) };
                let (d, zero) = (self.slot(*d), self.constant(0, false));
                let max = pick("max").ok_or_else(|| self.unknown(i))?;
                self.lane(max, d, &[d, zero], false);
            }
            "add" | "sub" | "min" | "max" if matches!(ty, Type::U16x2 | Type::S16x2) => {
                self.simple(i, video::packed(op, ty), ty, &[ty; 2])?;
            }
            "add" | "sub" => {
                let name = if i.has("sat") { format!("{op}.sat") } else { op.to_string() };
                self.simple(i, integer::binary(&name, ty), ty, &[ty; 2])?;
            }
            "div" | "rem" | "min" | "max" => self.simple(i, integer::binary(op, ty), ty, &[ty; 2])?,
            "mul" if i.has("wide") => self.simple(i, integer::mul_wide(ty), double(ty), &[ty; 2])?,
            "mul" => {
                let name = if i.has("hi") { "mul.hi" } else { "mul.lo" };
                self.simple(i, integer::binary(name, ty), ty, &[ty; 2])?;
            }
            "mad" if i.has("wide") => self.simple(i, integer::mad_wide(ty), double(ty), &[ty, ty, double(ty)])?,
            "mad" => {
                let name = match (i.has("hi"), i.has("sat")) {
                    (true, true) => "mad.hi.sat",
                    (true, false) => "mad.hi",
                    _ => "mad.lo",
                };
                self.simple(i, integer::ternary(name, ty), ty, &[ty; 3])?;
            }
            "mul24" => {
                self.simple(i, integer::binary(if i.has("hi") { "mul24.hi" } else { "mul24.lo" }, ty), ty, &[ty; 2])?
            }
            "mad24" => {
                let name = if i.has("hi") { "mul24.hi" } else { "mul24.lo" };
                let product = self.temp(false);
                let (a, b, c) = (self.source_at(i, 1, ty)?, self.source_at(i, 2, ty)?, self.source_at(i, 3, ty)?);
                let f = integer::binary(name, ty).ok_or_else(|| self.unknown(i))?;
                self.lane(f, product, &[a, b], false);
                let d = self.dest_at(i, 0, ty)?;
                let add = if i.has("sat") { "add.sat" } else { "add" };
                let f = integer::binary(add, ty).ok_or_else(|| self.unknown(i))?;
                self.lane(f, d.reg, &[product, c], false);
            }
            "sad" => self.simple(i, integer::ternary(op, ty), ty, &[ty; 3])?,
            "abs" | "neg" => self.simple(i, integer::unary(op, ty), ty, &[ty])?,
            "popc" | "clz" => self.simple(i, logic::unary(op, ty), u32s, &[ty])?,
            "brev" => self.simple(i, logic::unary(op, ty), ty, &[ty])?,
            "bfind" => self.simple(i, logic::find_highest(ty, i.has("shiftamt")), u32s, &[ty])?,
            "bfe" => self.simple(i, logic::field_extract(ty), ty, &[ty, u32s, u32s])?,
            "bfi" => {
                let wide = ty.bytes() == 8;
                let (a, b) = (self.source_at(i, 1, ty)?, self.source_at(i, 2, ty)?);
                let (pos, len) = (self.source_at(i, 3, u32s)?, self.source_at(i, 4, u32s)?);
                let field = self.temp(false);
                self.lane(logic::field_pack(), field, &[pos, len], false);
                let d = self.dest_at(i, 0, ty)?;
                self.lane(logic::field_insert(wide), d.reg, &[a, b, field], wide);
                self.finish(d)?;
            }
            "bmsk" => self.simple(i, Some(logic::bit_mask(i.has("wrap"))), u32s, &[u32s; 2])?,
            "szext" => self.simple(i, Some(logic::extend(ty.is_signed(), i.has("wrap"))), ty, &[ty, u32s])?,
            "fns" => self.simple(i, Some(logic::find_nth()), u32s, &[u32s; 3])?,
            "prmt" => {
                let mode = i.opcode.get(2).map_or("", String::as_str);
                self.simple(i, logic::permute(mode), u32s, &[u32s; 3])?;
            }
            "shf" => self.simple(i, Some(logic::funnel(i.has("l"), i.has("wrap"))), u32s, &[u32s; 3])?,
            "shl" | "shr" => self.simple(i, integer::shift(op, ty), ty, &[ty, u32s])?,
            "dp4a" | "dp2a" => {
                let [a, b] = types[..] else { return Err(self.unknown(i)) };
                let f = if op == "dp4a" { video::dp4a(a, b) } else { video::dp2a(a, b, i.has("hi")) };
                self.simple(i, f, u32s, &[u32s; 3])?;
            }
            _ if op.starts_with('v') => self.simd_video(i)?,
            _ => return Err(self.unknown(i)),
        }
        Ok(Class::Integer)
    }

    /// `vadd4`, `vabsdiff2` and their like, on whole registers: no selectors, no masks, so `c` counts with `.add` only.
    fn simd_video(&mut self, i: &'m Instruction) -> Result<(), Error> {
        let (stem, width) = i.opcode[0].split_at(i.opcode[0].len() - 1);
        let op = video::SIMD_OPS.iter().position(|o| *o == stem).ok_or_else(|| self.unknown(i))?;
        let [d, a, b] = i.types()[..] else { return Err(self.unknown(i)) };
        let control = video::Simd {
            op: op as u32,
            bytes: width == "4",
            signed: [a, b, d].map(Type::is_signed),
            saturate: i.has("sat"),
            sum: i.has("add"),
        };
        let (x, y, c) = (self.source_at(i, 1, a)?, self.source_at(i, 2, b)?, self.source_at(i, 3, d)?);
        let (result, bits) = (self.temp(false), self.constant(u64::from(control.bits()), false));
        self.lane(video::simd(), result, &[x, y, bits], false);
        let to = self.dest_at(i, 0, d)?;
        if control.sum {
            let add = integer::binary("add", d).ok_or_else(|| self.unknown(i))?;
            self.lane(add, to.reg, &[result, c], false);
        } else {
            self.copy(to.reg, result, false);
        }
        self.finish(to)
    }

    /// `add.cc`, `addc`, `sub.cc`, `subc`, `mad.cc`, `madc`: the carry flag is a hidden register. A subtraction adds the
    /// complement, so that its flag is 1 where there was no borrow; the manual leaves that open, but the division of 128-bit
    /// integers that nvcc emits has `addc` read the flag of a `subc.cc`.
    pub fn carry_arithmetic(&mut self, i: &'m Instruction) -> Result<Class, Error> {
        let ty = *i.types().last().ok_or_else(|| self.unknown(i))?;
        let wide = ty.bytes() == 8;
        let op = i.opcode[0].as_str();
        let flag = self.carry();
        let subtract = op.starts_with("sub");
        let carry_in = if op.ends_with('c') { flag } else { self.constant(u64::from(subtract), false) };
        let (mut a, mut b) = (self.source_at(i, 1, ty)?, self.source_at(i, 2, ty)?);
        if op.starts_with("mad") {
            let name = if i.has("hi") { "mul.hi" } else { "mul.lo" };
            let product = self.temp(wide);
            let f = integer::binary(name, ty).ok_or_else(|| self.unknown(i))?;
            self.lane(f, product, &[a, b], wide);
            (a, b) = (product, self.source_at(i, 3, ty)?);
        }
        let (value, out) = if subtract {
            (integer::sub_carry(wide), integer::sub_carry_out(wide))
        } else {
            (integer::add_carry(wide), integer::add_carry_out(wide))
        };
        let new_flag = self.temp(false);
        if i.has("cc") {
            self.lane(out, new_flag, &[a, b, carry_in], false);
        }
        let d = self.dest_at(i, 0, ty)?;
        self.lane(value, d.reg, &[a, b, carry_in], wide);
        if i.has("cc") {
            self.copy(flag, new_flag, false);
        }
        self.finish(d)?;
        Ok(Class::Integer)
    }

    /// `and`, `or`, `xor`, `not`, `cnot`, `lop3`.
    pub fn logic(&mut self, i: &'m Instruction) -> Result<Class, Error> {
        let op = i.opcode[0].as_str();
        let ty = *i.types().last().ok_or_else(|| self.unknown(i))?;
        if op == "lop3" {
            return self.lop3(i);
        }
        if ty == Type::Pred {
            let to = self.operand_at(i, 0)?;
            let d = self.pred_dest(to)?;
            let from = self.operand_at(i, 1)?;
            let a = self.pred_source(from)?;
            if op == "not" {
                self.emit(Op::Logic { op: BoolOp::Xor, d, a, b: Pred::NONE });
                return Ok(Class::Integer);
            }
            let from = self.operand_at(i, 2)?;
            let b = self.pred_source(from)?;
            let op = bool_op(op).ok_or_else(|| self.unknown(i))?;
            self.emit(Op::Logic { op, d, a, b });
            return Ok(Class::Integer);
        }
        match op {
            "not" | "cnot" => self.simple(i, logic::unary(op, ty), ty, &[ty])?,
            _ => self.simple(i, logic::binary(op, ty.bytes() == 8), ty, &[ty; 2])?,
        }
        Ok(Class::Integer)
    }

    fn lop3(&mut self, i: &'m Instruction) -> Result<Class, Error> {
        let b32 = Type::B32;
        let (a, b, c) = (self.source_at(i, 1, b32)?, self.source_at(i, 2, b32)?, self.source_at(i, 3, b32)?);
        let Operand::Int(table) = self.operand_at(i, 4)? else { return Err(self.unknown(i)) };
        let table = *table as u8;
        let Operand::Pair(value, pred) = self.operand_at(i, 0)? else {
            let d = self.dest_at(i, 0, b32)?;
            self.emit(Op::Lop3 { table, d: d.reg, a, b, c });
            self.finish(d)?;
            return Ok(Class::Integer);
        };
        // lop3.BoolOp.b32 d|p, a, b, c, table, q: p = (d != 0) op q
        let op = i.opcode.get(1).and_then(|m| bool_op(m)).ok_or_else(|| self.unknown(i))?;
        let d = self.dest(value, b32)?;
        self.emit(Op::Lop3 { table, d: d.reg, a, b, c });
        let from = self.operand_at(i, 5)?;
        let (p, q) = (self.pred_dest(pred)?, self.pred_source(from)?);
        let nonzero = self.temp_pred();
        self.emit(Op::NonZero { d: nonzero, a: d.reg });
        self.emit(Op::Logic { op, d: p, a: nonzero, b: q });
        Ok(Class::Integer)
    }

    /// `setp`, `set`, `selp`, `slct`.
    pub fn compare(&mut self, i: &'m Instruction) -> Result<Class, Error> {
        let types = i.types();
        let ty = *types.last().ok_or_else(|| self.unknown(i))?;
        match i.opcode[0].as_str() {
            "selp" => {
                let (a, b) = (self.source_at(i, 1, ty)?, self.source_at(i, 2, ty)?);
                let from = self.operand_at(i, 3)?;
                let p = self.pred_source(from)?;
                let d = self.dest_at(i, 0, ty)?;
                self.emit(Op::Select { d: d.reg, a, b, p, wide: d.wide });
                self.finish(d)?;
                return Ok(Class::Compare);
            }
            "slct" => {
                let [value, sign] = types[..] else { return Err(self.unknown(i)) };
                let f = logic::select_by_sign(value.bytes() == 8, sign == Type::F32);
                self.simple(i, Some(f), value, &[value, value, sign])?;
                return Ok(Class::Compare);
            }
            _ => {}
        }
        let op = i.opcode.get(1).cloned().unwrap_or_default();
        let combine = i.opcode.get(2).and_then(|m| bool_op(m));
        let with = match combine {
            Some(op) => {
                let from = self.operand_at(i, 3)?;
                Some((op, self.pred_source(from)?))
            }
            None => None,
        };
        let halves = Half::of(ty).filter(|h| h.packed);
        if i.opcode[0] == "setp" {
            let to = self.operand_at(i, 0)?;
            let (p, q) = match to {
                Operand::Pair(p, q) => (self.pred_dest(p)?, self.pred_dest(q)?),
                one => (self.pred_dest(one)?, Pred::NONE),
            };
            if halves.is_some() {
                for (high, p) in [(false, p), (true, q)] {
                    self.compare_half(i, &op, ty, high, p, with)?;
                }
            } else {
                self.compare_into(i, &op, ty, CompareOut { p, q, with })?;
            }
            return Ok(Class::Compare);
        }
        // set: all ones or 1.0 where true, zero elsewhere
        let d_ty = types[0];
        let one = match d_ty {
            Type::F32 => u64::from(1f32.to_bits()),
            Type::F16 | Type::F16x2 => 0x3c00,
            Type::BF16 | Type::BF16x2 => 0x3f80,
            _ if d_ty.bytes() == 2 || halves.is_some() => 0xffff,
            _ => 0xffff_ffff,
        };
        let (one, zero) = (self.constant(one, false), self.constant(0, false));
        let select = |b: &mut Self, high: bool| -> Result<Reg, Error> {
            let p = b.temp_pred();
            if halves.is_some() {
                b.compare_half(i, &op, ty, high, p, with)?;
            } else {
                b.compare_into(i, &op, ty, CompareOut { p, q: Pred::NONE, with })?;
            }
            let value = b.temp(false);
            b.emit(Op::Select { d: value, a: one, b: zero, p, wide: false });
            Ok(value)
        };
        let low = select(self, false)?;
        let d = self.dest_at(i, 0, d_ty)?;
        if halves.is_some() {
            let high = select(self, true)?;
            self.lane(logic::join32(), d.reg, &[low, high], false);
        } else {
            self.copy(d.reg, low, false);
        }
        self.finish(d)?;
        Ok(Class::Compare)
    }

    fn compare_into(&mut self, i: &Instruction, op: &str, ty: Type, out: CompareOut) -> Result<(), Error> {
        let f = compare::pick(op, ty, i.has("ftz")).ok_or_else(|| self.unknown(i))?;
        let (a, b) = (self.source_at(i, 1, ty)?, self.source_at(i, 2, ty)?);
        self.emit(Op::Compare { f, a, b, out: Box::new(out) });
        Ok(())
    }

    fn compare_half(
        &mut self,
        i: &Instruction,
        op: &str,
        ty: Type,
        high: bool,
        p: Pred,
        with: Option<(BoolOp, Pred)>,
    ) -> Result<(), Error> {
        let scalar = if matches!(ty, Type::F16x2) { Type::F16 } else { Type::BF16 };
        let f = compare::pick(op, scalar, i.has("ftz")).ok_or_else(|| self.unknown(i))?;
        let (a, b) = (self.source_at(i, 1, ty)?, self.source_at(i, 2, ty)?);
        let (x, y) = (self.temp(false), self.temp(false));
        self.lane(logic::half32(high), x, &[a], false);
        self.lane(logic::half32(high), y, &[b], false);
        self.emit(Op::Compare { f, a: x, b: y, out: Box::new(CompareOut { p, q: Pred::NONE, with }) });
        Ok(())
    }
}

/// The operator of a name.
pub fn bool_op(name: &str) -> Option<BoolOp> {
    match name {
        "and" => Some(BoolOp::And),
        "or" => Some(BoolOp::Or),
        "xor" => Some(BoolOp::Xor),
        _ => None,
    }
}

/// The type of twice the width.
fn double(ty: Type) -> Type {
    match ty {
        Type::U16 => Type::U32,
        Type::S16 => Type::S32,
        Type::U32 => Type::U64,
        _ => Type::S64,
    }
}
