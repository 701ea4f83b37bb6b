// 16-bit floats, bit by bit as CUDA's conversions make them.
#pragma once

#include "syntax.h"

namespace headrace::emulation {

constexpr uint16_t kNan16 = 0x7fff;  // what every NaN becomes, as float16 and as bfloat16

inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline float bf16_to_float(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

inline uint16_t float_to_bf16(float value) {
    if (value != value) return kNan16;
    const uint32_t bits = bits_of(value);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// Float16 values are floats of a larger exponent, but for the infinite and NaN ones; subnormal ones become right by the
// product.
inline float half_to_float(uint16_t bits) {
    const uint32_t magnitude = bits & 0x7fff, sign = static_cast<uint32_t>(bits & 0x8000) << 16;
    if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | magnitude << 13);
    return float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112f));
}

inline uint16_t float_to_half(float value) {
    if (value != value) return kNan16;
    const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffff;
    const uint16_t sign = bits >> 16 & 0x8000;
    if (magnitude >= 0x477ff000) return sign | 0x7c00;  // 65520 and more
    if (magnitude < 0x38800000) {                       // below the normal ones: the sum rounds at 2^-24
        return sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f));
    }
    return sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

inline float clamp_to_half(float value) {  // NaN passes both comparisons
    return value > 65504.0f ? 65504.0f : value < -65504.0f ? -65504.0f : value;
}

// Rounding twice errs only where the double is next to the middle of two floats: tried for all floats, it never is.
inline float reciprocal_sqrt(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }

}  // namespace headrace::emulation
