// AVX2 with FMA and F16C (and AVX-VNNI where predefined): a register is half a group, 8 columns.
// Included by vec.h only.
#pragma once

#include <immintrin.h>

#define MK_UNROLL _Pragma("GCC unroll 16")

namespace mk {

inline constexpr const char* kBackend = "avx2";
inline constexpr int kLanes = 8;
inline constexpr int kRowGroup = 4;  // rows whose accumulators fit the registers

struct Floats {
  __m256 v;
  static MK_INLINE Floats zero() { return {_mm256_setzero_ps()}; }
  static MK_INLINE Floats splat(float x) { return {_mm256_set1_ps(x)}; }
  static MK_INLINE Floats load(const void* p) { return {_mm256_loadu_ps(static_cast<const float*>(p))}; }
  static MK_INLINE Floats load_f16(const void* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p)))};
  }
  static MK_INLINE Floats load_bf16(const void* p) {
    const __m256i halves = _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(halves, 16))};
  }
  MK_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
};
MK_INLINE Floats mul(Floats a, Floats b) { return {_mm256_mul_ps(a.v, b.v)}; }
MK_INLINE Floats add(Floats a, Floats b) { return {_mm256_add_ps(a.v, b.v)}; }
MK_INLINE Floats fma(Floats a, Floats b, Floats c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }

struct Quads {
  __m256i v;
  static MK_INLINE Quads load(const uint8_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
  }
  MK_INLINE Quads low_nibbles() const { return {_mm256_and_si256(v, _mm256_set1_epi8(15))}; }
  MK_INLINE Quads high_nibbles() const {
    return {_mm256_and_si256(_mm256_srli_epi16(v, 4), _mm256_set1_epi8(15))};
  }
};

#if defined(__AVXVNNI__)

struct Dot4 {
  __m256i sum;
  static MK_INLINE Dot4 start() { return {_mm256_setzero_si256()}; }
  static MK_INLINE Dot4 start_at_minus_8(int32_t minus_sum) {
    return {_mm256_slli_epi32(_mm256_set1_epi32(minus_sum), 3)};
  }
  MK_INLINE void add(Quads w, int32_t x) {
    sum = _mm256_dpbusd_avx_epi32(sum, w.v, _mm256_set1_epi32(x));
  }
  MK_INLINE Floats floats() const { return {_mm256_cvtepi32_ps(sum)}; }
};

struct Dot8 {
  __m256i sum;
  static MK_INLINE Dot8 start(int32_t minus_sum) {
    return {_mm256_slli_epi32(_mm256_set1_epi32(minus_sum), 7)};
  }
  MK_INLINE void add(Quads w, int32_t x) {
    sum = _mm256_dpbusd_avx_epi32(sum, w.v, _mm256_set1_epi32(x));
  }
  MK_INLINE Floats floats() const { return {_mm256_cvtepi32_ps(sum)}; }
};

#else

// Pairs summed in int16: at most 8 steps of 2 * 15 * 127 = 30,480, within its range.
struct Dot4 {
  __m256i pairs;
  __m256i first;
  static MK_INLINE Dot4 start() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static MK_INLINE Dot4 start_at_minus_8(int32_t minus_sum) {
    return {_mm256_setzero_si256(), _mm256_slli_epi32(_mm256_set1_epi32(minus_sum), 3)};
  }
  MK_INLINE void add(Quads w, int32_t x) {
    pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(w.v, _mm256_set1_epi32(x)));
  }
  MK_INLINE Floats floats() const {
    const __m256i quads = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    return {_mm256_cvtepi32_ps(_mm256_add_epi32(first, quads))};
  }
};

// Signed weights as magnitude times sign-carrying activation: 2 * 128 * 127 fits int16, unlike 2 * 255 * 127.
struct Dot8 {
  __m256i sum;
  static MK_INLINE Dot8 start(int32_t) { return {_mm256_setzero_si256()}; }
  MK_INLINE void add(Quads w, int32_t x) {
    const __m256i weight = _mm256_xor_si256(w.v, _mm256_set1_epi8(-128));
    const __m256i signed_x = _mm256_sign_epi8(_mm256_set1_epi32(x), weight);
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weight), signed_x);
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  MK_INLINE Floats floats() const { return {_mm256_cvtepi32_ps(sum)}; }
};

#endif

// Largest magnitude of 32 floats, NaN above all: without their signs, floats are ordered as their bits are.
MK_INLINE float block_amax(const float* x) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i most = _mm256_setzero_si256();
  for (int i = 0; i < kBlock; i += 8) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
    most = _mm256_max_epi32(most, _mm256_and_si256(bits, magnitude));
  }
  __m128i half = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
  half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0xb1));
  return float_of_bits(static_cast<uint32_t>(_mm_cvtsi128_si32(half)));
}

// Rounded half to even; clamped, as beside a NaN anything may come.
MK_INLINE __m256i rounded(__m256 x) {
  return _mm256_cvtps_epi32(_mm256_max_ps(_mm256_min_ps(x, _mm256_set1_ps(127.0f)), _mm256_set1_ps(-127.0f)));
}

// q = round-half-even(x * inverse) of 32 floats; returns the sum of q.
MK_INLINE int32_t block_quantize(const float* x, float inverse, int8_t* q) {
  const __m256 scale = _mm256_set1_ps(inverse);
  __m256i part[4];
  for (int i = 0; i < 4; ++i)
    part[i] = rounded(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), scale));
  const __m256i bytes =
      _mm256_packs_epi16(_mm256_packs_epi32(part[0], part[1]), _mm256_packs_epi32(part[2], part[3]));
  // The packs work within 128-bit halves; put the quads back into ascending order.
  const __m256i ascending = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), ascending);
  const __m256i sums = _mm256_add_epi32(_mm256_add_epi32(part[0], part[1]), _mm256_add_epi32(part[2], part[3]));
  __m128i half = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}

}  // namespace mk
