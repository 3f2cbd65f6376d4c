//! A decoded kernel: a flat array of pre-resolved instructions over numbered register slots.
//!
//! Every name is gone: registers are indices of 32-lane slots, constants live in slots of their own, branch targets are
//! indices, arithmetic is a function pointer. [`crate::decode`] writes programs, [`crate::machine`] runs them.

pub mod class;
pub mod memory_ops;
pub mod registers;
pub mod warp_ops;
pub mod wgmma;

use crate::lanes::{CompareFn, LaneFn};
pub use class::Class;
pub use memory_ops::*;
pub use warp_ops::*;
pub use wgmma::{Wgmma, WgmmaA, WgmmaSync};

/// A register slot of 32 lanes × 32 bits (64-bit registers take two). The high bit selects the constants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Reg(pub u32);

impl Reg {
    /// Marks a slot of [`Program::constants`].
    pub const CONSTANT: u32 = 1 << 31;
    /// A slot whose contents never matter.
    pub const NONE: Reg = Reg(Reg::CONSTANT);
}

/// A predicate with its polarity: index * 2, plus 1 if negated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pred(pub u32);

impl Pred {
    /// No predicate: a guard that is always true, a result that is dropped.
    pub const NONE: Pred = Pred(u32::MAX);
    /// The predicate at an index.
    pub fn new(index: u32, negated: bool) -> Self {
        Pred(index * 2 + u32::from(negated))
    }
}

/// 32 lanes of 32 bits, aligned for vector loads.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(128))]
pub struct Slot(pub [u32; 32]);

/// A boolean operator of `setp` and predicate logic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum BoolOp {
    And,
    Or,
    Xor,
}

impl BoolOp {
    /// On masks of lanes.
    pub fn apply(self, a: u32, b: u32) -> u32 {
        match self {
            BoolOp::And => a & b,
            BoolOp::Or => a | b,
            BoolOp::Xor => a ^ b,
        }
    }
}

/// What an instruction does.
#[derive(Debug, Clone)]
pub enum Op {
    /// Arithmetic on lanes.
    Lane {
        /// The function.
        f: LaneFn,
        /// Destination.
        d: Reg,
        /// First source.
        a: Reg,
        /// Second source.
        b: Reg,
        /// Third source.
        c: Reg,
        /// Whether the destination has 64-bit lanes.
        wide: bool,
    },
    /// Bitwise function of three inputs by its truth table.
    Lop3 {
        /// Truth table.
        table: u8,
        /// Destination and sources.
        d: Reg,
        /// First source.
        a: Reg,
        /// Second source.
        b: Reg,
        /// Third source.
        c: Reg,
    },
    /// `setp`: p = f(a, b) combined with `with`; q = not f(a, b) combined.
    Compare {
        /// The comparison.
        f: CompareFn,
        /// First source.
        a: Reg,
        /// Second source.
        b: Reg,
        /// Results and combination.
        out: Box<CompareOut>,
    },
    /// d = a op b on predicates.
    Logic {
        /// The operator.
        op: BoolOp,
        /// Destination, not negated.
        d: Pred,
        /// First source; [`Pred::NONE`] is true.
        a: Pred,
        /// Second source; [`Pred::NONE`] is true.
        b: Pred,
    },
    /// d = lane of a is not zero.
    NonZero {
        /// Destination.
        d: Pred,
        /// Source.
        a: Reg,
    },
    /// d = p ? a : b.
    Select {
        /// Destination.
        d: Reg,
        /// Where true.
        a: Reg,
        /// Where false.
        b: Reg,
        /// Condition.
        p: Pred,
        /// 64-bit lanes.
        wide: bool,
    },
    /// Jump of the lanes that pass the guard.
    Branch(u32),
    /// Jump by a table.
    BranchIndexed {
        /// Index register.
        index: Reg,
        /// Targets.
        targets: Box<[u32]>,
    },
    /// Call of a function: return address to its slot, arguments are already in place.
    Call(Box<Call>),
    /// Return of a function to its caller.
    Return {
        /// Index of the function in [`Program::functions`].
        function: u32,
    },
    /// End of the lanes.
    Exit,
    /// `trap`, or `brkpt`.
    Trap,
    /// Nothing (a pragma, a hint).
    Nop,
    /// A call of the runtime: `vprintf`, `__assertfail`.
    Runtime(Box<RuntimeCall>),
    /// A special register that changes while a kernel runs.
    Clock {
        /// Destination.
        d: Reg,
        /// Two slots.
        wide: bool,
    },
    /// `activemask`.
    ActiveMask(Reg),
    /// Memory, see [`memory_ops`].
    Load(Box<Load>),
    /// `st`.
    Store(Box<Store>),
    /// `atom` and `red`.
    Atomic(Box<Atomic>),
    /// Copy between two places of a lane's local memory (arguments of calls).
    CopyLocal(Box<CopyLocal>),
    /// `isspacep`.
    IsSpace(Box<IsSpace>),
    /// `fence`, `membar`.
    Fence {
        /// Scope wider than the block.
        beyond_block: bool,
        /// Between the generic and the asynchronous proxy.
        proxy: bool,
    },
    /// `cp.async`.
    CopyAsync(Box<CopyAsync>),
    /// `cp.async.commit_group`.
    CommitGroup,
    /// `cp.async.wait_group n`; `u32::MAX` waits for all copies, committed or not.
    WaitGroup(u32),
    /// `mbarrier.*` and the arrivals of asynchronous copies.
    Mbarrier(Box<Mbarrier>),
    /// `cp.async.bulk` and its groups.
    Bulk(Box<Bulk>),
    /// `bar`, `barrier`.
    Barrier(Box<Barrier>),
    /// `barrier.cluster`.
    ClusterBarrier {
        /// Arrive.
        arrive: bool,
        /// Wait.
        wait: bool,
        /// The arrival publishes nothing.
        relaxed: bool,
    },
    /// `bar.warp.sync`, shuffles, votes, matches, reductions, election.
    Warp(Box<WarpOp>),
    /// `ldmatrix`, `stmatrix`.
    Matrix(Box<Matrix>),
    /// `mma.sync`.
    Mma(Box<Mma>),
    /// `wgmma.mma_async`.
    Wgmma(Box<Wgmma>),
    /// `wgmma.fence`, `.commit_group`, `.wait_group`.
    WgmmaSync(WgmmaSync),
    /// `mapa`, `getctarank`.
    MapCluster(Box<MapCluster>),
}

/// Results of a comparison.
#[derive(Debug, Clone)]
pub struct CompareOut {
    /// Receives the result.
    pub p: Pred,
    /// Receives the result of the negated comparison.
    pub q: Pred,
    /// Operator and predicate that both are combined with.
    pub with: Option<(BoolOp, Pred)>,
}

/// A call.
#[derive(Debug, Clone)]
pub struct Call {
    /// Index of the function, or the register that holds its address.
    pub target: CallTarget,
    /// Local memory of the arguments: first byte and count.
    pub arguments: Vec<(u32, u32)>,
}

/// Whom a call calls.
#[derive(Debug, Clone, Copy)]
pub enum CallTarget {
    /// A function by index.
    Direct(u32),
    /// An address in a 64-bit register.
    Indirect(Reg),
}

/// Functions of the device runtime that the emulator provides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RuntimeFunction {
    /// `vprintf(format, arguments)`.
    Printf,
    /// `__assertfail(message, file, line, function, size)`.
    AssertFail,
}

/// A call of the runtime; arguments lie in the caller's local memory.
#[derive(Debug, Clone)]
pub struct RuntimeCall {
    /// Which function.
    pub function: RuntimeFunction,
    /// Offsets of the arguments in local memory.
    pub arguments: Vec<u32>,
    /// Offset of the returned value, if the caller takes it.
    pub result: Option<u32>,
}

/// One instruction.
#[derive(Debug, Clone)]
pub struct Inst {
    /// What it does.
    pub op: Op,
    /// The lanes that do it.
    pub guard: Pred,
    /// How it is counted.
    pub class: Class,
    /// Line of the PTX text.
    pub line: u32,
    /// File index and line of the source, 0 if unknown.
    pub source: (u32, u32),
}

/// A function of a program.
#[derive(Debug, Clone, Default)]
pub struct FunctionInfo {
    /// Its name.
    pub name: String,
    /// First instruction.
    pub entry: u32,
    /// Slot of the return address.
    pub return_address: u32,
    /// Its 32-bit registers: first slot and count.
    pub narrow: (u32, u32),
    /// Its 64-bit registers: first slot and count of registers.
    pub wide: (u32, u32),
    /// Its predicates: first and count.
    pub preds: (u32, u32),
    /// Its local memory except the returned values: first byte and count.
    pub local: (u32, u32),
    /// Parameters in local memory: first byte and count.
    pub params: Vec<(u32, u32)>,
    /// Returned values in local memory: first byte and count.
    pub returns: Vec<(u32, u32)>,
    /// Whether a call may find it active already.
    pub recursive: bool,
}

/// A special register that is constant through a warp's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Special {
    Tid(u8),
    Ntid(u8),
    Ctaid(u8),
    Nctaid(u8),
    LaneId,
    WarpId,
    WarpCount,
    MaskEq,
    MaskLt,
    MaskLe,
    MaskGt,
    MaskGe,
    SmId,
    SmCount,
    GridId,
    DynamicSharedBytes,
    TotalSharedBytes,
    ClusterCtaid(u8),
    ClusterNctaid(u8),
    ClusterId(u8),
    ClusterCount(u8),
    ClusterRank,
    ClusterSize,
    /// Half of the address of the memory that a cooperative launch's blocks meet in; true for the upper half.
    GridWorkspace(bool),
    Zero,
}

/// What a card reserves of a block's shared memory, bytes.
pub const RESERVED_SHARED: u32 = 1024;

/// A kernel ready to run.
#[derive(Debug, Clone, Default)]
pub struct Program {
    /// Its name.
    pub name: String,
    /// The instructions; the kernel's entry is 0.
    pub code: Vec<Inst>,
    /// Constant slots, each broadcast to all lanes.
    pub constants: Vec<Slot>,
    /// Register slots of a warp.
    pub slots: u32,
    /// Predicates of a warp.
    pub preds: u32,
    /// Special registers to fill at a warp's start: which, slot, 64-bit.
    pub specials: Vec<(Special, u32, bool)>,
    /// Functions that can be called.
    pub functions: Vec<FunctionInfo>,
    /// Kernel parameters: offset and size of each in the parameter buffer.
    pub params: Vec<(u32, u32)>,
    /// Size of the parameter buffer.
    pub param_bytes: u32,
    /// Static shared memory, bytes, with the reserved part.
    pub shared_bytes: u32,
    /// The part of it, at its start, that is the system's: cooperative groups keep their barriers there. Zero where the
    /// kernel does not ask for it.
    pub reserved_shared: u32,
    /// Names of shared variables: offset, bytes, name.
    pub shared_names: Vec<(u32, u32, String)>,
    /// Local memory of a thread, bytes.
    pub local_bytes: u32,
    /// Where in local memory returned values are handed over, 16 bytes aligned each.
    pub return_buffer: u32,
    /// `.maxntid` as a product.
    pub max_threads: Option<u32>,
    /// `.maxnreg`.
    pub max_registers: Option<u32>,
    /// `.reqntid`.
    pub required_threads: Option<[u32; 3]>,
    /// `.reqnctapercluster`.
    pub required_cluster: Option<[u32; 3]>,
    /// Whether there is a `wgmma`.
    pub uses_wgmma: bool,
    /// Whether blocks must run in order on one thread for results that do not depend on timing.
    pub order_matters: bool,
    /// Source files by index.
    pub files: Vec<(u32, String)>,
}

impl Program {
    /// Static shared memory of the kernel's own variables, which counts against the card's limits, bytes.
    pub fn own_shared(&self) -> u32 {
        self.shared_bytes - self.reserved_shared
    }
}
