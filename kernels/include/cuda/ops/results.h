// After the head: what was asked of each row's logits, a row a block in turn.
#pragma once

#include "cuda/ops/epilogue.h"

namespace headrace {

__device__ __forceinline__ Best best_of_warp(Best best) {
#pragma unroll
    for (uint32_t mask = 16; mask; mask /= 2) {
        const Best other{ptx::shuffle_xor(best.value, mask), ptx::shuffle_xor(best.column, mask)};
        if (other.is_before(best)) best = other;
    }
    return best;
}

// The same for all consumers. Begins and ends with a barrier.
__device__ __forceinline__ Best best_of_block(const Worker& w, Best best) {
    best = best_of_warp(best);
    sync_consumers();
    if (w.lane == 0)
        ptx::store_shared(w.shared + kSelectionAt + w.warp * 8, uint2{float_bits(best.value), best.column});
    sync_consumers();
    const uint2 own = ptx::load_shared<uint2>(w.shared + kSelectionAt);
    best = {bits_float(own.x), own.y};
    for (uint32_t i = 1; i < kConsumerWarps; i++) {
        const uint2 other = ptx::load_shared<uint2>(w.shared + kSelectionAt + i * 8);
        if (const Best next{bits_float(other.x), other.y}; next.is_before(best)) best = next;
    }
    return best;
}

// exp of the spans' log-sum-exps, summed: by thread, by warp, by block, each in order.
template <int kSpans>
__device__ __forceinline__ float log_sum(const Worker& w, const float* stats, float largest) {
    float sum = 0;
#pragma unroll 8
    for (int span = w.thread; span < kSpans; span += kConsumers)
        sum += exp_f32(ptx::load_global(stats + span * 3 + 2) - largest);
#pragma unroll
    for (uint32_t mask = 16; mask; mask /= 2) sum += ptx::shuffle_xor(sum, mask);
    sync_consumers();
    if (w.lane == 0) ptx::store_shared(w.shared + kSelectionAt + 64 + w.warp * 4, sum);
    sync_consumers();
    float total = 0;
    for (uint32_t i = 0; i < kConsumerWarps; i++) total += ptx::load_shared<float>(w.shared + kSelectionAt + 64 + i * 4);
    return is_finite(largest) ? largest + log_f32(total) : largest;
}

// Reductions of a row: the greatest logit of each span leads to the greatest of all, again and again for the top k.
template <int kVocab, int kSpan>
__device__ __forceinline__ void reduce_row(const Worker& w, int row) {
    constexpr int kSpans = (kVocab + kSpan - 1) / kSpan;
    constexpr float kNone = -__builtin_huge_valf();
    const float* stats = w.step.stats + static_cast<int64_t>(row) * kSpans * 3;
    const float* logits = w.step.logits + static_cast<int64_t>(row) * kVocab;
    const int top_k = w.step.top_k;
    float* values = w.step.values + static_cast<int64_t>(row) * (2 + top_k);
    int32_t* tokens = w.step.tokens + static_cast<int64_t>(row) * (1 + top_k);

    Best best{kNone, 0xffffffff};
#pragma unroll 8
    for (int span = w.thread; span < kSpans; span += kConsumers) {
        const Best own{ptx::load_global(stats + span * 3), static_cast<uint32_t>(ptx::load_global(stats + span * 3 + 1))};
        if (own.is_before(best)) best = own;
    }
    const Best first = best_of_block(w, best);
    const float sum = log_sum<kSpans>(w, stats, first.value);
    if (w.thread == 0) {
        ptx::store_global(values, first.value);
        ptx::store_global(values + 1, sum);
        ptx::store_global(tokens, static_cast<int32_t>(first.column));
    }
    const bool is_nan = first.value != first.value;  // then it is the answer to everything
    Best last = first;
    for (int i = 0; i < top_k; i++) {
        if (i > 0 && !is_nan) {
            // Each thread looks for its spans' best after the last that was taken.
            Best next{kNone, 0xffffffff};
            for (int span = w.thread; span < kSpans; span += kConsumers) {
                const Best own{ptx::load_global(stats + span * 3), static_cast<uint32_t>(ptx::load_global(stats + span * 3 + 1))};
                if (!own.is_before(next)) continue;  // nothing in the span is
                if (last.is_before(own)) {
                    next = own;
                    continue;
                }
                const int end = (span + 1) * kSpan < kVocab ? (span + 1) * kSpan : kVocab;
                for (int column = span * kSpan; column < end; column++) {
                    const Best candidate{ptx::load_global(logits + column), static_cast<uint32_t>(column)};
                    if (last.is_before(candidate) && candidate.is_before(next)) next = candidate;
                }
            }
            last = best_of_block(w, next);
        }
        if (w.thread == 0) {
            ptx::store_global(values + 2 + i, last.value);
            ptx::store_global(tokens + 1 + i, static_cast<int32_t>(last.column));
        }
    }
}

// `finished`: a counter that every block brings one arrival when it has run its path.
template <int kVocab, int kSpan>
__device__ __forceinline__ void hand_out_results(const Worker w, uint32_t finished) {
    const uint32_t num_blocks = ptx::num_blocks();
    signal_counter(w, finished);
    if (w.sm >= static_cast<uint32_t>(w.step.num_rows)) return;
    wait_counter(w, finished, num_blocks, num_blocks);
    for (int row = w.sm; row < w.step.num_rows; row += num_blocks) {
        const int flags = ptx::load_constant(w.step.row_flags + row);
        if (flags & kWantsReductions) reduce_row<kVocab, kSpan>(w, row);
        const int end = ptx::load_constant(w.step.allowed_starts + row + 1);
        for (int i = ptx::load_constant(w.step.allowed_starts + row) + w.thread; i < end; i += kConsumers) {
            const int token = ptx::load_constant(w.step.allowed_token_ids + i);
            ptx::store_global(w.step.allowed_logits + i,
                              ptx::load_global(w.step.logits + static_cast<int64_t>(row) * kVocab + token));
        }
    }
}

}  // namespace headrace
