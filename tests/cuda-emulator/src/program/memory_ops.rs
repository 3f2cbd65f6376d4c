//! Operands of memory instructions.

use super::{Pred, Reg};
use crate::ptx::types::{Space, Type};

/// An address: base register (or absent), its width, and a constant offset.
#[derive(Debug, Clone, Copy)]
pub struct Address {
    /// Base register.
    pub base: Option<Reg>,
    /// Whether the base has 64-bit lanes.
    pub wide: bool,
    /// Added to the base, modulo 2^64.
    pub offset: i64,
}

/// How memory order enters the checks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Order {
    /// An ordinary access.
    #[default]
    Weak,
    /// `.volatile`, `.relaxed`, `.acquire`, `.release`: takes part in synchronisation, never races with its like.
    Strong,
}

/// `ld`, `ldu`.
#[derive(Debug, Clone)]
pub struct Load {
    /// Where from.
    pub address: Address,
    /// State space.
    pub space: Space,
    /// Bytes of an element: 1, 2, 4, 8, 16.
    pub size: u32,
    /// Sign-extend to the register.
    pub signed: bool,
    /// Destination of each element and whether it has 64-bit lanes; `None` drops it.
    pub dest: Vec<Option<(Reg, bool)>>,
    /// Memory order.
    pub order: Order,
}

/// `st`.
#[derive(Debug, Clone)]
pub struct Store {
    /// Where to.
    pub address: Address,
    /// State space.
    pub space: Space,
    /// Bytes of an element: 1, 2, 4, 8, 16.
    pub size: u32,
    /// Source of each element and whether it has 64-bit lanes.
    pub source: Vec<(Reg, bool)>,
    /// Memory order.
    pub order: Order,
}

/// The operation of `atom` and `red`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum AtomicOp {
    Add,
    Min,
    Max,
    And,
    Or,
    Xor,
    Exchange,
    CompareAndSwap,
    Increment,
    Decrement,
}

/// `atom` and `red`, of one element or a vector.
#[derive(Debug, Clone)]
pub struct Atomic {
    /// Where.
    pub address: Address,
    /// State space.
    pub space: Space,
    /// The operation.
    pub op: AtomicOp,
    /// Element type.
    pub ty: Type,
    /// Old values; empty for `red`.
    pub dest: Vec<Reg>,
    /// Operand of each element.
    pub b: Vec<Reg>,
    /// New value of a compare-and-swap.
    pub c: Reg,
}

/// A copy inside each lane's local memory.
#[derive(Debug, Clone, Copy)]
pub struct CopyLocal {
    /// First byte read.
    pub from: u32,
    /// First byte written.
    pub to: u32,
    /// Bytes.
    pub bytes: u32,
}

/// `isspacep`.
#[derive(Debug, Clone, Copy)]
pub struct IsSpace {
    /// Result.
    pub d: Pred,
    /// Generic address, 64-bit.
    pub a: Reg,
    /// The space asked for.
    pub space: Space,
}

/// `cp.async` of 4, 8 or 16 bytes.
#[derive(Debug, Clone)]
pub struct CopyAsync {
    /// Shared address.
    pub to: Address,
    /// Global address.
    pub from: Address,
    /// Bytes written.
    pub bytes: u32,
    /// Bytes read (the rest is zero), if given.
    pub source_bytes: Option<Reg>,
    /// Lanes where the source is ignored and zeros are written.
    pub ignore: Option<Pred>,
}

/// `mbarrier` operations.
#[derive(Debug, Clone)]
pub struct Mbarrier {
    /// Which.
    pub op: MbarrierOp,
    /// Address of the object.
    pub address: Address,
    /// State space of the address.
    pub space: Space,
    /// State or pending count.
    pub dest: Option<Reg>,
    /// Result of a test.
    pub p: Pred,
    /// Count, transaction bytes, state or parity.
    pub operand: Option<Reg>,
}

/// What an `mbarrier` instruction does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MbarrierOp {
    /// `init`.
    Init,
    /// `inval`.
    Invalidate,
    /// `arrive`, `arrive_drop`, and whether transaction bytes are expected too.
    Arrive {
        /// Lower the expected count too.
        drop: bool,
        /// The operand is a number of bytes to expect, the count is 1.
        expect_bytes: bool,
    },
    /// `expect_tx`.
    ExpectBytes,
    /// `complete_tx`.
    CompleteBytes,
    /// `test_wait` or `try_wait` by state or by parity.
    Test {
        /// The operand is a parity.
        parity: bool,
    },
    /// `pending_count` of a state.
    PendingCount,
    /// `cp.async.mbarrier.arrive`: when this thread's earlier copies land.
    ArriveOnCopies {
        /// Do not count the arrival beforehand.
        no_increment: bool,
    },
}

/// `cp.async.bulk`, with or without a tensor map.
#[derive(Debug, Clone)]
pub struct Bulk {
    /// Which.
    pub op: BulkOp,
    /// Address in shared memory of a tensor copy; else the destination.
    pub to: Address,
    /// Source address.
    pub from: Address,
    /// Bytes, a multiple of 16; a tensor map tells them itself.
    pub bytes: Reg,
    /// Barrier that the copy completes on.
    pub barrier: Option<Address>,
    /// Tensor map: address, its space, and the coordinates.
    pub tensor: Option<(Address, Space, Vec<Reg>)>,
    /// Blocks of the cluster that receive the copy.
    pub multicast: Option<Reg>,
    /// Operation of a reduction, and its type where the instruction names it.
    pub reduce: Option<(AtomicOp, Option<Type>)>,
}

/// Directions and groups of bulk copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BulkOp {
    /// Global to shared, completing on a barrier.
    ToShared,
    /// Shared to global, completing in a bulk group.
    ToGlobal,
    /// Shared to shared of another block of the cluster.
    ToCluster,
    /// `commit_group`.
    Commit,
    /// `wait_group n`.
    Wait(u32),
    /// A prefetch: no effect.
    Prefetch,
}
