// Barriers in shared memory, 8 bytes each: a phase is complete when all arrivals and all announced bytes are there.
#pragma once

#include "cuda/ptx/memory.h"

namespace headrace::ptx {

__device__ __forceinline__ void mbarrier_init(SharedAddress at, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(at), "r"(arrivals) : "memory");
}

// After mbarrier_init, before bulk copies use the barrier.
__device__ __forceinline__ void fence_mbarrier_init() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void mbarrier_arrive(SharedAddress at) {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(at) : "memory");
}

// Hopper: the phase lasts until `bytes` more have been copied.
__device__ __forceinline__ void mbarrier_arrive_expect(SharedAddress at, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("{ .reg .b64 state; mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1; }" ::"r"(at), "r"(bytes)
                 : "memory");
#else
    asm volatile("trap;");
#endif
}

// Whether the phase of that parity, counted from 0, is complete: then what its arrivals had written is visible.
__device__ __forceinline__ bool mbarrier_try_wait(SharedAddress at, uint32_t parity) {
    uint32_t is_complete;
#if __CUDA_ARCH__ >= 900
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(is_complete)
                 : "r"(at), "r"(parity)
                 : "memory");
#else
    asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(is_complete)
                 : "r"(at), "r"(parity)
                 : "memory");
#endif
    return is_complete;
}

}  // namespace headrace::ptx
