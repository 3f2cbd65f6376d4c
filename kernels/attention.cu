// Attention over packed segments, without a matrix of scores in memory (Dao 2023), forward and backward.
//
//   S = q kᵀ / √d      P = softmax(S) over what a query sees      out = P v      lse = log Σ exp S
//   delta = rowsum(d_out · out)      d_S = P · (d_out vᵀ − delta)
//   d_q = d_S k / √d      d_k = d_Sᵀ q / √d      d_v = Pᵀ d_out
//
// The queries of a segment are the last tokens of their own run of keys; each sees all of a prefix (rows of another run) and
// of its own run everything up to itself. The tables that say which rows are whose are made by src/device/cuda/attention.rs.
//
// q, out, d_out, d_q: [n_q, n_heads · head_dim]; k, v: [n_kv, n_kv_heads · head_dim]; d_k, d_v: the same for rows from `first`
// on; each with its own stride, rows and heads at 16-byte boundaries. lse (natural logarithm), delta: float32 [n_heads, n_q],
// so that a head's are neighbours; in backward lse has all queries of the forward, and its pointer is at the first with a gradient.
//
// attention_forward:  reads q, k, v; writes out, lse.      A block a (query tile, head); loops over the keys the tile sees.
// attention_delta:    reads out, d_out; writes delta.      Eight lanes a (query, head).
// attention_d_q:      reads all but out; writes d_q.       A block a (query tile, head); loops over the keys the tile sees.
// attention_d_kv:     reads all but out; writes d_k, d_v.  A block a (key tile, kv head); loops over all that read these keys,
//                     segment by segment, head by head, so that sums over readers have one order. No atomics.
//
// A block owns a tile of OWN rows, 16 a warp, and walks over tiles of OTHER rows, copied asynchronously into two stages. The
// own rows are the rows of the products; P and d_S stay in registers, where the accumulators of one product are the operand
// of the next. Products are tensor-core ones (float32 sums; P and d_S are rounded to bf16), or scalar in the float32 build.
// Kernels exist for three widths D; a head in between (80, 96) is filled up with zero columns, in shared memory only.
// Grid: heads × tiles, so that the heads that share keys run together. Dynamic shared memory: see shared_bytes in attention.rs.
#include "attention.cuh"

constexpr float LOG2E = 1.44269504088896341f;
constexpr float LN2 = 0.69314718055994531f;
// A bound that no index reaches.
constexpr int FAR = 1 << 30;

struct Attention {
  const int4* query_tiles;  // two words each, see Queries
  const int4* key_tiles;    // {first row, rows, first reader, one past its last reader}
  const int4* readers;      // {first query row, queries, lead, 0}: query i sees key j of the tile if j + lead <= i
  const elem* q;
  const elem* k;
  const elem* v;
  elem* out;
  const elem* d_out;
  elem* d_q;
  elem* d_k;
  elem* d_v;
  float* lse;
  float* delta;
  int ld_q, ld_k, ld_v, ld_out, ld_d_out, ld_d_q, ld_d_k, ld_d_v;
  int n_q, n_heads;
  int n_lse;                // queries of the forward
  int group;                // query heads of a kv head
  int head_dim;
  int first;                // key row of d_k's and d_v's row 0
  float scale;              // 1 / √head_dim
};

// A tile of queries of one segment, and the keys it sees.
struct Queries {
  int row, n;            // query rows
  int own;               // own keys that the first of them sees; the next sees one more
  int kv;                // first own key row
  int prefix, n_prefix;  // key rows that all of them see
};

__device__ __forceinline__ Queries queries(const int4* tiles, int tile) {
  const int4 a = tiles[2 * tile], b = tiles[2 * tile + 1];
  return {a.x, a.y, a.z, a.w, b.x, b.y};
}

// One step of the walk over these keys, the prefix first: `n` rows from `row` on, of which query i sees those below bound + i.
struct Keys {
  int row, n, bound;
};

__device__ __forceinline__ int key_steps(const Queries& t) {
  return (t.n_prefix + OTHER - 1) / OTHER + (t.own + t.n - 1 + OTHER - 1) / OTHER;
}

__device__ __forceinline__ Keys keys(const Queries& t, int step) {
  const int prefix_steps = (t.n_prefix + OTHER - 1) / OTHER;
  if (step < prefix_steps) return {t.prefix + step * OTHER, min(OTHER, t.n_prefix - step * OTHER), FAR};
  const int at = (step - prefix_steps) * OTHER;
  return {t.kv + at, min(OTHER, t.own + t.n - 1 - at), t.own - at};
}

extern __shared__ __align__(128) unsigned char memory[];

// Part `i` of stage `s`, after `own` tiles of OWN rows.
template <int D> __device__ __forceinline__ elem* stage(int own, int s, int i) {
  return reinterpret_cast<elem*>(memory) + (own * OWN + (s * 2 + i) * OTHER) * LD<D>;
}

template <int D> __device__ __forceinline__ void forward(const Attention& g) {
  constexpr int NK = OTHER / 8;
  const int lane = threadIdx.x & 31, m0 = threadIdx.x / 32 * 16, dim = g.head_dim;
  const Queries t = queries(g.query_tiles, blockIdx.y);
  const int head = blockIdx.x, kv_head = head / g.group;
  elem* const q = reinterpret_cast<elem*>(memory);
  auto load = [&](int step) {
    const Keys x = keys(t, step);
    load_rows<OTHER, D>(stage<D>(1, step & 1, 0), g.k + (size_t)x.row * g.ld_k + kv_head * dim, g.ld_k, x.n, dim);
    load_rows<OTHER, D>(stage<D>(1, step & 1, 1), g.v + (size_t)x.row * g.ld_v + kv_head * dim, g.ld_v, x.n, dim);
  };

  // Scores are kept times log₂ e, so that 2^x is what remains to be computed.
  const float scale = g.scale * LOG2E;
  float out[D / 8][4] = {}, highest[2] = {-INFINITY, -INFINITY}, sum[2] = {};
  load_rows<OWN, D>(q, g.q + (size_t)t.row * g.ld_q + head * dim, g.ld_q, t.n, dim);
  load(0);
  copies_commit();
  const int steps = key_steps(t);
  for (int step = 0; step < steps; step++) {
    if (step + 1 < steps) load(step + 1);
    copies_commit();
    copies_wait<1>();
    __syncthreads();
    const Keys x = keys(t, step);
    // Some query of this warp sees some of these keys. The first step has a key for every query.
    if (m0 < t.n && x.bound + m0 + 15 > 0) {
      float p[NK][4];
      dot_rows<D>(p, q + m0 * LD<D>, stage<D>(1, step & 1, 0), dim);
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int visible = min(x.n, x.bound + m0 + lane / 4 + 8 * r);
        float top = highest[r];
#pragma unroll
        for (int j = 0; j < NK; j++) {
#pragma unroll
          for (int e = 0; e < 2; e++) {
            float& s = p[j][2 * r + e];
            s = j * 8 + (lane & 3) * 2 + e < visible ? s * scale : -INFINITY;
            top = fmaxf(top, s);
          }
        }
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
        const float shrink = exp2_approx(highest[r] - top);
        highest[r] = top;
        sum[r] *= shrink;
#pragma unroll
        for (int j = 0; j < NK; j++) {
#pragma unroll
          for (int e = 0; e < 2; e++) {
            float& s = p[j][2 * r + e];
            s = exp2_approx(s - top);
            sum[r] += s;
          }
        }
#pragma unroll
        for (int j = 0; j < D / 8; j++) out[j][2 * r] *= shrink, out[j][2 * r + 1] *= shrink;
      }
      add_weighted_rows<D>(out, p, stage<D>(1, step & 1, 1));
    }
    __syncthreads();
  }
  if (m0 >= t.n) return;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 1);
    sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 2);
    const int i = m0 + lane / 4 + 8 * r;
    if ((lane & 3) == 0 && i < t.n) g.lse[(size_t)head * g.n_lse + t.row + i] = highest[r] * LN2 + logf(sum[r]);
  }
  store_rows<D>(q + m0 * LD<D>, out, 1.f / sum[0], 1.f / sum[1], g.out + (size_t)(t.row + m0) * g.ld_out + head * dim, g.ld_out,
                t.n - m0, dim);
}

template <int D> __device__ __forceinline__ void backward_q(const Attention& g) {
  constexpr int NK = OTHER / 8;
  const int lane = threadIdx.x & 31, m0 = threadIdx.x / 32 * 16, dim = g.head_dim;
  const Queries t = queries(g.query_tiles, blockIdx.y);
  const int head = blockIdx.x, kv_head = head / g.group;
  elem* const q = reinterpret_cast<elem*>(memory);
  elem* const d_out = q + OWN * LD<D>;
  auto load = [&](int step) {
    const Keys x = keys(t, step);
    load_rows<OTHER, D>(stage<D>(2, step & 1, 0), g.k + (size_t)x.row * g.ld_k + kv_head * dim, g.ld_k, x.n, dim);
    load_rows<OTHER, D>(stage<D>(2, step & 1, 1), g.v + (size_t)x.row * g.ld_v + kv_head * dim, g.ld_v, x.n, dim);
  };

  const float scale = g.scale * LOG2E;
  float d_q[D / 8][4] = {}, lse[2] = {}, delta[2] = {};
  load_rows<OWN, D>(q, g.q + (size_t)t.row * g.ld_q + head * dim, g.ld_q, t.n, dim);
  load_rows<OWN, D>(d_out, g.d_out + (size_t)t.row * g.ld_d_out + head * dim, g.ld_d_out, t.n, dim);
  load(0);
  copies_commit();
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int i = m0 + lane / 4 + 8 * r;
    if (i < t.n) {
      lse[r] = g.lse[(size_t)head * g.n_lse + t.row + i] * LOG2E;
      delta[r] = g.delta[(size_t)head * g.n_q + t.row + i];
    }
  }
  const int steps = key_steps(t);
  for (int step = 0; step < steps; step++) {
    if (step + 1 < steps) load(step + 1);
    copies_commit();
    copies_wait<1>();
    __syncthreads();
    const Keys x = keys(t, step);
    if (m0 < t.n && x.bound + m0 + 15 > 0) {
      const elem* const k = stage<D>(2, step & 1, 0);
      float p[NK][4], d_p[NK][4];
      dot_rows<D>(p, q + m0 * LD<D>, k, dim);
      dot_rows<D>(d_p, d_out + m0 * LD<D>, stage<D>(2, step & 1, 1), dim);
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int visible = min(x.n, x.bound + m0 + lane / 4 + 8 * r);
#pragma unroll
        for (int j = 0; j < NK; j++) {
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const bool seen = j * 8 + (lane & 3) * 2 + e < visible;
            const float weight = seen ? exp2_approx(p[j][2 * r + e] * scale - lse[r]) : 0.f;
            p[j][2 * r + e] = weight * (d_p[j][2 * r + e] - delta[r]);
          }
        }
      }
      add_weighted_rows<D>(d_q, p, k);
    }
    __syncthreads();
  }
  if (m0 >= t.n) return;
  store_rows<D>(q + m0 * LD<D>, d_q, g.scale, g.scale, g.d_q + (size_t)(t.row + m0) * g.ld_d_q + head * dim, g.ld_d_q, t.n - m0,
                dim);
}

// One step of the walk over a key tile's readers: `n` queries from `row` on, seen through one head; of key j those from
// j + lead on see it.
struct Reading {
  int reader, head, at;
  int row, n, lead;
};

template <int D> __device__ __forceinline__ void backward_kv(const Attention& g) {
  constexpr int NK = OTHER / 8;
  const int lane = threadIdx.x & 31, m0 = threadIdx.x / 32 * 16, dim = g.head_dim;
  const int4 tile = g.key_tiles[blockIdx.y];
  const int first_row = tile.x, n_keys = tile.y, last_reader = tile.w, kv_head = blockIdx.x;
  elem* const k = reinterpret_cast<elem*>(memory);
  elem* const v = k + OWN * LD<D>;
  // Of each stage OTHER log-sum-exps, then deltas.
  float* const numbers = reinterpret_cast<float*>(stage<D>(2, 2, 0));

  int4 reader = make_int4(0, 0, 0, 0);
  auto enter = [&](Reading& x) {
    if (x.reader < last_reader) reader = g.readers[x.reader];
  };
  auto place = [&](Reading& x) { x.row = reader.x + x.at, x.n = min(OTHER, reader.y - x.at), x.lead = reader.z - x.at; };
  auto advance = [&](Reading x) {
    x.at += OTHER;
    if (x.at >= reader.y) {
      x.at = 0;
      if (++x.head == g.group) {
        x.head = 0, x.reader++;
        enter(x);
      }
    }
    place(x);
    return x;
  };
  auto load = [&](int s, const Reading& x) {
    const int head = kv_head * g.group + x.head;
    load_rows<OTHER, D>(stage<D>(2, s, 0), g.q + (size_t)x.row * g.ld_q + head * dim, g.ld_q, x.n, dim);
    load_rows<OTHER, D>(stage<D>(2, s, 1), g.d_out + (size_t)x.row * g.ld_d_out + head * dim, g.ld_d_out, x.n, dim);
    const int i = threadIdx.x % OTHER;
    if (threadIdx.x < 2 * OTHER) {
      const float* const from = (threadIdx.x < OTHER ? g.lse + (size_t)head * g.n_lse : g.delta + (size_t)head * g.n_q) + x.row;
      const bool inside = i < x.n;
      copy4(numbers + s * 2 * OTHER + threadIdx.x, inside ? from + i : from, inside);
    }
  };

  const float scale = g.scale * LOG2E;
  float d_k[D / 8][4] = {}, d_v[D / 8][4] = {};
  Reading now = {tile.z, 0, 0, 0, 0, 0};
  enter(now);
  place(now);
  load_rows<OWN, D>(k, g.k + (size_t)first_row * g.ld_k + kv_head * dim, g.ld_k, n_keys, dim);
  load_rows<OWN, D>(v, g.v + (size_t)first_row * g.ld_v + kv_head * dim, g.ld_v, n_keys, dim);
  if (now.reader < last_reader) load(0, now);
  copies_commit();
  for (int s = 0; now.reader < last_reader; s ^= 1) {
    const Reading next = advance(now);
    if (next.reader < last_reader) load(s ^ 1, next);
    copies_commit();
    copies_wait<1>();
    __syncthreads();
    if (m0 < n_keys && m0 + now.lead < now.n) {
      const elem* const q = stage<D>(2, s, 0);
      const elem* const d_out = stage<D>(2, s, 1);
      const float* const lse = numbers + s * 2 * OTHER;
      float p[NK][4], d_p[NK][4];
      dot_rows<D>(p, k + m0 * LD<D>, q, dim);
#pragma unroll
      for (int j = 0; j < NK; j++) {
        const int i = j * 8 + (lane & 3) * 2;
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int query = i + (e & 1), key = m0 + lane / 4 + e / 2 * 8;
          const bool seen = query < now.n && key + now.lead <= query;
          p[j][e] = seen ? exp2_approx(p[j][e] * scale - lse[query] * LOG2E) : 0.f;
        }
      }
      add_weighted_rows<D>(d_v, p, d_out);
      dot_rows<D>(d_p, v + m0 * LD<D>, d_out, dim);
#pragma unroll
      for (int j = 0; j < NK; j++) {
#pragma unroll
        for (int e = 0; e < 4; e++) p[j][e] *= d_p[j][e] - lse[OTHER + j * 8 + (lane & 3) * 2 + (e & 1)];
      }
      add_weighted_rows<D>(d_k, p, q);
    }
    __syncthreads();
    now = next;
  }
  // A tile without readers has not waited for its keys.
  copies_wait<0>();
  __syncthreads();
  if (m0 >= n_keys) return;
  const int row = first_row - g.first + m0;
  store_rows<D>(k + m0 * LD<D>, d_k, g.scale, g.scale, g.d_k + (size_t)row * g.ld_d_k + kv_head * dim, g.ld_d_k, n_keys - m0, dim);
  store_rows<D>(v + m0 * LD<D>, d_v, 1.f, 1.f, g.d_v + (size_t)row * g.ld_d_v + kv_head * dim, g.ld_d_v, n_keys - m0, dim);
}

extern "C" __global__ void __launch_bounds__(THREADS) NAMED(attention_delta)(const __grid_constant__ Attention g) {
  const int item = blockIdx.x * (THREADS / 8) + threadIdx.x / 8;
  float sum = 0.f;
  if (item < g.n_q * g.n_heads) {
    const int row = item % g.n_q, at = item / g.n_q * g.head_dim;
    for (int c = (threadIdx.x & 7) * VEC; c < g.head_dim; c += 8 * VEC) {
      float x[VEC], y[VEC];
      load_vec(g.out + (size_t)row * g.ld_out + at + c, x);
      load_vec(g.d_out + (size_t)row * g.ld_d_out + at + c, y);
#pragma unroll
      for (int i = 0; i < VEC; i++) sum = fmaf(x[i], y[i], sum);
    }
  }
#pragma unroll
  for (int o = 4; o; o >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, o);
  if ((threadIdx.x & 7) == 0 && item < g.n_q * g.n_heads) g.delta[item] = sum;
}

#define ATTENTION(d)                                                                                                     \
  extern "C" __global__ void __launch_bounds__(THREADS) NAMED(attention_forward_##d)(const __grid_constant__ Attention g) { \
    forward<d>(g);                                                                                                       \
  }                                                                                                                      \
  extern "C" __global__ void __launch_bounds__(THREADS) NAMED(attention_d_q_##d)(const __grid_constant__ Attention g) {     \
    backward_q<d>(g);                                                                                                    \
  }                                                                                                                      \
  extern "C" __global__ void __launch_bounds__(THREADS, 2) NAMED(attention_d_kv_##d)(const __grid_constant__ Attention g) {    \
    backward_kv<d>(g);                                                                                                   \
  }

// The float32 build is for checking: two widths.
#ifndef COLLM_F32
ATTENTION(32)
#endif
ATTENTION(64)
ATTENTION(128)
