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

// (word & mask) | bits, as one instruction: from C++ it would be two, where neither number is in a register.
__device__ __forceinline__ uint32_t and_or(uint32_t word, uint32_t mask, uint32_t bits) {
    uint32_t result;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(word), "r"(mask), "r"(bits));
    return result;
}

// Four bytes of eight: byte i of the result is that which the i-th four bits of `selector` say, 0 to 3 of a, 4 to 7 of b.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    return __byte_perm(a, b, selector);
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

// Within two of the last bits.
__device__ __forceinline__ float reciprocal_sqrt_approx(float x) {
    float value;
    asm("rsqrt.approx.f32 %0, %1;" : "=f"(value) : "f"(x));
    return value;
}

__device__ __forceinline__ float exp_f32(float x) { return expf(x); }
__device__ __forceinline__ float log_f32(float x) { return logf(x); }
__device__ __forceinline__ float reciprocal_sqrt(float x) { return __frsqrt_rn(x); }  // the nearest float
__device__ __forceinline__ float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }

}  // namespace headrace::ptx
