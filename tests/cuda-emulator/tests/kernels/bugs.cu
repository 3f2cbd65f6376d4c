// One mistake a kernel; the tests demand that each is found, and named.
#include <stdint.h>

extern "C" __global__ void out_of_bounds(float* x, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i <= n) x[i] = 1.f;
}
extern "C" __global__ void misaligned(float* x) { *(float*)((char*)x + 4 * threadIdx.x + 2) = 1.f; }
extern "C" __global__ void shared_out_of_bounds(float* x, int n) {
  __shared__ float s[32];
  s[threadIdx.x + n] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = s[threadIdx.x];
}
extern "C" __global__ void local_out_of_bounds(float* x, int n) {
  float own[16];
  for (int i = 0; i < 16; i++) own[i] = x[i];
  own[n] = 3.f;
  x[threadIdx.x] = own[(threadIdx.x * 7) & 15];
}
__constant__ float table[16];
extern "C" __global__ void const_out_of_bounds(float* x, int n) { x[threadIdx.x] = table[threadIdx.x + n]; }
extern "C" __global__ void copy_element(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x]; }
extern "C" __global__ void shared_uninitialised(float* y) {
  __shared__ float s[64];
  s[threadIdx.x] = 1.f;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x + 32];
}
// Two warps without a barrier between.
extern "C" __global__ void shared_race(float* y) {
  __shared__ float s[64];
  s[threadIdx.x] = threadIdx.x;
  y[threadIdx.x] = s[63 - threadIdx.x];
}
// Lanes of one warp without __syncwarp between.
extern "C" __global__ void warp_race(float* y) {
  __shared__ volatile float unused[1];
  __shared__ float s[32];
  s[threadIdx.x] = threadIdx.x;
  y[threadIdx.x] = s[31 - threadIdx.x];
  unused[0] = 0;
}
extern "C" __global__ void warp_synchronised(float* y) {
  __shared__ float s[32];
  s[threadIdx.x] = threadIdx.x;
  __syncwarp();
  y[threadIdx.x] = s[31 - threadIdx.x];
}
extern "C" __global__ void write_after_read(float* y) {
  __shared__ float s[64];
  s[threadIdx.x] = threadIdx.x;
  __syncthreads();
  float v = s[63 - threadIdx.x];
  s[threadIdx.x] = v + 1.f;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];
}
extern "C" __global__ void block_race(float* y) { y[(blockIdx.x * blockDim.x + threadIdx.x) % 48] = blockIdx.x; }
// The last block adds up: fences and an atomic order the accesses.
extern "C" __global__ void last_block(float* part, float* total, unsigned* ticket) {
  __shared__ bool last;
  part[blockIdx.x * blockDim.x + threadIdx.x] = 1.f;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(ticket, 1u) == gridDim.x - 1;
  __syncthreads();
  if (last && threadIdx.x == 0) {
    float sum = 0;
    for (int i = 0; i < gridDim.x * blockDim.x; i++) sum += ((volatile float*)part)[i];
    *total = sum;
  }
}
extern "C" __global__ void copy_not_waited(const float* x, float* y) {
  __shared__ __align__(16) float s[128];
  uint32_t to = (uint32_t)__cvta_generic_to_shared(s + threadIdx.x * 4);
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(to), "l"(x + threadIdx.x * 4) : "memory");
  asm volatile("cp.async.commit_group;" ::: "memory");
  y[threadIdx.x] = s[threadIdx.x * 4];
  asm volatile("cp.async.wait_group 0;" ::: "memory");
}
extern "C" __global__ void copy_without_barrier(const float* x, float* y) {
  __shared__ __align__(16) float s[256];
  uint32_t to = (uint32_t)__cvta_generic_to_shared(s + threadIdx.x * 4);
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(to), "l"(x + threadIdx.x * 4) : "memory");
  asm volatile("cp.async.commit_group;" ::: "memory");
  asm volatile("cp.async.wait_group 0;" ::: "memory");
  y[threadIdx.x] = s[(threadIdx.x ^ 32) * 4];
}
extern "C" __global__ void divergent_barrier(float* y) {
  if (threadIdx.x < 16) {
    y[threadIdx.x] = 1.f;
    __syncthreads();
  } else {
    y[threadIdx.x] = 2.f;
  }
  y[threadIdx.x] += 1.f;
}
extern "C" __global__ void early_exit(float* y, int n) {
  __shared__ float s[64];
  if (threadIdx.x >= n) return;
  s[threadIdx.x] = 1.f;
  __syncthreads();
  y[threadIdx.x] = s[n - 1 - threadIdx.x];
}
extern "C" __global__ void mask_never_arrives(int* y) {
  int v = 0;
  if (threadIdx.x < 16) v = __shfl_sync(0xffffffffu, threadIdx.x, 3);
  else if (threadIdx.x < 24) { asm volatile("bar.sync 1, 64;"); }
  y[threadIdx.x] = v;
}
extern "C" __global__ void barrier_deadlock(int* y) {
  if (threadIdx.x < 32) asm volatile("bar.sync 1, 64;" ::: "memory");
  else asm volatile("bar.sync 2, 64;" ::: "memory");
  y[threadIdx.x] = 1;
}
extern "C" __global__ void spin(volatile int* y) { while (*y == 0) {} }
// A lock taken lane by lane: progress needs fairness between the parted lanes.
extern "C" __global__ void lock_per_lane(int* lock, int* count) {
  bool done = false;
  while (!done) {
    if (atomicCAS(lock, 0, 1) == 0) {
      *(volatile int*)count = *(volatile int*)count + 1;
      __threadfence();
      atomicExch(lock, 0);
      done = true;
    }
  }
}
extern "C" __global__ void producer_consumer(const float* x, float* y) {
  // Warp 0 fills, warp 1 reads, through a pair of named barriers.
  __shared__ float s[32];
  for (int i = 0; i < 3; i++) {
    if (threadIdx.x < 32) {
      if (i > 0) asm volatile("bar.sync 2, 64;" ::: "memory");
      s[threadIdx.x] = x[i * 32 + threadIdx.x];
      asm volatile("bar.arrive 1, 64;" ::: "memory");
    } else {
      asm volatile("bar.sync 1, 64;" ::: "memory");
      y[i * 32 + threadIdx.x - 32] = s[63 - threadIdx.x];
      if (i < 2) asm volatile("bar.arrive 2, 64;" ::: "memory");
    }
  }
}
