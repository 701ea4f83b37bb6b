// Time, sleep, and the end of everything.
#pragma once

#include <cstdint>

namespace headrace::ptx {

__device__ __forceinline__ uint64_t nanoseconds() {
    uint64_t now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)::"memory");
    return now;
}

// Of the SM, in its own cycles; wraps around.
__device__ __forceinline__ uint32_t cycles() {
    uint32_t now;
    asm volatile("mov.u32 %0, %clock;" : "=r"(now)::"memory");
    return now;
}

__device__ __forceinline__ void sleep_ns(uint32_t duration) { asm volatile("nanosleep.u32 %0;" ::"r"(duration)); }

// Ends the kernel with an error.
__device__ __forceinline__ void trap() { asm volatile("trap;"); }

}  // namespace headrace::ptx
