// Asynchronous copies from global to shared memory (sm_80).
#pragma once
#include <stdint.h>

__device__ __forceinline__ uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// `bytes` bytes, then zeros up to 16; the source must be a valid address, of 16 bytes or none.
__device__ __forceinline__ void copy_upto16(uint32_t to, const void* from, uint32_t bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// 16 bytes; zeros where `inside` is false (the source is then not read, but must be a valid address).
__device__ __forceinline__ void copy16(uint32_t to, const void* from, bool inside) {
  copy_upto16(to, from, inside ? 16 : 0);
}

__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most N groups of this thread are on their way.
template <int N> __device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
