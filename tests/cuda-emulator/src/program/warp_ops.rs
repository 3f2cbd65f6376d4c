//! Operands of instructions by which the threads of a warp or block act together.

use super::{Pred, Reg};
use crate::ptx::types::Type;

/// `bar` and `barrier`.
#[derive(Debug, Clone)]
pub struct Barrier {
    /// What it does.
    pub op: BarrierOp,
    /// Number of the barrier: constant, or a register.
    pub id: Reg,
    /// Number of threads, if not all of the block.
    pub count: Option<Reg>,
    /// All lanes of the warp must execute it together.
    pub aligned: bool,
    /// Predicate of a reduction.
    pub input: Pred,
    /// Result of `red.and`, `red.or`.
    pub p: Pred,
    /// Result of `red.popc`.
    pub d: Option<Reg>,
}

/// What a barrier instruction does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum BarrierOp {
    Sync,
    Arrive,
    Popc,
    And,
    Or,
}

/// An instruction with a member mask.
#[derive(Debug, Clone)]
pub struct WarpOp {
    /// What it does.
    pub kind: WarpKind,
    /// Member mask; `None` for the forms without `.sync`, which act on the active lanes.
    pub members: Option<Reg>,
}

/// A direction of `shfl`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum ShuffleMode {
    Up,
    Down,
    Butterfly,
    Index,
}

/// A kind of `vote`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum VoteMode {
    All,
    Any,
    Uniform,
    Ballot,
}

/// An operation of `redux.sync`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum ReduceOp {
    Add,
    Min,
    Max,
    And,
    Or,
    Xor,
}

/// The instructions with a member mask.
#[derive(Debug, Clone)]
pub enum WarpKind {
    /// `bar.warp.sync`.
    Sync,
    /// `shfl`.
    Shuffle {
        /// Direction.
        mode: ShuffleMode,
        /// Destination.
        d: Option<Reg>,
        /// In-range predicate.
        p: Pred,
        /// Value.
        a: Reg,
        /// Lane or distance.
        b: Reg,
        /// Clamp and segment mask.
        c: Reg,
    },
    /// `vote`.
    Vote {
        /// Kind.
        mode: VoteMode,
        /// Destination of a ballot.
        d: Option<Reg>,
        /// Destination of the others.
        p: Pred,
        /// Source.
        a: Pred,
    },
    /// `match`.
    Match {
        /// All lanes equal, rather than the mask of equals.
        all: bool,
        /// Destination.
        d: Option<Reg>,
        /// Whether all are equal.
        p: Pred,
        /// Value.
        a: Reg,
        /// 64-bit value.
        wide: bool,
    },
    /// `redux`.
    Reduce {
        /// Operation.
        op: ReduceOp,
        /// Signed comparison, or `f32`.
        ty: Type,
        /// `.abs` of f32.
        abs: bool,
        /// `.NaN` of f32.
        nan: bool,
        /// Destination.
        d: Reg,
        /// Value.
        a: Reg,
    },
    /// `elect`.
    Elect {
        /// The elected lane.
        d: Option<Reg>,
        /// Whether this lane is it.
        p: Pred,
    },
}

/// `ldmatrix` and `stmatrix` of 8×8 matrices of 16 bits.
#[derive(Debug, Clone)]
pub struct Matrix {
    /// Load rather than store.
    pub load: bool,
    /// Transposed.
    pub transposed: bool,
    /// Row addresses.
    pub address: super::Address,
    /// Address space is generic rather than shared.
    pub generic: bool,
    /// One register a matrix: 1, 2 or 4.
    pub registers: Vec<Reg>,
}

/// `mma.sync`.
#[derive(Debug, Clone)]
pub struct Mma {
    /// Rows, columns, depth.
    pub shape: (usize, usize, usize),
    /// Element type of A.
    pub a_type: Type,
    /// Element type of B.
    pub b_type: Type,
    /// Element type of C and D: f32, f16, s32, f64.
    pub c_type: Type,
    /// Saturate integer sums.
    pub saturate: bool,
    /// Destination.
    pub d: Vec<Reg>,
    /// Fragment of A.
    pub a: Vec<Reg>,
    /// Fragment of B.
    pub b: Vec<Reg>,
    /// Fragment of C.
    pub c: Vec<Reg>,
}

/// `mapa` and `getctarank`.
#[derive(Debug, Clone)]
pub struct MapCluster {
    /// `getctarank` rather than `mapa`.
    pub rank_of: bool,
    /// Destination.
    pub d: Reg,
    /// Address.
    pub a: Reg,
    /// Rank.
    pub b: Reg,
    /// Addresses have 64 bits.
    pub wide: bool,
    /// Addresses are generic rather than shared.
    pub generic: bool,
}
