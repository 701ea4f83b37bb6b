// Emulated twin of include/cuda/ptx/clock.h: time is counted in operations.
#pragma once

#include "../../operations.h"

namespace headrace::ptx {

__device__ __forceinline__ uint64_t nanoseconds() { return emulation::nanoseconds(); }

__device__ __forceinline__ void sleep_ns(uint32_t duration) { emulation::sleep_ns(duration); }

__device__ __forceinline__ void trap() { emulation::trap(); }

}  // namespace headrace::ptx
