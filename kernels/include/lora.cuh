// LoRA's B in the kernels that read a product anyway: y += u Bᵀ forward, d_u = d_y B backward. B is packed as elements,
// [out, rank] with the scaling in it and the rank padded to a multiple of 8 by zeros (lora.cu).
#pragma once
#include "element.cuh"

// One adapter of a product: where its u (or d_u) lies in a row of the product, and its B.
struct Adapter {
  int column;     // of u in the row
  int rank;       // padded; 0 for none
  const elem* b;  // [out, rank]
};

// y[r][c] += u[r] · B[c] for ROWS rows and COLUMNS neighbouring columns, B given from the first of them on.
template <int ROWS, int COLUMNS>
__device__ __forceinline__ void add_lora(float (&y)[ROWS][COLUMNS], const elem* const (&u)[ROWS], const elem* b, int rank) {
  for (int k = 0; k < rank; k += 8) {
    float uk[ROWS][8];
#pragma unroll
    for (int r = 0; r < ROWS; r++) load8(u[r] + k, uk[r]);
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
      float bk[8];
      load8(b + (size_t)c * rank + k, bk);
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
#pragma unroll
        for (int i = 0; i < 8; i++) y[r][c] = fmaf(uk[r][i], bk[i], y[r][c]);
      }
    }
  }
}
