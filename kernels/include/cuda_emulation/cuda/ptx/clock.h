// Emulated twin of include/cuda/ptx/clock.h: time is counted in operations.
#pragma once

#include "../../operations.h"

namespace headrace::ptx {

__device__ HEADRACE_ALWAYS_INLINE uint64_t nanoseconds() { return emulation::nanoseconds(); }

__device__ HEADRACE_ALWAYS_INLINE uint32_t cycles() { return emulation::nanoseconds(); }

__device__ HEADRACE_ALWAYS_INLINE void sleep_ns(uint32_t duration) { emulation::sleep_ns(duration); }

__device__ HEADRACE_ALWAYS_INLINE void trap() { emulation::trap(); }

}  // namespace headrace::ptx
