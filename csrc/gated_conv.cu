// The fused operator of the ConditionTCN (Fig. 1C, Eq. 8): causal dilated convolution + bias + conditioning + gate.
//
//     a[b, t, o] = bias[o] + cond[b, t, o] + sum_{k, c} w[o, k, c] x[b, t - (K - 1 - k) d, c]     (x = 0 before t = 0)
//     y[b, t, c] = tanh(a[b, t, c]) sigmoid(a[b, t, H + c])
//
//     x (B, T, C)   w (2H, K, C)   bias (2H)   cond, a (B, T, 2H)   y (B, T, H)   d dilation
//
// Channels last: the channels of one frame are neighbours in memory, in w too, so a tap is a shift by whole rows. For a
// frame this is a matrix product: (rows of frames) x (K C numbers) times (K C numbers) x (2H), then the gate.
//
// The file is a ladder; every rung computes the same numbers, adds one idea and can be selected:
//   version 1  naive: one thread per output, everything from global memory                                 any dtype
//   version 2  a tile in shared memory: what 256 threads read is loaded once                               any dtype
//   version 3  registers: a thread owns 32 sums, so each number it reads from the tile is used 4 or 8 times  any dtype
//   version 4  tensor cores: a warp multiplies 16 x 16 by 16 x 8 at once, fed by cp.async       16-bit, sm_80 and later
//   version 5  Hopper: TMA, whose zero fill is the causal padding, mbarriers, wgmma: hopper.cu          16-bit, sm_90a
// Backward keeps a and recomputes the gate from it in float32 (float64 for float64): da, which is dcond too, and parts
// of dbias; then dx is the forward product with w transposed and taps that look ahead, dw a product summed over all
// frames, split into parts. One last kernel adds up the parts of both. Version 4's dx computes da itself where that
// moves fewer bytes than a pass of its own (merges_gate).
// No float atomics and no flags between blocks: every sum has one fixed order, so results are the same bit for bit.
//
// Nothing here knows PyTorch (gated_conv.cpp does). nvcc compiles this file for a GPU; g++ compiles the same text
// through cuda_on_cpu.h and runs it thread by thread, which is how the tests prove it without a GPU.
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define SHARED(type, name) \
    extern __shared__ __align__(128) unsigned char shared_bytes[]; \
    type* const name = reinterpret_cast<type*>(shared_bytes)
#define LAUNCH(kernel, grid, block, bytes, stream, ...) \
    do { \
        if ((bytes) > 48 * 1024) /* more has to be asked for */ \
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)(bytes)); \
        kernel<<<grid, block, bytes, (cudaStream_t)(stream)>>>(__VA_ARGS__); \
        if (const cudaError_t error = cudaGetLastError()) return cudaGetErrorString(error); \
    } while (0)
#else
#include "cuda_on_cpu.h"
#endif
#include <stdint.h>
#include <type_traits>
#include "gated_conv.h"
#include "tensor_cores.h"

// ---- Storage and arithmetic types -----------------------------------------------------------------------------------
// Memory holds T; sums, tanh and exp are done in Sum<T>: float32, or float64 for float64.
template <class T> struct SumOf {
    using type = float;
};
template <> struct SumOf<double> {
    using type = double;
};
template <class T> using Sum = typename SumOf<T>::type;
template <class T> constexpr bool IS_16_BIT = sizeof(T) == 2;

__device__ inline float load(float v) { return v; }
__device__ inline double load(double v) { return v; }
__device__ inline float load(__half v) { return __half2float(v); }
__device__ inline float load(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline void store(float* p, float v) { *p = v; }
__device__ inline void store(double* p, double v) { *p = v; }
__device__ inline void store(__half* p, float v) { *p = __float2half_rn(v); }
__device__ inline void store(__nv_bfloat16* p, float v) { *p = __float2bfloat16_rn(v); }

template <class T, int N> struct alignas(N * sizeof(T)) Pack {  // read or written at once: N * sizeof(T) bytes
    T v[N];
};
template <class T> constexpr int WIDE = 16 / sizeof(T);  // the widest access a GPU has: 16 bytes

// exp may overflow to inf: 1 / inf = 0 is right. What is stored in 16 bits is rounded at 2^-9 or 2^-12, so there the
// GPU's own exp2 and reciprocal do, right to 2^-22: few instructions and, above all, no branch, so that the next gate
// does not wait for this one. (With tanhf and expf, which branch, the gates took as long as the products.)
template <class T> __device__ inline Sum<T> sigmoid(Sum<T> a) {
    if constexpr (IS_16_BIT<T>) return reciprocal(1.0f + exp2_fast(-1.44269504f * a));
    else return 1 / (1 + exp(-a));
}
template <class T> __device__ inline Sum<T> tanh_(Sum<T> a) {
    if constexpr (IS_16_BIT<T>) {
        const float by_exp = 1.0f - 2.0f * reciprocal(1.0f + exp2_fast(2.88539008f * a));
        return a * a < 1.0f / 256 ? a * (1.0f - a * a * (1.0f / 3)) : by_exp;  // near 0 by_exp loses the digits
    } else {
        return tanh(a);
    }
}

__host__ __device__ constexpr long long ceil_div(long long a, long long b) { return (a + b - 1) / b; }
__host__ __device__ inline int shift_of(const Layer& n, int k) { return (n.K - 1 - k) * n.dilation; }  // of tap k

// ==== Version 1: naive ===============================================================================================
// Each kernel is its formula: one thread per output, a loop over the sum, no sharing between threads.

// One thread: one y[b, t, c] and the two a it is made of. Grid: x = blocks of 128 over (b, t, c), c fastest.
// Global reads per y: K C of x, 2 K C of w, 2 cond; writes 1 y + 2 a.
// Intensity without caches: 4 K C flop over 12 K C bytes = 1/3 flop per byte (float32): a GPU offers 10 or more.
template <class T>
__global__ void forward_v1(Layer n, const T* x, const T* w, const T* bias, const T* cond, T* y, T* a) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (long long)n.B * n.T * n.H) return;
    const int c = (int)(i % n.H), t = (int)(i / n.H % n.T);
    const long long row = i / n.H;  // b T + t
    Sum<T> sum[2];
    for (int half = 0; half < 2; ++half) {
        const int o = c + half * n.H;
        sum[half] = bias ? load(bias[o]) : Sum<T>(0);
        if (cond) sum[half] += load(cond[row * n.cond_row + o]);
    }
    for (int k = 0; k < n.K; ++k) {
        if (t < shift_of(n, k)) continue;
        const T* const from = x + (row - shift_of(n, k)) * n.x_row;
        for (int ci = 0; ci < n.C; ++ci) {
            sum[0] += load(w[((long long)c * n.K + k) * n.C + ci]) * load(from[ci]);
            sum[1] += load(w[((long long)(n.H + c) * n.K + k) * n.C + ci]) * load(from[ci]);
        }
    }
    store(&y[i], tanh_<T>(sum[0]) * sigmoid<T>(sum[1]));
    if (a) {
        store(&a[row * 2 * n.H + c], sum[0]);
        store(&a[row * 2 * n.H + n.H + c], sum[1]);
    }
}

// One thread: one dx[b, t, c] = sum_{k, o} w[o, k, c] da[b, t + (K - 1 - k) d, o]. Grid as above over (b, t, c).
// Global reads per dx: 2 * 2H K; 1/4 flop per byte.
template <class T> __global__ void dx_v1(Layer n, const T* da, const T* w, T* dx) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (long long)n.B * n.T * n.C) return;
    const int c = (int)(i % n.C), t = (int)(i / n.C % n.T);
    Sum<T> sum = 0;
    for (int k = 0; k < n.K; ++k) {
        if (t + shift_of(n, k) >= n.T) continue;
        const T* const from = da + (i / n.C + shift_of(n, k)) * 2 * n.H;
        for (int o = 0; o < 2 * n.H; ++o) sum += load(w[((long long)o * n.K + k) * n.C + c]) * load(from[o]);
    }
    store(&dx[i], sum);
}

// One thread: one dw[o, k, c] = sum_{b, t} da[b, t, o] x[b, t - (K - 1 - k) d, c]. Grid: x = blocks of 128 over w.
// Global reads per dw: 2 B T; 1/4 flop per byte, and only 2H K C threads however long the sum is.
template <class T> __global__ void dw_v1(Layer n, const T* da, const T* x, T* dw) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= 2LL * n.H * n.K * n.C) return;
    const int c = (int)(i % n.C), shift = shift_of(n, (int)(i / n.C % n.K)), o = (int)(i / n.C / n.K);
    Sum<T> sum = 0;
    for (long long b = 0; b < n.B; ++b) {
        for (long long row = b * n.T + shift; row < (b + 1) * n.T; ++row) {
            sum += load(da[row * 2 * n.H + o]) * load(x[(row - shift) * n.x_row + c]);
        }
    }
    store(&dw[i], sum);
}

// ==== The gate's gradient, and sums of parts: shared by all versions =================================================
//     y = p s, p = tanh(a), s = sigmoid(g):   dy/da = s (1 - p^2)   dy/dg = p s (1 - s)
template <class T, int V>
__device__ inline void gate_gradient(Pack<T, V>& value, Pack<T, V>& gate, const Pack<T, V>& dy) {  // a becomes da
#pragma unroll
    for (int i = 0; i < V; ++i) {
        const Sum<T> p = tanh_<T>(load(value.v[i])), s = sigmoid<T>(load(gate.v[i])), d = load(dy.v[i]);
        store(&value.v[i], d * s * (1 - p * p));
        store(&gate.v[i], d * p * s * (1 - s));
    }
}

// A block of 256 threads: `lanes` (blockDim.x) groups of V neighbouring channels x 256 / lanes frames at a time, over a
// run of GATE_RUN such steps. It writes da, which is dcond too, and its part of dbias: sums of da over its frames,
// first in a thread, then over the block's threads in their order. Grid: x = runs of frames, y = groups of channels.
// Global per (b, t, c): 3 values read, 2 written, for about 40 instructions: bound by memory, so the loads of
// GATE_BATCH steps are under way before the first is used.
constexpr int GATE_THREADS = 256, GATE_RUN = 4, GATE_BATCH = 2;
template <class T, int V>
__global__ void __launch_bounds__(GATE_THREADS, 3)
    gate_backward(Layer n, const T* dy, const T* a, T* da, Sum<T>* parts) {
    using A = Sum<T>;
    using P = Pack<T, V>;
    SHARED(A, sums);  // (blockDim.y, 2, blockDim.x * V)
    const int width = blockDim.x * V, c = (blockIdx.y * blockDim.x + threadIdx.x) * V;
    const long long first = (long long)blockIdx.x * blockDim.y * GATE_RUN + threadIdx.y,
                    end = c < n.H ? (long long)n.B * n.T : 0;
    A sum[2][V] = {};
#pragma unroll 1
    for (int batch = 0; batch < GATE_RUN; batch += GATE_BATCH) {
        P value[GATE_BATCH] = {}, gate[GATE_BATCH] = {}, d[GATE_BATCH] = {};  // beyond the end: zeros add nothing
#pragma unroll
        for (int i = 0; i < GATE_BATCH; ++i) {
            const long long row = first + (batch + i) * blockDim.y;
            if (row >= end) continue;
            value[i] = *reinterpret_cast<const P*>(a + row * 2 * n.H + c);
            gate[i] = *reinterpret_cast<const P*>(a + row * 2 * n.H + n.H + c);
            d[i] = *reinterpret_cast<const P*>(dy + row * n.H + c);
        }
#pragma unroll
        for (int i = 0; i < GATE_BATCH; ++i) {
            const long long row = first + (batch + i) * blockDim.y;
            gate_gradient(value[i], gate[i], d[i]);
#pragma unroll
            for (int v = 0; v < V; ++v) {
                sum[0][v] += load(value[i].v[v]);
                sum[1][v] += load(gate[i].v[v]);
            }
            if (row >= end) continue;
            *reinterpret_cast<P*>(da + row * 2 * n.H + c) = value[i];
            *reinterpret_cast<P*>(da + row * 2 * n.H + n.H + c) = gate[i];
        }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < V; ++i) sums[(threadIdx.y * 2 + half) * width + threadIdx.x * V + i] = sum[half][i];
    }
    __syncthreads();
    for (int j = threadIdx.y * blockDim.x + threadIdx.x; j < 2 * width; j += GATE_THREADS) {
        const int channel = blockIdx.y * width + j % width;
        if (channel >= n.H) continue;
        A total = 0;
        for (int y = 0; y < (int)blockDim.y; ++y) total += sums[y * 2 * width + j];
        parts[(long long)blockIdx.x * 2 * n.H + j / width * n.H + channel] = total;
    }
}

// out[i] = parts[0, i] + parts[1, i] + ...: always in one order, of dw and dbias in one launch. A block has ROWS rows
// of LANES threads, 256 in all. A thread adds every ROWS-th part of OWN outputs, so that many loads are under way; then
// one thread adds the rows. Grid: x = blocks of dbias, whose many parts want many rows, then of dw.
constexpr int OWN = 8, FEW_LANES = 8, MANY_LANES = 32;
template <class T> struct Parts {
    const Sum<T>* parts;  // (count, size)
    int count;
    long long size;
    T* out;
};
template <class T, int LANES> __device__ inline void sum_block(const Parts<T>& of, int block) {
    constexpr int ROWS = 256 / LANES, SIZE = OWN * LANES;
    SHARED(Sum<T>, sums);  // (ROWS, SIZE)
    const int tid = threadIdx.x, lane = tid % LANES, own = tid / LANES;
    const long long first = (long long)block * SIZE;
    Sum<T> sum[OWN] = {};
    for (int part = own; part < of.count; part += ROWS) {
        const Sum<T>* const from = of.parts + part * of.size + first;
#pragma unroll
        for (int j = 0; j < OWN; ++j) {
            if (first + j * LANES + lane < of.size) sum[j] += from[j * LANES + lane];
        }
    }
#pragma unroll
    for (int j = 0; j < OWN; ++j) sums[own * SIZE + j * LANES + lane] = sum[j];
    __syncthreads();
    if (tid >= SIZE || first + tid >= of.size) return;
    Sum<T> total = sums[tid];
#pragma unroll
    for (int row = 1; row < ROWS; ++row) total += sums[row * SIZE + tid];
    store(&of.out[first + tid], total);
}
template <class T> __global__ void __launch_bounds__(256) sum_parts(Parts<T> dbias, Parts<T> dw, int of_dbias) {
    if ((int)blockIdx.x < of_dbias) sum_block<T, FEW_LANES>(dbias, blockIdx.x);
    else sum_block<T, MANY_LANES>(dw, blockIdx.x - of_dbias);
}

// ==== Version 2: a tile in shared memory =============================================================================
// The 256 threads of a block compute 16 channels at 16 frames, so they read the same numbers 16 times over. Now the
// block loads what it needs of DEPTH2 input channels once into shared memory, meets at a barrier, and sums from there.
// The tile of x has the block's frames and, before them, the halo of (K - 1) d frames that the taps look back to.
constexpr int SIDE = 16, DEPTH2 = 16, STRIDE2 = DEPTH2 + 1;  // odd: 16 rows at one depth fall on 16 different banks

// Taps further apart than the tile is long do not overlap: each then has its own TIMES rows instead of one long halo,
// so shared memory stays bounded for any dilation.
template <int TIMES> __host__ __device__ inline int tap_step(const Layer& n) {
    return n.dilation < TIMES ? n.dilation : TIMES;
}
template <int TIMES> __host__ __device__ inline int tile_rows(const Layer& n) {
    return TIMES + (n.K - 1) * tap_step<TIMES>(n);
}
// The frame (relative to the tile's first) of a row of the tile, as forward reads it (back); dx reads ahead.
template <int TIMES> __device__ inline int frame_back(const Layer& n, int row) {
    const int window = n.dilation > TIMES ? row / TIMES : 0;
    return row + window * (n.dilation - TIMES) - (n.K - 1) * n.dilation;
}
template <int TIMES> __device__ inline int frame_ahead(const Layer& n, int row) {
    const int window = n.dilation > TIMES ? row / TIMES : 0;
    return row + window * (n.dilation - TIMES);
}

// One thread: one y. Grid: x = batch item * tiles of 16 frames, y = tiles of 16 channels.
// Global reads per y: C (16 + (K - 1) d) / 256 of x, K C / 8 of w. Shared reads: 3 K C, as many as version 1's global.
template <class T> __global__ void __launch_bounds__(SIDE* SIDE)
    forward_v2(Layer n, const T* x, const T* w, const T* bias, const T* cond, T* y, T* a) {
    using A = Sum<T>;
    const int rows = tile_rows<SIDE>(n), step = tap_step<SIDE>(n);
    SHARED(A, xs);                      // input   (rows, STRIDE2)
    A* const ws = xs + rows * STRIDE2;  // weights (K, 2 SIDE, STRIDE2): 16 channels, then their gates
    const int tid = threadIdx.x, channel = tid % SIDE, frame = tid / SIDE, tiles = (int)ceil_div(n.T, SIDE);
    const int t0 = (int)(blockIdx.x % tiles) * SIDE, c0 = blockIdx.y * SIDE;
    const long long b = blockIdx.x / tiles;
    A sum[2] = {};
    for (int d0 = 0; d0 < n.C; d0 += DEPTH2) {
        for (int p = tid; p < rows * DEPTH2; p += SIDE * SIDE) {
            const int i = p % DEPTH2, r = p / DEPTH2, t = t0 + frame_back<SIDE>(n, r);
            const bool inside = d0 + i < n.C && t >= 0 && t < n.T;
            xs[r * STRIDE2 + i] = inside ? load(x[(b * n.T + t) * n.x_row + d0 + i]) : A(0);
        }
        for (int p = tid; p < n.K * 2 * SIDE * DEPTH2; p += SIDE * SIDE) {
            const int i = p % DEPTH2, r = p / DEPTH2 % (2 * SIDE), k = p / DEPTH2 / (2 * SIDE), c = c0 + r % SIDE;
            const bool inside = d0 + i < n.C && c < n.H;
            const long long o = c + r / SIDE * n.H;
            ws[(k * 2 * SIDE + r) * STRIDE2 + i] = inside ? load(w[(o * n.K + k) * n.C + d0 + i]) : A(0);
        }
        __syncthreads();  // the tile is complete before anyone reads it
        for (int k = 0; k < n.K; ++k) {
            for (int i = 0; i < DEPTH2; ++i) {
                const A v = xs[(frame + k * step) * STRIDE2 + i];
                sum[0] += ws[(k * 2 * SIDE + channel) * STRIDE2 + i] * v;
                sum[1] += ws[(k * 2 * SIDE + SIDE + channel) * STRIDE2 + i] * v;
            }
        }
        __syncthreads();  // everyone has read it before it is overwritten
    }
    const int c = c0 + channel, t = t0 + frame;
    if (c >= n.H || t >= n.T) return;
    const long long row = b * n.T + t;
    for (int half = 0; half < 2; ++half) {
        if (bias) sum[half] += load(bias[half * n.H + c]);
        if (cond) sum[half] += load(cond[row * n.cond_row + half * n.H + c]);
        if (a) store(&a[row * 2 * n.H + half * n.H + c], sum[half]);
    }
    store(&y[row * n.H + c], tanh_<T>(sum[0]) * sigmoid<T>(sum[1]));
}

// One thread: one dx. As forward_v2, with da for x, the halo after the tile, and w read across: its rows are summed.
// Grid: x = batch item * tiles of 16 frames, y = tiles of 16 input channels. Shared reads per dx: 2 * 2H K.
template <class T> __global__ void __launch_bounds__(SIDE* SIDE) dx_v2(Layer n, const T* da, const T* w, T* dx) {
    using A = Sum<T>;
    const int rows = tile_rows<SIDE>(n), step = tap_step<SIDE>(n);
    SHARED(A, gs);                      // da      (rows, STRIDE2)
    A* const ws = gs + rows * STRIDE2;  // weights (K, DEPTH2, STRIDE2), input channels fastest
    const int tid = threadIdx.x, channel = tid % SIDE, frame = tid / SIDE, tiles = (int)ceil_div(n.T, SIDE);
    const int t0 = (int)(blockIdx.x % tiles) * SIDE, c = blockIdx.y * SIDE + channel;
    const long long b = blockIdx.x / tiles;
    A sum = 0;
    for (int o0 = 0; o0 < 2 * n.H; o0 += DEPTH2) {
        for (int p = tid; p < rows * DEPTH2; p += SIDE * SIDE) {
            const int i = p % DEPTH2, r = p / DEPTH2, t = t0 + frame_ahead<SIDE>(n, r);
            const bool inside = o0 + i < 2 * n.H && t < n.T;
            gs[r * STRIDE2 + i] = inside ? load(da[(b * n.T + t) * 2 * n.H + o0 + i]) : A(0);
        }
        for (int p = tid; p < n.K * DEPTH2 * SIDE; p += SIDE * SIDE) {  // a thread stays at its channel
            const int i = p / SIDE % DEPTH2, k = p / SIDE / DEPTH2;
            const bool inside = o0 + i < 2 * n.H && c < n.C;
            ws[(k * DEPTH2 + i) * STRIDE2 + channel] =
                inside ? load(w[((long long)(o0 + i) * n.K + k) * n.C + c]) : A(0);
        }
        __syncthreads();
        for (int k = 0; k < n.K; ++k) {
            for (int i = 0; i < DEPTH2; ++i)
                sum += ws[(k * DEPTH2 + i) * STRIDE2 + channel] * gs[(frame + (n.K - 1 - k) * step) * STRIDE2 + i];
        }
        __syncthreads();
    }
    if (c < n.C && t0 + frame < n.T) store(&dx[(b * n.T + t0 + frame) * n.C + c], sum);
}

// One thread: one dw. The tile: 16 frames of 16 rows of da and of 16 channels of x, shifted by this block's tap.
// Grid: x = (row tile * channel tiles + channel tile) * K + k. Each block walks through all frames: few, long blocks.
template <class T> __global__ void __launch_bounds__(SIDE* SIDE) dw_v2(Layer n, const T* da, const T* x, T* dw) {
    using A = Sum<T>;
    SHARED(A, gs);                      // da (SIDE frames, STRIDE2)
    A* const xs = gs + SIDE * STRIDE2;  // x  (SIDE frames, STRIDE2)
    const int tid = threadIdx.x, low = tid % SIDE, high = tid / SIDE, tiles = (int)ceil_div(n.C, SIDE);
    const int k = blockIdx.x % n.K, c0 = (int)(blockIdx.x / n.K % tiles) * SIDE,
              o0 = (int)(blockIdx.x / n.K / tiles) * SIDE, shift = shift_of(n, k);
    const long long rows = (long long)n.B * n.T;
    A sum = 0;
    for (long long r0 = 0; r0 < rows; r0 += SIDE) {
        const long long row = r0 + high;
        const bool inside = row < rows && (int)(row % n.T) >= shift;
        gs[high * STRIDE2 + low] = inside && o0 + low < 2 * n.H ? load(da[row * 2 * n.H + o0 + low]) : A(0);
        xs[high * STRIDE2 + low] = inside && c0 + low < n.C ? load(x[(row - shift) * n.x_row + c0 + low]) : A(0);
        __syncthreads();
        for (int i = 0; i < SIDE; ++i) sum += gs[i * STRIDE2 + high] * xs[i * STRIDE2 + low];
        __syncthreads();
    }
    const int o = o0 + high, c = c0 + low;
    if (o < 2 * n.H && c < n.C) store(&dw[((long long)o * n.K + k) * n.C + c], sum);
}

// ==== Version 3: registers ===========================================================================================
// Version 2 waits for shared memory: 3 reads for 2 multiply-adds. So a thread now owns 8 rows x 4 frames = 32 sums in
// registers and reads 8 + 4 numbers for 32 multiply-adds. A block of 128 threads owns 64 rows x 64 frames; forward's
// rows are 32 channels and their 32 gates, held by the same thread, so the gate never leaves registers. The tiles lie
// the other way round (depth, rows): a thread's 4 neighbouring rows are one read.
constexpr int THREADS = 128, ROWS = 64, HALF = 32, TIMES = 64, DEPTH = 8;
template <class T> constexpr int BLOCKS = sizeof(T) == 8 ? 2 : 4;  // on an SM: 128 registers a thread, float64 255
constexpr int STRIDE = ROWS + 4;  // the 32 lanes of a store (8 depths x 4 rows) then hit 32 different banks
template <class A> using Four = Pack<A, 4>;
__host__ __device__ inline int tile_stride(const Layer& n) { return (tile_rows<TIMES>(n) + 31) / 32 * 32 + 4; }

template <class A> __device__ inline Four<A> four(const A* p) {
    if constexpr (sizeof(A) == 8) return {p[0], p[1], p[2], p[3]};  // 32 bytes are two reads anyway
    else return *reinterpret_cast<const Four<A>*>(p);
}

// The sums of a tile: 4 + 4 rows at `w_tile`, 4 frames at `in_tile` for each depth.
template <class A>
__device__ inline void multiply_add(A (&sum)[2][4][4], const A* w_tile, const A* in_tile, int stride) {
#pragma unroll
    for (int i = 0; i < DEPTH; ++i) {
        const Four<A> low = four(w_tile + i * STRIDE), high = four(w_tile + i * STRIDE + HALF);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const A v = in_tile[i * stride + 16 * j];
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                sum[0][r][j] += low.v[r] * v;
                sum[1][r][j] += high.v[r] * v;
            }
        }
    }
}

// One thread: channels 4 tc .. 4 tc + 3 and their gates x frames tt, tt + 16, tt + 32, tt + 48.
// Grid: x = batch item * tiles of 64 frames, y = tiles of 32 channels.
// Global reads per y: C (64 + (K - 1) d) / 2048 of x, K C / 32 of w, 2 cond; writes 1 y + 2 a.
// Shared per (channel, tap): a thread reads 4 x + 8 w for 32 multiply-adds (0.75 K C reads per y).
// Intensity at C = H = 256, K = 3, d = 1, float32: 3072 flop per y over 149 bytes = 21 flop per byte from L2.
template <class T> __global__ void __launch_bounds__(THREADS, BLOCKS<T>)
    forward_v3(Layer n, const T* x, const T* w, const T* bias, const T* cond, T* y, T* a) {
    using A = Sum<T>;
    const int rows = tile_rows<TIMES>(n), step = tap_step<TIMES>(n), stride = tile_stride(n);
    SHARED(A, ws);                            // weights (K, DEPTH, STRIDE): 32 channels, then their gates
    A* const xs = ws + n.K * DEPTH * STRIDE;  // input   (DEPTH, stride)
    const int tid = threadIdx.x, tc = tid % 8, tt = tid / 8, tiles = (int)ceil_div(n.T, TIMES);
    const int t0 = (int)(blockIdx.x % tiles) * TIMES, c0 = blockIdx.y * HALF;
    const long long b = blockIdx.x / tiles;
    A sum[2][4][4] = {};  // (half, channel, frame)
    for (int d0 = 0; d0 < n.C; d0 += DEPTH) {
        for (int p = tid; p < n.K * ROWS * DEPTH; p += THREADS) {
            const int i = p % DEPTH, r = p / DEPTH % ROWS, k = p / DEPTH / ROWS, c = c0 + r % HALF;
            const bool inside = d0 + i < n.C && c < n.H;
            const long long o = c + r / HALF * n.H;
            ws[(k * DEPTH + i) * STRIDE + r] = inside ? load(w[(o * n.K + k) * n.C + d0 + i]) : A(0);
        }
        for (int p = tid; p < rows * DEPTH; p += THREADS) {
            const int i = p % DEPTH, r = p / DEPTH, t = t0 + frame_back<TIMES>(n, r);
            const bool inside = d0 + i < n.C && t >= 0 && t < n.T;
            xs[i * stride + r] = inside ? load(x[(b * n.T + t) * n.x_row + d0 + i]) : A(0);
        }
        __syncthreads();
        for (int k = 0; k < n.K; ++k)
            multiply_add(sum, ws + k * DEPTH * STRIDE + 4 * tc, xs + k * step + tt, stride);
        __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int c = c0 + 4 * tc + r, t = t0 + tt + 16 * j;
            if (c >= n.H || t >= n.T) continue;
            const long long row = b * n.T + t;
            A value = sum[0][r][j], gate = sum[1][r][j];
            if (bias) value += load(bias[c]), gate += load(bias[n.H + c]);
            if (cond) value += load(cond[row * n.cond_row + c]), gate += load(cond[row * n.cond_row + n.H + c]);
            store(&y[row * n.H + c], tanh_<T>(value) * sigmoid<T>(gate));
            if (a) store(&a[row * 2 * n.H + c], value), store(&a[row * 2 * n.H + n.H + c], gate);
        }
    }
}

// One thread: input channels 4 tc .. 4 tc + 3 and those 32 further x four frames. Grid: x as above, y = tiles of 64.
template <class T> __global__ void __launch_bounds__(THREADS, BLOCKS<T>)
    dx_v3(Layer n, const T* da, const T* w, T* dx) {
    using A = Sum<T>;
    const int rows = tile_rows<TIMES>(n), step = tap_step<TIMES>(n), stride = tile_stride(n);
    SHARED(A, ws);                            // weights (K, DEPTH, STRIDE): 64 input channels
    A* const gs = ws + n.K * DEPTH * STRIDE;  // da      (DEPTH, stride)
    const int tid = threadIdx.x, tc = tid % 8, tt = tid / 8, tiles = (int)ceil_div(n.T, TIMES);
    const int t0 = (int)(blockIdx.x % tiles) * TIMES, c0 = blockIdx.y * ROWS;
    const long long b = blockIdx.x / tiles;
    A sum[2][4][4] = {};  // (half, channel, frame)
    for (int o0 = 0; o0 < 2 * n.H; o0 += DEPTH) {
        for (int p = tid; p < n.K * DEPTH * ROWS; p += THREADS) {
            const int r = p % ROWS, i = p / ROWS % DEPTH, k = p / ROWS / DEPTH;
            const bool inside = o0 + i < 2 * n.H && c0 + r < n.C;
            ws[(k * DEPTH + i) * STRIDE + r] =
                inside ? load(w[((long long)(o0 + i) * n.K + k) * n.C + c0 + r]) : A(0);
        }
        for (int p = tid; p < rows * DEPTH; p += THREADS) {
            const int i = p % DEPTH, r = p / DEPTH, t = t0 + frame_ahead<TIMES>(n, r);
            const bool inside = o0 + i < 2 * n.H && t < n.T;
            gs[i * stride + r] = inside ? load(da[(b * n.T + t) * 2 * n.H + o0 + i]) : A(0);
        }
        __syncthreads();
        for (int k = 0; k < n.K; ++k)
            multiply_add(sum, ws + k * DEPTH * STRIDE + 4 * tc, gs + (n.K - 1 - k) * step + tt, stride);
        __syncthreads();
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int c = c0 + half * HALF + 4 * tc + r, t = t0 + tt + 16 * j;
                if (c < n.C && t < n.T) store(&dx[(b * n.T + t) * n.C + c], sum[half][r][j]);
            }
        }
    }
}

// dw's sum over batch and time is split into `splits` equal runs of chunks, so that a few hundred blocks share it; each
// writes its part and sum_parts adds them. Their number depends on the shape alone: the same bits on every GPU.
#ifndef DW_BLOCKS
#define DW_BLOCKS 256  // tests take fewer, so that small shapes have long splits too
#endif
inline int dw_splits(const Layer& n, long long tiles, int depth) {
    const long long chunks = n.B * ceil_div(n.T, depth), wanted = ceil_div(DW_BLOCKS, tiles < 1 ? 1 : tiles);
    return (int)(chunks < 1 ? 1 : chunks < wanted ? chunks : wanted);
}

// This block's run, blockIdx.y of `splits`. In 32 bits (check() sees to it): to divide 64, a GPU takes a hundred
// instructions.
struct Run {
    int first, end;
    __device__ Run(int chunks, int splits) {
        const int y = blockIdx.y, each = chunks / splits, longer = chunks % splits;
        first = y * each + (y < longer ? y : longer);
        end = first + each + (y < longer);
    }
};

// One thread: rows 4 tr .. and 32 further x 4 channels of one tap's dw, summed over its split into parts (splits, 2H,
// K, C). Grid: x = (row tile * channel tiles + channel tile) * K + k, y = splits.
// Shared per frame: a thread reads 8 da + 4 x for 32 multiply-adds. Global per block and frame: 64 of da and 64 of x
// for 4096 multiply-adds: 16 flop per byte (float32).
constexpr int DW_DEPTH = 16;
template <class T> __global__ void __launch_bounds__(THREADS, BLOCKS<T>)
    dw_v3(Layer n, int splits, const T* da, const T* x, Sum<T>* parts) {
    using A = Sum<T>;
    SHARED(A, gs);                         // da (DW_DEPTH frames, STRIDE)
    A* const xs = gs + DW_DEPTH * STRIDE;  // x  (DW_DEPTH frames, STRIDE), shifted by this block's tap
    const int tid = threadIdx.x, tc = tid % 16, tr = tid / 16, tiles = (int)ceil_div(n.C, ROWS);
    const int k = blockIdx.x % n.K, c0 = (int)(blockIdx.x / n.K % tiles) * ROWS,
              o0 = (int)(blockIdx.x / n.K / tiles) * ROWS, shift = shift_of(n, k);
    const int per_item = (int)ceil_div(n.T, DW_DEPTH);
    const Run run(n.B * per_item, splits);
    A sum[2][4][4] = {};  // (half of the rows, row, channel)
    for (int chunk = run.first; chunk < run.end; ++chunk) {
        const long long b = chunk / per_item;
        const int t0 = chunk % per_item * DW_DEPTH;
        for (int p = tid; p < ROWS * DW_DEPTH; p += THREADS) {
            const int r = p % ROWS, j = p / ROWS, t = t0 + j;
            const bool inside = t < n.T && t >= shift;
            gs[j * STRIDE + r] = inside && o0 + r < 2 * n.H ? load(da[(b * n.T + t) * 2 * n.H + o0 + r]) : A(0);
            xs[j * STRIDE + r] = inside && c0 + r < n.C ? load(x[(b * n.T + t - shift) * n.x_row + c0 + r]) : A(0);
        }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < DW_DEPTH; ++j) {
            const Four<A> low = four(gs + j * STRIDE + 4 * tr), high = four(gs + j * STRIDE + HALF + 4 * tr),
                          v = four(xs + j * STRIDE + 4 * tc);
#pragma unroll
            for (int r = 0; r < 4; ++r) {
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    sum[0][r][c] += low.v[r] * v.v[c];
                    sum[1][r][c] += high.v[r] * v.v[c];
                }
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int o = o0 + half * HALF + 4 * tr + r, c = c0 + 4 * tc + j;
                if (o >= 2 * n.H || c >= n.C) continue;
                parts[(((long long)blockIdx.y * 2 * n.H + o) * n.K + k) * n.C + c] = sum[half][r][j];
            }
        }
    }
}

// ==== Version 4: tensor cores ========================================================================================
// A tensor core multiplies 16 x 16 by 16 x 8 numbers for a whole warp in one instruction (tensor_cores.h): what limits
// a kernel now is feeding it. Three means:
//   cp.async    while stage i is multiplied, the copies of stage i + 1 run: no thread waits for them, none holds them
//               in registers. Two stages lie in shared memory; one barrier a stage keeps them apart.
//   ldmatrix    fills the registers of a warp with 8 x 8 matrices. Its rows are 16 bytes; channels last, a tap is a row
//               offset, so one tile of x with its halo serves all taps here too.
//   swizzle     the 16-byte pieces of a row are stored in an order that changes from row to row, so that the 8 rows of
//               an 8 x 8 matrix fall on 8 different groups of 4 banks.
// A block has 4 warps. A tile of frames is 16 M of one batch item (a "slot"), a block has two slots, each shared by two
// warps. M = 5 (80 frames) where there is work enough for every SM, M = 1 where not.
constexpr int DEPTH4 = 32, SLOTS = 2, PAIRS4 = 64, CHANNELS4 = 64;

// Where 16-byte piece `piece` of a row lies, in elements. Rows of 32: four pieces; rows of 64: eight.
__device__ inline int swizzle32(int row, int piece) { return row * 32 + (piece ^ (row >> 1 & 3)) * 8; }
__device__ inline int swizzle64(int row, int piece) { return row * 64 + (piece ^ (row & 7)) * 8; }

// One piece to shared memory: `valid` (of 8) elements, zeros behind them; nothing is read where that is 0 or less.
// unit: the bytes all rows are aligned to. A thread copies the same piece of one row after the other: little is left to
// compute.
template <class T> __device__ inline void copy_piece(T* to, const T* from, int valid, int unit) {
    valid = valid < 0 ? 0 : valid > 8 ? 8 : valid;
    if (unit == 16) return copy_async<16>(to, from, valid * 2);
    for (int j = 0; j < 8; j += unit / 2) {
        const int here = valid - j < 0 ? 0 : valid - j > unit / 2 ? unit / 2 : valid - j;
        if (unit == 8) copy_async<8>(to + j, from + j, here * 2);
        else if (unit == 4) copy_async<4>(to + j, from + j, here * 2);
        else if (here) to[j] = from[j];  // odd rows: nothing shorter than 4 bytes copies itself
        else store(&to[j], 0.0f);
    }
}

// The first `count` (0 and less: none) of 8 neighbours; WIDE: all or none, on 16 bytes.
template <bool WIDE, class T> __device__ inline void read8(Pack<T, 8>& to, const T* from, int count) {
    if (WIDE && count > 0) to = *reinterpret_cast<const Pack<T, 8>*>(from);
#pragma unroll
    for (int i = 0; !WIDE && i < 8; ++i) {
        if (i < count) to.v[i] = from[i];
    }
}
template <bool WIDE, class T> __device__ inline void write8(T* to, const Pack<T, 8>& from, int count) {
    if (WIDE && count > 0) *reinterpret_cast<Pack<T, 8>*>(to) = from;
#pragma unroll
    for (int i = 0; !WIDE && i < 8; ++i) {
        if (i < count) to[i] = from.v[i];
    }
}

// The frames of a block's slot: from t0 on, of the item whose first frame is row `item`.
struct Slot {
    long long item;
    int t0;
    __device__ Slot(const Layer& n, int times, int slot) {
        const int tiles = (int)ceil_div(n.T, times);
        const unsigned i = blockIdx.x * SLOTS + slot, b = i / tiles;  // below 2^32: see check()
        item = (long long)b * n.T;
        t0 = b < (unsigned)n.B ? (int)(i % tiles) * times : 1 << 30;  // no tile is left: after every last frame
    }
};

// Forward. A warp: one slot's 16 M frames x 32 channels and their gates: 32 M sums a lane.
// D has a lane hold two neighbouring channels of every eight. Loading w's rows in the order `channel_of` makes the four
// pairs of a lane 8 neighbouring channels, so cond, a and y move 16 bytes at a time.
// Grid: x = pairs of slots, y = tiles of 64 channels. Per 16 channels and tap a warp reads 4 + M ldmatrix for 8 M mma.
// Global reads per y at M = 5: C (80 + (K - 1) d) / 5120 of x, K C / 80 of w: 4.4 + 9.6 at C = H = 256, K = 3, d = 4.
__device__ inline int channel_of(int row) { return row % 8 / 2 * 8 + row / 8 * 2 + row % 2; }  // rows 0 .. 31

// WIDE: H is a multiple of 8 and cond lies on 16 bytes.
template <class T, int M, bool WIDE> __global__ void __launch_bounds__(THREADS, 2)
    forward_v4(Layer n, int unit_x, int unit_w, const T* x, const T* w, const T* bias, const T* cond, T* y, T* a) {
    const int halo = (n.K - 1) * n.dilation, rows = 16 * M + halo;
    const int x_size = SLOTS * rows * DEPTH4, stage_size = x_size + n.K * 2 * PAIRS4 * DEPTH4;
    SHARED(T, stages);  // two stages of: x (SLOTS, rows, 32), weights (K, 128, 32), both swizzled
    const int tid = threadIdx.x, lane = tid % 32, slot = tid / 64, group = tid / 32 % 2, c0 = blockIdx.y * PAIRS4;
    const int chunks = (int)ceil_div(n.C, DEPTH4);
    const Slot first(n, 16 * M, 0), second(n, 16 * M, 1), to = slot ? second : first;

    const auto load_stage = [&](int chunk) {
        T* const xs = stages + chunk % 2 * stage_size;
        T* const ws = xs + x_size;
        const int piece = tid % 4, own = tid / 4, d0 = chunk * DEPTH4 + piece * 8;
        for (int r = own; r < SLOTS * rows; r += THREADS / 4) {
            const int t = (r < rows ? first.t0 : second.t0 - rows) - halo + r;
            const long long row = (r < rows ? first.item : second.item) + t;
            copy_piece(xs + swizzle32(r, piece), x + row * n.x_row + d0, t >= 0 && t < n.T ? n.C - d0 : 0, unit_x);
        }
        for (int k = 0; k < n.K; ++k) {  // rows of a group: 32 values, their 32 gates
#pragma unroll
            for (int i = 0; i < 2 * PAIRS4 / 32; ++i) {
                const int c = c0 + i / 2 * 32 + channel_of(own), o = c + i % 2 * n.H;
                copy_piece(ws + swizzle32(k * 2 * PAIRS4 + i * 32 + own, piece),
                           w + (long long)(o * n.K + k) * n.C + d0, c < n.H ? n.C - d0 : 0, unit_w);
            }
        }
    };

    const int c = c0 + group * 32 + lane % 4 * 8, count = n.H - c;  // this lane's 8 channels
    const auto frame = [&](int m, int e) { return to.t0 + 16 * m + lane / 4 + e * 4; };
    load_stage(0);
    // The sums start at bias + cond, which arrive with the first stage: no load is left for the end.
    float sum[M][8][4];  // (16 frames, 8 rows of weights: 4 of values, 4 of gates, element of D)
    const T* const first_cond = cond + (to.item + frame(0, 0)) * n.cond_row + c;
    Pack<T, 8> own[2] = {};
    if (bias) read8<false>(own[0], bias + c, count), read8<false>(own[1], bias + n.H + c, count);
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
            const T* const from = first_cond + (16 * m + e * 4) * n.cond_row;
            Pack<T, 8> value = {}, gate = {};
            if (cond && frame(m, e) < n.T) read8<WIDE>(value, from, count), read8<WIDE>(gate, from + n.H, count);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                sum[m][i / 2][e + i % 2] = load(own[0].v[i]) + load(value.v[i]);
                sum[m][4 + i / 2][e + i % 2] = load(own[1].v[i]) + load(gate.v[i]);
            }
        }
    }
    for (int chunk = 0; chunk < chunks; ++chunk) {
        wait_for_copies();  // this thread's part of the stage has arrived;
        __syncthreads();    // now everyone's has, and everyone is done with the stage before
        if (chunk + 1 < chunks) load_stage(chunk + 1);
        const T* const xs = stages + chunk % 2 * stage_size;
        const T* const ws = xs + x_size;
        for (int k = 0; k < n.K; ++k) {
#pragma unroll
            for (int i = 0; i < DEPTH4 / 8; i += 2) {  // 16 channels: pieces i and i + 1
                unsigned rows_w[4][4], frames[4];
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    ldmatrix<false>(rows_w[j], ws + swizzle32(k * 128 + group * 64 + 16 * j + lane % 8 + lane / 16 * 8,
                                                              i + lane / 8 % 2));
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    ldmatrix<false>(frames, xs + swizzle32(slot * rows + k * n.dilation + 16 * m + lane % 16,
                                                           i + lane / 16));
#pragma unroll
                    for (int j = 0; j < 8; ++j)
                        mma(T(), sum[m][j], frames, rows_w[j / 2][j % 2 * 2], rows_w[j / 2][j % 2 * 2 + 1]);
                }
            }
        }
    }

#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
            if (frame(m, e) >= n.T) continue;
            const long long row = to.item + frame(m, e);
            Pack<T, 8> value, gate, out;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const float p = sum[m][i / 2][e + i % 2], g = sum[m][4 + i / 2][e + i % 2];
                store(&value.v[i], p), store(&gate.v[i], g), store(&out.v[i], tanh_<T>(p) * sigmoid<T>(g));
            }
            write8<WIDE>(y + row * n.H + c, out, count);
            if (!a) continue;
            write8<WIDE>(a + row * 2 * n.H + c, value, count);
            write8<WIDE>(a + row * 2 * n.H + n.H + c, gate, count);
        }
    }
}

// da, computed by dx itself: of both slots' frames and the halo after them, all 2H rows, into a tile of shared memory
// (chunks, SLOTS * rows, 32). The frames that are the block's own (`times` of each slot) go to da too, unless that is
// null. V channels at a time.
__device__ inline int place(int chunk_size, int r, int o) {
    return o / 32 * chunk_size + swizzle32(r, o % 32 / 8) + o % 8;
}
template <int V, class T>
__device__ inline void gate_tile(const Layer& n, const Slot& first, const Slot& second, int times, int rows,
                                 const T* dy, const T* a, T* da, T* tile) {
    using P = Pack<T, V>;
    const int size = SLOTS * rows * DEPTH4, groups = n.H / V,
              tail = (int)ceil_div(2LL * n.H, DEPTH4) * DEPTH4 - 2 * n.H;
    for (int p = threadIdx.x; p < SLOTS * rows * groups; p += THREADS) {
        const int c = p % groups * V, r = p / groups, t = (r < rows ? first.t0 : second.t0 - rows) + r;
        P value = {}, gate = {};
        if (t < n.T) {
            const long long row = (r < rows ? first.item : second.item) + t;
            value = *reinterpret_cast<const P*>(a + row * 2 * n.H + c);
            gate = *reinterpret_cast<const P*>(a + row * 2 * n.H + n.H + c);
            gate_gradient(value, gate, *reinterpret_cast<const P*>(dy + row * n.H + c));
            if (da && r % rows < times) {
                *reinterpret_cast<P*>(da + row * 2 * n.H + c) = value;
                *reinterpret_cast<P*>(da + row * 2 * n.H + n.H + c) = gate;
            }
        }
        *reinterpret_cast<P*>(tile + place(size, r, c)) = value;
        *reinterpret_cast<P*>(tile + place(size, r, n.H + c)) = gate;
    }
    for (int p = threadIdx.x; p < SLOTS * rows * tail; p += THREADS)  // the last chunk's rows behind 2H
        store(&tile[place(size, p / tail, 2 * n.H + p % tail)], 0.0f);
}

// dx. A warp: one slot's 16 M frames x 32 input channels: 16 M sums a lane. The sum runs over the rows of w, which lie
// across (input channels fastest): ldmatrix transposes them on the way.
// da is copied stage by stage; or, MERGED, computed once for all stages while the first weights arrive. Then the first
// column of blocks writes da and, as its part of dbias, the sum over its own frames.
// Grid: x = pairs of slots, y = tiles of 64 input channels.
template <class T, int M, bool MERGED> __global__ void __launch_bounds__(THREADS, 2)
    dx_v4(Layer n, int unit_g, int unit_w, bool wide, const T* dy, const T* a, T* da, float* parts, const T* w, T* dx) {
    const int halo = (n.K - 1) * n.dilation, rows = 16 * M + halo, chunks = (int)ceil_div(2LL * n.H, DEPTH4);
    const int g_size = SLOTS * rows * DEPTH4, w_size = n.K * DEPTH4 * CHANNELS4;
    SHARED(T, g_stages);  // two stages (or all, MERGED) of da (SLOTS, rows, 32), swizzled
    T* const w_stages = g_stages + (MERGED ? chunks : 2) * g_size;  // two of weights (K, 32, 64), swizzled
    const int tid = threadIdx.x, lane = tid % 32, slot = tid / 64, group = tid / 32 % 2, c0 = blockIdx.y * CHANNELS4;
    const Slot first(n, 16 * M, 0), second(n, 16 * M, 1), to = slot ? second : first;

    const auto load_stage = [&](int chunk) {
        T* const gs = g_stages + chunk % 2 * g_size;
        T* const ws = w_stages + chunk % 2 * w_size;
        for (int r = tid / 4; !MERGED && r < SLOTS * rows; r += THREADS / 4) {
            const int piece = tid % 4, o = chunk * DEPTH4 + piece * 8;
            const int t = (r < rows ? first.t0 : second.t0 - rows) + r;
            const long long row = (r < rows ? first.item : second.item) + t;
            copy_piece(gs + swizzle32(r, piece), da + row * 2 * n.H + o, t < n.T ? 2 * n.H - o : 0, unit_g);
        }
        for (int k = 0; k < n.K; ++k) {
#pragma unroll
            for (int i = 0; i < DEPTH4; i += THREADS / 8) {
                const int piece = tid % 8, row = i + tid / 8, o = chunk * DEPTH4 + row, c = c0 + piece * 8;
                copy_piece(ws + swizzle64(k * DEPTH4 + row, piece), w + (long long)(o * n.K + k) * n.C + c,
                           o < 2 * n.H ? n.C - c : 0, unit_w);
            }
        }
    };

    float sum[M][4][4] = {};  // (16 frames, 8 input channels, element of D)
    load_stage(0);
    if (MERGED) {
        T* const own = blockIdx.y == 0 ? da : nullptr;
        if (wide) gate_tile<8>(n, first, second, 16 * M, rows, dy, a, own, g_stages);
        else gate_tile<1>(n, first, second, 16 * M, rows, dy, a, own, g_stages);
    }
    for (int chunk = 0; chunk < chunks; ++chunk) {
        wait_for_copies();
        __syncthreads();
        if (chunk + 1 < chunks) load_stage(chunk + 1);
        const T* const gs = g_stages + (MERGED ? chunk : chunk % 2) * g_size;
        const T* const ws = w_stages + chunk % 2 * w_size;
        for (int k = 0; k < n.K; ++k) {
#pragma unroll
            for (int i = 0; i < DEPTH4; i += 16) {
                unsigned channels[2][4], frames[4];
#pragma unroll
                for (int j = 0; j < 2; ++j)
                    ldmatrix<true>(channels[j], ws + swizzle64(k * DEPTH4 + i + lane % 16,
                                                               group * 4 + 2 * j + lane / 16));
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    ldmatrix<false>(frames, gs + swizzle32(slot * rows + shift_of(n, k) + 16 * m + lane % 16,
                                                           i / 8 + lane / 16));
#pragma unroll
                    for (int j = 0; j < 4; ++j)
                        mma(T(), sum[m][j], frames, channels[j / 2][j % 2 * 2], channels[j / 2][j % 2 * 2 + 1]);
                }
            }
        }
    }

#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int e = 0; e < 4; e += 2) {
                const int t = to.t0 + 16 * m + lane / 4 + e * 4, c = c0 + group * 32 + 8 * j + lane % 4 * 2;
                if (t >= n.T || c >= n.C) continue;
                T* const out = dx + (to.item + t) * n.C + c;
                Pack<T, 2> pair;
                store(&pair.v[0], sum[m][j][e]), store(&pair.v[1], sum[m][j][e + 1]);
                if (n.C % 2 == 0) *reinterpret_cast<Pack<T, 2>*>(out) = pair;
                else {
                    out[0] = pair.v[0];
                    if (c + 1 < n.C) out[1] = pair.v[1];
                }
            }
        }
    }
    for (int o = tid; MERGED && blockIdx.y == 0 && o < 2 * n.H; o += THREADS) {
        float total = 0;
        for (int r = 0; r < SLOTS * 16 * M; ++r)
            total += load(g_stages[place(g_size, r / (16 * M) * rows + r % (16 * M), o)]);
        parts[(long long)blockIdx.x * 2 * n.H + o] = total;
    }
}

// dw. A block: 64 rows x 64 input channels of TAPS taps, which share the tile of x with its halo; a stage is up to 80
// frames of one batch item. Frames are summed over, so both operands lie across and ldmatrix transposes both. A warp:
// 32 rows x 32 channels x TAPS, 32 TAPS sums a lane. parts (splits, 2H, K, C).
// Grid: x = (row tile * channel tiles + channel tile) * (K / TAPS) + group of taps, y = splits.
constexpr int DW_TIMES = 80;
template <class T, int TAPS> __global__ void __launch_bounds__(THREADS, 2)
    dw_v4(Layer n, int splits, int unit_g, int unit_x, const T* da, const T* x, float* parts) {
    const int rows = DW_TIMES + (TAPS - 1) * n.dilation, stage_size = (DW_TIMES + rows) * 64;
    SHARED(T, stages);  // two stages of: da (80, 64), x (rows, 64), both swizzled
    const int tid = threadIdx.x, lane = tid % 32, row0 = tid / 64 * 32, col0 = tid / 32 % 2 * 32;
    const int tiles = (int)ceil_div(n.C, 64), groups = n.K / TAPS, k0 = blockIdx.x % groups * TAPS,
              c0 = (int)(blockIdx.x / groups % tiles) * 64, o0 = (int)(blockIdx.x / groups / tiles) * 64;
    const int per_item = (int)ceil_div(n.T, DW_TIMES);
    const Run run(n.B * per_item, splits);

    const auto load_stage = [&](int chunk) {
        T* const gs = stages + chunk % 2 * stage_size;
        T* const xs = gs + DW_TIMES * 64;
        const long long item = (long long)(chunk / per_item) * n.T;
        const int t0 = chunk % per_item * DW_TIMES, piece = tid % 8, o = o0 + piece * 8, c = c0 + piece * 8;
        for (int r = tid / 8; r < DW_TIMES; r += THREADS / 8)
            copy_piece(gs + swizzle64(r, piece), da + (item + t0 + r) * 2 * n.H + o, t0 + r < n.T ? 2 * n.H - o : 0,
                       unit_g);
        for (int r = tid / 8; r < rows; r += THREADS / 8) {
            const int t = t0 + r - shift_of(n, k0);
            copy_piece(xs + swizzle64(r, piece), x + (item + t) * n.x_row + c, t >= 0 && t < n.T ? n.C - c : 0, unit_x);
        }
    };

    float sum[TAPS][2][4][4] = {};  // (tap, 16 rows, 8 channels, element of D)
    if (run.first < run.end) load_stage(run.first);
    for (int chunk = run.first; chunk < run.end; ++chunk) {
        wait_for_copies();
        __syncthreads();
        if (chunk + 1 < run.end) load_stage(chunk + 1);
        const T* const gs = stages + chunk % 2 * stage_size;
        const T* const xs = gs + DW_TIMES * 64;
        const int left = n.T - chunk % per_item * DW_TIMES;
        for (int t = 0; t < DW_TIMES && t < left; t += 16) {
            unsigned g[2][4], v[4];
#pragma unroll
            for (int m = 0; m < 2; ++m)
                ldmatrix<true>(g[m], gs + swizzle64(t + lane % 8 + lane / 16 * 8,
                                                    (row0 + 16 * m) / 8 + lane / 8 % 2));
#pragma unroll
            for (int tap = 0; tap < TAPS; ++tap) {
#pragma unroll
                for (int j = 0; j < 4; j += 2) {
                    ldmatrix<true>(v, xs + swizzle64(t + tap * n.dilation + lane % 16, col0 / 8 + j + lane / 16));
#pragma unroll
                    for (int m = 0; m < 2; ++m) {
                        mma(T(), sum[tap][m][j], g[m], v[0], v[1]);
                        mma(T(), sum[tap][m][j + 1], g[m], v[2], v[3]);
                    }
                }
            }
        }
    }
#pragma unroll
    for (int tap = 0; tap < TAPS; ++tap) {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int o = o0 + row0 + 16 * m + lane / 4 + e / 2 * 8,
                              c = c0 + col0 + 8 * j + lane % 4 * 2 + e % 2;
                    if (o >= 2 * n.H || c >= n.C) continue;
                    parts[(((long long)blockIdx.y * 2 * n.H + o) * n.K + k0 + tap) * n.C + c] = sum[tap][m][j][e];
                }
            }
        }
    }
}

// Blocks that fill a GPU; where fewer would be left, tiles are shorter or another version takes over.
#ifndef FULL_BLOCKS
#define FULL_BLOCKS 96  // tests take fewer, so that small shapes have long tiles too
#endif
#include "hopper.cu"  // version 5

// ==== Launchers ======================================================================================================
// Return nullptr, or what went wrong in words. Every launch goes to the caller's stream and is followed by a check;
// none allocates or waits. A grid of no blocks is an error in CUDA, so empty tensors launch nothing.
constexpr long long EVERY_GPU = 48 * 1024;   // bytes of shared memory that every GPU gives a block without asking
constexpr long long SM_80_ON = 99 * 1024;    // and, asked, every GPU with the tensor cores of version 4
inline dim3 blocks_for(long long size, int block) { return dim3((unsigned)ceil_div(size, block)); }

inline long long shared_v2(const Layer& n, int element) {
    return (1LL * n.K * 2 * SIDE + tile_rows<SIDE>(n)) * STRIDE2 * element;
}
inline long long shared_v3(const Layer& n, int element) {
    return (1LL * n.K * DEPTH * STRIDE + DEPTH * tile_stride(n)) * element;
}
inline long long shared_forward_v4(const Layer& n, int M) {
    const long long rows = 16 * M + (n.K - 1LL) * n.dilation;
    return 2 * 2 * DEPTH4 * (SLOTS * rows + 2LL * n.K * PAIRS4);
}
inline long long shared_dx_v4(const Layer& n, int M, bool merged) {
    const long long rows = 16 * M + (n.K - 1LL) * n.dilation, stages = merged ? ceil_div(2LL * n.H, DEPTH4) : 2;
    return 2 * DEPTH4 * (stages * SLOTS * rows + 2LL * n.K * CHANNELS4);
}
inline long long shared_dw_v4(const Layer& n, int taps) {
    return 2 * 2 * 64 * (2LL * DW_TIMES + (taps - 1LL) * n.dilation);
}

// 16 M frames a slot: 80 where that fits and leaves enough blocks to fill a GPU. The order of the sums is the same.
inline bool long_tiles(const Layer& n) {
    return ceil_div(n.B * ceil_div(n.T, 80), SLOTS) * ceil_div(n.H, PAIRS4) >= FULL_BLOCKS &&
           shared_forward_v4(n, 5) <= SM_80_ON;  // dx and dw need less
}
inline long long pairs_of_slots(const Layer& n) {
    return ceil_div(n.B * ceil_div(n.T, long_tiles(n) ? 80 : 16), SLOTS);
}
// Whether dx of version 4 computes da. dx reads each number of da R times: once for every tile of 64 input channels,
// and the halo again. In units of B T H numbers, a pass of its own for the gate moves 3 in (a, dy) and 2 out (da), then
// dx reads 2 R: 5 + 2 R. Merged: 3 R in, 2 out. So merged is less where R < 3 and the tile of all da fits.
#ifndef MERGE_BELOW
#define MERGE_BELOW 3  // tests take both ways
#endif
inline bool merges_gate(int version, const Layer& n) {
    const int M = long_tiles(n) ? 5 : 1;
    const long long rows = 16 * M + (n.K - 1LL) * n.dilation;
    return version == 4 && (long long)n.B * n.T * n.C > 0 && ceil_div(n.C, CHANNELS4) * rows < MERGE_BELOW * 16 * M &&
           shared_dx_v4(n, M, true) <= SM_80_ON;
}
// How many taps a block of dw_v4 takes: as many as share a tile of x no longer than the halo it is for.
inline int dw_taps(const Layer& n) {
    return n.dilation > DW_TIMES / 2 ? 1 : n.K % 3 == 0 ? 3 : n.K % 2 == 0 ? 2 : 1;
}
inline int splits_of(int version, const Layer& n) {
    if (version == 5) return dw_splits_v5(n);
    if (version == 4)
        return dw_splits(n, ceil_div(2LL * n.H, 64) * ceil_div(n.C, 64) * (n.K / dw_taps(n)), DW_TIMES);
    return version == 3 ? dw_splits(n, ceil_div(2LL * n.H, ROWS) * ceil_div(n.C, ROWS) * n.K, DW_DEPTH) : 0;
}

// The bytes that every row of `row` 16-bit numbers, from p on, is aligned to: 16, 8, 4 or 2.
inline int alignment_of(const void* p, long long row) {
    const unsigned long long bits = (unsigned long long)(uintptr_t)p | (unsigned long long)row * 2 | 16;
    return (int)(bits & -bits);
}

// Blocks of gate_backward: `lanes` groups of V channels, and the runs of frames that become parts of dbias.
inline int gate_lanes(const Layer& n, int V) {
    int lanes = 32;
    while (lanes > 1 && lanes / 2 * V >= n.H) lanes /= 2;
    return lanes;
}
inline long long gate_runs(const Layer& n, int V) {
    return ceil_div((long long)n.B * n.T, GATE_THREADS / gate_lanes(n, V) * GATE_RUN);
}
template <class T> inline bool gate_is_wide(const Layer& n, int V, const T* dy, const T* a) {
    return n.H % V == 0 && (uintptr_t)dy % 16 == 0 && (uintptr_t)a % 16 == 0;
}

// Was version 4 compiled for, and can this device run, these tensor cores? (PTX made for sm_75 would only trap.)
static bool has_tensor_cores() {
#ifdef __CUDACC__
    cudaFuncAttributes compiled;
    if (cudaFuncGetAttributes(&compiled, dw_v4<__nv_bfloat16, 1>) == cudaSuccess) return compiled.ptxVersion >= 80;
    cudaGetLastError();  // or the next launch would be blamed
    return false;
#else
    return true;
#endif
}

static const char* check(const Layer& n) {
    const double channels = n.C > 2.0 * n.H ? n.C : 2.0 * n.H, blocks = 2147483647.0;
    if (n.B < 0 || n.C < 0 || n.H < 0 || n.T < 0) return "a size is negative";
    if (n.K < 1 || n.dilation < 1) return "kernel size and dilation must be at least 1";
    if (channels > 65535 * SIDE) return "more than 1,048,560 channels";
    if (n.T > 1 << 29 || (n.K - 1.0) * n.dilation > 1 << 29)
        return "frames or (kernel size - 1) * dilation exceed 2^29";
    if (n.B * (n.T / 16 + 1.0) > blocks || n.B * (double)n.T * channels / 32 > blocks ||
        channels * n.C * n.K / 32 > blocks)
        return "a launch needs more than 2^31 - 1 blocks";
    return nullptr;
}

template <class T, int M, bool WIDE>
static const char* run_forward_v4(const Layer& n, const T* x, const T* w, const T* bias, const T* cond, T* y, T* a,
                                  void* stream) {
    const dim3 grid((unsigned)ceil_div(n.B * ceil_div(n.T, 16 * M), SLOTS), (unsigned)ceil_div(n.H, PAIRS4));
    LAUNCH((forward_v4<T, M, WIDE>), grid, dim3(THREADS), shared_forward_v4(n, M), stream, n, alignment_of(x, n.x_row),
           alignment_of(w, n.C), x, w, bias, cond, y, a);
    return nullptr;
}

template <class T>
static const char* run_forward(int version, const Layer& n, const T* x, const T* w, const T* bias, const T* cond, T* y,
                               T* a, void* stream) {
    if (const char* problem = check(n)) return problem;
    const long long outputs = (long long)n.B * n.T * n.H;
    const int element = sizeof(Sum<T>);
    if (outputs == 0) return nullptr;
    if (version == 1)
        LAUNCH(forward_v1<T>, blocks_for(outputs, 128), dim3(128), 0, stream, n, x, w, bias, cond, y, a);
    if (version == 2) {
        const dim3 grid((unsigned)(n.B * ceil_div(n.T, SIDE)), (unsigned)ceil_div(n.H, SIDE));
        LAUNCH(forward_v2<T>, grid, dim3(SIDE * SIDE), shared_v2(n, element), stream, n, x, w, bias, cond, y, a);
    }
    if (version == 3) {
        const dim3 grid((unsigned)(n.B * ceil_div(n.T, TIMES)), (unsigned)ceil_div(n.H, HALF));
        LAUNCH(forward_v3<T>, grid, dim3(THREADS), shared_v3(n, element), stream, n, x, w, bias, cond, y, a);
    }
    if constexpr (IS_16_BIT<T>) {
        const bool wide = n.H % 8 == 0 && (!cond || alignment_of(cond, n.cond_row) == 16);
        if (version == 4 && wide)
            return long_tiles(n) ? run_forward_v4<T, 5, true>(n, x, w, bias, cond, y, a, stream)
                                 : run_forward_v4<T, 1, true>(n, x, w, bias, cond, y, a, stream);
        if (version == 4)
            return long_tiles(n) ? run_forward_v4<T, 5, false>(n, x, w, bias, cond, y, a, stream)
                                 : run_forward_v4<T, 1, false>(n, x, w, bias, cond, y, a, stream);
        if (version == 5)
            return times_v5(n) == 80 ? run_forward_v5<T, 80>(n, x, w, bias, cond, y, a, stream)
                                     : run_forward_v5<T, 64>(n, x, w, bias, cond, y, a, stream);
    }
    return nullptr;
}

// da, and parts of dbias: `runs` of them.
template <class T>
static const char* run_gate(const Layer& n, const T* dy, const T* a, T* da, Sum<T>* parts, int& runs, void* stream) {
    constexpr int V = WIDE<T>;
    const bool wide = gate_is_wide(n, V, dy, a);
    const int lanes = gate_lanes(n, V), one = gate_lanes(n, 1), rows = GATE_THREADS / (wide ? lanes : one);
    const long long bytes = 2LL * GATE_THREADS * (wide ? V : 1) * sizeof(Sum<T>);
    runs = (int)gate_runs(n, wide ? V : 1);
    if (runs > 0 && wide)
        LAUNCH((gate_backward<T, V>), dim3((unsigned)runs, (unsigned)ceil_div(n.H, lanes * V)), dim3(lanes, rows),
               bytes, stream, n, dy, a, da, parts);
    if (runs > 0 && !wide)
        LAUNCH((gate_backward<T, 1>), dim3((unsigned)runs, (unsigned)ceil_div(n.H, one)), dim3(one, rows), bytes,
               stream, n, dy, a, da, parts);
    return nullptr;
}

template <class T, int M, bool MERGED>
static const char* run_dx_v4(const Layer& n, const T* dy, const T* a, T* da, float* parts, const T* w, T* dx,
                             void* stream) {
    const dim3 grid((unsigned)pairs_of_slots(n), (unsigned)ceil_div(n.C, CHANNELS4));
    LAUNCH((dx_v4<T, M, MERGED>), grid, dim3(THREADS), shared_dx_v4(n, M, MERGED), stream, n,
           alignment_of(da, 2LL * n.H), alignment_of(w, n.C), gate_is_wide(n, WIDE<T>, dy, a), dy, a, da, parts, w, dx);
    return nullptr;
}

template <class T, int TAPS>
static const char* run_dw_v4(const Layer& n, const T* da, const T* x, float* parts, void* stream) {
    const int splits = splits_of(4, n);
    const dim3 grid((unsigned)(ceil_div(2LL * n.H, 64) * ceil_div(n.C, 64) * (n.K / TAPS)), splits);
    LAUNCH((dw_v4<T, TAPS>), grid, dim3(THREADS), shared_dw_v4(n, TAPS), stream, n, splits,
           alignment_of(da, 2LL * n.H), alignment_of(x, n.x_row), da, x, parts);
    return nullptr;
}

template <class T>
static const char* run_dx(int version, const Layer& n, const T* dy, const T* a, T* da, Sum<T>* parts, const T* w,
                          T* dx, void* stream) {
    const int element = sizeof(Sum<T>);
    if (version == 1)
        LAUNCH(dx_v1<T>, blocks_for((long long)n.B * n.T * n.C, 128), dim3(128), 0, stream, n, (const T*)da, w, dx);
    if (version == 2) {
        const dim3 grid((unsigned)(n.B * ceil_div(n.T, SIDE)), (unsigned)ceil_div(n.C, SIDE));
        LAUNCH(dx_v2<T>, grid, dim3(SIDE * SIDE), shared_v2(n, element), stream, n, (const T*)da, w, dx);
    }
    if (version == 3) {
        const dim3 grid((unsigned)(n.B * ceil_div(n.T, TIMES)), (unsigned)ceil_div(n.C, ROWS));
        LAUNCH(dx_v3<T>, grid, dim3(THREADS), shared_v3(n, element), stream, n, (const T*)da, w, dx);
    }
    if constexpr (IS_16_BIT<T>) {
        if (version == 4 && merges_gate(4, n))
            return long_tiles(n) ? run_dx_v4<T, 5, true>(n, dy, a, da, parts, w, dx, stream)
                                 : run_dx_v4<T, 1, true>(n, dy, a, da, parts, w, dx, stream);
        if (version == 4)
            return long_tiles(n) ? run_dx_v4<T, 5, false>(n, dy, a, da, parts, w, dx, stream)
                                 : run_dx_v4<T, 1, false>(n, dy, a, da, parts, w, dx, stream);
        if (version == 5)
            return times_v5(n) == 80 ? run_dx_v5<T, 80>(n, da, w, dx, stream) : run_dx_v5<T, 64>(n, da, w, dx, stream);
    }
    return nullptr;
}

template <class T>
static const char* run_dw(int version, const Layer& n, const T* da, const T* x, T* dw, Sum<T>* parts, void* stream) {
    const long long weights = 2LL * n.H * n.K * n.C;
    const int splits = splits_of(version, n), element = sizeof(Sum<T>);
    if (version == 1) LAUNCH(dw_v1<T>, blocks_for(weights, 128), dim3(128), 0, stream, n, da, x, dw);
    if (version == 2)
        LAUNCH(dw_v2<T>, dim3((unsigned)(ceil_div(2LL * n.H, SIDE) * ceil_div(n.C, SIDE) * n.K)), dim3(SIDE * SIDE),
               2 * SIDE * STRIDE2 * element, stream, n, da, x, dw);
    if (version < 3) return nullptr;
    if (version == 3)
        LAUNCH(dw_v3<T>, dim3((unsigned)(ceil_div(2LL * n.H, ROWS) * ceil_div(n.C, ROWS) * n.K), splits), dim3(THREADS),
               2 * DW_DEPTH * STRIDE * element, stream, n, splits, da, x, parts);
    if constexpr (IS_16_BIT<T>) {
        const int taps = dw_taps(n);
        const char* problem = version < 4 ? nullptr
                              : version == 5 ? (times_v5(n) == 80 ? run_dw_v5<T, 80>(n, da, x, parts, stream)
                                                                  : run_dw_v5<T, 64>(n, da, x, parts, stream))
                              : taps == 3 ? run_dw_v4<T, 3>(n, da, x, parts, stream)
                              : taps == 2 ? run_dw_v4<T, 2>(n, da, x, parts, stream)
                                          : run_dw_v4<T, 1>(n, da, x, parts, stream);
        if (problem) return problem;
    }
    return nullptr;
}

// The workspace: parts of dbias, then parts of dw. Elements of the first.
inline long long dbias_parts(int version, const Layer& n) {
    return n.H > 0 ? 2LL * n.H * (merges_gate(version, n) ? pairs_of_slots(n) : gate_runs(n, 1)) : 0;
}

template <class T>
static const char* run_backward(int version, const Layer& n, const T* dy, const T* a, const T* x, const T* w, T* da,
                                T* dx, T* dw, T* dbias, void* workspace, void* stream) {
    if (const char* problem = check(n)) return problem;
    Sum<T>*const of_dbias = static_cast<Sum<T>*>(workspace), *const of_dw = of_dbias + dbias_parts(version, n);
    const char* problem = nullptr;
    int runs = (int)pairs_of_slots(n);
    if (n.H > 0 && !merges_gate(version, n)) problem = run_gate(n, dy, a, da, of_dbias, runs, stream);
    if (!problem && (long long)n.B * n.T * n.C > 0) problem = run_dx(version, n, dy, a, da, of_dbias, w, dx, stream);
    if (!problem && (long long)n.H * n.C > 0) problem = run_dw(version, n, da, x, dw, of_dw, stream);
    if (problem || n.H == 0) return problem;
    const long long weights = version < 3 ? 0 : 2LL * n.H * n.K * n.C;  // versions 1 and 2 have no parts of dw
    const Parts<T> for_dbias{of_dbias, runs, 2LL * n.H, dbias}, for_dw{of_dw, splits_of(version, n), weights, dw};
    const int blocks = (int)ceil_div(2 * n.H, OWN * FEW_LANES);
    LAUNCH(sum_parts<T>, dim3((unsigned)(blocks + ceil_div(weights, OWN * MANY_LANES))), dim3(256),
           256 * OWN * sizeof(Sum<T>), stream, for_dbias, for_dw, blocks);
    return nullptr;
}

// The C interface of gated_conv.h. GATED_CONV_DTYPES may name fewer types for a quicker build.
#ifndef GATED_CONV_DTYPES
#define GATED_CONV_DTYPES(CASE) CASE(0, float) CASE(1, double) CASE(2, __half) CASE(3, __nv_bfloat16)
#endif

extern "C" const char* gated_conv_forward(int dtype, int version, const Layer* n, const void* x, const void* w,
                                          const void* bias, const void* cond, void* y, void* a, void* stream) {
#define CASE(code, T) \
    if (dtype == code) \
        return run_forward<T>(version, *n, (const T*)x, (const T*)w, (const T*)bias, (const T*)cond, (T*)y, (T*)a, \
                              stream);
    GATED_CONV_DTYPES(CASE)
#undef CASE
    return "dtype must be float32, float64, float16 or bfloat16";
}

extern "C" const char* gated_conv_backward(int dtype, int version, const Layer* n, const void* dy, const void* a,
                                           const void* x, const void* w, void* da, void* dx, void* dw, void* dbias,
                                           void* workspace, void* stream) {
#define CASE(code, T) \
    if (dtype == code) \
        return run_backward<T>(version, *n, (const T*)dy, (const T*)a, (const T*)x, (const T*)w, (T*)da, (T*)dx, \
                               (T*)dw, (T*)dbias, workspace, stream);
    GATED_CONV_DTYPES(CASE)
#undef CASE
    return "dtype must be float32, float64, float16 or bfloat16";
}

extern "C" int gated_conv_version(int dtype, int version, const Layer* n) {
    const int element = dtype == 1 ? 8 : 4;
    const bool fits[6] = {false, true, shared_v2(*n, element) <= EVERY_GPU, shared_v3(*n, element) <= EVERY_GPU,
                          dtype >= 2 && shared_forward_v4(*n, 1) <= SM_80_ON && has_tensor_cores(),
                          dtype >= 2 && fits_v5(*n) && has_hopper()};
    for (int best = fits[5] && is_worth_v5(*n) ? 5 : 4; version == 0; --best) {
        if (fits[best]) return best;
    }
    return version > 0 && version < 6 && fits[version] ? version : 0;
}

extern "C" long long gated_conv_workspace(int version, const Layer* n) {
    return dbias_parts(version, *n) + 2LL * n->H * n->K * n->C * splits_of(version, *n);
}
