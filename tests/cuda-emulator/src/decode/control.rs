//! Branches, calls, returns, exits.

use super::builder::Builder;
use crate::lanes::logic;
use crate::program::{
    Address, Call, CallTarget, Class, CopyLocal, Load, Op, Order, RuntimeCall, RuntimeFunction, Store,
};
use crate::ptx::Error;
use crate::ptx::ast::{Instruction, Operand, Variable};
use crate::ptx::types::{Space, Type};

impl<'m> Builder<'m> {
    /// `bra`, `brx`, `call`, `ret`, `exit`, `trap`, `brkpt`.
    pub fn control(&mut self, i: &'m Instruction) -> Result<Class, Error> {
        match i.opcode[0].as_str() {
            "bra" => {
                let labels = self.table(i)?;
                self.branch(labels[0]);
            }
            "brx" => {
                let index = self.source_at(i, 0, Type::U32)?;
                let labels = self.table(i)?;
                self.branch_indexed(index, &labels);
            }
            "call" => self.call(i)?,
            "ret" => self.leave(),
            "exit" => self.emit(Op::Exit),
            "trap" => self.emit(Op::Trap),
            _ => self.emit(Op::Nop),
        }
        Ok(Class::Control)
    }

    /// Return from the present function, or the end of the kernel's threads.
    pub fn leave(&mut self) {
        if self.function.is_entry {
            self.emit(Op::Exit);
            return;
        }
        let function = self.function;
        let returns = self.program.functions[self.function_index].returns.clone();
        for (register, (at, _)) in function.return_registers.iter().zip(returns) {
            if let Some(id) = register {
                self.local_store(*id, at);
            }
        }
        self.emit(Op::Return { function: self.function_index as u32 });
    }

    fn local_store(&mut self, id: u32, at: u32) {
        let (reg, wide) = (self.slot(id), self.is_wide(id));
        let address = Address { base: None, wide: true, offset: i64::from(at) };
        let size = self.type_of(id).bytes();
        self.emit(Op::Store(Box::new(Store {
            address,
            space: Space::Local,
            size,
            source: vec![(reg, wide)],
            order: Order::Weak,
        })));
    }

    fn local_load(&mut self, id: u32, at: u32) {
        let (reg, wide) = (self.slot(id), self.is_wide(id));
        let address = Address { base: None, wide: true, offset: i64::from(at) };
        let size = self.type_of(id).bytes();
        let load = Load {
            address,
            space: Space::Local,
            size,
            signed: false,
            dest: vec![Some((reg, wide))],
            order: Order::Weak,
        };
        self.emit(Op::Load(Box::new(load)));
    }

    /// Parameters that are registers (`.func (.reg ...)`) are filled at the function's entry.
    pub fn load_register_params(&mut self, index: usize) -> Result<(), Error> {
        let function = &self.module.functions[index];
        if function.is_entry {
            return Ok(());
        }
        for (register, (at, _)) in function.param_registers.iter().zip(self.program.functions[index].params.clone()) {
            if let Some(id) = register {
                self.local_load(*id, at);
            }
        }
        Ok(())
    }

    /// The place of a call's argument or result in local memory; registers and constants go through a place of their own.
    fn argument(
        &mut self,
        i: &Instruction,
        operand: &Operand,
        like: Option<&Variable>,
        scratch: u32,
    ) -> Result<(u32, u32), Error> {
        match operand {
            Operand::Var(id, 0) => {
                let bytes = self.function.variables[*id as usize].bytes as u32;
                match self.address_value(operand)? {
                    (Space::Local, at) => Ok((at as u32, bytes)),
                    _ => Err(self.error("an argument must be a `.param` variable of the caller")),
                }
            }
            Operand::Reg(_) | Operand::Int(_) | Operand::F32(_) | Operand::F64(_) => {
                let bytes = like.map_or(8, |v| v.bytes as u32).clamp(1, 8);
                let ty = match bytes {
                    8 => Type::B64,
                    4 => Type::B32,
                    2 => Type::B16,
                    _ => Type::B8,
                };
                let reg = self.source(operand, ty)?;
                let held = self.temp(bytes == 8);
                self.lane(logic::copy(bytes == 8), held, &[reg], bytes == 8);
                let address = Address { base: None, wide: true, offset: i64::from(scratch) };
                let store = Store {
                    address,
                    space: Space::Local,
                    size: bytes,
                    source: vec![(held, bytes == 8)],
                    order: Order::Weak,
                };
                self.emit(Op::Store(Box::new(store)));
                Ok((scratch, bytes))
            }
            _ => Err(self.unknown(i)),
        }
    }

    fn call(&mut self, i: &'m Instruction) -> Result<(), Error> {
        let position = i.operands.iter().position(|o| !matches!(o, Operand::List(_))).ok_or_else(|| self.unknown(i))?;
        let empty: &[Operand] = &[];
        let list = |n: usize| match i.operands.get(n) {
            Some(Operand::List(all)) => all.as_slice(),
            _ => empty,
        };
        let results = if position == 1 { list(0) } else { empty };
        let arguments = list(position + 1);
        let callee = match &i.operands[position] {
            Operand::Symbol(name, 0) => self.module.functions.iter().enumerate().find(|(_, f)| f.name == *name),
            Operand::Reg(_) => None,
            _ => return Err(self.unknown(i)),
        };
        // Arguments that are registers are stored to the function's own parameters: the copy of the call is then empty.
        let scratch = self.program.return_buffer;
        let mut places = Vec::new();
        for (n, argument) in arguments.iter().enumerate() {
            let own = callee.and_then(|(c, _)| self.program.functions[c].params.get(n)).map(|p| p.0);
            if own.is_none() && !matches!(argument, Operand::Var(..)) {
                return Err(self.error("register arguments of a call by address are not supported"));
            }
            let like = callee.and_then(|(_, f)| f.params.get(n));
            places.push(self.argument(i, argument, like, own.unwrap_or(scratch))?);
        }
        let runtime = match callee {
            Some((_, f)) if f.body.is_none() => match f.name.as_str() {
                "vprintf" => Some(RuntimeFunction::Printf),
                "__assertfail" => Some(RuntimeFunction::AssertFail),
                other => return Err(self.error(format!("call of `{other}`, which is declared and not defined"))),
            },
            _ => None,
        };
        if let Some(function) = runtime {
            let result = match results.first() {
                Some(result) => Some(self.argument(i, result, None, scratch)?.0),
                None => None,
            };
            let arguments = places.into_iter().map(|(at, _)| at).collect();
            self.emit(Op::Runtime(Box::new(RuntimeCall { function, arguments, result })));
            return Ok(());
        }
        let target = match (&i.operands[position], callee) {
            (_, Some((index, _))) => CallTarget::Direct(index as u32),
            (operand, None) => CallTarget::Indirect(self.source(operand, Type::U64)?),
        };
        self.emit(Op::Call(Box::new(Call { target, arguments: places })));
        let mut from = scratch;
        for result in results {
            match result {
                Operand::Var(id, 0) => {
                    let bytes = self.function.variables[*id as usize].bytes as u32;
                    let (_, to) = self.address_value(result)?;
                    self.emit(Op::CopyLocal(Box::new(CopyLocal { from, to: to as u32, bytes })));
                    from += bytes.next_multiple_of(16);
                }
                Operand::Reg(id) => {
                    self.local_load(*id, from);
                    from += 16;
                }
                Operand::Sink => from += 16,
                _ => return Err(self.unknown(i)),
            }
        }
        Ok(())
    }
}
