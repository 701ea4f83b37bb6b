// Emulated twin of include/cuda/ptx/copy.h.
#pragma once

#include "memory.h"

namespace headrace::ptx {

__device__ HEADRACE_ALWAYS_INLINE void copy_async_16(SharedAddress to, const void* from) { emulation::copy_async(to, from); }

__device__ HEADRACE_ALWAYS_INLINE void copy_async_arrive(SharedAddress mbarrier) { emulation::copy_async_arrive(mbarrier); }

__device__ HEADRACE_ALWAYS_INLINE void copy_bulk(SharedAddress to, const void* from, uint32_t bytes, SharedAddress mbarrier) {
    emulation::copy_bulk(to, from, bytes, mbarrier);
}

__device__ HEADRACE_ALWAYS_INLINE void fence_async_shared() { emulation::fence_async_shared(); }

}  // namespace headrace::ptx
