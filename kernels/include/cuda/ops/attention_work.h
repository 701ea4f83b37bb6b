// Who attends to what: the splits that an SM's attention tiles have in a step, found in order, and a warp's tokens of each.
#pragma once

#include "cuda/barrier.h"

namespace headrace {

// Of a split, a warp takes kTokensATime neighbours out of every kTokensAtOnce tokens: so a short one keeps all warps busy.
// If kIsStaged, keys and values are loaded into shared memory: see HeldTokens.
template <int kHeads_, int kKvHeads_, int kDim_, int kSplitTokens_, bool kIsStaged_>
struct AttentionShape {
    static constexpr int kHeads = kHeads_, kKvHeads = kKvHeads_, kDim = kDim_, kSplitTokens = kSplitTokens_;
    static constexpr bool kIsStaged = kIsStaged_;
    static constexpr int kGroup = kHeads / kKvHeads;  // query heads of a KV head
    static constexpr int kElements = kGroup * kDim;   // of a row's queries for a KV head
    static constexpr int kLanesAToken = kDim / 8;     // each has 8 of its elements, 16 bytes
    static constexpr int kTokensATime = kLanes / kLanesAToken;
    static constexpr int kTokensAtOnce = kTokensATime * kConsumerWarps;
    static constexpr int kTimes = kSplitTokens / kTokensAtOnce;
    static constexpr int kTokens = kTimes * kTokensATime;  // of a split, a warp's
    static constexpr int kHalfTokens = kSplitTokens / 2;
    static constexpr int kSlotBytes = 4 * kKvHeads * kDim, kValuesAt = kSlotBytes / 2;
    // That share the unpacking of keys and values: as many as registers allow.
    static constexpr int kHeadsAtOnce = kIsStaged && kGroup % 3 == 0                                     ? 3
                                        : kIsStaged && kGroup % 4 == 0 && kTimes <= 4                    ? 4
                                        : kGroup == 2 || (kGroup % 2 == 0 && (kTimes <= 4 || kIsStaged)) ? 2
                                                                                                         : 1;
    static constexpr int kItems = (kElements + kConsumers - 1) / kConsumers;  // a thread's, of kElements

    // What the warps make of a split, in shared memory: [warp][head of the group][kDim] floats, then
    // [warp][head of the group] maximum and sum.
    static constexpr uint32_t kExtremesAt = kConsumerWarps * kElements * 4;
    static constexpr uint32_t kPartialBytes = kExtremesAt + kConsumerWarps * kGroup * 8;
    // Behind them, if kIsStaged: [keys, values][warp][turn of loading][lane] of 16 bytes.
    static constexpr uint32_t kTurnBytes = kLanes * 16, kPartOfTokens = kConsumerWarps * kTimes * kTurnBytes;
    // In the sums of linear ops: weights of a warp's tokens, [warp][head of the group][kTokens]; their slots,
    // [warp][kTokens]; queries; and a second set of queries and of partial results, if there is room, so that a split need
    // not wait for its predecessor's merge.
    static constexpr uint32_t kSlotsAt = kConsumerWarps * kGroup * kTokens * 4;
    static constexpr uint32_t kQueriesAt = kSlotsAt + kConsumerWarps * kTokens * 4, kQueryBytes = kElements * 4;
    static constexpr uint32_t kSecondAt = kQueriesAt + 2 * kQueryBytes;
    static constexpr bool kIsDouble = kSecondAt + kPartialBytes <= kSumsBytes;
    // After an SM's first split, brought to L2 while queries are waited for; none where registers do not allow it.
    static constexpr int kSplitsPrefetched = kIsDouble ? 2 : 0;

    static_assert(kDim >= 16 && kDim <= 256 && (kDim & (kDim - 1)) == 0);
    static_assert(kTimes * 2 == kLanesAToken, "two lanes for each token of a warp");
    static_assert(kQueriesAt + kQueryBytes <= kSumsBytes, "so many query heads of a KV head do not fit");
};

// A row, as all consumers have it in shared memory, up to 32 at once. All of it is settled before the step's first wait.
struct AttendingRow {
    int32_t num_tokens;  // 0: no row
    int32_t context;     // of them committed
    int32_t line;        // of block_tables, where the row's blocks begin
    int32_t path;        // of path_slots, where position 0 would be

    static __device__ __forceinline__ SharedAddress at(const Worker& w, uint32_t index) {
        return w.shared + kAttendingAt + index * sizeof(AttendingRow);
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

}  // namespace headrace
