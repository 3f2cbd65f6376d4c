//! Operands of `wgmma`.

use super::{Pred, Reg};
use crate::ptx::types::Type;

/// `wgmma.mma_async` of 64 rows, of which each warp of the warpgroup has 16.
#[derive(Debug, Clone)]
pub struct Wgmma {
    /// Columns.
    pub n: usize,
    /// Depth: 32 bytes of elements.
    pub k: usize,
    /// Element type of A.
    pub a_type: Type,
    /// Element type of B.
    pub b_type: Type,
    /// Element type of D: f32, f16, s32.
    pub d_type: Type,
    /// Accumulators.
    pub d: Vec<Reg>,
    /// A.
    pub a: WgmmaA,
    /// Descriptor of B.
    pub b: Reg,
    /// Whether D is added to.
    pub scale_d: Pred,
    /// A and B are multiplied by minus one.
    pub negate: (bool, bool),
    /// A and B are stored with M or N innermost.
    pub transposed: (bool, bool),
    /// Saturate integer sums.
    pub saturate: bool,
}

/// Where A comes from.
#[derive(Debug, Clone)]
pub enum WgmmaA {
    /// Shared memory by a descriptor.
    Descriptor(Reg),
    /// Registers, each warp's own rows.
    Registers(Vec<Reg>),
}

impl Wgmma {
    /// Registers that hold A.
    pub fn a_registers(&self) -> &[Reg] {
        match &self.a {
            WgmmaA::Registers(all) => all,
            WgmmaA::Descriptor(_) => &[],
        }
    }
}

/// The instructions around it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WgmmaSync {
    /// `wgmma.fence`.
    Fence,
    /// `wgmma.commit_group`.
    Commit,
    /// `wgmma.wait_group n`.
    Wait(u32),
}
