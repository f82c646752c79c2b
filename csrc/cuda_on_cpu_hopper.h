// What version 5 is made of, on a CPU (cuda_on_cpu.h): TMA, mbarriers, wgmma, at the worst moment that the PTX manual
// allows. A box on its way fills its destination with NaN and arrives when no thread can go on without it. A product
// reads its operands, a store its tile, when it is issued and again when it is waited for: if they differ (a stage not
// there yet, or overwritten early), the program stops. D has a product's sums only after the wait. Byte counts, phases,
// swizzle and descriptors are computed from their fields.
#pragma once
#include "cuda_on_cpu.h"

namespace cuda_on_cpu {
constexpr unsigned WINDOW = 128;  // where a block's shared memory begins in the addresses of shared memory
UNTRACED inline unsigned shared_address(const void* p) { return (unsigned)((const char*)p - shared_memory) + WINDOW; }
UNTRACED inline uint16_t* at_shared(unsigned address) { return (uint16_t*)(shared_memory + (address - WINDOW)); }
UNTRACED inline unsigned swizzled(unsigned address) { return address ^ (address >> 7 & 7) << 4; }
UNTRACED inline uint64_t mix(uint64_t hash, uint16_t v) { return (hash ^ v) * 1099511628211ull; }

UNTRACED inline void add(Queue& queue, const Operation& operation) {
    if (queue.count == 64) fail("more operations under way than this model holds");
    queue.items[queue.count] = operation;
    queue.items[queue.count++].group = queue.group;
}
// Carries out all but the newest `pending` groups of a thread's operations.
UNTRACED inline void finish(Queue& queue, int pending) {
    int done = 0;
    while (done < queue.count && queue.items[done].group < queue.group - pending) {
        const Operation next = queue.items[done++];
        next.run(next);
    }
    for (int i = done; i < queue.count; ++i) queue.items[i - done] = queue.items[i];
    queue.count -= done;
}

// ---- What the asynchronous proxy may not see yet
UNTRACED inline void wrote(const void* p, size_t bytes) {
    if (self->unfenced_count == 64) fail("more stores without a fence than this model holds");
    self->unfenced[self->unfenced_count++] = {(const char*)p, bytes};
}
UNTRACED inline void check_fenced(const void* p, size_t bytes) {
    const char* const from = (const char*)p;
    for (size_t i = 0; i < thread_count; ++i)
        for (int j = 0; j < threads[i].unfenced_count; ++j) {
            const Range& r = threads[i].unfenced[j];
            if (from < r.from + r.bytes && r.from < from + bytes)
                fail("TMA sees what was stored without a proxy fence");
        }
}

// ---- mbarriers
struct Phase {
    int bytes;
    unsigned arrivals : 12, missing : 12, parity : 1, mark : 7;
};
UNTRACED inline Phase& phase_at(const void* b) { return *(Phase*)b; }
inline void check_initialised(const void* b) {  // seen by TSan: what of an mbarrier is stored as other memory is
    if (((const volatile unsigned char*)b)[7] >> 1 != 42) fail("an mbarrier that nobody initialised");
}
UNTRACED inline void end_phase_if_complete(Phase& p) {
    if (p.missing || p.bytes) return;
    p.parity ^= 1;
    p.missing = p.arrivals;
}
UNTRACED inline bool ended(const void* b, unsigned parity) { return phase_at(b).parity != parity; }
UNTRACED inline void wrote_barrier(const void* b) {
    is_hoppers = true;
    phase_ended = ended;
    wrote(b, sizeof(Phase));
}

// ---- Boxes
UNTRACED inline void fill(char* to, size_t bytes) {  // no memset: the sanitizers would take it for this thread's
    for (size_t i = 0; i < bytes; ++i) ((volatile char*)to)[i] = (char)0xFF;
}
}  // namespace cuda_on_cpu

struct alignas(64) CUtensorMap {
    char* base;
    long long size[4], step[4];  // in elements
    int box[4];
};

namespace cuda_on_cpu {
UNTRACED inline int bytes_of(const CUtensorMap& map) { return 2 * map.box[0] * map.box[1] * map.box[2] * map.box[3]; }

// Calls visit(element in shared memory, element in global memory or nullptr) for every element of a box.
template <class F> UNTRACED inline void for_each(const Operation& o, F visit) {
    const CUtensorMap& map = *(const CUtensorMap*)o.what;
    unsigned row = shared_address(o.to);
    for (int l = 0; l < map.box[3]; ++l)
        for (int k = 0; k < map.box[2]; ++k)
            for (int j = 0; j < map.box[1]; ++j, row += 128)
                for (int i = 0; i < map.box[0]; ++i) {
                    const long long at[4] = {o.at[0] + i, o.at[1] + j, o.at[2] + k, o.at[3] + l};
                    long long offset = 0;
                    bool inside = true;
                    for (int axis = 0; axis < 4; ++axis) {
                        inside = inside && at[axis] >= 0 && at[axis] < map.size[axis];
                        offset += at[axis] * map.step[axis];
                    }
                    visit(at_shared(swizzled(row + 2 * i)), inside ? (uint16_t*)map.base + offset : nullptr);
                }
}
UNTRACED inline void check_box(const void* tile, const CUtensorMap& map) {
    if (shared_address(tile) % 1024) fail("a swizzled box off its 1024 bytes");
    if ((uintptr_t)&map % 64) fail("a tensor map off its 64 bytes");
}
UNTRACED inline void arrive_box(const Operation& o) {
    for_each(o, [](uint16_t* to, const uint16_t* from) UNTRACED { *(volatile uint16_t*)to = from ? *from : 0; });
    Phase& phase = phase_at((const void*)o.a);
    phase.bytes -= bytes_of(*(const CUtensorMap*)o.what);
    end_phase_if_complete(phase);
}
inline uint64_t seen_in(const Operation& o) {
    uint64_t hash = 0;
    for_each(o, [&](uint16_t* from, uint16_t*) { hash = mix(hash, *from); });
    return hash;
}
inline void write_box(const Operation& o) {
    if (seen_in(o) != o.seen) fail("a tile changes while TMA reads it");
    for_each(o, [](uint16_t* from, uint16_t* to) {
        if (to) *to = *from;
    });
}

// ---- Products
// Element (i, k) of an operand, i along M or N, k along the 16 that are summed over.
template <bool ACROSS> UNTRACED inline uint16_t element(uint64_t descriptor, int i, int k) {
    const auto field = [&](int bit) UNTRACED { return (unsigned)(descriptor >> bit & 0x3fff) << 4; };
    const unsigned leading = field(16), stride = field(32);
    if (descriptor >> 62 != 1) fail("this model knows descriptors of 128-byte swizzle only");
    const unsigned offset =
        ACROSS ? i / 64 * leading + i % 64 * 2 + k / 8 * stride + k % 8 * 128 : i / 8 * stride + i % 8 * 128 + k * 2;
    return *at_shared(swizzled(field(0) + offset));
}
inline float value(__nv_bfloat16, uint16_t bits) { return __bfloat162float({bits}); }
inline float value(__half, uint16_t bits) {
    __half v;
    memcpy(&v, &bits, 2);
    return __half2float(v);
}
// What this lane's part of D is made of: rows (2, 16) of A and columns (N / 4, 16) of B; returns a hash of them.
template <bool A_ACROSS, bool B_ACROSS, class T, int R>
UNTRACED uint64_t operands(const Operation& o, float (&rows)[2][16], float (&columns)[R / 2][16]) {
    const int lane = (self - threads) % 32, warp = (self - threads) / 32 % 4;
    uint64_t hash = 0;
    for (int r = 0; r < 2; ++r)
        for (int k = 0; k < 16; ++k) {
            const uint16_t bits = element<A_ACROSS>(o.a, 16 * warp + lane / 4 + 8 * r, k);
            hash = mix(hash, bits), rows[r][k] = value(T(), bits);
        }
    for (int j = 0; j < R / 2; ++j)
        for (int k = 0; k < 16; ++k) {
            const uint16_t bits = element<B_ACROSS>(o.b, j / 2 * 8 + lane % 4 * 2 + j % 2, k);
            hash = mix(hash, bits), columns[j][k] = value(T(), bits);
        }
    return hash;
}
template <bool A_ACROSS, bool B_ACROSS, class T, int R> UNTRACED void multiply(const Operation& o) {
    float rows[2][16], columns[R / 2][16], *const d = (float*)o.to;
    if (operands<A_ACROSS, B_ACROSS, T, R>(o, rows, columns) != o.seen) fail("an operand changes while wgmma reads it");
    for (int j = 0; j < R / 2; ++j)
        for (int r = 0; r < 2; ++r)
            for (int k = 0; k < 16; ++k) d[j / 2 * 4 + 2 * r + j % 2] += rows[r][k] * columns[j][k];
}
}  // namespace cuda_on_cpu

// ---- The functions of hopper.h
inline unsigned shared_address(const void* p) { return cuda_on_cpu::shared_address(p); }
inline void barrier_init(uint64_t* b, int arrivals) {
    *(cuda_on_cpu::Phase*)b = {0, (unsigned)arrivals, (unsigned)arrivals, 0, 42};
    cuda_on_cpu::wrote_barrier(b);
}
UNTRACED inline void barrier_arrive(uint64_t* b) {
    cuda_on_cpu::check_initialised(b);
    cuda_on_cpu::Phase& phase = cuda_on_cpu::phase_at(b);
    if (phase.missing == 0) cuda_on_cpu::fail("more arrivals at an mbarrier than it waits for");
    watchers::publish((char*)b + phase.parity);
    --phase.missing;
    end_phase_if_complete(phase);
}
UNTRACED inline void barrier_expect(uint64_t* b, int bytes) {
    cuda_on_cpu::check_initialised(b);
    cuda_on_cpu::phase_at(b).bytes += bytes;
    barrier_arrive(b);
}
UNTRACED inline void barrier_wait(uint64_t* b, unsigned parity, int line = __builtin_LINE()) {
    cuda_on_cpu::check_initialised(b);
    cuda_on_cpu::self->barrier = b;
    cuda_on_cpu::self->parity = parity;
    while (!cuda_on_cpu::ended(b, parity)) cuda_on_cpu::pause(cuda_on_cpu::AT_PHASE, line);
    watchers::observe((char*)b + parity);
}
inline void fence_async() { cuda_on_cpu::self->unfenced_count = 0; }
UNTRACED inline void tma_load(void* to, const CUtensorMap& map, uint64_t* b, int i, int j, int k, int l) {
    cuda_on_cpu::check_box(to, map);
    cuda_on_cpu::check_fenced(b, 8);
    cuda_on_cpu::fill((char*)to, cuda_on_cpu::bytes_of(map));  // NaN until it arrives
    cuda_on_cpu::add(cuda_on_cpu::arriving, {cuda_on_cpu::arrive_box, &map, to, (uint64_t)b, 0, 0, {i, j, k, l}, 0});
}
inline void tma_store(const CUtensorMap& map, const void* from, int i, int j, int k, int l) {
    cuda_on_cpu::check_box(from, map);
    cuda_on_cpu::check_fenced(from, cuda_on_cpu::bytes_of(map));
    cuda_on_cpu::Operation store = {cuda_on_cpu::write_box, &map, (void*)from, 0, 0, 0, {i, j, k, l}, 0};
    store.seen = cuda_on_cpu::seen_in(store);
    cuda_on_cpu::add(cuda_on_cpu::self->stores, store);
}
inline void tma_store_wait() {
    ++cuda_on_cpu::self->stores.group;
    cuda_on_cpu::finish(cuda_on_cpu::self->stores, 0);
}

inline void wgmma_fence() { cuda_on_cpu::self->registers_ready = true; }
inline void wgmma_commit() { ++cuda_on_cpu::self->products.group; }
template <int PENDING> void wgmma_wait() {
    cuda_on_cpu::self->registers_ready = false;
    cuda_on_cpu::finish(cuda_on_cpu::self->products, PENDING);
    cuda_on_cpu::show(0, __LINE__);  // a warp waits as one
}
template <int R> void in_registers(float (&)[R]) {}
template <bool A_ACROSS, bool B_ACROSS, class T, int R> void wgmma(T, float (&d)[R], uint64_t a, uint64_t b) {
    if (!cuda_on_cpu::self->registers_ready) cuda_on_cpu::fail("wgmma without its fence");
    float rows[2][16], columns[R / 2][16];
    cuda_on_cpu::Operation product = {cuda_on_cpu::multiply<A_ACROSS, B_ACROSS, T, R>, nullptr, d, a, b, 0, {}, 0};
    product.seen = cuda_on_cpu::operands<A_ACROSS, B_ACROSS, T, R>(product, rows, columns);
    cuda_on_cpu::add(cuda_on_cpu::self->products, product);
}
inline void stmatrix_transposed(void* row, const unsigned (&r)[4]) {
    if ((uintptr_t)row % 16) cuda_on_cpu::fail("stmatrix needs rows on 16-byte boundaries");
    const unsigned lane = threadIdx.x % 32;
    cuda_on_cpu::show(row, __LINE__);
    for (unsigned m = 0; m < 4; ++m)
        for (unsigned e = 0; e < 2; ++e)
            cuda_on_cpu::shown_by<uint16_t*>(8 * m + lane % 4 * 2 + e)[lane / 4] = (uint16_t)(r[m] >> 16 * e);
    cuda_on_cpu::wrote(row, 16);
    cuda_on_cpu::show(0, __LINE__);  // its rows are other lanes' work too
}
template <int> void fewer_registers() {}
template <int> void more_registers() {}
inline void sync_warpgroup(int name, int line = __builtin_LINE()) { cuda_on_cpu::meet(name, line); }

template <class T>
const char* describe(CUtensorMap* map, const void* base, const long long (&size)[4], const long long (&step)[3],
                     const int (&box)[4]) {
    bool legal = (uintptr_t)base % 16 == 0 && box[0] == 64;
    *map = {(char*)base, {}, {1, step[0], step[1], step[2]}, {}};
    for (int i = 0; i < 4; ++i) {
        map->size[i] = size[i], map->box[i] = box[i];
        legal = legal && size[i] >= 1 && size[i] <= 1ll << 32 && box[i] >= 1 && box[i] <= 256;
        legal = legal && (i == 0 || (map->step[i] % 8 == 0 && map->step[i] > 0 && map->step[i] < 1ll << 39));
    }
    return legal ? nullptr : "the driver cannot describe a tensor to TMA";
}
