//! The syntax tree: modules, functions, variables, instructions, operands.

use super::types::{Space, Type};

/// One PTX module.
#[derive(Debug, Clone, Default)]
pub struct Module {
    /// `.version major.minor`.
    pub version: (u32, u32),
    /// The number in `.target sm_NN`.
    pub target_sm: u32,
    /// The letter after it: `a` (this architecture only) or `f` (this family), if any.
    pub target_suffix: Option<char>,
    /// Module-scope variables.
    pub variables: Vec<Variable>,
    /// Functions and kernels, definitions only where there are both declaration and definition.
    pub functions: Vec<Function>,
    /// `.file` entries: index and path.
    pub files: Vec<(u32, String)>,
}

/// A variable in memory: module scope, function scope, or a parameter.
#[derive(Debug, Clone)]
pub struct Variable {
    /// Its name.
    pub name: String,
    /// Where it lives.
    pub space: Space,
    /// Alignment, bytes.
    pub align: u32,
    /// Size, bytes; 0 for an extern array without bounds (dynamic shared memory).
    pub bytes: u64,
    /// Leading bytes of its initial value, zeros follow.
    pub init: Vec<u8>,
    /// Places in the initial value that hold an address.
    pub relocations: Vec<Relocation>,
    /// Declared `.extern`.
    pub is_extern: bool,
}

/// An address inside an initial value.
#[derive(Debug, Clone)]
pub struct Relocation {
    /// Byte offset in the variable.
    pub offset: u64,
    /// Bytes written, 4 or 8.
    pub bytes: u32,
    /// The variable or function whose address it is.
    pub symbol: String,
    /// Added to the address.
    pub addend: i64,
}

/// A virtual register.
#[derive(Debug, Clone)]
pub struct Register {
    /// Its name in the text.
    pub name: String,
    /// Its declared type.
    pub ty: Type,
}

/// A kernel (`.entry`) or a device function (`.func`).
#[derive(Debug, Clone)]
pub struct Function {
    /// Its name.
    pub name: String,
    /// Whether it is a kernel.
    pub is_entry: bool,
    /// Line of the directive.
    pub line: u32,
    /// Parameters in order.
    pub params: Vec<Variable>,
    /// Return parameters in order (device functions).
    pub returns: Vec<Variable>,
    /// Parameters that are registers (`.func` only): indexed like `params`.
    pub param_registers: Vec<Option<u32>>,
    /// Return parameters that are registers: indexed like `returns`.
    pub return_registers: Vec<Option<u32>>,
    /// Registers, indexed by [`Operand::Reg`].
    pub registers: Vec<Register>,
    /// Variables of the body (`.shared`, `.local`, call `.param`), names made unique, indexed by [`Operand::Var`].
    pub variables: Vec<Variable>,
    /// Instructions in order; `None` for a declaration.
    pub body: Option<Vec<Instruction>>,
    /// For each label, the index of the instruction it stands before.
    pub labels: Vec<usize>,
    /// Jump tables of `brx.idx`: name and labels.
    pub branch_targets: Vec<(String, Vec<u32>)>,
    /// `.maxntid`, all dimensions; `None` if not given.
    pub max_threads: Option<[u32; 3]>,
    /// `.reqntid`.
    pub required_threads: Option<[u32; 3]>,
    /// `.reqnctapercluster`.
    pub required_cluster: Option<[u32; 3]>,
    /// `.maxnreg`.
    pub max_registers: Option<u32>,
}

/// One instruction.
#[derive(Debug, Clone)]
pub struct Instruction {
    /// `@p` or `@!p`: register and whether it is negated.
    pub guard: Option<(u32, bool)>,
    /// The opcode and its modifiers, split at the dots: `["ld", "global", "nc", "f32"]`.
    pub opcode: Vec<String>,
    /// Operands in order.
    pub operands: Vec<Operand>,
    /// Line of the PTX text.
    pub line: u32,
    /// `.loc`: file index and line, 0 if none.
    pub source: (u32, u32),
}

impl Instruction {
    /// The opcode as written.
    pub fn mnemonic(&self) -> String {
        self.opcode.join(".")
    }
    /// Whether a modifier is present.
    pub fn has(&self, modifier: &str) -> bool {
        self.opcode[1..].iter().any(|m| m == modifier)
    }
    /// The types among the modifiers, in order.
    pub fn types(&self) -> Vec<Type> {
        self.opcode[1..].iter().filter_map(|m| Type::parse(m)).collect()
    }
    /// The state space among the modifiers; generic if none.
    pub fn space(&self) -> Space {
        self.opcode[1..].iter().find_map(|m| Space::parse(m)).unwrap_or(Space::Generic)
    }
}

/// An operand.
#[derive(Debug, Clone, PartialEq)]
pub enum Operand {
    /// A register of the function.
    Reg(u32),
    /// `!p`, a negated predicate (or `-` applied to nothing else).
    NotReg(u32),
    /// A special register such as `%tid.x`.
    Special(String),
    /// An integer constant, two's complement.
    Int(i64),
    /// `0f` constant: bits of an f32.
    F32(u32),
    /// `0d` or decimal constant: bits of an f64.
    F64(u64),
    /// A variable of the function by index, plus an offset: its address.
    Var(u32, i64),
    /// A symbol of the module plus an offset: its address.
    Symbol(String, i64),
    /// `{a, b}`.
    Vector(Vec<Operand>),
    /// `[base + offset]`: base is `Reg`, `Var`, `Symbol` or `Int`.
    Memory(Box<Operand>, i64),
    /// `[a, {b, c}]`: a memory operand of several parts (tensor maps).
    MemoryParts(Vec<Operand>),
    /// `p|q`.
    Pair(Box<Operand>, Box<Operand>),
    /// `(a, b)` of a call.
    List(Vec<Operand>),
    /// A label, index in [`Function::labels`].
    Label(u32),
    /// `_`.
    Sink,
}
