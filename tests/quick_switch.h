// Fibers that change places without the system calls in which glibc's swapcontext saves signal masks, and without
// AddressSanitizer's sweep over a whole stack at each of them: the emulator spends most of its time there. To be
// included before cuda_on_cpu.h. Processors other than x86-64 take glibc's way.
#pragma once
#include <stddef.h>
#include <ucontext.h>
#ifdef __x86_64__
// Keeps what a call must preserve, the stack, and where to go on in *from; takes those of *to, be they from here or
// from makecontext. The offsets are those of ucontext_t::uc_mcontext.gregs.
extern "C" int quick_swapcontext(ucontext_t* from, const ucontext_t* to);
asm(R"(
    .pushsection .text.quick_swapcontext, "axG", @progbits, quick_swapcontext, comdat
    .weak quick_swapcontext
    .hidden quick_swapcontext
    .type quick_swapcontext, @function
quick_swapcontext:
    pop %rdx
    mov %rdx, 168(%rdi)
    mov %rsp, 160(%rdi)
    mov %rbx, 128(%rdi)
    mov %rbp, 120(%rdi)
    mov %r12, 72(%rdi)
    mov %r13, 80(%rdi)
    mov %r14, 88(%rdi)
    mov %r15, 96(%rdi)
    mov 160(%rsi), %rsp
    mov 128(%rsi), %rbx
    mov 120(%rsi), %rbp
    mov 72(%rsi), %r12
    mov 80(%rsi), %r13
    mov 88(%rsi), %r14
    mov 96(%rsi), %r15
    xor %eax, %eax
    jmp *168(%rsi)
    .size quick_swapcontext, . - quick_swapcontext
    .popsection
)");
constexpr size_t AT = offsetof(ucontext_t, uc_mcontext);
static_assert(AT + REG_RIP * sizeof(greg_t) == 168 && AT + REG_RSP * sizeof(greg_t) == 160 &&
              AT + REG_RBX * sizeof(greg_t) == 128 && AT + REG_RBP * sizeof(greg_t) == 120 &&
              AT + REG_R12 * sizeof(greg_t) == 72);
#define swapcontext quick_swapcontext
#define getcontext(context) 0  // asks for the signal mask, too; makecontext needs none of it
#endif
