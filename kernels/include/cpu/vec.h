// Sixteen output columns as vector lanes, by three back ends chosen at compile time.
//
// Every back end does the same float operations in the same order for a lane, so results are the same bits
// whichever is compiled: integer sums are exact in any order, floats only ever meet mul, fma and round here.
// A back end defines MK_UNROLL (before loops over registers), kLanes (16, or 8: a group of 16 columns is then
// done in two halves) and
//   Floats: splat, load, load_f16, load_bf16, zero, mul, fma, store;
//   Quads:  4 bytes (consecutive k) of each lane; load, low_nibbles, high_nibbles;
//   Dot4:   exact sum of nibbles times int8 over a block of 32 (8 add calls);
//   Dot8:   exact sum of (byte - 128) times int8 over a block of 32, given minus the int8s' sum.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__FAST_MATH__)
#error "these kernels promise the order of float operations: do not compile them with -ffast-math"
#endif

#define MK_INLINE inline __attribute__((always_inline))

namespace mk {

inline constexpr int kGroup = 16;  // output columns packed together
inline constexpr int kBlock = 32;  // consecutive k that share a scale

constexpr int64_t divide_up(int64_t value, int64_t step) { return (value + step - 1) / step; }

MK_INLINE int32_t load_quad(const int8_t* x) {
  int32_t quad;
  std::memcpy(&quad, x, sizeof quad);
  return quad;
}

MK_INLINE float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// One cache line at `address` into L2, from where the core fetches what it streams; any address is allowed. L1 is
// too small for the distance that memory needs.
MK_INLINE void prefetch_line(const void* address) { __builtin_prefetch(address, 0, 2); }

// The hook for what comes next, such as the first tiles of the next op: `bytes` from `address` on.
MK_INLINE void prefetch(const void* address, int64_t bytes) {
  const char* line = static_cast<const char*>(address);
  for (int64_t at = 0; at < bytes; at += 64) prefetch_line(line + at);
}

}  // namespace mk

#if defined(MK_FORCE_SCALAR)
#include "vec_scalar.h"
#elif defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include "vec_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "vec_avx2.h"
#else
#include "vec_scalar.h"
#endif
