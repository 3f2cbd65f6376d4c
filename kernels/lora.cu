// LoRA's own kernels: packing the float32 masters, d_u where no other kernel can give it, and the gradients of A and B.
#include "lora.cuh"
#include "mask.cuh"
#include "mma.cuh"
#include "reduce.cuh"

// A float32 matrix [rows, columns] times `scale` as elements, with zeros up to [rows_padded, columns_padded]: (r, c) goes to element
// offset + r · row_step + c · column_step. A keeps its rows; B is transposed (row_step 1, or 2 where gate and up lie in turn).
// The weights of one launch are a table.
struct Pack {
  const float* from;
  elem* to;
  int rows, columns, rows_padded, columns_padded, row_step, column_step, offset;
  float scale;
};

// Squares of 32 × 32 pass through shared memory, so that loads and stores both run along the rows of their matrix.
// Grid: entries × 64; block: 256.
extern "C" __global__ void __launch_bounds__(256) NAMED(lora_pack)(const Pack* __restrict__ table) {
  __shared__ float square[32][33];
  __shared__ Pack p;
  static_assert(sizeof(Pack) % 4 == 0, "whole words");
  // Read once a block, not by every warp.
  if (threadIdx.x < sizeof(Pack) / 4) {
    reinterpret_cast<uint32_t*>(&p)[threadIdx.x] = reinterpret_cast<const uint32_t*>(table + blockIdx.x)[threadIdx.x];
  }
  __syncthreads();
  const int x = threadIdx.x % 32, across = (p.columns_padded + 31) / 32, squares = (p.rows_padded + 31) / 32 * across;
  const bool transposed = p.row_step < p.column_step;
  for (int i = blockIdx.y; i < squares; i += gridDim.y) {
    const int r0 = i / across * 32, c0 = i % across * 32;
    __syncthreads();
    for (int y = threadIdx.x / 32; y < 32; y += 8) {
      const int r = r0 + y, c = c0 + x;
      square[y][x] = r < p.rows && c < p.columns ? p.from[(size_t)r * p.columns + c] * p.scale : 0.f;
    }
    __syncthreads();
    for (int y = threadIdx.x / 32; y < 32; y += 8) {
      const int r = transposed ? x : y, c = transposed ? y : x;
      if (r0 + r < p.rows_padded && c0 + c < p.columns_padded) {
        p.to[p.offset + (size_t)(r0 + r) * p.row_step + (size_t)(c0 + c) * p.column_step] = narrow<elem>(square[r][c]);
      }
    }
  }
}

// d_u = d_y B: d_y [n, ld], B [rank, width] packed, d_u written at column `column` of the rows of `out`. Targets whose d_y no
// row kernel holds (o, gate, up, down). Grid: rows; block: 256.
extern "C" __global__ void __launch_bounds__(256, 3)
    NAMED(lora_d_u)(const elem* d_y, int ld, const elem* __restrict__ b, int width, int rank, elem* out, int ld_out) {
  __shared__ float partial[8][8];
  const elem* const row = d_y + (size_t)blockIdx.x * ld;
  for (int k = 0; k < rank; k += 8) {
    float sum[1][8] = {};
    for (int at = threadIdx.x * 8; at < width; at += 256 * 8) {
      float d[1][8];
      load8(row + at, d[0]);
      add_d_u<1, 8>(sum, d, b + (size_t)k * width + at, width);
    }
#pragma unroll
    for (int e = 0; e < 8; e++) {
      const float total = warp_sum(sum[0][e]);
      if ((threadIdx.x & 31) == 0) partial[threadIdx.x / 32][e] = total;
    }
    __syncthreads();
    if (threadIdx.x < 8) {
      float total = 0.f;
#pragma unroll
      for (int w = 0; w < 8; w++) total += partial[w][threadIdx.x];
      out[(size_t)blockIdx.x * ld_out + k + threadIdx.x] = narrow<elem>(total);
    }
    __syncthreads();
  }
}

// Gradients: G[r, c] = Σ_t U[t, r] · drop(X)[t, c] over the rows t, for d_A (U = d_u, X = the input, dropped) and d_B (U = u,
// X = d_y, stored transposed and scaled). Each block sums `rows_per_split` rows of one span of COLUMNS columns into
// `partials` [splits, spans, RANK, COLUMNS]; lora_grad_sum adds the splits in their order.
//
// U: [n, ldu], rank columns of which are used (a multiple of 8, at most 64); X: [n, ldx], columns a multiple of 8. The mask is
// mask.cu's; what it keeps is scaled by lora_grad_sum. Grid: column spans × splits; block: 128 threads, each warp a quarter of the span.
constexpr int RANK = 64;
constexpr int STEP = 32;
constexpr int COLUMNS = 128;

struct Grad {
  const elem* u;
  const elem* x;
  const uint32_t* mask;
  float* partials;
  int ldu, ldx, n, rank, columns, rows_per_split;
  MaskLayout mask_layout;
};

template <int MI> __device__ __forceinline__ void lora_grad(const Grad& g) {
  constexpr int R = MI * 16;
  __shared__ __align__(128) elem u_tile[STEP * R];
  __shared__ __align__(128) elem x_tile[STEP * COLUMNS];
  const int c0 = blockIdx.x * COLUMNS, warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  const int first = blockIdx.y * g.rows_per_split, last = min(g.n, first + g.rows_per_split);
  constexpr int OWN = COLUMNS / 4, NJ = OWN / 8;
  float acc[MI][NJ][4] = {};
  for (int t0 = first; t0 < last; t0 += STEP) {
    __syncthreads();
    for (int i = threadIdx.x; i < STEP * R / VEC; i += 128) {
      const int t = i / (R / VEC), r = i % (R / VEC) * VEC;
      const bool inside = t0 + t < last && r < g.rank;
      copy16(shared_address(u_tile + tile_at<R>(t, r)), inside ? g.u + (size_t)(t0 + t) * g.ldu + r : g.u, inside);
    }
    for (int i = threadIdx.x; i < STEP * COLUMNS / VEC; i += 128) {
      const int t = i / (COLUMNS / VEC), c = i % (COLUMNS / VEC) * VEC;
      const bool inside = t0 + t < last && c0 + c < g.columns;
      copy16(shared_address(x_tile + tile_at<COLUMNS>(t, c)), inside ? g.x + (size_t)(t0 + t) * g.ldx + c0 + c : g.x, inside);
    }
    copies_commit();
    copies_wait<0>();
    if (g.mask) {
      // Each thread what it copied itself.
      for (int i = threadIdx.x; i < STEP * COLUMNS / VEC; i += 128) {
        const int t = i / (COLUMNS / VEC), c = i % (COLUMNS / VEC) * VEC;
        if (t0 + t >= last) continue;
        uint4* const chunk = reinterpret_cast<uint4*>(x_tile + tile_at<COLUMNS>(t, c));
        uint4 x = *chunk;
        drop(x, kept32(g.mask, g.mask_layout, t0 + t, c0 + (c & ~31)) >> (c & 31));
        *chunk = x;
      }
    }
    __syncthreads();
#pragma unroll
    for (int kk = 0; kk < STEP; kk += 16) mma_step<MI, NJ, Major::MN, R, Major::MN, COLUMNS>(acc, u_tile, 0, x_tile, warp * OWN, kk);
  }
  float* const out = g.partials + ((size_t)blockIdx.y * gridDim.x + blockIdx.x) * RANK * COLUMNS;
#pragma unroll
  for (int i = 0; i < MI; i++) {
#pragma unroll
    for (int j = 0; j < NJ; j++) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int r = i * 16 + lane / 4 + h * 8, c = warp * OWN + j * 8 + (lane & 3) * 2;
        // One store of both: as a plain assignment it is taken apart.
        if (r < g.rank) __stcg(reinterpret_cast<float2*>(out + r * COLUMNS + c), make_float2(acc[i][j][2 * h], acc[i][j][2 * h + 1]));
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(128) NAMED(lora_grad_16)(const __grid_constant__ Grad g) { lora_grad<1>(g); }
extern "C" __global__ void __launch_bounds__(128) NAMED(lora_grad_64)(const __grid_constant__ Grad g) { lora_grad<4>(g); }

// Adds the splits to a gradient: to[r, c] (d_A, [rank, columns]) or to[c, r] (d_B, [columns, rank]) += scale · Σ. `stride` and
// `offset` pick the columns that belong to it (gate and up lie in turn). Grid: column spans; block: 256.
extern "C" __global__ void __launch_bounds__(256)
    NAMED(lora_grad_sum)(const float* __restrict__ partials, float* __restrict__ to, int splits, int rank, int columns,
                         int transposed, float scale, int stride, int offset) {
  // So padded that neighbours in either order lie in different banks.
  __shared__ float totals[RANK * (COLUMNS + 1)];
  const int ld = COLUMNS + max(1, 32 / rank), c0 = blockIdx.x * COLUMNS;
  for (int i = threadIdx.x; i < rank * COLUMNS; i += 256) {
    const int r = i / COLUMNS, column = i % COLUMNS;
    float sum = 0.f;
    for (int s = 0; s < splits; s++) sum += partials[(((size_t)s * gridDim.x + blockIdx.x) * RANK + r) * COLUMNS + column];
    totals[r * ld + column] = sum;
  }
  __syncthreads();
  const int places = columns / stride;
  for (int i = threadIdx.x; i < rank * COLUMNS; i += 256) {
    // The order that makes neighbours of what is added to.
    const int r = transposed ? i % rank : i / COLUMNS, column = transposed ? i / rank : i % COLUMNS, c = c0 + column;
    if (c >= columns || c % stride != offset) continue;
    const int place = c / stride;
    to[transposed ? (size_t)place * rank + r : (size_t)r * places + place] += scale * totals[r * ld + column];
  }
}
