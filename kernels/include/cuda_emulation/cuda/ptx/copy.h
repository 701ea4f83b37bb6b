// Emulated twin of include/cuda/ptx/copy.h.
#pragma once

#include "memory.h"

namespace headrace::ptx {

__device__ HEADRACE_ALWAYS_INLINE void copy_async_16(SharedAddress to, const void* from) { emulation::copy_async(to, from); }

__device__ HEADRACE_ALWAYS_INLINE void copy_async_arrive(SharedAddress mbarrier) { emulation::copy_async_arrive(mbarrier); }

__device__ HEADRACE_ALWAYS_INLINE void copy_async_commit() { emulation::copy_async_commit(); }

template <int kGroups>
__device__ HEADRACE_ALWAYS_INLINE void copy_async_wait() {
    emulation::copy_async_wait(kGroups);
}

// Which copies are done is for the seed to say.
template <int kGroups>
__device__ HEADRACE_ALWAYS_INLINE void copy_async_pace() {}

__device__ HEADRACE_ALWAYS_INLINE void copy_bulk(SharedAddress to, const void* from, uint32_t bytes, SharedAddress mbarrier) {
    emulation::copy_bulk(to, from, bytes, mbarrier);
}

__device__ HEADRACE_ALWAYS_INLINE void fence_async_shared() { emulation::fence_async_shared(); }

}  // namespace headrace::ptx
