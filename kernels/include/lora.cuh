// LoRA's B in the kernels that read a product anyway: y += u Bᵀ forward, d_u = d_y B backward. B is packed as elements and
// transposed, [rank, out], so that neighbouring threads read neighbouring columns of y and of B; the scaling is in it, and the
// rank is padded to a multiple of 8 by zeros (lora.cu).
#pragma once
#include "element.cuh"

// One adapter of a product: where its u (or d_u) lies in a row of the product, and its B.
struct Adapter {
  int column;     // of u in the row
  int rank;       // padded; 0 for none
  const elem* b;  // [rank, out]
};

// y[r][c] += u[r] · B[:, c] for ROWS rows and COLUMNS neighbouring columns, B given from the first of them on, its rows `out` apart.
template <int ROWS, int COLUMNS>
__device__ __forceinline__ void add_lora(float (&y)[ROWS][COLUMNS], const elem* const (&u)[ROWS], const elem* b, int out, int rank) {
  for (int k = 0; k < rank; k += 8) {
    float uk[ROWS][8];
#pragma unroll
    for (int r = 0; r < ROWS; r++) load8(u[r] + k, uk[r]);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      float bk[COLUMNS];
      load_n<COLUMNS>(b + (size_t)(k + i) * out, bk);
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) y[r][c] = fmaf(uk[r][i], bk[c], y[r][c]);
      }
    }
  }
}

// sum[r][i] += d[r] · B[i, :] for eight rows of B and COLUMNS columns, B given from the first of both on.
template <int ROWS, int COLUMNS>
__device__ __forceinline__ void add_d_u(float (&sum)[ROWS][8], const float (&d)[ROWS][COLUMNS], const elem* b, int out) {
#pragma unroll
  for (int i = 0; i < 8; i++) {
    float bk[COLUMNS];
    load_n<COLUMNS>(b + (size_t)i * out, bk);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#pragma unroll
      for (int c = 0; c < COLUMNS; c++) sum[r][i] = fmaf(d[r][c], bk[c], sum[r][i]);
    }
  }
}
