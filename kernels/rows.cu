// Moving rows: the embedding splice and its gradient, and the last positions of prompts. One row a block of 128 threads.
#include "element.cuh"

constexpr int THREADS = 128;

// x[t] = embed[source] for source >= 0, vectors[−1 − source] otherwise: token rows and CIE vectors gathered into the packed
// input in one pass. Read: embed [vocabulary, width], vectors [n, width] float32, sources. Written: x [rows, ldx].
extern "C" __global__ void __launch_bounds__(THREADS)
    NAMED(splice_fwd)(const int* __restrict__ sources, const elem* __restrict__ embed, const float* __restrict__ vectors,
                      elem* __restrict__ x, int ldx, int width) {
  const int source = sources[blockIdx.x];
  elem* const to = x + (size_t)blockIdx.x * ldx;
  if (source >= 0) {
    for (int at = threadIdx.x * 8; at < width; at += THREADS * 8) {
      float v[8];
      load8(embed + (size_t)source * width + at, v);
      store8(to + at, v);
    }
  } else {
    // Four at a time: one 16-byte access of float32.
    for (int at = threadIdx.x * 4; at < width; at += THREADS * 4) {
      const float4 v = *reinterpret_cast<const float4*>(vectors + (size_t)(-1 - source) * width + at);
      store_n<4>(to + at, {v.x, v.y, v.z, v.w});
    }
  }
}

// d_vectors[v] = d_x[rows[v]]: the gradients of the slots only; 0 where rows[v] is negative, of a vector that no row reads. Written:
// d_vectors [n, width] float32.
extern "C" __global__ void __launch_bounds__(THREADS)
    NAMED(splice_bwd)(const int* __restrict__ rows, const elem* __restrict__ d_x, int ldd, float* __restrict__ d_vectors,
                      int width) {
  const int row = rows[blockIdx.x];
  float* const to = d_vectors + (size_t)blockIdx.x * width;
  for (int at = threadIdx.x * 4; at < width; at += THREADS * 4) {
    float v[4] = {};
    if (row >= 0) load_n<4>(d_x + (size_t)row * ldd + at, v);
    *reinterpret_cast<float4*>(to + at) = make_float4(v[0], v[1], v[2], v[3]);
  }
}

// to[i] = from[rows[i]].
extern "C" __global__ void __launch_bounds__(THREADS)
    NAMED(gather_rows)(const int* __restrict__ rows, const elem* __restrict__ from, int ld_from, elem* __restrict__ to, int ld_to,
                       int width) {
  for (int at = threadIdx.x * 8; at < width; at += THREADS * 8) {
    float v[8];
    load8(from + (size_t)rows[blockIdx.x] * ld_from + at, v);
    store8(to + (size_t)blockIdx.x * ld_to + at, v);
  }
}

// to[rows[i]] = from[i], or += with `add`. No row occurs twice.
extern "C" __global__ void __launch_bounds__(THREADS)
    NAMED(scatter_rows)(const int* __restrict__ rows, const elem* __restrict__ from, int ld_from, elem* __restrict__ to, int ld_to,
                        int width, int add) {
  elem* const row = to + (size_t)rows[blockIdx.x] * ld_to;
  for (int at = threadIdx.x * 8; at < width; at += THREADS * 8) {
    float v[8];
    load8(from + (size_t)blockIdx.x * ld_from + at, v);
    if (add) {
      float old[8];
      load8(row + at, old);
#pragma unroll
      for (int i = 0; i < 8; i++) v[i] += old[i];
    }
    store8(row + at, v);
  }
}

// Elements of each row set to zero.
extern "C" __global__ void __launch_bounds__(THREADS) NAMED(zero_rows)(elem* __restrict__ to, int ld, int width) {
  const float zero[8] = {};
  for (int at = threadIdx.x * 8; at < width; at += THREADS * 8) store8(to + (size_t)blockIdx.x * ld + at, zero);
}
