// Runs every kernel of csrc/gated_conv.cu on the CPU against plain loops, in a process of its own: for the sanitizers
// and for the mutants. Buffers are exactly as large as the shapes say, so one element too far is one redzone hit.
//     kernel_driver          all cases in four thread orders (or CUDA_ON_CPU_ORDER): same bits; exit 1 at a difference
//     kernel_driver big      the last block of tensors with more than 2^31 elements (sparse memory)
// -DVERSIONS=2 leaves the tensor cores out: emulated, they are slow.
#define DW_BLOCKS 4  // each of dw's splits sums several chunks
#include "gated_conv.cu"
#include <string>

struct Case {
    int B, C, H, T, K, dilation;
    bool bias, cond;
};
// Odd against every tile (32 pairs, 64 times, 8 / 16 deep); T under the halo; dilation over T and over the tile; T = 1.
static const Case CASES[] = {{2, 9, 33, 65, 3, 2, true, true},
                             {5, 5, 3, 9, 2, 16, true, false},
                             {1, 65, 34, 130, 2, 66, false, true},
                             {1, 17, 5, 1, 5, 1, true, true}};

template <class T> struct Buffer {
    size_t size;
    T* data;
    Buffer(size_t size, int seed = 0, double scale = 1) : size(size), data((T*)malloc(size * sizeof(T))) {
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

template <class T> static bool run(int dtype, int version, const Case& c, uint64_t* bits, double tolerance) {
    const int B = c.B, C = c.C, H = c.H, TT = c.T, K = c.K, extra = 2;  // x and cond are slices: `extra` more channels
    const Layer n{B, C, H, TT, K, c.dilation, (long long)(C + extra) * TT, (long long)(2 * H + extra) * TT};
    if (gated_conv_version(dtype, version, &n) != version) return true;  // version 3 where the tile does not fit
    const size_t slack_x = (size_t)extra * TT, xs = (size_t)B * n.x_batch - slack_x,
                 cs = (size_t)B * n.cond_batch - slack_x;
    Buffer<T> x(xs, 1), w((size_t)2 * H * C * K, 2, 1.5 / sqrt(C * K)), bias(2 * H, 3), cond(cs, 4),
        dy((size_t)B * H * TT, 5);
    Buffer<T> y(dy.size), h((size_t)B * 2 * H * TT), dh(h.size), dx((size_t)B * C * TT), dw(w.size), dbias(2 * H);
    Buffer<Sum<T>> workspace(gated_conv_workspace(version, &n));
    const char* problem = gated_conv_forward(dtype, version, &n, x.data, w.data, c.bias ? bias.data : nullptr,
                                             c.cond ? cond.data : nullptr, y.data, h.data, nullptr);
    if (!problem)
        problem = gated_conv_backward(dtype, version, &n, dy.data, h.data, x.data, w.data, dh.data, dx.data, dw.data,
                                      dbias.data, workspace.data, nullptr);
    if (problem) return printf("%s: %s\n", where.c_str(), problem), false;

    std::vector<double> wdx(dx.size), wdw(dw.size), wdb(2 * H), wdh(h.size);
    for (int b = 0; b < B; ++b)
        for (int t = 0; t < TT; ++t)
            for (int ch = 0; ch < H; ++ch) {
                double a[2];
                for (int half = 0; half < 2; ++half) {
                    const int o = ch + half * H;
                    a[half] = (c.bias ? bias[o] : 0) + (c.cond ? cond[b * n.cond_batch + o * TT + t] : 0);
                    for (int i = 0; i < C; ++i)
                        for (int k = 0; k < K; ++k) {
                            const int from = t - (K - 1 - k) * c.dilation;
                            if (from >= 0) a[half] += w[(o * C + i) * K + k] * x[b * n.x_batch + i * TT + from];
                        }
                    if (!same("h", h[(b * 2 * H + o) * TT + t], a[half], tolerance)) return false;
                }
                const size_t at = (b * H + ch) * TT + t, low = (b * 2 * H + ch) * TT + t, high = low + (size_t)H * TT;
                const double p = tanh(a[0]), s = 1 / (1 + exp(-a[1])), g = dy[at];
                if (!same("y", y[at], p * s, tolerance)) return false;
                wdh[low] = g * s * (1 - p * p), wdh[high] = g * p * s * (1 - s);
                if (!same("dh", dh[low], wdh[low], tolerance) || !same("dh", dh[high], wdh[high], tolerance))
                    return false;
                for (int half = 0; half < 2; ++half) {
                    const int o = ch + half * H;
                    const double d = dh[half ? high : low];  // the stored dh: what the sums below are made of
                    wdb[o] += d;
                    for (int i = 0; i < C; ++i)
                        for (int k = 0; k < K; ++k) {
                            const int from = t - (K - 1 - k) * c.dilation;
                            if (from < 0) continue;
                            wdw[(o * C + i) * K + k] += d * x[b * n.x_batch + i * TT + from];
                            wdx[(b * C + i) * TT + from] += d * w[(o * C + i) * K + k];
                        }
                }
            }
    for (size_t i = 0; i < dx.size; ++i)
        if (!same("dx", dx[i], wdx[i], tolerance * 2)) return false;
    for (size_t i = 0; i < dw.size; ++i)
        if (!same("dw", dw[i], wdw[i], tolerance * (1 + fabs(wdw[i])))) return false;
    for (size_t i = 0; i < dbias.size; ++i)
        if (!same("dbias", dbias[i], wdb[i], tolerance * (1 + fabs(wdb[i])))) return false;
    *bits = 14695981039346656037ull;
    for (const Buffer<T>* v : {&y, &h, &dh, &dx, &dw, &dbias}) {
        for (size_t i = 0; i < v->size * sizeof(T); ++i)
            *bits = (*bits ^ ((const unsigned char*)v->data)[i]) * 1099511628211ull;
    }
    return true;
}

template <class T> static T* sparse(long long elements) {
    void* p =
        mmap(nullptr, elements * sizeof(T), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) printf("no address space for the test of 64-bit indices\n"), exit(2);
    return (T*)p;
}

// Batches, then frames, so many that every tensor has more than 2^31 elements; all zeros but the last 64 frames.
static bool run_big(int version, long long B, long long T) {
    const Layer n{(int)B, 5, 2, (int)T, 1, 1, 5 * T, 4 * T};
    float *x = sparse<float>(B * 5 * T), *y = sparse<float>(B * 2 * T), *h = sparse<float>(B * 4 * T),
          *dh = sparse<float>(B * 4 * T), *dx = sparse<float>(B * 5 * T);
    float w[20] = {};
    w[9] = .5f, w[19] = .25f;  // output 1 and its gate see input channel 4, the last
    for (long long i = B * 5 * T - 64; i < B * 5 * T; ++i) x[i] = 1;
    const char* problem = gated_conv_forward(0, version, &n, x, w, nullptr, nullptr, y, h, nullptr);
    if (problem) return printf("%s\n", problem), false;
    const double p = tanh(.5), s = 1 / (1 + exp(-.25)), g = s * (1 - p * p), gg = p * s * (1 - s);
    const dim3 items((unsigned)(B * ceil_div(2 * T, 256))), tiles((unsigned)(B * ceil_div(T, TIMES)));
    LAUNCH(gate_backward<float>, items, dim3(256), 0, nullptr, n, y, h, dh);  // dy = y: p s
    if (version == 1) LAUNCH(dx_v1<float>, blocks_for(B * 5 * T, 128), dim3(128), 0, nullptr, n, dh, w, dx);
    if (version == 2)
        LAUNCH((conv_v2<float, false>), tiles, dim3(THREADS), shared_v2(n, 4), nullptr, n, dh, w, (float*)nullptr,
               (float*)nullptr, dx, (float*)nullptr);
    const bool ok = same("y", y[B * 2 * T - 1], p * s, 1e-6) && same("h", h[B * 4 * T - 1], .25, 1e-6) &&
                    same("dx", dx[B * 5 * T - 1], p * s * (.5 * g + .25 * gg), 1e-6);
    munmap(x, B * 5 * T * 4), munmap(y, B * 2 * T * 4), munmap(h, B * 4 * T * 4), munmap(dh, B * 4 * T * 4),
        munmap(dx, B * 5 * T * 4);
    return ok;
}

int main(int argc, char**) {
    const std::string wanted = getenv("CUDA_ON_CPU_ORDER") ? getenv("CUDA_ON_CPU_ORDER") : "";
    if (argc > 1) {
        setenv("CUDA_ON_CPU_BLOCKS", "last", 1);
        for (const int version : {1, 2}) {
            where = "big, version " + std::to_string(version);
            if (!run_big(version, (1 << 24) + 3, 64) || !run_big(version, 1, 1 << 29)) return 1;
        }
    }
    for (const Case& c : CASES)
        for (int version = argc > 1 ? 4 : 1; version <= VERSIONS; ++version) {
            uint64_t first = 0;
            for (const char* order : {"ascending", "descending", "shuffle:1", "shuffle:2"}) {
                if (wanted != "" ? wanted != order : version == 3 && !strcmp(order, "shuffle:2"))
                    continue;  // version 3 is slow here
                setenv("CUDA_ON_CPU_ORDER", order, 1);
                where = "version " + std::to_string(version) + ", T = " + std::to_string(c.T) + ", " + order;
                uint64_t bits = 0;
                bool right = true;
                if (version < 3) right = run<float>(0, version, c, &bits, 2e-5);
#if VERSIONS == 3
                else
                    right = run<__nv_bfloat16>(3, version, c, &bits, 2e-2);
#endif
                if (!right) return 1;
                if (!first) first = bits;
                if (bits != first) return printf("%s: other bits than in ascending order\n", where.c_str()), 1;
            }
        }
    printf("ok\n");
    return 0;
}
