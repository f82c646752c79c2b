// What the sanitizers must be told about cuda_on_cpu.h: that its threads are fibers, and what orders their memory.
//
//   -fsanitize=thread    each CUDA thread is a TSan fiber; barriers (clocks) alone order their accesses. Neighbouring
//                        blocks run on different crews of fibers, so TSan sees no order between blocks either.
//   -fsanitize=address   ASan is told whenever the stack changes.
// Without a sanitizer every hook is empty: read cuda_on_cpu.h as if this file did not exist.
#pragma once
#include <stddef.h>
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#elif defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace watchers {
#define UNTRACED __attribute__((no_sanitize("thread"), noinline))  // the scheduler must not show up in a race report

struct Fiber {  // what the sanitizers call a stack
    void* name = nullptr;
};
inline Fiber scheduler;

#if defined(__SANITIZE_THREAD__)
constexpr int CREWS = 4;
constexpr bool REUSES_SHARED_MEMORY = false;  // blocks must not meet through a reused address
UNTRACED inline void create(Fiber& f) {
    if (!f.name) f.name = __tsan_create_fiber(0);
}
UNTRACED inline void scheduler_is_here() { scheduler.name = __tsan_get_current_fiber(); }
UNTRACED inline void before_resume(Fiber& to, const void*, size_t) {
    __tsan_switch_to_fiber(to.name, __tsan_switch_to_fiber_no_sync);
}
UNTRACED inline void after_resume() {}
UNTRACED inline void before_pause(Fiber&, bool) {
    __tsan_switch_to_fiber(scheduler.name, __tsan_switch_to_fiber_no_sync);
}
UNTRACED inline void after_pause(Fiber&) {}
UNTRACED inline void first_steps() {}
UNTRACED inline void publish(char* clock) { __tsan_release(clock); }  // what came before me ...
UNTRACED inline void observe(char* clock) { __tsan_acquire(clock); }  // ... comes before whoever looks here
#else
constexpr int CREWS = 1;
constexpr bool REUSES_SHARED_MEMORY = true;
inline void create(Fiber&) {}
inline void scheduler_is_here() {}
inline void publish(char*) {}
inline void observe(char*) {}
#if defined(__SANITIZE_ADDRESS__)
inline const void* scheduler_stack = nullptr;
inline size_t scheduler_bytes = 0;
inline void before_resume(Fiber&, const void* stack, size_t bytes) {
    __sanitizer_start_switch_fiber(&scheduler.name, stack, bytes);
}
inline void after_resume() { __sanitizer_finish_switch_fiber(scheduler.name, nullptr, nullptr); }
inline void before_pause(Fiber& from, bool for_ever) {
    __sanitizer_start_switch_fiber(for_ever ? nullptr : &from.name, scheduler_stack, scheduler_bytes);
}
inline void after_pause(Fiber& to) { __sanitizer_finish_switch_fiber(to.name, nullptr, nullptr); }
inline void first_steps() { __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_bytes); }
#else
inline void before_resume(Fiber&, const void*, size_t) {}
inline void after_resume() {}
inline void before_pause(Fiber&, bool) {}
inline void after_pause(Fiber&) {}
inline void first_steps() {}
#endif
#endif
}  // namespace watchers
