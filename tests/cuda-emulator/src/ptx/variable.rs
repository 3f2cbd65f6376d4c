//! Variables: their types, alignments, arrays and initial values.

use super::Error;
use super::ast::{Relocation, Variable};
use super::lexer::Token;
use super::parser::Parser;
use super::types::{Space, Type};

/// Largest variable that a module may declare; larger is a malformed text, not a program.
const MAX_VARIABLE_BYTES: u64 = 1 << 36;

impl<'t> Parser<'t> {
    /// Variables after their space: `.align 4 .b8 name[16] = {...}, other;`
    pub(super) fn variables(&mut self, space: Space, is_extern: bool) -> Result<Vec<Variable>, Error> {
        let mut all = Vec::new();
        let (align, ty, width) = self.variable_type()?;
        loop {
            all.push(self.variable(space, is_extern, align, ty, width)?);
            if !self.eat(',') {
                break;
            }
        }
        self.expect(';')?;
        Ok(all)
    }

    /// `.align n`, `.v4`, `.ptr ...` and the type, in any order.
    pub(super) fn variable_type(&mut self) -> Result<(u32, Type, u32), Error> {
        let (mut align, mut ty, mut width, mut is_pointer) = (0, None, 1, false);
        while let Token::Dot(d) = *self.peek() {
            self.next();
            match d {
                // After `.ptr` the alignment is that of the memory pointed to.
                "align" => {
                    let n = self.int()?;
                    align = if is_pointer { align } else { n };
                }
                "v2" => width = 2,
                "v4" => width = 4,
                "ptr" | "global" | "const" | "shared" | "local" | "attribute" => {
                    is_pointer |= d == "ptr";
                    if d == "attribute" && self.eat('(') {
                        while !self.eat(')') {
                            if self.next() == Token::End {
                                return Err(self.error("the text ends inside `.attribute`"));
                            }
                        }
                    }
                }
                // Handles of textures are 64-bit values; only their size matters to a parameter list.
                "texref" | "samplerref" | "surfref" => ty = Some(Type::B64),
                _ => match Type::parse(d) {
                    Some(t) => ty = Some(t),
                    None => return Err(self.error(format!("`.{d}` is no type"))),
                },
            }
        }
        let ty = ty.ok_or_else(|| self.error("a declaration without a type"))?;
        if !align.is_power_of_two() && align != 0 {
            return Err(self.error(format!("alignment {align} is not a power of two")));
        }
        Ok((align.max(ty.bytes() * width).min(if align > 0 { align } else { 1 << 20 }), ty, width))
    }

    pub(super) fn variable(
        &mut self,
        space: Space,
        is_extern: bool,
        align: u32,
        ty: Type,
        width: u32,
    ) -> Result<Variable, Error> {
        let name = self.name()?.to_string();
        let mut bytes = u64::from(ty.bytes() * width);
        while self.eat('[') {
            if self.eat(']') {
                bytes = 0;
                continue;
            }
            let n = self.constant()?;
            let n = u64::try_from(n).map_err(|_| self.error("a negative array size"))?;
            bytes = bytes.checked_mul(n).ok_or_else(|| self.error("an array beyond the address space"))?;
            self.expect(']')?;
        }
        let mut variable = Variable { name, space, align, bytes, init: vec![], relocations: vec![], is_extern };
        if self.eat('=') {
            self.initializer(&mut variable, ty, 0)?;
            variable.bytes = variable.bytes.max(variable.init.len() as u64);
        }
        if variable.bytes > MAX_VARIABLE_BYTES {
            return Err(self.error(format!("variable `{}` is larger than 64 GiB", variable.name)));
        }
        Ok(variable)
    }

    fn initializer(&mut self, variable: &mut Variable, ty: Type, depth: u32) -> Result<(), Error> {
        if depth > 16 {
            return Err(self.error("an initial value nested too deep"));
        }
        if self.eat('{') {
            while !self.eat('}') {
                self.initializer(variable, ty, depth + 1)?;
                if !self.eat(',') {
                    self.expect('}')?;
                    break;
                }
            }
            return Ok(());
        }
        let size = ty.bytes() as usize;
        let negative =
            matches!(self.peek(), Token::Punct('-')) && matches!(self.peek_at(1).0, Token::F32(_) | Token::F64(_));
        if negative {
            self.next();
        }
        let value = match *self.peek() {
            Token::F32(bits) => {
                self.next();
                if ty == Type::F64 { f64::from(f32::from_bits(bits)).to_bits() } else { u64::from(bits) }
            }
            Token::F64(bits) => {
                self.next();
                if ty == Type::F64 { bits } else { u64::from((f64::from_bits(bits) as f32).to_bits()) }
            }
            Token::Name(name) if name != "WARP_SZ" => {
                self.next();
                let symbol = if name == "generic" && self.eat('(') {
                    let inner = self.name()?;
                    let addend = if matches!(self.peek(), Token::Punct('+' | '-')) { self.constant()? } else { 0 };
                    self.expect(')')?;
                    (inner, addend)
                } else {
                    (name, 0)
                };
                let addend = if matches!(self.peek(), Token::Punct('+' | '-')) { self.constant()? } else { 0 };
                variable.relocations.push(Relocation {
                    offset: variable.init.len() as u64,
                    bytes: size as u32,
                    symbol: symbol.0.to_string(),
                    addend: symbol.1.wrapping_add(addend),
                });
                0
            }
            _ => {
                let v = self.constant()?;
                match ty {
                    Type::F32 => u64::from((v as f32).to_bits()),
                    Type::F64 => (v as f64).to_bits(),
                    _ => v as u64,
                }
            }
        };
        let value = if negative { value ^ 1 << (size * 8 - 1).min(63) } else { value };
        variable.init.extend_from_slice(&value.to_le_bytes()[..size.min(8)]);
        Ok(())
    }
}
