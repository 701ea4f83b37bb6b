// Attention of rows over their committed context and their ancestors, split by absolute position.
//
// K is stored transposed in small blocks of 16 tokens, [dim][16], so that a lane is a token; V as [16][dim],
// so that a lane is a dimension. Query heads that share K and V, of one row or of neighbours that read the same
// small blocks (a sequence's tree, or sequences with a cached prefix in common), are done together: that
// shares loads, and changes no lane's arithmetic. A row's result is the same bits
// whether a token is committed, or an ancestor whose K and V are gathered into a small block of the same form.
#pragma once

#include <array>
#include <numeric>

#include "cpu/step.h"

namespace headrace {

constexpr int kSplitTokensMax = 512;

// How many queries are worth doing together, and how many sums of 16 lanes fit the registers beside operands.
#if defined(__AVX512F__)
constexpr int kQueriesTogether = 6, kSums = 24;
#else  // two registers of sixteen to 16 lanes
constexpr int kQueriesTogether = 6, kSums = 6;
#endif

constexpr int power_of_two_within(int limit) { return limit < 2 ? 1 : 2 * power_of_two_within(limit / 2); }

template <class Kv_, int kHeads_, int kKvHeads_, int kDim_, int kSplitTokens_>
struct AttentionShape {
    using Kv = Kv_;
    static constexpr int kHeads = kHeads_, kKvHeads = kKvHeads_, kDim = kDim_, kSplitTokens = kSplitTokens_;
    static constexpr int kGroup = kHeads / kKvHeads;
    static constexpr int kBlocksASplit = kSplitTokens / kTokensABlock;
    static constexpr int kBlockElements = kTokensABlock * kDim;
    static constexpr int kColumns = kDim + 2;  // of one head in one split: maximum, sum, values
    static constexpr int kRowsTogether = power_of_two_within(std::min(8, kQueriesTogether / kGroup));
    static_assert(kHeads % kKvHeads == 0 && kDim % kLanes == 0 && kSplitTokens % kTokensABlock == 0);
};

// The weights that come after attention, fetched while it computes.
struct Ahead {
    const std::byte *at, *end;

    void fetch() {
        for (int line = 0; line < kLines && at < end; line++, at += 64) __builtin_prefetch(at, 0, 2);
    }

   private:
    static constexpr int kLines = 4;  // at each of the places where K or V are fetched
};

// One of the 16 parts of a small block towards the cache.
template <class Shape>
inline void fetch_part(const typename Shape::Kv* block, int part) {
    constexpr int kPartBytes = Shape::kDim * sizeof(typename Shape::Kv);
    const char* from = reinterpret_cast<const char*>(block) + part * kPartBytes;
    for (int at = 0; at < kPartBytes; at += 64) __builtin_prefetch(from + at, 0, 3);
}

// scores[q][16 * block + t] of `count` small blocks; `scores` of two queries are kSplitTokens apart. Meanwhile
// as many small blocks from `next` on, the V to come, are fetched.
template <class Shape, int kQueries>
inline void score_blocks(const float* const* queries, const typename Shape::Kv* const* blocks,
                         const typename Shape::Kv* const* next, int count, float* scores, Ahead& ahead) {
    constexpr int kTogether = power_of_two_within(std::min(8, kSums / kQueries));
    int block = 0;
    const auto some = [&](auto together) {
        constexpr int kBlocks = decltype(together)::value;
        Lanes sums[kBlocks][kQueries];
        for (int b = 0; b < kBlocks; b++)
            for (int q = 0; q < kQueries; q++) sums[b][q] = zero_lanes();
        for (int d = 0; d < Shape::kDim; d++) {
            Lanes keys[kBlocks];
            for (int b = 0; b < kBlocks; b++) keys[b] = load(blocks[block + b] + d * kTokensABlock);
            if (d % (Shape::kDim / kTokensABlock) == 0) {
                for (int b = 0; b < kBlocks; b++)
                    fetch_part<Shape>(next[block + b], d / (Shape::kDim / kTokensABlock));
                ahead.fetch();
            }
            for (int q = 0; q < kQueries; q++) {
                const Lanes query = splat(queries[q][d]);
                for (int b = 0; b < kBlocks; b++) sums[b][q] = fma(query, keys[b], sums[b][q]);
            }
        }
        for (int b = 0; b < kBlocks; b++)
            for (int q = 0; q < kQueries; q++)
                store(scores + q * Shape::kSplitTokens + (block + b) * kTokensABlock, sums[b][q]);
        block += kBlocks;
    };
    while (block + kTogether <= count) some(std::integral_constant<int, kTogether>{});
    if constexpr (kTogether > 4)
        if (block + 4 <= count) some(std::integral_constant<int, 4>{});
    if constexpr (kTogether > 2)
        if (block + 2 <= count) some(std::integral_constant<int, 2>{});
    while (block < count) some(std::integral_constant<int, 1>{});
}

// values[q] += the sum over `tokens` of weight times V, token by token ascending. Meanwhile the first
// `num_next` small blocks of `next`, the K to come, are fetched, one for each that is added.
template <class Shape, int kQueries>
inline void add_values(const float* weights, const typename Shape::Kv* const* blocks, int tokens,
                       const typename Shape::Kv* const* next, int num_next, float* const* values) {
    constexpr int kVectors = Shape::kDim / kLanes;
    constexpr int kWanted = power_of_two_within(std::min(8, kSums / kQueries));
    constexpr int kTogether = std::gcd(kVectors, kWanted);
    for (int vector = 0; vector < kVectors; vector += kTogether) {
        Lanes sums[kTogether][kQueries];
        for (int v = 0; v < kTogether; v++)
            for (int q = 0; q < kQueries; q++) sums[v][q] = load(values[q] + (vector + v) * kLanes);
        for (int first = 0; first < tokens; first += kTokensABlock) {
            const int block = first / kTokensABlock, count = std::min(kTokensABlock, tokens - first);
            const typename Shape::Kv* from = blocks[block] + vector * kLanes;
            const typename Shape::Kv* fetched = vector == 0 && block < num_next ? next[block] : nullptr;
            for (int t = 0; t < count; t++, from += Shape::kDim) {
                if (fetched) fetch_part<Shape>(fetched, t);
                Lanes loaded[kTogether];
                for (int v = 0; v < kTogether; v++) loaded[v] = load(from + v * kLanes);
                for (int q = 0; q < kQueries; q++) {
                    const Lanes weight = splat(weights[q * Shape::kSplitTokens + first + t]);
                    for (int v = 0; v < kTogether; v++) sums[v][q] = fma(weight, loaded[v], sums[v][q]);
                }
            }
        }
        for (int v = 0; v < kTogether; v++)
            for (int q = 0; q < kQueries; q++) store(values[q] + (vector + v) * kLanes, sums[v][q]);
    }
}

// In place: scores of `tokens` tokens become e^(score - maximum), with zeros up to a multiple of 16. A NaN among
// them is the maximum and the total, and so makes the row's values one, whichever token it is of.
inline void soften(float* scores, int tokens, float* maximum, float* total) {
    constexpr float kNever = -3.0e38f;
    for (int i = tokens; i % kLanes != 0; i++) scores[i] = kNever;
    Lanes most = load(scores);
    for (int i = kLanes; i < tokens; i += kLanes) most = max(most, load(scores + i));
    const float largest = highest(most);
    Lanes totals = zero_lanes();
    for (int i = 0; i < tokens; i += kLanes) {
        const Lanes weight = exp(load(scores + i) - splat(largest));
        store(scores + i, weight);
        totals = totals + weight;
    }
    *total = sum(totals);
    *maximum = *total == *total ? largest : *total;  // maxima drop a NaN, sums do not
}

// One KV head of one layer's pool.
template <class Shape>
struct HeadPool {
    using Kv = typename Shape::Kv;
    const Kv *keys, *values;

    static int64_t offset(const Step& step, int layer, int head) {
        return (int64_t{layer} * Shape::kKvHeads + head) * step.num_small_blocks * Shape::kBlockElements;
    }
    HeadPool(const Step& step, int layer, int head)
        : keys(reinterpret_cast<const Kv*>(step.keys) + offset(step, layer, head)),
          values(reinterpret_cast<const Kv*>(step.values) + offset(step, layer, head)) {}
};

template <class Kv, int kDim>
inline void copy_key(const Kv* from, Kv* to) {
    for (int d = 0; d < kDim; d++) to[d * kTokensABlock] = from[d * kTokensABlock];
}

// A row's tail in the pool's form, and the small blocks of any of its splits.
template <class Shape>
class RowKv {
   public:
    using Kv = typename Shape::Kv;

    static constexpr size_t kScratchBytes = 2 * kMaxTailBlocks * Shape::kBlockElements * sizeof(Kv);

    // A block's lanes past the row's tokens keep what was there: `soften` overwrites their scores.
    // The tail is gathered as far as it lies in splits `part` modulo `num_parts`.
    RowKv(const HeadPool<Shape>& pool, const Row& row, int part, int num_parts, std::byte* scratch)
        : pool_(pool),
          row_(row),
          tail_keys_(reinterpret_cast<Kv*>(scratch)),
          tail_values_(tail_keys_ + kMaxTailBlocks * Shape::kBlockElements) {
        for (int position = row.tail_start; position < row.num_tokens(); position++)
            if (position / Shape::kSplitTokens % num_parts == part) gather(position);
    }

    // `keys` and `values` of `count` small blocks from `first` on.
    void blocks(int first, int count, const Kv** keys, const Kv** values) const {
        for (int i = 0; i < count; i++) {
            const int block = first + i;
            const int in_tail = block - row_.tail_start / kTokensABlock;
            const bool is_tail = in_tail >= 0 && block * kTokensABlock >= row_.tail_start;
            const int64_t at = (is_tail ? int64_t{in_tail} : int64_t{row_.blocks[block]}) * Shape::kBlockElements;
            keys[i] = (is_tail ? tail_keys_ : pool_.keys) + at;
            values[i] = (is_tail ? tail_values_ : pool_.values) + at;
        }
    }

    // How many small blocks there are from `first` on, at most `limit`.
    int blocks_from(int first, int limit) const {
        const int all = (row_.num_tokens() + kTokensABlock - 1) / kTokensABlock;
        return std::clamp(all - first, 0, limit);
    }

   private:
    void gather(int position) {
        const int at = position - row_.tail_start;
        const int64_t slot = row_.tail_slots[at];
        const int64_t from = slot / kTokensABlock * Shape::kBlockElements;
        const int64_t to = int64_t{at / kTokensABlock} * Shape::kBlockElements;
        const int from_token = slot % kTokensABlock, to_token = at % kTokensABlock;
        copy_key<Kv, Shape::kDim>(pool_.keys + from + from_token, tail_keys_ + to + to_token);
        std::memcpy(tail_values_ + to + to_token * Shape::kDim, pool_.values + from + from_token * Shape::kDim,
                    Shape::kDim * sizeof(Kv));
    }

    const HeadPool<Shape>& pool_;
    const Row& row_;
    Kv *tail_keys_, *tail_values_;
};

// One split of kRows rows for one KV head. `shared_tokens` positions of the split, whole small blocks, are the
// same for all of them. The split that is done after this one is `stride` further.
template <class Shape, int kRows>
inline void attend_split(const float* queries, int64_t query_stride, float* out, int64_t out_stride, int split,
                         int stride, const RowKv<Shape>* rows, const int* num_tokens, int shared_tokens,
                         Ahead& ahead) {
    using Kv = typename Shape::Kv;
    constexpr int kQueries = kRows * Shape::kGroup;
    alignas(64) float scores[kQueries * Shape::kSplitTokens];
    const float* query_of[kQueries];
    float* value_of[kQueries];
    const Kv *keys[Shape::kBlocksASplit], *values[Shape::kBlocksASplit];
    for (int q = 0; q < kQueries; q++) {
        const int row = q / Shape::kGroup, head = q % Shape::kGroup;
        query_of[q] = queries + row * query_stride + head * Shape::kDim;
        value_of[q] = out + row * out_stride + head * Shape::kColumns + 2;
        for (int i = 0; i < Shape::kDim; i += kLanes) store(value_of[q] + i, zero_lanes());
    }
    const int first = split * Shape::kBlocksASplit;
    const int shared_blocks = shared_tokens / kTokensABlock;
    const auto rest_tokens = [&](int row) {
        return std::min(num_tokens[row] - split * Shape::kSplitTokens, Shape::kSplitTokens) - shared_tokens;
    };
    rows[0].blocks(first, shared_blocks, keys, values);
    if (shared_blocks > 0) score_blocks<Shape, kQueries>(query_of, keys, values, shared_blocks, scores, ahead);
    const Kv *own_keys[kRows][Shape::kBlocksASplit], *own_values[kRows][Shape::kBlocksASplit];
    for (int row = 0; row < kRows; row++) {
        const int blocks = (rest_tokens(row) + kTokensABlock - 1) / kTokensABlock;
        rows[row].blocks(first + shared_blocks, blocks, own_keys[row], own_values[row]);
        if (blocks > 0)
            score_blocks<Shape, Shape::kGroup>(query_of + row * Shape::kGroup, own_keys[row], own_values[row], blocks,
                                               scores + row * Shape::kGroup * Shape::kSplitTokens + shared_tokens,
                                               ahead);
    }
    for (int q = 0; q < kQueries; q++)
        soften(scores + q * Shape::kSplitTokens, shared_tokens + rest_tokens(q / Shape::kGroup), value_of[q] - 2,
               value_of[q] - 1);
    const Kv *next_keys[Shape::kBlocksASplit], *next_values[Shape::kBlocksASplit];
    const int num_next = rows[0].blocks_from(first + stride * Shape::kBlocksASplit, Shape::kBlocksASplit);
    rows[0].blocks(first + stride * Shape::kBlocksASplit, num_next, next_keys, next_values);
    if (shared_tokens > 0)
        add_values<Shape, kQueries>(scores, values, shared_tokens, next_keys, num_next, value_of);
    for (int row = 0; row < kRows; row++)
        if (rest_tokens(row) > 0)
            add_values<Shape, Shape::kGroup>(scores + row * Shape::kGroup * Shape::kSplitTokens + shared_tokens,
                                             own_values[row], rest_tokens(row), next_keys, 0,
                                             value_of + row * Shape::kGroup);
}

// Rows [row, row + kRows); splits `part`, `part` + `num_parts`, ... as far as each row has any.
template <class Shape, int kRows>
void attend_rows(const Step& step, const HeadPool<Shape>& pool, int head, int row, int part, int num_parts,
                 const float* queries, int64_t query_stride, float* out, int64_t out_stride, std::byte* scratch,
                 Ahead& ahead) {
    const auto kv = [&]<size_t... I>(std::index_sequence<I...>) {
        return std::array<RowKv<Shape>, kRows>{
            RowKv<Shape>(pool, step.rows[row + I], part, num_parts, scratch + I * RowKv<Shape>::kScratchBytes)...};
    }(std::make_index_sequence<kRows>{});
    int num_tokens[kRows], shared_end = step.rows[row].tokens_in_blocks(), longest = 0;
    for (int i = 0; i < kRows; i++) {
        const Row& one = step.rows[row + i];
        num_tokens[i] = one.num_tokens();
        if (i > 0) shared_end = std::min(shared_end, one.shared_tokens);
        longest = std::max(longest, num_tokens[i]);
    }
    const int64_t split_stride = int64_t{Shape::kHeads} * Shape::kColumns;
    const float* own_queries = queries + row * query_stride + head * Shape::kGroup * Shape::kDim;
    for (int split = part; split * Shape::kSplitTokens < longest; split += num_parts) {
        const int start = split * Shape::kSplitTokens;
        float* to = out + row * out_stride + split * split_stride + head * Shape::kGroup * Shape::kColumns;
        const int shared = std::clamp(shared_end - start, 0, Shape::kSplitTokens);
        if (shared > 0 || kRows == 1) {
            attend_split<Shape, kRows>(own_queries, query_stride, to, out_stride, split, num_parts, kv.data(),
                                       num_tokens, shared, ahead);
            continue;
        }
        for (int i = 0; i < kRows; i++)
            if (start < num_tokens[i])
                attend_split<Shape, 1>(own_queries + i * query_stride, query_stride, to + i * out_stride, out_stride,
                                       split, num_parts, &kv[i], num_tokens + i, 0, ahead);
    }
}

// How many rows from `row` on, at most `limit`, are best done together: one more is taken where that saves no
// fewer loads of shared tokens than leaving it.
inline int rows_sharing(const Step& step, int row, int limit) {
    int count = 1, shared = step.rows[row].tokens_in_blocks();
    for (; count < limit; count++) {
        const int with_next = std::min(shared, step.rows[row + count].shared_tokens);
        if (with_next == 0 || count * with_next < (count - 1) * shared) break;
        shared = with_next;
    }
    return count;
}

// The largest power of two of rows within `count`; how many those are.
template <class Shape, int kRows, class... Rest>
int attend_group(int count, const Step& step, const HeadPool<Shape>& pool, int head, int row, Ahead& ahead,
                 Rest... rest) {
    if constexpr (kRows > 1)
        if (count < kRows) return attend_group<Shape, kRows / 2>(count, step, pool, head, row, ahead, rest...);
    attend_rows<Shape, kRows>(step, pool, head, row, rest..., ahead);
    return kRows;
}

// KV heads [n0, n1), splits `part` modulo `num_parts`, of rows [r0, r1). Meanwhile `ahead_lines` lines of the
// weights that the worker reads next are fetched.
template <class Shape>
__attribute__((noinline)) void attention(const Step& step, int layer, int n0, int n1, int part, int num_parts, int r0,
                                         int r1, const float* queries, int64_t query_stride, float* out,
                                         int64_t out_stride, std::byte* scratch, int64_t ahead_weights,
                                         int ahead_lines) {
    Ahead ahead{step.weights + ahead_weights, step.weights + ahead_weights + 64 * int64_t{ahead_lines}};
    const int end = std::min(r1, step.num_rows);
    for (int head = n0; head < n1; head++) {
        const HeadPool<Shape> pool(step, layer, head);
        for (int row = r0; row < end;)
            row += attend_group<Shape, Shape::kRowsTogether>(
                rows_sharing(step, row, std::min(Shape::kRowsTogether, end - row)), step, pool, head, row, ahead, part,
                num_parts, queries, query_stride, out, out_stride, scratch);
    }
}

template <class Shape>
constexpr size_t attention_scratch_bytes() {
    return Shape::kRowsTogether * RowKv<Shape>::kScratchBytes;
}

// The splits of each head of one row, ascending, into the head's output.
template <class Shape>
inline void combine(const float* splits, int num_tokens, float* out) {
    const int num_splits = (num_tokens + Shape::kSplitTokens - 1) / Shape::kSplitTokens;
    const int64_t stride = int64_t{Shape::kHeads} * Shape::kColumns;
    for (int head = 0; head < Shape::kHeads; head++, splits += Shape::kColumns, out += Shape::kDim) {
        float maximum = splits[0];
        for (int s = 1; s < num_splits; s++) maximum = std::max(maximum, splits[s * stride]);
        float total = 0.0f;
        Lanes sums[Shape::kDim / kLanes];
        for (Lanes& one : sums) one = zero_lanes();
        for (int s = 0; s < num_splits; s++) {
            const float* split = splits + s * stride;
            const float share = exp_one(split[0] - maximum);
            total += share * split[1];
            for (int i = 0; i < Shape::kDim / kLanes; i++)
                sums[i] = fma(splat(share), load(split + 2 + i * kLanes), sums[i]);
        }
        for (int i = 0; i < Shape::kDim / kLanes; i++) store(out + i * kLanes, sums[i] / splat(total));
    }
}

}  // namespace headrace
