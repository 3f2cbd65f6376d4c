// C[m][n] = A[m][k] B[n][k]^T. A plain tiled version in f32, and bf16 on tensor cores: three stages of cp.async, ldmatrix,
// mma.sync. The second is a template with eight variants: 0 is right, 1..7 each hold one classical mistake that a test
// must catch.
#include <cuda_bf16.h>
#include <stdint.h>

// 16x16 threads, 64x64 tiles, 4x4 outputs a thread.
extern "C" __global__ void __launch_bounds__(256) gemm_tiled(const float* A, const float* B, float* C, int m, int n, int k) {
  __shared__ float a[16][64 + 4], b[16][64 + 4];
  int tx = threadIdx.x % 16, ty = threadIdx.x / 16, row = blockIdx.y * 64, col = blockIdx.x * 64;
  float acc[4][4] = {};
  for (int k0 = 0; k0 < k; k0 += 16) {
    for (int i = threadIdx.x; i < 64 * 16; i += 256) {
      int r = i / 16, c = i % 16;
      a[c][r] = row + r < m && k0 + c < k ? A[(size_t)(row + r) * k + k0 + c] : 0.f;
      b[c][r] = col + r < n && k0 + c < k ? B[(size_t)(col + r) * k + k0 + c] : 0.f;
    }
    __syncthreads();
#pragma unroll
    for (int kk = 0; kk < 16; kk++) {
      float x[4], y[4];
      for (int i = 0; i < 4; i++) x[i] = a[kk][ty * 4 + i], y[i] = b[kk][tx * 4 + i];
      for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) acc[i][j] += x[i] * y[j];
    }
    __syncthreads();
  }
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 4; j++)
      if (row + ty * 4 + i < m && col + tx * 4 + j < n) C[(size_t)(row + ty * 4 + i) * n + col + tx * 4 + j] = acc[i][j];
}

static __device__ __forceinline__ uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
static __device__ __forceinline__ void copy16(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
static __device__ __forceinline__ void ldmatrix4(uint32_t (&r)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
static __device__ __forceinline__ void mma16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

constexpr int BM = 64, BN = 64, BK = 32, LD = BK + 8;

// Variants: 1 no barrier before the products; 2 no barrier after them (write after read); 3 no wait for the copies;
// 4 a wait that lets one stage too many be in flight; 5 wrong lane formula of ldmatrix; 6 row bound off by one; 7 every
// warp stores the same quarter of the tile.
template <int MUTANT> __device__ __forceinline__ void gemm(const __nv_bfloat16* A, const __nv_bfloat16* B, float* C, int m, int n, int k) {
  constexpr int STAGES = 2;
  __shared__ __align__(16) __nv_bfloat16 sa[STAGES][BM * LD], sb[STAGES][BN * LD];
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  const int wm = (warp / 2) * 32, wn = (warp % 2) * 32, row = blockIdx.y * BM, col = blockIdx.x * BN;
  float acc[2][4][4] = {};
  auto load = [&](int stage, int k0) {
    for (int i = 0; i < 2; i++) {
      int c = tid + i * 128, r = c / 4, kc = (c % 4) * 8, gk = k0 + kc;
      bool ra = row + r < m || (MUTANT == 6 && row + r == m), rb = col + r < n;
      copy16(shared_address(&sa[stage][r * LD + kc]), A + (ra ? (size_t)(row + r) * k : 0) + (gk < k ? gk : 0), ra && gk < k);
      copy16(shared_address(&sb[stage][r * LD + kc]), B + (rb ? (size_t)(col + r) * k : 0) + (gk < k ? gk : 0), rb && gk < k);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  const int steps = (k + BK - 1) / BK;
  load(0, 0);
  for (int s = 0; s < steps; s++) {
    if (s + 1 < steps) {
      load((s + 1) & 1, (s + 1) * BK);
      if (MUTANT == 4) asm volatile("cp.async.wait_group 2;" ::: "memory");
      else if (MUTANT != 3) asm volatile("cp.async.wait_group 1;" ::: "memory");
    } else if (MUTANT != 3) asm volatile("cp.async.wait_group 0;" ::: "memory");
    if (MUTANT != 1) __syncthreads();
    const __nv_bfloat16 *a = sa[s & 1], *b = sb[s & 1];
#pragma unroll
    for (int kk = 0; kk < BK; kk += 16) {
      uint32_t fa[2][4], fb[2][4];
      const int half = MUTANT == 5 ? lane / 8 % 2 : lane / 16;
#pragma unroll
      for (int i = 0; i < 2; i++) ldmatrix4(fa[i], shared_address(a + (wm + i * 16 + lane % 16) * LD + kk + half * 8));
#pragma unroll
      for (int j = 0; j < 2; j++) ldmatrix4(fb[j], shared_address(b + (wn + j * 16 + lane % 8 + lane / 16 * 8) * LD + kk + lane / 8 % 2 * 8));
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) mma16816(acc[i][j], fa[i], fb[j / 2][j % 2 * 2], fb[j / 2][j % 2 * 2 + 1]);
    }
    if (MUTANT != 2) __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        int r = row + (MUTANT == 7 ? 0 : wm) + i * 16 + lane / 4 + e / 2 * 8, c = col + wn + j * 8 + lane % 4 * 2 + e % 2;
        if (r < m && c < n) C[(size_t)r * n + c] = acc[i][j][e];
      }
}
#define GEMM(V) \
  extern "C" __global__ void __launch_bounds__(128) gemm_mma_##V(const __nv_bfloat16* A, const __nv_bfloat16* B, float* C, int m, int n, int k) { gemm<V>(A, B, C, m, n, k); }
GEMM(0) GEMM(1) GEMM(2) GEMM(3) GEMM(4) GEMM(5) GEMM(6) GEMM(7)
