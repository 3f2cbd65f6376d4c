//! Device attributes by their numbers in `CUdevice_attribute`.

use crate::counts::Card;

/// The value of an attribute; 0 for what the card does not have.
pub fn value(card: &Card, attribute: i32) -> i32 {
    match attribute {
        1..=3 => 1024,                      // MAX_THREADS_PER_BLOCK, MAX_BLOCK_DIM_X, _Y
        4 => 64,                            // MAX_BLOCK_DIM_Z
        5 => 0x7fff_ffff,                   // MAX_GRID_DIM_X
        6 | 7 => 65535,                     // MAX_GRID_DIM_Y, _Z
        8 => 49152,                         // MAX_SHARED_MEMORY_PER_BLOCK
        9 => 65536,                         // TOTAL_CONSTANT_MEMORY
        10 => 32,                           // WARP_SIZE
        11 => i32::MAX,                     // MAX_PITCH
        12 | 82 => 65536,                   // MAX_REGISTERS_PER_BLOCK, _PER_MULTIPROCESSOR
        13 => (card.clock / 1e3) as i32,    // CLOCK_RATE, kHz
        14 => 512,                          // TEXTURE_ALIGNMENT
        16 => card.sm_count as i32,         // MULTIPROCESSOR_COUNT
        19 | 31 => 1,                       // CAN_MAP_HOST_MEMORY, CONCURRENT_KERNELS
        36 => 1_593_000,                    // MEMORY_CLOCK_RATE, kHz
        37 => 5120,                         // GLOBAL_MEMORY_BUS_WIDTH
        38 => card.l2 as i32,               // L2_CACHE_SIZE
        39 => card.threads_per_sm() as i32, // MAX_THREADS_PER_MULTIPROCESSOR
        40 => 2,                            // ASYNC_ENGINE_COUNT
        41 => 1,                            // UNIFIED_ADDRESSING
        75 => (card.sm / 10) as i32,        // COMPUTE_CAPABILITY_MAJOR
        76 => (card.sm % 10) as i32,        // COMPUTE_CAPABILITY_MINOR
        78 => 1,                            // STREAM_PRIORITIES_SUPPORTED
        81 => card.shared_per_sm as i32,    // MAX_SHARED_MEMORY_PER_MULTIPROCESSOR
        83 | 89 => 1,                       // MANAGED_MEMORY, CONCURRENT_MANAGED_ACCESS
        95 => 1,                            // COOPERATIVE_LAUNCH
        97 => card.shared_per_block as i32, // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        106 => 32,                          // MAX_BLOCKS_PER_MULTIPROCESSOR
        111 => 1024,                        // RESERVED_SHARED_MEMORY_PER_BLOCK
        115 => 1,                           // MEMORY_POOLS_SUPPORTED
        120 => i32::from(card.sm >= 90),    // CLUSTER_LAUNCH
        _ => 0,
    }
}
