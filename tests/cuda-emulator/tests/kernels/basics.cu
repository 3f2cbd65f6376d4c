// Textbook kernels: vector add, reductions (shared memory, shuffles), transpose, scan, histogram. Sizes are ragged: every
// kernel guards its ends.
#include <stdint.h>

extern "C" __global__ void vector_add(const float* a, const float* b, float* c, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) c[i] = a[i] + b[i];
}

// One sum a block, by a tree in shared memory. blockDim.x = 256.
extern "C" __global__ void reduce_shared(const float* x, float* sums, int n) {
  __shared__ float part[256];
  float sum = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) sum += x[i];
  part[threadIdx.x] = sum;
  __syncthreads();
  for (int half = 128; half > 0; half >>= 1) {
    if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) sums[blockIdx.x] = part[0];
}

// One sum in all, by shuffles, one shared word a warp and one atomic a block.
extern "C" __global__ void reduce_shuffle(const float* x, float* total, int n) {
  __shared__ float warps[32];
  float sum = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) sum += x[i];
  for (int d = 16; d > 0; d >>= 1) sum += __shfl_down_sync(0xffffffffu, sum, d);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x < 32) {
    sum = threadIdx.x < blockDim.x / 32 ? warps[threadIdx.x] : 0.f;
    for (int d = 16; d > 0; d >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, d);
    if (threadIdx.x == 0) atomicAdd(total, sum);
  }
}

// out[n][m] = in[m][n]; 32x8 threads move 32x32 tiles. PAD 1 has no bank conflicts, PAD 0 has 32-way ones.
template <int PAD> __device__ void transpose(const float* in, float* out, int m, int n) {
  __shared__ float tile[32][32 + PAD];
  int x = blockIdx.x * 32 + threadIdx.x, y = blockIdx.y * 32 + threadIdx.y;
  for (int j = 0; j < 32; j += 8)
    if (x < n && y + j < m) tile[threadIdx.y + j][threadIdx.x] = in[(size_t)(y + j) * n + x];
  __syncthreads();
  x = blockIdx.y * 32 + threadIdx.x, y = blockIdx.x * 32 + threadIdx.y;
  for (int j = 0; j < 32; j += 8)
    if (x < m && y + j < n) out[(size_t)(y + j) * m + x] = tile[threadIdx.x][threadIdx.y + j];
}
extern "C" __global__ void transpose_padded(const float* in, float* out, int m, int n) { transpose<1>(in, out, m, n); }
extern "C" __global__ void transpose_conflicts(const float* in, float* out, int m, int n) { transpose<0>(in, out, m, n); }

// Inclusive scan of n <= 1024 integers by one block (Hillis and Steele, two buffers).
extern "C" __global__ void scan_block(const int* in, int* out, int n) {
  extern __shared__ int buffer[];
  int t = threadIdx.x, from = 0, to = blockDim.x;
  buffer[t] = t < n ? in[t] : 0;
  __syncthreads();
  for (int d = 1; d < n; d <<= 1) {
    buffer[to + t] = buffer[from + t] + (t >= d ? buffer[from + t - d] : 0);
    __syncthreads();
    int swap = from;
    from = to, to = swap;
  }
  if (t < n) out[t] = buffer[from + t];
}

// Counts of byte values: shared counters first, one global atomic a bin and block.
extern "C" __global__ void histogram(const uint8_t* x, unsigned* bins, int n) {
  __shared__ unsigned own[256];
  for (int i = threadIdx.x; i < 256; i += blockDim.x) own[i] = 0;
  __syncthreads();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) atomicAdd(&own[x[i]], 1u);
  __syncthreads();
  for (int i = threadIdx.x; i < 256; i += blockDim.x)
    if (own[i]) atomicAdd(&bins[i], own[i]);
}

// Steps of u[i] = (u[i-1] + u[i] + u[i+1]) / 3 by all blocks together: a barrier of the grid from atomics and fences.
// The launch must be cooperative. `arrived` starts at 0.
extern "C" __global__ void stencil_cooperative(float* a, float* b, int n, int steps, unsigned* arrived) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  for (int s = 0; s < steps; s++) {
    const volatile float* from = s % 2 ? b : a;
    float* to = s % 2 ? a : b;
    if (i < n) {
      float left = i > 0 ? from[i - 1] : 0.f, right = i < n - 1 ? from[i + 1] : 0.f;
      to[i] = (left + from[i] + right) / 3.f;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(arrived, 1u);
      while (*(volatile unsigned*)arrived < gridDim.x * (s + 1)) {}
      __threadfence();
    }
    __syncthreads();
  }
}

// Work that takes apart the lanes of a warp: iterations of the Collatz map; device functions with calls and recursion.
__device__ __noinline__ unsigned collatz(unsigned n) {
  unsigned steps = 0;
  while (n != 1) {
    n = n & 1 ? 3 * n + 1 : n / 2;
    steps++;
  }
  return steps;
}
__device__ __noinline__ unsigned fibonacci(unsigned n) { return n < 2 ? n : fibonacci(n - 1) + fibonacci(n - 2); }
__device__ unsigned (*functions[2])(unsigned) = {collatz, fibonacci};
extern "C" __global__ void calls(unsigned* direct, unsigned* recursive, unsigned* indirect, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  direct[i] = collatz(i + 1);
  recursive[i] = fibonacci(i % 12);
  indirect[i] = functions[i & 1](i % 10 + 1);
}
