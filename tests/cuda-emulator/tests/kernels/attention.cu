// Causal attention of one head, head dimension 64, in the manner of FlashAttention: a block holds 64 queries, walks over
// keys in tiles of 64, keeps a running maximum and sum, and never writes the scores. bf16 in, f32 sums, tensor cores.
#include <cuda_bf16.h>
#include <stdint.h>

static __device__ __forceinline__ uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
static __device__ __forceinline__ void mma16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
static __device__ __forceinline__ uint32_t pack(float low, float high) {
  __nv_bfloat162 t = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&t);
}

// q, k, v, o: [n][64]. 128 threads: each warp has 16 queries. scale in log2 units.
extern "C" __global__ void __launch_bounds__(128)
attention_fwd(const __nv_bfloat16* q, const __nv_bfloat16* k, const __nv_bfloat16* v, float* o, int n, float scale) {
  constexpr int D = 64, LD = D + 8;
  __shared__ __align__(16) __nv_bfloat16 sk[64 * LD], sv[64 * LD];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int first = blockIdx.x * 64, row0 = first + warp * 16 + g, row1 = row0 + 8;
  uint32_t fq[4][4];
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      int r = e % 2 ? row1 : row0, c = i * 16 + t * 2 + e / 2 * 8;
      fq[i][e] = r < n ? *(const uint32_t*)(q + (size_t)r * D + c) : 0u;
    }
  float acc[8][4] = {}, top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
  for (int key0 = 0; key0 <= first + 63 && key0 < n; key0 += 64) {
    __syncthreads();
    for (int i = threadIdx.x; i < 64 * 8; i += 128) {
      int r = i / 8, c = i % 8 * 8;
      uint4 zero = make_uint4(0, 0, 0, 0);
      *(uint4*)(sk + r * LD + c) = key0 + r < n ? *(const uint4*)(k + (size_t)(key0 + r) * D + c) : zero;
      *(uint4*)(sv + r * LD + c) = key0 + r < n ? *(const uint4*)(v + (size_t)(key0 + r) * D + c) : zero;
    }
    __syncthreads();
    float s[8][4] = {};
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const __nv_bfloat16* at = sk + (j * 8 + g) * LD + i * 16 + t * 2;
        mma16816(s[j], fq[i], *(const uint32_t*)at, *(const uint32_t*)(at + 8));
      }
    float best[2] = {top[0], top[1]};
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        int key = key0 + j * 8 + t * 2 + e % 2, row = e / 2 ? row1 : row0;
        s[j][e] = key <= row && key < n ? s[j][e] * scale : -INFINITY;
        best[e / 2] = fmaxf(best[e / 2], s[j][e]);
      }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      best[h] = fmaxf(best[h], __shfl_xor_sync(0xffffffffu, best[h], 1));
      best[h] = fmaxf(best[h], __shfl_xor_sync(0xffffffffu, best[h], 2));
      float base = best[h] == -INFINITY ? 0.f : best[h], keep = exp2f(top[h] - base);
      top[h] = best[h];
      sum[h] *= keep;
#pragma unroll
      for (int j = 0; j < 8; j++) acc[j][h * 2] *= keep, acc[j][h * 2 + 1] *= keep;
#pragma unroll
      for (int j = 0; j < 8; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) sum[h] += s[j][h * 2 + e] = exp2f(s[j][h * 2 + e] - base);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      uint32_t p[4] = {pack(s[2 * i][0], s[2 * i][1]), pack(s[2 * i][2], s[2 * i][3]), pack(s[2 * i + 1][0], s[2 * i + 1][1]), pack(s[2 * i + 1][2], s[2 * i + 1][3])};
#pragma unroll
      for (int j = 0; j < 4; j++) {
        uint32_t b[4], at = shared_address(sv + (i * 16 + lane % 16) * LD + j * 16 + lane / 16 * 8);
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3]) : "r"(at) : "memory");
        mma16816(acc[2 * j], p, b[0], b[1]);
        mma16816(acc[2 * j + 1], p, b[2], b[3]);
      }
    }
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 1);
    sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 2);
    int row = h ? row1 : row0;
    if (row < n)
#pragma unroll
      for (int j = 0; j < 8; j++) {
        o[(size_t)row * D + j * 8 + t * 2] = acc[j][h * 2] / sum[h];
        o[(size_t)row * D + j * 8 + t * 2 + 1] = acc[j][h * 2 + 1] / sum[h];
      }
  }
}
