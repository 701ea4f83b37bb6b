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
    static constexpr int kElements = kGroup * kDim, kPairs = kElements / 2;  // of a row's queries for a KV head
    static constexpr int kChunks = kDim / 8;  // of 16 bytes, of a token's keys or values
    static constexpr int kTokensATime = kLanes / kChunks;  // whose keys or values a warp copies at once
    static constexpr int kTokensAtOnce = kTokensATime * kConsumerWarps;
    static constexpr int kTimes = kSplitTokens / kTokensAtOnce;
    static constexpr int kTokens = kTimes * kTokensATime;  // of a split, a warp's
    static constexpr int kSlotBytes = 4 * kKvHeads * kDim, kValuesAt = kSlotBytes / 2;
    // Query heads that a matrix instruction takes: a row for the upper half of each, and one for the lower.
    static constexpr int kHeadsAtOnce = 8, kHeadBlocks = (kGroup + kHeadsAtOnce - 1) / kHeadsAtOnce;

    // What the warps make of a split, in shared memory: [warp][head of the group][kDim] floats, then
    // [warp][head of the group] maximum and sum.
    static constexpr uint32_t kExtremesAt = kConsumerWarps * kElements * 4;
    static constexpr uint32_t kPartialBytes = kExtremesAt + kConsumerWarps * kGroup * 8;
    // Behind them, if kIsStaged: [keys, values][warp][kTokens][kDim] of 2 bytes.
    static constexpr uint32_t kTokenBytes = kDim * 2, kPartOfTokens = kConsumerWarps * kTokens * kTokenBytes;
    // In the sums of linear ops: slots of the warps' tokens, [warp][kTokens]; queries, the upper halves of all elements and
    // then the lower; and a second set of queries and of partial results, if there is room, so that a split need
    // not wait for its predecessor's merge.
    static constexpr uint32_t kQueriesAt = kConsumerWarps * kTokens * 4, kQueryBytes = kElements * 4;
    static constexpr uint32_t kSecondAt = kQueriesAt + 2 * kQueryBytes;
    static constexpr bool kIsDouble = kSecondAt + kPartialBytes <= kSumsBytes;
    // After an SM's first split, brought to L2 while queries are waited for.
    static constexpr int kSplitsPrefetched = 2;

    static_assert(kDim >= 16 && kDim <= 256 && (kDim & (kDim - 1)) == 0);
    static_assert(kTimes * 2 == kChunks && kTokens == 16, "two lanes for each token of a warp");
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

// A split of an SM's tiles.
struct DealtSplit {
    int32_t row;  // from row0 on, of up to 32; -1: none, all were before
    int32_t split;
    uint32_t kv_head;

    __device__ __forceinline__ bool is_any() const { return row >= 0; }
};

// All splits that an SM's tiles have of 32 rows, numbered tile by tile and row by row; the first kMostDealt are noted down in
// shared memory. They are the same in all layers of a step, and so looked up in each with little ado: what comes before a
// wait is on a step's critical path where few rows attend to few tokens.
template <class Shape>
struct DealtSplits {
    static constexpr uint32_t kRowBits = 5, kHeadBits = 8;
    static_assert(Shape::kKvHeads <= 1 << kHeadBits);

    // By one warp, after AttendingRow::store.
    static __device__ __forceinline__ void store(const Worker& w, const AttentionTiles& tiles, int row0) {
        uint32_t total = 0;
#pragma unroll 1
        for (uint32_t index = 0; index < tiles.count; index++) {
            const OfTile of(w, tiles, row0, index);
#pragma unroll 1
            for (uint32_t i = 0; i < of.of_row; i++) {
                const uint32_t number = total + of.end - of.of_row + i;
                if (number >= kMostDealt) break;
                const uint32_t split = of.first + i * tiles.num_parts;
                ptx::store_shared(w.shared + kDealtAt + 4 + number * 4,
                                  w.lane | of.kv_head << kRowBits | split << (kRowBits + kHeadBits));
            }
            total += ptx::shuffle(of.end, kLanes - 1);
        }
        if (w.lane == 0) ptx::store_shared(w.shared + kDealtAt, total);
    }
    static __device__ __forceinline__ uint32_t total(const Worker& w) { return ptx::load_shared<uint32_t>(w.shared + kDealtAt); }
    // Of the first kMostDealt, or past the last.
    static __device__ __forceinline__ DealtSplit noted(const Worker& w, uint32_t number) {
        if (number >= total(w)) return {-1, 0, 0};
        const uint32_t found = ptx::load_shared<uint32_t>(w.shared + kDealtAt + 4 + number * 4);
        return {static_cast<int32_t>(found % (1 << kRowBits)), static_cast<int32_t>(found >> (kRowBits + kHeadBits)),
                (found >> kRowBits) % (1 << kHeadBits)};
    }
    // By whole warps.
    static __device__ __forceinline__ DealtSplit at(const Worker& w, const AttentionTiles& tiles, int row0, uint32_t number) {
        return number < kMostDealt || number >= total(w) ? noted(w, number) : find(w, tiles, row0, number);
    }

   private:
    // What a tile has of the lane's row.
    struct OfTile {
        int32_t first;    // split
        uint32_t of_row;  // so many splits
        uint32_t end;     // of rows up to the lane's
        uint32_t kv_head;

        __device__ __forceinline__ OfTile(const Worker& w, const AttentionTiles& tiles, int row0, uint32_t index) {
            const uint32_t tile = tiles.number(index);
            kv_head = tile % Shape::kKvHeads;
            first = tiles.first_split(row0 + w.lane, tile / Shape::kKvHeads);
            const int num_splits = AttendingRow::num_splits<Shape>(w, w.lane);
            of_row = first < num_splits ? (num_splits - 1 - first) / tiles.num_parts + 1 : 0;
            end = of_row;
#pragma unroll
            for (uint32_t distance = 1; distance < kLanes; distance *= 2) {
                const uint32_t before = ptx::shuffle(end, w.lane + kLanes - distance);
                if (w.lane >= distance) end += before;
            }
        }
    };
    static __device__ __forceinline__ DealtSplit find(const Worker& w, const AttentionTiles& tiles, int row0, uint32_t number) {
#pragma unroll 1
        for (uint32_t index = 0;; index++) {
            const OfTile of(w, tiles, row0, index);
            const uint32_t rows = ptx::ballot(of.end > number);
            if (rows) {
                const uint32_t row = ptx::lowest_bit(rows);
                const uint32_t split = of.first + (number - (of.end - of.of_row)) * tiles.num_parts;  // in the row's lane
                return {static_cast<int32_t>(row), static_cast<int32_t>(ptx::shuffle(split, row)), of.kv_head};
            }
            number -= ptx::shuffle(of.end, kLanes - 1);
        }
    }
};

// A warp's tokens of a split: lanes 2 * i and the next know of token i.
template <class Shape>
struct Share {
    uint32_t found, rest;  // once `found` is there, the slot: see slot()
    int num_tokens;        // of the row from the warp's first on; less than 1: the warp has none
    int num_committed;     // of them; may be less than 0

    // How far token i is after the warp's first.
    static __device__ __forceinline__ int offset_of(int i) {
        return i % Shape::kTimes * Shape::kTokensAtOnce + i / Shape::kTimes;
    }
    static __device__ __forceinline__ Share of(const Worker& w, uint32_t row_index, int split) {
        const AttendingRow row = AttendingRow::of(w, row_index);
        const int first = split * Shape::kSplitTokens + static_cast<int>(w.warp) * Shape::kTokensATime;
        Share made{0, 0, row.num_tokens - first, row.context - first};
        if (made.num_tokens <= 0) return made;
        int at = offset_of(w.lane / 2);
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
