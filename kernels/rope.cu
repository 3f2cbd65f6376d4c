// Rotary position embedding of queries and keys, fused with LoRA's B of the product before it.
//
//   fwd  y += u Bᵀ (each adapted part), then each pair (i, i + d/2) of every head of q and k is turned by its angle.
//   bwd  d_q and d_k are turned back, then d_u = d_y B for each adapted part.
//
// Rows hold parts side by side; a part is `heads` heads of `head_dim`, turned or not (v), with or without an adapter whose u lies
// in the same row. In place. The angles' cosines and sines come from a table, [n_positions, head_dim / 2] float2, in float32.
// Read: positions [n], table. Read and written: rows [n, ld]. Grid: blocks of ROWS rows; block: 256 threads. head_dim / 2 is at
// most 128, and a multiple of the G elements that a thread takes from each half of a head: 8, or 4 for small models.
#include "lora.cuh"
#include "reduce.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int ROWS = 4;
constexpr int PARTS = 3;
// Of the largest head.
constexpr int MAX_HALF = 128;

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

// Place of angles 2q and 2q + 1 of a thread's group: such that neighbouring threads read, and write, different banks.
template <int G> __device__ __forceinline__ int angle_at(int group, int q) {
  constexpr int PAIRS = G / 2;
  return group * PAIRS + (q ^ (group / (8 / PAIRS) % PAIRS));
}

// Turns pairs of a head: (a, b) ← (a cos − b sin, b cos + a sin), or back with the sign of sin changed.
template <int G>
__device__ __forceinline__ void turn(float (&a)[ROWS][G], float (&b)[ROWS][G], const float4 (&angles)[ROWS][MAX_HALF / 2], int group,
                                     float sign) {
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
#pragma unroll
    for (int q = 0; q < G / 2; q++) {
      const float4 angle = angles[r][angle_at<G>(group, q)];
      const float cos[2] = {angle.x, angle.z}, sin[2] = {sign * angle.y, sign * angle.w};
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float x = a[r][2 * q + h], y = b[r][2 * q + h];
        a[r][2 * q + h] = x * cos[h] - y * sin[h];
        b[r][2 * q + h] = y * cos[h] + x * sin[h];
      }
    }
  }
}

template <int G, bool BACKWARD> __device__ __forceinline__ void rope(const Rope& p) {
  // Partial sums of d_u: [warps][rows × 8].
  __shared__ float partial[WARPS][ROWS * 8];
  // The rows' angles, which all heads of q and k read.
  __shared__ float4 angles[ROWS][MAX_HALF / 2];
  const int row0 = blockIdx.x * ROWS, half = p.head_dim / 2;
  for (int i = threadIdx.x; i < ROWS * half / 2; i += THREADS) {
    const int r = i / (half / 2), pair = i % (half / 2);
    const float2* const from = p.table + (size_t)p.positions[min(row0 + r, p.n - 1)] * half;
    angles[r][angle_at<G>(pair / (G / 2), pair % (G / 2))] = reinterpret_cast<const float4*>(from)[pair];
  }
  __syncthreads();
  elem* row[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) row[r] = p.rows + (size_t)min(row0 + r, p.n - 1) * p.ld;
  for (int q = 0; q < PARTS; q++) {
    const Part& part = p.parts[q];
    if (part.heads == 0 || (!part.turned && part.lora.rank == 0)) continue;
    const int groups = half / G, items = part.heads * groups, out = part.heads * p.head_dim;
    const elem* u[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) u[r] = row[r] + part.lora.column;
    // Loads an item, its two halves of a head, of all rows; stores it.
    auto load = [&](int first, float (&a)[ROWS][G], float (&b)[ROWS][G]) {
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        load_n<G>(row[r] + part.column + first, a[r]);
        load_n<G>(row[r] + part.column + first + half, b[r]);
      }
    };
    auto store = [&](int first, const float (&a)[ROWS][G], const float (&b)[ROWS][G]) {
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        if (row0 + r >= p.n) break;
        store_n<G>(row[r] + part.column + first, a[r]);
        store_n<G>(row[r] + part.column + first + half, b[r]);
      }
    };
    if (!BACKWARD || part.lora.rank == 0) {
      for (int item = threadIdx.x; item < items; item += THREADS) {
        const int i = item % groups * G, first = item / groups * p.head_dim + i;
        float a[ROWS][G], b[ROWS][G];
        load(first, a, b);
        if (!BACKWARD && part.lora.rank) {
          add_lora<ROWS, G>(a, u, part.lora.b + first, out, part.lora.rank);
          add_lora<ROWS, G>(b, u, part.lora.b + first + half, out, part.lora.rank);
        }
        if (part.turned) turn<G>(a, b, angles, i / G, BACKWARD ? -1.f : 1.f);
        store(first, a, b);
      }
    } else {
      // d_u = d_y B, of the turned gradient as it is stored. Further eights of the rank read what the same thread wrote.
      for (int k = 0; k < part.lora.rank; k += 8) {
        float sum[ROWS][8] = {};
        for (int item = threadIdx.x; item < items; item += THREADS) {
          const int i = item % groups * G, first = item / groups * p.head_dim + i;
          float a[ROWS][G], b[ROWS][G];
          load(first, a, b);
          if (k == 0 && part.turned) {
            turn<G>(a, b, angles, i / G, -1.f);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
#pragma unroll
              for (int c = 0; c < G; c++) a[r][c] = rounded(a[r][c]), b[r][c] = rounded(b[r][c]);
            }
            store(first, a, b);
          }
          const elem* const from = part.lora.b + (size_t)k * out + first;
          add_d_u<ROWS, G>(sum, a, from, out);
          add_d_u<ROWS, G>(sum, b, from + half, out);
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
