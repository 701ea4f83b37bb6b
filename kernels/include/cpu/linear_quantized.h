// A group of 16 columns of Q4_1, Q4_0 or Q8_0 weights times up to eight quantized rows.
#pragma once

#include <type_traits>

#include "packed.h"
#include "quantize.h"

namespace mk::detail {

template <Format F>
using DotOf = std::conditional_t<F == Format::kQ8_0, Dot8, Dot4>;

template <Format F>
MK_INLINE DotOf<F> start_dot(int32_t minus_sum) {
  if constexpr (F == Format::kQ8_0)
    return Dot8::start(minus_sum);
  else if constexpr (F == Format::kQ4_0)
    return Dot4::start_at_minus_8(minus_sum);
  else
    return Dot4::start();
}

// dots[i] += the block's weights times rows row .. row + R, exactly.
template <Format F, int R>
MK_INLINE void block_dots(const uint8_t* body, const Q8Block& x, int row, DotOf<F> (&dots)[R]) {
  if constexpr (F == Format::kQ8_0) {
    MK_UNROLL for (int j = 0; j < 8; ++j) {
      const Quads w = Quads::load(body + 64 * j);
      MK_UNROLL for (int r = 0; r < R; ++r) dots[r].add(w, load_quad(x.q[row + r] + 4 * j));
    }
  } else {
    MK_UNROLL for (int j = 0; j < 4; ++j) {
      const Quads both = Quads::load(body + 64 * j);
      const Quads low = both.low_nibbles(), high = both.high_nibbles();
      MK_UNROLL for (int r = 0; r < R; ++r) {
        dots[r].add(low, load_quad(x.q[row + r] + 4 * j));
        dots[r].add(high, load_quad(x.q[row + r] + 16 + 4 * j));
      }
    }
  }
}

// Blocks [K0 / 32, K1 / 32) of one group: tile[r * tile_stride + c] for rows r0 .. r0 + R, all of one panel.
// `stream`: fetched meanwhile, as much as is read; null: nothing.
template <Format F, int K, int K0, int K1, int R>
MK_INLINE void quantized_group(const uint8_t* group, const Q8Block* x, int r0, Stream* stream, float* tile,
                               int tile_stride) {
  constexpr int first = K0 / kBlock, blocks = K1 / kBlock - first, all_blocks = K / kBlock;
  constexpr int64_t fetch = divide_up(group_bytes(F, K) / all_blocks, 64) * 64;
  const Q8Block* panel = x + r0 / kPanel * blocks;
  const int row = r0 % kPanel;
  MK_UNROLL for (int lane = 0; lane < kGroup; lane += kLanes) {
    const uint8_t* header = group + first * block_header_bytes(F) + 2 * lane;
    const uint8_t* body = group + group_header_bytes(F, K) + first * step_bytes(F) + 4 * lane;
    Floats sums[R];
    MK_UNROLL for (int r = 0; r < R; ++r) sums[r] = Floats::zero();
    for (int b = 0; b < blocks; ++b) {
      if (stream && lane == 0) stream->fetch(fetch, group_bytes(F, K) / all_blocks);
      const Q8Block& block = panel[b];
      DotOf<F> dots[R];
      MK_UNROLL for (int r = 0; r < R; ++r) dots[r] = start_dot<F>(block.minus_sum[row + r]);
      block_dots<F, R>(body, block, row, dots);
      const Floats d = Floats::load_f16(header);
      MK_UNROLL for (int r = 0; r < R; ++r)
        sums[r] = fma(mul(d, Floats::splat(block.scale[row + r])), dots[r].floats(), sums[r]);
      if constexpr (F == Format::kQ4_1) {
        const Floats m = Floats::load_f16(header + 32);
        MK_UNROLL for (int r = 0; r < R; ++r)
          sums[r] = fma(m, Floats::splat(block.scaled_sum[row + r]), sums[r]);
      }
      header += block_header_bytes(F);
      body += step_bytes(F);
    }
    MK_UNROLL for (int r = 0; r < R; ++r) sums[r].store(tile + r * tile_stride + lane);
  }
}

}  // namespace mk::detail
