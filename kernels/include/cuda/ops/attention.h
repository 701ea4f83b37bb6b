// Attention of one KV head over every split that falls to an instruction: maximum, sum of exponentials and weighted
// values by split and query head; and the merging of a row's splits, once all are there.
//
// A split's tokens are shared out among the consumer warps, and what each makes of its tokens is merged in order.
// Keys and values come straight into registers: every byte is used once a row, and all of a split's loads are on
// their way at once.
#pragma once

#include "cuda/ops/input.h"

namespace headrace {

template <int kHeads_, int kKvHeads_, int kDim_, int kSplitTokens_>
struct AttentionShape {
    static constexpr int kHeads = kHeads_, kKvHeads = kKvHeads_, kDim = kDim_, kSplitTokens = kSplitTokens_;
    static constexpr int kGroup = kHeads / kKvHeads;  // query heads of a KV head
    static constexpr int kTokens = kSplitTokens / kConsumerWarps;  // of a split, a warp's
    static constexpr int kLanesAToken = kDim / 8;     // each has 8 of its elements, 16 bytes
    static constexpr int kTokensATime = kLanes / kLanesAToken;
    static constexpr int kTimes = (kTokens + kTokensATime - 1) / kTokensATime;
    static constexpr int kSlotColumns = 2 * kKvHeads * kDim;
    static_assert(kDim >= 16 && kDim <= 256 && (kDim & (kDim - 1)) == 0);
    static_assert(kTokens <= 32);
};

__device__ __forceinline__ void unpack_halves(const uint4& packed, float (&x)[8]) {
    const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x[2 * i] = ptx::half_to_float(words[i] & 0xffff);
        x[2 * i + 1] = ptx::half_to_float(words[i] >> 16);
    }
}

// The slot of a position of a row: of its committed prefix by the block table, of this step by its path.
__device__ __forceinline__ int64_t slot_of(const StepArguments& step, int row, int position) {
    const int context = ptx::load_settled(step.context_lengths + row);
    if (position >= context)
        return ptx::load_settled(step.path_slots + ptx::load_constant(step.path_starts + row) + position - context);
    const int64_t line = static_cast<int64_t>(ptx::load_constant(step.table_rows + row)) * step.max_blocks;
    const int block = ptx::load_constant(step.block_tables + line + position / step.block_size_tokens);
    return static_cast<int64_t>(block) * step.block_size_tokens + position % step.block_size_tokens;
}

// A warp's share of a split of a row.
template <class Shape>
struct Share {
    int num_warps;  // that have tokens of the split
    int num_own;    // tokens of the warp; may be less than one
    uint32_t slot;  // by lane, of the warp's tokens

    Share() = default;
    __device__ __forceinline__ Share(const Worker& w, int row, int split, int num_tokens) {
        constexpr int kTokens = Shape::kTokens;
        const int in_split = num_tokens - split * Shape::kSplitTokens;
        const int first_position = split * Shape::kSplitTokens + static_cast<int>(w.warp) * kTokens;
        const int own = num_tokens - first_position;
        num_warps = in_split < Shape::kSplitTokens ? (in_split + kTokens - 1) / kTokens : kConsumerWarps;
        num_own = own < kTokens ? own : kTokens;
        slot = 0;
        // Lanes past the warp's tokens take its first: what they load is not used.
        if (num_own > 0) slot = slot_of(w.step, row, first_position + (static_cast<int>(w.lane) < num_own ? w.lane : 0));
    }

    // Where a lane's 16 bytes of its i-th token's key are; its value's are kKvHeads heads on. All lanes ask.
    __device__ __forceinline__ const uint16_t* key_at(const Worker& w, int layer, uint32_t kv_head, int i) const {
        const uint32_t of_token = w.lane / Shape::kLanesAToken, chunk = w.lane % Shape::kLanesAToken;
        const int64_t own_slot = ptx::shuffle(slot, (i * Shape::kTokensATime + of_token) % Shape::kTokens);
        return w.step.kv + (static_cast<int64_t>(layer) * w.step.num_slots + own_slot) * Shape::kSlotColumns +
               kv_head * Shape::kDim + chunk * 8;
    }
};

// What a warp makes of its tokens of a split, for each head of the KV head's group, to `partial`: [warp][head of
// the group][kDim + 2] floats.
template <class Shape>
__device__ __forceinline__ void attend_warp(const Worker& w, const uint4 (&keys)[Shape::kTimes],
                                            const uint4 (&values)[Shape::kTimes], const float* queries, int num_own,
                                            SharedAddress partial) {
    constexpr int kTimes = Shape::kTimes, kDim = Shape::kDim;
    const uint32_t of_token = w.lane / Shape::kLanesAToken, chunk = w.lane % Shape::kLanesAToken;
    constexpr float kNone = -__builtin_huge_valf();
    Eight next = load_eight(queries + chunk * 8);
#pragma unroll 1  // two heads at once take more registers than there are
    for (int head = 0; head < Shape::kGroup; head++) {
        const Eight query = next;
        if (head + 1 < Shape::kGroup) next = load_eight(queries + (head + 1) * kDim + chunk * 8);
        float scores[kTimes], largest = kNone;
#pragma unroll
        for (int i = 0; i < kTimes; i++) {
            float key[8], score = 0;
            unpack_halves(keys[i], key);
#pragma unroll
            for (int e = 0; e < 8; e++) score = fma_f32(query.x[e], key[e], score);
#pragma unroll
            for (uint32_t mask = 1; mask < Shape::kLanesAToken; mask *= 2) score += ptx::shuffle_xor(score, mask);
            const int token = i * Shape::kTokensATime + of_token;
            scores[i] = token < num_own ? score : kNone;
            largest = scores[i] > largest || scores[i] != scores[i] ? scores[i] : largest;
        }
#pragma unroll
        for (uint32_t mask = Shape::kLanesAToken; mask < kLanes; mask *= 2) {
            const float other = ptx::shuffle_xor(largest, mask);
            largest = other > largest || other != other ? other : largest;
        }
        float sum = 0, mixed[8] = {};
#pragma unroll
        for (int i = 0; i < kTimes; i++) {
            const int token = i * Shape::kTokensATime + of_token;
            const float weight = token < num_own ? exp_f32(scores[i] - largest) : 0;
            float value[8];
            unpack_halves(values[i], value);
            sum += weight;
            if (token < num_own)
#pragma unroll
                for (int e = 0; e < 8; e++) mixed[e] = fma_f32(weight, value[e], mixed[e]);
        }
#pragma unroll
        for (uint32_t mask = Shape::kLanesAToken; mask < kLanes; mask *= 2) {
            sum += ptx::shuffle_xor(sum, mask);
#pragma unroll
            for (int e = 0; e < 8; e++) mixed[e] += ptx::shuffle_xor(mixed[e], mask);
        }
        const SharedAddress to = partial + (w.warp * Shape::kGroup + head) * (kDim + 2) * 4;
        if (w.lane == 0) ptx::store_shared(to, float2{largest, sum});
        if (of_token == 0)
#pragma unroll
            for (int e = 0; e < 4; e++)
                ptx::store_shared(to + (2 + chunk * 8 + 2 * e) * 4, float2{mixed[2 * e], mixed[2 * e + 1]});
    }
}

// The warps' partial results of a split, merged in order, to the row's output of that split; to `heads`, too, if it is
// the row's only one.
template <class Shape>
__device__ __forceinline__ void merge_warps(const Worker& w, SharedAddress partial, int num_warps, float* out, float* heads) {
    constexpr int kDim = Shape::kDim, kHead = kDim + 2;
    constexpr int kWarpBytes = Shape::kGroup * kHead * 4;
    for (int item = w.thread; item < Shape::kGroup * kDim; item += kConsumers) {
        const int head = item / kDim, element = item % kDim;
        const SharedAddress from = partial + head * kHead * 4;
        float largest = ptx::load_shared<float>(from);
        for (int i = 1; i < num_warps; i++) {
            const float other = ptx::load_shared<float>(from + i * kWarpBytes);
            largest = other > largest || other != other ? other : largest;
        }
        float sum = 0, mixed = 0;
        for (int i = 0; i < num_warps; i++) {
            const float2 extremes = ptx::load_shared<float2>(from + i * kWarpBytes);
            const float weight = exp_f32(extremes.x - largest);
            sum = fma_f32(weight, extremes.y, sum);
            mixed = fma_f32(weight, ptx::load_shared<float>(from + i * kWarpBytes + (2 + element) * 4), mixed);
        }
        ptx::store_global(out + head * kHead + 2 + element, mixed);
        if (heads) ptx::store_global(heads + item, mixed * divide_f32(1, sum));
        if (element == 0) {
            ptx::store_global(out + head * kHead, largest);
            ptx::store_global(out + head * kHead + 1, sum);
        }
    }
}

// Tiles of an SM: tile number n is KV head n % kKvHeads over those splits of every row whose block is n / kKvHeads
// modulo num_parts: split_block of program.py.
struct AttentionTiles {
    uint32_t first, stride, count;
    int32_t num_parts, num_blocks, row_step;

    __device__ __forceinline__ int32_t block_of(int row, int split) const {
        return (split + row * row_step) % num_blocks;
    }
    __device__ __forceinline__ int32_t first_split(int row, int part) const {
        const int at = (part - row * row_step) % num_parts;
        return at < 0 ? at + num_parts : at;
    }
};

// Where partial results go, and what becomes of them.
struct Attended {
    float* splits;       // [rows][columns]: for each block and head the maximum, the sum, and values
    int64_t columns;
    float* heads;        // [rows][kHeads][kDim]: splits merged
    uint32_t* arrivals;  // [kKvHeads][bucket] of splits that are there, 0 between ops
    int32_t bucket;
};

__device__ __forceinline__ int of_lane(int value, uint32_t lane) { return ptx::shuffle(static_cast<uint32_t>(value), lane); }

// By lane: what a part has of a row.
struct RowSplits {
    int num_tokens, num_splits;  // of the row
    int first, num_own;          // of the part

    template <class Shape>
    static __device__ __forceinline__ RowSplits of(const Worker& w, const AttentionTiles& tiles, int row, int part) {
        RowSplits found{};
        if (row >= w.step.num_rows) return found;
        found.num_tokens = ptx::load_settled(w.step.positions + row) + 1;
        found.num_splits = (found.num_tokens + Shape::kSplitTokens - 1) / Shape::kSplitTokens;
        found.first = tiles.first_split(row, part);
        if (found.first < found.num_splits) found.num_own = (found.num_splits - 1 - found.first) / tiles.num_parts + 1;
        return found;
    }
};

// The first split of an SM's tiles among its first rows. What it reads is sent for while queries are waited for.
template <class Shape>
struct FirstSplit {
    bool is_there;
    Share<Shape> share;
};

template <class Shape>
__device__ __forceinline__ void prefetch_share(const Worker& w, const Share<Shape>& share, int layer, uint32_t kv_head) {
    if (share.num_own > 0)
#pragma unroll 1
        for (int i = 0; i < Shape::kTimes; i++) {
            const uint16_t* key = share.key_at(w, layer, kv_head, i);
            ptx::prefetch(key);
            ptx::prefetch(key + Shape::kKvHeads * Shape::kDim);
        }
}

template <class Shape>
__device__ __forceinline__ FirstSplit<Shape> begin_attention(const Worker& w, int layer, const AttentionTiles& tiles) {
    const RowSplits own = RowSplits::of<Shape>(w, tiles, w.lane, tiles.first / Shape::kKvHeads);
    const uint32_t rows = ptx::ballot(own.num_own > 0);
    FirstSplit<Shape> found{rows != 0, {}};
    if (!rows) return found;
    const uint32_t row = ptx::lowest_bit(rows);
    found.share = Share<Shape>(w, row, of_lane(own.first, row), of_lane(own.num_tokens, row));
    prefetch_share(w, found.share, layer, tiles.first % Shape::kKvHeads);
    return found;
}

template <class Shape>
__device__ __forceinline__ void attend_split(const Worker& w, int layer, const AttentionTiles& tiles, uint32_t kv_head, int row,
                                             int split, bool is_only, const Share<Shape>& share, const float* queries,
                                             const Attended& attended, SharedAddress partial) {
    constexpr int kDim = Shape::kDim;
    if (share.num_own > 0) {
        uint4 keys[Shape::kTimes], values[Shape::kTimes];
#pragma unroll
        for (int i = 0; i < Shape::kTimes; i++) {
            const uint16_t* key = share.key_at(w, layer, kv_head, i);
            keys[i] = ptx::load_global(reinterpret_cast<const uint4*>(key));
            values[i] = ptx::load_global(reinterpret_cast<const uint4*>(key + Shape::kKvHeads * Shape::kDim));
        }
        const float* query = queries + (static_cast<int64_t>(row) * Shape::kHeads + kv_head * Shape::kGroup) * kDim;
        attend_warp<Shape>(w, keys, values, query, share.num_own, partial);
    }
    sync_consumers();
    const uint32_t head = kv_head * Shape::kGroup;
    float* heads = attended.heads + (static_cast<int64_t>(row) * Shape::kHeads + head) * kDim;
    float* out = attended.splits + row * attended.columns +
                 (static_cast<int64_t>(tiles.block_of(row, split)) * Shape::kHeads + head) * (kDim + 2);
    merge_warps<Shape>(w, partial, share.num_warps, out, is_only ? heads : nullptr);
    sync_consumers();
}

// A warp: a row's splits of a head, merged in ascending order.
template <class Shape>
__device__ __forceinline__ void merge_splits(const Worker& w, const AttentionTiles& tiles, const Attended& attended, int row,
                                             int head, int num_splits) {
    constexpr int kDim = Shape::kDim, kPairs = (kDim / 2 + 31) / 32;  // of a lane
    const float* of_row = attended.splits + row * attended.columns + static_cast<int64_t>(head) * (kDim + 2);
    const auto at = [&](int split) {
        return of_row + static_cast<int64_t>(tiles.block_of(row, split)) * Shape::kHeads * (kDim + 2);
    };
    float largest = -__builtin_huge_valf();
    for (int split = w.lane; split < num_splits; split += kLanes) largest = fmaxf(largest, ptx::load_global(at(split)));
#pragma unroll
    for (uint32_t mask = kLanes / 2; mask; mask /= 2) largest = fmaxf(largest, ptx::shuffle_xor(largest, mask));
    float total = 0;
    float2 sums[kPairs] = {};
#pragma unroll 4
    for (int split = 0; split < num_splits; split++) {
        const float2* from = reinterpret_cast<const float2*>(at(split));
        const float2 extremes = ptx::load_global(from);
        float2 values[kPairs] = {};
#pragma unroll
        for (int i = 0; i < kPairs; i++)
            if (i * kLanes + w.lane < kDim / 2) values[i] = ptx::load_global(from + 1 + i * kLanes + w.lane);
        const float share = exp_f32(extremes.x - largest);
        total = fma_f32(share, extremes.y, total);
#pragma unroll
        for (int i = 0; i < kPairs; i++) {
            sums[i].x = fma_f32(share, values[i].x, sums[i].x);
            sums[i].y = fma_f32(share, values[i].y, sums[i].y);
        }
    }
    const float scale = divide_f32(1, total);
    float* to = attended.heads + (static_cast<int64_t>(row) * Shape::kHeads + head) * kDim;
#pragma unroll
    for (int i = 0; i < kPairs; i++) {
        const uint32_t pair = i * kLanes + w.lane;
        if (pair >= kDim / 2) continue;
        ptx::store_global(to + 2 * pair, sums[i].x * scale);
        ptx::store_global(to + 2 * pair + 1, sums[i].y * scale);
    }
}

// After a part's splits of up to 32 rows, by lane: who brings the last of a row's splits merges all of them.
template <class Shape>
__device__ __forceinline__ void merge_rows(const Worker& w, const AttentionTiles& tiles, const Attended& attended,
                                           uint32_t kv_head, int row0, const RowSplits& own) {
    if (!ptx::ballot(own.num_own > 0 && own.num_splits > 1)) return;
    if (w.warp == 0) {
        bool is_last = own.num_own > 0 && own.num_splits > 1;
        if (is_last && own.num_own < own.num_splits) {
            uint32_t* arrivals = attended.arrivals + kv_head * attended.bucket + row0 + w.lane;
            is_last = ptx::add_acquire_release(arrivals, own.num_own) + own.num_own == static_cast<uint32_t>(own.num_splits);
            if (is_last) ptx::add_release(arrivals, -own.num_splits);
        }
        const uint32_t rows = ptx::ballot(is_last);
        ptx::sync_warp();
        if (w.lane == 0) ptx::store_shared(w.shared + kSelectionAt, rows);
    }
    sync_consumers();
    uint32_t rows = ptx::load_shared<uint32_t>(w.shared + kSelectionAt);
    for (uint32_t item = 0; rows; rows &= rows - 1) {
        const uint32_t row = ptx::lowest_bit(rows);
        const int num_splits = of_lane(own.num_splits, row);
        for (int head = 0; head < Shape::kGroup; head++, item++)
            if (item % kConsumerWarps == w.warp)
                merge_splits<Shape>(w, tiles, attended, row0 + row, kv_head * Shape::kGroup + head, num_splits);
    }
}

template <class Shape>
__device__ __forceinline__ void attention_tiles(const Worker w, int layer, const AttentionTiles tiles, const FirstSplit<Shape> begun,
                                                const float* queries, const Attended attended, SharedAddress partial) {
#pragma unroll 1
    for (uint32_t j = 0; j < tiles.count; j++) {
        const uint32_t tile = tiles.first + j * tiles.stride, kv_head = tile % Shape::kKvHeads;
        const int part = tile / Shape::kKvHeads;
#pragma unroll 1
        for (int row0 = 0; row0 < w.step.num_rows; row0 += kLanes) {
            const RowSplits own = RowSplits::of<Shape>(w, tiles, row0 + w.lane, part);
            uint32_t rows = ptx::ballot(own.num_own > 0);
            if (!rows) continue;
            int row = ptx::lowest_bit(rows), split = of_lane(own.first, row);
            Share<Shape> share = j == 0 && row0 == 0 && begun.is_there
                                     ? begun.share
                                     : Share<Shape>(w, row0 + row, split, of_lane(own.num_tokens, row));
#pragma unroll 1
            while (true) {
                int next_row = row, next_split = split + tiles.num_parts;
                if (next_split >= of_lane(own.num_splits, row)) {
                    rows &= rows - 1;
                    next_row = rows ? ptx::lowest_bit(rows) : row;
                    next_split = of_lane(own.first, next_row);
                }
                // Found again afterwards: to keep it takes registers where there are none.
                if (rows)
                    prefetch_share(w, Share<Shape>(w, row0 + next_row, next_split, of_lane(own.num_tokens, next_row)), layer,
                                   kv_head);
                attend_split<Shape>(w, layer, tiles, kv_head, row0 + row, split, of_lane(own.num_splits, row) == 1, share, queries,
                                    attended, partial);
                if (!rows) break;
                row = next_row, split = next_split;
                share = Share<Shape>(w, row0 + row, split, of_lane(own.num_tokens, row));
            }
            merge_rows<Shape>(w, tiles, attended, kv_head, row0, own);
        }
    }
    report_progress(w, tiles.count);
}

}  // namespace headrace
