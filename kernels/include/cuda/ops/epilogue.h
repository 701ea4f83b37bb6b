// What becomes of a finished tile: one sink an epilogue.
#pragma once

#include "cuda/rows.h"

namespace headrace {

struct Place {
    int r0, row;  // row of the chunk that begins at r0
    bool is_row;  // false: padding; nothing is stored
    int column;   // of the tile; the second value is 16 columns on

    __device__ __forceinline__ int64_t step_row() const { return r0 + row; }
};

// Sums of rows that RMS norm has yet to scale.
template <bool kIsNormed>
__device__ __forceinline__ float scaled(const Worker& w, const Place& at, float sum) {
    if constexpr (kIsNormed) {
        if (at.is_row) sum *= ptx::load_shared<float>(w.shared + kScalesAt + at.row * 4);
    }
    return sum;
}

// A sink takes sums: `fetch` loads what of memory they will be joined with, before they are there; `end` follows
// all sums of a chunk of rows, without a barrier between.
struct SimpleSink {
    struct Held {};
    __device__ __forceinline__ Held fetch(const Place&) const { return {}; }
    __device__ __forceinline__ void end(const Worker&, int, int) const {}
};

template <int kColumns>
__device__ __forceinline__ bool is_within(int column) {
    return kColumns % 32 == 0 || column < kColumns;
}

// Rows of a float buffer.
template <int kColumns, bool kIsNormed>
struct Store : SimpleSink {
    float* out;  // the tile's first column
    int64_t row_columns;

    __device__ __forceinline__ void put(const Worker& w, const Place& at, float low, float high, Held) const {
        if (!at.is_row) return;
        float* to = out + at.step_row() * row_columns + at.column;
        if (is_within<kColumns>(at.column)) ptx::store_global(to, scaled<kIsNormed>(w, at, low));
        if (is_within<kColumns>(at.column + 16)) ptx::store_global(to + 16, scaled<kIsNormed>(w, at, high));
    }
};

template <int kColumns, bool kIsNormed, class Normed>
struct Residual : SimpleSink {
    struct Held {
        float low, high, low_weight, high_weight;
    };
    float* out;
    int64_t row_columns;
    uint32_t n0;  // the tile's first column, where `out` is
    Normed normed;

    __device__ __forceinline__ Held fetch(const Place& at) const {
        const float* from = to(at);
        const bool has_low = is_there(at, at.column), has_high = is_there(at, at.column + 16);
        return {has_low ? ptx::load_global(from) : 0, has_high ? ptx::load_global(from + 16) : 0,
                has_low ? normed.weight_of(n0 + at.column) : 0, has_high ? normed.weight_of(n0 + at.column + 16) : 0};
    }
    __device__ __forceinline__ void put(const Worker& w, const Place& at, float low, float high, const Held& held) const {
        const bool has_low = is_there(at, at.column), has_high = is_there(at, at.column + 16);
        low = held.low + scaled<kIsNormed>(w, at, low), high = held.high + scaled<kIsNormed>(w, at, high);
        if (has_low) ptx::store_global(to(at), low);
        if (has_high) ptx::store_global(to(at) + 16, high);
        normed.put(w, at.step_row(), n0 + at.column, low, held.low_weight, has_low);
        normed.put(w, at.step_row(), n0 + at.column + 16, high, held.high_weight, has_high);
    }

   private:
    __device__ __forceinline__ static bool is_there(const Place& at, int column) {
        return at.is_row && is_within<kColumns>(column);
    }
    __device__ __forceinline__ float* to(const Place& at) const { return out + at.step_row() * row_columns + at.column; }
};

__device__ __forceinline__ float swiglu(float gate, float up) { return divide_f32(gate, 1 + exp_f32(-gate)) * up; }

// Column groups of gate and up alternate. To pairs of neighbours.
template <int kColumns, bool kIsNormed, class Out>
struct SwiGlu : SimpleSink {
    static_assert(kColumns % 32 == 0);
    Out out;
    int64_t row_columns;

    __device__ __forceinline__ void put(const Worker& w, const Place& at, float gate, float up, Held) const {
        const float mixed = swiglu(scaled<kIsNormed>(w, at, gate), scaled<kIsNormed>(w, at, up));
        const float next = ptx::shuffle_xor(mixed, 1);
        if (at.is_row && at.column % 2 == 0)
            out.store_two(w, at.step_row() * row_columns + at.column / 32 * 16 + at.column % 16, mixed, next);
    }
};

// Of two logits the greater; of equals the lower column; a NaN before all else.
struct Best {
    float value;
    uint32_t column;

    __device__ __forceinline__ bool is_before(const Best& other) const {
        const bool is_nan = value != value, is_other_nan = other.value != other.value;
        if (is_nan || is_other_nan) return is_nan && (!is_other_nan || column < other.column);
        return value > other.value || (value == other.value && column < other.column);
    }
};

__device__ __forceinline__ bool is_finite(float x) { return x - x == 0; }

// Spans of statistics are 32 columns: a pair of column groups.
template <int kColumns, bool kIsNormed, int kVocab, int kSpan>
struct Logits : SimpleSink {
    static_assert(kSpan == 32);
    uint32_t n0;

    __device__ __forceinline__ void put(const Worker& w, const Place& at, float low, float high, Held) const {
        low = scaled<kIsNormed>(w, at, low);
        high = scaled<kIsNormed>(w, at, high);
        const uint32_t column = n0 + at.column;
        const bool has_low = column < kVocab, has_high = column + 16 < kVocab;
        if (at.is_row) {
            float* to = w.step.logits + at.step_row() * kVocab + column;
            if (has_low) ptx::store_global(to, low);
            if (has_high) ptx::store_global(to + 16, high);
        }
        constexpr float kNone = -__builtin_huge_valf();
        Best best{has_low ? low : kNone, column};
        if (const Best second{has_high ? high : kNone, column + 16}; has_high && second.is_before(best)) best = second;
#pragma unroll
        for (uint32_t mask = 8; mask; mask /= 2) {
            const Best other{ptx::shuffle_xor(best.value, mask), ptx::shuffle_xor(best.column, mask)};
            if (other.is_before(best)) best = other;
        }
        float sum = has_low ? exp_f32(low - best.value) : 0;
        sum += has_high ? exp_f32(high - best.value) : 0;
#pragma unroll
        for (uint32_t mask = 8; mask; mask /= 2) sum += ptx::shuffle_xor(sum, mask);
        if (at.is_row && w.lane % 16 == 0) {
            constexpr int kSpans = (kVocab + kSpan - 1) / kSpan;
            float* to = w.step.stats + (at.step_row() * kSpans + column / kSpan) * 3;
            ptx::store_global(to, best.value);
            ptx::store_global(to + 1, static_cast<float>(best.column));
            ptx::store_global(to + 2, is_finite(best.value) ? best.value + log_f32(sum) : best.value);
        }
    }
};

// Where a tile of whole heads keeps its sums until a warp takes a head: shared memory.
template <int kColumns_, int kDim_>
struct WholeHeads {
    static constexpr int kColumns = kColumns_, kDim = kDim_;
    static_assert(kColumns % kDim == 0);
    static constexpr int kTileHeads = kColumns / kDim;
    SharedAddress tile;  // [rows of a chunk][kColumns] floats

    __device__ __forceinline__ void store(const Place& at, int column, float sum) const {
        ptx::store_shared(tile + (at.row * kColumns + column) * 4, sum);
    }
    __device__ __forceinline__ float load(int, int row, int head, int column) const {
        return ptx::load_shared<float>(tile + ((row * kTileHeads + head) * kDim + column) * 4);
    }
    // After all sums of a chunk of rows.
    __device__ __forceinline__ void arrive(const Worker&, int) const { sync_consumers(); }
    // Whether its heads are to be finished here.
    __device__ __forceinline__ bool is_last(const Worker&) const { return true; }
};

// Where a tile of a part of a head does: in global memory, for whoever brings the last of the head's sums. That is
// any of its tiles' SMs, so no bit depends on which. All of an artifact's QKV ops share that memory: the next one's
// sums of a head come after this one's have been read, because its tiles come after all that read the head, and
// those after all tiles that made it up. The validator holds programs to that (races.py).
template <int kColumns_, int kDim_>
struct PartOfHead {
    static constexpr int kColumns = kColumns_, kDim = kDim_;
    static_assert(kDim % kColumns == 0);
    static constexpr int kTileHeads = 1;
    float* sums;  // [rows][row_columns] from the tile's first column on
    int64_t row_columns;
    uint32_t first;      // column of the head that the tile begins at
    uint32_t* arrivals;  // of the head, [chunks of rows] of columns that are there, 0 between ops

    __device__ __forceinline__ void store(const Place& at, int column, float sum) const {
        ptx::store_global(sums + at.step_row() * row_columns + column, sum);
    }
    __device__ __forceinline__ float load(int r0, int row, int, int column) const {
        return ptx::load_global(sums - first + (r0 + row) * row_columns + column);
    }
    __device__ __forceinline__ void arrive(const Worker& w, int r0) const {
        sync_consumers();
        if (w.thread == 0) {
            uint32_t* arrived = arrivals + r0 / kRowChunk;
            const bool is_last = ptx::add_acquire_release(arrived, kColumns) == kDim - kColumns;
            if (is_last) ptx::store_global(arrived, 0u);  // what it signals later releases that, too
            ptx::store_shared<uint32_t>(w.shared + kSelectionAt, is_last);
        }
    }
    __device__ __forceinline__ bool is_last(const Worker& w) const {
        sync_consumers();
        return ptx::load_shared<uint32_t>(w.shared + kSelectionAt);
    }
};

// Columns are Q heads, then K heads, then V heads: bias, norm of Q and K heads, rotation, scale of Q; Q goes to its
// buffer, K and V to the row's slot. Sums go where `HeadSums` keeps them; then a warp takes a head of a row.
template <class HeadSums, bool kIsNormed, int kHeads, int kKvHeads, bool kHasBias, bool kHasNorms>
struct RotateAppend : SimpleSink {
    HeadSums sums;
    uint32_t first_head;
    float* queries;  // [rows][kHeads * kDim]
    int layer;
    const float *bias, *query_norm, *key_norm;
    float eps;

    __device__ __forceinline__ void put(const Worker& w, const Place& at, float low, float high, Held) const {
        if (!at.is_row) return;
        if (is_within<kColumns>(at.column)) sums.store(at, at.column, scaled<kIsNormed>(w, at, low));
        if (is_within<kColumns>(at.column + 16)) sums.store(at, at.column + 16, scaled<kIsNormed>(w, at, high));
    }

    // Ends with a barrier where it finishes heads: pages may be used again, and what was written be read.
    __device__ __forceinline__ void end(const Worker& w, int r0, int count) const {
        const int num_items = count * kTileHeads;
        bool has_arrived = false;
#pragma unroll 1
        for (int item = w.warp; item < num_items || !has_arrived; item += kConsumerWarps) {
            // Warps without an item load another's: all arrive.
            const int row = (item < num_items ? item : 0) / kTileHeads, tile_head = item % kTileHeads;
            // Nothing needs these before the barrier, nor what follows from them before the arrival is known.
            const int position = ptx::load_settled(w.step.positions + r0 + row);
            const int slot = ptx::load_settled(w.step.slots + r0 + row);
            if (!has_arrived) sums.arrive(w, r0);
            const Head head(*this, w, r0 + row, first_head + tile_head, position, slot);
            if (!has_arrived && !sums.is_last(w)) return;
            has_arrived = true;
            if (item < num_items) finish(w, head, r0, row, tile_head);
        }
        sync_consumers();
    }

   private:
    static constexpr int kColumns = HeadSums::kColumns, kDim = HeadSums::kDim, kTileHeads = HeadSums::kTileHeads;
    static constexpr int kHalf = kDim / 2;
    static constexpr int kPairs = (kHalf + 31) / 32;  // of a lane

    // What a warp needs of a head of a row beside its sums, on its way while they are waited for.
    struct Head {
        bool is_query, is_value;
        float* query;
        uint16_t* appended;
        float2 turn[kPairs] = {};
        float biases[kPairs][2] = {};
        float norms[kPairs][2] = {};

        __device__ __forceinline__ Head(const RotateAppend& sink, const Worker& w, int row, uint32_t head, int position,
                                        int64_t slot)
            : is_query(head < kHeads), is_value(head >= kHeads + kKvHeads) {
#pragma unroll
            for (int p = 0; p < kPairs; p++) {
                const uint32_t i = p * 32 + w.lane;
                if (i >= kHalf) continue;
                if constexpr (kHasBias) {
                    const float* of_head = sink.bias + head * kDim + i;
                    biases[p][0] = ptx::load_constant(of_head), biases[p][1] = ptx::load_constant(of_head + kHalf);
                }
                if (is_value) continue;
                turn[p] = ptx::load_constant(w.step.turns + static_cast<int64_t>(position) * kHalf + i);
                if constexpr (kHasNorms) {
                    const float* of_head = (is_query ? sink.query_norm : sink.key_norm) + i;
                    norms[p][0] = ptx::load_constant(of_head), norms[p][1] = ptx::load_constant(of_head + kHalf);
                }
            }
            query = sink.queries + (static_cast<int64_t>(row) * kHeads + head) * kDim;
            appended = w.step.kv + (sink.layer * w.step.num_slots + slot) * (2 * kKvHeads * kDim) +
                       static_cast<int64_t>(static_cast<int>(head) - kHeads) * kDim;
        }
    };

    __device__ __forceinline__ void finish(const Worker& w, const Head& head, int r0, int row, int tile_head) const {
        float x[kPairs][2] = {};
        float squares = 0;
#pragma unroll
        for (int p = 0; p < kPairs; p++) {
            const uint32_t i = p * 32 + w.lane;
            if (i >= kHalf) continue;
#pragma unroll
            for (int half = 0; half < 2; half++) x[p][half] = sums.load(r0, row, tile_head, i + half * kHalf);
        }
#pragma unroll
        for (int p = 0; p < kPairs; p++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                if constexpr (kHasBias) x[p][half] += head.biases[p][half];
                squares = fma_f32(x[p][half], x[p][half], squares);
            }
        if constexpr (kHasNorms) {
#pragma unroll
            for (uint32_t mask = 16; mask; mask /= 2) squares += ptx::shuffle_xor(squares, mask);
            const float scale = ptx::reciprocal_sqrt(squares / kDim + eps);
            if (!head.is_value)
#pragma unroll
                for (int p = 0; p < kPairs; p++) {
                    x[p][0] = x[p][0] * scale * head.norms[p][0];
                    x[p][1] = x[p][1] * scale * head.norms[p][1];
                }
        }
#pragma unroll
        for (int p = 0; p < kPairs; p++) {
            const uint32_t i = p * 32 + w.lane;
            if (i >= kHalf) continue;
            float low = x[p][0], high = x[p][1];
            if (!head.is_value) {
                const float turned = low * head.turn[p].x - high * head.turn[p].y;
                high = high * head.turn[p].x + low * head.turn[p].y;
                low = turned;
            }
            if (head.is_query) {
                constexpr float kScale = inverse_sqrt(kDim);
                ptx::store_global(head.query + i, low * kScale);
                ptx::store_global(head.query + i + kHalf, high * kScale);
            } else {
                ptx::store_global(head.appended + i, ptx::float_to_half(low));
                ptx::store_global(head.appended + i + kHalf, ptx::float_to_half(high));
            }
        }
    }
};

// Before a wait: what the step's rows turn by is sent for, by the last warps first: the first one polls.
template <int kDim>
__device__ __forceinline__ void prefetch_turns(const Worker& w) {
    constexpr int kHalf = kDim / 2;
#pragma unroll 1
    for (int row = kConsumerWarps - 1 - w.warp; row < w.step.num_rows; row += kConsumerWarps) {
        const int64_t position = ptx::load_settled(w.step.positions + row);
        if (w.lane * 16 < kHalf) ptx::prefetch(w.step.turns + position * kHalf + w.lane * 16);
    }
}

}  // namespace headrace
