// The fused operator of the ConditionTCN (Fig. 1C, Eq. 8): causal dilated convolution + bias + conditioning + gate.
//
//     a[b, o, t] = bias[o] + cond[b, o, t] + sum_{i, k} w[o, i, k] * x[b, i, t - (K - 1 - k) * d]     (x = 0 if t < 0)
//     y[b, c, t] = tanh(a[b, c, t]) * sigmoid(a[b, H + c, t])
//
//     x (B, C, T)   w (2H, C, K)   bias (2H)   cond (B, 2H, T)   h = a as stored (B, 2H, T)   y (B, H, T)   d dilation
//
// The file is a ladder; every rung computes the same numbers and can be selected:
//   version 1  naive: one thread per output, everything from global memory                   any dtype
//   version 2  tiled: 64 rows x 64 times per block through shared memory, 32 sums a thread   any dtype, the default
//   version 3  the same tile on tensor cores (ldmatrix, mma.sync), channels last in shared   bfloat16, sm_80 and later
// Backward keeps h, recomputes the gate in float32 (float64 for float64) and needs three more kernels: dx is the
// forward tile with taps flipped and weights transposed, dw a tile over (rows, channels) split over batch and time,
// dbias a sum.
// No float atomics and no flags between blocks: every sum has one fixed order, so results are the same bit for bit.
//
// Nothing here knows PyTorch (gated_conv.cpp does). nvcc compiles this file for a GPU; g++ compiles the same text
// through cuda_on_cpu.h and runs it thread by thread, which is how the tests prove it without a GPU.
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define SHARED(type, name) \
    extern __shared__ __align__(16) unsigned char shared_bytes[]; \
    type* const name = reinterpret_cast<type*>(shared_bytes)
#define LAUNCH(kernel, grid, block, bytes, stream, ...) \
    do { \
        kernel<<<grid, block, bytes, (cudaStream_t)(stream)>>>(__VA_ARGS__); \
        if (const cudaError_t error = cudaGetLastError()) return cudaGetErrorString(error); \
    } while (0)
#else
#include "cuda_on_cpu.h"
#endif
#include <type_traits>
#include "gated_conv.h"

// ---- Storage and arithmetic types -----------------------------------------------------------------------------------
// Memory holds T; sums, tanh and exp are done in Sum<T>: float32, or float64 for float64.
template <class T> struct SumOf {
    using type = float;
};
template <> struct SumOf<double> {
    using type = double;
};
template <class T> using Sum = typename SumOf<T>::type;

__device__ inline float load(float v) { return v; }
__device__ inline double load(double v) { return v; }
__device__ inline float load(__half v) { return __half2float(v); }
__device__ inline float load(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline void store(float* p, float v) { *p = v; }
__device__ inline void store(double* p, double v) { *p = v; }
__device__ inline void store(__half* p, float v) { *p = __float2half_rn(v); }
__device__ inline void store(__nv_bfloat16* p, float v) { *p = __float2bfloat16_rn(v); }

__device__ inline float tanh_(float a) { return tanhf(a); }
__device__ inline double tanh_(double a) { return tanh(a); }
// exp may overflow to inf: 1 / inf = 0 is right.
__device__ inline float sigmoid(float a) { return 1.0f / (1.0f + expf(-a)); }
__device__ inline double sigmoid(double a) { return 1.0 / (1.0 + exp(-a)); }

__host__ __device__ constexpr long long ceil_div(long long a, long long b) { return (a + b - 1) / b; }

// ---- The gate's gradient, shared by all versions --------------------------------------------------------------------
// One thread: one (b, c, t), both halves of dh. Grid: x = batch item * blocks of 256 over (c, t).
// Global per thread: reads h twice and dy once, writes dh twice: 5 values for about 30 operations, memory-bound.
// dh is also dcond.
//     y = p s, p = tanh(a), s = sigmoid(g):   dy/da = s (1 - p^2)   dy/dg = p s (1 - s)
template <class T> __global__ void gate_backward(Layer n, const T* dy, const T* h, T* dh) {
    const long long plane = (long long)n.H * n.T;
    const int blocks = (int)ceil_div(plane, 256);
    const long long b = blockIdx.x / blocks, i = (long long)(blockIdx.x % blocks) * 256 + threadIdx.x;
    if (i >= plane) return;
    const long long at = 2 * b * plane + i;
    const auto p = tanh_(load(h[at])), s = sigmoid(load(h[at + plane])), g = load(dy[b * plane + i]);
    store(&dh[at], g * s * (1 - p * p));
    store(&dh[at + plane], g * p * s * (1 - s));
}

// ==== Version 1: naive ===============================================================================================
// Each kernel is its formula: one thread per output, a loop over the sum, no sharing between threads.

// One thread: one y[b, c, t] and the two a it is made of. Grid: x = blocks of 128 over (b, c, t), t fastest.
// Global reads per y: C K of x, 2 C K of w, 2 cond; writes 1 y + 2 h. Shared: none.
// Intensity without caches: 4 C K flop over 12 C K bytes = 1/3 flop per byte (float32): a GPU offers 10 or more.
template <class T>
__global__ void forward_v1(Layer n, const T* x, const T* w, const T* bias, const T* cond, T* y, T* h) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (long long)n.B * n.H * n.T) return;
    const int t = (int)(i % n.T), c = (int)(i / n.T % n.H);
    const long long b = i / n.T / n.H;
    Sum<T> a[2];
    for (int half = 0; half < 2; ++half) {
        const long long o = c + half * n.H;
        a[half] = bias ? load(bias[o]) : Sum<T>(0);
        if (cond) a[half] += load(cond[b * n.cond_batch + o * n.T + t]);
    }
    for (int ci = 0; ci < n.C; ++ci) {
        for (int k = 0; k < n.K; ++k) {
            const int from = t - (n.K - 1 - k) * n.dilation;
            const Sum<T> v = from >= 0 ? load(x[b * n.x_batch + (long long)ci * n.T + from]) : Sum<T>(0);
            a[0] += load(w[((long long)c * n.C + ci) * n.K + k]) * v;
            a[1] += load(w[((long long)(n.H + c) * n.C + ci) * n.K + k]) * v;
        }
    }
    store(&y[i], tanh_(a[0]) * sigmoid(a[1]));
    if (h) {
        store(&h[(b * 2 * n.H + c) * n.T + t], a[0]);
        store(&h[(b * 2 * n.H + n.H + c) * n.T + t], a[1]);
    }
}

// One thread: one dx[b, ci, t] = sum_{o, k} w[o, ci, k] * dh[b, o, t + (K - 1 - k) d]. Grid as above over (b, ci, t).
// Global reads per dx: 2 * 2H K; 1/4 flop per byte.
template <class T> __global__ void dx_v1(Layer n, const T* dh, const T* w, T* dx) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (long long)n.B * n.C * n.T) return;
    const int t = (int)(i % n.T), ci = (int)(i / n.T % n.C);
    const long long b = i / n.T / n.C;
    Sum<T> sum = 0;
    for (int o = 0; o < 2 * n.H; ++o) {
        for (int k = 0; k < n.K; ++k) {
            const int to = t + (n.K - 1 - k) * n.dilation;
            if (to < n.T) sum += load(w[((long long)o * n.C + ci) * n.K + k]) * load(dh[(b * 2 * n.H + o) * n.T + to]);
        }
    }
    store(&dx[i], sum);
}

// One thread: one dw[o, ci, k] = sum_{b, t} dh[b, o, t] * x[b, ci, t - (K - 1 - k) d]. Grid: x = blocks of 128 over w.
// Global reads per dw: 2 B T; 1/4 flop per byte, and only 2H C K threads however long the sum is.
template <class T> __global__ void dw_v1(Layer n, const T* dh, const T* x, T* dw) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= 2LL * n.H * n.C * n.K) return;
    const int shift = (n.K - 1 - (int)(i % n.K)) * n.dilation, ci = (int)(i / n.K % n.C), o = (int)(i / n.K / n.C);
    Sum<T> sum = 0;
    for (long long b = 0; b < n.B; ++b) {
        for (int t = shift; t < n.T; ++t) {
            sum += load(dh[(b * 2 * n.H + o) * n.T + t]) * load(x[b * n.x_batch + (long long)ci * n.T + t - shift]);
        }
    }
    store(&dw[i], sum);
}

// One thread: one dbias[o] = sum_{b, t} dh[b, o, t]; B T reads, neighbours T apart (uncoalesced).
template <class T> __global__ void dbias_v1(Layer n, const T* dh, T* dbias) {
    const int o = blockIdx.x * blockDim.x + threadIdx.x;
    if (o >= 2 * n.H) return;
    Sum<T> sum = 0;
    for (long long b = 0; b < n.B; ++b) {
        for (int t = 0; t < n.T; ++t) sum += load(dh[(b * 2 * n.H + o) * n.T + t]);
    }
    store(&dbias[o], sum);
}

// ==== Version 2: tiled in shared memory ==============================================================================
// A block of 128 threads owns 64 rows x 64 times. Forward's rows are 32 channels c and their 32 gates H + c, held by
// the same thread, so the gate never leaves registers. A thread owns 4 + 4 rows x 4 times = 32 sums. Four blocks an SM
// leave 128 registers a thread; left to itself, ptxas aims at 72 on sm_120 and spills.
constexpr int THREADS = 128, ROWS = 64, HALF = 32, TIMES = 64, DEPTH = 8;
template <class T> constexpr int BLOCKS = sizeof(T) == 8 ? 2 : 4;  // on an SM: 128 registers a thread, float64 255
constexpr int STRIDE = ROWS + 4;  // padded: the 32 lanes of a weight store then hit 32 different banks
template <class A> struct alignas(16) Four {  // read from shared memory at once: 16 bytes in float32
    A v[4];
};

// Columns of the input tile: the TIMES outputs and the halo of K - 1 taps; one load serves all taps. Taps more than a
// tile apart do not overlap: each then has its own TIMES columns, so shared memory stays bounded for any dilation.
__host__ __device__ inline int tap_step(const Layer& n) { return n.dilation < TIMES ? n.dilation : TIMES; }
__host__ __device__ inline int tile_columns(const Layer& n) { return TIMES + (n.K - 1) * tap_step(n); }

// The input time of a tile's column: forward looks back from the outputs, dx (whose taps are flipped) looks ahead.
template <bool FORWARD> __device__ inline int column_time(const Layer& n, int t0, int column) {
    const int window = n.dilation > TIMES ? column / TIMES : 0;
    return t0 + column + window * (n.dilation - TIMES) - (FORWARD ? (n.K - 1) * n.dilation : 0);
}

// The 64 rows of a block: 32 from `low` and 32 from `high` (-1 where the tile sticks out).
// Forward: channels and their gates. dx: 64 input channels.
template <bool FORWARD> struct Rows {
    int low, high, low_end, high_end;
    __device__ Rows(const Layer& n, int tile)
        : low(FORWARD ? tile * HALF : tile * ROWS), high(FORWARD ? n.H + low : low + HALF),
          low_end(FORWARD ? n.H : n.C), high_end(FORWARD ? 2 * n.H : n.C) {}
    __device__ int operator[](int r) const {
        const int row = r < HALF ? low + r : high + r - HALF;
        return row < (r < HALF ? low_end : high_end) ? row : -1;
    }
};

// Where a sum starts: forward's at bias + conditioning, which makes adding them free.
template <bool FORWARD, class T>
__device__ inline Sum<T> start_sum(const Layer& n, const T* bias, const T* cond, long long b, long long o, int t) {
    Sum<T> sum = 0;
    if (!FORWARD || o < 0 || t >= n.T) return sum;
    if (bias) sum = load(bias[o]);
    if (cond) sum += load(cond[b * n.cond_batch + o * n.T + t]);
    return sum;
}

// Where two finished sums go: forward's are a value and its gate, dx's two input channels.
template <bool FORWARD, class T>
__device__ inline void finish(const Layer& n, long long b, long long low, long long high, int t, Sum<T> a, Sum<T> g,
                              T* out, T* h) {
    if (t >= n.T) return;
    if (FORWARD) {
        if (low < 0) return;
        store(&out[(b * n.H + low) * n.T + t], tanh_(a) * sigmoid(g));
        if (h) store(&h[(b * 2 * n.H + low) * n.T + t], a);
        if (h) store(&h[(b * 2 * n.H + high) * n.T + t], g);
    } else {
        if (low >= 0) store(&out[(b * n.C + low) * n.T + t], a);
        if (high >= 0) store(&out[(b * n.C + high) * n.T + t], g);
    }
}

// FORWARD: y and h from x.  Otherwise: dx from dh (in = dh, out = dx; bias, cond, h unused).
// One thread: rows 4 ty .. 4 ty + 3 of both halves x times tx, tx + 16, tx + 32, tx + 48 (neighbours read neighbours).
// Grid: x = batch item * time tiles (2^31 blocks), y = row tiles of 32 pairs (forward) or 64 channels (dx).
// Global reads per y: C (64 + (K - 1) d) / 2048 of x, C K / 32 of w, 2 cond; writes 1 y + 2 h.
// Shared per (channel, tap): a thread reads 4 x + 8 w for 32 multiply-adds (0.75 C K reads per y); each value is
// written once.
// Intensity at C = H = 256, K = 3, d = 1, float32: 3072 flop per y over 149 bytes = 21 flop per byte from L2, 124 from
// DRAM.
template <class T, bool FORWARD> __global__ void __launch_bounds__(THREADS, BLOCKS<T>)
    conv_v2(Layer n, const T* in, const T* w, const T* bias, const T* cond, T* out, T* h) {
    using A = Sum<T>;
    const int columns = tile_columns(n), step = tap_step(n), depth = FORWARD ? n.C : 2 * n.H;
    SHARED(A, ws);                            // weights (K, DEPTH, STRIDE)
    A* const xs = ws + n.K * DEPTH * STRIDE;  // input   (DEPTH, columns)
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, tx = tid % 16, ty = tid / 16;
    const int tiles = (int)ceil_div(n.T, TIMES), t0 = (int)(blockIdx.x % tiles) * TIMES;
    const long long b = blockIdx.x / tiles;
    const Rows<FORWARD> rows(n, blockIdx.y);
    const T* const in_b = in + b * (FORWARD ? n.x_batch : 2LL * n.H * n.T);

    A sum[2][4][4];  // (half, row, time)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                sum[half][r][j] =
                    start_sum<FORWARD>(n, bias, cond, b, rows[half * HALF + 4 * ty + r], t0 + tx + 16 * j);
            }
        }
    }
    for (int d0 = 0; d0 < depth; d0 += DEPTH) {
        for (int p = tid; p < ROWS * DEPTH; p += THREADS) {  // the K taps of a (row, channel) are neighbours
            const int r = FORWARD ? p / DEPTH : p % ROWS, i = FORWARD ? p % DEPTH : p / ROWS;
            const bool inside = rows[r] >= 0 && d0 + i < depth;
            const T* const taps =
                w + (FORWARD ? (long long)rows[r] * n.C + d0 + i : (long long)(d0 + i) * n.C + rows[r]) * n.K;
            for (int k = 0; k < n.K; ++k) {
                ws[((FORWARD ? k : n.K - 1 - k) * DEPTH + i) * STRIDE + r] = inside ? load(taps[k]) : A(0);
            }
        }
        for (int i = warp; i < DEPTH; i += THREADS / 32) {
            for (int column = lane; column < columns; column += 32) {
                const int t = column_time<FORWARD>(n, t0, column);
                const bool inside = d0 + i < depth && t >= 0 && t < n.T;
                xs[i * columns + column] = inside ? load(in_b[(long long)(d0 + i) * n.T + t]) : A(0);
            }
        }
        __syncthreads();  // the tile is complete before anyone reads it
        for (int k = 0; k < n.K; ++k) {
            const A* const x_tap = xs + k * step + tx;
            const A* const w_tap = ws + k * DEPTH * STRIDE + 4 * ty;
#pragma unroll
            for (int i = 0; i < DEPTH; ++i) {
                const Four<A> low = *reinterpret_cast<const Four<A>*>(w_tap + i * STRIDE);
                const Four<A> high = *reinterpret_cast<const Four<A>*>(w_tap + i * STRIDE + HALF);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const A v = x_tap[i * columns + 16 * j];
#pragma unroll
                    for (int r = 0; r < 4; ++r) {
                        sum[0][r][j] += low.v[r] * v;
                        sum[1][r][j] += high.v[r] * v;
                    }
                }
            }
        }
        __syncthreads();  // everyone has read it before it is overwritten
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            finish<FORWARD>(n, b, rows[4 * ty + r], rows[HALF + 4 * ty + r], t0 + tx + 16 * j, sum[0][r][j],
                            sum[1][r][j], out, h);
        }
    }
}

// The sum over batch and time of dw is split into `splits` equal runs of chunks of `depth` times, so that a few hundred
// blocks share it. Their number depends on the shape alone: the same bits on every GPU.
constexpr int DW_DEPTH = 16;
#ifndef DW_BLOCKS
#define DW_BLOCKS 512  // tests take fewer, so that small shapes have long splits too
#endif
inline long long dw_tiles(const Layer& n) { return ceil_div(2LL * n.H, ROWS) * ceil_div(n.C, ROWS) * n.K; }
inline int dw_splits(const Layer& n, int depth) {
    const long long chunks = n.B * ceil_div(n.T, depth), wanted = ceil_div(DW_BLOCKS, dw_tiles(n) ? dw_tiles(n) : 1);
    return (int)(chunks < 1 ? 1 : chunks < wanted ? chunks : wanted);
}

// The tile of dw a block owns: rows o0 .., input channels c0 .., tap k. blockIdx.x = (row tile * channel tiles +
// channel tile) * K + k.
struct DwTile {
    int k, c0, o0;
    __device__ DwTile(const Layer& n) {
        const int tiles = (int)ceil_div(n.C, ROWS);
        k = blockIdx.x % n.K;
        c0 = (int)(blockIdx.x / n.K % tiles) * ROWS;
        o0 = (int)(blockIdx.x / n.K / tiles) * ROWS;
    }
};

// One thread: 8 rows x 4 channels of one tap's dw, summed over its split of (b, t), into partial (splits, K, 2H, C).
// Grid: x = tiles of dw, y = splits. Shared per time: a thread reads 8 dh + 4 x for 32 multiply-adds.
// Global reads per block and time: 64 of dh and 64 of x for 4096 multiply-adds: 16 flop per byte (float32).
template <class T> __global__ void __launch_bounds__(THREADS, BLOCKS<T>)
    dw_v2(Layer n, int splits, const T* dh, const T* x, Sum<T>* partial) {
    using A = Sum<T>;
    SHARED(A, gs);                         // dh (DW_DEPTH, STRIDE), channels fastest
    A* const xs = gs + DW_DEPTH * STRIDE;  // x  (DW_DEPTH, STRIDE), shifted by this block's tap
    const DwTile tile(n);
    const int tid = threadIdx.x, tx = tid % 16, ty = tid / 16, shift = (n.K - 1 - tile.k) * n.dilation;
    const int per_item = (int)ceil_div(n.T, DW_DEPTH);
    const long long chunks = (long long)n.B * per_item;
    A sum[8][4] = {};
    for (long long q = chunks * blockIdx.y / splits; q < chunks * (blockIdx.y + 1) / splits; ++q) {
        const long long b = q / per_item;
        const int t0 = (int)(q % per_item) * DW_DEPTH;
        for (int p = tid; p < ROWS * DW_DEPTH; p += THREADS) {  // a warp reads 4 channels x 8 times and hits 32 banks
            const int j = p % 8 + p / (8 * ROWS) * 8, r = p / 8 % ROWS, t = t0 + j, o = tile.o0 + r, ci = tile.c0 + r;
            gs[j * STRIDE + r] = o < 2 * n.H && t < n.T ? load(dh[(b * 2 * n.H + o) * n.T + t]) : A(0);
            const bool inside = ci < n.C && t < n.T && t >= shift;
            xs[j * STRIDE + r] = inside ? load(x[b * n.x_batch + (long long)ci * n.T + t - shift]) : A(0);
        }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < DW_DEPTH; ++j) {
            const Four<A> g0 = *reinterpret_cast<const Four<A>*>(gs + j * STRIDE + 8 * ty);
            const Four<A> g1 = *reinterpret_cast<const Four<A>*>(gs + j * STRIDE + 8 * ty + 4);
            const Four<A> v = *reinterpret_cast<const Four<A>*>(xs + j * STRIDE + 4 * tx);
#pragma unroll
            for (int r = 0; r < 4; ++r) {
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    sum[r][c] += g0.v[r] * v.v[c];
                    sum[4 + r][c] += g1.v[r] * v.v[c];
                }
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < 8; ++r) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const int o = tile.o0 + 8 * ty + r, ci = tile.c0 + 4 * tx + c;
            if (o >= 2 * n.H || ci >= n.C) continue;
            partial[(((long long)blockIdx.y * n.K + tile.k) * 2 * n.H + o) * n.C + ci] = sum[r][c];
        }
    }
}

// One thread: one dw[o, ci, k], the sum of its `splits` partial sums in their order. Grid: x = blocks of 128
// over (k, o, ci).
template <class T> __global__ void dw_sum(Layer n, int splits, const Sum<T>* partial, T* dw) {
    const long long size = 2LL * n.H * n.C * n.K, i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= size) return;
    Sum<T> sum = 0;
    for (int s = 0; s < splits; ++s) sum += partial[s * size + i];
    const long long plane = 2LL * n.H * n.C;
    store(&dw[i % plane * n.K + i / plane], sum);  // (K, 2H, C) -> (2H, C, K)
}

// One block: one dbias[o]. Warps take batch items in turn, lanes take times; then 32 lanes fold by shuffles, 4 warps
// through shared memory. Grid: x = 2H. Global reads per dbias: B T, neighbours adjacent. 1/4 flop per byte.
template <class T> __global__ void dbias_v2(Layer n, const T* dh, T* dbias) {
    using A = Sum<T>;
    SHARED(A, warps);  // (4)
    const int o = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    A sum = 0;
    for (long long b = warp; b < n.B; b += THREADS / 32) {
        for (int t = lane; t < n.T; t += 32) sum += load(dh[(b * 2 * n.H + o) * n.T + t]);
    }
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_down_sync(0xffffffffu, sum, distance);
    if (lane == 0) warps[warp] = sum;
    __syncthreads();
    if (threadIdx.x == 0) store(&dbias[o], warps[0] + warps[1] + warps[2] + warps[3]);
}

// ==== Version 3: tensor cores ========================================================================================
// The tile of version 2, but the multiply-adds of a warp are mma.sync: D (16 rows x 8 times) += A (16 x 16) B (16 x 8),
// bfloat16 products summed in float32. ldmatrix fills A and B from shared memory, 8 rows of 16 bytes at a time, each on
// a 16-byte boundary. In (channels, times) a tap shifts by d elements and breaks that; in (times, channels), channels
// last, it shifts by whole rows. So the input is transposed on its way into shared memory, and all taps read the same
// tile. Lane l holds of A rows l / 4 and l / 4 + 8, of B time l / 4, of D rows l / 4 and l / 4 + 8 at times 2 (l % 4)
// and + 1.
using bf16 = __nv_bfloat16;
constexpr int DEPTH3 = 32;
constexpr int STRIDE3 = DEPTH3 + 8;  // 80 bytes: the 8 rows of an ldmatrix fall on 8 different groups of 4 banks

#ifdef __CUDACC__
// Four 8 x 8 matrices; lane l gives the address of row l % 8 of matrix l / 8 and receives its two elements of each.
__device__ inline void ldmatrix_x4(unsigned (&r)[4], const bf16* row) {
#if __CUDA_ARCH__ >= 800
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((unsigned)__cvta_generic_to_shared(row))
                 : "memory");
#else
    __trap();
#endif
}
__device__ inline void mma_bf16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    __trap();
#endif
}
#endif

// The element of `tile` (rows of STRIDE3) whose address this lane owes ldmatrix: for A, 16 rows x 16 depths from (row,
// depth); for B, 16 times x 16 depths, which are two B's side by side.
__device__ inline const bf16* address_a(const bf16* tile, int row, int depth, int lane) {
    return tile + (row + lane % 16) * STRIDE3 + depth + lane / 16 * 8;
}
__device__ inline const bf16* address_b(const bf16* tile, int row, int depth, int lane) {
    return tile + (row + lane % 8 + lane / 16 * 8) * STRIDE3 + depth + lane / 8 % 2 * 8;
}

// As conv_v2. A warp: 16 + 16 rows x 32 times, 32 sums a lane; warps 0, 1 the first 16 pairs, 2, 3 the others. Same
// grid.
// Shared per 16 channels and tap: a warp reads 2 A and 2 double B's (4 ldmatrix) for 8 mma of 4096 flop.
// Intensity as version 2's with 2-byte elements: 42 flop per byte from L2 at C = H = 256, K = 3.
template <bool FORWARD> __global__ void __launch_bounds__(THREADS, 4)
    conv_v3(Layer n, const bf16* in, const bf16* w, const bf16* bias, const bf16* cond, bf16* out, bf16* h) {
    const int columns = tile_columns(n), step = tap_step(n), depth = FORWARD ? n.C : 2 * n.H;
    SHARED(bf16, ws);                            // weights (K, ROWS, STRIDE3)
    bf16* const xs = ws + n.K * ROWS * STRIDE3;  // input   (columns, STRIDE3)
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, row0 = warp / 2 * 16, time0 = warp % 2 * 32;
    const int tiles = (int)ceil_div(n.T, TIMES), t0 = (int)(blockIdx.x % tiles) * TIMES;
    const long long b = blockIdx.x / tiles;
    const Rows<FORWARD> rows(n, blockIdx.y);
    const bf16* const in_b = in + b * (FORWARD ? n.x_batch : 2LL * n.H * n.T);
    const bf16 zero = __float2bfloat16_rn(0);

    float sum[2][4][4];  // (half, 8 times, element of D)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int r = half * HALF + row0 + lane / 4 + e / 2 * 8, t = t0 + time0 + 8 * j + lane % 4 * 2 + e % 2;
                sum[half][j][e] = start_sum<FORWARD>(n, bias, cond, b, rows[r], t);
            }
        }
    }
    for (int d0 = 0; d0 < depth; d0 += DEPTH3) {
        for (int p = tid; p < ROWS * DEPTH3; p += THREADS) {
            const int r = FORWARD ? p / DEPTH3 : p % ROWS, i = FORWARD ? p % DEPTH3 : p / ROWS;
            const bool inside = rows[r] >= 0 && d0 + i < depth;
            const bf16* const taps =
                w + (FORWARD ? (long long)rows[r] * n.C + d0 + i : (long long)(d0 + i) * n.C + rows[r]) * n.K;
            for (int k = 0; k < n.K; ++k)
                ws[((FORWARD ? k : n.K - 1 - k) * ROWS + r) * STRIDE3 + i] = inside ? taps[k] : zero;
        }
        for (int column = lane % 8; column < columns;
             column += 8) {  // a warp: 8 columns x 4 pairs of channels, 32 banks
            const int i = 8 * warp + lane / 8 * 2, t = column_time<FORWARD>(n, t0, column);
            const bf16* const from = in_b + (long long)(d0 + i) * n.T + t;
            const bool inside = t >= 0 && t < n.T;
            __nv_bfloat162 pair;
            pair.x = inside && d0 + i < depth ? from[0] : zero;
            pair.y = inside && d0 + i + 1 < depth ? from[n.T] : zero;
            *reinterpret_cast<__nv_bfloat162*>(xs + column * STRIDE3 + i) = pair;
        }
        __syncthreads();
        for (int k = 0; k < n.K; ++k) {
#pragma unroll
            for (int i = 0; i < DEPTH3; i += 16) {
                unsigned low[4], high[4], times[4];
                ldmatrix_x4(low, address_a(ws + k * ROWS * STRIDE3, row0, i, lane));
                ldmatrix_x4(high, address_a(ws + k * ROWS * STRIDE3, HALF + row0, i, lane));
#pragma unroll
                for (int j = 0; j < 4; j += 2) {
                    ldmatrix_x4(times, address_b(xs, k * step + time0 + 8 * j, i, lane));
                    mma_bf16(sum[0][j], low, times[0], times[1]);
                    mma_bf16(sum[1][j], high, times[0], times[1]);
                    mma_bf16(sum[0][j + 1], low, times[2], times[3]);
                    mma_bf16(sum[1][j + 1], high, times[2], times[3]);
                }
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int r = row0 + lane / 4 + e / 2 * 8, t = t0 + time0 + 8 * j + lane % 4 * 2 + e % 2;
            finish<FORWARD>(n, b, rows[r], rows[HALF + r], t, sum[0][j][e], sum[1][j][e], out, h);
        }
    }
}

// As dw_v2: D (16 rows x 8 channels) += dh (16 x 16 times) x (16 times x 8 channels). Both lie in memory as mma wants
// them, times fastest; the tap's shift is taken while loading. A warp: 32 rows x 32 channels, 4 ldmatrix for 8 mma.
__global__ void __launch_bounds__(THREADS, 4)
    dw_v3(Layer n, int splits, const bf16* dh, const bf16* x, float* partial) {
    SHARED(bf16, gs);                      // dh (ROWS, STRIDE3)
    bf16* const xs = gs + ROWS * STRIDE3;  // x  (ROWS, STRIDE3), shifted by this block's tap
    const DwTile tile(n);
    const int tid = threadIdx.x, lane = tid % 32, row0 = tid / 64 * 32, col0 = tid / 32 % 2 * 32,
              shift = (n.K - 1 - tile.k) * n.dilation;
    const int per_item = (int)ceil_div(n.T, DEPTH3);
    const long long chunks = (long long)n.B * per_item;
    const bf16 zero = __float2bfloat16_rn(0);
    float sum[2][4][4] = {};  // (16 rows, 8 channels, element of D)
    for (long long q = chunks * blockIdx.y / splits; q < chunks * (blockIdx.y + 1) / splits; ++q) {
        const long long b = q / per_item;
        const int t0 = (int)(q % per_item) * DEPTH3;
        for (int p = tid; p < ROWS * DEPTH3; p += THREADS) {
            const int j = p % DEPTH3, r = p / DEPTH3, t = t0 + j, o = tile.o0 + r, ci = tile.c0 + r;
            gs[r * STRIDE3 + j] = o < 2 * n.H && t < n.T ? dh[(b * 2 * n.H + o) * n.T + t] : zero;
            const bool inside = ci < n.C && t < n.T && t >= shift;
            xs[r * STRIDE3 + j] = inside ? x[b * n.x_batch + (long long)ci * n.T + t - shift] : zero;
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < DEPTH3; i += 16) {
            unsigned g[2][4], v[4];
            ldmatrix_x4(g[0], address_a(gs, row0, i, lane));
            ldmatrix_x4(g[1], address_a(gs, row0 + 16, i, lane));
#pragma unroll
            for (int j = 0; j < 4; j += 2) {
                ldmatrix_x4(v, address_b(xs, col0 + 8 * j, i, lane));
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    mma_bf16(sum[m][j], g[m], v[0], v[1]);
                    mma_bf16(sum[m][j + 1], g[m], v[2], v[3]);
                }
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int o = tile.o0 + row0 + 16 * m + lane / 4 + e / 2 * 8,
                          ci = tile.c0 + col0 + 8 * j + lane % 4 * 2 + e % 2;
                if (o >= 2 * n.H || ci >= n.C) continue;
                partial[(((long long)blockIdx.y * n.K + tile.k) * 2 * n.H + o) * n.C + ci] = sum[m][j][e];
            }
        }
    }
}

// ==== Launchers ======================================================================================================
// Return nullptr, or what went wrong in words. Every launch goes to the caller's stream and is followed by a check;
// none allocates or waits. A grid of no blocks is an error in CUDA, so empty tensors launch nothing.
constexpr long long SHARED_LIMIT = 48 * 1024;  // what every GPU gives a block without asking
inline dim3 blocks_for(long long size, int block) { return dim3((unsigned)ceil_div(size, block)); }

inline long long shared_v2(const Layer& n, int element) {
    return (1LL * n.K * DEPTH * STRIDE + DEPTH * tile_columns(n)) * element;
}
inline long long shared_v3(const Layer& n) { return (1LL * n.K * ROWS + tile_columns(n)) * STRIDE3 * 2; }

// Was version 3 compiled for, and can this device run, bfloat16 tensor cores? (PTX made for sm_75 would only trap.)
static bool has_tensor_cores() {
#ifdef __CUDACC__
    cudaFuncAttributes compiled;
    if (cudaFuncGetAttributes(&compiled, conv_v3<true>) == cudaSuccess) return compiled.ptxVersion >= 80;
    cudaGetLastError();  // or the next launch would be blamed
    return false;
#else
    return true;
#endif
}

static const char* check(const Layer& n) {
    const double rows = n.C > 2.0 * n.H ? n.C : 2.0 * n.H, blocks = 2147483647.0;
    if (n.B < 0 || n.C < 0 || n.H < 0 || n.T < 0) return "a size is negative";
    if (n.K < 1 || n.dilation < 1) return "kernel size and dilation must be at least 1";
    if (rows > 65535 * HALF) return "more than 2,097,120 channels";
    if (n.T > 1 << 29 || (n.K - 1.0) * n.dilation > 1 << 29)
        return "frames or (kernel size - 1) * dilation exceed 2^29";
    if (n.B * rows * (n.T / 64 + 1.0) / 2 > blocks || rows * n.C * n.K / 64 > blocks)
        return "a launch needs more than 2^31 - 1 blocks";
    return nullptr;
}

template <class T>
static const char* run_forward(int version, const Layer& n, const T* x, const T* w, const T* bias, const T* cond, T* y,
                               T* h, void* stream) {
    if (const char* problem = check(n)) return problem;
    const long long outputs = (long long)n.B * n.H * n.T;
    if (outputs == 0) return nullptr;
    if (version == 1) {
        LAUNCH(forward_v1<T>, blocks_for(outputs, 128), dim3(128), 0, stream, n, x, w, bias, cond, y, h);
        return nullptr;
    }
    const dim3 grid((unsigned)(n.B * ceil_div(n.T, TIMES)), (unsigned)ceil_div(n.H, HALF));
    if constexpr (std::is_same_v<T, bf16>) {
        if (version == 3) {
            LAUNCH(conv_v3<true>, grid, dim3(THREADS), shared_v3(n), stream, n, x, w, bias, cond, y, h);
            return nullptr;
        }
    }
    LAUNCH((conv_v2<T, true>), grid, dim3(THREADS), shared_v2(n, sizeof(Sum<T>)), stream, n, x, w, bias, cond, y, h);
    return nullptr;
}

template <class T>
static const char* run_backward(int version, const Layer& n, const T* dy, const T* h, const T* x, const T* w, T* dh,
                                T* dx, T* dw, T* dbias, void* workspace, void* stream) {
    using A = Sum<T>;
    if (const char* problem = check(n)) return problem;
    const long long inputs = (long long)n.B * n.C * n.T, weights = 2LL * n.H * n.C * n.K, plane = (long long)n.H * n.T;
    if (n.B * plane > 0)
        LAUNCH(gate_backward<T>, dim3((unsigned)(n.B * ceil_div(plane, 256))), dim3(256), 0, stream, n, dy, h, dh);
    if (version == 1) {
        if (inputs > 0) LAUNCH(dx_v1<T>, blocks_for(inputs, 128), dim3(128), 0, stream, n, dh, w, dx);
        if (weights > 0) LAUNCH(dw_v1<T>, blocks_for(weights, 128), dim3(128), 0, stream, n, dh, x, dw);
        if (n.H > 0) LAUNCH(dbias_v1<T>, blocks_for(2 * n.H, 128), dim3(128), 0, stream, n, dh, dbias);
        return nullptr;
    }
    A* const partial = static_cast<A*>(workspace);
    const T* const none = nullptr;
    const dim3 grid((unsigned)(n.B * ceil_div(n.T, TIMES)), (unsigned)ceil_div(n.C, ROWS));
    const int splits = dw_splits(n, version == 3 ? DEPTH3 : DW_DEPTH);
    const dim3 dw_grid((unsigned)dw_tiles(n), splits);
    bool done = false;
    if constexpr (std::is_same_v<T, bf16>) {
        if (version == 3) {
            if (inputs > 0)
                LAUNCH(conv_v3<false>, grid, dim3(THREADS), shared_v3(n), stream, n, dh, w, none, none, dx,
                       (T*)nullptr);
            if (weights > 0)
                LAUNCH(dw_v3, dw_grid, dim3(THREADS), 2 * ROWS * STRIDE3 * 2, stream, n, splits, dh, x, partial);
            done = true;
        }
    }
    if (!done) {
        if (inputs > 0)
            LAUNCH((conv_v2<T, false>), grid, dim3(THREADS), shared_v2(n, sizeof(A)), stream, n, dh, w, none, none, dx,
                   (T*)nullptr);
        if (weights > 0)
            LAUNCH(dw_v2<T>, dw_grid, dim3(THREADS), 2 * DW_DEPTH * STRIDE * sizeof(A), stream, n, splits, dh, x,
                   partial);
    }
    if (weights > 0) LAUNCH(dw_sum<T>, blocks_for(weights, 128), dim3(128), 0, stream, n, splits, partial, dw);
    if (n.H > 0) LAUNCH(dbias_v2<T>, dim3(2 * n.H), dim3(THREADS), 4 * sizeof(A), stream, n, dh, dbias);
    return nullptr;
}

// The C interface of gated_conv.h. GATED_CONV_DTYPES may name fewer types for a quicker build.
#ifndef GATED_CONV_DTYPES
#define GATED_CONV_DTYPES(CASE) CASE(0, float) CASE(1, double) CASE(2, __half) CASE(3, __nv_bfloat16)
#endif

extern "C" const char* gated_conv_forward(int dtype, int version, const Layer* n, const void* x, const void* w,
                                          const void* bias, const void* cond, void* y, void* h, void* stream) {
#define CASE(code, T) \
    if (dtype == code) \
        return run_forward<T>(version, *n, (const T*)x, (const T*)w, (const T*)bias, (const T*)cond, (T*)y, (T*)h, \
                              stream);
    GATED_CONV_DTYPES(CASE)
#undef CASE
    return "dtype must be float32, float64, float16 or bfloat16";
}

extern "C" const char* gated_conv_backward(int dtype, int version, const Layer* n, const void* dy, const void* h,
                                           const void* x, const void* w, void* dh, void* dx, void* dw, void* dbias,
                                           void* workspace, void* stream) {
#define CASE(code, T) \
    if (dtype == code) \
        return run_backward<T>(version, *n, (const T*)dy, (const T*)h, (const T*)x, (const T*)w, (T*)dh, (T*)dx, \
                               (T*)dw, (T*)dbias, workspace, stream);
    GATED_CONV_DTYPES(CASE)
#undef CASE
    return "dtype must be float32, float64, float16 or bfloat16";
}

extern "C" int gated_conv_version(int dtype, int version, const Layer* n) {
    const bool fits[4] = {false, true, shared_v2(*n, dtype == 1 ? 8 : 4) <= SHARED_LIMIT,
                          dtype == 3 && shared_v3(*n) <= SHARED_LIMIT && has_tensor_cores()};
    if (version == 0) return fits[3] ? 3 : fits[2] ? 2 : 1;
    return version > 0 && version < 4 && fits[version] ? version : 0;
}

extern "C" long long gated_conv_workspace(int version, const Layer* n) {
    return version == 1 ? 0 : 2LL * n->H * n->C * n->K * dw_splits(*n, version == 3 ? DEPTH3 : DW_DEPTH);
}
