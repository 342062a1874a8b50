// A fiber: a stack and where on it to go on. x86-64 by hand (20 ns a switch), ucontext elsewhere.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__)

struct Fiber {
    void* sp;
};

// Pushes what a callee must keep, swaps stacks, pops.
extern "C" void emulator_switch(void** save_sp, void* load_sp);
asm(R"(
.text
.hidden emulator_switch
.globl emulator_switch
emulator_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
)");

inline void switch_fiber(Fiber& from, Fiber& to) { emulator_switch(&from.sp, to.sp); }

[[noreturn]] inline void leave_fiber(Fiber& to) {
    void* unused;
    emulator_switch(&unused, to.sp);
    __builtin_unreachable();
}

inline void prepare_fiber(Fiber& fiber, char* stack, size_t num_bytes, void (*entry)()) {
    // As if `entry` had just been called: its stack is 8 bytes off a multiple of 16.
    void** sp = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + num_bytes) & ~15ul);
    *--sp = nullptr;
    *--sp = reinterpret_cast<void*>(entry);
    fiber.sp = sp - 6;
}

#else

#include <ucontext.h>

struct Fiber {
    ucontext_t context;
};

inline void switch_fiber(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

[[noreturn]] inline void leave_fiber(Fiber& to) {
    setcontext(&to.context);
    __builtin_unreachable();
}

inline void prepare_fiber(Fiber& fiber, char* stack, size_t num_bytes, void (*entry)()) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack;
    fiber.context.uc_stack.ss_size = num_bytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
}

#endif
