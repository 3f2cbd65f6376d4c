// Matrix products with frozen weights, LoRA's A riding along.
//
//   nt: C[m, n] = epilogue( A[m, k] · B[n, k]ᵀ )      forward:  x Wᵀ,   B = [W; lora_a] stacked by rows
//   nn: C[m, n] = epilogue( A[m, k] · B[k, n] )       backward: d_y W,  A = [d_y | d_u] side by side
//
// One product gives y and u = x lora_aᵀ at once, as further columns of C, and d_y W + d_u lora_a at once, as further steps of K.
// W stays as it was loaded: rows of B from `b_rows` on are read from a second matrix, `b_tail`, the adapters' A.
// With dropout on the adapter's input, columns of lora_a form narrow tiles of their own whose A tile is masked in shared memory
// (nt), and steps of lora_a are summed apart and masked before they are added (nn). Masks: mask.cu.
//
// Epilogues (float32, rounded once): plain: + bias + addend; swiglu: C holds gate and up in turn, act = silu(gate) · up is
// written too; swiglu_bwd: the product is d_act, C becomes the gradient of gate and up.
//
// A, B, C, addend: rows of elements at 16-byte boundaries; m any, n and k multiples of 8. Read: a, b, bias, addend, gate_up,
// masks. Written: c, act. Grid: tiles of C, grouped so that neighbours share rows of A and B in L2. 128 threads, STAGES stages
// of asynchronous copies in dynamic shared memory, swizzled (mma.cuh).
#include "gemm.cuh"
#include "mask.cuh"
#include "mma.cuh"

constexpr int BK = 32;
constexpr int STAGES = 3;
constexpr int THREADS = 128;
// Columns of a tile of adapters with dropout (nt).
constexpr int MASKED_BN = 32;

// What a thread copies of ROWS rows of a matrix, BK columns a step of K, into tiles [ROWS][BK]. Rows beyond the last are the last:
// what they add to is never stored. `at(row)` is where a row begins.
template <int ROWS> struct RowsAlongK {
  static constexpr int CHUNKS = BK / VEC, COPIES = ROWS * CHUNKS / THREADS, APART = THREADS / CHUNKS;
  static constexpr int BYTES_APART = APART * BK * (int)sizeof(elem);
  static_assert(ROWS * CHUNKS % THREADS == 0, "every thread copies the same number of chunks");
  static_assert(APART % 8 == 0, "the swizzle repeats every eight rows");
  const elem* from[COPIES];
  uint32_t to;
  int row, column;

  template <typename At> __device__ __forceinline__ RowsAlongK(At at, int row0, int n_rows, uint32_t tile) {
    row = threadIdx.x / CHUNKS;
    column = threadIdx.x % CHUNKS * VEC;
    to = tile + tile_at<BK>(row, column) * (int)sizeof(elem);
#pragma unroll
    for (int i = 0; i < COPIES; i++) from[i] = at(min(row0 + row + i * APART, n_rows - 1)) + column;
  }

  // The step STEPS after that where the pointers are, to the stage AT bytes after the first.
  template <int AT, int STEPS> __device__ __forceinline__ void copy() const {
    unrolled<COPIES>([&](auto i) {
      copy16<AT + i * BYTES_APART, STEPS * BK * (int)sizeof(elem)>(to, from[i]);
    });
  }

  // The same of a step that has `left` columns; zeros beyond.
  __device__ __forceinline__ void copy_part(int at, int steps, int left) const {
#pragma unroll
    for (int i = 0; i < COPIES; i++) {
      copy16(to + at + i * BYTES_APART, column < left ? from[i] + steps * BK : from[i] - column, column < left);
    }
  }

  __device__ __forceinline__ void advance(int steps) {
#pragma unroll
    for (int i = 0; i < COPIES; i++) from[i] += steps * BK;
  }

  // Which elements of the step that begins at `feature` are kept, a bit each, a word a row. The mask begins at row `row0` of `n_rows`.
  __device__ __forceinline__ void kept(uint32_t (&bits)[COPIES], const uint32_t* mask, const MaskLayout& layout, int row0, int feature) const {
#pragma unroll
    for (int i = 0; i < COPIES; i++) bits[i] = kept32(mask, layout, min(row0 + row + i * APART, layout.rows - 1), feature);
  }

  // Zeroes what is not kept of the chunks that this thread copied itself, once they are there.
  __device__ __forceinline__ void drop(unsigned char* tile, const uint32_t (&bits)[COPIES]) const {
#pragma unroll
    for (int i = 0; i < COPIES; i++) {
      uint4* const chunk = reinterpret_cast<uint4*>(tile + tile_at<BK>(row, column) * (int)sizeof(elem) + i * BYTES_APART);
      uint4 x = *chunk;
      ::drop(x, bits[i] >> column);
      *chunk = x;
    }
  }
};

// The same of BK rows a step of K, columns col0.. of a matrix, into tiles [BK][COLUMNS]. Columns beyond the last are others.
template <int COLUMNS> struct ColumnsAcrossK {
  static constexpr int CHUNKS = COLUMNS / VEC, COPIES = BK * CHUNKS / THREADS, APART = THREADS / CHUNKS;
  static constexpr int BYTES_APART = APART * COLUMNS * (int)sizeof(elem);
  static_assert(BK * CHUNKS % THREADS == 0, "every thread copies the same number of chunks");
  static_assert(APART % 8 == 0, "the swizzle repeats every eight rows");
  const elem* from;  // of the next copy: runs down the matrix
  size_t apart;
  int row, column;
  uint32_t to;

  __device__ __forceinline__ ColumnsAcrossK(const Gemm& g, int col0, int n_cols, uint32_t tile) {
    row = threadIdx.x / CHUNKS;
    const int c = threadIdx.x % CHUNKS * VEC;
    to = tile + tile_at<COLUMNS>(row, c) * (int)sizeof(elem);
    column = min(col0 + c, n_cols - VEC);
    apart = (size_t)APART * g.ldb;
    from = g.b + (size_t)row * g.ldb + column;
  }

  // The next step, of B above its tail.
  template <int AT> __device__ __forceinline__ void copy() {
    unrolled<COPIES>([&](auto i) {
      copy16<AT + i * BYTES_APART, 0>(to, from);
      from += apart;
    });
  }

  // Steps k0.. of K up to k_last, of B and its tail; zeros beyond.
  __device__ __forceinline__ void copy_part(const Gemm& g, int at, int k0, int k_last) const {
#pragma unroll
    for (int i = 0; i < COPIES; i++) {
      const int k = k0 + row + i * APART;
      const bool is = k < k_last;
      const elem* source = !is ? g.b : k < g.b_rows ? g.b + (size_t)k * g.ldb + column : g.b_tail + (size_t)(k - g.b_rows) * g.ldb_tail + column;
      copy16(to + at + i * BYTES_APART, source, is);
    }
  }
};

// One tile of C: rows m0.., columns n0.. up to n_last. `mask`: of A, for an adapter whose input is dropped out (nt).
template <int BM, int BN, int WM, int WN, bool B_IS_KN, Epilogue EPILOGUE, bool MASKED>
__device__ __forceinline__ void gemm_tile(const Gemm& g, int m0, int n0, int n_last, const uint32_t* mask) {
  static_assert(WM * WN * 32 == THREADS, "four warps");
  static_assert(!(MASKED && B_IS_KN), "masks of A belong to the forward");
  constexpr int TM = BM / WM, TN = BN / WN, MI = TM / 16, NJ = TN / 8;
  constexpr int A_TILE = BM * BK, B_TILE = BN * BK;
  constexpr int B_COLUMNS = B_IS_KN ? BN : BK;
  constexpr Major B_MAJOR = B_IS_KN ? Major::MN : Major::K;
  extern __shared__ __align__(128) unsigned char memory[];

  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  const int wm = warp / WN * TM, wn = warp % WN * TN;
  float acc[MI][NJ][4] = {};

  auto a_row = [&](int row) { return g.a + (size_t)row * g.lda; };
  auto b_row = [&](int row) {
    return row < g.b_rows ? g.b + (size_t)row * g.ldb : g.b_tail + (size_t)(row - g.b_rows) * g.ldb_tail;
  };
  constexpr int STAGE = (A_TILE + B_TILE) * (int)sizeof(elem), B_AT = A_TILE * (int)sizeof(elem);
  const uint32_t base = shared_address(memory);
  RowsAlongK<BM> a_copies(a_row, m0, g.m, base);
  auto b_copies = [&] {
    if constexpr (B_IS_KN) {
      return ColumnsAcrossK<BN>(g, n0, g.n, base + B_AT);
    } else {
      return RowsAlongK<BN>(b_row, n0, n_last, base + B_AT);
    }
  }();
  const int k_last = B_IS_KN ? g.k_last : g.k;
  const int steps = (k_last + BK - 1) / BK, whole = (B_IS_KN ? min(g.b_rows, k_last) : k_last) / BK;
  // Step `next`, AHEAD after that where A's pointers are, to the stage AT bytes after the first. Whole ones, all but the last or
  // two, take an instruction a copy.
  auto load_whole = [&](auto at, auto ahead) {
    a_copies.template copy<at, ahead>();
    if constexpr (B_IS_KN) {
      b_copies.template copy<at>();
    } else {
      b_copies.template copy<at, ahead>();
    }
  };
  auto load = [&](auto at, auto ahead, int next) {
    if (next < whole) {
      load_whole(at, ahead);
    } else if (next < steps) {
      a_copies.copy_part(at, ahead, k_last - next * BK);
      if constexpr (B_IS_KN) {
        b_copies.copy_part(g, at, next * BK, k_last);
      } else {
        b_copies.copy_part(at, ahead, k_last - next * BK);
      }
    }
  };
#ifndef COLLM_F32
  const Fragments<MI, NJ, BK, B_MAJOR, B_COLUMNS, BK / 16> fragments(base, wm, base + B_AT, wn);
#endif
  uint32_t bits[RowsAlongK<BM>::COPIES];
  if constexpr (MASKED) a_copies.kept(bits, mask, g.mask_layout, m0, 0);
  unrolled<STAGES - 1>([&](auto s) {
    load(Constant<s * STAGE>{}, s, s);
    copies_commit();
  });
  // A step of every stage, so that places in shared memory are immediate offsets. `known`: all these steps are there, and what they
  // copy is whole.
  auto turn = [&](int first, auto known) {
    unrolled<STAGES>([&](auto stage) {
      constexpr int S = stage;
      constexpr Constant<S + STAGES - 1> next{};
      constexpr Constant<next % STAGES * STAGE> to{};
      if (!known && first + S >= steps) return;
      copies_wait<STAGES - 2>();
      if constexpr (MASKED) a_copies.drop(memory + S * STAGE, bits);
      __syncthreads();
      if constexpr (known) {
        load_whole(to, next);
      } else {
        load(to, next, first + next);
      }
      copies_commit();
      if constexpr (MASKED) a_copies.kept(bits, mask, g.mask_layout, m0, (first + S + 1) * BK);
      unrolled<BK / 16>([&](auto k) {
#ifdef COLLM_F32
        const elem* const a = reinterpret_cast<const elem*>(memory + S * STAGE);
        mma_step<MI, NJ, Major::K, BK, B_MAJOR, B_COLUMNS>(acc, a, wm, a + A_TILE, wn, k * 16);
#else
        fragments.template step<S * STAGE, k>(acc);
#endif
      });
    });
    a_copies.advance(STAGES);
    if constexpr (!B_IS_KN) b_copies.advance(STAGES);
  };
  int first = 0;
  if constexpr (!MASKED) {
    for (; first + 2 * STAGES - 1 <= whole; first += STAGES) turn(first, Constant<1>{});
  }
  for (; first < steps; first += STAGES) turn(first, Constant<0>{});
  copies_wait<0>();

  if constexpr (MASKED) {
#pragma unroll
    for (int i = 0; i < MI; i++) {
#pragma unroll
      for (int j = 0; j < NJ; j++) {
#pragma unroll
        for (int e = 0; e < 4; e++) acc[i][j][e] *= g.mask_scale;
      }
    }
  }
  if constexpr (B_IS_KN) {
    // Adapters with dropout: sums of their own, masked. The rank is short, so is this.
    uint32_t* const kept = reinterpret_cast<uint32_t*>(memory + STAGE);
    const RowsAlongK<BM> d_u(a_row, m0, g.m, base);
    for (int r = 0; r < g.n_regions; r++) {
      const Region region = g.regions[r];
      __syncthreads();
      for (int i = threadIdx.x; i < BM * BN / 32; i += THREADS) {
        kept[i] = kept32(region.mask, g.mask_layout, min(m0 + i % BM, g.m - 1), n0 + i / BM * 32);
      }
      for (int k0 = region.first; k0 < region.last; k0 += BK) {
        if (k0 > region.first) __syncthreads();
        RowsAlongK<BM> from = d_u;
#pragma unroll
        for (int i = 0; i < RowsAlongK<BM>::COPIES; i++) from.from[i] += k0;
        from.copy_part(0, 0, region.last - k0);
        b_copies.copy_part(g, 0, k0, region.last);
        copies_commit();
        copies_wait<0>();
        __syncthreads();
        const elem* const a = reinterpret_cast<const elem*>(memory);
#pragma unroll
        for (int j = 0; j < NJ; j += 2) {
          float part[MI][2][4] = {};
          for (int kk = 0; kk < BK && k0 + kk < region.last; kk += 16) {
            mma_step<MI, 2, Major::K, BK, B_MAJOR, B_COLUMNS>(part, a, wm, a + A_TILE, wn + j * 8, kk);
          }
#pragma unroll
          for (int i = 0; i < MI; i++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
              // Bits of a row's two columns of this fragment and of the next.
              const uint32_t bits = kept[(wn + j * 8) / 32 * BM + wm + i * 16 + lane / 4 + h * 8] >> (j % 4 * 8 + (lane & 3) * 2);
#pragma unroll
              for (int e = 0; e < 4; e++) {
                const float scale = bits >> (e / 2 * 8 + e % 2) & 1 ? g.mask_scale : 0.f;
                float& sum = acc[i][j + e / 2][h * 2 + e % 2];
                sum = fmaf(part[i][e / 2][h * 2 + e % 2], scale, sum);
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
  // Columns of a lane: those that make 16 bytes of C.
  constexpr int OWN = EPILOGUE == Epilogue::SwigluBackward ? 4 : 8, LANES = TN / OWN, ROWS = 32 / LANES;
  const int column = n0 + wn + lane % LANES * OWN;
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
      const float4* from = reinterpret_cast<const float4*>(slab + r * LD + lane % LANES * OWN);
      float v[OWN];
      if constexpr (OWN == 8) {
        // Four lanes read the first half of their eight, four the second: all banks at once.
        const int turn = lane >> 2 & 1;
        const float4 x = from[turn], y = from[turn ^ 1];
        const float4 lo = turn ? y : x, hi = turn ? x : y;
        v[0] = lo.x, v[1] = lo.y, v[2] = lo.z, v[3] = lo.w, v[4] = hi.x, v[5] = hi.y, v[6] = hi.z, v[7] = hi.w;
      } else {
        const float4 x = *from;
        v[0] = x.x, v[1] = x.y, v[2] = x.z, v[3] = x.w;
      }
      if (row >= g.m || column >= n_last) continue;
      Fetched<EPILOGUE, OWN> fetched;
      fetch<EPILOGUE, B_IS_KN>(g, row, column, fetched);
      finish<EPILOGUE, B_IS_KN>(g, row, column, v, fetched);
    }
  }
}

template <int BM, int BN, int WM, int WN, bool B_IS_KN, Epilogue EPILOGUE>
__device__ __forceinline__ void gemm(const Gemm& g) {
  const Place tile = place(blockIdx.x, (g.m + BM - 1) / BM, g.n_tiles);
  const int m0 = tile.m * BM;
  if constexpr (!B_IS_KN && EPILOGUE == Epilogue::Plain) {
    // Columns of adapters with dropout have narrow tiles of their own.
    for (int r = g.n_regions - 1; r >= 0; r--) {
      const Region& region = g.regions[r];
      if (tile.n >= region.tile) {
        constexpr int ACROSS = BM == 128 ? 1 : 2;
        const int n0 = region.first + (tile.n - region.tile) * MASKED_BN;
        gemm_tile<BM, MASKED_BN, 4 / ACROSS, ACROSS, false, EPILOGUE, true>(g, m0, n0, region.last, region.mask);
        return;
      }
    }
  }
  gemm_tile<BM, BN, WM, WN, B_IS_KN, EPILOGUE, false>(g, m0, tile.n * BN, B_IS_KN ? g.n : g.plain_n, nullptr);
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
