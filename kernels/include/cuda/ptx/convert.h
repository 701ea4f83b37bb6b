// Conversions and functions of float32 whose instructions differ from plain C++.
#pragma once

#include <cstdint>

namespace headrace::ptx {

// To nearest, ties to even; NaN stays one.
__device__ __forceinline__ uint32_t pack_bf16x2(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

// To nearest, ties to even, at most 65,504 from zero; NaN stays one.
__device__ __forceinline__ uint32_t pack_f16x2(float low, float high) {
    uint32_t packed;
    asm("{ .reg .f32 l, h;\n"
        "  min.NaN.f32 l, %1, 0f477FE000; max.NaN.f32 l, l, 0fC77FE000;\n"
        "  min.NaN.f32 h, %2, 0f477FE000; max.NaN.f32 h, h, 0fC77FE000;\n"
        "  cvt.rn.f16x2.f32 %0, h, l; }"
        : "=r"(packed)
        : "f"(low), "f"(high));
    return packed;
}

__device__ __forceinline__ float half_to_float(uint16_t bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ __forceinline__ float bf16_to_float(uint16_t bits) {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

// To nearest, ties to even; what is too large becomes infinite.
__device__ __forceinline__ uint16_t float_to_half(float value) {
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ __forceinline__ float exp2_approx(float x) {
    float value;
    asm("ex2.approx.f32 %0, %1;" : "=f"(value) : "f"(x));
    return value;
}

__device__ __forceinline__ float exp_f32(float x) { return expf(x); }
__device__ __forceinline__ float log_f32(float x) { return logf(x); }
__device__ __forceinline__ float reciprocal_sqrt(float x) { return __frsqrt_rn(x); }  // the nearest float
__device__ __forceinline__ float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }

}  // namespace headrace::ptx
