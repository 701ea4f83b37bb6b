// Attention of one KV head over every split that falls to an instruction: maximum, sum of exponentials and weighted
// values by split and query head; and the merging of a row's splits, once all are there.
//
// A split's tokens are shared out among the consumer warps, and what each makes of its tokens is merged in order.
// Keys and values come straight into registers, as every byte is used once a row. They are loaded one split ahead:
// keys of the next split once this one's scores are known, its values once this one's are mixed; of an SM's first split
// what earlier steps committed comes while queries are waited for.
#pragma once

#include "cuda/ops/input.h"

namespace headrace {

// Of a split, a warp takes kTokensATime neighbours out of every kTokensAtOnce tokens: so a short one keeps all warps busy.
template <int kHeads_, int kKvHeads_, int kDim_, int kSplitTokens_>
struct AttentionShape {
    static constexpr int kHeads = kHeads_, kKvHeads = kKvHeads_, kDim = kDim_, kSplitTokens = kSplitTokens_;
    static constexpr int kGroup = kHeads / kKvHeads;  // query heads of a KV head
    static constexpr int kElements = kGroup * kDim;   // of a row's queries for a KV head
    static constexpr int kLanesAToken = kDim / 8;     // each has 8 of its elements, 16 bytes
    static constexpr int kTokensATime = kLanes / kLanesAToken;
    static constexpr int kTokensAtOnce = kTokensATime * kConsumerWarps;
    static constexpr int kTimes = kSplitTokens / kTokensAtOnce;
    static constexpr int kTokens = kTimes * kTokensATime;  // of a split, a warp's
    static constexpr int kHalfTokens = kSplitTokens / 2;
    static constexpr int kSlotBytes = 4 * kKvHeads * kDim, kValuesAt = kSlotBytes / 2;
    // That share the unpacking of keys and values: two where registers allow it.
    static constexpr int kHeadsAtOnce = kGroup == 2 || (kGroup % 2 == 0 && kTimes <= 4) ? 2 : 1;
    static constexpr int kItems = (kElements + kConsumers - 1) / kConsumers;  // a thread's, of kElements

    // What the warps make of a split, in shared memory: [warp][head of the group][kDim] floats, then
    // [warp][head of the group] maximum and sum.
    static constexpr uint32_t kExtremesAt = kConsumerWarps * kElements * 4;
    static constexpr uint32_t kPartialBytes = kExtremesAt + kConsumerWarps * kGroup * 8;
    // In the sums of linear ops: weights of a warp's tokens, [warp][head of the group][kTokens]; their slots,
    // [warp][kTokens]; queries; and a second set of queries and of partial results, if there is room, so that a split need
    // not wait for its predecessor's merge.
    static constexpr uint32_t kSlotsAt = kConsumerWarps * kGroup * kTokens * 4;
    static constexpr uint32_t kQueriesAt = kSlotsAt + kConsumerWarps * kTokens * 4, kQueryBytes = kElements * 4;
    static constexpr uint32_t kSecondAt = kQueriesAt + 2 * kQueryBytes;
    static constexpr bool kIsDouble = kSecondAt + kPartialBytes <= kSumsBytes;

    static_assert(kDim >= 16 && kDim <= 256 && (kDim & (kDim - 1)) == 0);
    static_assert(kTimes * 2 == kLanesAToken, "two lanes for each token of a warp");
    static_assert(kQueriesAt + kQueryBytes <= kSumsBytes, "so many query heads of a KV head do not fit");
};

__device__ __forceinline__ void unpack_halves(const uint4& packed, float (&x)[8]) {
    const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x[2 * i] = ptx::half_to_float(words[i] & 0xffff);
        x[2 * i + 1] = ptx::half_to_float(words[i] >> 16);
    }
}

// Sums of x over the lanes that differ in bits kMask, kMask / 2, .. kLast of their numbers. With each bit, lanes that
// have it are left with the upper half of what there is, others with the lower.
template <uint32_t kMask, uint32_t kLast, int kCount, int kAll>
__device__ __forceinline__ void sum_scattered(uint32_t lane, float (&x)[kAll]) {
    if constexpr (kMask >= kLast) {
        if constexpr (kCount > 1) {
            const bool is_upper = lane & kMask;
#pragma unroll
            for (int i = 0; i < kCount / 2; i++) {
                const float given = is_upper ? x[i] : x[i + kCount / 2];
                const float kept = is_upper ? x[i + kCount / 2] : x[i];
                x[i] = kept + ptx::shuffle_xor(given, kMask);
            }
            sum_scattered<kMask / 2, kLast, kCount / 2>(lane, x);
        } else {
            x[0] += ptx::shuffle_xor(x[0], kMask);
            sum_scattered<kMask / 2, kLast, 1>(lane, x);
        }
    }
}

// A row, as all consumers have it in shared memory, up to 32 at once. All of it is settled before the step's first wait.
struct AttendingRow {
    int32_t num_tokens;  // 0: no row
    int32_t context;     // of them committed
    int32_t line;        // of block_tables, where the row's blocks begin
    int32_t path;        // of path_slots, where position 0 would be

    static __device__ __forceinline__ SharedAddress at(const Worker& w, uint32_t index) {
        return w.shared + kSquaresAt + index * sizeof(AttendingRow);
    }
    // Rows from row0 on, by one warp.
    static __device__ __forceinline__ void store(const Worker& w, int row0) {
        const int row = row0 + w.lane;
        uint4 found{};
        if (row < w.step.num_rows) {
            const int context = ptx::load_settled(w.step.context_lengths + row);
            found.x = ptx::load_settled(w.step.positions + row) + 1;
            found.y = context;
            found.z = ptx::load_constant(w.step.table_rows + row) * w.step.max_blocks;
            found.w = ptx::load_constant(w.step.path_starts + row) - context;
        }
        ptx::store_shared(at(w, w.lane), found);
    }
    static __device__ __forceinline__ AttendingRow of(const Worker& w, uint32_t index) {
        const uint4 found = ptx::load_shared<uint4>(at(w, index));
        return {static_cast<int32_t>(found.x), static_cast<int32_t>(found.y), static_cast<int32_t>(found.z),
                static_cast<int32_t>(found.w)};
    }
    template <class Shape>
    static __device__ __forceinline__ int num_splits(const Worker& w, uint32_t index) {
        const uint32_t num_tokens = ptx::load_shared<uint32_t>(at(w, index));
        return (num_tokens + Shape::kSplitTokens - 1) / Shape::kSplitTokens;
    }
};

// Tiles of an SM: tile number n is KV head n % kKvHeads over those splits of every row whose block is n / kKvHeads
// modulo num_parts: split_block of program.py.
struct AttentionTiles {
    uint32_t first, stride, count;
    int32_t num_parts, num_blocks, row_step;

    __device__ __forceinline__ uint32_t number(uint32_t index) const { return first + index * stride; }
    __device__ __forceinline__ int32_t first_block(int row) const { return row * row_step % num_blocks; }
    __device__ __forceinline__ int32_t block_of(int row, int split) const {
        const int block = first_block(row) + split;
        return block < num_blocks ? block : block - num_blocks;
    }
    __device__ __forceinline__ int32_t first_split(int row, int part) const {
        const int at = part - row * row_step % num_parts;
        return at < 0 ? at + num_parts : at;
    }
};

// A split of an SM's tiles; all that there are follow each other, tile by tile and row by row.
template <class Shape>
struct SplitCursor {
    uint32_t left;   // of the first 32 tiles, those after this one that have splits
    uint32_t index;  // of the tile
    uint32_t rows;   // of up to 32, from this one on, those of which the tile has splits; 0: the end
    int split;

    // Before the first.
    static __device__ __forceinline__ SplitCursor begin(const Worker& w, const AttentionTiles& tiles, int row0) {
        const int part = tiles.number(w.lane) / Shape::kKvHeads, end = w.step.num_rows - row0;
        bool has_splits = false;
#pragma unroll 1
        for (int row = 0; row < end && row < static_cast<int>(kLanes); row++)
            has_splits |= tiles.first_split(row0 + row, part) < AttendingRow::num_splits<Shape>(w, row);
        return {ptx::ballot(has_splits && w.lane < tiles.count), kNoIndex, 0, 0};
    }

    __device__ __forceinline__ uint32_t row() const { return ptx::lowest_bit(rows); }
    __device__ __forceinline__ uint32_t kv_head(const AttentionTiles& tiles) const {
        return tiles.number(index) % Shape::kKvHeads;
    }

    __device__ __forceinline__ void advance(const Worker& w, const AttentionTiles& tiles, int row0) {
        if (rows) {
            split += tiles.num_parts;
            if (split < AttendingRow::num_splits<Shape>(w, row())) return;
            rows &= rows - 1;
        }
        while (!rows) {
            if (left) {
                index = ptx::lowest_bit(left);
                left &= left - 1;
            } else {
                index = index + 1 < kLanes ? kLanes : index + 1;  // tiles after the first 32 are looked at one by one
            }
            if (index >= tiles.count) return;
            const int first = tiles.first_split(row0 + w.lane, tiles.number(index) / Shape::kKvHeads);
            rows = ptx::ballot(first < AttendingRow::num_splits<Shape>(w, w.lane));
        }
        split = tiles.first_split(row0 + row(), tiles.number(index) / Shape::kKvHeads);
    }
};

// A warp's tokens of a split. Lane of_token * kLanesAToken + 2 * i, and the next, have the token that is the lane's in the
// i-th turn of loading and in the place of_token among the tokens of that turn.
template <class Shape>
struct Share {
    uint32_t found, rest;  // once `found` is there, the slot: see slot()
    int num_tokens;        // of the split from the warp's first on; less than 1: the warp has none
    int num_committed;     // of them; may be less than 0

    // How far after the warp's first.
    static __device__ __forceinline__ int of_lane(const Worker& w) {
        return w.lane % Shape::kLanesAToken / 2 * Shape::kTokensAtOnce + w.lane / Shape::kLanesAToken;
    }
    static __device__ __forceinline__ Share of(const Worker& w, uint32_t row_index, int split) {
        const AttendingRow row = AttendingRow::of(w, row_index);
        const int first = split * Shape::kSplitTokens + static_cast<int>(w.warp) * Shape::kTokensATime;
        Share made{0, 0, row.num_tokens - first, row.context - first};
        if (made.num_tokens <= 0) return made;
        int at = of_lane(w);
        if (at >= made.num_tokens) at = 0;  // what is loaded for it gets no weight
        const bool is_committed = at < made.num_committed;
        const uint32_t position = first + at, block_size = w.step.block_size_tokens, block = position / block_size;
        const int32_t* from = is_committed ? w.step.block_tables : w.step.path_slots;
        made.found = ptx::load_settled(from + (is_committed ? row.line + block : row.path + position));
        made.rest = is_committed ? position - block * block_size : kNoIndex;
        return made;
    }

    __device__ __forceinline__ uint32_t slot(const Worker& w) const {
        return rest == kNoIndex ? found : found * w.step.block_size_tokens + rest;
    }
};

// 4 bytes each, from shared memory.
template <class T, int kCount>
__device__ __forceinline__ void load_words(SharedAddress from, T (&x)[kCount]) {
    if constexpr (kCount % 4 == 0) {
#pragma unroll
        for (int i = 0; i < kCount; i += 4) {
            const uint4 four = ptx::load_shared<uint4>(from + i * 4);
            memcpy(&x[i], &four, sizeof four);
        }
    } else {
#pragma unroll
        for (int i = 0; i < kCount; i++) x[i] = ptx::load_shared<T>(from + i * 4);
    }
}

// Keys of a KV head in slot 0; its values are kKvHeads heads on.
template <class Shape>
__device__ __forceinline__ const uint8_t* keys_of(const Worker& w, int layer, uint32_t kv_head) {
    return reinterpret_cast<const uint8_t*>(w.step.kv) + static_cast<int64_t>(layer) * w.step.num_slots * Shape::kSlotBytes +
           kv_head * (Shape::kDim * 2);
}

template <class Shape>
__device__ __forceinline__ const uint4* at_slot(const uint8_t* from, uint32_t slot) {
    return reinterpret_cast<const uint4*>(from + static_cast<uint64_t>(slot) * Shape::kSlotBytes);
}

template <class Shape>
__device__ __forceinline__ SharedAddress slots_at(const Worker& w) {
    return w.shared + kSumsAt + Shape::kSlotsAt + w.warp * (Shape::kTokens * 4);
}

// Of the warp's tokens, for all its lanes; before they load.
template <class Shape>
__device__ __forceinline__ void store_slots(const Worker& w, uint32_t own) {
    ptx::sync_warp();
    if (w.lane % 2 == 0) ptx::store_shared(slots_at<Shape>(w) + w.lane / 2 * 4, own);
    ptx::sync_warp();
}

// The lane's 16 bytes of its tokens' keys, and of their values, in those turns that are wanted.
template <class Shape, bool kIsKeys, bool kIsValues, class IsWanted>
__device__ __forceinline__ void load_tokens(const Worker& w, const uint8_t* from, uint4 (&keys)[Shape::kTimes],
                                            uint4 (&values)[Shape::kTimes], const IsWanted is_wanted) {
    uint32_t slots[Shape::kTimes];
    load_words(slots_at<Shape>(w) + w.lane / Shape::kLanesAToken * (Shape::kTimes * 4), slots);
    from = ptx::settled_pointer(from + w.lane % Shape::kLanesAToken * 16);
#pragma unroll
    for (int i = 0; i < Shape::kTimes; i++) {
        const uint4* key = at_slot<Shape>(from, slots[i]);
        if constexpr (kIsKeys) ptx::load_global_if(is_wanted(i), key, keys[i]);
        if constexpr (kIsValues) ptx::load_global_if(is_wanted(i), key + Shape::kValuesAt / 16, values[i]);
    }
}

// An SM's first split, as far as it can be had before the wait.
template <class Shape>
struct FirstSplit {
    SplitCursor<Shape> at;
    int num_tokens, num_committed;  // as of its share
    uint4 keys[Shape::kTimes], values[Shape::kTimes];
};

constexpr int kSplitsPrefetched = 2;  // to L2, after the first

// Tokens before context_lengths were written before the step began: by earlier launches, or by earlier steps of this one,
// all blocks of which arrived at a counter that was waited for before begin_next_step let anyone go on. So they may be
// loaded before this step's own tokens are waited for.
template <class Shape>
__device__ __forceinline__ void begin_attention(const Worker& w, int layer, const AttentionTiles& tiles,
                                                FirstSplit<Shape>& begun, int row0 = 0) {
    if (w.warp == 0) AttendingRow::store(w, row0);
    sync_consumers();
    begun.at = SplitCursor<Shape>::begin(w, tiles, row0);
    begun.at.advance(w, tiles, row0);
    if (!begun.at.rows) return;
    SplitCursor<Shape> at = begun.at;
#pragma unroll 1
    for (int i = 0; i <= kSplitsPrefetched && at.rows; i++, at.advance(w, tiles, row0)) {
        const Share<Shape> share = Share<Shape>::of(w, at.row(), at.split);
        if (i == 0) {
            begun.num_tokens = share.num_tokens, begun.num_committed = share.num_committed;
            store_slots<Shape>(w, share.slot(w));
        } else if (share.num_tokens > 0 && share.rest != kNoIndex) {
            const uint4* key = at_slot<Shape>(keys_of<Shape>(w, layer, at.kv_head(tiles)), share.slot(w));
#pragma unroll
            for (uint32_t line = 0; line < Shape::kDim * 2; line += 256) {
                const uint32_t own = line + w.lane % 2 * 128;
                if (own >= Shape::kDim * 2) continue;
                ptx::prefetch(key + own / 16);
                ptx::prefetch(key + (Shape::kValuesAt + own) / 16);
            }
        }
    }
    const uint8_t* keys = keys_of<Shape>(w, layer, begun.at.kv_head(tiles));
    const int early = begun.num_committed - static_cast<int>(w.lane / Shape::kLanesAToken);
    load_tokens<Shape, true, true>(w, keys, begun.keys, begun.values, [=](int i) { return i * Shape::kTokensAtOnce < early; });
}

// A warp's turns, or the first half of them where the others have no tokens.
template <int kTimes, class Turn>
__device__ __forceinline__ void for_turns(bool is_whole, const Turn& turn) {
    constexpr int kFew = (kTimes + 1) / 2;
#pragma unroll
    for (int i = 0; i < kFew; i++) turn(i);
    if (kTimes > 1 && is_whole)
#pragma unroll
        for (int i = kFew; i < kTimes; i++) turn(i);
}

// A warp's weights of its tokens, by head: [head of the group][kTokens]; maximum and sum of each to `extremes`.
template <class Shape>
__device__ __forceinline__ void weigh_tokens(const Worker& w, const uint4 (&keys)[Shape::kTimes], int num_tokens,
                                             SharedAddress queries, SharedAddress weights, SharedAddress extremes) {
    constexpr int kTimes = Shape::kTimes, kAtOnce = Shape::kHeadsAtOnce;
    const uint32_t chunk = w.lane % Shape::kLanesAToken;
    const bool is_there = Share<Shape>::of_lane(w) < num_tokens, is_whole = num_tokens > Shape::kHalfTokens;
#pragma unroll 1
    for (int head0 = 0; head0 < Shape::kGroup; head0 += kAtOnce) {
        float query[kAtOnce][8], scores[kAtOnce][kTimes] = {};
#pragma unroll
        for (int h = 0; h < kAtOnce; h++) load_words(queries + ((head0 + h) * Shape::kDim + chunk * 8) * 4, query[h]);
        for_turns<kTimes>(is_whole, [&](int i) {
            float key[8];
            unpack_halves(keys[i], key);
#pragma unroll
            for (int h = 0; h < kAtOnce; h++)
#pragma unroll
                for (int e = 0; e < 8; e++) scores[h][i] = fma_f32(query[h][e], key[e], scores[h][i]);
        });
#pragma unroll
        for (int h = 0; h < kAtOnce; h++) {
            sum_scattered<Shape::kLanesAToken / 2, 1, kTimes>(w.lane, scores[h]);
            const float score = is_there ? scores[h][0] : -__builtin_huge_valf();
            float largest = score;
#pragma unroll
            for (uint32_t mask = kLanes / 2; mask > 1; mask /= 2) largest = fmaxf(largest, ptx::shuffle_xor(largest, mask));
            const float weight = exp_f32(score - largest);  // NaN for a score of NaN, which fmaxf leaves out
            float sum = weight;
#pragma unroll
            for (uint32_t mask = kLanes / 2; mask > 1; mask /= 2) sum += ptx::shuffle_xor(sum, mask);
            if (w.lane % 2 == 0) ptx::store_shared(weights + ((head0 + h) * Shape::kTokens + w.lane / 2) * 4, weight);
            if (w.lane == 0) ptx::store_shared(extremes + (head0 + h) * 8, float2{largest, sum});
        }
    }
}

// A warp's values, mixed by weight: [head of the group][kDim].
template <class Shape>
__device__ __forceinline__ void mix_tokens(const Worker& w, const uint4 (&values)[Shape::kTimes], int num_tokens, SharedAddress weights,
                                           SharedAddress to) {
    constexpr int kTimes = Shape::kTimes, kAtOnce = Shape::kHeadsAtOnce, kTokensATime = Shape::kTokensATime;
    constexpr int kLeft = kTokensATime < 8 ? 8 / kTokensATime : 1;  // elements of a lane once lanes are summed
    const uint32_t of_token = w.lane / Shape::kLanesAToken;
    const bool is_whole = num_tokens > Shape::kHalfTokens;
    uint32_t element = w.lane % Shape::kLanesAToken * 8;
    for (uint32_t mask = kLanes / 2, half = 4; mask >= Shape::kLanesAToken && half; mask /= 2, half /= 2)
        if (w.lane & mask) element += half;
#pragma unroll 1
    for (int head0 = 0; head0 < Shape::kGroup; head0 += kAtOnce) {
        float weight[kAtOnce][kTimes], mixed[kAtOnce][8] = {};
#pragma unroll
        for (int h = 0; h < kAtOnce; h++)
            load_words(weights + ((head0 + h) * Shape::kTokens + of_token * kTimes) * 4, weight[h]);
        for_turns<kTimes>(is_whole, [&](int i) {
            float value[8];
            unpack_halves(values[i], value);
#pragma unroll
            for (int h = 0; h < kAtOnce; h++)
#pragma unroll
                for (int e = 0; e < 8; e++) mixed[h][e] = fma_f32(weight[h][i], value[e], mixed[h][e]);
        });
#pragma unroll
        for (int h = 0; h < kAtOnce; h++) {
            sum_scattered<kLanes / 2, Shape::kLanesAToken, 8>(w.lane, mixed[h]);
            const SharedAddress own = to + ((head0 + h) * Shape::kDim + element) * 4;
            if constexpr (kLeft == 1) {
                if (kTokensATime <= 8 || !(w.lane & Shape::kLanesAToken)) ptx::store_shared(own, mixed[h][0]);
            } else {
#pragma unroll
                for (int e = 0; e < kLeft; e += 2) ptx::store_shared(own + e * 4, float2{mixed[h][e], mixed[h][e + 1]});
            }
        }
    }
}

// What a warp without tokens has to say of a split.
template <class Shape>
__device__ __forceinline__ void write_nothing(const Worker& w, SharedAddress to, SharedAddress extremes) {
#pragma unroll 1
    for (uint32_t i = w.lane; i < Shape::kElements; i += kLanes) ptx::store_shared(to + i * 4, 0.0f);
#pragma unroll 1
    for (uint32_t i = w.lane; i < Shape::kGroup; i += kLanes) ptx::store_shared(extremes + i * 8, float2{-__builtin_huge_valf(), 0});
}

// The warps' partial results of a split, merged in order, to the row's output of that split; to `heads`, too, if it is
// the row's only one.
template <class Shape>
__device__ __forceinline__ void merge_warps(const Worker& w, SharedAddress partial, float* out, float* heads) {
    constexpr int kDim = Shape::kDim, kHead = kDim + 2;
#pragma unroll 1
    for (int item = w.thread; item < Shape::kElements; item += kConsumers) {
        const int head = item / kDim, element = item % kDim;
        float2 extremes[kConsumerWarps];
        float values[kConsumerWarps];
#pragma unroll
        for (uint32_t i = 0; i < kConsumerWarps; i++) {
            extremes[i] = ptx::load_shared<float2>(partial + Shape::kExtremesAt + (i * Shape::kGroup + head) * 8);
            values[i] = ptx::load_shared<float>(partial + (i * Shape::kElements + item) * 4);
        }
        float largest = extremes[0].x, sum = 0, mixed = 0;
#pragma unroll
        for (uint32_t i = 1; i < kConsumerWarps; i++) largest = fmaxf(largest, extremes[i].x);
#pragma unroll
        for (uint32_t i = 0; i < kConsumerWarps; i++) {
            const float weight = exp_f32(extremes[i].x - largest);
            sum = fma_f32(weight, extremes[i].y, sum);
            mixed = fma_f32(weight, values[i], mixed);
        }
        ptx::store_global(out + head * kHead + 2 + element, mixed);
        if (heads) ptx::store_global(heads + item, mixed * divide_f32(1, sum));
        if (element == 0) {
            ptx::store_global(out + head * kHead, largest);
            ptx::store_global(out + head * kHead + 1, sum);
        }
    }
}

// Where queries come from, where partial results go, and what becomes of them. Buffers are told by bytes into the
// activations, and their addresses computed where they are used, as registers are few.
struct Attended {
    int64_t queries;     // [rows][kHeads][kDim]
    int64_t splits;      // [rows][columns]: for each block and head the maximum, the sum, and values
    int64_t columns;
    int64_t heads;       // [rows][kHeads][kDim]: splits merged
    uint32_t* arrivals;  // [kKvHeads][bucket] of splits that are there, 0 between ops
    int32_t bucket;

    template <class Shape>
    static __device__ __forceinline__ float* of_group(const Worker& w, int64_t buffer, int row, uint32_t kv_head) {
        return reinterpret_cast<float*>(w.step.activations + w.zero() + buffer) +
               static_cast<uint32_t>(row * Shape::kKvHeads + kv_head) * Shape::kElements;
    }
    template <class Shape>
    __device__ __forceinline__ float* splits_of(const Worker& w, int row, int block, uint32_t kv_head) const {
        return reinterpret_cast<float*>(w.step.activations + w.zero() + splits) + row * columns +
               static_cast<uint32_t>(block * Shape::kKvHeads + kv_head) * (Shape::kElements + 2 * Shape::kGroup);
    }
};

// A row's splits of a KV head's group, merged in ascending order.
template <class Shape>
__device__ __forceinline__ void merge_splits(const Worker& w, const AttentionTiles& tiles, const Attended& attended, int row,
                                             uint32_t kv_head, int num_splits) {
    constexpr int kDim = Shape::kDim, kAtOnce = 8;
    constexpr uint32_t kHeadBytes = (kDim + 2) * 4, kBlockBytes = Shape::kHeads * kHeadBytes;
    const uint8_t* of_row = reinterpret_cast<const uint8_t*>(attended.splits_of<Shape>(w, row, 0, kv_head));
    const uint32_t first_block = tiles.first_block(row), num_blocks = tiles.num_blocks;
#pragma unroll 1
    for (int item = w.thread; item < Shape::kElements; item += kConsumers) {
        const uint8_t* of_head = ptx::settled_pointer(of_row + item / kDim * kHeadBytes);
        const uint8_t* of_element = ptx::settled_pointer(of_head + 8 + item % kDim * 4);
        float largest = -__builtin_huge_valf(), total = 0, mixed = 0;
#pragma unroll 1
        for (int split0 = 0; split0 < num_splits; split0 += kAtOnce) {
            float2 extremes[kAtOnce];
            float values[kAtOnce];
#pragma unroll
            for (int i = 0; i < kAtOnce; i++) {
                // In place of splits past the last the last, without weight.
                const bool is_there = split0 + i < num_splits;
                uint32_t block = first_block + (is_there ? split0 + i : num_splits - 1);
                if (block >= num_blocks) block -= num_blocks;
                const uint64_t at = static_cast<uint64_t>(block) * kBlockBytes;
                extremes[i] = ptx::load_global(reinterpret_cast<const float2*>(of_head + at));
                values[i] = ptx::load_global(reinterpret_cast<const float*>(of_element + at));
                if (!is_there) extremes[i] = {-__builtin_huge_valf(), 0};
            }
            float top = largest;
#pragma unroll
            for (int i = 0; i < kAtOnce; i++) top = fmaxf(top, extremes[i].x);
            const float kept = exp_f32(largest - top);
            largest = top, total *= kept, mixed *= kept;
#pragma unroll
            for (int i = 0; i < kAtOnce; i++) {
                const float share = exp_f32(extremes[i].x - top);
                total = fma_f32(share, extremes[i].y, total);
                mixed = fma_f32(share, values[i], mixed);
            }
        }
        ptx::store_global(Attended::of_group<Shape>(w, attended.heads, row, kv_head) + item, mixed * divide_f32(1, total));
    }
}

// After an SM's splits of up to 32 rows: who brings the last of a row's splits of a KV head merges all of them. Each warp
// counts those of a tile in, so that what eight tiles wait for comes at once.
template <class Shape>
__device__ __forceinline__ void merge_rows(const Worker& w, const AttentionTiles& tiles, const Attended& attended,
                                           int row0) {
    const int num_splits = AttendingRow::num_splits<Shape>(w, w.lane);
    if (!ptx::ballot(num_splits > 1)) return;
#pragma unroll 1
    for (uint32_t index0 = 0; index0 < tiles.count; index0 += kConsumerWarps) {
        sync_consumers();
        bool is_last = false;
        if (index0 + w.warp < tiles.count) {
            const uint32_t tile = tiles.number(index0 + w.warp);
            const int first = tiles.first_split(row0 + w.lane, tile / Shape::kKvHeads);
            if (first < num_splits && num_splits > 1) {
                const int num_own = (num_splits - 1 - first) / tiles.num_parts + 1;
                is_last = true;
                if (num_own < num_splits) {
                    uint32_t* arrivals = attended.arrivals + tile % Shape::kKvHeads * attended.bucket + row0 + w.lane;
                    is_last = ptx::add_acquire_release(arrivals, num_own) + num_own == static_cast<uint32_t>(num_splits);
                    if (is_last) ptx::store_global(arrivals, uint32_t{0});  // nobody else comes before the op's signal
                }
            }
        }
        const uint32_t rows_of_warp = ptx::ballot(is_last);
        if (w.lane == 0) ptx::store_shared(w.shared + kSelectionAt + w.warp * 4, rows_of_warp);
        sync_consumers();
        uint32_t found = 0;
        if (w.lane < kConsumerWarps) found = ptx::load_shared<uint32_t>(w.shared + kSelectionAt + w.lane * 4);
#pragma unroll 1
        for (uint32_t warps = ptx::ballot(found != 0); warps; warps &= warps - 1) {
            const uint32_t of_warp = ptx::lowest_bit(warps);
            const uint32_t kv_head = tiles.number(index0 + of_warp) % Shape::kKvHeads;
#pragma unroll 1
            for (uint32_t rows = ptx::shuffle(found, of_warp); rows; rows &= rows - 1) {
                const uint32_t row = ptx::lowest_bit(rows);
                merge_splits<Shape>(w, tiles, attended, row0 + row, kv_head, AttendingRow::num_splits<Shape>(w, row));
            }
        }
    }
}

template <class Shape>
__device__ __forceinline__ void attend_rows(const Worker& w, int layer, const AttentionTiles& tiles, FirstSplit<Shape>& begun,
                                            const Attended& attended, SharedAddress page, int row0) {
    constexpr int kItems = Shape::kItems;
    SplitCursor<Shape> at = begun.at;
    int num_tokens = begun.num_tokens;
    if (num_tokens > 0) {
        const int early = begun.num_committed - static_cast<int>(w.lane / Shape::kLanesAToken);
        load_tokens<Shape, true, true>(w, keys_of<Shape>(w, layer, at.kv_head(tiles)), begun.keys, begun.values,
                                       [=](int i) { return i * Shape::kTokensAtOnce >= early; });
    }
    const SharedAddress weights = w.shared + kSumsAt + w.warp * (Shape::kGroup * Shape::kTokens * 4);
    float held[kItems];
    const auto has_item = [&](int i) {
        return (i + 1) * kConsumers <= static_cast<uint32_t>(Shape::kElements) || w.thread + i * kConsumers < Shape::kElements;
    };
    const auto load_queries = [&](const SplitCursor<Shape>& of) {
        const float* from = Attended::of_group<Shape>(w, attended.queries, row0 + of.row(), of.kv_head(tiles));
#pragma unroll
        for (int i = 0; i < kItems; i++)
            if (has_item(i)) held[i] = ptx::load_global(from + w.thread + i * kConsumers);
    };
    const auto queries_at = [&](uint32_t parity) {
        return w.shared + kSumsAt + Shape::kQueriesAt + (Shape::kIsDouble ? parity * Shape::kQueryBytes : 0);
    };
    const auto store_queries = [&](uint32_t parity) {
#pragma unroll
        for (int i = 0; i < kItems; i++)
            if (has_item(i))
                ptx::store_shared(queries_at(parity) + (w.thread + i * kConsumers) * 4, held[i]);
    };
    load_queries(at);
    store_queries(0);
    sync_consumers();
    uint32_t parity = 0;
#pragma unroll 1
    while (true) {
        const SharedAddress partial = Shape::kIsDouble && parity ? w.shared + kSumsAt + Shape::kSecondAt : page;
        const SharedAddress mixed = partial + w.warp * (Shape::kElements * 4);
        const SharedAddress extremes = partial + Shape::kExtremesAt + w.warp * (Shape::kGroup * 8);
        SplitCursor<Shape> next = at;
        next.advance(w, tiles, row0);
        Share<Shape> share{};
        if (next.rows) share = Share<Shape>::of(w, next.row(), next.split);
        if (num_tokens > 0)
            weigh_tokens<Shape>(w, begun.keys, num_tokens, queries_at(parity), weights, extremes);
        const uint8_t* keys = keys_of<Shape>(w, layer, next.kv_head(tiles));
        if (Shape::kIsDouble) load_queries(next.rows ? next : at);
        const auto is_wanted = [=](int) { return share.num_tokens > 0; };
        if (next.rows) {
            store_slots<Shape>(w, share.slot(w));
            load_tokens<Shape, true, false>(w, keys, begun.keys, begun.values, is_wanted);
        } else {
            ptx::sync_warp();  // the warp's weights are there
        }
        if (num_tokens > 0)
            mix_tokens<Shape>(w, begun.values, num_tokens, weights, mixed);
        else
            write_nothing<Shape>(w, mixed, extremes);
        if (next.rows) load_tokens<Shape, false, true>(w, keys, begun.keys, begun.values, is_wanted);
        if (Shape::kIsDouble && next.rows) store_queries(parity ^ 1);
        sync_consumers();
        if (!Shape::kIsDouble) load_queries(next.rows ? next : at);
        const int row = row0 + at.row();
        const uint32_t kv_head = at.kv_head(tiles);
        const bool is_only = AttendingRow::num_splits<Shape>(w, at.row()) == 1;
        merge_warps<Shape>(w, partial, attended.splits_of<Shape>(w, row, tiles.block_of(row, at.split), kv_head),
                           is_only ? Attended::of_group<Shape>(w, attended.heads, row, kv_head) : nullptr);
        if (!next.rows) break;
        if (!Shape::kIsDouble) {
            store_queries(0);
            sync_consumers();
        }
        at = next;
        num_tokens = share.num_tokens;
        parity ^= 1;
    }
    merge_rows<Shape>(w, tiles, attended, row0);
}

template <class Shape>
__device__ __forceinline__ void attention_tiles(const Worker w, int layer, const AttentionTiles tiles, FirstSplit<Shape>& begun,
                                                const Attended attended, SharedAddress page) {
    if (begun.at.rows) attend_rows<Shape>(w, layer, tiles, begun, attended, page, 0);
    if (attended.bucket > static_cast<int>(kLanes)) {
#pragma unroll 1
        for (int row0 = kLanes; row0 < w.step.num_rows; row0 += kLanes) {
            sync_consumers();  // the rows before are done with shared memory
            begin_attention<Shape>(w, layer, tiles, begun, row0);
            if (begun.at.rows) attend_rows<Shape>(w, layer, tiles, begun, attended, page, row0);
        }
    }
    report_progress(w, tiles.count);
}

}  // namespace headrace
