// A group of 16 columns of F16, BF16 or F32 weights times up to eight float rows.
#pragma once

#include "packed.h"

namespace mk {

// Float activations, `stride` floats from row to row.
struct FloatRows {
  const float* data;
  int64_t stride;
};

namespace detail {

template <Format F>
MK_INLINE Floats load_weights(const uint8_t* p) {
  if constexpr (F == Format::kF16)
    return Floats::load_f16(p);
  else if constexpr (F == Format::kBF16)
    return Floats::load_bf16(p);
  else
    return Floats::load(p);
}

// k in [K0, K1) of one group: tile[r * tile_stride + c] for rows r0 .. r0 + R. Even and odd k are summed apart,
// each ascending, then added: two chains where one would wait for itself. `stream` as for quantized weights.
template <Format F, int K0, int K1, int R>
MK_INLINE void float_group(const uint8_t* group, FloatRows x, int r0, Stream* stream, float* tile,
                           int tile_stride) {
  constexpr int bytes = step_bytes(F), lane_bytes = bytes / kGroup, pairs = (K1 - K0) / 2;
  MK_UNROLL for (int lane = 0; lane < kGroup; lane += kLanes) {
    const uint8_t* weights = group + static_cast<int64_t>(K0) * bytes + lane * lane_bytes;
    const float* row = x.data + r0 * x.stride;
    Floats even[R], odd[R];
    MK_UNROLL for (int r = 0; r < R; ++r) even[r] = odd[r] = Floats::zero();
    for (int p = 0; p < pairs; ++p, weights += 2 * bytes, row += 2) {
      if (stream && lane == 0) stream->fetch(2 * bytes, 2 * bytes);
      const Floats w0 = load_weights<F>(weights), w1 = load_weights<F>(weights + bytes);
      MK_UNROLL for (int r = 0; r < R; ++r) {
        even[r] = fma(w0, Floats::splat(row[r * x.stride]), even[r]);
        odd[r] = fma(w1, Floats::splat(row[r * x.stride + 1]), odd[r]);
      }
    }
    if constexpr ((K1 - K0) % 2 == 1) {
      const Floats w = load_weights<F>(weights);
      MK_UNROLL for (int r = 0; r < R; ++r) even[r] = fma(w, Floats::splat(row[r * x.stride]), even[r]);
    }
    MK_UNROLL for (int r = 0; r < R; ++r) add(even[r], odd[r]).store(tile + r * tile_stride + lane);
  }
}

}  // namespace detail
}  // namespace mk
