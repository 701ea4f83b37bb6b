// Activation rows as int8 in blocks of 32, laid out for linear.h to broadcast 4 consecutive k at a time.
#pragma once

#include "vec.h"

namespace mk {

inline constexpr int kPanel = 8;  // rows stored together

// One block of 32 k of eight rows. Rows never written are never read.
struct alignas(32) Q8Block {
  int8_t q[kPanel][kBlock];
  float scale[kPanel];        // d: x is about d * q
  float scaled_sum[kPanel];   // d * sum(q), for weights with minima
  int32_t minus_sum[kPanel];  // -sum(q), exact, for unsigned weights
};

// How many blocks hold `rows` rows of K columns: panels of eight rows, each K / 32 blocks in ascending k.
constexpr int64_t q8_blocks(int K, int rows) { return divide_up(rows, kPanel) * (K / kBlock); }

MK_INLINE void quantize_block(const float* x, Q8Block& out, int row) {
  const float amax = block_amax(x), inverse = 127.0f / amax;
  // Zeros, or so small that its inverse is infinite; not where amax is a NaN, whose scale is one too.
  const bool is_zero = inverse > 3.4028234663852886e38f;
  const float scale = is_zero ? 0.0f : amax / 127.0f;
  const int32_t sum = block_quantize(x, is_zero ? 0.0f : inverse, out.q[row]);
  out.scale[row] = scale;
  out.scaled_sum[row] = scale * static_cast<float>(sum);
  out.minus_sum[row] = -sum;
}

// d = amax / 127, q = round-half-even(x * (127 / amax)), all in float32. `x_stride` is in floats.
// A block with an infinity or a NaN has that scale, so that it cannot pass for a number further on.
template <int K>
MK_INLINE void quantize_rows(const float* x, int64_t x_stride, int rows, Q8Block* out) {
  static_assert(K % kBlock == 0, "quantized weights come in blocks of 32 along K");
  constexpr int blocks = K / kBlock;
  for (int row = 0; row < rows; ++row) {
    Q8Block* panel = out + row / kPanel * blocks;
    for (int b = 0; b < blocks; ++b) quantize_block(x + row * x_stride + b * kBlock, panel[b], row % kPanel);
  }
}

}  // namespace mk
