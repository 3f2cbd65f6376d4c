// The optimizer's step over all trained tensors: norm of the gradient, clipping, AdamW or Adam with L2, zeroed gradients.
//
//   norm = scale · √Σ g²                 grad_norm: a partial sum a chunk; grad_norm_finish: their sum
//   g ← scale · clip · g                 clip = max / (norm + 1e-6) where norm > max, else 1
//   w ← w · shrink                       decoupled decay: shrink = 1 − lr · decay; coupled: g ← g + decay · w
//   m ← β₁ m + (1−β₁) g,  v ← β₂ v + (1−β₂) g²,  w ← w − step_size · m / (√v / correction + ε)
//
// All float32, each product and sum rounded on its own (no fused multiply-adds), in the order of src/device/cpu/optimizer.rs: on
// equal gradients that are not clipped the bits are the CPU's. Sums of squares are float64 and in a fixed order. The norm never
// visits the host on its way to the step; where it is not finite, weights and moments stay as they are.
//
// Every tensor is cut into chunks of at most CHUNK elements, each at a 16-byte boundary; a block takes one. Read: chunks, g, norm, step.
// Read and written: w, m, v. Written: partial [chunks], norm [2] = norm and clip, g (zeroed if asked for). Grid: chunks (finish: 1);
// block: THREADS.
#include "element.cuh"

constexpr int THREADS = 256;

struct Chunk {
  float* w;
  float* g;
  float* m;
  float* v;
  double decay;
  int n;
};

struct Step {
  double lr;
  float scale;       // of the gradients
  float step_size;   // lr / (1 − β₁ᵗ)
  float correction;  // √(1 − β₂ᵗ)
  int coupled;       // 1: L2 in the gradient; 0: decoupled decay
  int zero;          // 1: gradients become zero
};

// Sum over the block, in a fixed order; thread 0 gets it.
__device__ __forceinline__ double block_sum(double v) {
  __shared__ double sums[THREADS];
  sums[threadIdx.x] = v;
#pragma unroll
  for (int half = THREADS / 2; half; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  return sums[0];
}

__device__ __forceinline__ double square(float x) { return (double)x * (double)x; }

extern "C" __global__ void __launch_bounds__(THREADS)
    NAMED(grad_norm)(const Chunk* __restrict__ chunks, double* __restrict__ partial) {
  const float* const g = chunks[blockIdx.x].g;
  const int n = chunks[blockIdx.x].n, whole = n & ~3;
  double sum = 0.0;
  for (int i = threadIdx.x * 4; i < whole; i += THREADS * 4) {
    const float4 x = *reinterpret_cast<const float4*>(g + i);
    sum += (square(x.x) + square(x.y)) + (square(x.z) + square(x.w));
  }
  if (threadIdx.x < n - whole) sum += square(g[whole + threadIdx.x]);
  sum = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    NAMED(grad_norm_finish)(const double* __restrict__ partial, double* __restrict__ norm, int chunks, double scale, double max) {
  double sum = 0.0;
  for (int i = threadIdx.x; i < chunks; i += THREADS) sum += partial[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) {
    const double length = scale * sqrt(sum);
    norm[0] = length;
    norm[1] = length > max ? max / (length + 1e-6) : 1.0;
  }
}

struct Element {
  float w, m, v;
};

__device__ __forceinline__ Element update(float w, float g, float m, float v, const Step& s, float clip, float shrink, float l2) {
  constexpr float B1 = (float)0.9, B2 = (float)0.999, C1 = (float)(1.0 - 0.9), C2 = (float)(1.0 - 0.999), EPS = (float)1e-8;
  g = __fmul_rn(__fmul_rn(g, s.scale), clip);
  w = __fmul_rn(w, shrink);
  g = __fadd_rn(g, __fmul_rn(l2, w));
  m = __fadd_rn(__fmul_rn(B1, m), __fmul_rn(C1, g));
  v = __fadd_rn(__fmul_rn(B2, v), __fmul_rn(__fmul_rn(C2, g), g));
  const float root = __fadd_rn(__fdiv_rn(__fsqrt_rn(v), s.correction), EPS);
  w = __fsub_rn(w, __fdiv_rn(__fmul_rn(s.step_size, m), root));
  return {w, m, v};
}

extern "C" __global__ void __launch_bounds__(THREADS)
    NAMED(adam)(const Chunk* __restrict__ chunks, const double* __restrict__ norm, const Step* __restrict__ step) {
  const Step s = *step;
  const Chunk c = chunks[blockIdx.x];
  if (!isfinite(norm[0])) return;
  const float clip = (float)norm[1];
  const float shrink = s.coupled ? 1.f : (float)__dsub_rn(1.0, __dmul_rn(s.lr, c.decay));
  const float l2 = s.coupled ? (float)c.decay : 0.f;
  const int whole = c.n & ~3;
  for (int i = threadIdx.x * 4; i < whole; i += THREADS * 4) {
    float4* const pw = reinterpret_cast<float4*>(c.w + i);
    float4* const pg = reinterpret_cast<float4*>(c.g + i);
    float4* const pm = reinterpret_cast<float4*>(c.m + i);
    float4* const pv = reinterpret_cast<float4*>(c.v + i);
    const float4 w = *pw, g = *pg, m = *pm, v = *pv;
    const Element x = update(w.x, g.x, m.x, v.x, s, clip, shrink, l2);
    const Element y = update(w.y, g.y, m.y, v.y, s, clip, shrink, l2);
    const Element z = update(w.z, g.z, m.z, v.z, s, clip, shrink, l2);
    const Element q = update(w.w, g.w, m.w, v.w, s, clip, shrink, l2);
    *pw = make_float4(x.w, y.w, z.w, q.w);
    *pm = make_float4(x.m, y.m, z.m, q.m);
    *pv = make_float4(x.v, y.v, z.v, q.v);
    if (s.zero) *pg = make_float4(0.f, 0.f, 0.f, 0.f);
  }
  if (threadIdx.x < c.n - whole) {
    const int i = whole + threadIdx.x;
    const Element e = update(c.w[i], c.g[i], c.m[i], c.v[i], s, clip, shrink, l2);
    c.w[i] = e.w, c.m[i] = e.m, c.v[i] = e.v;
    if (s.zero) c.g[i] = 0.f;
  }
}
