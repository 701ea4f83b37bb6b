// Every format over exactly sized heap buffers, for the address and undefined-behaviour sanitizers.
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <memory>

#include "cpu/linear.h"

using namespace mk;

template <class T>
struct Free {
  void operator()(T* p) const { std::free(p); }
};
template <class T>
std::unique_ptr<T, Free<T>> buffer(int64_t count) {
  return std::unique_ptr<T, Free<T>>(static_cast<T*>(std::aligned_alloc(64, divide_up(count * sizeof(T), 64) * 64)));
}

template <Format F>
void exercise(int rows) {
  constexpr int K = 96, N = 48;
  const int64_t bytes = N / kGroup * group_bytes(F, K);
  auto packed = buffer<uint8_t>(bytes);
  for (int64_t i = 0; i < bytes; ++i) packed.get()[i] = static_cast<uint8_t>(i * 37 + 11);
  auto x = std::make_unique<float[]>(rows * K);
  auto y = std::make_unique<float[]>(rows * N);
  for (int i = 0; i < rows * K; ++i) x[i] = static_cast<float>(i % 23) - 11.0f;
  if (rows > 2) x[2 * K] = __builtin_nanf(""), x[K] = __builtin_inff();
  const auto sink = [&](int n, int r0, auto num_rows, const float* tile) {
    for (int r = 0; r < num_rows(); ++r) std::memcpy(&y[(r0 + r) * N + n], tile + r * kGroup, kGroup * sizeof(float));
  };
  if constexpr (is_quantized(F)) {
    auto blocks = buffer<Q8Block>(q8_blocks(K, rows));
    quantize_rows<K>(x.get(), K, rows, blocks.get());
    linear_tile<F, K>(packed.get(), 0, N, blocks.get(), rows, packed.get(), sink);
  } else {
    linear_tile<F, K>(packed.get(), 0, N, FloatRows{x.get(), K}, rows, packed.get(), sink);
  }
}

int main() {
  for (int rows : {1, 2, 3, 7, 8, 9, 15, 20}) {
    exercise<Format::kQ4_1>(rows);
    exercise<Format::kQ4_0>(rows);
    exercise<Format::kQ8_0>(rows);
    exercise<Format::kF16>(rows);
    exercise<Format::kBF16>(rows);
    exercise<Format::kF32>(rows);
  }
  std::puts("clean");
}
