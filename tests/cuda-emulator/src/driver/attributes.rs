//! Device attributes by their numbers in `CUdevice_attribute`, as drivers report them on the card where that is known
//! (`counts/cards.json`); what an emulator does not have is 0.

use crate::counts::Card;

/// The value of an attribute; 0 for what the card does not have.
pub fn value(card: &Card, attribute: i32) -> i32 {
    match attribute {
        1..=3 => 1024,                                      // MAX_THREADS_PER_BLOCK, MAX_BLOCK_DIM_X, _Y
        4 => 64,                                            // MAX_BLOCK_DIM_Z
        5 => 0x7fff_ffff,                                   // MAX_GRID_DIM_X
        6 | 7 => 65535,                                     // MAX_GRID_DIM_Y, _Z
        8 => 49152,                                         // MAX_SHARED_MEMORY_PER_BLOCK
        9 => 65536,                                         // TOTAL_CONSTANT_MEMORY
        10 => 32,                                           // WARP_SIZE
        11 => i32::MAX,                                     // MAX_PITCH
        12 | 82 => 65536,                                   // MAX_REGISTERS_PER_BLOCK, _PER_MULTIPROCESSOR
        13 => (card.clock / 1e3) as i32,                    // CLOCK_RATE, kHz
        14 | 30 => 512,                                     // TEXTURE_ALIGNMENT, SURFACE_ALIGNMENT
        15 => 1,                                            // GPU_OVERLAP
        16 => card.sm_count as i32,                         // MULTIPROCESSOR_COUNT
        19 | 31 => 1,                                       // CAN_MAP_HOST_MEMORY, CONCURRENT_KERNELS
        32 => i32::from(card.ecc),                          // ECC_ENABLED
        36 => (card.memory_clock / 1e3) as i32,             // MEMORY_CLOCK_RATE, kHz
        37 => card.bus_width as i32,                        // GLOBAL_MEMORY_BUS_WIDTH
        38 => card.l2 as i32,                               // L2_CACHE_SIZE
        39 => card.threads_per_sm as i32,                   // MAX_THREADS_PER_MULTIPROCESSOR
        40 => card.copy_engines as i32,                     // ASYNC_ENGINE_COUNT
        41 => 1,                                            // UNIFIED_ADDRESSING
        51 => 32,                                           // TEXTURE_PITCH_ALIGNMENT
        75 => (card.sm / 10) as i32,                        // COMPUTE_CAPABILITY_MAJOR
        76 => (card.sm % 10) as i32,                        // COMPUTE_CAPABILITY_MINOR
        78..=80 => 1,                    // STREAM_PRIORITIES, GLOBAL_L1_CACHE, LOCAL_L1_CACHE _SUPPORTED
        81 => card.shared_per_sm as i32, // MAX_SHARED_MEMORY_PER_MULTIPROCESSOR
        83 | 89 => 1,                    // MANAGED_MEMORY, CONCURRENT_MANAGED_ACCESS
        87 => (card.float32 / card.float64).round() as i32, // SINGLE_TO_DOUBLE_PRECISION_PERF_RATIO
        90 => 1,                         // COMPUTE_PREEMPTION_SUPPORTED
        95 => 1,                         // COOPERATIVE_LAUNCH
        97 => card.shared_per_block as i32, // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        106 => card.blocks_per_sm as i32, // MAX_BLOCKS_PER_MULTIPROCESSOR
        111 => 1024,                     // RESERVED_SHARED_MEMORY_PER_BLOCK
        115 => 1,                        // MEMORY_POOLS_SUPPORTED
        120 => i32::from(card.sm >= 90), // CLUSTER_LAUNCH
        127 => i32::from(card.sm >= 90), // TENSOR_MAP_ACCESS_SUPPORTED
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against what NVIDIA's deviceQuery printed on the cards.
    #[test]
    fn attributes_are_those_of_device_query() {
        let printed = [
            (75, [8, 8, 9]),                            // CUDA Capability Major
            (76, [0, 9, 0]),                            // Minor
            (16, [108, 128, 132]),                      // Multiprocessors
            (13, [1_410_000, 2_520_000, 1_980_000]),    // GPU Max Clock rate
            (36, [1_593_000, 10_501_000, 2_619_000]),   // Memory Clock rate
            (37, [5120, 384, 5120]),                    // Memory Bus Width
            (38, [41_943_040, 75_497_472, 52_428_800]), // L2 Cache Size
            (9, [65536; 3]),                            // constant memory
            (8, [49152; 3]),                            // shared memory per block
            (12, [65536; 3]),                           // registers available per block
            (10, [32; 3]),                              // Warp size
            (39, [2048, 1536, 2048]),                   // threads per multiprocessor
            (1, [1024; 3]),                             // threads per block
            (4, [64; 3]),                               // z of a block
            (5, [i32::MAX; 3]),                         // x of a grid
            (6, [65535; 3]),                            // y of a grid
            (11, [i32::MAX; 3]),                        // Maximum memory pitch
            (14, [512; 3]),                             // Texture alignment
            (40, [3, 2, 3]),                            // copy engines
            (32, [1, 0, 1]),                            // ECC support
            (90, [1; 3]),                               // Compute Preemption
        ];
        for (attribute, expected) in printed {
            let reported = ["A100", "RTX4090", "H100"].map(|card| value(Card::find(card).unwrap(), attribute));
            assert_eq!(reported, expected, "attribute {attribute}");
        }
        let ratio = |card: &str| value(Card::find(card).unwrap(), 87);
        assert_eq!(["A100", "RTX4090", "H100", "B200"].map(ratio), [2, 64, 2, 2]);
    }
}
