// The answer: final norm, one or two vocabulary rows, loss and gradient, one prompt a block of 256 threads.
//
//   y = x · r · w,  z = y · yes  (or y · (yes − no)),  loss = log(1 + e^z) − label z,  d_z = weight (σ(z) − label)
//   d_x = r (g − x r² mean(g · x)) with g = d_z (yes [− no]) · w
//
// Read: x [n, ldx], the last positions' residual stream; w, yes, no [width]; labels, weights [n]. Written: scores, losses [n] float32,
// d_x [n, ldd] and y [n, width] where their pointers are not null. If the product before had an adapter, x += u Bᵀ first (written
// back). Width a multiple of 8, at most 8192.
#include "lora.cuh"
#include "reduce.cuh"

constexpr int THREADS = 256;
constexpr int SPAN = THREADS * 8;
constexpr int SPANS = 4;

struct Head {
  elem* x;
  const elem* w;
  const elem* yes;
  const elem* no;  // null: the raw logit of "Yes"
  const float* labels;
  const float* weights;
  float* scores;
  float* losses;
  elem* d_x;
  elem* y;
  int ldx, ldd, width;
  float eps;
  Adapter lora;
};

extern "C" __global__ void __launch_bounds__(THREADS, 2) NAMED(yes_head)(const __grid_constant__ Head p) {
  __shared__ float scratch[THREADS / 32];
  const size_t n = blockIdx.x;
  elem* const row = p.x + n * p.ldx;
  float v[SPANS][8], square = 0.f;
#pragma unroll
  for (int s = 0; s < SPANS; s++) {
    const int at = s * SPAN + threadIdx.x * 8;
    if (at >= p.width) break;
    load8(row + at, v[s]);
    if (p.lora.rank) {
      float sum[1][8];
      const elem* const u[1] = {row + p.lora.column};
#pragma unroll
      for (int i = 0; i < 8; i++) sum[0][i] = v[s][i];
      add_lora<1, 8>(sum, u, p.lora.b + at, p.width, p.lora.rank);
#pragma unroll
      for (int i = 0; i < 8; i++) v[s][i] = rounded(sum[0][i]);
      store8(row + at, v[s]);
    }
#pragma unroll
    for (int i = 0; i < 8; i++) square = fmaf(v[s][i], v[s][i], square);
  }
  const float r = rsqrtf(block_sum<THREADS / 32>(square, scratch) / p.width + p.eps);
  // a = w · (yes − no): z = r Σ x a, and g = d_z a.
  float a[SPANS][8], dot = 0.f;
#pragma unroll
  for (int s = 0; s < SPANS; s++) {
    const int at = s * SPAN + threadIdx.x * 8;
    if (at >= p.width) break;
    float w[8], yes[8], y[8];
    load8(p.w + at, w);
    load8(p.yes + at, yes);
    if (p.no) {
      float no[8];
      load8(p.no + at, no);
#pragma unroll
      for (int i = 0; i < 8; i++) yes[i] -= no[i];
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
      a[s][i] = w[i] * yes[i];
      y[i] = v[s][i] * r * w[i];
      dot = fmaf(v[s][i], a[s][i], dot);
    }
    if (p.y) store8(p.y + n * p.width + at, y);
  }
  const float sum = block_sum<THREADS / 32>(dot, scratch), z = r * sum;
  if (threadIdx.x == 0 && p.scores) p.scores[n] = z;
  if (!p.d_x) return;
  // With e = e^−|z| neither overflows, and where the answer is right nothing cancels.
  const float label = p.labels[n], e = expf(-fabsf(z));
  if (threadIdx.x == 0) p.losses[n] = fmaxf(z, 0.f) - label * z + log1pf(e);
  const float larger = 1.f / (1.f + e), yes = z < 0.f ? e * larger : larger, no = z < 0.f ? larger : e * larger;
  const float d_z = p.weights[n] * ((1.f - label) * yes - label * no), c = sum / p.width * r * r;
#pragma unroll
  for (int s = 0; s < SPANS; s++) {
    const int at = s * SPAN + threadIdx.x * 8;
    if (at >= p.width) break;
    float d[8];
#pragma unroll
    for (int i = 0; i < 8; i++) d[i] = d_z * r * (a[s][i] - v[s][i] * c);
    store8(p.d_x + n * p.ldd + at, d);
  }
}
