// Emulated twin of include/cuda/ptx/mbarrier.h.
#pragma once

#include "memory.h"

namespace headrace::ptx {

__device__ HEADRACE_ALWAYS_INLINE void mbarrier_init(SharedAddress at, uint32_t arrivals) {
    emulation::mbarrier_init(at, arrivals);
}

__device__ HEADRACE_ALWAYS_INLINE void fence_mbarrier_init() { emulation::fence_mbarrier_init(); }

__device__ HEADRACE_ALWAYS_INLINE void mbarrier_arrive(SharedAddress at) { emulation::mbarrier_arrive(at, 0); }

__device__ HEADRACE_ALWAYS_INLINE void mbarrier_arrive_expect(SharedAddress at, uint32_t bytes) {
    emulation::mbarrier_arrive(at, bytes);
}

__device__ HEADRACE_ALWAYS_INLINE bool mbarrier_try_wait(SharedAddress at, uint32_t parity) {
    return emulation::mbarrier_try_wait(at, parity);
}

}  // namespace headrace::ptx
