//! What is known while a kernel is decoded: slots of registers, constants, places of variables, code so far.

use std::collections::HashMap;

use super::blocks::{self, Blocks};
use super::layout::{self, Arena, Place};
use crate::lanes::{LaneFn, logic};
use crate::memory::layout as windows;
use crate::program::{Class, FunctionInfo, Inst, Op, Pred, Program, Reg, Slot, Special};
use crate::ptx::Error;
use crate::ptx::ast::{Function, Instruction, Module, Operand};
use crate::ptx::types::{Space, Type};

/// A branch whose target is a block that has no place yet.
struct Fixup {
    code: usize,
    entry: usize,
    block: usize,
}

/// The state of decoding.
pub struct Builder<'m> {
    /// The module.
    pub module: &'m Module,
    pub(super) addresses: &'m HashMap<String, u64>,
    /// What is being written.
    pub program: Program,
    constants: HashMap<(u64, bool), Reg>,
    specials: HashMap<(Special, bool), Reg>,
    pub(super) shared: HashMap<String, u64>,
    /// Slot or predicate number of each register of the present function.
    registers: Vec<u32>,
    /// Places of the present function's variables.
    pub places: Vec<Place>,
    /// The present function.
    pub function: &'m Function,
    /// Its index in the module.
    pub function_index: usize,
    temps: [Vec<Reg>; 2],
    temps_used: [usize; 2],
    temp_preds: Vec<u32>,
    temp_preds_used: usize,
    carry: Option<Reg>,
    /// The present instruction.
    pub line: u32,
    source: (u32, u32),
    /// Guard of what is emitted.
    pub guard: Pred,
    fixups: Vec<Fixup>,
    block_at: Vec<u32>,
}

impl<'m> Builder<'m> {
    /// A builder for one kernel of a module.
    pub fn new(module: &'m Module, addresses: &'m HashMap<String, u64>) -> Self {
        Builder {
            module,
            addresses,
            program: Program { constants: vec![Slot([0; 32]); 4], ..Program::default() },
            constants: HashMap::new(),
            specials: HashMap::new(),
            shared: HashMap::new(),
            registers: Vec::new(),
            places: Vec::new(),
            function: &module.functions[0],
            function_index: 0,
            temps: Default::default(),
            temps_used: [0; 2],
            temp_preds: Vec::new(),
            temp_preds_used: 0,
            carry: None,
            line: 0,
            source: (0, 0),
            guard: Pred::NONE,
            fixups: Vec::new(),
            block_at: Vec::new(),
        }
    }

    /// An error at the present instruction.
    pub fn error(&self, message: impl Into<String>) -> Error {
        Error::new(self.line, message)
    }

    /// The error for an instruction that is not known.
    pub fn unknown(&self, i: &Instruction) -> Error {
        Error::new(i.line, format!("instruction `{}` is not supported with these operands", i.mnemonic()))
    }

    /// Decodes the kernel of a name.
    pub fn kernel(mut self, name: &str) -> Result<Program, Error> {
        let kernel = self.module.functions.iter().position(|f| f.name == name && f.is_entry && f.body.is_some());
        let Some(kernel) = kernel else {
            return Err(Error::new(0, format!("the module has no kernel `{name}`")));
        };
        let function = &self.module.functions[kernel];
        self.program.name = name.to_string();
        self.program.files = self.module.files.clone();
        let product = |d: [u32; 3]| d.iter().fold(1u32, |a, b| a.saturating_mul(*b));
        self.program.max_threads = function.max_threads.map(product);
        self.program.max_registers = function.max_registers;
        self.program.required_threads = function.required_threads;
        self.program.required_cluster = function.required_cluster;
        (self.program.params, self.program.param_bytes) = layout::params(&function.params);
        let param_bytes: u64 = function.params.iter().map(|p| p.bytes + u64::from(p.align)).sum();
        if param_bytes > 1 << 16 {
            return Err(Error::new(function.line, format!("parameters of {param_bytes} bytes: at most 32764")));
        }
        self.program.functions = vec![FunctionInfo::default(); self.module.functions.len()];
        let functions = layout::reachable(self.module, kernel);
        self.place_shared(&functions)?;
        let recursive = layout::recursive(self.module, &functions);
        // Places of all functions first: calls need those of the called.
        let mut local = Arena::default();
        let mut all_places = HashMap::new();
        let mut return_bytes = 0;
        for &index in &functions {
            let places = self.place_local(index, &mut local)?;
            let info = &mut self.program.functions[index];
            info.recursive = recursive.contains(&index);
            return_bytes = return_bytes.max(info.returns.iter().map(|(_, n)| n.next_multiple_of(16)).sum::<u32>());
            all_places.insert(index, places);
        }
        self.program.return_buffer = local.place(u64::from(return_bytes), 16) as u32;
        // Room to read 8 bytes of any argument.
        self.program.local_bytes = (local.used + 8).next_multiple_of(16) as u32;
        if local.used > super::placement::MAX_STATIC {
            return Err(Error::new(
                function.line,
                format!("local memory of {} bytes a thread is too much", local.used),
            ));
        }
        if local.used == 0 {
            self.program.local_bytes = 0;
        }
        for &index in &functions {
            self.places = all_places.remove(&index).unwrap_or_default();
            self.body(index)?;
        }
        Ok(self.program)
    }

    fn body(&mut self, index: usize) -> Result<(), Error> {
        self.function = &self.module.functions[index];
        self.function_index = index;
        let function = self.function;
        let Some(body) = &function.body else { return Ok(()) };
        self.assign_registers(index);
        let blocks = Blocks::of(function, body)?;
        self.block_at = vec![u32::MAX; blocks.blocks.len()];
        let entry = self.program.code.len() as u32;
        self.program.functions[index].entry = entry;
        self.line = function.line;
        self.guard = Pred::NONE;
        self.load_register_params(index)?;
        if blocks.order.first() != Some(&0) {
            return Err(Error::new(function.line, "the entry of a function cannot be ordered first"));
        }
        for (n, &at) in blocks.order.iter().enumerate() {
            let block = &blocks.blocks[at];
            self.block_at[at] = self.program.code.len() as u32;
            for instruction in &body[block.first..block.end] {
                self.instruction(instruction)?;
            }
            if block.end == body.len() && block.falls_to.is_none_or(|b| b == blocks.blocks.len() - 1) {
                let falls = block.first == block.end || block.falls_to.is_some();
                if falls {
                    self.guard = Pred::NONE;
                    self.leave();
                }
                continue;
            }
            if let Some(next) = block.falls_to
                && blocks.order.get(n + 1) != Some(&next)
            {
                self.guard = Pred::NONE;
                self.jump(next);
            }
        }
        let block_of = |at: usize| blocks.blocks.partition_point(|b| b.first < at).min(blocks.blocks.len() - 1);
        for fixup in std::mem::take(&mut self.fixups) {
            let block = if fixup.entry == usize::MAX { fixup.block } else { block_of(function.labels[fixup.block]) };
            let target = self.block_at[block];
            match &mut self.program.code[fixup.code].op {
                Op::Branch(at) => *at = target,
                Op::BranchIndexed { targets, .. } => targets[fixup.entry] = target,
                _ => {}
            }
        }
        Ok(())
    }

    /// Emits a jump to a block by its number.
    fn jump(&mut self, block: usize) {
        self.fixups.push(Fixup { code: self.program.code.len(), entry: usize::MAX, block });
        self.emit(Op::Branch(0));
        self.set_class(Class::Hidden);
    }

    /// Emits a branch to a label.
    pub fn branch(&mut self, label: u32) {
        self.fixups.push(Fixup { code: self.program.code.len(), entry: 0, block: label as usize });
        self.emit(Op::Branch(0));
    }

    /// Emits a branch by a table of labels.
    pub fn branch_indexed(&mut self, index: Reg, labels: &[u32]) {
        let code = self.program.code.len();
        for (entry, label) in labels.iter().enumerate() {
            self.fixups.push(Fixup { code, entry, block: *label as usize });
        }
        self.emit(Op::BranchIndexed { index, targets: vec![0; labels.len()].into() });
    }

    fn assign_registers(&mut self, index: usize) {
        let mut next = self.program.slots;
        let mut pred = self.program.preds;
        let mut numbers = vec![0; self.function.registers.len()];
        let info = &mut self.program.functions[index];
        info.preds.0 = pred;
        info.narrow.0 = next;
        for (n, register) in self.function.registers.iter().enumerate() {
            match register.ty {
                Type::Pred => {
                    numbers[n] = pred;
                    pred += 1;
                }
                ty if ty.bytes() <= 4 => {
                    numbers[n] = next;
                    next += 1;
                }
                _ => {}
            }
        }
        info.return_address = next;
        next += 1;
        info.narrow.1 = next - info.narrow.0;
        info.preds.1 = pred - info.preds.0;
        info.wide.0 = next;
        for (n, register) in self.function.registers.iter().enumerate() {
            if register.ty != Type::Pred && register.ty.bytes() > 4 {
                numbers[n] = next;
                next += register.ty.bytes() / 4;
            }
        }
        info.wide.1 = (next - info.wide.0) / 2;
        self.registers = numbers;
        self.program.slots = next;
        self.program.preds = pred;
    }

    /// The slot of a register of the present function.
    pub fn slot(&self, id: u32) -> Reg {
        Reg(self.registers[id as usize])
    }

    /// The declared type of a register.
    pub fn type_of(&self, id: u32) -> Type {
        self.function.registers[id as usize].ty
    }

    /// Whether a register has 64-bit lanes.
    pub fn is_wide(&self, id: u32) -> bool {
        self.type_of(id).bytes() > 4
    }

    /// A register for the length of the present instruction.
    pub fn temp(&mut self, wide: bool) -> Reg {
        let kind = usize::from(wide);
        if self.temps_used[kind] == self.temps[kind].len() {
            self.temps[kind].push(Reg(self.program.slots));
            self.program.slots += if wide { 2 } else { 1 };
        }
        self.temps_used[kind] += 1;
        self.temps[kind][self.temps_used[kind] - 1]
    }

    /// A predicate for the length of the present instruction.
    pub fn temp_pred(&mut self) -> Pred {
        if self.temp_preds_used == self.temp_preds.len() {
            self.temp_preds.push(self.program.preds);
            self.program.preds += 1;
        }
        self.temp_preds_used += 1;
        Pred::new(self.temp_preds[self.temp_preds_used - 1], false)
    }

    /// The carry flag of `add.cc` and its like.
    pub fn carry(&mut self) -> Reg {
        if let Some(reg) = self.carry {
            return reg;
        }
        let reg = Reg(self.program.slots);
        self.program.slots += 1;
        self.carry = Some(reg);
        reg
    }

    /// A constant in all lanes.
    pub fn constant(&mut self, value: u64, wide: bool) -> Reg {
        let value = if wide { value } else { value & 0xffff_ffff };
        if let Some(reg) = self.constants.get(&(value, wide)) {
            return *reg;
        }
        let reg = Reg(self.program.constants.len() as u32 | Reg::CONSTANT);
        let (low, high) = (value as u32, (value >> 32) as u32);
        if wide {
            let slot = Slot(std::array::from_fn(|i| if i % 2 == 0 { low } else { high }));
            self.program.constants.extend([slot, slot]);
        } else {
            self.program.constants.push(Slot([low; 32]));
        }
        self.constants.insert((value, wide), reg);
        reg
    }

    /// A special register that stays constant.
    pub fn special(&mut self, special: Special, wide: bool) -> Reg {
        if let Some(reg) = self.specials.get(&(special, wide)) {
            return *reg;
        }
        let reg = Reg(self.program.slots);
        self.program.slots += if wide { 2 } else { 1 };
        self.program.specials.push((special, reg.0, wide));
        self.specials.insert((special, wide), reg);
        reg
    }

    /// The address of a module symbol: a device address, a shared offset, or a function's address.
    pub fn symbol(&self, name: &str) -> Result<(Space, u64), Error> {
        if let Some(offset) = self.shared.get(name) {
            return Ok((Space::Shared, *offset));
        }
        if let Some(address) = self.addresses.get(name) {
            return Ok((Space::Global, *address));
        }
        match self.module.functions.iter().position(|f| f.name == name) {
            Some(index) => Ok((Space::Generic, windows::FUNCTION + 16 * index as u64)),
            None => Err(self.error(format!("`{name}` is declared extern and defined nowhere"))),
        }
    }

    /// Appends an operation under the present guard.
    pub fn emit(&mut self, op: Op) {
        self.program.code.push(Inst {
            op,
            guard: self.guard,
            class: Class::Hidden,
            line: self.line,
            source: self.source,
        });
    }

    /// Appends an operation on lanes.
    pub fn lane(&mut self, f: LaneFn, d: Reg, sources: &[Reg], wide: bool) {
        let at = |i: usize| sources.get(i).copied().unwrap_or(Reg::NONE);
        self.emit(Op::Lane { f, d, a: at(0), b: at(1), c: at(2), wide });
    }

    /// Appends a copy.
    pub fn copy(&mut self, d: Reg, a: Reg, wide: bool) {
        self.lane(logic::copy(wide), d, &[a], wide);
    }

    /// Sets how the last operation is counted.
    pub fn set_class(&mut self, class: Class) {
        if let Some(last) = self.program.code.last_mut() {
            last.class = class;
        }
    }

    /// Decodes one instruction.
    pub fn instruction(&mut self, i: &'m Instruction) -> Result<(), Error> {
        self.line = i.line;
        self.source = i.source;
        self.temps_used = [0; 2];
        self.temp_preds_used = 0;
        self.guard = match i.guard {
            None => Pred::NONE,
            Some((id, negated)) if self.type_of(id) == Type::Pred => Pred::new(self.registers[id as usize], negated),
            Some(_) => return Err(self.error("the guard is not a predicate")),
        };
        let before = self.program.code.len();
        let class = self.family(i)?;
        if self.program.code.len() == before {
            self.emit(Op::Nop);
        }
        self.set_class(class);
        Ok(())
    }

    fn family(&mut self, i: &'m Instruction) -> Result<Class, Error> {
        match i.opcode[0].as_str() {
            "add" | "sub" | "mul" | "mad" | "fma" | "div" | "rem" | "min" | "max" | "abs" | "neg" | "copysign" => {
                let float = i.types().last().is_some_and(|t| t.is_float());
                if float { self.float_arithmetic(i) } else { self.integer_arithmetic(i) }
            }
            "rcp" | "sqrt" | "rsqrt" | "sin" | "cos" | "lg2" | "ex2" | "tanh" | "testp" => self.float_arithmetic(i),
            "addc" | "subc" | "madc" => self.carry_arithmetic(i),
            "mul24" | "mad24" | "sad" | "popc" | "clz" | "brev" | "bfind" | "bfe" | "bfi" | "bmsk" | "szext"
            | "fns" | "prmt" | "shf" | "dp4a" | "dp2a" | "shl" | "shr" | "vadd2" | "vadd4" | "vsub2" | "vsub4"
            | "vavrg2" | "vavrg4" | "vabsdiff2" | "vabsdiff4" | "vmin2" | "vmin4" | "vmax2" | "vmax4" => {
                self.integer_arithmetic(i)
            }
            "and" | "or" | "xor" | "not" | "cnot" | "lop3" => self.logic(i),
            "setp" | "set" | "selp" | "slct" => self.compare(i),
            "mov" => self.mov(i),
            "cvt" => self.cvt(i),
            "cvta" | "isspacep" | "mapa" | "getctarank" => self.address_conversion(i),
            "ld" | "ldu" => self.load(i),
            "st" => self.store(i),
            "atom" | "red" => self.atomic(i),
            "fence" | "membar" => self.fence(i),
            "prefetch" | "prefetchu" | "applypriority" | "discard" | "nanosleep" | "pmevent" | "setmaxnreg"
            | "griddepcontrol" | "createpolicy" => self.hint(i),
            "cp" => self.copy_async(i),
            "mbarrier" => self.mbarrier(i),
            "bar" | "barrier" => self.barrier(i),
            "shfl" | "vote" | "match" | "redux" | "elect" | "activemask" => self.collective(i),
            "wgmma" => self.wgmma(i),
            "ldmatrix" | "stmatrix" | "mma" => self.matrix(i),
            "bra" | "brx" | "call" | "ret" | "exit" | "trap" | "brkpt" => self.control(i),
            _ => Err(self.unknown(i)),
        }
    }

    /// Labels of a jump table operand.
    pub fn table(&self, i: &Instruction) -> Result<Vec<u32>, Error> {
        blocks::targets(self.function, i)
    }

    /// An operand that must be there.
    pub fn operand_at<'i>(&self, i: &'i Instruction, n: usize) -> Result<&'i Operand, Error> {
        i.operands.get(n).ok_or_else(|| Error::new(i.line, format!("`{}` has too few operands", i.mnemonic())))
    }
}
