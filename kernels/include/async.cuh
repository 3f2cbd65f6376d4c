// Asynchronous copies from global to shared memory (sm_80).
#pragma once
#include <stdint.h>
#include <utility>

__device__ __forceinline__ uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// A number that the compiler knows, as an argument.
template <int N> struct Constant {
  static constexpr int value = N;
  __device__ __forceinline__ constexpr operator int() const { return N; }
};

template <typename F, int... I> __device__ __forceinline__ void unrolled(F& f, std::integer_sequence<int, I...>) {
  (f(Constant<I>{}), ...);
}

// f(0), f(1), …, f(N − 1), with numbers that may be template arguments: what inline assembly takes as an immediate offset.
template <int N, typename F> __device__ __forceinline__ void unrolled(F f) { unrolled(f, std::make_integer_sequence<int, N>{}); }

// `bytes` bytes, then zeros up to 16; the source must be a valid address, of 16 bytes or none.
__device__ __forceinline__ void copy_upto16(uint32_t to, const void* from, uint32_t bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// 16 bytes; zeros where `inside` is false (the source is then not read, but must be a valid address).
__device__ __forceinline__ void copy16(uint32_t to, const void* from, bool inside) {
  copy_upto16(to, from, inside ? 16 : 0);
}

// 16 bytes, so many bytes after `to` and `from`.
template <int TO, int FROM> __device__ __forceinline__ void copy16(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0 + %2], [%1 + %3], 16;" ::"r"(to), "l"(from), "n"(TO), "n"(FROM) : "memory");
}

__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most N groups of this thread are on their way.
template <int N> __device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
