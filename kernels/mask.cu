// Masks of LoRA's dropout: one bit an element, made once and read by every product that needs it.
//
//   bit (row, feature) = philox word (token of the row, feature) >= threshold          1: kept
//
// A row has four quarters of ⌈width / 4⌉ features, each a whole number of 32-bit words: bit i of quarter s is feature
// s · quarter + i. One Philox block gives the four bits of block number i (src/device/ops.rs), so neighbouring lanes make
// neighbouring bits. Read: tokens [rows]. Written: mask [rows, 4, words]. Grid: words × rows; block: 32 threads.
#include "element.cuh"
#include "philox.cuh"

extern "C" __global__ void __launch_bounds__(32)
    NAMED(dropout_mask)(const uint32_t* __restrict__ tokens, uint32_t* __restrict__ mask, Dropout dropout, uint32_t module,
                        int words) {
  const uint32_t block = blockIdx.x * 32 + threadIdx.x;
  const uint4 w = philox(make_uint4(block, tokens[blockIdx.y], module, dropout.step), dropout.key);
  uint32_t* const row = mask + (size_t)blockIdx.y * 4 * words + blockIdx.x;
  const uint32_t bits[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
  for (int s = 0; s < 4; s++) {
    const uint32_t kept = __ballot_sync(0xffffffffu, bits[s] >= dropout.threshold);
    if (threadIdx.x == 0) row[s * words] = kept;
  }
}
