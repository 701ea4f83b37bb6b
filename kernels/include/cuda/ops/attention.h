// Attention of one KV head over every split that falls to an instruction: maximum, sum of exponentials and weighted
// values by split and query head; and the merging of a row's splits, once all are there.
//
// A split's tokens are shared out among the consumer warps, and what each makes of its tokens is merged in order.
// Keys and values are loaded one split ahead: keys of the next split once this one's scores are known, its values once
// this one's are mixed; of an SM's first split what earlier steps committed comes while queries are waited for. Where
// tokens of a split are, in the pool, is asked for a split before that.
#pragma once

#include "cuda/ops/attention_split.h"
#include "cuda/rows.h"

namespace headrace {

// An SM's first split, as far as it can be had before the wait.
template <class Shape>
struct FirstSplit {
    DealtSplit at;
    int num_tokens, num_committed;  // as of its share
    HeldTokens<Shape> held;

    // Tokens before context_lengths were written before the step began: by earlier launches, or by earlier steps of this one,
    // all blocks of which arrived at a counter that was waited for before begin_next_step let anyone go on. So they may be
    // loaded before this step's own tokens are waited for.
    __device__ __forceinline__ void load_early(const Worker& w, const uint8_t* keys, SharedAddress slots) {
        const int end = num_committed;
        const auto is_early = [=](int offset) { return offset < end; };
        held.load_keys(w, keys, slots, is_early);
        held.load_values(w, keys, slots, is_early);
    }
    __device__ __forceinline__ void load_late(const Worker& w, const uint8_t* keys, SharedAddress slots) {
        const int end = num_committed;
        if (num_tokens <= 0 || end > Share<Shape>::offset_of(Shape::kTokens - 1)) return;
        const auto is_late = [=](int offset) { return offset >= end; };
        held.load_keys(w, keys, slots, is_late);
        held.load_values(w, keys, slots, is_late);
    }
};

// Before the wait. `is_new`: rows and splits are yet to be noted down, as those of the step and of these tiles.
template <class Shape>
__device__ __forceinline__ void begin_attention(const Worker& w, int layer, const AttentionTiles& tiles,
                                                FirstSplit<Shape>& begun, SharedAddress page, bool is_new, int row0 = 0) {
    using Dealt = DealtSplits<Shape>;
    if (is_new) {
        sync_consumers();  // the rows before, of this op or of another, are done with
        if (w.warp == 0) {
            AttendingRow::store(w, row0);
            ptx::sync_warp();
            Dealt::store(w, tiles, row0);
        }
        sync_consumers();
    }
    begun.held = HeldTokens<Shape>::in(w, page);
    begun.at = Dealt::noted(w, 0);
    if (!begun.at.is_any()) return;
    const uint8_t* keys = keys_of<Shape>(w, layer, begun.at.kv_head);
    const Share<Shape> share = Share<Shape>::of(w, begun.at.row, begun.at.split);
    begun.num_tokens = share.num_tokens, begun.num_committed = share.num_committed;
    store_slots<Shape>(w, share.slot(w));
    begun.load_early(w, keys, slots_at<Shape>(w));
#pragma unroll 1
    for (uint32_t number = 1; number <= Shape::kSplitsPrefetched; number++) {
        const DealtSplit next = Dealt::noted(w, number);
        if (!next.is_any()) return;
        const Share<Shape> later = Share<Shape>::of(w, next.row, next.split);
        if (later.num_tokens <= 0 || later.rest == kNoIndex) continue;
        const uint4* key = at_slot<Shape>(keys_of<Shape>(w, layer, next.kv_head), later.slot(w));
#pragma unroll
        for (uint32_t line = 0; line < Shape::kTokenBytes; line += 256) {
            const uint32_t own = line + w.lane % 2 * 128;
            if (own >= Shape::kTokenBytes) continue;
            ptx::prefetch(key + own / 16);
            ptx::prefetch(key + (Shape::kValuesAt + own) / 16);
        }
    }
}

// Where queries come from, where partial results go, and what becomes of them. Buffers are told by bytes into the
// activations, and their addresses computed where they are used, as registers are few.
template <class Heads>
struct Attended {
    int64_t queries;     // [rows][kHeads][kDim]
    int64_t splits;      // [rows][columns]: for each block and head the maximum, the sum, and values
    int64_t columns;
    Heads heads;         // [rows][kHeads][kDim]: splits merged
    uint32_t* arrivals;  // [kKvHeads][bucket] of splits that are there, 0 between ops
    int32_t bucket;

    template <class Shape>
    static __device__ __forceinline__ uint32_t first_of_group(const Worker& w, int row, uint32_t kv_head) {
        return static_cast<uint32_t>(row * Shape::kKvHeads + kv_head) * Shape::kElements + w.zero();
    }
    template <class Shape>
    __device__ __forceinline__ const float* queries_of(const Worker& w, int row, uint32_t kv_head) const {
        return reinterpret_cast<const float*>(w.step.activations + queries) + first_of_group<Shape>(w, row, kv_head);
    }
    template <class Shape>
    __device__ __forceinline__ float* splits_of(const Worker& w, int row, int block, uint32_t kv_head) const {
        return reinterpret_cast<float*>(w.step.activations + w.zero() + splits) + row * columns +
               static_cast<uint32_t>(block * Shape::kKvHeads + kv_head) * (Shape::kElements + 2 * Shape::kGroup);
    }
};

// Of a row's query heads of a KV head, so many elements are a warp's at once when splits are merged: each lane has two
// neighbours or, of one head, twice that.
template <class Shape>
constexpr int kMergedPairs = Shape::kDim % 128 == 0 ? 2 : 1;
template <class Shape>
constexpr int kMergedElements = 64 * kMergedPairs<Shape>;

// A row's splits of a KV head's group, merged in ascending order: a warp's elements, from `first` on.
template <class Shape, class Heads>
__device__ __forceinline__ void merge_splits(const Worker& w, const AttentionTiles& tiles, const Attended<Heads>& attended, int row,
                                             uint32_t kv_head, int num_splits, int first) {
    constexpr int kDim = Shape::kDim, kPairs = kMergedPairs<Shape>, kAtOnce = 8;
    constexpr uint32_t kHeadBytes = (kDim + 2) * 4, kBlockBytes = Shape::kHeads * kHeadBytes;
    const int item = first + static_cast<int>(w.lane) * 2;
    if (item >= Shape::kElements) return;
    const uint8_t* of_row = reinterpret_cast<const uint8_t*>(attended.template splits_of<Shape>(w, row, 0, kv_head));
    const uint32_t first_block = tiles.first_block(row), num_blocks = tiles.num_blocks;
    const uint8_t* of_head = ptx::settled_pointer(of_row + item / kDim * kHeadBytes);
    const uint8_t* of_element = ptx::settled_pointer(of_head + 8 + item % kDim * 4);
    float largest = -__builtin_huge_valf(), total = 0;
    float2 mixed[kPairs] = {};
#pragma unroll 1
    for (int split0 = 0; split0 < num_splits; split0 += kAtOnce) {
        float2 extremes[kAtOnce], values[kAtOnce][kPairs];
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
            // In place of splits past the last, the last again, without weight.
            const bool is_there = split0 + i < num_splits;
            uint32_t block = first_block + (is_there ? split0 + i : num_splits - 1);
            if (block >= num_blocks) block -= num_blocks;
            const uint64_t at = static_cast<uint64_t>(block) * kBlockBytes;
            extremes[i] = ptx::load_global(reinterpret_cast<const float2*>(of_head + at));
#pragma unroll
            for (int p = 0; p < kPairs; p++) values[i][p] = ptx::load_global(reinterpret_cast<const float2*>(of_element + at) + p * 32);
            if (!is_there) extremes[i] = {-__builtin_huge_valf(), 0};
        }
        float top = largest;
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) top = fmaxf(top, extremes[i].x);
        const float kept = exp_f32(largest - top);
        largest = top, total *= kept;
#pragma unroll
        for (int p = 0; p < kPairs; p++) mixed[p].x *= kept, mixed[p].y *= kept;
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
            const float share = exp_f32(extremes[i].x - top);
            total = fma_f32(share, extremes[i].y, total);
#pragma unroll
            for (int p = 0; p < kPairs; p++) {
                mixed[p].x = fma_f32(share, values[i][p].x, mixed[p].x);
                mixed[p].y = fma_f32(share, values[i][p].y, mixed[p].y);
            }
        }
    }
    const float scale = divide_f32(1, total);
#pragma unroll
    for (int p = 0; p < kPairs; p++)
        attended.heads.store_two(w, attended.template first_of_group<Shape>(w, row, kv_head) + item + p * 64, mixed[p].x * scale,
                                 mixed[p].y * scale);
}

// After an SM's splits of up to 32 rows, which it counts as arrived: who has a row's first split of a KV head waits for the others
// and merges them. SMs are done with all their rows at about the same time, so that who is last would be so of nearly all, and
// merge them one after the other. A warp counts for a tile, a lane for a row; and only now, as it would hold up the loads of
// splits to come.
template <class Shape, class Heads>
__device__ __forceinline__ void merge_rows(const Worker& w, const AttentionTiles& tiles, const Attended<Heads>& attended,
                                           int row0) {
    const int num_splits = AttendingRow::num_splits<Shape>(w, w.lane);
    if (!ptx::ballot(num_splits > 1)) return;
    const auto first_of = [&](uint32_t tile) { return tiles.first_split(row0 + w.lane, tile / Shape::kKvHeads); };
    const auto arrivals_of = [&](uint32_t tile) {
        return attended.arrivals + tile % Shape::kKvHeads * attended.bucket + row0 + w.lane;
    };
    sync_consumers();  // what the warps made of the splits is there
#pragma unroll 1
    for (uint32_t index = w.warp; index < tiles.count; index += kConsumerWarps) {
        const uint32_t tile = tiles.number(index);
        const int first = first_of(tile);
        if (num_splits > 1 && first < num_splits)
            ptx::add_release(arrivals_of(tile), static_cast<uint32_t>((num_splits - 1 - first) / tiles.num_parts + 1));
    }
#pragma unroll 1
    for (uint32_t index0 = 0; index0 < tiles.count; index0 += kConsumerWarps) {
        bool is_own = false;
        if (index0 + w.warp < tiles.count) {
            const uint32_t tile = tiles.number(index0 + w.warp);
            is_own = num_splits > 1 && first_of(tile) == 0;
            if (is_own) {
                uint32_t* arrivals = arrivals_of(tile);
                wait_word(w, arrivals, num_splits, kCounterWait, static_cast<uint32_t>(arrivals - w.step.counters));
                ptx::store_global(arrivals, uint32_t{0});  // nobody else comes before the op's signal
            }
        }
        const uint32_t rows_of_warp = ptx::ballot(is_own);
        if (index0 > 0) sync_consumers();  // the rows before have been read
        if (w.lane == 0) ptx::store_shared(w.shared + kSelectionAt + w.warp * 4, rows_of_warp);
        sync_consumers();
        uint32_t found = 0;
        if (w.lane < kConsumerWarps) found = ptx::load_shared<uint32_t>(w.shared + kSelectionAt + w.lane * 4);
        uint32_t turn = w.warp;
#pragma unroll 1
        for (uint32_t warps = ptx::ballot(found != 0); warps; warps &= warps - 1) {
            const uint32_t of_warp = ptx::lowest_bit(warps);
            const uint32_t kv_head = tiles.number(index0 + of_warp) % Shape::kKvHeads;
#pragma unroll 1
            for (uint32_t rows = ptx::shuffle(found, of_warp); rows; rows &= rows - 1) {
                const uint32_t row = ptx::lowest_bit(rows);
#pragma unroll 1
                for (int first = 0; first < Shape::kElements; first += kMergedElements<Shape>, turn++)
                    if (turn % kConsumerWarps == 0)
                        merge_splits<Shape>(w, tiles, attended, row0 + row, kv_head, AttendingRow::num_splits<Shape>(w, row), first);
            }
        }
    }
}

// A thread's share of queries of a KV head: from when they are asked for until they are split.
template <class Shape>
struct AskedQueries {
    static constexpr int kItems = (Shape::kPairs + kConsumers - 1) / kConsumers;
    float2 pairs[kItems];

    static __device__ __forceinline__ bool has_item(uint32_t thread, int i) {
        return (i + 1) * kConsumers <= static_cast<uint32_t>(Shape::kPairs) || thread + i * kConsumers < Shape::kPairs;
    }
    __device__ __forceinline__ void ask(const float* from, uint32_t thread) {
#pragma unroll
        for (int i = 0; i < kItems; i++)
            if (has_item(thread, i)) pairs[i] = ptx::load_global(reinterpret_cast<const float2*>(from) + thread + i * kConsumers);
    }
    __device__ __forceinline__ void store(SharedAddress queries, uint32_t thread) const {
#pragma unroll
        for (int i = 0; i < kItems; i++) {
            if (!has_item(thread, i)) continue;
            uint32_t upper, lower;
            split_halves(pairs[i], upper, lower);
            const SharedAddress to = queries + (thread + i * kConsumers) * 4;
            ptx::store_shared(to, upper);
            ptx::store_shared(to + Shape::kElements * 2, lower);
        }
    }
};

// After the wait: all splits that the SM's tiles have of up to 32 rows from row0 on. What of the first is yet to come, and
// each next one as its place becomes free; so loads are on their way all the time.
template <class Shape, class Heads>
__device__ __forceinline__ void attend_rows(const Worker& w, int layer, const AttentionTiles& tiles, FirstSplit<Shape>& begun,
                                            const Attended<Heads>& attended, SharedAddress page, int row0) {
    AskedQueries<Shape> asked;
    const auto ask_queries = [&](const DealtSplit& of) {
        asked.ask(attended.template queries_of<Shape>(w, row0 + of.row, of.kv_head), w.thread);
    };
    const auto queries_at = [&](uint32_t parity) {
        return w.shared + kSumsAt + Shape::kQueriesAt + (Shape::kIsDouble ? parity * Shape::kQueryBytes : 0);
    };
    DealtSplit at = begun.at;
    HeldTokens<Shape>& held = begun.held;
    const SharedAddress slots = slots_at<Shape>(w);
    ask_queries(at);
    DealtSplit next = DealtSplits<Shape>::noted(w, 1);
    Share<Shape> share{};
    if (next.is_any()) share = Share<Shape>::of(w, next.row, next.split);
    int num_tokens = begun.num_tokens;
    begun.load_late(w, keys_of<Shape>(w, layer, at.kv_head), slots);
    asked.store(queries_at(0), w.thread);
    sync_consumers();
#pragma unroll 1
    for (uint32_t number = 0;; number++) {
        const uint32_t parity = number % 2;
        const SharedAddress partial = Shape::kIsDouble && parity ? w.shared + kSumsAt + Shape::kSecondAt : page;
        DealtSplit after{-1, 0, 0};
        Share<Shape> later{};
        if (next.is_any()) after = DealtSplits<Shape>::at(w, tiles, row0, number + 2);
        if (after.is_any()) later = Share<Shape>::of(w, after.row, after.split);
        HeadWeights weights[Shape::kHeadBlocks];
        held.await_all_but_last();
        if (num_tokens > 0)
            weigh_tokens<Shape>(w, held, num_tokens, queries_at(parity), weights,
                                partial + Shape::kExtremesAt + w.warp * (Shape::kGroup * 8));
        const uint8_t* keys = keys_of<Shape>(w, layer, next.kv_head);
        if (Shape::kIsDouble) ask_queries(next.is_any() ? next : at);
        const auto is_wanted = [=](int) { return share.num_tokens > 0; };
        if (next.is_any()) {
            store_slots<Shape>(w, share.slot(w));
            held.load_keys(w, keys, slots, is_wanted);
        } else {
            held.end_loads();
        }
        held.await_all_but_last();
        if (num_tokens > 0)
            mix_tokens<Shape>(w, held, weights, partial + w.warp * (Shape::kElements * 4));
        if (next.is_any()) held.load_values(w, keys, slots, is_wanted);
        if (Shape::kIsDouble && next.is_any()) asked.store(queries_at(parity ^ 1), w.thread);
        sync_consumers();
        if (!Shape::kIsDouble) ask_queries(next.is_any() ? next : at);
        const int row = row0 + at.row;
        const int of_split = AttendingRow::of(w, at.row).num_tokens - at.split * Shape::kSplitTokens;
        const bool is_only = AttendingRow::num_splits<Shape>(w, at.row) == 1;
        merge_warps<Shape>(w, partial, num_warps_of<Shape>(of_split),
                           attended.template splits_of<Shape>(w, row, tiles.block_of(row, at.split), at.kv_head), is_only,
                           attended.heads, attended.template first_of_group<Shape>(w, row, at.kv_head));
        if (!next.is_any()) break;
        if (!Shape::kIsDouble) {
            asked.store(queries_at(0), w.thread);
            sync_consumers();
        }
        num_tokens = share.num_tokens;
        at = next, next = after, share = later;
    }
    merge_rows<Shape>(w, tiles, attended, row0);
}

template <class Shape, class Heads>
__device__ __forceinline__ void attention_tiles(const Worker w, int layer, const AttentionTiles tiles, FirstSplit<Shape>& begun,
                                                const Attended<Heads> attended, SharedAddress page) {
    if (begun.at.is_any()) attend_rows<Shape>(w, layer, tiles, begun, attended, page, 0);
    if (attended.bucket > static_cast<int>(kLanes)) {
#pragma unroll 1
        for (int row0 = kLanes; row0 < w.step.num_rows; row0 += kLanes) {
            begin_attention<Shape>(w, layer, tiles, begun, page, true, row0);
            if (begun.at.is_any()) attend_rows<Shape>(w, layer, tiles, begun, attended, page, row0);
        }
    }
    report_progress(w, tiles.count);
}

}  // namespace headrace
