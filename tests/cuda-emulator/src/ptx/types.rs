//! Fundamental types and state spaces, as PTX spells them.

/// A fundamental or packed type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Type {
    Pred,
    B8,
    B16,
    B32,
    B64,
    B128,
    U8,
    U16,
    U32,
    U64,
    S8,
    S16,
    S32,
    S64,
    F16,
    BF16,
    F32,
    F64,
    TF32,
    F16x2,
    BF16x2,
    U16x2,
    S16x2,
    E4M3,
    E5M2,
    E4M3x2,
    E5M2x2,
    U4,
    S4,
    B1,
}

impl Type {
    /// The type named by a suffix without its dot, if it is one.
    pub fn parse(name: &str) -> Option<Self> {
        use Type::*;
        Some(match name {
            "pred" => Pred,
            "b1" => B1,
            "b8" => B8,
            "b16" => B16,
            "b32" => B32,
            "b64" => B64,
            "b128" => B128,
            "u4" => U4,
            "u8" => U8,
            "u16" => U16,
            "u32" => U32,
            "u64" => U64,
            "s4" => S4,
            "s8" => S8,
            "s16" => S16,
            "s32" => S32,
            "s64" => S64,
            "f16" => F16,
            "bf16" => BF16,
            "f32" => F32,
            "f64" => F64,
            "tf32" => TF32,
            "f16x2" => F16x2,
            "bf16x2" => BF16x2,
            "u16x2" => U16x2,
            "s16x2" => S16x2,
            "e4m3" => E4M3,
            "e5m2" => E5M2,
            "e4m3x2" => E4M3x2,
            "e5m2x2" => E5M2x2,
            _ => return None,
        })
    }

    /// Size in memory, bytes. Predicates and sub-byte types count as one.
    pub fn bytes(self) -> u32 {
        use Type::*;
        match self {
            Pred | B1 | U4 | S4 | B8 | U8 | S8 | E4M3 | E5M2 => 1,
            B16 | U16 | S16 | F16 | BF16 | E4M3x2 | E5M2x2 => 2,
            B32 | U32 | S32 | F32 | TF32 | F16x2 | BF16x2 | U16x2 | S16x2 => 4,
            B64 | U64 | S64 | F64 => 8,
            B128 => 16,
        }
    }

    /// Whether values are two's complement integers.
    pub fn is_signed(self) -> bool {
        matches!(self, Type::S8 | Type::S16 | Type::S32 | Type::S64 | Type::S4)
    }

    /// Whether values are floating point (packed included).
    pub fn is_float(self) -> bool {
        use Type::*;
        matches!(self, F16 | BF16 | F32 | F64 | TF32 | F16x2 | BF16x2 | E4M3 | E5M2 | E4M3x2 | E5M2x2)
    }
}

/// A state space; `Generic` where an instruction names none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Space {
    Generic,
    Global,
    Shared,
    /// Shared memory of any block of the cluster.
    SharedCluster,
    Const,
    Local,
    Param,
}

impl Space {
    /// The space named by a suffix without its dot, if it is one.
    pub fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "global" => Space::Global,
            "shared" | "shared::cta" => Space::Shared,
            "shared::cluster" => Space::SharedCluster,
            "const" => Space::Const,
            "local" => Space::Local,
            "param" | "param::entry" | "param::func" => Space::Param,
            _ => return None,
        })
    }
}
