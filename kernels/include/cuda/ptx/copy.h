// Asynchronous copies from global to shared memory. Addresses are multiples of 16, and so are sizes.
#pragma once

#include "cuda/ptx/memory.h"

namespace headrace::ptx {

// 16 bytes, past L1.
__device__ __forceinline__ void copy_async_16(SharedAddress to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// An arrival on the mbarrier, one of those it was initialised for, when all earlier copy_async_16 of this thread are
// done. It orders these copies alone, nothing else that the thread did.
__device__ __forceinline__ void copy_async_arrive(SharedAddress mbarrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(mbarrier) : "memory");
}

// Ends a group of this thread's copy_async_16.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most `kGroups` of the thread's groups, the last ones, are under way: the thread may use what the others
// brought, nobody else may.
template <int kGroups>
__device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// The same, for the pace alone: who uses what was brought waits for the mbarrier it is to arrive at.
template <int kGroups>
__device__ __forceinline__ void copy_async_pace() {
    copy_async_wait<kGroups>();
}

// Hopper: counts `bytes` towards what mbarrier_arrive_expect announced. Shared memory that was written otherwise
// needs a fence_async_shared first.
__device__ __forceinline__ void copy_bulk(SharedAddress to, const void* from, uint32_t bytes, SharedAddress mbarrier) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(mbarrier)
                 : "memory");
#else
    asm volatile("trap;");
#endif
}

// Between a thread's loads and stores of shared memory and bulk copies to the same place.
__device__ __forceinline__ void fence_async_shared() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

}  // namespace headrace::ptx
