// Hopper: wgmma, tensor maps, clusters. Each mistake of a real kernel has a number (BUG); 0 is right.
#include <cstdint>
#include <cuda.h>

__device__ __forceinline__ uint32_t shared(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// ---- wgmma ----

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

template <int SA, int SB, int TA, int TB>
__device__ __forceinline__ void bf16_n64(float (&d)[32], uint64_t a, uint64_t b, int add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, %35, %36, %37, %38;}"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
                 : "l"(a), "l"(b), "r"(add), "n"(SA), "n"(SB), "n"(TA), "n"(TB));
}
template <int SA, int SB, int TA, int TB>
__device__ __forceinline__ void bf16_n8(float (&d)[4], uint64_t a, uint64_t b, int add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %6, 0; wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, p, %7, %8, %9, %10;}"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "l"(a), "l"(b), "r"(add), "n"(SA), "n"(SB), "n"(TA), "n"(TB));
}
template <int SA, int SB, int TA, int TB>
__device__ __forceinline__ void bf16_n256(float (&d)[128], uint64_t a, uint64_t b, int add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %130, 0; wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, %128, %129, p, %131, %132, %133, %134;}"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]), "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]), "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]), "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]), "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]), "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]), "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])
                 : "l"(a), "l"(b), "r"(add), "n"(SA), "n"(SB), "n"(TA), "n"(TB));
}
template <int SA, int SB, int TB>
__device__ __forceinline__ void bf16_registers(float (&d)[32], const uint32_t (&a)[4], uint64_t b, int add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, p, %38, %39, %40;}"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(SA), "n"(SB), "n"(TB));
}
template <int SA, int SB, int TA, int TB>
__device__ __forceinline__ void f16_n64(uint32_t (&d)[16], uint64_t a, uint64_t b, int add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %18, 0; wgmma.mma_async.sync.aligned.m64n64k16.f16.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, p, %19, %20, %21, %22;}"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]), "+r"(d[7]), "+r"(d[8]), "+r"(d[9]), "+r"(d[10]), "+r"(d[11]), "+r"(d[12]), "+r"(d[13]), "+r"(d[14]), "+r"(d[15])
                 : "l"(a), "l"(b), "r"(add), "n"(SA), "n"(SB), "n"(TA), "n"(TB));
}
template <int SA, int SB>
__device__ __forceinline__ void tf32_n64(float (&d)[32], uint64_t a, uint64_t b, int add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k8.f32.tf32.tf32 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, %35, %36;}"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
                 : "l"(a), "l"(b), "r"(add), "n"(SA), "n"(SB));
}
template <int SA, int SB>
__device__ __forceinline__ void e4m3_n64(float (&d)[32], uint64_t a, uint64_t b, int add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e5m2 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, %35, %36;}"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
                 : "l"(a), "l"(b), "r"(add), "n"(SA), "n"(SB));
}
__device__ __forceinline__ void s8_n32(uint32_t (&d)[16], uint64_t a, uint64_t b, int add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %18, 0; wgmma.mma_async.sync.aligned.m64n32k32.s32.s8.u8 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, p;}"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]), "+r"(d[7]), "+r"(d[8]), "+r"(d[9]), "+r"(d[10]), "+r"(d[11]), "+r"(d[12]), "+r"(d[13]), "+r"(d[14]), "+r"(d[15])
                 : "l"(a), "l"(b), "r"(add));
}

extern __shared__ __align__(1024) uint8_t dynamic[];

// The matrices as the test laid them out: A from the start, B from `b_at`; descriptors without their addresses.
__device__ __forceinline__ void put_image(const uint4* image, int bytes) {
    for (int i = threadIdx.x; i < bytes / 16; i += blockDim.x) reinterpret_cast<uint4*>(dynamic)[i] = image[i];
}

// Fragments go in and out as they are: register i of thread t at [i * 128 + t].
#define WGMMA_TEST(NAME, T, REGISTERS, CALL)                                                                         \
    extern "C" __global__ void NAME(const uint4* image, int bytes, int a_at, int b_at, uint64_t a, uint64_t b,       \
                                    const uint32_t* fragment, const T* start, int add, T* out) {                     \
        put_image(image, bytes);                                                                                     \
        fence_async();                                                                                               \
        __syncthreads();                                                                                             \
        T d[REGISTERS];                                                                                              \
        for (int i = 0; i < REGISTERS; i++) d[i] = start[i * 128 + threadIdx.x];                                     \
        const uint32_t* g = fragment + threadIdx.x;                                                                  \
        [[maybe_unused]] uint32_t f[4] = {g[0], g[128], g[256], g[384]};                                             \
        a |= (shared(dynamic) + a_at) >> 4, b |= (shared(dynamic) + b_at) >> 4;                                      \
        wgmma_fence();                                                                                               \
        CALL;                                                                                                        \
        wgmma_commit();                                                                                              \
        wgmma_wait<0>();                                                                                             \
        for (int i = 0; i < REGISTERS; i++) out[i * 128 + threadIdx.x] = d[i];                                       \
    }

WGMMA_TEST(wgmma_bf16_00, float, 32, (bf16_n64<1, 1, 0, 0>(d, a, b, add)))
WGMMA_TEST(wgmma_bf16_10, float, 32, (bf16_n64<1, 1, 1, 0>(d, a, b, add)))
WGMMA_TEST(wgmma_bf16_01, float, 32, (bf16_n64<1, 1, 0, 1>(d, a, b, add)))
WGMMA_TEST(wgmma_bf16_11, float, 32, (bf16_n64<1, 1, 1, 1>(d, a, b, add)))
WGMMA_TEST(wgmma_bf16_n8, float, 4, (bf16_n8<1, 1, 0, 0>(d, a, b, add)))
WGMMA_TEST(wgmma_bf16_n256, float, 128, (bf16_n256<1, 1, 0, 1>(d, a, b, add)))
WGMMA_TEST(wgmma_bf16_negated, float, 32, (bf16_n64<-1, 1, 0, 0>(d, a, b, add)))
WGMMA_TEST(wgmma_bf16_registers, float, 32, (bf16_registers<1, -1, 1>(d, f, b, add)))
WGMMA_TEST(wgmma_f16, uint32_t, 16, (f16_n64<1, 1, 0, 1>(d, a, b, add)))
WGMMA_TEST(wgmma_tf32, float, 32, (tf32_n64<1, 1>(d, a, b, add)))
WGMMA_TEST(wgmma_e4m3, float, 32, (e4m3_n64<1, 1>(d, a, b, add)))
WGMMA_TEST(wgmma_s8, uint32_t, 16, (s8_n32(d, a, b, add)))

// Mistakes around one wgmma.
template <int BUG> __device__ __forceinline__ void wgmma_mistake(uint64_t a, uint64_t b, const float* start, float* out) {
    for (int i = threadIdx.x; i < 4096; i += blockDim.x) reinterpret_cast<uint32_t*>(dynamic)[i] = 0x3f803f80;
    if (BUG != 1) fence_async();
    __syncthreads();
    a |= shared(dynamic) >> 4, b |= (shared(dynamic) + 8192) >> 4;
    float d[32];
    float scale = start[0];
    if (BUG != 2) wgmma_fence();
    for (int i = 0; i < 32; i++) d[i] = BUG == 3 ? start[i] * scale : 0;
    if (BUG == 4 && threadIdx.x / 32 == 2) return;
    bf16_n64<1, 1, 0, 0>(d, a, b, 1);
    wgmma_commit();
    if (BUG == 5) __syncthreads(), reinterpret_cast<uint32_t*>(dynamic)[threadIdx.x] = 0;
    if (BUG == 6) d[3] += 1;
    if (BUG != 7) wgmma_wait<0>();
    for (int i = 0; i < 32; i++) out[i * 128 + threadIdx.x] = d[i];
}
#define WGMMA_MISTAKE(N)                                                                                                  \
    extern "C" __global__ void wgmma_mistake_##N(uint64_t a, uint64_t b, const float* start, float* out) {                \
        wgmma_mistake<N>(a, b, start, out);                                                                               \
    }
WGMMA_MISTAKE(0) WGMMA_MISTAKE(1) WGMMA_MISTAKE(2) WGMMA_MISTAKE(3) WGMMA_MISTAKE(4) WGMMA_MISTAKE(5) WGMMA_MISTAKE(6)
WGMMA_MISTAKE(7)

// ---- barriers and copies ----

__device__ __forceinline__ void barrier_init(uint64_t* bar, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared(bar)), "r"(count) : "memory");
}
__device__ __forceinline__ void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void expect(uint64_t* bar, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared(bar)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void arrive(uint64_t* bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared(bar)) : "memory");
}
__device__ __forceinline__ void wait(uint64_t* bar, uint32_t parity) {
    asm volatile(
        "{.reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @p bra done; bra again; done: }" ::"r"(
            shared(bar)), "r"(parity) : "memory");
}
__device__ __forceinline__ bool elected() {
    uint32_t p;
    asm volatile("{.reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p;}" : "=r"(p));
    return p;
}
__device__ __forceinline__ void load_2d(void* to, const CUtensorMap* map, int x, int y, uint64_t* bar) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            shared(to)), "l"(map), "r"(x), "r"(y), "r"(shared(bar)) : "memory");
}
__device__ __forceinline__ void store_2d(const CUtensorMap* map, int x, int y, const void* from) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(x),
                 "r"(y), "r"(shared(from)) : "memory");
}
__device__ __forceinline__ void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
__device__ __forceinline__ void store_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ __forceinline__ void store_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
__device__ __forceinline__ void prefetch(const CUtensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// A box through shared memory: as it lies there, and to another tensor.
template <int BUG> __device__ __forceinline__ void box(const CUtensorMap* from, const CUtensorMap* to, int x, int y, int tx,
                                                       int ty, int bytes, uint8_t* raw) {
    __shared__ uint64_t bar;
    if (threadIdx.x == 0) {
        barrier_init(&bar, 1);
        barriers_ready();
        fence_async();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        prefetch(from);
        expect(&bar, BUG == 1 ? bytes + 16 : bytes);
        load_2d(dynamic, from, x, y, &bar);
    }
    if (BUG != 2) wait(&bar, 0);
    for (int i = threadIdx.x; i < bytes; i += blockDim.x) raw[i] = dynamic[i];
    if (BUG == 3) dynamic[threadIdx.x] = 1, __syncthreads();
    if (threadIdx.x == 0) {
        store_2d(to, tx, ty, dynamic);
        store_commit();
        if (BUG == 4) dynamic[5] = 7;
        if (BUG != 5) store_wait_read();
    }
}
#define BOX(N)                                                                                                         \
    extern "C" __global__ void box_##N(const __grid_constant__ CUtensorMap from, const __grid_constant__ CUtensorMap to, \
                                       int x, int y, int tx, int ty, int bytes, uint8_t* raw) {                         \
        box<N>(&from, &to, x, y, tx, ty, bytes, raw);                                                                   \
    }
BOX(0) BOX(1) BOX(2) BOX(3) BOX(4) BOX(5)

// A box of 1, 3 or 5 dimensions as it lies in shared memory; the map lies in global memory.
extern "C" __global__ void box_of(const CUtensorMap* map, int rank, const int* c, int bytes, uint8_t* raw) {
    __shared__ uint64_t bar;
    uint32_t to = shared(dynamic), at = shared(&bar);
    if (threadIdx.x == 0) {
        barrier_init(&bar, 1);
        expect(&bar, bytes);
        if (rank == 1)
            asm volatile("cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2}], [%3];"
                         ::"r"(to), "l"(map), "r"(c[0]), "r"(at) : "memory");
        if (rank == 3)
            asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
                         "[%0], [%1, {%2, %3, %4}], [%5], %6;"
                         ::"r"(to), "l"(map), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(at), "l"(0x1000000000000000ull) : "memory");
        if (rank == 5)
            asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                         "[%0], [%1, {%2, %3, %4, %5, %6}], [%7];"
                         ::"r"(to), "l"(map), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]), "r"(c[4]), "r"(at) : "memory");
    }
    __syncthreads();
    wait(&bar, 0);
    for (int i = threadIdx.x; i < bytes; i += blockDim.x) raw[i] = dynamic[i];
}

// Every block adds a box of ones to the tensor, and a row of ones to a plain array.
extern "C" __global__ void box_add(const __grid_constant__ CUtensorMap to, float* plain) {
    float* ones = reinterpret_cast<float*>(dynamic);
    for (int i = threadIdx.x; i < 8 * 8; i += blockDim.x) ones[i] = 1;
    fence_async();
    __syncthreads();
    if (threadIdx.x == 0) {
        asm volatile("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&to),
                     "r"(int(blockIdx.x) * 4), "r"(0), "r"(shared(dynamic)) : "memory");
        asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(plain),
                     "r"(shared(dynamic)), "r"(32) : "memory");
        store_commit();
        store_wait();
    }
}

// ---- a GEMM as Hopper wants it: a warp that copies, a warpgroup that multiplies, tiles in turn ----

constexpr int BM = 64, BN = 64, BK = 64, STAGES = 2;
constexpr uint64_t K_MAJOR_128B = 1ull << 62 | uint64_t(1024 >> 4) << 32 | 1ull << 16;

template <int BUG>
__device__ __forceinline__ void gemm(const CUtensorMap* ma, const CUtensorMap* mb, const CUtensorMap* mc, int m, int n, int k) {
    __shared__ uint64_t full[STAGES], empty[STAGES];
    uint8_t* a = dynamic;
    uint8_t* b = dynamic + STAGES * BM * BK * 2;
    float* c = reinterpret_cast<float*>(dynamic + STAGES * (BM + BN) * BK * 2);
    const int tiles_n = (n + BN - 1) / BN, tiles = (m + BM - 1) / BM * tiles_n, steps = (k + BK - 1) / BK;
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) barrier_init(&full[s], 1), barrier_init(&empty[s], 1);
        barriers_ready();
    }
    __syncthreads();
    int step = 0;
    if (threadIdx.x / 32 == 4) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (elected()) {
            prefetch(ma);
            prefetch(mb);
            for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x)
                for (int i = 0; i < steps; i++, step++) {
                    int s = step % STAGES;
                    if (BUG != 6) wait(&empty[s], step / STAGES % 2 ^ 1);
                    expect(&full[s], (BM + BN) * BK * 2 - (BUG == 3 ? 32 : 0));
                    load_2d(a + s * BM * BK * 2, ma, i * BK, tile / tiles_n * BM, &full[s]);
                    load_2d(b + s * BN * BK * 2, mb, i * BK, tile % tiles_n * BN, &full[s]);
                }
        }
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float d[32];
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        for (int i = 0; i < steps; i++, step++) {
            int s = step % STAGES;
            if (BUG != 2) wait(&full[s], step / STAGES % 2);
            if (BUG != 5) wgmma_fence();
            for (int kk = 0; kk < BK / 16; kk++) {
                uint64_t da = K_MAJOR_128B | (shared(a + s * BM * BK * 2) + kk * 32) >> 4;
                uint64_t db = K_MAJOR_128B | (shared(b + s * BN * BK * 2) + kk * 32) >> 4;
                bf16_n64<1, 1, 0, 0>(d, da, db, i + kk > 0);
            }
            wgmma_commit();
            if (BUG == 4 && threadIdx.x == 0) arrive(&empty[s]);
            if (BUG == 8 || BUG == 10) { // right and wrong: one group stays in flight, the stage before it is free
                wgmma_wait<1>();
                asm volatile("bar.sync 1, 128;" ::: "memory");
                if (threadIdx.x == 0 && BUG == 10) arrive(&empty[s]);
                if (threadIdx.x == 0 && BUG == 8 && i > 0) arrive(&empty[(step + STAGES - 1) % STAGES]);
                continue;
            }
            if (BUG != 1) wgmma_wait<0>();
            if (BUG != 4) {
                asm volatile("bar.sync 1, 128;" ::: "memory");
                if (threadIdx.x == 0) arrive(&empty[s]);
            }
        }
        if (BUG == 8 || BUG == 10) {
            wgmma_wait<0>();
            asm volatile("bar.sync 1, 128;" ::: "memory");
            if (threadIdx.x == 0 && BUG == 8) arrive(&empty[(step + STAGES - 1) % STAGES]);
        }
        if (threadIdx.x == 0 && BUG != 9) store_wait_read();
        asm volatile("bar.sync 1, 128;" ::: "memory");
        for (int i = 0; i < 32; i++)
            c[(warp * 16 + lane / 4 + i / 2 % 2 * 8) * BN + i / 4 * 8 + lane % 4 * 2 + i % 2] = d[i];
        if (BUG != 7) fence_async();
        asm volatile("bar.sync 1, 128;" ::: "memory");
        if (threadIdx.x == 0) {
            store_2d(mc, tile % tiles_n * BN, tile / tiles_n * BM, c);
            store_commit();
        }
    }
    if (threadIdx.x == 0) store_wait();
}
#define GEMM(N)                                                                                                            \
    extern "C" __global__ void __launch_bounds__(160)                                                                      \
        gemm_##N(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b,                             \
                 const __grid_constant__ CUtensorMap c, int m, int n, int k) {                                             \
        gemm<N>(&a, &b, &c, m, n, k);                                                                                      \
    }
GEMM(0) GEMM(1) GEMM(2) GEMM(3) GEMM(4) GEMM(5) GEMM(6) GEMM(7) GEMM(8) GEMM(9) GEMM(10)

// ---- clusters ----

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t r;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
}
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ uint32_t map_to(uint32_t address, uint32_t rank) {
    uint32_t r;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(address), "r"(rank));
    return r;
}

extern "C" __global__ void __cluster_dims__(2, 2, 1) cluster_names(uint32_t* out) {
    uint32_t v[8];
    asm volatile("mov.u32 %0, %%cluster_ctaid.x; mov.u32 %1, %%cluster_ctaid.y; mov.u32 %2, %%cluster_nctaid.x;"
                 "mov.u32 %3, %%cluster_nctarank; mov.u32 %4, %%clusterid.x; mov.u32 %5, %%nclusterid.x;"
                 "mov.u32 %6, %%cluster_ctarank; mov.u32 %7, %%clusterid.y;"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]), "=r"(v[4]), "=r"(v[5]), "=r"(v[6]), "=r"(v[7]));
    for (int i = 0; i < 8; i++) out[(blockIdx.y * gridDim.x + blockIdx.x) * 8 + i] = v[i];
}

// Each block reads the next one's row, and all count in the first one's memory.
template <int BUG> __device__ __forceinline__ void cluster_exchange(uint32_t* out, uint32_t* count) {
    __shared__ uint32_t row[64];
    __shared__ uint32_t counter;
    uint32_t rank = cluster_rank(), size;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    row[threadIdx.x] = rank * 1000 + threadIdx.x;
    if (threadIdx.x == 0) counter = 0;
    if (BUG == 1) __syncthreads(); else cluster_sync();
    uint32_t v;
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(v) : "r"(map_to(shared(&row[threadIdx.x ^ 1]), (rank + 1) % size)) : "memory");
    asm volatile("red.shared::cluster.add.u32 [%0], 1;" ::"r"(map_to(shared(&counter), 0)) : "memory");
    if (BUG == 3) row[threadIdx.x] = 5;
    if (BUG == 2 && rank == 0) return;
    if (BUG == 2) for (int i = 0; i < 3; i++) asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(v) : "r"(map_to(shared(&row[threadIdx.x ^ 1]), (rank + 1) % size)) : "memory");
    if (BUG != 2) cluster_sync();
    out[blockIdx.x * 64 + threadIdx.x] = v;
    if (rank == 0 && threadIdx.x == 0) count[0] = counter;
}
#define EXCHANGE(N)                                                                       \
    extern "C" __global__ void cluster_exchange_##N(uint32_t* out, uint32_t* count) {     \
        cluster_exchange<N>(out, count);                                                  \
    }
EXCHANGE(0) EXCHANGE(1) EXCHANGE(2) EXCHANGE(3)

// Block 1 writes into block 0 and arrives at its barrier; block 0 waits there.
template <int BUG> __device__ __forceinline__ void cluster_arrive(uint32_t* out) {
    __shared__ uint32_t box[64];
    __shared__ uint64_t bar;
    uint32_t rank = cluster_rank();
    if (threadIdx.x == 0) {
        barrier_init(&bar, 64);
        barriers_ready();
    }
    cluster_sync();
    if (rank == 1) {
        asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(map_to(shared(&box[threadIdx.x]), 0)), "r"(threadIdx.x * 3) : "memory");
        asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(map_to(shared(&bar), 0)) : "memory");
    } else {
        if (BUG != 1)
            asm volatile("{.reg .pred p; again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1;"
                         "@!p bra again;}" ::"r"(shared(&bar)), "r"(0) : "memory");
        out[threadIdx.x] = box[threadIdx.x ^ 33];
    }
    cluster_sync();
}
extern "C" __global__ void __cluster_dims__(2, 1, 1) cluster_arrive_0(uint32_t* out) { cluster_arrive<0>(out); }
extern "C" __global__ void __cluster_dims__(2, 1, 1) cluster_arrive_1(uint32_t* out) { cluster_arrive<1>(out); }

// Block 0 fetches a box for all blocks of the cluster.
template <int BUG> __device__ __forceinline__ void multicast(const CUtensorMap* map, int bytes, uint8_t* out) {
    __shared__ uint64_t bar;
    if (threadIdx.x == 0) {
        barrier_init(&bar, 1);
        barriers_ready();
        expect(&bar, bytes);
    }
    cluster_sync();
    if (cluster_rank() == 0 && threadIdx.x == 0)
        asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
                     "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared(dynamic)), "l"(map), "r"(0), "r"(0), "r"(shared(&bar)),
                     "h"(uint16_t(0xf)) : "memory");
    if (BUG != 1) wait(&bar, 0);
    for (int i = threadIdx.x; i < bytes; i += blockDim.x) out[blockIdx.x * bytes + i] = dynamic[i] + cluster_rank();
    cluster_sync();
}
extern "C" __global__ void __cluster_dims__(4, 1, 1) multicast_0(const __grid_constant__ CUtensorMap map, int bytes, uint8_t* out) {
    multicast<0>(&map, bytes, out);
}
extern "C" __global__ void __cluster_dims__(4, 1, 1) multicast_1(const __grid_constant__ CUtensorMap map, int bytes, uint8_t* out) {
    multicast<1>(&map, bytes, out);
}

// ---- a GEMM of clusters: two blocks share a tile of B, of which each fetches half for both; two warpgroups multiply ----

template <int BUG>
__device__ __forceinline__ void gemm_pair(const CUtensorMap* ma, const CUtensorMap* mb, float* c, int m, int n, int k) {
    __shared__ uint64_t full[STAGES], empty[STAGES];
    uint8_t* a = dynamic;
    uint8_t* b = dynamic + STAGES * 2 * BM * BK * 2;
    const uint32_t rank = cluster_rank();
    const int steps = (k + BK - 1) / BK, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row = blockIdx.x * 2 * BM, column = blockIdx.y * BN;
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) barrier_init(&full[s], 1), barrier_init(&empty[s], BUG == 2 ? 2 : 4);
        barriers_ready();
    }
    cluster_sync();
    if (warp == 8) {
        if (elected())
            for (int i = 0; i < steps; i++) {
                int s = i % STAGES;
                wait(&empty[s], i / STAGES % 2 ^ 1);
                expect(&full[s], (2 * BM + BN) * BK * 2);
                load_2d(a + s * 2 * BM * BK * 2, ma, i * BK, row, &full[s]);
                asm volatile(
                    "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
                    "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared(b + s * BN * BK * 2 + rank * BN / 2 * BK * 2)),
                    "l"(mb), "r"(i * BK), "r"(int(column + rank * BN / 2)), "r"(shared(&full[s])), "h"(uint16_t(3)) : "memory");
            }
    } else {
        float d[32];
        for (int i = 0; i < steps; i++) {
            int s = i % STAGES;
            wait(&full[s], i / STAGES % 2);
            wgmma_fence();
            for (int kk = 0; kk < BK / 16; kk++)
                bf16_n64<1, 1, 0, 0>(d, K_MAJOR_128B | (shared(a + (s * 2 + warp / 4) * BM * BK * 2) + kk * 32) >> 4,
                                     K_MAJOR_128B | (shared(b + s * BN * BK * 2) + kk * 32) >> 4, i + kk > 0);
            wgmma_commit();
            wgmma_wait<0>();
            asm volatile("bar.sync %0, 128;" ::"r"(1 + warp / 4) : "memory");
            if (threadIdx.x % 128 < 2 && (BUG == 0 || BUG == 3 || threadIdx.x % 128 == rank))
                asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(
                    map_to(shared(&empty[s]), threadIdx.x % 128)) : "memory");
        }
        for (int i = 0; i < 32; i++) {
            int y = row + warp * 16 + lane / 4 + i / 2 % 2 * 8, x = column + i / 4 * 8 + lane % 4 * 2 + i % 2;
            if (y < m && x < n) c[y * n + x] = d[i];
        }
    }
    if (BUG != 3) cluster_sync();
}
#define GEMM_PAIR(N)                                                                                                        \
    extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(288)                                             \
        gemm_pair_##N(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b, float* c, int m, int n, \
                      int k) {                                                                                              \
        gemm_pair<N>(&a, &b, c, m, n, k);                                                                                   \
    }
GEMM_PAIR(0) GEMM_PAIR(1) GEMM_PAIR(2) GEMM_PAIR(3)
