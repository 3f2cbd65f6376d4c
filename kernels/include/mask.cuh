// Reading the masks of LoRA's dropout. Layout: mask.cu.
#pragma once
#include "element.cuh"

struct MaskLayout {
  int words;    // of a quarter of a row
  int quarter;  // features of a quarter
  int rows;     // of the mask
};

// Which of the 32 elements of a row from `feature` on are kept, a bit each; 0 beyond the last feature of the mask. One word where
// `feature` and the quarter are multiples of 32, as in every large model. Neighbouring rows read neighbouring words.
__device__ __forceinline__ uint32_t kept32(const uint32_t* mask, const MaskLayout& l, int row, int feature) {
  uint32_t bits = 0;
  int section = feature / l.quarter, i = feature - section * l.quarter;
  for (int at = 0; at < 32 && section < 4;) {
    const uint32_t word = mask[(size_t)(section * l.words + i / 32) * l.rows + row] >> (i & 31);
    const int n = min(min(32 - (i & 31), l.quarter - i), 32 - at);
    bits |= (n == 32 ? word : word & ((1u << n) - 1)) << at;
    at += n;
    i += n;
    if (i == l.quarter) i = 0, section++;
  }
  return bits;
}

// Zeroes those of VEC neighbouring elements whose bits are not set.
__device__ __forceinline__ void drop(uint4& elements, uint32_t bits) {
  uint32_t* const words[4] = {&elements.x, &elements.y, &elements.z, &elements.w};
#pragma unroll
  for (int w = 0; w < 4; w++) {
    // A word is an element, or two.
    const uint32_t lo = bits >> (w * VEC / 4) & 1, hi = bits >> (w * VEC / 4 + VEC / 4 - 1) & 1;
    *words[w] &= (lo ? 0x0000ffffu : 0u) | (hi ? 0xffff0000u : 0u);
  }
}
