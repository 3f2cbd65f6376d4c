// The element type of activations and weights, and how it is loaded, stored and rounded.
//
// Kernels are compiled twice: with bf16 elements (shipped), and with float32 ones (-DCOLLM_F32), which tells a mistake from
// rounding. NAMED(op) gives each build its own name. Arithmetic is float32 in both.
#pragma once
#include <cuda_bf16.h>
#include <stdint.h>

#ifdef COLLM_F32
using elem = float;
#define NAMED(op) op##_f32
#else
using elem = __nv_bfloat16;
#define NAMED(op) op##_bf16
#endif

// Elements of one 16-byte access.
constexpr int VEC = 16 / sizeof(elem);

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T> __device__ __forceinline__ T narrow(float x);
template <> __device__ __forceinline__ float narrow<float>(float x) { return x; }
template <> __device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// A value as it will be read back after being stored.
__device__ __forceinline__ float rounded(float x) { return widen(narrow<elem>(x)); }

// VEC elements at a 16-byte boundary.
__device__ __forceinline__ void load_vec(const elem* p, float (&v)[VEC]) {
  const uint4 raw = *reinterpret_cast<const uint4*>(p);
#ifdef COLLM_F32
  v[0] = __uint_as_float(raw.x), v[1] = __uint_as_float(raw.y), v[2] = __uint_as_float(raw.z), v[3] = __uint_as_float(raw.w);
#else
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    v[2 * i] = __uint_as_float(words[i] << 16);
    v[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
#endif
}

// Two bf16 in one register, the first in the low half.
__device__ __forceinline__ uint32_t pack_bf16(float lo, float hi) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(lo, hi);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ __forceinline__ void store_vec(elem* p, const float (&v)[VEC]) {
#ifdef COLLM_F32
  *reinterpret_cast<float4*>(p) = make_float4(v[0], v[1], v[2], v[3]);
#else
  *reinterpret_cast<uint4*>(p) =
      make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
#endif
}

// Two neighbouring elements at an even index.
__device__ __forceinline__ float2 load_pair(const elem* p) {
#ifdef COLLM_F32
  return *reinterpret_cast<const float2*>(p);
#else
  const uint32_t raw = *reinterpret_cast<const uint32_t*>(p);
  return make_float2(__uint_as_float(raw << 16), __uint_as_float(raw & 0xffff0000u));
#endif
}

__device__ __forceinline__ void store_pair(elem* p, float a, float b) {
#ifdef COLLM_F32
  *reinterpret_cast<float2*>(p) = make_float2(a, b);
#else
  *reinterpret_cast<uint32_t*>(p) = pack_bf16(a, b);
#endif
}

// Eight elements, the unit of the matrix kernels' epilogues: one 16-byte access, or two in the float32 build.
__device__ __forceinline__ void load8(const elem* p, float (&v)[8]) {
#pragma unroll
  for (int h = 0; h < 8 / VEC; h++) {
    float part[VEC];
    load_vec(p + h * VEC, part);
#pragma unroll
    for (int i = 0; i < VEC; i++) v[h * VEC + i] = part[i];
  }
}

__device__ __forceinline__ void store8(elem* p, const float (&v)[8]) {
#pragma unroll
  for (int h = 0; h < 8 / VEC; h++) {
    float part[VEC];
#pragma unroll
    for (int i = 0; i < VEC; i++) part[i] = v[h * VEC + i];
    store_vec(p + h * VEC, part);
  }
}

// N neighbouring elements, 4 at a boundary of 4 elements or 8 at one of 8.
template <int N> __device__ __forceinline__ void load_n(const elem* p, float (&v)[N]) {
  static_assert(N == 4 || N == 8, "one 8-byte or 16-byte access of bf16");
  if constexpr (N == 8) {
    load8(p, v);
  } else {
#ifdef COLLM_F32
    load_vec(p, v);
#else
    const uint2 raw = *reinterpret_cast<const uint2*>(p);
    v[0] = __uint_as_float(raw.x << 16), v[1] = __uint_as_float(raw.x & 0xffff0000u);
    v[2] = __uint_as_float(raw.y << 16), v[3] = __uint_as_float(raw.y & 0xffff0000u);
#endif
  }
}

template <int N> __device__ __forceinline__ void store_n(elem* p, const float (&v)[N]) {
  static_assert(N == 4 || N == 8, "one 8-byte or 16-byte access of bf16");
  if constexpr (N == 8) {
    store8(p, v);
  } else {
#ifdef COLLM_F32
    store_vec(p, v);
#else
    *reinterpret_cast<uint2*>(p) = make_uint2(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]));
#endif
  }
}
