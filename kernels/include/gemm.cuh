// What the matrix products of all cards share (gemm.cu, gemm_sm90.cu): their arguments, the order of tiles, the epilogues.
#pragma once
#include "element.cuh"
#include "mask.cuh"

// M tiles that are walked before the next N tile.
constexpr int GROUP = 8;

// Columns of C (nt) or steps of K (nn) of an adapter whose input is dropped out.
struct Region {
  int first, last;       // [first, last)
  int tile;              // nt: number of the first tile
  const uint32_t* mask;
};

struct Gemm {
  const elem* a;
  const elem* b;
  const elem* b_tail;   // rows b_rows.. of B
  elem* c;
  const elem* bias;     // [b_rows] (nt); null for none; the adapters' columns get neither
  const elem* addend;   // [m, ld_addend]; null for none; may be c
  const elem* gate_up;  // swiglu_bwd: saved gate and up, [m, ld_gate_up]
  elem* act;            // swiglu: [m, ld_act]; c may then be null
  int m, n, k;
  int b_rows;
  int lda, ldb, ldb_tail, ldc, ld_addend, ld_gate_up, ld_act;
  MaskLayout mask_layout;
  float mask_scale;     // 1 / (1 − p)
  int n_regions;
  int n_tiles;          // nt: tiles of the plain columns and of all regions
  int plain_n;          // nt: columns before the regions
  int k_last;           // nn: the unmasked steps of K come before
  Region regions[4];
};

// Which tile is the index-th: groups of GROUP row tiles, column tiles within them.
struct Place {
  int m, n;
};

__device__ __forceinline__ Place place(int index, int m_tiles, int n_tiles) {
  const int group = index / (GROUP * n_tiles), in_group = index % (GROUP * n_tiles);
  const int rows = min(GROUP, m_tiles - group * GROUP);
  return {group * GROUP + in_group % rows, in_group / rows};
}

enum class Epilogue { Plain, Swiglu, SwigluBackward };

// What an epilogue reads for N neighbouring columns of a row: addend, or gate and up. Fetched apart from its use, so that several are
// on their way at once.
template <Epilogue EPILOGUE, int N> struct Fetched {
  uint4 raw[(EPILOGUE == Epilogue::SwigluBackward ? 2 * N : EPILOGUE == Epilogue::Plain ? N : VEC) / VEC];
  bool there = false;
};

template <Epilogue EPILOGUE, bool B_IS_KN, int N>
__device__ __forceinline__ void fetch(const Gemm& g, int row, int column, Fetched<EPILOGUE, N>& f) {
  const elem* from = nullptr;
  if constexpr (EPILOGUE == Epilogue::SwigluBackward) from = g.gate_up + (size_t)row * g.ld_gate_up + 2 * column;
  if constexpr (EPILOGUE == Epilogue::Plain) {
    if (g.addend && (B_IS_KN || column < g.b_rows)) from = g.addend + (size_t)row * g.ld_addend + column;
  }
  f.there = from != nullptr;
  if (from) {
#pragma unroll
    for (int i = 0; i < (int)(sizeof f.raw / sizeof f.raw[0]); i++) f.raw[i] = reinterpret_cast<const uint4*>(from)[i];
  }
}

// N neighbouring columns of a row of the product to where they belong: eight, or, of swiglu_bwd, four. `column` is a multiple of N.
template <Epilogue EPILOGUE, bool B_IS_KN, int N>
__device__ __forceinline__ void finish(const Gemm& g, int row, int column, float (&v)[N], const Fetched<EPILOGUE, N>& f) {
  const elem* const fetched = reinterpret_cast<const elem*>(f.raw);
  elem* const c = g.c + (size_t)row * g.ldc + column;
  if constexpr (EPILOGUE != Epilogue::SwigluBackward) {
    if (g.bias && (B_IS_KN || column < g.b_rows)) {
      float bias[8];
      load8(g.bias + column, bias);
#pragma unroll
      for (int e = 0; e < 8; e++) v[e] += bias[e];
    }
  }
  if constexpr (EPILOGUE == Epilogue::Plain) {
    if (f.there) {
      float addend[8];
      load8(fetched, addend);
#pragma unroll
      for (int e = 0; e < 8; e++) v[e] += addend[e];
    }
    store8(c, v);
  } else if constexpr (EPILOGUE == Epilogue::Swiglu) {
    if (g.c) store8(c, v);  // kept for backward
    float out[4];
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const float gate = rounded(v[2 * e]), up = rounded(v[2 * e + 1]);
      out[e] = gate / (1.f + __expf(-gate)) * up;
    }
    store_n<4>(g.act + (size_t)row * g.ld_act + column / 2, out);
  } else {
#pragma unroll
    for (int half = 0; half < N / 4; half++) {
      float gu[8], d[8];
      load8(fetched + half * 8, gu);
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const float gate = gu[2 * e], up = gu[2 * e + 1], d_act = v[half * 4 + e];
        const float sigmoid = 1.f / (1.f + __expf(-gate));
        d[2 * e] = d_act * up * sigmoid * (1.f + gate * (1.f - sigmoid));
        d[2 * e + 1] = d_act * gate * sigmoid;
      }
      store8(g.c + (size_t)row * g.ldc + 2 * column + half * 8, d);
    }
  }
}
