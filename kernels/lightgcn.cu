// LightGCN's propagation: e_{l+1} = Â e_l, result = mean of e_0 .. e_L, with the symmetric Â = D^-½ A D^-½ in CSR. float32.
//
// A launch is one layer: a warp (or, for short rows, the part of it that 16 bytes a lane fill) a node sums its neighbours in the order
// of their list, writes the layer and adds to the mean in the same pass; the last layer divides and need not be written. Rows without neighbours keep e_0 / (L + 1). Â is
// symmetric, so the gradient with respect to e_0 is the same propagation of the gradient of the mean. No atomics: always the same bits.
//
// Read: starts [nodes + 1], columns, values, from [nodes, dim], first (null: mean holds the sum so far). Written: to [nodes, dim]
// (null: none), mean [nodes, dim]. Width: a multiple of 4. Grid: nodes · 2^lanes / THREADS.
#include "element.cuh"

constexpr int THREADS = 256;

struct Layer {
  const uint32_t* starts;
  const uint32_t* columns;
  const float* values;
  const float* from;
  float* to;
  const float* first;  // e_0, in the first layer
  float* mean;
  float scale;         // of the mean: 1 / (L + 1) in the last layer, 1 before
  int nodes, dim;
  int lanes;           // log2 of the lanes of a node
};

extern "C" __global__ void __launch_bounds__(THREADS) NAMED(lightgcn_layer)(const __grid_constant__ Layer p) {
  const int node = (blockIdx.x * THREADS + threadIdx.x) >> p.lanes, lane = threadIdx.x & ((1 << p.lanes) - 1);
  if (node >= p.nodes) return;
  const uint32_t start = p.starts[node], end = p.starts[node + 1];
  for (int c = lane * 4; c < p.dim; c += 4 << p.lanes) {
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 4
    for (uint32_t edge = start; edge < end; edge++) {
      const float w = p.values[edge];
      const float4 x = *reinterpret_cast<const float4*>(p.from + (size_t)p.columns[edge] * p.dim + c);
      sum = make_float4(fmaf(w, x.x, sum.x), fmaf(w, x.y, sum.y), fmaf(w, x.z, sum.z), fmaf(w, x.w, sum.w));
    }
    const size_t i = (size_t)node * p.dim + c;
    if (p.to) *reinterpret_cast<float4*>(p.to + i) = sum;
    const float4 before = *reinterpret_cast<const float4*>((p.first ? p.first : p.mean) + i);
    *reinterpret_cast<float4*>(p.mean + i) = make_float4((before.x + sum.x) * p.scale, (before.y + sum.y) * p.scale,
                                                         (before.z + sum.z) * p.scale, (before.w + sum.w) * p.scale);
  }
}
