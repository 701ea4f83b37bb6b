// One pass of a model's packed weights over some rows, by the product's kernels: the floor under a step.
//
// Built and called by weight_pass.py. SHAPES lists the ops' (format, in_features): `X(kQ4_1, 576) ...`.
// Every thread takes an equal run of each op's column groups and quantizes its own rows, as the workers do;
// there are no norms, no attention and no barriers.
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <thread>
#include <vector>

#include "cpu/linear.h"

namespace {

using namespace mk;

struct Matrix {
  int32_t format;
  int32_t in_features;
  int32_t out_features;
  const uint8_t* data;
};

constexpr int kMostRows = 256;
constexpr int kMostColumns = 16384;

float* row_data() {
  static std::vector<float> rows = [] {
    std::vector<float> values(static_cast<size_t>(kMostRows) * kMostColumns);
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i * 2654435761u % 2001) / 1000.0f - 1.0f;
    return values;
  }();
  return rows.data();
}

// The sum of all outputs, so that no work can be left out.
template <Format F, int K>
__attribute__((noinline)) float pass(const Matrix& matrix, int rows, int n0, int n1, Q8Block* blocks) {
  float total = 0.0f;
  const auto sink = [&](int, int, auto num_rows, const float* tile) {
    Floats sum = Floats::zero();
    for (int i = 0; i < num_rows() * kGroup; i += kLanes) sum = add(sum, Floats::load(tile + i));
    alignas(64) float lanes[kLanes];
    sum.store(lanes);
    total += lanes[0];
    for (int i = 1; i < kLanes; ++i) total += lanes[i];
  };
  if constexpr (is_quantized(F)) {
    quantize_rows<K>(row_data(), kMostColumns, rows, blocks);
    linear_tile<F, K>(matrix.data, n0, n1, blocks, rows, matrix.data, sink);
  } else {
    linear_tile<F, K>(matrix.data, n0, n1, FloatRows{row_data(), kMostColumns}, rows, matrix.data, sink);
  }
  return total;
}

float run_matrix(const Matrix& matrix, int rows, int worker, int workers, Q8Block* blocks) {
  const int64_t groups = matrix.out_features / kGroup;
  const int n0 = static_cast<int>(groups * worker / workers) * kGroup;
  const int n1 = static_cast<int>(groups * (worker + 1) / workers) * kGroup;
#define X(FORMAT, K)                                                                         \
  if (matrix.format == static_cast<int>(Format::FORMAT) && matrix.in_features == K)          \
    return pass<Format::FORMAT, K>(matrix, rows, n0, n1, blocks);
  SHAPES
#undef X
  std::abort();
}

using Words = uint64_t __attribute__((vector_size(4 * kLanes)));  // a register
constexpr int kParts = 64 / sizeof(Words);

double now_ms() {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Runs `work(worker)` on all workers at once, the caller being worker 0; milliseconds from start to the last end.
template <class Work>
double timed(int workers, const Work& work) {
  std::atomic<int> ready{0};
  std::atomic<bool> go{false};
  std::vector<std::thread> threads;
  for (int w = 1; w < workers; ++w)
    threads.emplace_back([&, w] {
      ready.fetch_add(1);
      while (!go.load(std::memory_order_acquire)) std::this_thread::yield();
      work(w);
    });
  while (ready.load() < workers - 1) std::this_thread::yield();
  const double start = now_ms();
  go.store(true, std::memory_order_release);
  work(0);
  for (auto& thread : threads) thread.join();
  return now_ms() - start;
}

}  // namespace

extern "C" {

const char* backend() { return kBackend; }

// Milliseconds of each of `repeats` passes; returns a checksum.
float weight_pass(const Matrix* matrices, int num_matrices, int rows, int workers, int repeats, double* out_ms) {
  std::vector<float> sums(workers);
  std::vector<Q8Block*> blocks(workers);
  const size_t block_bytes = q8_blocks(kMostColumns, rows) * sizeof(Q8Block);
  for (auto& one : blocks) one = static_cast<Q8Block*>(std::aligned_alloc(64, divide_up(block_bytes, 64) * 64));
  row_data();
  for (int i = 0; i < repeats; ++i)
    out_ms[i] = timed(workers, [&](int worker) {
      for (int m = 0; m < num_matrices; ++m)
        sums[worker] += run_matrix(matrices[m], rows, worker, workers, blocks[worker]);
    });
  for (auto* one : blocks) std::free(one);
  float total = 0.0f;
  for (const float sum : sums) total += sum;
  return total;
}

// Milliseconds of each of `repeats` plain reads of the same bytes.
uint64_t read_pass(const Matrix* matrices, int num_matrices, const int64_t* num_bytes, int workers, int repeats,
                   double* out_ms) {
  std::vector<uint64_t> sums(workers);
  for (int i = 0; i < repeats; ++i)
    out_ms[i] = timed(workers, [&](int worker) {
      Words totals[kParts] = {};
      for (int m = 0; m < num_matrices; ++m) {
        const int64_t lines = num_bytes[m] / 64;
        const uint8_t* data = matrices[m].data;
        for (int64_t line = lines * worker / workers; line < lines * (worker + 1) / workers; ++line) {
          prefetch_line(data + line * 64 + 4096);
          for (int part = 0; part < kParts; ++part) {
            Words words;
            std::memcpy(&words, data + line * 64 + part * sizeof words, sizeof words);
            totals[part] += words;
          }
        }
      }
      for (const Words& total : totals)
        for (size_t i = 0; i < sizeof(Words) / 8; ++i) sums[worker] += total[i];
    });
  uint64_t total = 0;
  for (const uint64_t sum : sums) total += sum;
  return total;
}
}
