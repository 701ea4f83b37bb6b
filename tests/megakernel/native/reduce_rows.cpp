// Span statistics and what becomes of them, behind a C interface: rows of logits in, reductions out.
#include "cpu/head.h"
#include "cpu/head_results.h"

namespace {

constexpr int kSpan = 64;

}  // namespace

// `values` is [rows, 2 + top_k] and `tokens` [rows, 1 + top_k], as in HeadInput.
extern "C" void reduce_rows(float* logits, int rows, int vocab, int top_k, int needs_log_sums, float* values,
                            int32_t* tokens) {
    const int num_spans = (vocab + kSpan - 1) / kSpan;
    std::vector<float> stats(size_t(rows) * num_spans * 3);
    headrace::HeadRows head;
    head.input.values = values;
    head.input.tokens = tokens;
    head.input.top_k = top_k;
    head.input.needs_log_sums = needs_log_sums;
    for (int row = 0; row < rows; row++) {
        float* of = logits + int64_t{row} * vocab;
        float* to = &stats[size_t(row) * num_spans * 3];
        for (int n = 0; n < vocab; n += kSpan)
            headrace::span_stats<kSpan>(of + n, std::min(kSpan, vocab - n), n, needs_log_sums, to + n / kSpan * 3);
        head.rows.push_back({row, of, to});
        head.reduced.push_back(row);
    }
    headrace::HeadResults(vocab, kSpan).finish(head);
}
