// Tensor-core fragments (bf16, m16n8k16, float32 sums) and the shared-memory layout they are read from.
//
// A tile in shared memory is rows of C elements, C a multiple of one 16-byte chunk. Chunk c of row r lies at place
// c ^ swizzle(r), so that the eight rows that an ldmatrix reads, and the rows that a warp writes, fall into different banks.
// In the float32 build the same tiles hold floats, and a fragment's products are computed one by one from shared memory.
#pragma once
#include "async.cuh"
#include "element.cuh"

// Place of element (row, column) in a tile of COLUMNS elements a row.
template <int COLUMNS> __device__ __forceinline__ int tile_at(int row, int column) {
  constexpr int CHUNKS = COLUMNS / VEC;
  constexpr int MASK = CHUNKS < 8 ? CHUNKS - 1 : 7;
  // With fewer than 8 chunks a row, 8 / CHUNKS rows fill the banks once.
  constexpr int SHIFT = CHUNKS >= 8 ? 0 : CHUNKS == 4 ? 1 : 2;
  return row * COLUMNS + (((column / VEC) ^ ((row >> SHIFT) & MASK)) * VEC) + column % VEC;
}

// Four 8 × 8 matrices, a row a lane, each OFFSET bytes after the address.
template <int OFFSET = 0> __device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4 + %5];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at), "n"(OFFSET)
               : "memory");
}

template <int OFFSET = 0> __device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4 + %5];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at), "n"(OFFSET)
               : "memory");
}

// c += a · b: a 16 × 16 row-major, b 16 × 8 column-major.
__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// How an operand lies in its tile: K along the row, or K down the rows.
enum class Major { K, MN };

// c[i][j] += the 16 × 8 products of rows `m0 + 16 i` of A and columns `n0 + 8 j` of B over one step of 16 in K at k0.
//
// A tile: [rows][A_COLUMNS], (m, k) at row m (Major::K) or (k, m) at row k. B tile likewise with n in place of m. MI and NJ / 2
// are whole. Thread layout of c as in the PTX manual: c[0], c[1] at row lane / 4, columns 2 (lane % 4) and the next; c[2], c[3]
// eight rows below.
template <int MI, int NJ, Major A_MAJOR, int A_COLUMNS, Major B_MAJOR, int B_COLUMNS>
__device__ __forceinline__ void mma_step(float (&c)[MI][NJ][4], const elem* a, int m0, const elem* b, int n0, int k0) {
  static_assert(NJ % 2 == 0, "B fragments are loaded two at a time");
  const int lane = threadIdx.x & 31;
#ifdef COLLM_F32
  auto at_a = [&](int m, int k) {
    return A_MAJOR == Major::K ? a[tile_at<A_COLUMNS>(m, k)] : a[tile_at<A_COLUMNS>(k, m)];
  };
  auto at_b = [&](int n, int k) {
    return B_MAJOR == Major::K ? b[tile_at<B_COLUMNS>(n, k)] : b[tile_at<B_COLUMNS>(k, n)];
  };
#pragma unroll 1
  for (int k = k0; k < k0 + 16; k++) {
#pragma unroll
    for (int i = 0; i < MI; i++) {
#pragma unroll
      for (int j = 0; j < NJ; j++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int m = m0 + i * 16 + lane / 4 + (e / 2) * 8, n = n0 + j * 8 + (lane & 3) * 2 + (e & 1);
          c[i][j][e] = fmaf(at_a(m, k), at_b(n, k), c[i][j][e]);
        }
      }
    }
  }
#else
  uint32_t fa[MI][4], fb[NJ / 2][4];
#pragma unroll
  for (int i = 0; i < MI; i++) {
    if constexpr (A_MAJOR == Major::K) {
      ldmatrix_x4(fa[i], shared_address(a + tile_at<A_COLUMNS>(m0 + i * 16 + (lane & 15), k0 + (lane >> 4) * 8)));
    } else {
      const int k = k0 + (lane & 7) + ((lane >> 4) << 3), m = m0 + i * 16 + ((lane >> 3) & 1) * 8;
      ldmatrix_x4_trans(fa[i], shared_address(a + tile_at<A_COLUMNS>(k, m)));
    }
  }
#pragma unroll
  for (int j = 0; j < NJ / 2; j++) {
    if constexpr (B_MAJOR == Major::K) {
      const int n = n0 + j * 16 + (lane & 7) + ((lane >> 4) << 3), k = k0 + ((lane >> 3) & 1) * 8;
      ldmatrix_x4(fb[j], shared_address(b + tile_at<B_COLUMNS>(n, k)));
    } else {
      const int k = k0 + (lane & 15), n = n0 + j * 16 + (lane >> 4) * 8;
      ldmatrix_x4_trans(fb[j], shared_address(b + tile_at<B_COLUMNS>(k, n)));
    }
  }
#pragma unroll
  for (int i = 0; i < MI; i++) {
#pragma unroll
    for (int j = 0; j < NJ; j++) mma_bf16(c[i][j], fa[i], fb[j / 2][(j & 1) * 2], fb[j / 2][(j & 1) * 2 + 1]);
  }
#endif
}

// mma_step over a tile's steps of K, with a lane's addresses worked out once, not at every step: in a loop they would take
// more instructions than the products. A is Major::K. Addresses are bytes of shared memory.
template <int MI, int NJ, int A_COLUMNS, Major B_MAJOR, int B_COLUMNS, int STEPS> struct Fragments {
  static constexpr int PLACES = B_MAJOR == Major::K ? STEPS : NJ / 2;
  uint32_t a[STEPS], b[PLACES];

  __device__ __forceinline__ Fragments(uint32_t a_tile, int m0, uint32_t b_tile, int n0) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
      a[s] = a_tile + tile_at<A_COLUMNS>(m0 + (lane & 15), s * 16 + (lane >> 4) * 8) * (int)sizeof(elem);
    }
#pragma unroll
    for (int p = 0; p < PLACES; p++) {
      const int place = B_MAJOR == Major::K
                            ? tile_at<B_COLUMNS>(n0 + (lane & 7) + ((lane >> 4) << 3), p * 16 + ((lane >> 3) & 1) * 8)
                            : tile_at<B_COLUMNS>(lane & 15, n0 + p * 16 + (lane >> 4) * 8);
      b[p] = b_tile + place * (int)sizeof(elem);
    }
  }

  // Step S of tiles that lie AT bytes further on. Sixteen rows further down the swizzle is the same.
  template <int AT, int S> __device__ __forceinline__ void step(float (&c)[MI][NJ][4]) const {
    uint32_t fa[MI][4], fb[NJ / 2][4];
    unrolled<MI>([&](auto i) { ldmatrix_x4<AT + i * 16 * A_COLUMNS * (int)sizeof(elem)>(fa[i], a[S]); });
    unrolled<NJ / 2>([&](auto j) {
      constexpr int J = j;
      if constexpr (B_MAJOR == Major::K) {
        ldmatrix_x4<AT + J * 16 * B_COLUMNS * (int)sizeof(elem)>(fb[J], b[S]);
      } else {
        ldmatrix_x4_trans<AT + S * 16 * B_COLUMNS * (int)sizeof(elem)>(fb[J], b[J]);
      }
    });
#pragma unroll
    for (int i = 0; i < MI; i++) {
#pragma unroll
      for (int j = 0; j < NJ; j++) mma_bf16(c[i][j], fa[i], fb[j / 2][(j & 1) * 2], fb[j / 2][(j & 1) * 2 + 1]);
    }
  }
};
