//! Instructions: guard, opcode with its modifiers, operands.

use super::Error;
use super::ast::{Instruction, Operand};
use super::lexer::Token;
use super::parser::Parser;
use super::scope::{Binding, COMPONENTS, Scopes};

impl<'t> Parser<'t> {
    /// Parses one instruction; the cursor stands on its guard or opcode.
    pub fn instruction(&mut self, scopes: &mut Scopes, source: (u32, u32)) -> Result<Instruction, Error> {
        let mut guard = None;
        if self.eat('@') {
            let negated = self.eat('!');
            let name = self.name()?;
            match scopes.resolve(name) {
                Some(Binding::Reg(id)) => guard = Some((id, negated)),
                _ => return Err(self.error(format!("guard `{name}` is not a declared predicate"))),
            }
        }
        let line = self.line();
        let mut opcode = vec![self.name()?.to_string()];
        while let Token::Dot(part) = *self.peek() {
            self.next();
            opcode.push(part.to_string());
        }
        let is_call = opcode[0] == "call";
        let mut operands = Vec::new();
        while !self.eat(';') {
            if !operands.is_empty() {
                self.expect(',')?;
            }
            operands.push(self.operand(scopes, is_call, 0)?);
        }
        Ok(Instruction { guard, opcode, operands, line, source })
    }

    fn operand(&mut self, scopes: &mut Scopes, is_call: bool, depth: u32) -> Result<Operand, Error> {
        if depth > 8 {
            return Err(self.error("operands nested too deep"));
        }
        let first = match *self.peek() {
            Token::Punct('(') if is_call => {
                self.next();
                return Ok(Operand::List(self.sequence(scopes, ')', depth)?));
            }
            Token::Punct('{') => {
                self.next();
                Operand::Vector(self.sequence(scopes, '}', depth)?)
            }
            Token::Punct('[') => {
                self.next();
                self.memory(scopes, depth)?
            }
            Token::Punct('!') if matches!(self.peek_at(1), (Token::Name(n), _) if *n != "WARP_SZ") => {
                self.next();
                let name = self.name()?;
                match scopes.resolve(name) {
                    Some(Binding::Reg(id)) => Operand::NotReg(id),
                    _ => return Err(self.error(format!("`{name}` after `!` is not a declared predicate"))),
                }
            }
            Token::Punct('-') if matches!(self.peek_at(1).0, Token::F32(_) | Token::F64(_)) => {
                self.next();
                match self.next() {
                    Token::F32(bits) => Operand::F32(bits ^ 1 << 31),
                    Token::F64(bits) => Operand::F64(bits ^ 1 << 63),
                    _ => return Err(self.error("a number is missing after `-`")),
                }
            }
            Token::F32(bits) => {
                self.next();
                Operand::F32(bits)
            }
            Token::F64(bits) => {
                self.next();
                Operand::F64(bits)
            }
            Token::Name(name) if name != "WARP_SZ" => {
                self.next();
                self.named(scopes, name)?
            }
            _ => Operand::Int(self.constant()?),
        };
        if matches!(self.peek(), Token::Punct('|')) {
            self.next();
            let second = self.operand(scopes, false, depth + 1)?;
            return Ok(Operand::Pair(Box::new(first), Box::new(second)));
        }
        Ok(first)
    }

    fn sequence(&mut self, scopes: &mut Scopes, end: char, depth: u32) -> Result<Vec<Operand>, Error> {
        let mut all = Vec::new();
        while !self.eat(end) {
            if !all.is_empty() {
                self.expect(',')?;
            }
            all.push(self.operand(scopes, false, depth + 1)?);
        }
        Ok(all)
    }

    /// A register, special register, variable, symbol or label, with the offset that addresses may carry.
    fn named(&mut self, scopes: &mut Scopes, name: &'t str) -> Result<Operand, Error> {
        if name == "_" {
            return Ok(Operand::Sink);
        }
        match scopes.resolve(name) {
            Some(Binding::Reg(id)) => Ok(Operand::Reg(id)),
            Some(Binding::Vector(ids)) => {
                if let Token::Dot(part) = *self.peek() {
                    self.next();
                    let part = match part {
                        "r" => "x",
                        "g" => "y",
                        "b" => "z",
                        "a" => "w",
                        other => other,
                    };
                    let index = COMPONENTS.iter().position(|c| *c == part).and_then(|i| ids.get(i));
                    return index.map(|id| Operand::Reg(*id)).ok_or_else(|| self.error("no such vector component"));
                }
                Ok(Operand::Vector(ids.into_iter().map(Operand::Reg).collect()))
            }
            Some(Binding::Var(id)) => Ok(Operand::Var(id, self.offset()?)),
            None if name.starts_with('%') => {
                if let Token::Dot(part) = *self.peek() {
                    self.next();
                    return Ok(Operand::Special(format!("{name}.{part}")));
                }
                Ok(Operand::Special(name.to_string()))
            }
            None if self.is_module_name(name) => Ok(Operand::Symbol(name.to_string(), self.offset()?)),
            None => Ok(Operand::Label(scopes.refer_label(name, self.line()))),
        }
    }

    fn offset(&mut self) -> Result<i64, Error> {
        match self.peek() {
            Token::Punct('+') => {
                self.next();
                self.constant()
            }
            Token::Punct('-') => self.constant(),
            _ => Ok(0),
        }
    }

    fn memory(&mut self, scopes: &mut Scopes, depth: u32) -> Result<Operand, Error> {
        let base = match *self.peek() {
            Token::Name(name) => {
                self.next();
                self.named(scopes, name)?
            }
            _ => Operand::Int(self.constant()?),
        };
        if self.eat(',') {
            let mut parts = vec![base];
            parts.extend(self.sequence(scopes, ']', depth)?);
            return Ok(Operand::MemoryParts(parts));
        }
        let offset = self.offset()?;
        self.expect(']')?;
        Ok(match base {
            Operand::Var(id, at) => Operand::Memory(Box::new(Operand::Var(id, 0)), at.wrapping_add(offset)),
            Operand::Symbol(name, at) => Operand::Memory(Box::new(Operand::Symbol(name, 0)), at.wrapping_add(offset)),
            Operand::Reg(_) | Operand::Int(_) => Operand::Memory(Box::new(base), offset),
            _ => return Err(self.error("an address must be a register, a variable or a number")),
        })
    }
}
