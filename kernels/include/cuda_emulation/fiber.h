// Threads of one core that hand over to each other: a stack each, and what a call must preserve.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>

#if !defined(__x86_64__) || defined(HEADRACE_EMULATION_UCONTEXT)
#define HEADRACE_EMULATION_UCONTEXT 1
#include <ucontext.h>
#endif

namespace headrace::emulation {

#ifndef HEADRACE_EMULATION_UCONTEXT

struct Fiber {
    void* top = nullptr;
};

extern "C" __attribute__((visibility("hidden"))) void headrace_switch_stack(void** from, void* to);

asm(R"(
.text
.p2align 4
.type headrace_switch_stack, @function
headrace_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size headrace_switch_stack, .-headrace_switch_stack
)");

inline void switch_fiber(Fiber& from, Fiber& to) { headrace_switch_stack(&from.top, to.top); }

// `entry` must not return.
inline void prepare_fiber(Fiber& fiber, char* stack, uint64_t num_bytes, void (*entry)()) {
    const uintptr_t end = reinterpret_cast<uintptr_t>(stack + num_bytes) & ~uintptr_t{15};
    auto* top = reinterpret_cast<uintptr_t*>(end) - 8;  // six registers, entry, and where it would return to
    for (int i = 0; i < 8; i++) top[i] = 0;
    top[6] = reinterpret_cast<uintptr_t>(entry);
    fiber.top = top;
}

#else

struct Fiber {
    ucontext_t context;
};

inline void switch_fiber(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

inline void prepare_fiber(Fiber& fiber, char* stack, uint64_t num_bytes, void (*entry)()) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack;
    fiber.context.uc_stack.ss_size = num_bytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
}

#endif

// Zeroed address space that becomes memory when it is touched.
inline char* reserve(uint64_t num_bytes) {
    void* at = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) abort();
    return static_cast<char*>(at);
}

// What reserve gave, and nothing where it gave nothing.
template <class T>
void give_back(T*& at, uint64_t num_bytes) {
    if (at) munmap(at, num_bytes);
    at = nullptr;
}

// Kept from run to run. A page below each stack is left out, so that a deep one ends the process and nothing worse.
class Stacks {
  public:
    static constexpr uint64_t kPage = 4096, kStride = 33 * kPage;
    static constexpr uint64_t kNumColours = 8, kColourBytes = kPage / kNumColours;

    void make(uint64_t count) {
        if (count <= count_) return;
        release();
        base_ = reserve(count * kStride);
        count_ = count;
        constexpr uint64_t kMostGuarded = 16384;  // a process may have only so many mappings
        for (uint64_t i = 0; i < count && i < kMostGuarded; i++) mprotect(base_ + i * kStride, kPage, PROT_NONE);
    }

    void release() {
        if (base_) munmap(base_, count_ * kStride);
        base_ = nullptr, count_ = 0;
    }

    char* bottom(uint64_t index) const { return base_ + index * kStride + kPage; }

    // Tops lie in different cache sets.
    uint64_t num_bytes(uint64_t index) const { return kStride - kPage - index % kNumColours * kColourBytes; }

  private:
    char* base_ = nullptr;
    uint64_t count_ = 0;
};

}  // namespace headrace::emulation
