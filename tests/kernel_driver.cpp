// Runs every kernel of csrc/gated_conv.cu on the CPU against plain loops, in a process of its own: for the sanitizers
// and for the mutants. Buffers are exactly as large as the shapes say, so one element too far is one redzone hit.
//     kernel_driver            all cases in four thread orders (or CUDA_ON_CPU_ORDER): same bits; exit 1 at a difference
//     kernel_driver 1 ... 5    one version only
//     kernel_driver big        the last block of tensors with more than 2^31 elements (sparse memory)
//     kernel_driver launches   how many kernels a layer's forward and backward are
//     kernel_driver race|past  a kernel with a known fault, which the sanitizer at hand must report
// -DVERSIONS=3 leaves the tensor cores out: emulated, they are slow. -DONLY=3 compiles the kernels of version 3 alone,
// beside those that are of no version: a mutant is compiled in half the time.
#include <string>
#include <type_traits>
#include "quick_switch.h"
#include "cuda_on_cpu.h"
#ifndef ONLY
#define ONLY 0
#endif
template <class T> constexpr bool is_compiled(const char* kernel) {
    for (; ONLY && *kernel; ++kernel)
        if (kernel[0] == '_' && kernel[1] == 'v') return kernel[2] == '0' + ONLY;
    return true;
}
#undef LAUNCH
#define LAUNCH(kernel, grid, block, bytes, stream, ...) \
    do { \
        if constexpr (is_compiled<T>(#kernel)) /* T: of the template that launches */ \
            (void)(stream), cuda_on_cpu::launch(grid, block, bytes, [&] { kernel(__VA_ARGS__); }); \
    } while (0)
using Wide = std::conditional_t<(ONLY < 4), float, __nv_bfloat16>;  // what versions 1 to 3 are tested with, and the others
using Narrow = std::conditional_t<(ONLY == 0 || ONLY > 3), __nv_bfloat16, float>;
#define DW_BLOCKS 4    // each of dw's splits sums several chunks
#define FULL_BLOCKS 3  // long and short tiles of frames both occur
static int merge_below = 3;  // version 4's dx computes da itself: as the product does, always (99), never (0)
#define MERGE_BELOW merge_below
#include "gated_conv.cu"

struct Case {
    int B, T, C, H, K, dilation;
    bool bias, cond;
    int extra;      // x and cond are slices: so many more channels
    int since = 1;  // the first version that has something new here
};
// Odd against every tile; T under the halo; dilation over T and over the tile; T = 1; rows aligned to 2, 4, 8, 16 bytes.
static const Case CASES[] = {{2, 65, 9, 33, 3, 2, true, true, 2},   {5, 9, 5, 3, 2, 16, true, false, 2},
                             {1, 130, 65, 34, 2, 66, false, true, 3}, {1, 1, 17, 5, 5, 1, true, true, 1},
                             {3, 81, 12, 8, 3, 4, true, true, 8},   {1, 41, 40, 72, 1, 1, true, true, 16},
                             {2, 70, 16, 8, 3, 2, true, false, 8, 5}, {3, 65, 72, 136, 2, 100, true, true, 8, 4},
                             {5, 75, 136, 72, 5, 3, false, true, 0, 5}};

template <class T> struct Buffer {
    size_t size;
    T* data;
    Buffer(size_t size, int seed = 0, double scale = 1)
        : size(size), data((T*)aligned_alloc(16, (size * sizeof(T) + 15) / 16 * 16)) {
        uint64_t state = seed;
        for (size_t i = 0; i < size; ++i) {
            state = state * 6364136223846793005ull + 1442695040888963407ull;
            const double v = seed ? scale * ((double)(state >> 40) / (1 << 23) - 1) : NAN;  // outputs start as NaN
            store(&data[i], (Sum<T>)v);
        }
    }
    ~Buffer() { free(data); }
    double operator[](size_t i) const { return (double)load(data[i]); }
};

static std::string where;
static bool same(const char* name, double got, double wanted, double tolerance) {
    if (fabs(got - wanted) <= tolerance) return true;
    printf("%s: %s is %.9g, expected %.9g\n", where.c_str(), name, got, wanted);
    return false;
}

struct Bits {  // of y, a, da, dx, dw; of dbias, whose frames are added in other groups where the gate is merged
    uint64_t sums = 0, dbias = 0;
};
template <class T> static uint64_t hash(std::initializer_list<const Buffer<T>*> all) {
    uint64_t bits = 14695981039346656037ull;
    for (const Buffer<T>* v : all) {
        for (size_t i = 0; i < v->size * sizeof(T); ++i)
            bits = (bits ^ ((const unsigned char*)v->data)[i]) * 1099511628211ull;
    }
    return bits;
}

template <class T> static bool run(int dtype, int version, const Case& c, Bits* bits, double tolerance) {
    const int B = c.B, TT = c.T, C = c.C, H = c.H, K = c.K;
    const Layer n{B, TT, C, H, K, c.dilation, C + c.extra, 2 * H + c.extra, true};
    if (gated_conv_version(dtype, version, &n) != version) return true;  // where the tile does not fit
    const size_t rows = (size_t)B * TT, slack = c.extra;                 // no slack after the last row
    Buffer<T> x(rows * n.x_row - slack, 1), w((size_t)2 * H * C * K, 2, 1.5 / sqrt(C * K)), bias(2 * H, 3),
        cond(rows * n.cond_row - slack, 4), dy(rows * H, 5);
    Buffer<T> y(dy.size), a(rows * 2 * H), da(a.size), dx(rows * C), dw(w.size), dbias(2 * H);
    Buffer<Sum<T>> workspace(gated_conv_workspace(version, &n));
    const char* problem = gated_conv_forward(dtype, version, &n, x.data, w.data, c.bias ? bias.data : nullptr,
                                             c.cond ? cond.data : nullptr, y.data, a.data, nullptr);
    if (!problem)
        problem = gated_conv_backward(dtype, version, &n, dy.data, a.data, x.data, w.data, da.data, dx.data, dw.data,
                                      dbias.data, workspace.data, nullptr);
    if (problem) return printf("%s: %s\n", where.c_str(), problem), false;

    std::vector<double> wdx(dx.size), wdw(dw.size), wdb(2 * H);
    for (size_t row = 0; row < rows; ++row)
        for (int ch = 0; ch < H; ++ch) {
            const int t = row % TT;
            double pre[2];
            for (int half = 0; half < 2; ++half) {
                const int o = ch + half * H;
                pre[half] = (c.bias ? bias[o] : 0) + (c.cond ? cond[row * n.cond_row + o] : 0);
                for (int k = 0; k < K; ++k)
                    for (int i = 0; i < C && t >= shift_of(n, k); ++i)
                        pre[half] += w[(o * K + k) * C + i] * x[(row - shift_of(n, k)) * n.x_row + i];
                if (!same("a", a[row * 2 * H + o], pre[half], tolerance)) return false;
            }
            const double p = tanh(pre[0]), s = 1 / (1 + exp(-pre[1])), g = dy[row * H + ch];
            if (!same("y", y[row * H + ch], p * s, tolerance)) return false;
            for (int half = 0; half < 2; ++half) {
                const int o = ch + half * H;
                const double d = da[row * 2 * H + o];  // the stored da: what the sums below are made of
                if (!same("da", d, half ? g * p * s * (1 - s) : g * s * (1 - p * p), tolerance)) return false;
                wdb[o] += d;
                for (int k = 0; k < K; ++k)
                    for (int i = 0; i < C && t >= shift_of(n, k); ++i) {
                        wdw[(o * K + k) * C + i] += d * x[(row - shift_of(n, k)) * n.x_row + i];
                        wdx[(row - shift_of(n, k)) * C + i] += d * w[(o * K + k) * C + i];
                    }
            }
        }
    for (size_t i = 0; i < dx.size; ++i)
        if (!same("dx", dx[i], wdx[i], tolerance * 2)) return false;
    for (size_t i = 0; i < dw.size; ++i)
        if (!same("dw", dw[i], wdw[i], tolerance * (1 + fabs(wdw[i])))) return false;
    for (size_t i = 0; i < dbias.size; ++i)
        if (!same("dbias", dbias[i], wdb[i], tolerance * (1 + fabs(wdb[i])))) return false;
    *bits = {hash<T>({&y, &a, &da, &dx, &dw}), hash<T>({&dbias})};
    return true;
}

template <class T> static T* sparse(long long elements) {
    void* p =
        mmap(nullptr, elements * sizeof(T), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) printf("no address space for the test of 64-bit indices\n"), exit(2);
    return (T*)p;
}

// Items, then frames, so many that x, y, a have more than 2^31 elements; all zeros but the last 64 frames.
template <class T> static bool run_big(int version, long long B, long long frames) {
    const int C = version == 5 ? 8 : 5, H = C;
    const Layer n{(int)B, (int)frames, C, H, 1, 1, C, 2 * H, true};
    const long long rows = B * frames;
    T *x = sparse<T>(rows * C), *y = sparse<T>(rows * H), *a = sparse<T>(rows * 2 * H), *da = sparse<T>(rows * 2 * H),
      *dx = sparse<T>(rows * C), dbias[2 * H];
    alignas(16) T w[2 * 8 * 8];
    Sum<T>* parts = sparse<Sum<T>>(gate_runs(n, 1) * 2 * H);
    memset(w, 0, sizeof(w));
    store(&w[(H - 1) * C + C - 1], .5f), store(&w[2 * H * C - 1], .25f);  // the last output and gate see the last input
    for (long long i = rows * C - 64; i < rows * C; ++i) store(&x[i], 1.0f);
    const T* const none = nullptr;
    const char* problem = run_forward(version, n, (const T*)x, (const T*)w, none, none, y, a, nullptr);
    int runs;
    const bool merged = merges_gate(version, n);
    if (!problem && !merged) problem = run_gate(n, (const T*)y, (const T*)a, da, parts, runs, nullptr);  // dy = y: p s
    if (!problem) problem = run_dx(version, n, (const T*)y, (const T*)a, da, parts, (const T*)w, dx, nullptr);
    if (problem) return printf("%s\n", problem), false;
    const double p = tanh(.5), s = 1 / (1 + exp(-.25)), g = s * (1 - p * p), gg = p * s * (1 - s);
    const double tolerance = sizeof(T) == 2 ? 4e-3 : 1e-6;
    const bool ok = same("y", load(y[rows * H - 1]), p * s, tolerance) &&
                    same("a", load(a[rows * 2 * H - 1]), .25, tolerance) &&
                    same("da", load(da[rows * 2 * H - 1]), p * s * gg, tolerance) &&
                    same("dx", load(dx[rows * C - 1]), p * s * (.5 * g + .25 * gg), tolerance);
    munmap(x, rows * C * sizeof(T)), munmap(y, rows * H * sizeof(T)), munmap(a, rows * 2 * H * sizeof(T));
    munmap(da, rows * 2 * H * sizeof(T)), munmap(dx, rows * C * sizeof(T));
    munmap(parts, gate_runs(n, 1) * 2 * H * sizeof(Sum<T>));
    return ok;
}

// What a sanitizer is there to find. race: a neighbour's number is read before a barrier; past: an element too far.
__global__ void faulty(bool race, float* out) {
    SHARED(float, s);
    s[threadIdx.x] = (float)threadIdx.x;
    if (!race) __syncthreads();
    out[threadIdx.x + (race ? 0 : 1)] = s[(threadIdx.x + 1) % 64];
}
template <class T> static const char* run_faulty(bool race) {
    const Buffer<T> out(64);
    LAUNCH(faulty, dim3(1), dim3(64), 64 * 4, nullptr, race, out.data);
    return "the fault went unnoticed";
}

static bool all_big() {
    setenv("CUDA_ON_CPU_BLOCKS", "last", 1);
    const long long sizes[][2] = {{(1 << 23) + 3, 64}, {1, 1 << 29}};
    for (const auto& size : sizes) {
        for (const int version : {1, 2, 3}) {
            if (ONLY && version != ONLY) continue;
            where = "big, version " + std::to_string(version);
            if (!run_big<Wide>(version, size[0], size[1])) return false;
        }
        for (const int below : {0, 99}) {
            merge_below = below;
            where = "big, version 4, merge_below " + std::to_string(below);
            if (VERSIONS >= 4 && (!ONLY || ONLY == 4) && !run_big<Narrow>(4, size[0], size[1])) return false;
        }
        if (VERSIONS == 5 && (!ONLY || ONLY == 5)) {
            where = "big, version 5";
            if (!run_big<Narrow>(5, size[0], size[1])) return false;
        }
    }
    return true;
}

static bool all_cases(int only) {
    const std::string wanted = getenv("CUDA_ON_CPU_ORDER") ? getenv("CUDA_ON_CPU_ORDER") : "";
    for (const Case& c : CASES)
        for (int version = std::max(only ? only : 1, c.since); version <= (only ? only : VERSIONS); ++version) {
            uint64_t sums = 0;
            for (const int below : {99, 0}) {
                if (version != 4 && below == 0) continue;
                uint64_t dbias = 0;
                for (const std::string order : {"ascending", "descending", "shuffle:1", "shuffle:2"}) {
                    if (wanted != "" ? wanted != order : version >= 4 && order[0] == 's') continue;  // slow here
                    setenv("CUDA_ON_CPU_ORDER", order.c_str(), 1);
                    merge_below = below;
                    where = "version " + std::to_string(version) + ", T = " + std::to_string(c.T) + ", " + order +
                            (version != 4 ? "" : below ? ", gate merged" : ", gate apart");
                    Bits bits;
                    const bool right = version >= 4 ? run<Narrow>(3, version, c, &bits, 2e-2)
                                                    : run<Wide>(0, version, c, &bits, 2e-5);
                    if (!right) return false;
                    if (!sums) sums = bits.sums;
                    if (!dbias) dbias = bits.dbias;
                    if (bits.sums != sums || bits.dbias != dbias)
                        return printf("%s: other bits than in the first run\n", where.c_str()), false;
                }
            }
        }
    return true;
}

// Kernels that a layer launches: forward + backward of the demo's layer, and of one with four tiles of input channels.
static bool count_launches() {
    setenv("CUDA_ON_CPU_BLOCKS", "last", 1);
    for (int version = 1; version <= VERSIONS; ++version) {
        printf("version %d:", version);
        for (const Case& c : {Case{8, 74, 64, 64, 2, 4, true, true, 0}, Case{1, 16, 256, 8, 3, 4, true, true, 0}}) {
            const Layer n{c.B, c.T, c.C, c.H, c.K, c.dilation, c.C, 2 * c.H, true};
            const size_t rows = (size_t)c.B * c.T;
            using T = __nv_bfloat16;
            const Buffer<T> x(rows * c.C, 1), w(2 * c.H * c.K * c.C, 2), y(rows * c.H, 3), a(rows * 2 * c.H, 4),
                da(a.size), dx(x.size), dw(w.size), dbias(2 * c.H);
            const Buffer<float> workspace(gated_conv_workspace(version, &n));
            unsigned long long before = cuda_on_cpu::launches;
            gated_conv_forward(3, version, &n, x.data, w.data, nullptr, nullptr, y.data, a.data, nullptr);
            const unsigned long long forward = cuda_on_cpu::launches - before;
            gated_conv_backward(3, version, &n, y.data, a.data, x.data, w.data, da.data, dx.data, dw.data, dbias.data,
                                workspace.data, nullptr);
            printf(" %llu + %llu", forward, cuda_on_cpu::launches - before - forward);
        }
        printf("\n");
    }
    return true;
}

int main(int argc, char** argv) {
    const std::string what = argc > 1 ? argv[1] : "";
    if (what == "race" || what == "past") return printf("%s\n", run_faulty<float>(what == "race")), 3;
    if (what == "launches") return !count_launches();
    if (!(what == "big" ? all_big() : all_cases(atoi(what.c_str())))) return 1;
    printf("all right\n");
    return 0;
}
