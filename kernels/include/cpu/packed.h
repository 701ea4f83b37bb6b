// How weights lie in memory: what megakernel/pack.py writes and the kernels read.
//
// Sixteen output rows make a group; groups follow each other, the last padded with zeros. A group is a header,
// then a body. With b counting blocks of 32 k, j quads of 4 k and c the group's 16 columns:
//   Q4_1  header f16[b][d, m][c]; body u8[b][j 0..3][c][4]: k = 4j + i in the low nibble, 16 + 4j + i in the high
//   Q4_0  header f16[b][d][c];    body as Q4_1 (a weight is d * (nibble - 8))
//   Q8_0  header f16[b][d][c];    body u8[b][j 0..7][c][4]: k = 4j + i, stored as int8 + 128
//   F16, BF16, F32  no header;    body [k][c]
// The header is padded to 64 bytes, so every body load of 64 bytes is one cache line.
#pragma once

#include "vec.h"

namespace mk {

enum class Format { kQ4_1, kQ4_0, kQ8_0, kF16, kBF16, kF32 };

constexpr bool is_quantized(Format format) {
  return format == Format::kQ4_1 || format == Format::kQ4_0 || format == Format::kQ8_0;
}

// Bytes of scales (and minima) a block of a group.
constexpr int block_header_bytes(Format format) {
  return format == Format::kQ4_1 ? 64 : is_quantized(format) ? 32 : 0;
}

// Bytes of weights of a group: a block of 32 k, or one k of a float format.
constexpr int step_bytes(Format format) {
  switch (format) {
    case Format::kQ4_1:
    case Format::kQ4_0: return 256;
    case Format::kQ8_0: return 512;
    case Format::kF32: return 64;
    default: return 32;
  }
}

constexpr int step_k(Format format) { return is_quantized(format) ? kBlock : 1; }

constexpr int64_t group_header_bytes(Format format, int K) {
  return divide_up(static_cast<int64_t>(K / kBlock) * block_header_bytes(format), 64) * 64;
}

constexpr int64_t group_bytes(Format format, int K) {
  const int64_t body = static_cast<int64_t>(K / step_k(format)) * step_bytes(format);
  return group_header_bytes(format, K) + divide_up(body, 64) * 64;
}

// Memory towards the cache in the order in which it will be read: to the end of one stretch, then another, such
// as the next op's weights, which depend on nothing.
struct Stream {
  const uint8_t* at;
  const uint8_t* end;
  const uint8_t* then;

  Stream(const uint8_t* at, const uint8_t* end, const uint8_t* then) : at(at), end(end), then(then) { turn_at_end(); }

  // `bytes` from here on, of which the next call's overlap all but `advance`.
  MK_INLINE void fetch(int64_t bytes, int64_t advance) {
    prefetch(at, bytes);
    at += advance;
    turn_at_end();
  }

 private:
  MK_INLINE void turn_at_end() {
    if (at < end) return;
    at = then + (at - end);
    end = at + (int64_t{1} << 40);
  }
};

// Of the group that holds column n, a multiple of 16.
template <Format F, int K>
MK_INLINE const uint8_t* group_of(const uint8_t* packed, int64_t n) {
  return packed + n / kGroup * group_bytes(F, K);
}

}  // namespace mk
