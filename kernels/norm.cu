// RMSNorm: h = x · r · w with r = 1 / sqrt(mean(x²) + eps), ROWS rows a block of 256 threads, one after another; w stays in registers.
//
// fwd  If the product before it had an adapter, x += u Bᵀ first, and x is written back (the residual stream whole).
//      Read: x [n, ldx] (u in the same rows), w [width]. Written: h [n, ldh], inv_rms [n], x with an adapter.
//      inv_rms is saved for backward; with `reuse` it is read instead, and h only is written.
// bwd  d_x += r (g − x r² mean(g · x)) with g = d_h · w.   Read: x, inv_rms, d_h, w. Accumulated: d_x [n, ldd].
//
// Width a multiple of 8, at most 8192; rows at 16-byte boundaries. Rows are rounded once, when stored.
#include "lora.cuh"
#include "reduce.cuh"

constexpr int THREADS = 256;
constexpr int SPAN = THREADS * 8;
// Spans of the widest row.
constexpr int SPANS = 4;
constexpr int ROWS = 4;

// A thread's elements of the weight, as they are.
struct Weight {
  uint4 raw[SPANS][8 / VEC];

  __device__ __forceinline__ Weight(const elem* w, int width) {
#pragma unroll
    for (int s = 0; s < SPANS; s++) {
      const int at = s * SPAN + threadIdx.x * 8;
      if (at >= width) break;
#pragma unroll
      for (int i = 0; i < 8 / VEC; i++) raw[s][i] = reinterpret_cast<const uint4*>(w + at)[i];
    }
  }

  __device__ __forceinline__ void of(int s, float (&v)[8]) const { load8(reinterpret_cast<const elem*>(raw[s]), v); }
};

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    NAMED(rms_norm_fwd)(elem* __restrict__ x, int ldx, const elem* __restrict__ w, elem* __restrict__ h, int ldh,
                        float* __restrict__ inv_rms, int n, int width, float eps, int reuse, const Adapter lora) {
  __shared__ float scratch[THREADS / 32];
  const Weight weights(w, h ? width : 0);
  const int last = min(n, (int)(blockIdx.x + 1) * ROWS);
  for (int t = blockIdx.x * ROWS; t < last; t++) {
    elem* const row = x + (size_t)t * ldx;
    float v[SPANS][8], sum = 0.f;
#pragma unroll
    for (int s = 0; s < SPANS; s++) {
      const int at = s * SPAN + threadIdx.x * 8;
      if (at >= width) break;
      load8(row + at, v[s]);
      if (lora.rank) {
        float y[1][8];
        const elem* const u[1] = {row + lora.column};
#pragma unroll
        for (int i = 0; i < 8; i++) y[0][i] = v[s][i];
        add_lora<1, 8>(y, u, lora.b + at, width, lora.rank);
#pragma unroll
        for (int i = 0; i < 8; i++) v[s][i] = rounded(y[0][i]);
        store8(row + at, v[s]);
      }
#pragma unroll
      for (int i = 0; i < 8; i++) sum = fmaf(v[s][i], v[s][i], sum);
    }
    float r;
    if (reuse) {
      r = inv_rms[t];
    } else {
      r = rsqrtf(block_sum<THREADS / 32>(sum, scratch) / width + eps);
      if (threadIdx.x == 0) inv_rms[t] = r;
    }
    if (!h) continue;
#pragma unroll
    for (int s = 0; s < SPANS; s++) {
      const int at = s * SPAN + threadIdx.x * 8;
      if (at >= width) break;
      float weight[8];
      weights.of(s, weight);
#pragma unroll
      for (int i = 0; i < 8; i++) v[s][i] *= r * weight[i];
      store8(h + (size_t)t * ldh + at, v[s]);
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    NAMED(rms_norm_bwd)(const elem* __restrict__ x, int ldx, const elem* __restrict__ w, const float* __restrict__ inv_rms,
                        const elem* __restrict__ d_h, int ldh, elem* __restrict__ d_x, int ldd, int n, int width) {
  __shared__ float scratch[THREADS / 32];
  const Weight weights(w, width);
  const int last = min(n, (int)(blockIdx.x + 1) * ROWS);
  for (int t = blockIdx.x * ROWS; t < last; t++) {
    float v[SPANS][8], g[SPANS][8], dot = 0.f;
#pragma unroll
    for (int s = 0; s < SPANS; s++) {
      const int at = s * SPAN + threadIdx.x * 8;
      if (at >= width) break;
      float weight[8];
      load8(x + (size_t)t * ldx + at, v[s]);
      load8(d_h + (size_t)t * ldh + at, g[s]);
      weights.of(s, weight);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        g[s][i] *= weight[i];
        dot = fmaf(g[s][i], v[s][i], dot);
      }
    }
    const float r = inv_rms[t];
    const float c = block_sum<THREADS / 32>(dot, scratch) / width * r * r;
#pragma unroll
    for (int s = 0; s < SPANS; s++) {
      const int at = s * SPAN + threadIdx.x * 8;
      if (at >= width) break;
      float d[8];
      elem* const to = d_x + (size_t)t * ldd + at;
      load8(to, d);
#pragma unroll
      for (int i = 0; i < 8; i++) d[i] = fmaf(r, g[s][i] - v[s][i] * c, d[i]);
      store8(to, d);
    }
  }
}
