//! Classes of instructions, for counting.

/// What an instruction is counted as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)]
#[repr(u8)]
pub enum Class {
    /// A step of the emulator's own, not of the program's.
    Hidden,
    Integer,
    /// One flop a lane.
    Float32,
    /// Two flops a lane.
    Fma32,
    /// f16 and bf16, one flop.
    Half,
    /// Two packed f16 or bf16.
    HalfPacked,
    /// Packed or scalar fused multiply-add of f16 or bf16.
    HalfFma,
    HalfPackedFma,
    Float64,
    Fma64,
    Special,
    Convert,
    Compare,
    Move,
    Control,
    LoadGlobal,
    StoreGlobal,
    LoadShared,
    StoreShared,
    /// Local, constant and parameter memory.
    LoadStoreOther,
    Atomic,
    Barrier,
    WarpExchange,
    Tensor,
    AsyncCopy,
}

impl Class {
    /// All classes, in order of their numbers.
    pub const ALL: [Class; 25] = [
        Class::Hidden,
        Class::Integer,
        Class::Float32,
        Class::Fma32,
        Class::Half,
        Class::HalfPacked,
        Class::HalfFma,
        Class::HalfPackedFma,
        Class::Float64,
        Class::Fma64,
        Class::Special,
        Class::Convert,
        Class::Compare,
        Class::Move,
        Class::Control,
        Class::LoadGlobal,
        Class::StoreGlobal,
        Class::LoadShared,
        Class::StoreShared,
        Class::LoadStoreOther,
        Class::Atomic,
        Class::Barrier,
        Class::WarpExchange,
        Class::Tensor,
        Class::AsyncCopy,
    ];

    /// Flops a lane of plain (not tensor) arithmetic.
    pub fn flops(self) -> u64 {
        match self {
            Class::Float32 | Class::Half | Class::Float64 => 1,
            Class::Fma32 | Class::HalfPacked | Class::HalfFma | Class::Fma64 => 2,
            Class::HalfPackedFma => 4,
            _ => 0,
        }
    }
}
