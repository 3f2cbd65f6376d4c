// Masks of LoRA's dropout: one bit an element, made once and read by every product that needs it.
//
//   bit (row, feature) = philox word (token of the row, feature) >= threshold          1: kept
//
// A row has four quarters of ⌈width / 4⌉ features, each a whole number of 32-bit words: bit i of quarter s is feature
// s · quarter + i. Words of the same features of all rows are neighbours, since products walk the features of many rows at once.
// One Philox block gives the four bits of block number i (src/device/ops.rs), so neighbouring lanes make neighbouring bits.
// Read: tokens [rows], and dropout, in memory so that one graph serves every step. Written: mask [4, words, rows]. Grid: rows in
// ROWS × words in WORDS; block: 256 threads, each warp a word of each quarter at a time.
#include "element.cuh"
#include "philox.cuh"

constexpr int WARPS = 8;
constexpr int ROWS = 32;
constexpr int WORDS = 2;

extern "C" __global__ void __launch_bounds__(WARPS * 32)
    NAMED(dropout_mask)(const uint32_t* __restrict__ tokens, uint32_t* __restrict__ mask, const Dropout* __restrict__ dropout,
                        uint32_t module, int words, int rows) {
  static_assert(4 * WORDS * ROWS == WARPS * 32, "every thread stores a word");
  __shared__ uint32_t staged[4][WORDS][ROWS], token[ROWS];
  const int row0 = blockIdx.x * ROWS, word0 = blockIdx.y * WORDS, warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  if (threadIdx.x < ROWS) token[threadIdx.x] = tokens[min(row0 + (int)threadIdx.x, rows - 1)];
  const Dropout d = *dropout;
  __syncthreads();
  for (int i = warp; i < WORDS * ROWS; i += WARPS) {
    const int word = i / ROWS, row = i % ROWS;
    if (row0 + row >= rows || word0 + word >= words) continue;
    const uint4 w = philox(make_uint4((word0 + word) * 32 + lane, token[row], module, d.step), d.key);
    const uint32_t bits[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int s = 0; s < 4; s++) {
      const uint32_t kept = __ballot_sync(0xffffffffu, bits[s] >= d.threshold);
      if (lane == 0) staged[s][word][row] = kept;
    }
  }
  __syncthreads();
  const int s = threadIdx.x / (WORDS * ROWS), word = word0 + threadIdx.x / ROWS % WORDS, row = row0 + threadIdx.x % ROWS;
  if (word < words && row < rows) mask[((size_t)s * words + word) * rows + row] = staged[s][word - word0][row - row0];
}
