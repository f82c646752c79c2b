// The instructions of version 5 (Hopper, sm_90a) as functions: PTX under nvcc; under g++ cuda_on_cpu_hopper.h does what
// the PTX manual says they do, at the worst moment it allows, so that the kernels run on a CPU too.
#pragma once

// TMA: one thread names a box of a tensor, a machine of its own copies it. The tensor is described once, on the host
// (CUtensorMap: address, sizes, strides, box), the box by the coordinates of its first element. They may lie outside,
// before 0 too: what is outside arrives as zeros, and is not written on the way back. Boxes here are 64 numbers of 16
// bits = 128 bytes wide (a "row"); the rows lie one after another in shared memory, the eight 16-byte pieces of each in
// the order of swizzle64. That pattern repeats every 1024 bytes, so tiles begin on 1024-byte boundaries.
//
// An mbarrier counts two things down: arrivals (of threads) and bytes (of TMA). When both are at 0 its phase ends and
// the next one begins, with the same number of arrivals to wait for. Phases have parity 0 and 1 by turns. barrier_wait
// returns once the phase of that parity has ended: at a new barrier, a wait for parity 1 returns at once.
//
// wgmma: 128 threads (a warpgroup) have D (64 x N, float32, in registers) += A (64 x 16) B (16 x N). A and B are read
// from shared memory, as their descriptors say, at any time before wgmma_wait returns. Warp w holds rows 16 w to
// 16 w + 15 of D; its lane l has of every 8 columns: row l / 4, columns 2 (l % 4) and + 1; row l / 4 + 8, the same.
// An operand's rows in shared memory are 64 of the numbers that are summed over, or (ACROSS) 64 numbers of M or N.
//
// TMA and wgmma are the "asynchronous proxy": what threads store they see only after each of them said fence_async().
#ifdef __CUDACC__
#include <cuda.h>
__device__ inline unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }
#else
#include "cuda_on_cpu_hopper.h"
#endif
using Barrier = uint64_t;
constexpr int ROW = 128, ATOM = 8 * ROW;  // bytes of a row, and of the 8 rows after which the pattern repeats

// Where an operand begins; how many bytes from 64 numbers of M or N to the next 64 (ACROSS only), from 8 rows to the
// next 8; and (1 in the last two bits) that its rows are 128 bytes, swizzled. Bytes count in sixteens.
__device__ inline uint64_t descriptor(const void* start, int leading = 0) {
    return (uint64_t)(shared_address(start) >> 4) | (uint64_t)(leading >> 4) << 16 | (uint64_t)(ATOM >> 4) << 32 |
           1ull << 62;
}

#ifdef __CUDACC__
__device__ inline void barrier_init(Barrier* b, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals) : "memory");
}
__device__ inline void barrier_arrive(Barrier* b) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}
__device__ inline void barrier_expect(Barrier* b, int bytes) {  // and arrive
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes)
                 : "memory");
}
__device__ inline void barrier_wait(Barrier* b, unsigned parity) {
    int ended;
    do {
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }"
                     : "=r"(ended)
                     : "r"(shared_address(b)), "r"(parity)
                     : "memory");
    } while (!ended);
}
__device__ inline void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The box of `map` that begins at coordinates (i, j, k, l). Its bytes count down `b`.
__device__ inline void tma_load(void* to, const CUtensorMap& map, Barrier* b, int i, int j, int k, int l) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
        "[%2];" ::"r"(shared_address(to)),
        "l"(&map), "r"(shared_address(b)), "r"(i), "r"(j), "r"(k), "r"(l)
        : "memory");
}
__device__ inline void tma_store(const CUtensorMap& map, const void* from, int i, int j, int k, int l) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
                 "r"(shared_address(from)), "r"(i), "r"(j), "r"(k), "r"(l)
                 : "memory");
}
// Until this thread's stores have read shared memory.
__device__ inline void tma_store_wait() {
    asm volatile("cp.async.bulk.commit_group;\n\tcp.async.bulk.wait_group.read 0;" ::: "memory");
}

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> __device__ inline void wgmma_wait() {  // until at most so many groups are under way
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Before the first wgmma and after the last wait: nvcc, which does not know that wgmma goes on after its line, shall
// neither set d later nor read it earlier.
template <int R> __device__ inline void in_registers(float (&d)[R]) {
#pragma unroll
    for (int i = 0; i < R; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define D16(i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7]), "+f"(d[i + 8]), "+f"(d[i + 9]), "+f"(d[i + 10]), "+f"(d[i + 11]), "+f"(d[i + 12]), \
        "+f"(d[i + 13]), "+f"(d[i + 14]), "+f"(d[i + 15])
#define TO_31 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
    "%23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TO_63 \
    TO_31 \
        ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, " \
        "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TO_79 TO_63 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define TO_95 TO_79 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA(T, NAME, R, N, LIST, A, B, TA, TB, ...) \
    template <bool A_ACROSS, bool B_ACROSS> __device__ inline void wgmma(T, float (&d)[R], uint64_t a, uint64_t b) { \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" N "k16.f32." NAME "." NAME " {" LIST "}, " A ", " B \
                     ", 1, 1, 1, " TA ", " TB ";" \
                     : __VA_ARGS__ \
                     : "l"(a), "l"(b), "n"(A_ACROSS), "n"(B_ACROSS)); \
    }
#define WGMMAS(T, NAME) /* R = N / 2 registers */ \
    WGMMA(T, NAME, 32, "64", TO_31, "%32", "%33", "%34", "%35", D16(0), D16(16)) \
    WGMMA(T, NAME, 64, "128", TO_63, "%64", "%65", "%66", "%67", D16(0), D16(16), D16(32), D16(48)) \
    WGMMA(T, NAME, 80, "160", TO_79, "%80", "%81", "%82", "%83", D16(0), D16(16), D16(32), D16(48), D16(64)) \
    WGMMA(T, NAME, 96, "192", TO_95, "%96", "%97", "%98", "%99", D16(0), D16(16), D16(32), D16(48), D16(64), D16(80))
WGMMAS(__nv_bfloat16, "bf16")
WGMMAS(__half, "f16")

// ldmatrix<true> in the other direction: lane l gives the address of row l % 8 of matrix l / 8, and holds of each
// matrix column l / 4, rows 2 (l % 4) and + 1.
__device__ inline void stmatrix_transposed(void* row, const unsigned (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}

// Registers move from the warpgroup that only copies to those that hold D.
template <int COUNT> __device__ inline void fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT> __device__ inline void more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
// __syncthreads for one warpgroup; `name` is the hardware barrier it takes, 1 to 15.
__device__ inline void sync_warpgroup(int name) { asm volatile("bar.sync %0, 128;" ::"r"(name) : "memory"); }

// Describes a tensor of four axes for TMA: sizes, strides of the last three and the box in elements. The driver encodes
// it; its function is looked up, so that nothing links to libcuda. Returns nullptr or what went wrong.
template <class T>
static const char* describe(CUtensorMap* map, const void* base, const long long (&size)[4], const long long (&step)[3],
                            const int (&box)[4]) {
    static void* found = nullptr;
    cudaDriverEntryPointQueryResult how = cudaDriverEntryPointSuccess;
    if (!found) cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &how);
    if (!found) return "the driver has no cuTensorMapEncodeTiled";
    const cuuint64_t sizes[4] = {(cuuint64_t)size[0], (cuuint64_t)size[1], (cuuint64_t)size[2], (cuuint64_t)size[3]};
    const cuuint64_t bytes[3] = {2ull * step[0], 2ull * step[1], 2ull * step[2]};
    const cuuint32_t boxes[4] = {(cuuint32_t)box[0], (cuuint32_t)box[1], (cuuint32_t)box[2], (cuuint32_t)box[3]};
    const cuuint32_t every[4] = {1, 1, 1, 1};
    const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found)(
        map, std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4,
        const_cast<void*>(base), sizes, bytes, boxes, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? nullptr : "the driver cannot describe a tensor to TMA";
}
#endif
