// RMSNorm: h = x · r · w with r = 1 / sqrt(mean(x²) + eps), one row a block of 256 threads.
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

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    NAMED(rms_norm_fwd)(elem* __restrict__ x, int ldx, const elem* __restrict__ w, elem* __restrict__ h, int ldh,
                        float* __restrict__ inv_rms, int width, float eps, int reuse, const Adapter lora) {
  __shared__ float scratch[THREADS / 32];
  elem* const row = x + (size_t)blockIdx.x * ldx;
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
    r = inv_rms[blockIdx.x];
  } else {
    r = rsqrtf(block_sum<THREADS / 32>(sum, scratch) / width + eps);
    if (threadIdx.x == 0) inv_rms[blockIdx.x] = r;
  }
  if (!h) return;
#pragma unroll
  for (int s = 0; s < SPANS; s++) {
    const int at = s * SPAN + threadIdx.x * 8;
    if (at >= width) break;
    float weight[8];
    load8(w + at, weight);
#pragma unroll
    for (int i = 0; i < 8; i++) v[s][i] *= r * weight[i];
    store8(h + (size_t)blockIdx.x * ldh + at, v[s]);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    NAMED(rms_norm_bwd)(const elem* __restrict__ x, int ldx, const elem* __restrict__ w, const float* __restrict__ inv_rms,
                        const elem* __restrict__ d_h, int ldh, elem* __restrict__ d_x, int ldd, int width) {
  __shared__ float scratch[THREADS / 32];
  const size_t n = blockIdx.x;
  float v[SPANS][8], g[SPANS][8], dot = 0.f;
#pragma unroll
  for (int s = 0; s < SPANS; s++) {
    const int at = s * SPAN + threadIdx.x * 8;
    if (at >= width) break;
    float weight[8];
    load8(x + n * ldx + at, v[s]);
    load8(d_h + n * ldh + at, g[s]);
    load8(w + at, weight);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      g[s][i] *= weight[i];
      dot = fmaf(g[s][i], v[s][i], dot);
    }
  }
  const float r = inv_rms[n];
  const float c = block_sum<THREADS / 32>(dot, scratch) / width * r * r;
#pragma unroll
  for (int s = 0; s < SPANS; s++) {
    const int at = s * SPAN + threadIdx.x * 8;
    if (at >= width) break;
    float d[8];
    elem* const to = d_x + n * ldd + at;
    load8(to, d);
#pragma unroll
    for (int i = 0; i < 8; i++) d[i] = fmaf(r, g[s][i] - v[s][i] * c, d[i]);
    store8(to, d);
  }
}
