// Attention of one KV head over every split that falls to an instruction: maximum, sum of exponentials and weighted
// values by split and query head.
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

// The warps' partial results of a split, merged in order, to the row's output of that split.
template <class Shape>
__device__ __forceinline__ void merge_warps(const Worker& w, SharedAddress partial, int num_warps, float* out) {
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
        if (element == 0) {
            ptx::store_global(out + head * kHead, largest);
            ptx::store_global(out + head * kHead + 1, sum);
        }
    }
}

// Tiles of an SM: tile number n is KV head n % kKvHeads over splits n / kKvHeads, + num_parts, ... of every row.
struct AttentionTiles {
    uint32_t first, stride, count, num_parts;
};

// What the first of an SM's tiles reads of its first row is sent for while queries are waited for.
template <class Shape>
__device__ __forceinline__ Share<Shape> begin_attention(const Worker& w, int layer, const AttentionTiles& tiles) {
    const Share<Shape> share(w, 0, tiles.first / Shape::kKvHeads, ptx::load_settled(w.step.positions) + 1);
    if (share.num_own > 0)
#pragma unroll 1
        for (int i = 0; i < Shape::kTimes; i++) {
            const uint16_t* key = share.key_at(w, layer, tiles.first % Shape::kKvHeads, i);
            ptx::prefetch(key);
            ptx::prefetch(key + Shape::kKvHeads * Shape::kDim);
        }
    return share;
}

template <class Shape>
__device__ __forceinline__ void attend_split(const Worker& w, int layer, int row, uint32_t kv_head, int split,
                                             const Share<Shape>& share, const float* queries, float* out, int64_t out_columns,
                                             SharedAddress partial) {
    constexpr int kDim = Shape::kDim;
    if (share.num_own > 0) {
        uint4 keys[Shape::kTimes], values[Shape::kTimes];
#pragma unroll
        for (int i = 0; i < Shape::kTimes; i++) {
            const uint16_t* key = share.key_at(w, layer, kv_head, i);
            keys[i] = ptx::load_global(reinterpret_cast<const uint4*>(key));
            values[i] = ptx::load_global(reinterpret_cast<const uint4*>(key + Shape::kKvHeads * kDim));
        }
        const float* query = queries + (static_cast<int64_t>(row) * Shape::kHeads + kv_head * Shape::kGroup) * kDim;
        attend_warp<Shape>(w, keys, values, query, share.num_own, partial);
    }
    sync_consumers();
    float* of_split =
        out + row * out_columns + (static_cast<int64_t>(split) * Shape::kHeads + kv_head * Shape::kGroup) * (kDim + 2);
    merge_warps<Shape>(w, partial, share.num_warps, of_split);
    sync_consumers();
}

template <class Shape>
__device__ __forceinline__ void attention_tiles(const Worker w, int layer, const AttentionTiles tiles, const Share<Shape> begun,
                                                const float* queries, float* out, int64_t out_columns, SharedAddress partial) {
    int most_tokens = 0;
    for (int row = w.lane; row < w.step.num_rows; row += kLanes) {
        const int own = ptx::load_settled(w.step.positions + row) + 1;
        most_tokens = own > most_tokens ? own : most_tokens;
    }
#pragma unroll
    for (uint32_t mask = kLanes / 2; mask; mask /= 2) {
        const int other = ptx::shuffle_xor(static_cast<uint32_t>(most_tokens), mask);
        most_tokens = other > most_tokens ? other : most_tokens;
    }
#pragma unroll 1
    for (uint32_t j = 0; j < tiles.count; j++) {
        const uint32_t tile = tiles.first + j * tiles.stride, kv_head = tile % Shape::kKvHeads, part = tile / Shape::kKvHeads;
        if (static_cast<int>(part) * Shape::kSplitTokens >= most_tokens) continue;
#pragma unroll 1
        for (int row = 0; row < w.step.num_rows; row++) {
            const int num_tokens = ptx::load_settled(w.step.positions + row) + 1;
#pragma unroll 1
            for (int split = part; split * Shape::kSplitTokens < num_tokens; split += tiles.num_parts) {
                const bool has_begun = j == 0 && row == 0 && split == static_cast<int>(part);
                const Share<Shape> share = has_begun ? begun : Share<Shape>(w, row, split, num_tokens);
                attend_split<Shape>(w, layer, row, kv_head, split, share, queries, out, out_columns, partial);
            }
        }
    }
    report_progress(w, tiles.count);
}

}  // namespace headrace
