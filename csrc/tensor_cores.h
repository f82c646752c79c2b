// The four instructions of the tensor-core rung as functions: PTX under nvcc; under g++ what the PTX manual says they
// do (its lane maps of ldmatrix and mma.m16n8k16), so that the kernels run on a CPU too. And two for its gates.
#pragma once

// ldmatrix x4: four 8 x 8 matrices of 16-bit numbers. Lane l gives the address of row l % 8 of matrix l / 8, 16 bytes
// on a 16-byte boundary, and receives of each matrix row l / 4, columns 2 (l % 4) and + 1; of the transposed matrix
// where TRANSPOSED.
// mma: D (16 x 8, float32) += A (16 x 16) B (16 x 8). Lane l holds, as pairs of neighbours along the 16,
//   A  rows l / 4 and + 8 at 2 (l % 4), then both at 8 + 2 (l % 4);   B  column l / 4 at 2 (l % 4), then 8 + 2 (l % 4);
//   D  row l / 4, columns 2 (l % 4) and + 1; row l / 4 + 8, the same columns.
// copy_async: BYTES (4, 8 or 16, aligned as many) from global to shared memory, zeros behind `valid`; it arrives some
// time before wait_for_copies returns, and is seen by the other threads after the next barrier.
// exp2_fast, reciprocal: one instruction each, relative error 2^-22 (2^-23); of inf, 0.
#ifdef __CUDACC__
__device__ inline float exp2_fast(float v) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
    return result;
}
__device__ inline float reciprocal(float v) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
    return result;
}
template <bool TRANSPOSED> __device__ inline void ldmatrix(unsigned (&r)[4], const void* row) {
#if __CUDA_ARCH__ >= 800
    const unsigned address = (unsigned)__cvta_generic_to_shared(row);
    if (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address)
                     : "memory");
#else
    __trap();
#endif
}
#if __CUDA_ARCH__ >= 800
#define MMA(TYPE, d, a, b0, b1) \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
#else
#define MMA(TYPE, d, a, b0, b1) __trap()
#endif
__device__ inline void mma(__nv_bfloat16, float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    MMA("bf16", d, a, b0, b1);
}
__device__ inline void mma(__half, float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    MMA("f16", d, a, b0, b1);
}
template <int BYTES> __device__ inline void copy_async(void* to, const void* from, int valid) {
#if __CUDA_ARCH__ >= 800
    const unsigned address = (unsigned)__cvta_generic_to_shared(to);
    if (BYTES == 16)  // .cg passes the first-level cache by
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(valid) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from), "n"(BYTES), "r"(valid)
                     : "memory");
#else
    __trap();
#endif
}
__device__ inline void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#else
    __trap();
#endif
}
#else
inline float exp2_fast(float v) { return exp2f(v); }
inline float reciprocal(float v) { return 1 / v; }

template <bool TRANSPOSED> inline void ldmatrix(unsigned (&r)[4], const void* row) {
    if ((uintptr_t)row % 16) cuda_on_cpu::fail("ldmatrix needs rows on 16-byte boundaries");
    const unsigned lane = threadIdx.x % 32;
    cuda_on_cpu::show(row, __LINE__);
    for (unsigned m = 0; m < 4; ++m) {
        uint16_t pair[2];
        for (unsigned e = 0; e < 2; ++e) {
            const unsigned i = lane / 4, j = lane % 4 * 2 + e;
            const auto rows = [m](unsigned r) { return cuda_on_cpu::shown_by<const uint16_t*>(8 * m + r); };
            pair[e] = TRANSPOSED ? rows(j)[i] : rows(i)[j];
        }
        r[m] = pair[0] | (unsigned)pair[1] << 16;
    }
}

inline float number(__nv_bfloat16, uint16_t bits) { return __bfloat162float({bits}); }
inline float number(__half, uint16_t bits) {
    __half v;
    memcpy(&v, &bits, 2);
    return __half2float(v);
}
template <class T> void mma(T type, float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    struct Fragments {
        unsigned a[4], b[2];
    };
    const unsigned lane = threadIdx.x % 32;
    cuda_on_cpu::show(Fragments{{a[0], a[1], a[2], a[3]}, {b0, b1}}, __LINE__);
    float rows[2][16], columns[2][16];  // of A and B, that this lane's four elements of D are made of
    for (unsigned i = 0; i < 4; ++i) {
        const Fragments of_row = cuda_on_cpu::shown_by<Fragments>(lane / 4 * 4 + i);
        for (unsigned j = 0; j < 8; ++j)  // row j / 2 % 2, its first or second 8, one of a pair
            rows[j / 2 % 2][j / 4 * 8 + 2 * i + j % 2] = number(type, (uint16_t)(of_row.a[j / 2] >> j % 2 * 16));
        for (unsigned j = 0; j < 8; ++j) {
            const Fragments of_column = cuda_on_cpu::shown_by<Fragments>((lane % 4 * 2 + j / 4) * 4 + i);
            columns[j / 4][j / 2 % 2 * 8 + 2 * i + j % 2] =
                number(type, (uint16_t)(of_column.b[j / 2 % 2] >> j % 2 * 16));
        }
    }
    for (int e = 0; e < 4; ++e)
        for (int k = 0; k < 16; ++k) d[e] += rows[e / 2][k] * columns[e % 2][k];
}

template <int BYTES> inline void copy_async(void* to, const void* from, int valid) {
    if ((uintptr_t)to % BYTES || (uintptr_t)from % BYTES) cuda_on_cpu::fail("cp.async off its alignment");
    if (valid < 0 || valid > BYTES) cuda_on_cpu::fail("cp.async of an impossible size");
    memset(to, 0xFF, BYTES);  // NaN until it arrives
    cuda_on_cpu::begin_copy(to, from, BYTES, valid);
}
inline void wait_for_copies() {
    cuda_on_cpu::Copy copy;
    while (cuda_on_cpu::take_copy(copy)) {
        memcpy(copy.to, copy.from, copy.valid);
        memset(copy.to + copy.valid, 0, copy.bytes - copy.valid);
    }
}
#endif
