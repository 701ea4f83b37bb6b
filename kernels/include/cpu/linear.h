// Rows times packed weights: a tile of output columns, from memory once, for any number of rows.
//
// A row's result is the same bits whatever rows are computed with it and whichever back end is compiled: its
// columns are lanes, and each lane sees the same float operations in ascending order of k. Groups of rows only
// change how often a weight is unpacked.
#pragma once

#include <type_traits>

#include "linear_float.h"
#include "linear_quantized.h"

namespace mk {

// What a format's kernels take as activations: quantized blocks, or float rows.
template <Format F>
using Input = std::conditional_t<is_quantized(F), const Q8Block*, FloatRows>;

// How far ahead of its use a weight is fetched while one group of rows streams through.
inline constexpr int64_t kPrefetchBytes = 16384;

namespace detail {

// One group of R rows (from r0 on, within a panel) times W columns, handed to the sink.
template <Format F, int K, int W, int K0, int K1, int R, class Sink>
MK_INLINE void row_group(const uint8_t* packed, int n, Input<F> x, int r0, Stream* stream, Sink& sink) {
  alignas(64) float tile[R * W];
  for (int c = 0; c < W; c += kGroup) {
    const uint8_t* group = group_of<F, K>(packed, n + c);
    if constexpr (is_quantized(F))
      quantized_group<F, K, K0, K1, R>(group, x, r0, stream, tile + c, W);
    else
      float_group<F, K0, K1, R>(group, x, r0, stream, tile + c, W);
  }
  sink(n, r0, std::integral_constant<int, R>{}, static_cast<const float*>(tile));
}

}  // namespace detail

// Columns [n0, n1), multiples of W, of `rows` rows times the weights of k in [K0, K1).
//
// W is how many columns the sink is given at once, a multiple of 16: 32 for SWIGLU's gate and up, head_dim where
// an epilogue needs whole heads. The sink is called as `sink(int n, int r0, auto num_rows, const float* tile)`
// for columns [n, n + W) of rows [r0, r0 + num_rows()): tile[r * W + c], num_rows a compile-time constant.
// `x` covers only [K0, K1): quantize_rows<K1 - K0>, or float rows from column K0 on.
// `then`: what is read after these weights; its first bytes are fetched while the last of these are multiplied.
template <Format F, int K, int W = kGroup, int K0 = 0, int K1 = K, class Sink>
MK_INLINE void linear_tile(const uint8_t* packed, int n0, int n1, Input<F> x, int rows, const uint8_t* then,
                           Sink&& sink) {
  static_assert(W % kGroup == 0 && K0 % step_k(F) == 0 && K1 % step_k(F) == 0 && K % step_k(F) == 0);
  // Later groups of rows find the weights in the cache, so the first has time to fetch the next columns'.
  const int64_t far = W / kGroup * group_bytes(F, K);
  const int64_t ahead = rows > kRowGroup ? far : kPrefetchBytes;
  Stream stream(group_of<F, K>(packed, n0) + group_bytes(F, K) * K0 / K + ahead, group_of<F, K>(packed, n1), then);
  for (int n = n0; n < n1; n += W) {
    int r = 0;
    for (; r + kRowGroup <= rows; r += kRowGroup)
      detail::row_group<F, K, W, K0, K1, kRowGroup>(packed, n, x, r, r == 0 ? &stream : nullptr, sink);
    if constexpr (kRowGroup > 4)
      if (r + 4 <= rows) {
        detail::row_group<F, K, W, K0, K1, 4>(packed, n, x, r, r == 0 ? &stream : nullptr, sink);
        r += 4;
      }
    if (r + 2 <= rows) {
      detail::row_group<F, K, W, K0, K1, 2>(packed, n, x, r, r == 0 ? &stream : nullptr, sink);
      r += 2;
    }
    if (r < rows) detail::row_group<F, K, W, K0, K1, 1>(packed, n, x, r, r == 0 ? &stream : nullptr, sink);
  }
}

}  // namespace mk
