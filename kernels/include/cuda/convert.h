// Arithmetic that ops share, in float32.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/ptx/convert.h"

namespace headrace {

__device__ __forceinline__ float bits_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

__device__ __forceinline__ uint32_t float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

__device__ __forceinline__ float fma_f32(float a, float b, float c) { return ptx::fma(a, b, c); }
__device__ __forceinline__ float exp_f32(float x) { return ptx::exp_f32(x); }
__device__ __forceinline__ float log_f32(float x) { return ptx::log_f32(x); }
__device__ __forceinline__ float divide_f32(float a, float b) { return a / b; }

// n ** -0.5 to the last bit of a double, by Newton's method.
constexpr float inverse_sqrt(int n) {
    double x = 1.0;
    while (x * x * n > 1.0) x /= 2;
    for (int i = 0; i < 8; i++) x *= 1.5 - 0.5 * n * x * x;
    return static_cast<float>(x);
}

}  // namespace headrace
