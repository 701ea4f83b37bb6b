// Emulated twin of include/cuda/ptx/warp.h.
#pragma once

#include "../../operations.h"

namespace headrace::ptx {

__device__ HEADRACE_ALWAYS_INLINE uint32_t thread() { return emulation::identity().thread; }
__device__ HEADRACE_ALWAYS_INLINE uint32_t lane() { return emulation::identity().lane; }
__device__ HEADRACE_ALWAYS_INLINE uint32_t warp() { return emulation::identity().warp; }
__device__ HEADRACE_ALWAYS_INLINE uint32_t block() { return emulation::identity().block; }
__device__ HEADRACE_ALWAYS_INLINE uint32_t num_blocks() { return emulation::identity().num_blocks; }

__device__ HEADRACE_ALWAYS_INLINE void sync_warp() { emulation::sync_warp(); }

__device__ HEADRACE_ALWAYS_INLINE void sync_threads(uint32_t id, uint32_t num_threads) {
    emulation::sync_threads(id, num_threads);
}

__device__ HEADRACE_ALWAYS_INLINE float shuffle_xor(float value, uint32_t mask) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    bits = emulation::shuffle_xor(bits, mask);
    memcpy(&value, &bits, sizeof bits);
    return value;
}
__device__ HEADRACE_ALWAYS_INLINE uint32_t shuffle_xor(uint32_t value, uint32_t mask) {
    return emulation::shuffle_xor(value, mask);
}
__device__ HEADRACE_ALWAYS_INLINE float shuffle(float value, uint32_t lane) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    bits = emulation::shuffle(bits, lane);
    memcpy(&value, &bits, sizeof bits);
    return value;
}
__device__ HEADRACE_ALWAYS_INLINE uint32_t shuffle(uint32_t value, uint32_t lane) { return emulation::shuffle(value, lane); }
__device__ HEADRACE_ALWAYS_INLINE uint32_t ballot(bool value) { return emulation::ballot(value); }
__device__ HEADRACE_ALWAYS_INLINE uint32_t lowest_bit(uint32_t value) { return __builtin_ctz(value); }

}  // namespace headrace::ptx
