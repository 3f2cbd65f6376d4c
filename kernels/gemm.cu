// Matrix products with frozen weights, LoRA's A riding along.
//
//   nt: C[m, n] = epilogue( A[m, k] · B[n, k]ᵀ )      forward:  x Wᵀ,   B = [W; lora_a] stacked by rows
//   nn: C[m, n] = epilogue( A[m, k] · B[k, n] )       backward: d_y W,  A = [d_y | d_u] side by side
//
// One product gives y and u = x lora_aᵀ at once, as further columns of C, and d_y W + d_u lora_a at once, as further steps of K.
// W stays as it was loaded: rows of B from `b_rows` on are read from a second matrix, `b_tail`, the adapters' A.
// With dropout on the adapter's input, columns of lora_a form tiles of their own whose A tile is masked in shared memory (nt),
// and steps of lora_a are summed apart and masked before they are added (nn). Masks: mask.cu.
//
// Epilogues (float32, rounded once): plain: + bias + addend; swiglu: C holds gate and up in turn, act = silu(gate) · up is
// written too; swiglu_bwd: the product is d_act, C becomes the gradient of gate and up.
//
// A, B, C, addend: rows of elements at 16-byte boundaries; m any, n and k multiples of 8. Read: a, b, bias, addend, gate_up,
// masks. Written: c, act. Grid: tiles of C, grouped so that neighbours share rows of A and B in L2. 128 threads, STAGES stages
// of asynchronous copies in dynamic shared memory, swizzled (mma.cuh).
#include "gemm.cuh"
#include "mma.cuh"

constexpr int BK = 32;
constexpr int STAGES = 3;
constexpr int THREADS = 128;

// The tile of rows row0.. and columns col0.. of a row-major matrix, ROWS × COLUMNS elements; outside it, zeros. `at(row)` is
// where a row begins.
template <int ROWS, int COLUMNS, typename At>
__device__ __forceinline__ void load_tile(elem* tile, At at, int row0, int n_rows, int col0, int n_cols) {
  constexpr int CHUNKS = COLUMNS / VEC;
  static_assert(ROWS * CHUNKS % THREADS == 0, "every thread copies the same number of chunks");
#pragma unroll
  for (int i = 0; i < ROWS * CHUNKS / THREADS; i++) {
    const int c = threadIdx.x + i * THREADS, r = c / CHUNKS, column = c % CHUNKS * VEC;
    const bool inside = row0 + r < n_rows && col0 + column < n_cols;
    const elem* source = at(inside ? row0 + r : row0) + (inside ? col0 + column : 0);
    copy16(shared_address(tile + tile_at<COLUMNS>(r, column)), source, inside);
  }
}

template <int BM, int BN, int WM, int WN, bool B_IS_KN, Epilogue EPILOGUE>
__device__ __forceinline__ void gemm(const Gemm& g) {
  static_assert(WM * WN * 32 == THREADS, "four warps");
  constexpr int TM = BM / WM, TN = BN / WN, MI = TM / 16, NJ = TN / 8;
  constexpr int A_TILE = BM * BK, B_TILE = BN * BK;
  constexpr int B_COLUMNS = B_IS_KN ? BN : BK;
  constexpr Major B_MAJOR = B_IS_KN ? Major::MN : Major::K;
  extern __shared__ __align__(128) unsigned char memory[];
  elem* const stages = reinterpret_cast<elem*>(memory);
  auto a_tile = [&](int s) { return stages + s * (A_TILE + B_TILE); };
  auto b_tile = [&](int s) { return stages + s * (A_TILE + B_TILE) + A_TILE; };

  const Place tile = place(blockIdx.x, (g.m + BM - 1) / BM, g.n_tiles);
  const int m0 = tile.m * BM, n_tile = tile.n;
  int n0 = n_tile * BN, n_last = g.n;
  const uint32_t* mask = nullptr;
  if constexpr (!B_IS_KN) {
    for (int r = 0; r < g.n_regions; r++) {
      if (n_tile >= g.regions[r].tile) {
        n0 = g.regions[r].first + (n_tile - g.regions[r].tile) * BN;
        n_last = g.regions[r].last;
        mask = g.regions[r].mask;
      }
    }
  }

  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  const int wm = warp / WN * TM, wn = warp % WN * TN;
  float acc[MI][NJ][4] = {};

  auto a_row = [&](int row) { return g.a + (size_t)row * g.lda; };
  auto b_row = [&](int row) {
    return row < g.b_rows ? g.b + (size_t)row * g.ldb : g.b_tail + (size_t)(row - g.b_rows) * g.ldb_tail;
  };
  auto load = [&](int stage, int k0, int k_last) {
    load_tile<BM, BK>(a_tile(stage), a_row, m0, g.m, k0, k_last);
    if constexpr (B_IS_KN) {
      load_tile<BK, BN>(b_tile(stage), b_row, k0, k_last, n0, n_last);
    } else {
      load_tile<BN, BK>(b_tile(stage), b_row, n0, n_last, k0, k_last);
    }
  };
  const int k_last = B_IS_KN ? g.k_last : g.k;
  const int steps = (k_last + BK - 1) / BK;
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) {
    if (s < steps) load(s, s * BK, k_last);
    copies_commit();
  }
  for (int step = 0; step < steps; step++) {
    copies_wait<STAGES - 2>();
    __syncthreads();
    const int next = step + STAGES - 1;
    if (next < steps) load(next % STAGES, next * BK, k_last);
    copies_commit();
    elem* const a = a_tile(step % STAGES);
    const elem* const b = b_tile(step % STAGES);
    if (!B_IS_KN && mask) {
      for (int i = threadIdx.x; i < A_TILE; i += THREADS) {
        const int row = m0 + i / BK, feature = step * BK + i % BK;
        if (row < g.m && feature < g.k) {
          elem& x = a[tile_at<BK>(i / BK, i % BK)];
          x = narrow<elem>(kept(g, mask, row, feature) ? widen(x) * g.mask_scale : 0.f);
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int kk = 0; kk < BK; kk += 16) mma_step<MI, NJ, Major::K, BK, B_MAJOR, B_COLUMNS>(acc, a, wm, b, wn, kk);
  }
  copies_wait<0>();

  if constexpr (B_IS_KN) {
    // Adapters with dropout: sums of their own, masked. The rank is short, so is this.
    for (int r = 0; r < g.n_regions; r++) {
      const Region region = g.regions[r];
      for (int k0 = region.first; k0 < region.last; k0 += BK) {
        __syncthreads();
        load(0, k0, region.last);
        copies_commit();
        copies_wait<0>();
        __syncthreads();
        for (int i = 0; i < MI; i++) {
          for (int j = 0; j < NJ; j += 2) {
            float part[1][2][4] = {};
#pragma unroll
            for (int kk = 0; kk < BK; kk += 16) {
              mma_step<1, 2, Major::K, BK, B_MAJOR, B_COLUMNS>(part, a_tile(0), wm + i * 16, b_tile(0), wn + j * 8, kk);
            }
#pragma unroll
            for (int e = 0; e < 8; e++) {
              const int row = m0 + wm + i * 16 + lane / 4 + (e & 2) * 4, column = n0 + wn + (j + e / 4) * 8 + (lane & 3) * 2 + (e & 1);
              const bool keep = row < g.m && column < g.n && kept(g, region.mask, row, column);
              const float v = keep ? part[0][e / 4][e & 3] * g.mask_scale : 0.f;
              // The indices i and j are not known when compiled: a select a fragment keeps the sums in registers.
#pragma unroll
              for (int ii = 0; ii < MI; ii++) {
#pragma unroll
                for (int jj = 0; jj < NJ; jj++) {
                  if (ii == i && jj == j + e / 4) acc[ii][jj][e & 3] += v;
                }
              }
            }
          }
        }
      }
    }
  }

  // Through shared memory, 16 rows of a warp's tile at a time, so that rows leave in whole sectors.
  __syncthreads();
  constexpr int LD = TN + 8;
  float* const slab = reinterpret_cast<float*>(memory) + warp * 16 * LD;
  constexpr int LANES = TN / 8, ROWS = 32 / LANES;
  const int column = n0 + wn + lane % LANES * 8;
#pragma unroll
  for (int i = 0; i < MI; i++) {
    __syncwarp();
#pragma unroll
    for (int j = 0; j < NJ; j++) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float2* to = reinterpret_cast<float2*>(slab + (lane / 4 + h * 8) * LD + j * 8 + (lane & 3) * 2);
        *to = make_float2(acc[i][j][2 * h], acc[i][j][2 * h + 1]);
      }
    }
    __syncwarp();
#pragma unroll
    for (int p = 0; p < 16 / ROWS; p++) {
      const int r = p * ROWS + lane / LANES, row = m0 + wm + i * 16 + r;
      // Four lanes read the first half of their eight, four the second: all banks at once.
      const float4* from = reinterpret_cast<const float4*>(slab + r * LD + lane % LANES * 8);
      const int turn = lane >> 2 & 1;
      const float4 x = from[turn], y = from[turn ^ 1];
      const float4 lo = turn ? y : x, hi = turn ? x : y;
      float v[8] = {lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w};
      if (row >= g.m || column >= n_last) continue;
      Fetched<EPILOGUE> fetched;
      fetch<EPILOGUE, B_IS_KN>(g, row, column, fetched);
      finish<EPILOGUE, B_IS_KN>(g, row, column, v, fetched);
    }
  }
}

#define GEMM(name, bm, bn, wm, wn, kn, epilogue)                                                          \
  extern "C" __global__ void __launch_bounds__(THREADS, 2) NAMED(name)(const __grid_constant__ Gemm g) {     \
    gemm<bm, bn, wm, wn, kn, Epilogue::epilogue>(g);                                                      \
  }

// The float32 build is for checking: one tile shape.
#ifndef COLLM_F32
GEMM(gemm_nt_128x128, 128, 128, 2, 2, false, Plain)
GEMM(gemm_nt_128x64, 128, 64, 2, 2, false, Plain)
GEMM(gemm_nn_128x128, 128, 128, 2, 2, true, Plain)
GEMM(gemm_nn_128x64, 128, 64, 2, 2, true, Plain)
GEMM(gemm_nt_swiglu_128x128, 128, 128, 2, 2, false, Swiglu)
GEMM(gemm_nn_swiglu_bwd_128x128, 128, 128, 2, 2, true, SwigluBackward)
#endif
GEMM(gemm_nt_32x64, 32, 64, 2, 2, false, Plain)
GEMM(gemm_nn_32x64, 32, 64, 2, 2, true, Plain)
GEMM(gemm_nt_swiglu_32x64, 32, 64, 2, 2, false, Swiglu)
GEMM(gemm_nn_swiglu_bwd_32x64, 32, 64, 2, 2, true, SwigluBackward)
