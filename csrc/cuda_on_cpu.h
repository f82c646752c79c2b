// CUDA's execution model on a CPU, small enough to read: lets g++ compile gated_conv.cu and run it thread by thread.
//
//   grid of blocks    independent, in any order. Here: one after another.
//   block of threads  share one piece of shared memory and can meet at __syncthreads(). Here: every thread is a fiber
//                     (its own stack and program counter) that runs until it finishes or waits, then the next one runs.
//   warp              32 neighbouring threads that can read each other's registers (ldmatrix, mma). Here: lanes leave
//                     their value in a mailbox, wait for the other 31, and read.
//   shared memory     exactly as many bytes as the launch asked for, filled with NaN (0xFF), never with zeros.
//   cp.async          copies that arrive some time before the thread's own wait returns. Here: as late as allowed,
//                     inside the wait; until then the destination holds NaN.
//   Hopper            copies by boxes, mbarriers, products of a warpgroup: cuda_on_cpu_hopper.h, on the queues here.
//
// What real hardware leaves undefined stops the program here, with the line: threads of a block waiting at different
// barriers, a thread that returns while others wait, part of a warp at an exchange, more than 1024 threads or more
// shared memory per block than asked for and allowed, a grid over the limits, an address off its alignment. The same
// binary under -fsanitize=address finds a read past a buffer or past shared memory; under -fsanitize=thread a missing
// barrier and two blocks that write one address (cuda_on_cpu_watchers.h tells the sanitizers what a fiber is).
//
// CUDA_ON_CPU_ORDER = ascending | descending | shuffle:SEED   the order in which a block's threads take turns
// CUDA_ON_CPU_BLOCKS = last                                   run only the last block (tests of 64-bit indices)
//
// Not modelled: time, occupancy, weak memory order between blocks, fast-math ulps, atomics, streams, the compiler.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <algorithm>
#include <functional>
#include <mutex>
#include <random>
#include <vector>
#include "cuda_on_cpu_watchers.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__ &  // one for all threads, as long as the kernel runs
#define __launch_bounds__(...)
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace cuda_on_cpu {
constexpr size_t STACK_BYTES = 256 * 1024, SHARED_LIMIT = 99 * 1024,  // the least of any GPU with tensor cores for bf16
    HOPPER_SHARED_LIMIT = 227 * 1024;                                 // of kernels that only Hopper can run
enum State { RUNS, AT_BARRIER, AT_EXCHANGE, AT_WARPGROUP, AT_PHASE, FINISHED };

struct Copy {  // one cp.async under way
    char* to;
    const char* from;
    size_t bytes, valid;  // zeros behind `valid`
};
struct Operation {  // something asynchronous under way: who carries it out, and what that needs to know
    void (*run)(const Operation&);
    const void* what;
    void* to;
    uint64_t a, b, seen;
    int at[4], group;
};
struct Queue {
    Operation items[64];
    int count, group;  // those under way; the group to which the next one will belong
};
struct Range {
    const char* from;
    size_t bytes;
};
struct Thread {
    ucontext_t context;
    char* stack = nullptr;
    dim3 index;
    State state;
    int line, barriers;           // the line where it waits; how many barriers it has passed
    alignas(8) char mail[2][32];  // what it shows to the other lanes of its warp, in turns
    unsigned exchanges;
    Copy copies[512];  // those not yet waited for: the first `under_way`
    int under_way;
    Queue products, stores;  // of tensor cores and TMA, not yet waited for
    bool registers_ready;    // for wgmma: its fence came
    Range unfenced[64];      // what it stored and TMA may not see yet: the first `unfenced_count`
    int unfenced_count, meetings;
    unsigned name;        // the named barrier where its warpgroup meets
    const void* barrier;  // the mbarrier it waits at, and for which parity
    unsigned parity;
    watchers::Fiber fiber;
};

// One launch at a time (the mutex), so plain globals will do.
inline std::mutex launch_lock;
inline Thread crews[watchers::CREWS][1024], *threads = crews[0];  // the fibers; those of the running block
inline Thread* self = nullptr;                                    // the fiber that runs
inline size_t thread_count = 0;
inline unsigned long long launches = 0;
inline ucontext_t scheduler;
inline dim3 block_index, block_size, grid_size;
inline char* shared_memory = nullptr;
inline const std::function<void()>* kernel_call = nullptr;
inline char clocks[watchers::CREWS][34], *barrier_clocks = clocks[0], begin_clock, end_clock;
inline Queue arriving;                              // boxes on their way to shared memory
inline bool newest_first, is_hoppers;               // which of them arrives next; the kernel uses Hopper's means
inline bool (*phase_ended)(const void*, unsigned);  // has the phase of this parity ended at this mbarrier?

[[noreturn]] inline void fail(const char* what, int line = 0) {
    fprintf(stderr, "cuda_on_cpu: %s", what);
    if (line) fprintf(stderr, " (line %d)", line);
    fprintf(stderr, "\n");
    abort();
}

UNTRACED inline void resume(Thread& t) {  // scheduler -> thread
    self = &t;
    watchers::before_resume(t.fiber, t.stack, STACK_BYTES);
    swapcontext(&scheduler, &t.context);
    watchers::after_resume();
}

UNTRACED inline void pause(State why, int line) {  // thread -> scheduler, until the scheduler resumes it
    Thread& t = *self;
    t.state = why;
    t.line = line;
    watchers::before_pause(t.fiber, why == FINISHED);
    swapcontext(&t.context, &scheduler);
    watchers::after_pause(t.fiber);
}

UNTRACED inline void thread_main() {
    watchers::first_steps();
    watchers::observe(&begin_clock);
    (*kernel_call)();
    if (self->products.count || self->stores.count) fail("a thread ends before what it started: a wait is missing");
    watchers::publish(&end_clock);
    pause(FINISHED, 0);
}

// All threads of the block meet. Two clocks take turns: with one, a thread that rushes on to the next barrier would
// lend its later work to threads still leaving this one, and TSan would miss races.
UNTRACED inline void barrier(int line) {
    char* const clock = &barrier_clocks[self->barriers++ % 2];
    watchers::publish(clock);
    pause(AT_BARRIER, line);
    watchers::observe(clock);
}

// The 128 threads of a warpgroup meet at the hardware barrier `name`.
UNTRACED inline void meet(unsigned name, int line) {
    if (name < 1 || name > 15) fail("a warpgroup's barrier is 1 to 15", line);
    char* const clock = &barrier_clocks[2 + 2 * name + self->meetings++ % 2];
    self->name = name;
    watchers::publish(clock);
    pause(AT_WARPGROUP, line);
    watchers::observe(clock);
}

// A warp's exchange: every lane shows a value, waits for the 31 others, and reads any lane's. Two mailboxes take turns,
// so a lane may go on to the next exchange while others still read. CUDA promises no memory ordering here, so TSan gets
// none.
template <class V> UNTRACED inline void show(const V& value, int line) {
    static_assert(sizeof(V) <= sizeof(Thread::mail) / 2, "a lane shows at most 32 bytes");
    *reinterpret_cast<V*>(self->mail[++self->exchanges % 2]) = value;
    pause(AT_EXCHANGE, line);
}
template <class V> UNTRACED inline V shown_by(unsigned lane) {
    return *reinterpret_cast<const V*>(threads[(self - threads) / 32 * 32 + lane % 32].mail[self->exchanges % 2]);
}

// A box arrives, as late as can be; the threads that waited for it go on before the next one does.
UNTRACED inline bool deliver() {
    if (arriving.count == 0) return false;
    const int i = newest_first ? arriving.count - 1 : 0;
    const Operation next = arriving.items[i];
    for (int j = i + 1; j < arriving.count; ++j) arriving.items[j - 1] = arriving.items[j];
    --arriving.count;
    next.run(next);
    return true;
}

// Moves waiting threads on: a warp whose 32 lanes stand at one exchange, 128 threads at one named barrier, threads
// whose phase has ended, or a block whose threads all stand at one barrier. Where none moves, a box arrives.
UNTRACED inline bool release() {
    bool moved = false;
    size_t at_barrier = 0, finished = 0, barrier_line = 0, at_name[16] = {};
    for (size_t first = 0; first < thread_count; first += 32) {
        const size_t lanes = std::min<size_t>(32, thread_count - first);
        size_t waiting = 0;
        for (size_t i = first; i < first + lanes; ++i) {
            const Thread& t = threads[i];
            finished += t.state == FINISHED;
            if (t.state == AT_EXCHANGE) waiting += t.line == threads[first].line;
            if (t.state == AT_WARPGROUP) ++at_name[t.name];
            if (t.state == AT_PHASE && phase_ended(t.barrier, t.parity)) {
                threads[i].state = RUNS;
                moved = true;
            }
            if (t.state != AT_BARRIER) continue;
            if (at_barrier++ == 0) barrier_line = t.line;
            if ((int)barrier_line != t.line) fail("threads of one block wait at different barriers", t.line);
        }
        if (waiting == 32) {
            for (size_t i = first; i < first + lanes; ++i) threads[i].state = RUNS;
            moved = true;
        }
    }
    for (size_t i = 0; i < thread_count; ++i) {
        Thread& t = threads[i];
        if (t.state != AT_WARPGROUP || at_name[t.name] < 128) continue;
        if (at_name[t.name] > 128) fail("two warpgroups meet at one named barrier", t.line);
        t.state = RUNS;
        moved = true;
    }
    if (at_barrier == thread_count) {
        for (size_t i = 0; i < thread_count; ++i) threads[i].state = RUNS;
        return true;
    }
    if (finished == thread_count && arriving.count) fail("a block ends before its boxes have arrived");
    if (moved || finished == thread_count || deliver()) return finished < thread_count;
    for (size_t i = 0; i < thread_count; ++i) {
        if (threads[i].state == AT_PHASE) fail("an mbarrier's phase that never ends", threads[i].line);
        if (threads[i].state == AT_WARPGROUP) fail("a barrier without all of the warpgroup", threads[i].line);
        if (threads[i].state == AT_EXCHANGE) fail("an exchange without all 32 lanes of the warp", threads[i].line);
    }
    fail("a barrier that some threads of the block never reach", (int)barrier_line);
}

UNTRACED inline void start(Thread& t, size_t i) {
    if (!t.stack)
        t.stack = (char*)mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (t.stack == MAP_FAILED) fail("no memory for a thread's stack");
    watchers::create(t.fiber);
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack;
    t.context.uc_stack.ss_size = STACK_BYTES;
    makecontext(&t.context, (void (*)())thread_main, 0);
    t.index = dim3(i % block_size.x, i / block_size.x % block_size.y, i / block_size.x / block_size.y);
    t.state = RUNS;
    t.barriers = t.exchanges = t.under_way = t.products.count = t.stores.count = t.unfenced_count = t.meetings = 0;
    t.registers_ready = false;
}

UNTRACED inline void run_block(const std::vector<size_t>& order) {
    for (size_t i = 0; i < thread_count; ++i) start(threads[i], i);
    do {
        for (const size_t i : order) {
            if (threads[i].state == RUNS) resume(threads[i]);
        }
    } while (release());
}

inline std::vector<size_t> thread_order(size_t count) {
    std::vector<size_t> order(count);
    for (size_t i = 0; i < count; ++i) order[i] = i;
    const char* wanted = getenv("CUDA_ON_CPU_ORDER");
    if (wanted && !strcmp(wanted, "descending")) std::reverse(order.begin(), order.end());
    if (wanted && !strncmp(wanted, "shuffle:", 8))
        std::shuffle(order.begin(), order.end(), std::mt19937(atoi(wanted + 8)));
    return order;
}

UNTRACED inline void launch(dim3 grid, dim3 block, size_t bytes, const std::function<void()>& call) {
    const std::lock_guard<std::mutex> one_at_a_time(launch_lock);
    const size_t count = (size_t)block.x * block.y * block.z;
    if (count < 1 || count > 1024) fail("a block needs 1 to 1024 threads");
    if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
        fail("grid out of range");
    if (bytes > HOPPER_SHARED_LIMIT) fail("more than 227 KB of shared memory");
    thread_count = count;
    ++launches;
    block_size = block;
    grid_size = grid;
    kernel_call = &call;
    watchers::scheduler_is_here();
    const std::vector<size_t> order = thread_order(count);
    newest_first = order[0] > order[count - 1];
    is_hoppers = false;
    const char* which = getenv("CUDA_ON_CPU_BLOCKS");
    const unsigned long long blocks = (unsigned long long)grid.x * grid.y * grid.z,
                             first = which && !strcmp(which, "last") ? blocks - 1 : 0;
    for (unsigned long long i = first; i < blocks; ++i) {
        threads = crews[i % watchers::CREWS];
        barrier_clocks = clocks[i % watchers::CREWS];
        block_index = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
        shared_memory = (char*)aligned_alloc(128, (bytes + 127) / 128 * 128);
        memset(shared_memory, 0xFF, bytes);
        watchers::publish(&begin_clock);  // a block sees the launches before, and its shared memory
        run_block(order);
        if (bytes > SHARED_LIMIT && !is_hoppers) fail("more than 99 KB of shared memory");
        if (watchers::REUSES_SHARED_MEMORY) free(shared_memory);
    }
    watchers::observe(&end_clock);
}

UNTRACED inline dim3 thread_index() { return self->index; }
UNTRACED inline dim3 current_block() { return block_index; }
UNTRACED inline void* shared() { return shared_memory; }
UNTRACED inline void begin_copy(void* to, const void* from, size_t bytes, size_t valid) {
    if (self->under_way == sizeof(self->copies) / sizeof(Copy)) fail("more copies under way than this model holds");
    self->copies[self->under_way++] = {(char*)to, (const char*)from, bytes, valid};
}
UNTRACED inline bool take_copy(Copy& copy) {
    if (self->under_way == 0) return false;
    copy = self->copies[--self->under_way];
    return true;
}
}  // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::thread_index())
#define blockIdx (cuda_on_cpu::current_block())
#define blockDim (cuda_on_cpu::block_size)
#define gridDim (cuda_on_cpu::grid_size)
#define __syncthreads() cuda_on_cpu::barrier(__LINE__)
#define SHARED(type, name) type* const name = static_cast<type*>(cuda_on_cpu::shared())
#define LAUNCH(kernel, grid, block, bytes, stream, ...) \
    ((void)(stream), cuda_on_cpu::launch(grid, block, bytes, [&] { kernel(__VA_ARGS__); }))

// ---- The 16-bit types: storage only, converted by round-to-nearest-even ---------------------------------------------
struct __half {
    _Float16 bits;
};
inline float __half2float(__half v) { return (float)v.bits; }
inline __half __float2half_rn(float v) { return {(_Float16)v}; }

struct __nv_bfloat16 {
    uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 v) {
    const uint32_t wide = (uint32_t)v.bits << 16;
    float f;
    memcpy(&f, &wide, 4);
    return f;
}
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
    uint32_t wide;
    memcpy(&wide, &f, 4);
    if (f != f) return {0x7fff};  // CUDA's NaN
    return {(uint16_t)((wide + 0x7fff + (wide >> 16 & 1)) >> 16)};
}
