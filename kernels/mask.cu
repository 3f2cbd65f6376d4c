// Masks of LoRA's dropout: one bit an element, made once and read by every product that needs it.
//
//   bit (row, feature) = philox word (token of the row, feature) >= threshold          1: kept
//
// A row has four quarters of ⌈width / 4⌉ features, each a whole number of 32-bit words: bit i of quarter s is feature
// s · quarter + i. One Philox block gives the four bits of block number i (src/device/ops.rs), so neighbouring lanes make
// neighbouring bits. Read: tokens [rows], and dropout, in memory so that one graph serves every step. Written: mask
// [rows, 4, words]. Grid: words of a quarter of all rows in eights; block: 256 threads, each warp a word of each
// quarter.
#include "element.cuh"
#include "philox.cuh"

constexpr int WARPS = 8;

extern "C" __global__ void __launch_bounds__(WARPS * 32)
    NAMED(dropout_mask)(const uint32_t* __restrict__ tokens, uint32_t* __restrict__ mask, const Dropout* __restrict__ dropout,
                        uint32_t module, int words, int rows) {
  __shared__ uint32_t staged[4][WARPS];
  const int total = words * rows, first = blockIdx.x * WARPS, warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  if (first + warp < total) {
    const int row = (first + warp) / words, word = (first + warp) % words;
    const Dropout d = *dropout;
    const uint4 w = philox(make_uint4(word * 32 + lane, tokens[row], module, d.step), d.key);
    const uint32_t bits[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int s = 0; s < 4; s++) {
      const uint32_t kept = __ballot_sync(0xffffffffu, bits[s] >= d.threshold);
      if (lane == 0) staged[s][warp] = kept;
    }
  }
  __syncthreads();
  // Words of a quarter are neighbours.
  const int s = threadIdx.x / WARPS, at = first + threadIdx.x % WARPS;
  if (s < 4 && at < total) mask[((size_t)(at / words) * 4 + s) * words + at % words] = staged[s][threadIdx.x % WARPS];
}
