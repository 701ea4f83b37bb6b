// Measures what a machine description says of the CPU's kernels, by running them on one core as artifacts do:
// with the artifacts' headers and flags, on operands that its caches hold. Prints lines of a name and a figure:
//   FORMAT      multiply-accumulates a microsecond of weights in this format times kManyRows rows
//   FORMAT/one  the same for one row
//   attention   the same of decode's attention, by the context's tokens alone
//   prepared    input values a microsecond that a prologue norms and rounds
// Every figure is that of the quickest of some repeats, which come in turns, so that what else runs on the
// machine would have to disturb all turns to disturb a figure.

#include <chrono>
#include <functional>
#include <string>

#include "cpu/ops.h"

namespace {

using namespace headrace;

constexpr int kTurns = 120;
constexpr double kTurnUs = 250.0;    // of one figure, at least one call
constexpr double kEnoughUs = 1.0e6;  // after this no other turn begins; the first is always finished

constexpr int kManyRows = 32, kK = 512, kColumns = 64;
constexpr int kContext = 512, kAttendingRows = 8, kSplitTokens = 128;
using Shape = AttentionShape<Half, 3, 1, 64, kSplitTokens>;  // three heads that share K and V

double now_us() {
    return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Filled with `byte`, which no format takes for a denormal number; kept for as long as the program runs.
std::byte* area(size_t num_bytes, int byte) {
    const size_t whole = (num_bytes + 4095) / 4096 * 4096;
    void* made = aligned_alloc(4096, whole);
    if (!made) exit(3);
    return static_cast<std::byte*>(memset(made, byte, whole));
}

struct Figure {
    std::string name;
    double amount;  // of what is counted, a call
    std::function<void()> call;
    double best_us = 1e30;

    void take_turn() {
        const int calls = std::max(1, static_cast<int>(kTurnUs / best_us));
        const double begin = now_us();
        for (int i = 0; i < calls; i++) call();
        best_us = std::min(best_us, (now_us() - begin) / calls);
    }
};

// Activations: rows of kK normal numbers, then rows of kColumns results. Weights: a norm's, then a matrix, whose
// bytes serve every format.
constexpr Floats2d kInput{0, kK}, kOutput{int64_t{kManyRows} * kK * 4, kColumns};
constexpr int64_t kNorm = 0, kMatrix = kK * 4;

const Step& linear_step() {
    static Step step;
    if (step.num_rows > 0) return step;
    step.num_rows = kManyRows;
    step.activations = area(kOutput.offset_bytes + size_t{kManyRows} * kColumns * 4, 0);
    for (int i = 0; i < kManyRows * kK; i++) kInput.row(step, 0)[i] = 0.01f * static_cast<float>(i * 37 % 101 - 50);
    std::byte* weights = area(kMatrix + mk::group_bytes(Format::kF32, kK) * (kColumns / mk::kGroup), 0x11);
    std::fill_n(reinterpret_cast<float*>(weights + kNorm), kK, 1.0f);
    step.weights = weights;
    return step;
}

template <Format F>
void add_linear(const char* name, std::vector<Figure>& figures) {
    const Step& step = linear_step();
    std::byte* const prepared = area(PreparedInput<F, kK>::kBytes, 0);
    for (int row = 0; row < kManyRows; row++) PreparedInput<F, kK>{prepared}.set(row, kInput.row(step, row));
    for (const int rows : {kManyRows, 1})
        figures.push_back({rows == 1 ? std::string(name) + "/one" : name, double{kK} * kColumns * rows, [=, &step] {
                               linear<F, kK, 0, kK, Every>(step, kMatrix, 0, kColumns, 0, rows, prepared, kMatrix,
                                                           Store{step, kOutput, 0});
                           }});
}

void add_prologue(std::vector<Figure>& figures) {
    constexpr Format kQuantized = Format::kQ4_1;  // as all quantized ones
    const Step& step = linear_step();
    std::byte* const prepared = area(PreparedInput<kQuantized, kK>::kBytes, 0);
    figures.push_back({"prepared", double{kK} * kManyRows, [=, &step] {
                           prepare_normed<kQuantized, kK, 0, kK, Every>(step, kInput, kNorm, 1e-5f, 0, kManyRows,
                                                                        prepared);
                       }});
}

// Sequences of one new row each, behind a context that they share.
void add_attention(std::vector<Figure>& figures) {
    constexpr int kContextBlocks = kContext / kTokensABlock, kBlocks = kContextBlocks + kAttendingRows;
    constexpr int kSplits = kContext / kSplitTokens + 1;
    constexpr int64_t kQueryColumns = Shape::kHeads * Shape::kDim;
    constexpr int64_t kOutColumns = int64_t{kSplits} * Shape::kHeads * Shape::kColumns;
    static Step step;
    static int32_t blocks[kContextBlocks];
    std::iota(blocks, blocks + kContextBlocks, 0);
    step.num_rows = kAttendingRows;
    step.num_small_blocks = kBlocks;
    step.keys = area(size_t{kBlocks} * Shape::kBlockElements * sizeof(Half), 0x2c);
    step.values = area(size_t{kBlocks} * Shape::kBlockElements * sizeof(Half), 0x2c);
    for (int i = 0; i < kAttendingRows; i++) {
        Row& row = step.rows[i];
        row.position = row.tail_start = kContext;
        row.blocks = blocks;
        row.tail_slots[0] = (kContextBlocks + i) * kTokensABlock;
        row.shared_tokens = i == 0 ? 0 : kContext;
    }
    const float* const queries =
        reinterpret_cast<float*>(area(kAttendingRows * kQueryColumns * sizeof(float), 0x3d));
    float* const out = reinterpret_cast<float*>(area(kAttendingRows * kOutColumns * sizeof(float), 0));
    std::byte* const scratch = area(attention_scratch_bytes<Shape>(), 0);
    figures.push_back({"attention", 2.0 * kContext * kQueryColumns * kAttendingRows, [=] {
                           attention<Shape>(step, 0, 0, Shape::kKvHeads, 0, 1, 0, kAttendingRows, queries,
                                            kQueryColumns, out, kOutColumns, scratch, 0, 0);
                       }});
}

}  // namespace

int main() {
    std::vector<Figure> figures;
    add_linear<Format::kQ4_0>("Q4_0", figures);
    add_linear<Format::kQ4_1>("Q4_1", figures);
    add_linear<Format::kQ8_0>("Q8_0", figures);
    add_linear<Format::kBF16>("BF16", figures);
    add_linear<Format::kF16>("F16", figures);
    add_linear<Format::kF32>("F32", figures);
    add_attention(figures);
    add_prologue(figures);
    const double begin = now_us();
    for (int turn = 0; turn < kTurns && (turn == 0 || now_us() - begin < kEnoughUs); turn++)
        for (Figure& figure : figures) figure.take_turn();
    for (const Figure& figure : figures) printf("%s %.1f\n", figure.name.c_str(), figure.amount / figure.best_us);
}
