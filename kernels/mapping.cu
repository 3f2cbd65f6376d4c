// The mapping from collaborative vectors to the LLM's: y = relu(x W1ᵀ + b1) W2ᵀ + b2, forward and backward. float32 throughout.
//
//   forward    a = relu(x W1ᵀ + b1),  y = a W2ᵀ + b2
//   backward   d_W2 += d_yᵀ a,  d_b2 += Σ d_y,  d_a = d_y W2 where a > 0,  d_W1 += d_aᵀ x,  d_b1 += Σ d_a,  d_x = d_a W1
//
// All are C[m, n] = Σ_k A · B with A and B lying either way: [m, k] and [n, k] (rows of k), or [k, m] and [k, n]. A block makes a
// tile of BM × BN; a thread 8 × 4 of it. Both operands lie in shared memory as [k][m] and [k][n], groups of four columns swizzled so
// that neither the transposing stores nor the 16-byte reads meet a bank twice. The next tile's global loads (16 bytes each, the
// weights once a launch for up to BM rows) are in flight during the sums.
//
// With few rows a product has fewer tiles than the card has multiprocessors. K is then cut into gridDim.z parts, whose sums go to
// scratch [parts, m, n]; mapping_finish adds them in order. The bits depend on the number of parts, never on the order of blocks.
//
// Read: a, b, bias, mask. Written: c (added to if `add`), c_elem, row_sums (added to). n, k multiples of 4 where they are a row's
// length, rows at 16-byte boundaries. Grid: n tiles × m tiles × parts; block: THREADS.
#include "element.cuh"

constexpr int BM = 64, BN = 64, BK = 16;
constexpr int THREADS = 128;

struct Product {
  const float* a;
  const float* b;
  float* c;          // [m, n]; null for none
  elem* c_elem;      // [m, ld_elem]; null for none
  const float* bias; // [n]; null for none
  const float* mask; // [m, n]: the result is zero where this is not positive; null for none
  float* row_sums;   // [m]: gets Σ_k A; null for none
  float* scratch;    // [parts, m, n] if gridDim.z > 1
  int m, n, k;
  int ld_elem;
  int part;          // steps of K a part, a multiple of BK
  int parts;
  int relu;
  int add;
};

// Where element (k, column) of a tile lies.
__device__ __forceinline__ int at(int k, int column) {
  return k * 64 + (((column >> 2) ^ ((k >> 2 & 3) << 1)) << 2) + (column & 3);
}

// A tile of BK steps and 64 columns on its way through registers: two 16-byte loads a thread.
template <bool ROWS_OF_K> struct Stage {
  float4 v[2];

  // Columns c0.. of `columns`, steps k0.. up to k_last; zeros outside.
  __device__ __forceinline__ void load(const float* from, int c0, int columns, int k0, int k_last, int k) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int chunk = threadIdx.x + i * THREADS;
      const int column = c0 + (ROWS_OF_K ? chunk / 4 : chunk % 16 * 4), step = k0 + (ROWS_OF_K ? chunk % 4 * 4 : chunk / 16);
      const bool inside = column < columns && step < k_last;
      const float* p = from + (ROWS_OF_K ? (size_t)column * k + step : (size_t)step * columns + column);
      v[i] = inside ? *reinterpret_cast<const float4*>(p) : make_float4(0.f, 0.f, 0.f, 0.f);
    }
  }

  __device__ __forceinline__ void store(float* tile) const {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int chunk = threadIdx.x + i * THREADS;
      if constexpr (ROWS_OF_K) {
        const int column = chunk / 4, step = chunk % 4 * 4;
        tile[at(step, column)] = v[i].x, tile[at(step + 1, column)] = v[i].y;
        tile[at(step + 2, column)] = v[i].z, tile[at(step + 3, column)] = v[i].w;
      } else {
        *reinterpret_cast<float4*>(tile + at(chunk / 16, chunk % 16 * 4)) = v[i];
      }
    }
  }
};

// What becomes of four neighbouring sums of row `row`.
__device__ __forceinline__ void finish(const Product& p, int row, int column, float4 v) {
  const size_t i = (size_t)row * p.n + column;
  if (p.bias) {
    const float4 b = *reinterpret_cast<const float4*>(p.bias + column);
    v = make_float4(v.x + b.x, v.y + b.y, v.z + b.z, v.w + b.w);
  }
  if (p.relu) v = make_float4(fmaxf(v.x, 0.f), fmaxf(v.y, 0.f), fmaxf(v.z, 0.f), fmaxf(v.w, 0.f));
  if (p.mask) {
    const float4 a = *reinterpret_cast<const float4*>(p.mask + i);
    v = make_float4(a.x > 0.f ? v.x : 0.f, a.y > 0.f ? v.y : 0.f, a.z > 0.f ? v.z : 0.f, a.w > 0.f ? v.w : 0.f);
  }
  if (p.c) {
    float4* const to = reinterpret_cast<float4*>(p.c + i);
    if (p.add) {
      const float4 c = *to;
      v = make_float4(c.x + v.x, c.y + v.y, c.z + v.z, c.w + v.w);
    }
    *to = v;
  }
  if (p.c_elem) {
    elem* const to = p.c_elem + (size_t)row * p.ld_elem + column;
#ifdef COLLM_F32
    *reinterpret_cast<float4*>(to) = v;
#else
    *reinterpret_cast<uint2*>(to) = make_uint2(pack_bf16(v.x, v.y), pack_bf16(v.z, v.w));
#endif
  }
}

template <bool A_ROWS_OF_K, bool B_ROWS_OF_K> __device__ __forceinline__ void product(const Product& p) {
  __shared__ __align__(16) float tiles[2][2][BK * 64];
  const int n0 = blockIdx.x * BN, m0 = blockIdx.y * BM;
  const int k_first = blockIdx.z * p.part, k_last = min(k_first + p.part, p.k);
  // A thread's rows: ty · 4 + {0..3} and 32 more; its columns: tx · 4 + {0..3}.
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  float acc[8][4] = {};
  float row_sum = 0.f;
  const bool sums_rows = p.row_sums && blockIdx.x == 0 && threadIdx.x < BM;

  Stage<A_ROWS_OF_K> a;
  Stage<B_ROWS_OF_K> b;
  a.load(p.a, m0, p.m, k_first, k_last, p.k);
  b.load(p.b, n0, p.n, k_first, k_last, p.k);
  for (int k0 = k_first, turn = 0; k0 < k_last; k0 += BK, turn ^= 1) {
    float* const as = tiles[turn][0];
    float* const bs = tiles[turn][1];
    a.store(as);
    b.store(bs);
    // One barrier a step: the other pair of tiles is written next, and whoever still reads it has not passed here.
    __syncthreads();
    if (k0 + BK < k_last) {
      a.load(p.a, m0, p.m, k0 + BK, k_last, p.k);
      b.load(p.b, n0, p.n, k0 + BK, k_last, p.k);
    }
#pragma unroll 1
    for (int quad = 0; quad < BK; quad += 4) {
#pragma unroll
      for (int k = quad; k < quad + 4; k++) {
        const float4 lo = *reinterpret_cast<const float4*>(as + at(k, ty * 4));
        const float4 hi = *reinterpret_cast<const float4*>(as + at(k, 32 + ty * 4));
        const float4 y = *reinterpret_cast<const float4*>(bs + at(k, tx * 4));
        const float x[8] = {lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w};
#pragma unroll
        for (int i = 0; i < 8; i++) {
          acc[i][0] = fmaf(x[i], y.x, acc[i][0]);
          acc[i][1] = fmaf(x[i], y.y, acc[i][1]);
          acc[i][2] = fmaf(x[i], y.z, acc[i][2]);
          acc[i][3] = fmaf(x[i], y.w, acc[i][3]);
        }
      }
    }
    if (sums_rows) {
#pragma unroll
      for (int k = 0; k < BK; k++) row_sum += as[at(k, threadIdx.x)];
    }
  }

  const int column = n0 + tx * 4;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const int row = m0 + (i / 4) * 32 + ty * 4 + i % 4;
    if (row >= p.m || column >= p.n) continue;
    const float4 v = make_float4(acc[i][0], acc[i][1], acc[i][2], acc[i][3]);
    if (p.parts > 1) {
      *reinterpret_cast<float4*>(p.scratch + ((size_t)blockIdx.z * p.m + row) * p.n + column) = v;
    } else {
      finish(p, row, column, v);
    }
  }
  if (sums_rows && m0 + threadIdx.x < p.m) p.row_sums[m0 + threadIdx.x] += row_sum;
}

#define PRODUCT(name, a, b)                                                                               \
  extern "C" __global__ void __launch_bounds__(THREADS) NAMED(name)(const __grid_constant__ Product p) {  \
    product<a, b>(p);                                                                                     \
  }
PRODUCT(mapping_nt, true, true)    // A [m, k], B [n, k]
PRODUCT(mapping_nn, true, false)   // A [m, k], B [k, n]
PRODUCT(mapping_tn, false, false)  // A [k, m], B [k, n]

// Adds the parts of a product. Grid: m · n / 4 threads.
extern "C" __global__ void __launch_bounds__(THREADS) NAMED(mapping_finish)(const __grid_constant__ Product p) {
  const size_t i = ((size_t)blockIdx.x * THREADS + threadIdx.x) * 4, all = (size_t)p.m * p.n;
  if (i >= all) return;
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
  for (int part = 0; part < p.parts; part++) {
    const float4 v = *reinterpret_cast<const float4*>(p.scratch + part * all + i);
    sum = make_float4(sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w);
  }
  finish(p, (int)(i / p.n), (int)(i % p.n), sum);
}
