// ==== Version 5: Hopper ==============================================================================================
// Part of gated_conv.cu, after version 4. There every thread copied, addressed and multiplied; here (hopper.h) one
// thread names boxes that TMA copies, and one instruction, wgmma, has a warpgroup of 128 threads multiply 64 x 16 by
// 16 x N numbers straight from shared memory. What is left to write is who waits for whom.
//
//   zero fill  a tap is the same box of x, some frames earlier. Frames before 0 and after T are outside the tensor, so
//              they arrive as zeros: that is the causal padding, for any dilation, without a comparison. The epilogue
//              has none either: what lies outside y is not written.
//   ring       the stages of shared memory go round. Each has two mbarriers: `full`, whose phase the bytes of its boxes
//              end, and `empty`, whose phase the 8 warps end that have multiplied it. The block never meets as a whole.
//   roles      a block is three warpgroups. One thread of the last feeds the ring; the others multiply, wait only for
//              their next stage, and get its registers (setmaxnreg moves them by whole warpgroups, hence its size).
//   D          has channels as rows and frames as columns: N may be 2 x 80, so T = 80 wastes nothing, and a channel's
//              value and gate meet in one thread's registers. stmatrix turns D round on its way to shared memory, from
//              where TMA takes a and y; cond came that way.
//
// Rows must be multiples of 16 bytes, so C and H (and the rows of slices) multiples of 8: version 4 takes the others.
#include "hopper.h"
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HOPPER  // elsewhere these kernels are empty, and has_hopper() says so
#endif

constexpr int THREADS5 = 384, PRODUCER = 256;           // two warpgroups multiply, then one thread that copies
constexpr int DEPTH5 = 64, CHANNELS5 = 128, ITEMS = 2;  // a row of channels; a block's channels and batch items
constexpr int SHARED5 = 227 * 1024;                     // bytes that Hopper gives a block

// The ring: as many stages of BYTES as fit. The producer fills them in turn, the warps of two warpgroups empty them in
// turn; each keeps its own place. On round n a reader waits for phase n of `full`, the producer for phase n - 1 of
// `empty`, of the other parity: on the first round that has always ended.
template <int BYTES> struct Ring {
    static constexpr int FIT = (SHARED5 - ATOM) / (BYTES + 2 * (int)sizeof(Barrier)), STAGES = FIT < 8 ? FIT : 8;
    static_assert(STAGES >= 3, "two more are handed out after the last product");
    static constexpr int SHARED_BYTES = ATOM + STAGES * (BYTES + 2 * (int)sizeof(Barrier));
    unsigned char* stages;
    Barrier *full, *empty;
    int stage = 0;
    unsigned parity = 0;

    __device__ explicit Ring(unsigned char* shared) {
        stages = shared + (ATOM - shared_address(shared) % ATOM) % ATOM;
        full = reinterpret_cast<Barrier*>(stages + STAGES * BYTES);
        empty = full + STAGES;
        if (threadIdx.x == 0) {
            for (int i = 0; i < STAGES; ++i) barrier_init(full + i, 1), barrier_init(empty + i, PRODUCER / 32);
            fence_async();  // TMA shall see them
        }
        __syncthreads();
    }
    __device__ void next() {
        if (++stage < STAGES) return;
        stage = 0;
        parity ^= 1;
    }
    // The producer: waits until the stage is free, announces `bytes` of boxes; `load` puts each behind the last.
    __device__ void refill(int bytes) {
        barrier_wait(empty + stage, parity ^ 1);
        barrier_expect(full + stage, bytes);
    }
    __device__ void load(int offset, const CUtensorMap& map, int i, int j, int k, int l) {
        tma_load(stages + stage * BYTES + offset, map, full + stage, i, j, k, l);
    }
    // A reader: the stage, once it has arrived.
    __device__ unsigned char* filled() {
        barrier_wait(full + stage, parity);
        return stages + stage * BYTES;
    }
    // `steps` stages, each handed to `multiply`, which issues products. While one stage's are under way the next one's
    // are issued; when only those are left, the stage before may be overwritten. (The last is not freed: with at least
    // three stages nobody comes to it again.)
    template <class F> __device__ void multiply_each(int steps, F multiply) {
        int before = 0;
        for (int i = 0; i < steps; ++i) {
            const unsigned char* const in = filled();
            wgmma_fence();
            multiply(in);
            wgmma_commit();
            wgmma_wait<1>();
            if (i > 0 && threadIdx.x % 32 == 0) barrier_arrive(empty + before);
            before = stage;
            next();
        }
        wgmma_wait<0>();
    }
};

// ---- Tiles: D turned round, a row of 64 channels for each frame, as TMA moves it
// Of warp w's 16 channels, an ldmatrix or stmatrix moves 16 frames, from 8 j on: matrix m has frames 8 (m / 2) on and
// channels 8 (m % 2) on. This is where lane l finds its row, l % 8 of matrix l / 8.
template <class T> __device__ inline T* row_in_tile(unsigned char* tile, int j) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    return reinterpret_cast<T*>(tile) + swizzle64(8 * (j + lane / 16) + lane % 8, 2 * warp + lane / 8 % 2);
}
template <class T, int R> __device__ inline void add_tile(float (&d)[R], unsigned char* tile) {
#pragma unroll
    for (int j = 0; j < R / 4; j += 2) {
        unsigned r[4];
        ldmatrix<true>(r, row_in_tile<T>(tile, j));
#pragma unroll
        for (int m = 0; m < 4; ++m) {
            const auto pair = reinterpret_cast<const Pack<T, 2>&>(r[m]);
            d[4 * j + 2 * m] += load(pair.v[0]), d[4 * j + 2 * m + 1] += load(pair.v[1]);
        }
    }
}
template <class T, int R> __device__ inline void put_tile(unsigned char* tile, const float (&d)[R]) {
#pragma unroll
    for (int j = 0; j < R / 4; j += 2) {
        unsigned r[4];
#pragma unroll
        for (int m = 0; m < 4; ++m) {
            Pack<T, 2> pair;
            store(&pair.v[0], d[4 * j + 2 * m]), store(&pair.v[1], d[4 * j + 2 * m + 1]);
            r[m] = reinterpret_cast<const unsigned&>(pair);
        }
        stmatrix_transposed(row_in_tile<T>(tile, j), r);
    }
}
// Between the threads' stores and TMA: everyone's fence, then all meet. True in the thread that may ask TMA now.
__device__ inline bool tile_is_whole(int group) {
    fence_async();
    sync_warpgroup(1 + group);
    return threadIdx.x % 128 == 0;
}

// ---- Forward
// A block: 128 channels and their gates (D's 256 rows) x TIMES frames of two batch items. Warpgroup g: 64 values, their
// 64 gates, N = 2 TIMES columns: TIMES sums twice over in a thread's registers. A stage: 64 input channels of one tap,
// weights (2, 128, 64) and x (2, TIMES, 64). After the last one each warpgroup is given one more, with cond in it.
// Grid: x = pairs of items * tiles of frames, y = tiles of 128 channels.
// Global reads per y at TIMES = 80: K C / 128 of x, K C / 80 of w: 6 + 9.6 at C = 256, K = 3, mostly from L2.
template <int TIMES> constexpr int TILE5 = ITEMS * TIMES * ROW;  // bytes: 64 channels of a block's frames
template <int TIMES> using ForwardRing = Ring<2 * CHANNELS5 * ROW + TILE5<TIMES>>;
template <class T, int TIMES>
__global__ void __launch_bounds__(THREADS5, 1)
    forward_v5(Layer n, bool has_cond, bool save, const CUtensorMap __grid_constant__ x,
               const CUtensorMap __grid_constant__ w, const CUtensorMap __grid_constant__ cond,
               const CUtensorMap __grid_constant__ y, const CUtensorMap __grid_constant__ a, const T* bias) {
#ifdef HOPPER
    constexpr int N = ITEMS * TIMES, TILE = TILE5<TIMES>, W = 2 * CHANNELS5 * ROW;
    SHARED(unsigned char, shared);
    ForwardRing<TIMES> ring(shared);
    const int group = threadIdx.x / 128, tiles = (int)ceil_div(n.T, TIMES), steps = (int)ceil_div(n.C, DEPTH5) * n.K;
    const int t0 = (int)(blockIdx.x % tiles) * TIMES, b0 = (int)(blockIdx.x / tiles) * ITEMS,
              c0 = blockIdx.y * CHANNELS5;
    if (group == 2) {
        fewer_registers<24>();
        if (threadIdx.x == PRODUCER) {
            for (int i = 0; i < steps; ++i, ring.next()) {
                const int k = i % n.K, d0 = i / n.K * DEPTH5;
                ring.refill(W + TILE);
                ring.load(0, w, d0, k, c0, 0);
                ring.load(W, x, d0, t0 - shift_of(n, k), b0, 0);
            }
            for (int g = 0; g < 2; ++g, ring.next()) {
                ring.refill(has_cond ? 2 * TILE : 0);
                if (!has_cond) continue;
                ring.load(0, cond, c0 + 64 * g, t0, b0, 0);
                ring.load(TILE, cond, n.H + c0 + 64 * g, t0, b0, 0);
            }
        }
    } else {
        more_registers<240>();
        const int c1 = c0 + 64 * group, c = c1 + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
        float own_bias[2][2];      // (half, channel c or c + 8)
        float sum[2][N / 2] = {};  // (half, of 8 columns two of channel c, two of channel c + 8)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int half = i / 2, channel = c + i % 2 * 8;
            own_bias[half][i % 2] = bias && channel < n.H ? load(bias[half * n.H + channel]) : 0.0f;
        }
        in_registers(sum[0]), in_registers(sum[1]);
        ring.multiply_each(steps, [&](const unsigned char* in) {
#pragma unroll
            for (int k = 0; k < ROW; k += 32) {  // 16 channels: 32 bytes on in every row
                const uint64_t frames = descriptor(in + W + k);
                wgmma<false, false>(T(), sum[0], descriptor(in + 64 * group * ROW + k), frames);
                wgmma<false, false>(T(), sum[1], descriptor(in + (CHANNELS5 + 64 * group) * ROW + k), frames);
            }
        });
        in_registers(sum[0]), in_registers(sum[1]);
        if (group == 1) ring.next();
        unsigned char* const tile = ring.filled();  // this warpgroup's own from now on
#pragma unroll
        for (int i = 0; i < N; ++i) sum[i / (N / 2)][i % (N / 2)] += own_bias[i / (N / 2)][i / 2 % 2];
        if (has_cond) add_tile<T>(sum[0], tile), add_tile<T>(sum[1], tile + TILE);
        if (save) {
            put_tile<T>(tile, sum[0]), put_tile<T>(tile + TILE, sum[1]);
            if (tile_is_whole(group)) tma_store(a, tile, c1, 0, t0, b0), tma_store(a, tile + TILE, c1, 1, t0, b0);
        }
#pragma unroll
        for (int i = 0; i < N / 2; ++i) sum[0][i] = tanh_<T>(sum[0][i]) * sigmoid<T>(sum[1][i]);
        if (save) {
            if (threadIdx.x % 128 == 0) tma_store_wait();
            sync_warpgroup(1 + group);  // a has left the tile
        }
        put_tile<T>(tile, sum[0]);
        if (tile_is_whole(group)) {
            tma_store(y, tile, c1, t0, b0, 0);
            tma_store_wait();
        }
    }
#endif
}

// ---- dx
// A block: 128 input channels x TIMES frames of two items; warpgroup g: 64 of them, TIMES sums a thread. The sum runs
// over the rows of w, which lie across: its boxes, 64 rows o of 64 channels, are read ACROSS. A stage: two of those and
// da (2, TIMES, 64), later by the shift that forward looked back. Grid: x as above, y = tiles of 128 input channels.
template <int TIMES> using DxRing = Ring<2 * DEPTH5 * ROW + TILE5<TIMES>>;
template <class T, int TIMES>
__global__ void __launch_bounds__(THREADS5, 1)
    dx_v5(Layer n, const CUtensorMap __grid_constant__ da, const CUtensorMap __grid_constant__ w,
          const CUtensorMap __grid_constant__ dx) {
#ifdef HOPPER
    constexpr int N = ITEMS * TIMES, TILE = TILE5<TIMES>, W = DEPTH5 * ROW;
    SHARED(unsigned char, shared);
    DxRing<TIMES> ring(shared);
    const int group = threadIdx.x / 128, tiles = (int)ceil_div(n.T, TIMES);
    const int t0 = (int)(blockIdx.x % tiles) * TIMES, b0 = (int)(blockIdx.x / tiles) * ITEMS,
              c0 = blockIdx.y * CHANNELS5;
    const int steps = (int)ceil_div(2LL * n.H, DEPTH5) * n.K;
    if (group == 2) {
        if (threadIdx.x == PRODUCER) {
            for (int i = 0; i < steps; ++i, ring.next()) {
                const int k = i % n.K, o = i / n.K * DEPTH5;
                ring.refill(2 * W + TILE);
                ring.load(0, w, c0, k, o, 0);
                ring.load(W, w, c0 + 64, k, o, 0);
                ring.load(2 * W, da, o, t0 + shift_of(n, k), b0, 0);
            }
            for (int g = 0; g < 2; ++g, ring.next()) ring.refill(0);  // for the warpgroups' tiles
        }
    } else {
        float sum[N / 2] = {};
        in_registers(sum);
        ring.multiply_each(steps, [&](const unsigned char* in) {
#pragma unroll
            for (int k = 0; k < 4; ++k)  // 16 rows of w: 16 ROW bytes on; of da: 32 bytes on in every row
                wgmma<true, false>(T(), sum, descriptor(in + group * W + k * 16 * ROW),
                                   descriptor(in + 2 * W + k * 32));
        });
        in_registers(sum);
        if (group == 1) ring.next();
        unsigned char* const tile = ring.filled();
        put_tile<T>(tile, sum);
        if (tile_is_whole(group)) {
            tma_store(dx, tile, c0 + 64 * group, t0, b0, 0);
            tma_store_wait();
        }
    }
#endif
}

// ---- dw
// A block: 128 rows of da (64 a warpgroup) x 64 input channels of TAPS taps, N = 64 TAPS: 32 TAPS sums a thread. The
// sum runs over frames, so both operands are read ACROSS. A stage: TIMES frames of one item, two boxes of da and for
// each tap its box of x, one box on: with that as the leading stride one wgmma serves all taps. (Where K is no multiple
// of TAPS, the last block's extra taps look ahead and are not written.)
// Grid: x = (row tile * channel tiles + channel tile) * groups of taps + group, y = splits. parts (splits, 2H, K, C).
template <int TIMES, int TAPS> using DwRing = Ring<(2 + TAPS) * TIMES * ROW>;
template <class T, int TIMES, int TAPS>
__global__ void __launch_bounds__(THREADS5, 1) dw_v5(Layer n, int splits, const CUtensorMap __grid_constant__ da,
                                                     const CUtensorMap __grid_constant__ x, float* parts) {
#ifdef HOPPER
    constexpr int BOX = TIMES * ROW;
    SHARED(unsigned char, shared);
    DwRing<TIMES, TAPS> ring(shared);
    const int group = threadIdx.x / 128, groups = (int)ceil_div(n.K, TAPS), tiles = (int)ceil_div(n.C, DEPTH5);
    const int k0 = blockIdx.x % groups * TAPS, c0 = (int)(blockIdx.x / groups % tiles) * DEPTH5,
              o0 = (int)(blockIdx.x / groups / tiles) * CHANNELS5, per_item = (int)ceil_div(n.T, TIMES);
    const Run run(n.B * per_item, splits);
    if (group == 2) {
        if (threadIdx.x == PRODUCER) {
            for (int chunk = run.first; chunk < run.end; ++chunk, ring.next()) {
                const int t0 = chunk % per_item * TIMES, b = chunk / per_item;
                ring.refill((2 + TAPS) * BOX);
                ring.load(0, da, o0, t0, b, 0);
                ring.load(BOX, da, o0 + 64, t0, b, 0);
                for (int tap = 0; tap < TAPS; ++tap)
                    ring.load((2 + tap) * BOX, x, c0, t0 - shift_of(n, k0 + tap), b, 0);
            }
        }
    } else {
        float sum[32 * TAPS] = {};
        in_registers(sum);
        ring.multiply_each(run.end - run.first, [&](const unsigned char* in) {
#pragma unroll
            for (int t = 0; t < TIMES; t += 16)
                wgmma<true, true>(T(), sum, descriptor(in + group * BOX + t * ROW),
                                  descriptor(in + 2 * BOX + t * ROW, BOX));
        });
        in_registers(sum);
        const int lane = threadIdx.x % 32, o1 = o0 + 64 * group + threadIdx.x / 32 % 4 * 16 + lane / 4;
#pragma unroll
        for (int i = 0; i < 32 * TAPS; i += 2) {  // two neighbouring channels
            const int o = o1 + i / 2 % 2 * 8, k = k0 + i / 32, c = c0 + i % 32 / 4 * 8 + lane % 4 * 2;
            if (o >= 2 * n.H || k >= n.K || c >= n.C) continue;
            float* const to = parts + (((long long)blockIdx.y * 2 * n.H + o) * n.K + k) * n.C + c;
            *reinterpret_cast<Pack<float, 2>*>(to) = {sum[i], sum[i + 1]};
        }
    }
#endif
}

// ---- Launchers
// Frames of a tile: 80 or 64, whichever computes fewer beyond T.
inline int times_v5(const Layer& n) { return ceil_div(n.T, 80) * 80 <= ceil_div(n.T, 64) * 64 ? 80 : 64; }
inline int dw_taps_v5(const Layer& n) { return n.K < 3 ? n.K : 3; }
inline int dw_splits_v5(const Layer& n) {  // one block an SM: half as many as elsewhere
    const long long tiles = ceil_div(2LL * n.H, CHANNELS5) * ceil_div(n.C, DEPTH5) * ceil_div(n.K, dw_taps_v5(n));
    return dw_splits(n, 2 * tiles, times_v5(n));
}

// Does TMA take these tensors? (Neither empty ones nor the rows of C = 68, 34 or 17.)
inline bool fits_v5(const Layer& n) {
    return n.aligned && (double)n.B * n.T * n.C * n.H > 0 && n.C % 8 == 0 && n.H % 8 == 0 && n.x_row % 8 == 0 &&
           n.cond_row % 8 == 0;
}
// Is it worth it? On an H100 from two items of 64 frames on where H is 128 or more; where H is 64, from 48 blocks on
// (32: 25.0 us of training against version 4's 24.4; 64: 28.7 against 33.0); where most of what its blocks compute
// would be thrown away, not (by reckoning).
inline bool is_worth_v5(const Layer& n) {
    const long long frames = ceil_div(n.T, times_v5(n)) * times_v5(n) * ceil_div(n.B, ITEMS) * ITEMS,
                    channels = ceil_div(n.H, CHANNELS5) * CHANNELS5;
    return (n.H > 64 || frames * channels / (ITEMS * times_v5(n) * CHANNELS5) >= FULL_BLOCKS / 2) &&
           3LL * n.B * n.T * n.H >= frames * channels;
}
// Was version 5 compiled for this device? (The kernels of other architectures are empty.)
static bool has_hopper() {
#ifdef __CUDACC__
    cudaFuncAttributes compiled;
    if (cudaFuncGetAttributes(&compiled, forward_v5<__nv_bfloat16, 80>) == cudaSuccess) return compiled.numRegs > 64;
    cudaGetLastError();
    return false;
#else
    return true;
#endif
}

// Tensors as TMA sees them, boxes of 64 channels: frames (B, T, channels), `row` from one to the next; weights (2H, K,
// C), or (2, H, K, C), so that what is beyond the values is not the gates; a as (B, T, 2, H) for the same reason.
template <class T>
static const char* describe_frames(CUtensorMap* map, const void* p, const Layer& n, long long channels, long long row,
                                   int times, int items) {
    return describe<T>(map, p, {channels, n.T, n.B, 1}, {row, row * n.T, row * n.T}, {64, times, items, 1});
}

template <class T, int TIMES>
static const char* run_forward_v5(const Layer& n, const T* x, const T* w, const T* bias, const T* cond, T* y, T* a,
                                  void* stream) {
    CUtensorMap maps[5] = {};  // x, w, cond, y, a
    const long long C = n.C, H = n.H, K = n.K;
    const char* problem = describe_frames<T>(&maps[0], x, n, C, n.x_row, TIMES, ITEMS);
    if (!problem) problem = describe<T>(&maps[1], w, {C, K, H, 2}, {C, K * C, H * K * C}, {64, 1, CHANNELS5, 2});
    if (!problem && cond) problem = describe_frames<T>(&maps[2], cond, n, 2 * H, n.cond_row, TIMES, ITEMS);
    if (!problem) problem = describe_frames<T>(&maps[3], y, n, H, H, TIMES, ITEMS);
    if (!problem && a)
        problem = describe<T>(&maps[4], a, {H, 2, n.T, n.B}, {H, 2 * H, 2 * H * n.T}, {64, 1, TIMES, ITEMS});
    if (problem) return problem;
    const dim3 grid((unsigned)(ceil_div(n.B, ITEMS) * ceil_div(n.T, TIMES)), (unsigned)ceil_div(n.H, CHANNELS5));
    LAUNCH((forward_v5<T, TIMES>), grid, dim3(THREADS5), ForwardRing<TIMES>::SHARED_BYTES, stream, n, cond != nullptr,
           a != nullptr, maps[0], maps[1], maps[2], maps[3], maps[4], bias);
    return nullptr;
}

template <class T, int TIMES>
static const char* run_dx_v5(const Layer& n, const T* da, const T* w, T* dx, void* stream) {
    CUtensorMap maps[3];  // da, w, dx
    const long long C = n.C, H = n.H, K = n.K;
    const char* problem = describe_frames<T>(&maps[0], da, n, 2 * H, 2 * H, TIMES, ITEMS);
    if (!problem) problem = describe<T>(&maps[1], w, {C, K, 2 * H, 1}, {C, K * C, K * C}, {64, 1, DEPTH5, 1});
    if (!problem) problem = describe_frames<T>(&maps[2], dx, n, C, C, TIMES, ITEMS);
    if (problem) return problem;
    const dim3 grid((unsigned)(ceil_div(n.B, ITEMS) * ceil_div(n.T, TIMES)), (unsigned)ceil_div(n.C, CHANNELS5));
    LAUNCH((dx_v5<T, TIMES>), grid, dim3(THREADS5), DxRing<TIMES>::SHARED_BYTES, stream, n, maps[0], maps[1], maps[2]);
    return nullptr;
}

template <class T, int TIMES, int TAPS>
static const char* run_dw_v5(const Layer& n, const T* da, const T* x, float* parts, void* stream) {
    CUtensorMap maps[2];  // da, x
    const char* problem = describe_frames<T>(&maps[0], da, n, 2LL * n.H, 2LL * n.H, TIMES, 1);
    if (!problem) problem = describe_frames<T>(&maps[1], x, n, n.C, n.x_row, TIMES, 1);
    if (problem) return problem;
    const int splits = dw_splits_v5(n);
    const long long blocks = ceil_div(2LL * n.H, CHANNELS5) * ceil_div(n.C, DEPTH5) * ceil_div(n.K, TAPS);
    LAUNCH((dw_v5<T, TIMES, TAPS>), dim3((unsigned)blocks, splits), dim3(THREADS5), (DwRing<TIMES, TAPS>::SHARED_BYTES),
           stream, n, splits, maps[0], maps[1], parts);
    return nullptr;
}
template <class T, int TIMES>
static const char* run_dw_v5(const Layer& n, const T* da, const T* x, float* parts, void* stream) {
    const int taps = dw_taps_v5(n);
    return taps == 3   ? run_dw_v5<T, TIMES, 3>(n, da, x, parts, stream)
           : taps == 2 ? run_dw_v5<T, TIMES, 2>(n, da, x, parts, stream)
                       : run_dw_v5<T, TIMES, 1>(n, da, x, parts, stream);
}
