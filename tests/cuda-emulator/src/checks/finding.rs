//! A finding: what is wrong, where in the grid, where in the text, at which address.

use std::fmt;

/// What is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum Kind {
    OutOfBounds,
    Misaligned,
    UseAfterFree,
    DoubleFree,
    Leak,
    WriteToConstant,
    UninitializedGlobal,
    UninitializedShared,
    SharedRace,
    GlobalRace,
    AsyncCopyNotWaited,
    DivergentBarrier,
    Deadlock,
    BadMemberMask,
    LaunchLimit,
    Trap,
    Assert,
    Timeout,
    IllegalInstruction,
    InvalidBarrier,
    MissingProxyFence,
    WgmmaNotWaited,
    MissingWgmmaFence,
}

impl Kind {
    /// The `CUresult` that a launch ends with.
    pub fn code(self) -> u32 {
        match self {
            Kind::OutOfBounds | Kind::UseAfterFree => 700,
            Kind::Misaligned => 716,
            Kind::DoubleFree | Kind::Leak => 1,
            Kind::WriteToConstant => 717,
            Kind::LaunchLimit => 701,
            Kind::Trap | Kind::IllegalInstruction => 715,
            Kind::Assert => 710,
            Kind::Timeout | Kind::Deadlock => 702,
            _ => 719,
        }
    }

    /// In words.
    pub fn title(self) -> &'static str {
        match self {
            Kind::OutOfBounds => "access out of bounds",
            Kind::Misaligned => "misaligned access",
            Kind::UseAfterFree => "use after free",
            Kind::DoubleFree => "double free",
            Kind::Leak => "memory not freed",
            Kind::WriteToConstant => "write to constant memory",
            Kind::UninitializedGlobal => "read of uninitialised global memory",
            Kind::UninitializedShared => "read of uninitialised shared memory",
            Kind::SharedRace => "data race in shared memory",
            Kind::GlobalRace => "data race between blocks in global memory",
            Kind::AsyncCopyNotWaited => "asynchronous copy touched before its wait",
            Kind::DivergentBarrier => "divergent barrier",
            Kind::Deadlock => "deadlock",
            Kind::BadMemberMask => "bad member mask",
            Kind::LaunchLimit => "launch beyond the card's limits",
            Kind::Trap => "trap",
            Kind::Assert => "assertion failed",
            Kind::Timeout => "time limit exceeded",
            Kind::IllegalInstruction => "illegal instruction",
            Kind::InvalidBarrier => "invalid mbarrier use",
            Kind::MissingProxyFence => "missing fence.proxy.async",
            Kind::WgmmaNotWaited => "wgmma register touched before its wait",
            Kind::MissingWgmmaFence => "missing wgmma.fence",
        }
    }
}

/// One finding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What is wrong.
    pub kind: Kind,
    /// Kernel.
    pub kernel: String,
    /// Block.
    pub block: [u32; 3],
    /// Thread in the block.
    pub thread: [u32; 3],
    /// Line of the PTX text, 0 if not in a kernel.
    pub ptx_line: u32,
    /// Source file and line, where `.loc` tells.
    pub source: Option<(String, u32)>,
    /// Address, if memory is concerned.
    pub address: Option<u64>,
    /// The allocation or variable at or near the address.
    pub allocation: Option<String>,
    /// The rest of the story.
    pub detail: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.kind.title())?;
        if !self.kernel.is_empty() {
            let ([bx, by, bz], [tx, ty, tz]) = (self.block, self.thread);
            write!(f, " in {} block ({bx},{by},{bz}) thread ({tx},{ty},{tz})", self.kernel)?;
        }
        if self.ptx_line > 0 {
            write!(f, ", PTX line {}", self.ptx_line)?;
        }
        if let Some((file, line)) = &self.source {
            write!(f, ", {file}:{line}")?;
        }
        if let Some(address) = self.address {
            write!(f, ", address {address:#x}")?;
        }
        if let Some(allocation) = &self.allocation {
            write!(f, " ({allocation})")?;
        }
        if self.detail.is_empty() { Ok(()) } else { write!(f, ": {}", self.detail) }
    }
}

/// A finding that ends the launch, before the machine adds where it was.
#[derive(Debug, Clone)]
pub struct Fault {
    /// What is wrong.
    pub kind: Kind,
    /// The lane it happened to.
    pub lane: u32,
    /// Address, if memory is concerned.
    pub address: Option<u64>,
    /// The allocation or variable at or near the address.
    pub allocation: Option<String>,
    /// The rest of the story.
    pub detail: String,
}

impl Fault {
    /// A fault without an address.
    pub fn new(kind: Kind, lane: u32, detail: impl Into<String>) -> Self {
        Fault { kind, lane, address: None, allocation: None, detail: detail.into() }
    }

    /// A fault at an address.
    pub fn at(kind: Kind, lane: u32, address: u64, detail: impl Into<String>) -> Self {
        Fault { kind, lane, address: Some(address), allocation: None, detail: detail.into() }
    }
}
