// The CPU kernels behind a C interface, for ctypes: one instantiation for each size the tests use.
#include "cpu/linear.h"

#include <cstdlib>
#include <vector>

namespace {

using namespace mk;

struct Blocks {
  explicit Blocks(int64_t count)
      : data(static_cast<Q8Block*>(std::aligned_alloc(alignof(Q8Block), count * sizeof(Q8Block)))) {}
  ~Blocks() { std::free(data); }
  Blocks(const Blocks&) = delete;
  Q8Block* data;
};

// y[r * y_stride + n] from float rows, whatever the format takes as activations.
template <Format F, int K, int W, int K0, int K1>
void run(const uint8_t* packed, int n0, int n1, const float* x, int64_t x_stride, int rows, float* y,
         int64_t y_stride) {
  const auto sink = [&](int n, int r0, auto num_rows, const float* tile) {
    for (int r = 0; r < num_rows(); ++r) std::memcpy(y + (r0 + r) * y_stride + n, tile + r * W, W * sizeof(float));
  };
  if constexpr (is_quantized(F)) {
    Blocks blocks(q8_blocks(K1 - K0, rows));
    quantize_rows<K1 - K0>(x + K0, x_stride, rows, blocks.data);
    linear_tile<F, K, W, K0, K1>(packed, n0, n1, blocks.data, rows, packed, sink);
  } else {
    linear_tile<F, K, W, K0, K1>(packed, n0, n1, FloatRows{x + K0, x_stride}, rows, packed, sink);
  }
}

using Run = void (*)(const uint8_t*, int, int, const float*, int64_t, int, float*, int64_t);

struct Case {
  int K, W, K0, K1;
  Run run;
};

template <Format F>
constexpr Case kCases[] = {
    {32, 16, 0, 32, run<F, 32, 16, 0, 32>},       {96, 16, 0, 96, run<F, 96, 16, 0, 96>},
    {576, 16, 0, 576, run<F, 576, 16, 0, 576>},   {576, 32, 0, 576, run<F, 576, 32, 0, 576>},
    {576, 64, 0, 576, run<F, 576, 64, 0, 576>},   {576, 16, 0, 288, run<F, 576, 16, 0, 288>},
    {576, 16, 288, 576, run<F, 576, 16, 288, 576>}};

template <Format F>
int find(int K, int W, int K0, int K1, Run* out) {
  for (const Case& one : kCases<F>)
    if (one.K == K && one.W == W && one.K0 == K0 && one.K1 == K1) return *out = one.run, 1;
  return 0;
}

}  // namespace

extern "C" {

const char* backend() { return kBackend; }

// 1, or 0 where the case was not compiled in.
int linear(int format, int K, int W, int K0, int K1, const uint8_t* packed, int n0, int n1, const float* x,
           int64_t x_stride, int rows, float* y, int64_t y_stride) {
  Run chosen = nullptr;
  int found = 0;
  switch (static_cast<Format>(format)) {
    case Format::kQ4_1: found = find<Format::kQ4_1>(K, W, K0, K1, &chosen); break;
    case Format::kQ4_0: found = find<Format::kQ4_0>(K, W, K0, K1, &chosen); break;
    case Format::kQ8_0: found = find<Format::kQ8_0>(K, W, K0, K1, &chosen); break;
    case Format::kF16: found = find<Format::kF16>(K, W, K0, K1, &chosen); break;
    case Format::kBF16: found = find<Format::kBF16>(K, W, K0, K1, &chosen); break;
    case Format::kF32: found = find<Format::kF32>(K, W, K0, K1, &chosen); break;
  }
  if (found) chosen(packed, n0, n1, x, x_stride, rows, y, y_stride);
  return found;
}

// Rows of 96 columns, back in row order: q [rows, 96], the others [rows, 3].
void quantize(const float* x, int rows, int8_t* q, float* scale, float* scaled_sum, int32_t* minus_sum) {
  constexpr int K = 96, blocks = K / kBlock;
  Blocks out(q8_blocks(K, rows));
  quantize_rows<K>(x, K, rows, out.data);
  for (int r = 0; r < rows; ++r)
    for (int b = 0; b < blocks; ++b) {
      const Q8Block& block = out.data[r / kPanel * blocks + b];
      std::memcpy(q + r * K + b * kBlock, block.q[r % kPanel], kBlock);
      scale[r * blocks + b] = block.scale[r % kPanel];
      scaled_sum[r * blocks + b] = block.scaled_sum[r % kPanel];
      minus_sum[r * blocks + b] = block.minus_sum[r % kPanel];
    }
}
}
