// Pieces of attention.cu: tiles of rows in shared memory, and the two products that attention is made of.
//
// A warp owns 16 rows. dot_rows multiplies them with other rows (scores), add_weighted_rows adds up other rows with weights that
// are the accumulators of the former, without a way through memory.
#pragma once
#include "mma.cuh"

#ifdef COLLM_F32
constexpr int WARPS = 2;
constexpr int OTHER = 16;
#else
constexpr int WARPS = 4;
constexpr int OTHER = 32;
#endif
constexpr int THREADS = 32 * WARPS;
constexpr int OWN = 16 * WARPS;

// Elements from row to row of a tile of D columns: an odd number of 16-byte chunks, so that the eight rows of an ldmatrix lie
// in different banks.
template <int D> constexpr int LD = D + VEC;

// `n_rows` rows of `columns` elements; the rest of the ROWS × D tile becomes zeros.
template <int ROWS, int D>
__device__ __forceinline__ void load_rows(elem* tile, const elem* from, int ld, int n_rows, int columns) {
  constexpr int CHUNKS = D / VEC, TOGETHER = THREADS / CHUNKS;
  static_assert(THREADS % CHUNKS == 0 && ROWS % TOGETHER == 0, "a thread copies one chunk of every TOGETHER-th row");
  const int column = threadIdx.x % CHUNKS * VEC, row = threadIdx.x / CHUNKS;
  const uint32_t to = shared_address(tile + row * LD<D> + column);
  const elem* const source = from + (size_t)row * ld + column;
#pragma unroll 4
  for (int r = 0; r < ROWS; r += TOGETHER) {
    const bool inside = row + r < n_rows && column < columns;
    copy16(to + r * LD<D> * sizeof(elem), inside ? source + (size_t)r * ld : from, inside);
  }
}

// 4 bytes; zero where `inside` is false.
__device__ __forceinline__ void copy4(float* to, const float* from, bool inside) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(inside ? 4 : 0)
               : "memory");
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// c = a · bᵀ: 16 rows of a, 8 NK rows of b, summed over the D columns of both (of which `columns` are not zero).
//
// Accumulators as in the PTX manual: c[j][0], c[j][1] at row lane / 4, columns 8 j + 2 (lane % 4) and the next; c[j][2], c[j][3]
// eight rows below.
template <int D, int NK>
__device__ __forceinline__ void dot_rows(float (&c)[NK][4], const elem* a, const elem* b, int columns) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int j = 0; j < NK; j++) c[j][0] = c[j][1] = c[j][2] = c[j][3] = 0.f;
#ifdef COLLM_F32
#pragma unroll 1
  for (int k = 0; k < columns; k += 4) {
    float x[2][4], y[NK * 2][4];
#pragma unroll
    for (int r = 0; r < 2; r++) load_vec(a + (lane / 4 + 8 * r) * LD<D> + k, x[r]);
#pragma unroll
    for (int n = 0; n < NK * 2; n++) load_vec(b + (n / 2 * 8 + (lane & 3) * 2 + (n & 1)) * LD<D> + k, y[n]);
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
      for (int j = 0; j < NK; j++) {
#pragma unroll
        for (int e = 0; e < 4; e++) c[j][e] = fmaf(x[e / 2][i], y[2 * j + (e & 1)][i], c[j][e]);
      }
    }
  }
#else
  const uint32_t a_at = shared_address(a + (lane & 15) * LD<D> + (lane >> 4) * 8);
  const uint32_t b_at = shared_address(b + ((lane & 7) + ((lane >> 4) << 3)) * LD<D> + ((lane >> 3) & 1) * 8);
#pragma unroll
  for (int k = 0; k < D; k += 16) {
    uint32_t fa[4];
    ldmatrix_x4(fa, a_at + k * sizeof(elem));
#pragma unroll
    for (int j = 0; j < NK; j += 2) {
      uint32_t fb[4];
      ldmatrix_x4(fb, b_at + (j * 8 * LD<D> + k) * sizeof(elem));
      mma_bf16(c[j], fa, fb[0], fb[1]);
      mma_bf16(c[j + 1], fa, fb[2], fb[3]);
    }
  }
#endif
}

// c += w · b: w 16 × 8 NK, held as accumulators are; b 8 NK rows of D columns; c 16 × D.
template <int D, int NK>
__device__ __forceinline__ void add_weighted_rows(float (&c)[D / 8][4], const float (&w)[NK][4], const elem* b) {
  const int lane = threadIdx.x & 31;
#ifdef COLLM_F32
#pragma unroll
  for (int kk = 0; kk < NK; kk++) {
#pragma unroll 1
    for (int k = 0; k < 8; k++) {
      // Weight k of this row lies with lane k / 2 of the four that share it.
      const int from = (lane & 28) + k / 2;
      const float even0 = __shfl_sync(0xffffffffu, w[kk][0], from), odd0 = __shfl_sync(0xffffffffu, w[kk][1], from);
      const float even1 = __shfl_sync(0xffffffffu, w[kk][2], from), odd1 = __shfl_sync(0xffffffffu, w[kk][3], from);
      const float w0 = k & 1 ? odd0 : even0, w1 = k & 1 ? odd1 : even1;
      const elem* const row = b + (kk * 8 + k) * LD<D> + (lane & 3) * 2;
#pragma unroll
      for (int j = 0; j < D / 8; j++) {
        const float2 x = load_pair(row + j * 8);
        c[j][0] = fmaf(w0, x.x, c[j][0]), c[j][1] = fmaf(w0, x.y, c[j][1]);
        c[j][2] = fmaf(w1, x.x, c[j][2]), c[j][3] = fmaf(w1, x.y, c[j][3]);
      }
    }
  }
#else
  const uint32_t b_at = shared_address(b + (lane & 15) * LD<D> + (lane >> 4) * 8);
#pragma unroll
  for (int kk = 0; kk < NK; kk += 2) {
    const uint32_t fw[4] = {pack_bf16(w[kk][0], w[kk][1]), pack_bf16(w[kk][2], w[kk][3]),
                            pack_bf16(w[kk + 1][0], w[kk + 1][1]), pack_bf16(w[kk + 1][2], w[kk + 1][3])};
#pragma unroll
    for (int j = 0; j < D / 8; j += 2) {
      uint32_t fb[4];
      ldmatrix_x4_trans(fb, b_at + (kk * 8 * LD<D> + j * 8) * sizeof(elem));
      mma_bf16(c[j], fw, fb[0], fb[1]);
      mma_bf16(c[j + 1], fw, fb[2], fb[3]);
    }
  }
#endif
}

// A warp's 16 rows leave in 16-byte pieces: through `slab`, 16 rows of shared memory that only this warp uses by now. Rows
// lane / 4 are multiplied by s0, those eight below by s1; `n` rows of `columns` elements exist.
template <int D>
__device__ __forceinline__ void store_rows(elem* slab, const float (&c)[D / 8][4], float s0, float s1, elem* to, int ld, int n,
                                           int columns) {
  constexpr int CHUNKS = D / VEC, TOGETHER = 32 / CHUNKS;
  static_assert(32 % CHUNKS == 0, "a warp stores whole rows at a time");
  const int lane = threadIdx.x & 31;
  __syncwarp();
#pragma unroll
  for (int j = 0; j < D / 8; j++) {
    elem* const at = slab + lane / 4 * LD<D> + j * 8 + (lane & 3) * 2;
    store_pair(at, c[j][0] * s0, c[j][1] * s0);
    store_pair(at + 8 * LD<D>, c[j][2] * s1, c[j][3] * s1);
  }
  __syncwarp();
  const int column = lane % CHUNKS * VEC;
#pragma unroll 1
  for (int r = lane / CHUNKS; r < min(n, 16); r += TOGETHER) {
    if (column >= columns) break;
    *reinterpret_cast<uint4*>(to + (size_t)r * ld + column) = *reinterpret_cast<const uint4*>(slab + r * LD<D> + column);
  }
}
