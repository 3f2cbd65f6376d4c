// target: sm_90a
// Matrix products with frozen weights on Hopper: what gemm.cu computes, by wgmma from tiles that tensor maps fetch.
//
//   nt: C[m, n] = epilogue( A[m, k] · B[n, k]ᵀ )      B K-major
//   nn: C[m, n] = epilogue( A[m, k] · B[k, n] )       B MN-major: the descriptor transposes it
//
// B's rows from `b_rows` on, the adapters' A, have a map of their own: tiles of their own in nt, steps of K of their own in nn
// (b_rows a multiple of 8). A step of nn that passes b_rows meets zeros in B. No dropout masks: gemm.cu takes those.
//
// Blocks stay, one a multiprocessor, and walk the tiles of C in gemm.cu's order. One warp fetches (its warpgroup gives its
// registers away), two warpgroups multiply 64 rows each. A stage of the ring is 64 of K of A and B, swizzled by 128 bytes;
// `full` counts its bytes, `empty` the eight warps that are done with it, one step after they have issued its products. The
// ring runs on through the epilogues (gemm.cuh), which pass through shared memory of their own.
//
// Ragged m, n and k: the maps fill with zeros, stores are bounded. n and k are multiples of 8. Read: a, b, b_tail (maps), bias,
// addend, gate_up. Written: c, act. Grid: any number of blocks. 384 threads; dynamic shared memory: the stages, 32 KiB for the
// epilogues, the barriers (`shared_bytes` in gemm_sm90.rs).
#include "gemm.cuh"
#include "hopper.cuh"

constexpr int BM = 128, BK = 64;
constexpr int CONSUMERS = 2;
constexpr int THREADS = 128 * (CONSUMERS + 1);
constexpr int WARPS = 4 * CONSUMERS;
// Bytes of eight rows of the swizzle's pattern, and of a box of 64 rows.
constexpr int PATTERN = 8 * 128, BOX = 64 * 128;
constexpr int A_BYTES = BM * BK * 2;
// Columns of C that a warp passes through shared memory at a time, 16 rows of floats.
constexpr int SLAB = 64;

// How many of the four rows of an epilogue's turn a lane fetches at once: what registers allow.
template <Epilogue EPILOGUE> constexpr int AHEAD = EPILOGUE == Epilogue::SwigluBackward ? 2 : 4;

// Which stage comes next, and the parity of its phase.
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  template <int STAGES> __device__ __forceinline__ void next() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

template <int BN, int STAGES, bool B_IS_KN, Epilogue EPILOGUE>
__device__ __forceinline__ void gemm(const CUtensorMap* map_a, const CUtensorMap* map_b, const CUtensorMap* map_tail, const Gemm& g) {
  constexpr int B_BYTES = BN * BK * 2, STAGE = A_BYTES + B_BYTES;
  extern __shared__ __align__(1024) unsigned char memory[];
  const uint32_t stages = shared_address(memory);
  const uint32_t full = stages + STAGES * STAGE + WARPS * 16 * SLAB * 4, empty = full + 8 * STAGES;
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  if (threadIdx.x == 0) {
    // The swizzle counts from multiples of 1024.
    if (stages % PATTERN) __trap();
#pragma unroll
    for (int s = 0; s < STAGES; s++) barrier_init(full + 8 * s, 1), barrier_init(empty + 8 * s, WARPS);
    barriers_ready();
  }
  __syncthreads();

  const int m_tiles = (g.m + BM - 1) / BM, tiles = m_tiles * g.n_tiles;
  // Tiles (nt) or steps (nn) of W; the adapters' come after them.
  constexpr int UNIT = B_IS_KN ? BK : BN;
  const int head = (g.b_rows + UNIT - 1) / UNIT;
  const int steps = B_IS_KN ? head + (g.k - g.b_rows + BK - 1) / BK : (g.k + BK - 1) / BK;
  Ring ring;

  if (warp / 4 == CONSUMERS) {
    registers_down<40>();
    if (warp % 4 == 0 && elected()) {
      prefetch_map(map_a), prefetch_map(map_b), prefetch_map(map_tail);
      for (int t = blockIdx.x; t < tiles; t += gridDim.x) {
        const Place tile = place(t, m_tiles, g.n_tiles);
        for (int s = 0; s < steps; s++, ring.next<STAGES>()) {
          const bool tail = (B_IS_KN ? s : tile.n) >= head;
          const CUtensorMap* const map = tail ? map_tail : map_b;
          // Of A, the column; of B, the row.
          const int k0 = B_IS_KN && tail ? g.b_rows + (s - head) * BK : s * BK;
          const int row = B_IS_KN ? (tail ? s - head : s) * BK : (tail ? tile.n - head : tile.n) * BN;
          const uint32_t a = stages + ring.stage * STAGE, b = a + A_BYTES, bar = full + 8 * ring.stage;
          wait(empty + 8 * ring.stage, ring.parity ^ 1);
          arrive_expect(bar, STAGE);
          load_box(a, map_a, k0, tile.m * BM, bar);
          if constexpr (B_IS_KN) {
#pragma unroll
            for (int j = 0; j < BN / 64; j++) load_box(b + j * BOX, map, tile.n * BN + j * 64, row, bar);
          } else {
            load_box(b, map, k0, row, bar);
          }
        }
      }
    }
    return;
  }

  registers_up<232>();
  float* const slab = reinterpret_cast<float*>(memory + STAGES * STAGE) + warp * 16 * SLAB;
  const uint32_t slab_address = shared_address(slab);
  float acc[BN / 2];
  for (int t = blockIdx.x; t < tiles; t += gridDim.x) {
    const Place tile = place(t, m_tiles, g.n_tiles);
    for (int s = 0; s < steps; s++) {
      const uint32_t a = stages + ring.stage * STAGE + warp / 4 * BOX, b = stages + ring.stage * STAGE + A_BYTES;
      wait(full + 8 * ring.stage, ring.parity);
      wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < BK / 16; kk++) {
        const uint64_t db = B_IS_KN ? descriptor(b + kk * 2 * PATTERN, BOX, PATTERN) : descriptor(b + kk * 32, 0, PATTERN);
        wgmma<B_IS_KN>(acc, descriptor(a + kk * 32, 0, PATTERN), db, s + kk > 0);
      }
      wgmma_commit();
      wgmma_wait<1>();
      // The stage before has been multiplied.
      if (s > 0 && lane == 0) arrive(empty + 8 * (ring.stage == 0 ? STAGES - 1 : ring.stage - 1));
      ring.next<STAGES>();
    }
    wgmma_wait<0>();
    if (lane == 0) arrive(empty + 8 * (ring.stage == 0 ? STAGES - 1 : ring.stage - 1));

    const bool tail = !B_IS_KN && tile.n >= head;
    const int m0 = tile.m * BM + warp * 16, n0 = tail ? g.b_rows + (tile.n - head) * BN : tile.n * BN;
    const int n_last = B_IS_KN || tail ? g.n : g.b_rows;
    // Chunks of eight columns, of a row and of the slab.
    const int chunk = lane & 7;
#pragma unroll
    for (int part = 0; part < BN / SLAB; part++) {
      const int column = n0 + part * SLAB + chunk * 8;
#pragma unroll
      for (int p0 = 0; p0 < 4; p0 += AHEAD<EPILOGUE>) {
        Fetched<EPILOGUE, 8> fetched[AHEAD<EPILOGUE>];
#pragma unroll
        for (int p = 0; p < AHEAD<EPILOGUE>; p++) {
          const int row = m0 + (p0 + p) * 4 + lane / 8;
          if (row < g.m && column < n_last) fetch<EPILOGUE, B_IS_KN>(g, row, column, fetched[p]);
        }
        if (p0 == 0) {
          __syncwarp();
          // Chunk j of row r lies at j ^ (r mod 8): the lanes that write or read together meet all banks.
#pragma unroll
          for (int j = 0; j < SLAB / 8; j++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
              const float* const from = acc + (part * (SLAB / 8) + j) * 4 + 2 * h;
              store_shared(slab_address + ((lane / 4 + h * 8) * SLAB + (j ^ (lane / 4)) * 8 + (lane & 3) * 2) * 4, from[0], from[1]);
            }
          }
          __syncwarp();
        }
#pragma unroll
        for (int p = 0; p < AHEAD<EPILOGUE>; p++) {
          const int r = (p0 + p) * 4 + lane / 8, row = m0 + r, at = chunk ^ (r & 7);
          const float4* const from = reinterpret_cast<const float4*>(slab + r * SLAB + at * 8);
          // Half of the lanes begin with the second half of their chunk.
          const int turn = at >> 2;
          const float4 x = from[turn], y = from[turn ^ 1];
          const float4 lo = turn ? y : x, hi = turn ? x : y;
          float v[8] = {lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w};
          if (row < g.m && column < n_last) finish<EPILOGUE, B_IS_KN>(g, row, column, v, fetched[p]);
        }
      }
    }
  }
}

#define GEMM(name, bn, stages, kn, epilogue)                                                                      \
  extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                        \
      NAMED(name)(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b,                    \
                  const __grid_constant__ CUtensorMap tail, const __grid_constant__ Gemm g) {                      \
    gemm<bn, stages, kn, Epilogue::epilogue>(&a, &b, &tail, g);                                                   \
  }

GEMM(gemm_sm90_nt_128x256, 256, 4, false, Plain)
GEMM(gemm_sm90_nt_128x128, 128, 6, false, Plain)
GEMM(gemm_sm90_nn_128x256, 256, 4, true, Plain)
GEMM(gemm_sm90_nn_128x128, 128, 6, true, Plain)
GEMM(gemm_sm90_nt_swiglu_128x256, 256, 4, false, Swiglu)
GEMM(gemm_sm90_nt_swiglu_128x128, 128, 6, false, Swiglu)
GEMM(gemm_sm90_nn_swiglu_bwd_128x256, 256, 4, true, SwigluBackward)
GEMM(gemm_sm90_nn_swiglu_bwd_128x128, 128, 6, true, SwigluBackward)
