// SwiGLU where gate or up carry an adapter: gate_up += u Bᵀ, then act = silu(gate) · up. Without adapters it is the epilogue of
// the product (gemm.cu).
//
// Rows of gate_up are gate and up in turn, [n, 2 width]; u of gate and up side by side in the same rows, and B [rank, 2 width] has
// zeros where a column's adapter is the other one. Read and written: gate_up (whole, for backward). Written: act [n, width].
// Grid: column spans × blocks of ROWS rows; block: 256 threads of 8 columns. The width is a multiple of 8.
#include "lora.cuh"

constexpr int THREADS = 256;
constexpr int ROWS = 4;

extern "C" __global__ void __launch_bounds__(THREADS)
    NAMED(swiglu_lora)(elem* __restrict__ gate_up, int ld, elem* __restrict__ act, int ld_act, int n, int width,
                       const Adapter lora) {
  const int column = (blockIdx.x * THREADS + threadIdx.x) * 8, row0 = blockIdx.y * ROWS;
  if (column >= 2 * width) return;
  float v[ROWS][8];
  const elem* u[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const elem* const row = gate_up + (size_t)min(row0 + r, n - 1) * ld;
    load8(row + column, v[r]);
    u[r] = row + lora.column;
  }
  add_lora<ROWS, 8>(v, u, lora.b + column, 2 * width, lora.rank);
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    if (row0 + r >= n) break;
    store8(gate_up + (size_t)(row0 + r) * ld + column, v[r]);
    float out[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float gate = rounded(v[r][2 * i]), up = rounded(v[r][2 * i + 1]);
      out[i] = gate / (1.f + __expf(-gate)) * up;
    }
    elem* const to = act + (size_t)(row0 + r) * ld_act + column / 2;
    store_pair(to, out[0], out[1]);
    store_pair(to + 2, out[2], out[3]);
  }
}
