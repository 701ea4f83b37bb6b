// Emulated twin of include/cuda/ptx/convert.h, to the same bits but for the last ones of exp and log.
#pragma once

#include "../../floats.h"

namespace headrace::ptx {

__device__ HEADRACE_ALWAYS_INLINE uint32_t pack_bf16x2(float low, float high) {
    return emulation::float_to_bf16(low) | static_cast<uint32_t>(emulation::float_to_bf16(high)) << 16;
}

__device__ HEADRACE_ALWAYS_INLINE uint32_t pack_f16x2(float low, float high) {
    return emulation::float_to_half(emulation::clamp_to_half(low)) |
           static_cast<uint32_t>(emulation::float_to_half(emulation::clamp_to_half(high))) << 16;
}

__device__ HEADRACE_ALWAYS_INLINE uint32_t and_or(uint32_t word, uint32_t mask, uint32_t bits) { return (word & mask) | bits; }

__device__ HEADRACE_ALWAYS_INLINE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; i++) result |= static_cast<uint32_t>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return result;
}

__device__ HEADRACE_ALWAYS_INLINE float half_to_float(uint16_t bits) { return emulation::half_to_float(bits); }

__device__ HEADRACE_ALWAYS_INLINE float bf16_to_float(uint16_t bits) { return emulation::bf16_to_float(bits); }

__device__ HEADRACE_ALWAYS_INLINE uint16_t float_to_half(float value) { return emulation::float_to_half(value); }

__device__ HEADRACE_ALWAYS_INLINE float exp2_approx(float x) { return exp2f(x); }
__device__ HEADRACE_ALWAYS_INLINE float reciprocal_sqrt_approx(float x) { return emulation::reciprocal_sqrt(x); }
__device__ HEADRACE_ALWAYS_INLINE float exp_f32(float x) { return expf(x); }
__device__ HEADRACE_ALWAYS_INLINE float log_f32(float x) { return logf(x); }
__device__ HEADRACE_ALWAYS_INLINE float reciprocal_sqrt(float x) { return emulation::reciprocal_sqrt(x); }
__device__ HEADRACE_ALWAYS_INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

}  // namespace headrace::ptx
