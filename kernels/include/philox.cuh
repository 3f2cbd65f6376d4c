// Philox-4x32-10 (Salmon et al. 2011), and LoRA's dropout on it: the same words as `src/device/ops.rs` on the CPU.
#pragma once
#include <stdint.h>

__device__ __forceinline__ uint4 philox(uint4 c, uint2 key) {
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const uint32_t hi0 = __umulhi(0xd2511f53u, c.x), lo0 = 0xd2511f53u * c.x;
    const uint32_t hi1 = __umulhi(0xcd9e8d57u, c.z), lo1 = 0xcd9e8d57u * c.z;
    c = make_uint4(hi1 ^ c.y ^ key.x, lo1, hi0 ^ c.w ^ key.y, lo0);
    key.x += 0x9e3779b9u, key.y += 0xbb67ae85u;
  }
  return c;
}

// Dropout of one optimizer step: a word below `threshold` drops.
struct Dropout {
  uint2 key;
  uint32_t step;
  uint32_t threshold;
};
