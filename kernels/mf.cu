// Matrix factorisation: score = p_u · q_i, binary cross-entropy on 0/1 labels, its sparse gradient. float32.
//
//   mf_score     score = p_u · q_i,  loss = softplus(score) − label · score,  d = (sigmoid(score) − label) / n     a warp a batch row
//   mf_gradient  d_p[u] = Σ d · q_i over the batch rows of u, in their order; d_q[i] likewise; row 0, if it is padding: zero   a warp (part) a table row
//   mf_loss      mean of the losses, in float64 and in a fixed order                                                 one block
//
// Rows of the batch are sorted by id on the host: those of id are order[starts[id] .. starts[id + 1]]. All rows of the gradient are
// written, so it needs no clearing and Adam over whole tables (as officially) follows. Widths are multiples of 4.
//
// Read: users [n_users, dim], items [n_items, dim], the batch. Written: scores, losses, d_scores [n], gradients of both tables,
// loss [1]. Grids: a warp a row (mf_gradient: 2^lanes threads), mf_gradient's second dimension: 0 users, 1 items.
#include "element.cuh"
#include "reduce.cuh"

constexpr int WARPS = 8;
constexpr int THREADS = WARPS * 32;

struct Mf {
  const float* users;
  const float* items;
  const uint32_t* batch_users;  // [n]
  const uint32_t* batch_items;  // [n]
  const float* labels;          // [n]; null: scores only
  float* scores;                // [n]
  float* losses;                // [n]
  float* d_scores;              // [n]
  int n, dim;
};

extern "C" __global__ void __launch_bounds__(THREADS) NAMED(mf_score)(const __grid_constant__ Mf p) {
  const int row = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x & 31;
  if (row >= p.n) return;
  const float* const user = p.users + (size_t)p.batch_users[row] * p.dim;
  const float* const item = p.items + (size_t)p.batch_items[row] * p.dim;
  float sum = 0.f;
  for (int c = lane * 4; c < p.dim; c += 128) {
    const float4 x = *reinterpret_cast<const float4*>(user + c), y = *reinterpret_cast<const float4*>(item + c);
    sum = fmaf(x.x, y.x, fmaf(x.y, y.y, fmaf(x.z, y.z, fmaf(x.w, y.w, sum))));
  }
  const float score = warp_sum(sum);
  if (lane) return;
  p.scores[row] = score;
  if (p.labels) {
    const float label = p.labels[row], small = expf(-fabsf(score));
    p.losses[row] = fmaxf(score, 0.f) + log1pf(small) - label * score;
    const float sigmoid = (score < 0.f ? small : 1.f) / (1.f + small);
    p.d_scores[row] = (sigmoid - label) / p.n;
  }
}

// One of the two tables' gradients.
struct Side {
  float* gradient;         // [rows, dim]
  const float* other;      // the other table
  const uint32_t* ids;     // [n]: rows of the other table
  const uint32_t* starts;  // [rows + 1]
  const uint32_t* order;   // [n]
  int rows;
};

struct Gradient {
  Side sides[2];
  const float* d_scores;
  int dim;
  int lanes;    // log2 of the lanes of a row
  int padding;  // 1: row 0 gets no gradient
};

extern "C" __global__ void __launch_bounds__(THREADS) NAMED(mf_gradient)(const __grid_constant__ Gradient p) {
  const Side& side = p.sides[blockIdx.y];
  const int id = (blockIdx.x * THREADS + threadIdx.x) >> p.lanes, lane = threadIdx.x & ((1 << p.lanes) - 1);
  if (id >= side.rows) return;
  const uint32_t first = side.starts[id], last = id || !p.padding ? side.starts[id + 1] : first;
  for (int c = lane * 4; c < p.dim; c += 4 << p.lanes) {
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 2
    for (uint32_t at = first; at < last; at++) {
      const uint32_t row = side.order[at];
      const float d = p.d_scores[row];
      const float4 x = *reinterpret_cast<const float4*>(side.other + (size_t)side.ids[row] * p.dim + c);
      sum = make_float4(fmaf(d, x.x, sum.x), fmaf(d, x.y, sum.y), fmaf(d, x.z, sum.z), fmaf(d, x.w, sum.w));
    }
    *reinterpret_cast<float4*>(side.gradient + (size_t)id * p.dim + c) = sum;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    NAMED(mf_loss)(const float* __restrict__ losses, double* __restrict__ loss, int n) {
  __shared__ double sums[THREADS];
  double sum = 0.0;
  for (int i = threadIdx.x; i < n; i += THREADS) sum += losses[i];
  sums[threadIdx.x] = sum;
  for (int half = THREADS / 2; half; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) *loss = sums[0] / n;
}
