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
// on; each with its own stride, rows and heads at 16-byte boundaries. lse (natural logarithm), delta: float32 [n_q, n_heads].
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
#include "mma.cuh"

#ifdef COLLM_F32
constexpr int WARPS = 2;
constexpr int OTHER = 16;
#else
constexpr int WARPS = 4;
constexpr int OTHER = 32;
#endif
constexpr int THREADS = 32 * WARPS;
constexpr int OWN = 16 * WARPS;
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
  int group;                // query heads of a kv head
  int head_dim;
  int first;                // key row of d_k's and d_v's row 0
  float scale;              // 1 / √head_dim
};

// Elements from row to row of a tile of D columns: an odd number of 16-byte chunks, so that the eight rows of an ldmatrix lie
// in different banks.
template <int D> constexpr int LD = D + VEC;

// `n_rows` rows of `columns` elements; the rest of the ROWS × D tile becomes zeros.
template <int ROWS, int D>
__device__ __forceinline__ void load_rows(elem* tile, const elem* from, int ld, int n_rows, int columns) {
  constexpr int CHUNKS = D / VEC, TOGETHER = THREADS / CHUNKS;
  static_assert(THREADS % CHUNKS == 0 && ROWS % TOGETHER == 0, "a thread copies one chunk of every TOGETHER-th row");
  const int column = threadIdx.x % CHUNKS * VEC, row = threadIdx.x / CHUNKS;
  const uint32_t to = shared_address(tile + row * LD<D> + column);
  const elem* const source = from + (size_t)row * ld + column;
#pragma unroll 4
  for (int r = 0; r < ROWS; r += TOGETHER) {
    const bool inside = row + r < n_rows && column < columns;
    copy16(to + r * LD<D> * sizeof(elem), inside ? source + (size_t)r * ld : from, inside);
  }
}

// 4 bytes; zero where `inside` is false.
__device__ __forceinline__ void copy4(float* to, const float* from, bool inside) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(inside ? 4 : 0)
               : "memory");
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// c = a · bᵀ: 16 rows of a, 8 NK rows of b, summed over the D columns of both (of which `columns` are not zero).
//
// Accumulators as in the PTX manual: c[j][0], c[j][1] at row lane / 4, columns 8 j + 2 (lane % 4) and the next; c[j][2], c[j][3]
// eight rows below.
template <int D, int NK>
__device__ __forceinline__ void dot_rows(float (&c)[NK][4], const elem* a, const elem* b, int columns) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int j = 0; j < NK; j++) c[j][0] = c[j][1] = c[j][2] = c[j][3] = 0.f;
#ifdef COLLM_F32
#pragma unroll 1
  for (int k = 0; k < columns; k += 4) {
    float x[2][4], y[NK * 2][4];
#pragma unroll
    for (int r = 0; r < 2; r++) load_vec(a + (lane / 4 + 8 * r) * LD<D> + k, x[r]);
#pragma unroll
    for (int n = 0; n < NK * 2; n++) load_vec(b + (n / 2 * 8 + (lane & 3) * 2 + (n & 1)) * LD<D> + k, y[n]);
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
      for (int j = 0; j < NK; j++) {
#pragma unroll
        for (int e = 0; e < 4; e++) c[j][e] = fmaf(x[e / 2][i], y[2 * j + (e & 1)][i], c[j][e]);
      }
    }
  }
#else
  const uint32_t a_at = shared_address(a + (lane & 15) * LD<D> + (lane >> 4) * 8);
  const uint32_t b_at = shared_address(b + ((lane & 7) + ((lane >> 4) << 3)) * LD<D> + ((lane >> 3) & 1) * 8);
#pragma unroll
  for (int k = 0; k < D; k += 16) {
    uint32_t fa[4];
    ldmatrix_x4(fa, a_at + k * sizeof(elem));
#pragma unroll
    for (int j = 0; j < NK; j += 2) {
      uint32_t fb[4];
      ldmatrix_x4(fb, b_at + (j * 8 * LD<D> + k) * sizeof(elem));
      mma_bf16(c[j], fa, fb[0], fb[1]);
      mma_bf16(c[j + 1], fa, fb[2], fb[3]);
    }
  }
#endif
}

// c += w · b: w 16 × 8 NK, held as accumulators are; b 8 NK rows of D columns; c 16 × D.
template <int D, int NK>
__device__ __forceinline__ void add_weighted_rows(float (&c)[D / 8][4], const float (&w)[NK][4], const elem* b) {
  const int lane = threadIdx.x & 31;
#ifdef COLLM_F32
#pragma unroll
  for (int kk = 0; kk < NK; kk++) {
#pragma unroll 1
    for (int k = 0; k < 8; k++) {
      // Weight k of this row lies with lane k / 2 of the four that share it.
      const int from = (lane & 28) + k / 2;
      const float even0 = __shfl_sync(0xffffffffu, w[kk][0], from), odd0 = __shfl_sync(0xffffffffu, w[kk][1], from);
      const float even1 = __shfl_sync(0xffffffffu, w[kk][2], from), odd1 = __shfl_sync(0xffffffffu, w[kk][3], from);
      const float w0 = k & 1 ? odd0 : even0, w1 = k & 1 ? odd1 : even1;
      const elem* const row = b + (kk * 8 + k) * LD<D> + (lane & 3) * 2;
#pragma unroll
      for (int j = 0; j < D / 8; j++) {
        const float2 x = load_pair(row + j * 8);
        c[j][0] = fmaf(w0, x.x, c[j][0]), c[j][1] = fmaf(w0, x.y, c[j][1]);
        c[j][2] = fmaf(w1, x.x, c[j][2]), c[j][3] = fmaf(w1, x.y, c[j][3]);
      }
    }
  }
#else
  const uint32_t b_at = shared_address(b + (lane & 15) * LD<D> + (lane >> 4) * 8);
#pragma unroll
  for (int kk = 0; kk < NK; kk += 2) {
    const uint32_t fw[4] = {pack_bf16(w[kk][0], w[kk][1]), pack_bf16(w[kk][2], w[kk][3]),
                            pack_bf16(w[kk + 1][0], w[kk + 1][1]), pack_bf16(w[kk + 1][2], w[kk + 1][3])};
#pragma unroll
    for (int j = 0; j < D / 8; j += 2) {
      uint32_t fb[4];
      ldmatrix_x4_trans(fb, b_at + (kk * 8 * LD<D> + j * 8) * sizeof(elem));
      mma_bf16(c[j], fw, fb[0], fb[1]);
      mma_bf16(c[j + 1], fw, fb[2], fb[3]);
    }
  }
#endif
}

// A warp's 16 rows leave in 16-byte pieces: through `slab`, 16 rows of shared memory that only this warp uses by now. Rows
// lane / 4 are multiplied by s0, those eight below by s1; `n` rows of `columns` elements exist.
template <int D>
__device__ __forceinline__ void store_rows(elem* slab, const float (&c)[D / 8][4], float s0, float s1, elem* to, int ld, int n,
                                           int columns) {
  constexpr int CHUNKS = D / VEC, TOGETHER = 32 / CHUNKS;
  static_assert(32 % CHUNKS == 0, "a warp stores whole rows at a time");
  const int lane = threadIdx.x & 31;
  __syncwarp();
#pragma unroll
  for (int j = 0; j < D / 8; j++) {
    elem* const at = slab + lane / 4 * LD<D> + j * 8 + (lane & 3) * 2;
    store_pair(at, c[j][0] * s0, c[j][1] * s0);
    store_pair(at + 8 * LD<D>, c[j][2] * s1, c[j][3] * s1);
  }
  __syncwarp();
  const int column = lane % CHUNKS * VEC;
#pragma unroll 1
  for (int r = lane / CHUNKS; r < min(n, 16); r += TOGETHER) {
    if (column >= columns) break;
    *reinterpret_cast<uint4*>(to + (size_t)r * ld + column) = *reinterpret_cast<const uint4*>(slab + r * LD<D> + column);
  }
}

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
    if ((lane & 3) == 0 && i < t.n) g.lse[(size_t)(t.row + i) * g.n_heads + head] = highest[r] * LN2 + logf(sum[r]);
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
      lse[r] = g.lse[(size_t)(t.row + i) * g.n_heads + head] * LOG2E;
      delta[r] = g.delta[(size_t)(t.row + i) * g.n_heads + head];
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
      const float* const from = (threadIdx.x < OTHER ? g.lse : g.delta) + (size_t)x.row * g.n_heads + head;
      const bool inside = i < x.n;
      copy4(numbers + s * 2 * OTHER + threadIdx.x, inside ? from + (size_t)i * g.n_heads : from, inside);
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
    const int row = item / g.n_heads, at = item % g.n_heads * g.head_dim;
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
  extern "C" __global__ void __launch_bounds__(THREADS) NAMED(attention_d_kv_##d)(const __grid_constant__ Attention g) {    \
    backward_kv<d>(g);                                                                                                   \
  }

// The float32 build is for checking: two widths.
#ifndef COLLM_F32
ATTENTION(32)
#endif
ATTENTION(64)
ATTENTION(128)
