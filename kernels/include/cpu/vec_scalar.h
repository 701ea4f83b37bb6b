// Plain C++ for any other CPU: sixteen lanes in a loop, which compilers vectorise where they can.
// Included by vec.h only. A CPU without fused multiply-add computes it in software: exact, but slow.
#pragma once

#include <cmath>

#define MK_UNROLL

namespace mk {

inline constexpr const char* kBackend = "scalar";
inline constexpr int kLanes = 16;
inline constexpr int kRowGroup = 4;

// IEEE half to single, exact; subnormals through a power-of-two product.
MK_INLINE float float_of_f16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16, rest = half & 0x7fffu;
  if (rest >= 0x7c00u) return float_of_bits(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  if (rest < 0x400u) {
    const float magnitude = static_cast<float>(rest) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  return float_of_bits(sign | ((rest << 13) + (112u << 23)));
}

struct Floats {
  float v[kLanes];
  static MK_INLINE Floats splat(float x) {
    Floats out;
    for (int i = 0; i < kLanes; ++i) out.v[i] = x;
    return out;
  }
  static MK_INLINE Floats zero() { return splat(0.0f); }
  static MK_INLINE Floats load(const void* p) {
    Floats out;
    std::memcpy(out.v, p, sizeof out.v);
    return out;
  }
  static MK_INLINE Floats load_f16(const void* p) {
    uint16_t halves[kLanes];
    std::memcpy(halves, p, sizeof halves);
    Floats out;
    for (int i = 0; i < kLanes; ++i) out.v[i] = float_of_f16(halves[i]);
    return out;
  }
  static MK_INLINE Floats load_bf16(const void* p) {
    uint16_t halves[kLanes];
    std::memcpy(halves, p, sizeof halves);
    Floats out;
    for (int i = 0; i < kLanes; ++i) out.v[i] = float_of_bits(static_cast<uint32_t>(halves[i]) << 16);
    return out;
  }
  MK_INLINE void store(float* p) const { std::memcpy(p, v, sizeof v); }
};
MK_INLINE Floats mul(Floats a, Floats b) {
  for (int i = 0; i < kLanes; ++i) a.v[i] *= b.v[i];
  return a;
}
MK_INLINE Floats add(Floats a, Floats b) {
  for (int i = 0; i < kLanes; ++i) a.v[i] += b.v[i];
  return a;
}
MK_INLINE Floats fma(Floats a, Floats b, Floats c) {
  for (int i = 0; i < kLanes; ++i) c.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
  return c;
}

struct Quads {
  uint8_t v[4 * kLanes];
  static MK_INLINE Quads load(const uint8_t* p) {
    Quads out;
    std::memcpy(out.v, p, sizeof out.v);
    return out;
  }
  MK_INLINE Quads low_nibbles() const {
    Quads out;
    for (int i = 0; i < 4 * kLanes; ++i) out.v[i] = v[i] & 15;
    return out;
  }
  MK_INLINE Quads high_nibbles() const {
    Quads out;
    for (int i = 0; i < 4 * kLanes; ++i) out.v[i] = v[i] >> 4;
    return out;
  }
};

struct Dot {
  int32_t sum[kLanes];
  static MK_INLINE Dot start_at(int32_t value) {
    Dot out;
    for (int i = 0; i < kLanes; ++i) out.sum[i] = value;
    return out;
  }
  MK_INLINE void add(const Quads& w, int32_t quad) {
    int8_t x[4];
    std::memcpy(x, &quad, sizeof x);
    for (int i = 0; i < kLanes; ++i)
      for (int k = 0; k < 4; ++k) sum[i] += static_cast<int32_t>(w.v[4 * i + k]) * x[k];
  }
  MK_INLINE Floats floats() const {
    Floats out;
    for (int i = 0; i < kLanes; ++i) out.v[i] = static_cast<float>(sum[i]);
    return out;
  }
};

struct Dot4 : Dot {
  static MK_INLINE Dot4 start() { return {start_at(0)}; }
  static MK_INLINE Dot4 start_at_minus_8(int32_t minus_sum) { return {start_at(8 * minus_sum)}; }
};
struct Dot8 : Dot {
  static MK_INLINE Dot8 start(int32_t minus_sum) { return {start_at(128 * minus_sum)}; }
};

// Largest magnitude of 32 floats, NaN above all: without their signs, floats are ordered as their bits are.
MK_INLINE float block_amax(const float* x) {
  uint32_t most = 0;
  for (int i = 0; i < kBlock; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7fffffffu;
    most = bits > most ? bits : most;
  }
  return float_of_bits(most);
}

// q = round-half-even(x * inverse) of 32 floats; returns the sum of q.
MK_INLINE int32_t block_quantize(const float* x, float inverse, int8_t* q) {
  int32_t sum = 0;
  for (int i = 0; i < kBlock; ++i) {
    const float rounded = __builtin_nearbyintf(x[i] * inverse);
    const float capped = rounded < 127.0f ? rounded : 127.0f;  // beside a NaN anything may come
    q[i] = static_cast<int8_t>(capped > -127.0f ? capped : -127.0f);
    sum += q[i];
  }
  return sum;
}

}  // namespace mk
