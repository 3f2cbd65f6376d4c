//! Where the state spaces lie in the generic address space.

/// First generic address of the shared window; the offset below it is the shared address. Bits 24 and up of a
/// `shared::cluster` address name a block of the cluster plus one, 0 the executing block itself.
pub const SHARED: u64 = 0x7f00_0000_0000;
/// First generic address of the local window.
pub const LOCAL: u64 = 0x7e00_0000_0000;
/// First generic address of the kernel parameters.
pub const PARAM: u64 = 0x7d00_0000_0000;
/// First address of functions, 16 apart.
pub const FUNCTION: u64 = 0x7c00_0000_0000;
/// Size of each window.
pub const WINDOW: u64 = 1 << 32;

/// Shift of the block number in a `shared::cluster` address.
pub const CLUSTER_SHIFT: u32 = 24;

/// Whether an address lies in a window.
#[inline]
pub fn within(address: u64, window: u64) -> bool {
    address.wrapping_sub(window) < WINDOW
}
