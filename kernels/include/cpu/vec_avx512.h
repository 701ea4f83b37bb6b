// AVX-512 with VNNI: a register is the whole group of 16 columns. Included by vec.h only.
#pragma once

#include <immintrin.h>

#define MK_UNROLL _Pragma("GCC unroll 16")

namespace mk {

inline constexpr const char* kBackend = "avx512_vnni";
inline constexpr int kLanes = 16;
inline constexpr int kRowGroup = 8;  // rows whose accumulators fit the registers

struct Floats {
  __m512 v;
  static MK_INLINE Floats zero() { return {_mm512_setzero_ps()}; }
  static MK_INLINE Floats splat(float x) { return {_mm512_set1_ps(x)}; }
  static MK_INLINE Floats load(const void* p) { return {_mm512_loadu_ps(p)}; }
  static MK_INLINE Floats load_f16(const void* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)))};
  }
  static MK_INLINE Floats load_bf16(const void* p) {
    const __m512i halves = _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(halves, 16))};
  }
  MK_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
};
MK_INLINE Floats mul(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
MK_INLINE Floats add(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
MK_INLINE Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }

struct Quads {
  __m512i v;
  static MK_INLINE Quads load(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
  MK_INLINE Quads low_nibbles() const { return {_mm512_and_si512(v, _mm512_set1_epi8(15))}; }
  MK_INLINE Quads high_nibbles() const {
    return {_mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15))};
  }
};

struct Dot4 {
  __m512i sum;
  static MK_INLINE Dot4 start() { return {_mm512_setzero_si512()}; }
  // Nibbles that stand for themselves minus 8.
  static MK_INLINE Dot4 start_at_minus_8(int32_t minus_sum) {
    return {_mm512_slli_epi32(_mm512_set1_epi32(minus_sum), 3)};
  }
  MK_INLINE void add(Quads w, int32_t x) { sum = _mm512_dpbusd_epi32(sum, w.v, _mm512_set1_epi32(x)); }
  MK_INLINE Floats floats() const { return {_mm512_cvtepi32_ps(sum)}; }
};

struct Dot8 {
  __m512i sum;
  static MK_INLINE Dot8 start(int32_t minus_sum) {
    return {_mm512_slli_epi32(_mm512_set1_epi32(minus_sum), 7)};
  }
  MK_INLINE void add(Quads w, int32_t x) { sum = _mm512_dpbusd_epi32(sum, w.v, _mm512_set1_epi32(x)); }
  MK_INLINE Floats floats() const { return {_mm512_cvtepi32_ps(sum)}; }
};

// Largest magnitude of 32 floats, NaN above all: without their signs, floats are ordered as their bits are.
MK_INLINE float block_amax(const float* x) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  const __m512i a = _mm512_and_si512(_mm512_loadu_si512(x), magnitude);
  const __m512i b = _mm512_and_si512(_mm512_loadu_si512(x + 16), magnitude);
  return float_of_bits(static_cast<uint32_t>(_mm512_reduce_max_epi32(_mm512_max_epi32(a, b))));
}

// Rounded half to even; clamped, as beside a NaN anything may come.
MK_INLINE __m512i rounded(__m512 x) {
  return _mm512_cvtps_epi32(_mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(127.0f)), _mm512_set1_ps(-127.0f)));
}

// q = round-half-even(x * inverse) of 32 floats; returns the sum of q.
MK_INLINE int32_t block_quantize(const float* x, float inverse, int8_t* q) {
  const __m512 scale = _mm512_set1_ps(inverse);
  const __m512i a = rounded(_mm512_mul_ps(_mm512_loadu_ps(x), scale));
  const __m512i b = rounded(_mm512_mul_ps(_mm512_loadu_ps(x + 16), scale));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(q), _mm512_cvtsepi32_epi8(a));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(q + 16), _mm512_cvtsepi32_epi8(b));
  return _mm512_reduce_add_epi32(_mm512_add_epi32(a, b));
}

}  // namespace mk
