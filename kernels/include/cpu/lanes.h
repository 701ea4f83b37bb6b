// Sixteen float32 lanes, on whatever vector unit the target has. Every operation is lane by lane, or reduces
// in one fixed order, so that a value's bits depend on nothing but its inputs.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace headrace {

constexpr int kLanes = 16;
using Half = uint16_t;  // IEEE binary16 as stored

#if defined(__AVX512F__)

struct Lanes {
    __m512 v;
};
inline Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Lanes a) { _mm512_storeu_ps(p, a.v); }
inline Lanes splat(float x) { return {_mm512_set1_ps(x)}; }
inline Lanes operator+(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Lanes operator-(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Lanes operator*(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Lanes operator/(Lanes a, Lanes b) { return {_mm512_div_ps(a.v, b.v)}; }
// Of max and min: the second operand where either is a NaN.
inline Lanes max(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Lanes min(Lanes a, Lanes b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Lanes round_even(Lanes a) { return {_mm512_roundscale_ps(a.v, 8)}; }
// The first lane that equals x; kLanes where none does.
inline int first_equal(Lanes a, float x) {
    return __builtin_ctz(_mm512_cmp_ps_mask(a.v, _mm512_set1_ps(x), _CMP_EQ_OQ) | 1 << kLanes);
}
// 2^n for whole n in [-126, 127]; 1 for a NaN.
inline Lanes power_of_two(Lanes n) {
    const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(biased, 23))};
}
inline Lanes load(const Half* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline void store(Half* p, Lanes a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, 8));
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

struct Lanes {
    __m256 low, high;
};
inline Lanes load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Lanes a) { _mm256_storeu_ps(p, a.low), _mm256_storeu_ps(p + 8, a.high); }
inline Lanes splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Lanes operator+(Lanes a, Lanes b) { return {a.low + b.low, a.high + b.high}; }
inline Lanes operator-(Lanes a, Lanes b) { return {a.low - b.low, a.high - b.high}; }
inline Lanes operator*(Lanes a, Lanes b) { return {a.low * b.low, a.high * b.high}; }
inline Lanes operator/(Lanes a, Lanes b) { return {a.low / b.low, a.high / b.high}; }
inline Lanes max(Lanes a, Lanes b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline Lanes min(Lanes a, Lanes b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
inline Lanes fma(Lanes a, Lanes b, Lanes c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Lanes round_even(Lanes a) { return {_mm256_round_ps(a.low, 8), _mm256_round_ps(a.high, 8)}; }
inline int first_equal(Lanes a, float x) {
    const auto equal = [x](__m256 v) { return _mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_set1_ps(x), _CMP_EQ_OQ)); };
    return __builtin_ctz(equal(a.low) | equal(a.high) << 8 | 1 << kLanes);
}
inline __m256 power_of_two(__m256 n) {
    const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}
inline Lanes power_of_two(Lanes n) { return {power_of_two(n.low), power_of_two(n.high)}; }
inline Lanes load(const Half* p) {
    const __m128i* halves = reinterpret_cast<const __m128i*>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
}
inline void store(Half* p, Lanes a) {
    __m128i* halves = reinterpret_cast<__m128i*>(p);
    _mm_storeu_si128(halves, _mm256_cvtps_ph(a.low, 8));
    _mm_storeu_si128(halves + 1, _mm256_cvtps_ph(a.high, 8));
}

#else

struct Lanes {
    float v[kLanes];
};
template <class F>
inline Lanes each(F f) {
    Lanes result;
    for (int i = 0; i < kLanes; i++) result.v[i] = f(i);
    return result;
}
inline float half_to_float(Half h) {
    const uint32_t sign = uint32_t{h & 0x8000u} << 16, exponent = (h >> 10) & 31, fraction = h & 1023;
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * std::ldexp(static_cast<float>(fraction), -24);
    const uint32_t bits = sign | ((exponent == 31 ? 255 : exponent + 112) << 23) | (fraction << 13);
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline Half float_to_half(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t sign = (bits >> 16) & 0x8000;
    const float size = std::fabs(x);
    if (!(size <= 3.4e38f)) return static_cast<Half>(sign | (size != size ? 0x7e00 : 0x7c00));
    if (size >= 65520.0f) return static_cast<Half>(sign | 0x7c00);
    if (size < 6.103515625e-05f) return static_cast<Half>(sign | uint32_t(std::nearbyint(size * 16777216.0f)));
    int exponent;
    const float fraction = std::frexp(size, &exponent);  // in [0.5, 1)
    const uint32_t mantissa = uint32_t(std::nearbyint(fraction * 2048.0f));  // carries into the exponent
    return static_cast<Half>(sign | (uint32_t(exponent + 13) * 1024 + mantissa));
}
inline Lanes load(const float* p) { return each([=](int i) { return p[i]; }); }
inline void store(float* p, Lanes a) { std::memcpy(p, a.v, sizeof a.v); }
inline Lanes splat(float x) { return each([=](int) { return x; }); }
inline Lanes operator+(Lanes a, Lanes b) { return each([&](int i) { return a.v[i] + b.v[i]; }); }
inline Lanes operator-(Lanes a, Lanes b) { return each([&](int i) { return a.v[i] - b.v[i]; }); }
inline Lanes operator*(Lanes a, Lanes b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
inline Lanes operator/(Lanes a, Lanes b) { return each([&](int i) { return a.v[i] / b.v[i]; }); }
inline Lanes max(Lanes a, Lanes b) { return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
inline Lanes min(Lanes a, Lanes b) { return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return a * b + c; }  // contraction is off: two roundings
inline Lanes round_even(Lanes a) { return each([&](int i) { return std::nearbyint(a.v[i]); }); }
inline int first_equal(Lanes a, float x) {
    int lane = 0;
    while (lane < kLanes && a.v[lane] != x) lane++;
    return lane;
}
inline Lanes power_of_two(Lanes n) {
    return each([&](int i) { return n.v[i] == n.v[i] ? std::ldexp(1.0f, int(n.v[i])) : 1.0f; });
}
inline Lanes load(const Half* p) { return each([=](int i) { return half_to_float(p[i]); }); }
inline void store(Half* p, Lanes a) {
    for (int i = 0; i < kLanes; i++) p[i] = float_to_half(a.v[i]);
}

#endif

inline Lanes zero_lanes() { return splat(0.0f); }

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__) && defined(__F16C__))
#if defined(__AVX512F__)
inline __m256 low_half(Lanes a) { return _mm512_castps512_ps256(a.v); }
inline __m256 high_half(Lanes a) { return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1)); }
#else
inline __m256 low_half(Lanes a) { return a.low; }
inline __m256 high_half(Lanes a) { return a.high; }
#endif

// One value of all lanes: lane i with lane i + 8, then with i + 4, i + 2 and i + 1.
template <class Whole, class Half128>
inline float fold(Lanes a, Whole whole, Half128 half) {
    const __m256 eight = whole(low_half(a), high_half(a));
    const __m128 four = half(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = half(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(half(two, _mm_movehdup_ps(two)));
}
inline float sum(Lanes a) {
    return fold(a, [](__m256 x, __m256 y) { return x + y; }, [](__m128 x, __m128 y) { return x + y; });
}
inline float highest(Lanes a) {
    return fold(a, [](__m256 x, __m256 y) { return _mm256_max_ps(x, y); },
                [](__m128 x, __m128 y) { return _mm_max_ps(x, y); });
}

#else

inline float sum(Lanes a) {
    for (int width = kLanes / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) a.v[i] += a.v[i + width];
    return a.v[0];
}
inline float highest(Lanes a) {
    float result = a.v[0];
    for (int i = 1; i < kLanes; i++) result = a.v[i] > result ? a.v[i] : result;
    return result;
}

#endif

// e^x: 2^n times a polynomial of degree 6 in the rest, in [-ln(2)/2, ln(2)/2]; within 2 units in the last
// place. Below -87.3 the result is 0 (so it is for -infinity), above 88.3 it stays at e^88.3; of a NaN it is one.
inline Lanes exp(Lanes x) {
    const Lanes lowest = splat(-87.3f);
    const Lanes clamped = max(lowest, min(splat(88.3f), x));
    const Lanes n = round_even(clamped * splat(1.44269504f));
    const Lanes rest = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), clamped));
    Lanes p = splat(1.0f / 720);
    p = fma(p, rest, splat(1.0f / 120));
    p = fma(p, rest, splat(1.0f / 24));
    p = fma(p, rest, splat(1.0f / 6));
    p = fma(p, rest, splat(0.5f));
    p = fma(p, rest, splat(1.0f));
    p = fma(p, rest, splat(1.0f));
#if defined(__AVX512F__)
    return {_mm512_maskz_mul_ps(_mm512_cmp_ps_mask(x.v, lowest.v, _CMP_NLT_UQ), p.v, power_of_two(n).v)};
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
    const Lanes whole = p * power_of_two(n);
    return {_mm256_and_ps(_mm256_cmp_ps(x.low, lowest.low, _CMP_NLT_UQ), whole.low),
            _mm256_and_ps(_mm256_cmp_ps(x.high, lowest.high, _CMP_NLT_UQ), whole.high)};
#else
    const Lanes whole = p * power_of_two(n);
    return each([&](int i) { return x.v[i] < -87.3f ? 0.0f : whole.v[i]; });
#endif
}

inline float exp_one(float x) {
    float v[kLanes];
    store(v, exp(splat(x)));
    return v[0];
}

}  // namespace headrace
