// Rotary position embedding of queries and keys, fused with LoRA's B of the product before it.
//
//   fwd  y += u Bᵀ (each adapted part), then each pair (i, i + d/2) of every head of q and k is turned by its angle.
//   bwd  d_q and d_k are turned back, then d_u = d_y B for each adapted part.
//
// Rows hold parts side by side; a part is `heads` heads of `head_dim`, turned or not (v), with or without an adapter whose u lies
// in the same row. In place. The angles' cosines and sines come from a table, [n_positions, head_dim / 2] float2, in float32.
// Read: positions [n], table. Read and written: rows [n, ld]. Grid: blocks of ROWS rows; block: 256 threads. head_dim / 2 is a
// multiple of G elements that a thread takes from each half of a head: 8, or 4 for small models.
#include "lora.cuh"
#include "reduce.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int ROWS = 4;
constexpr int PARTS = 3;

struct Part {
  int column;  // first column of the part
  int heads;   // 0: no part
  int turned;  // 1 for q and k
  Adapter lora;
};

struct Rope {
  elem* rows;
  const uint32_t* positions;
  const float2* table;
  int ld, n, head_dim;
  Part parts[PARTS];
};

template <int G> __device__ __forceinline__ void load_group(const elem* p, float (&v)[G]) {
  if constexpr (G == 8) {
    load8(p, v);
  } else {
#pragma unroll
    for (int i = 0; i < G; i += 2) {
      const float2 pair = load_pair(p + i);
      v[i] = pair.x, v[i + 1] = pair.y;
    }
  }
}

template <int G> __device__ __forceinline__ void store_group(elem* p, const float (&v)[G]) {
  if constexpr (G == 8) {
    store8(p, v);
  } else {
#pragma unroll
    for (int i = 0; i < G; i += 2) store_pair(p + i, v[i], v[i + 1]);
  }
}

// Turns pairs of a head: (a, b) ← (a cos − b sin, b cos + a sin), or back with the sign of sin changed.
template <int G>
__device__ __forceinline__ void turn(float (&a)[ROWS][G], float (&b)[ROWS][G], const Rope& p, int row0, int i, float sign) {
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    if (row0 + r >= p.n) break;
    const float2* const angle = p.table + (size_t)p.positions[row0 + r] * (p.head_dim / 2) + i;
#pragma unroll
    for (int g = 0; g < G; g++) {
      const float cos = angle[g].x, sin = sign * angle[g].y, x = a[r][g], y = b[r][g];
      a[r][g] = x * cos - y * sin;
      b[r][g] = y * cos + x * sin;
    }
  }
}

template <int G, bool BACKWARD> __device__ __forceinline__ void rope(const Rope& p) {
  // Partial sums of d_u: [warps][rows × 8].
  __shared__ float partial[WARPS][ROWS * 8];
  const int row0 = blockIdx.x * ROWS, half = p.head_dim / 2;
  elem* row[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) row[r] = p.rows + (size_t)min(row0 + r, p.n - 1) * p.ld;
  for (int q = 0; q < PARTS; q++) {
    const Part& part = p.parts[q];
    if (part.heads == 0 || (!part.turned && part.lora.rank == 0)) continue;
    const int groups = half / G, items = part.heads * groups;
    const elem* u[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) u[r] = row[r] + part.lora.column;
    if (!BACKWARD || part.turned) {
      for (int item = threadIdx.x; item < items; item += THREADS) {
        const int i = item % groups * G, first = item / groups * p.head_dim + i;
        float a[ROWS][G], b[ROWS][G];
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
          load_group<G>(row[r] + part.column + first, a[r]);
          load_group<G>(row[r] + part.column + first + half, b[r]);
        }
        if (!BACKWARD && part.lora.rank) {
          add_lora<ROWS, G>(a, u, part.lora.b + (size_t)first * part.lora.rank, part.lora.rank);
          add_lora<ROWS, G>(b, u, part.lora.b + (size_t)(first + half) * part.lora.rank, part.lora.rank);
        }
        if (part.turned) turn<G>(a, b, p, row0, i, BACKWARD ? -1.f : 1.f);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
          if (row0 + r >= p.n) break;
          store_group<G>(row[r] + part.column + first, a[r]);
          store_group<G>(row[r] + part.column + first + half, b[r]);
        }
      }
    }
    if (BACKWARD && part.lora.rank) {
      // d_u = d_y B. The same thread reads what it wrote: no barrier in between.
      for (int k = 0; k < part.lora.rank; k += 8) {
        float sum[ROWS][8] = {};
        for (int item = threadIdx.x; item < items; item += THREADS) {
          const int first = item / groups * p.head_dim + item % groups * G;
#pragma unroll
          for (int h = 0; h < 2; h++) {
            float d[ROWS][G];
#pragma unroll
            for (int r = 0; r < ROWS; r++) load_group<G>(row[r] + part.column + first + h * half, d[r]);
#pragma unroll
            for (int g = 0; g < G; g++) {
              float b[8];
              load8(part.lora.b + (size_t)(first + h * half + g) * part.lora.rank + k, b);
#pragma unroll
              for (int r = 0; r < ROWS; r++) {
#pragma unroll
                for (int e = 0; e < 8; e++) sum[r][e] = fmaf(d[r][g], b[e], sum[r][e]);
              }
            }
          }
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
#pragma unroll
          for (int e = 0; e < 8; e++) {
            const float total = warp_sum(sum[r][e]);
            if ((threadIdx.x & 31) == 0) partial[threadIdx.x / 32][r * 8 + e] = total;
          }
        }
        __syncthreads();
        if (threadIdx.x < ROWS * 8) {
          float total = 0.f;
#pragma unroll
          for (int w = 0; w < WARPS; w++) total += partial[w][threadIdx.x];
          const int r = threadIdx.x / 8;
          if (row0 + r < p.n) p.rows[(size_t)(row0 + r) * p.ld + part.lora.column + k + threadIdx.x % 8] = narrow<elem>(total);
        }
        __syncthreads();
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) NAMED(rope_fwd_8)(const __grid_constant__ Rope p) { rope<8, false>(p); }
extern "C" __global__ void __launch_bounds__(THREADS, 1) NAMED(rope_bwd_8)(const __grid_constant__ Rope p) { rope<8, true>(p); }
extern "C" __global__ void __launch_bounds__(THREADS, 1) NAMED(rope_fwd_4)(const __grid_constant__ Rope p) { rope<4, false>(p); }
extern "C" __global__ void __launch_bounds__(THREADS, 1) NAMED(rope_bwd_4)(const __grid_constant__ Rope p) { rope<4, true>(p); }
