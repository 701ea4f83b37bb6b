// Who a thread is, and what threads of a warp or a block do together.
#pragma once

#include <cstdint>

namespace headrace::ptx {

__device__ __forceinline__ uint32_t thread() { return threadIdx.x; }
__device__ __forceinline__ uint32_t lane() { return threadIdx.x % 32; }
__device__ __forceinline__ uint32_t warp() { return threadIdx.x / 32; }
__device__ __forceinline__ uint32_t block() { return blockIdx.x; }
__device__ __forceinline__ uint32_t num_blocks() { return gridDim.x; }

// Orders the memory accesses of a warp's lanes. Shuffles, votes and matrix instructions do not.
__device__ __forceinline__ void sync_warp() { __syncwarp(); }

// Named barrier `id` (0 .. 15) for whole warps, `num_threads` together.
__device__ __forceinline__ void sync_threads(uint32_t id, uint32_t num_threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}

// All 32 lanes take part.
__device__ __forceinline__ float shuffle_xor(float value, uint32_t mask) {
    return __shfl_xor_sync(0xffffffff, value, mask);
}
__device__ __forceinline__ uint32_t shuffle_xor(uint32_t value, uint32_t mask) {
    return __shfl_xor_sync(0xffffffff, value, mask);
}
__device__ __forceinline__ float shuffle(float value, uint32_t lane) { return __shfl_sync(0xffffffff, value, lane); }
__device__ __forceinline__ uint32_t shuffle(uint32_t value, uint32_t lane) {
    return __shfl_sync(0xffffffff, value, lane);
}
__device__ __forceinline__ uint32_t ballot(bool value) { return __ballot_sync(0xffffffff, value); }

// Of a number that is not 0.
__device__ __forceinline__ uint32_t lowest_bit(uint32_t value) { return __ffs(value) - 1; }

}  // namespace headrace::ptx
