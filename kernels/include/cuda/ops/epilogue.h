// What becomes of a finished tile: one sink an epilogue, for tiles just multiplied and for sums of K-tiles alike.
#pragma once

#include "cuda/barrier.h"
#include "cuda/packed.h"

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

// Rows of a float buffer; also of K-tiles' sums.
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

template <int kColumns, bool kIsNormed>
struct Residual : SimpleSink {
    struct Held {
        float low, high;
    };
    float* out;
    int64_t row_columns;

    __device__ __forceinline__ Held fetch(const Place& at) const {
        const float* from = to(at);
        return {at.is_row && is_within<kColumns>(at.column) ? ptx::load_global(from) : 0,
                at.is_row && is_within<kColumns>(at.column + 16) ? ptx::load_global(from + 16) : 0};
    }
    __device__ __forceinline__ void put(const Worker& w, const Place& at, float low, float high, const Held& held) const {
        if (!at.is_row) return;
        if (is_within<kColumns>(at.column)) ptx::store_global(to(at), held.low + scaled<kIsNormed>(w, at, low));
        if (is_within<kColumns>(at.column + 16)) ptx::store_global(to(at) + 16, held.high + scaled<kIsNormed>(w, at, high));
    }

   private:
    __device__ __forceinline__ float* to(const Place& at) const { return out + at.step_row() * row_columns + at.column; }
};

// Column groups of gate and up alternate.
template <int kColumns, bool kIsNormed>
struct SwiGlu : SimpleSink {
    static_assert(kColumns % 32 == 0);
    float* out;
    int64_t row_columns;

    __device__ __forceinline__ void put(const Worker& w, const Place& at, float gate, float up, Held) const {
        if (!at.is_row) return;
        gate = scaled<kIsNormed>(w, at, gate);
        up = scaled<kIsNormed>(w, at, up);
        const float mixed = divide_f32(gate, 1 + exp_f32(-gate)) * up;
        ptx::store_global(out + at.step_row() * row_columns + at.column / 32 * 16 + at.column % 16, mixed);
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

// Columns are Q heads, then K heads, then V heads: bias, norm of Q and K heads, rotation, scale of Q; Q goes to its
// buffer, K and V to the row's slot. The tile goes through shared memory, where a warp takes a head.
template <int kColumns, bool kIsNormed, int kHeads, int kKvHeads, int kDim, bool kHasBias, bool kHasNorms>
struct RotateAppend {
    static_assert(kColumns % kDim == 0);
    struct Held {};
    uint32_t n0;
    SharedAddress tile;  // [rows of a chunk][kColumns] floats
    float* queries;      // [rows][kHeads * kDim]
    int layer;
    const float *bias, *query_norm, *key_norm;
    float eps;

    __device__ __forceinline__ Held fetch(const Place&) const { return {}; }
    __device__ __forceinline__ void put(const Worker& w, const Place& at, float low, float high, Held) const {
        if (!at.is_row) return;
        const SharedAddress to = tile + (at.row * kColumns + at.column) * 4;
        if (is_within<kColumns>(at.column)) ptx::store_shared(to, scaled<kIsNormed>(w, at, low));
        if (is_within<kColumns>(at.column + 16)) ptx::store_shared(to + 64, scaled<kIsNormed>(w, at, high));
    }

    // Ends with a barrier, so that the pages may be used again.
    __device__ __forceinline__ void end(const Worker& w, int r0, int count) const {
        constexpr int kTileHeads = kColumns / kDim;
        sync_consumers();
        for (int item = w.warp; item < count * kTileHeads; item += kConsumerWarps)
            finish(w, r0 + item / kTileHeads, item % kTileHeads, tile + item * kDim * 4);
        sync_consumers();
    }

    // Before the wait for the sums.
    static __device__ __forceinline__ void prefetch(const Worker& w) {
        for (int row = w.warp; row < w.step.num_rows; row += kConsumerWarps) {
            const int position = ptx::load_settled(w.step.positions + row);
            if (w.lane * 16 < kDim / 2) ptx::prefetch(w.step.turns + static_cast<int64_t>(position) * (kDim / 2) + w.lane * 16);
        }
    }

   private:
    __device__ __forceinline__ void finish(const Worker& w, int row, int tile_head, SharedAddress from) const {
        constexpr int kHalf = kDim / 2;
        constexpr int kPairs = (kHalf + 31) / 32;  // of a lane
        const uint32_t head = n0 / kDim + tile_head;
        const bool is_query = head < kHeads, is_value = head >= kHeads + kKvHeads;
        // What does not depend on the sums first, all at once.
        const int position = ptx::load_settled(w.step.positions + row);
        const int64_t slot = ptx::load_settled(w.step.slots + row);
        float2 turn[kPairs] = {};
        float norm[kPairs][2] = {};
#pragma unroll
        for (int p = 0; p < kPairs; p++) {
            const uint32_t i = p * 32 + w.lane;
            if (i >= kHalf || is_value) continue;
            turn[p] = ptx::load_constant(w.step.turns + static_cast<int64_t>(position) * kHalf + i);
            if constexpr (kHasNorms) {
                const float* of_head = is_query ? query_norm : key_norm;
                norm[p][0] = ptx::load_constant(of_head + i), norm[p][1] = ptx::load_constant(of_head + i + kHalf);
            }
        }
        float x[kPairs][2] = {};
        float squares = 0;
#pragma unroll
        for (int p = 0; p < kPairs; p++) {
            const uint32_t i = p * 32 + w.lane;
            if (i >= kHalf) continue;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const uint32_t column = i + half * kHalf;
                float value = ptx::load_shared<float>(from + column * 4);
                if constexpr (kHasBias) value += ptx::load_constant(bias + head * kDim + column);
                x[p][half] = value;
                squares = fma_f32(value, value, squares);
            }
        }
        if constexpr (kHasNorms) {
#pragma unroll
            for (uint32_t mask = 16; mask; mask /= 2) squares += ptx::shuffle_xor(squares, mask);
            const float scale = ptx::reciprocal_sqrt(squares / kDim + eps);
            if (!is_value)
#pragma unroll
                for (int p = 0; p < kPairs; p++) {
                    const uint32_t i = p * 32 + w.lane;
                    if (i >= kHalf) continue;
                    x[p][0] = x[p][0] * scale * norm[p][0];
                    x[p][1] = x[p][1] * scale * norm[p][1];
                }
        }
        uint16_t* appended = w.step.kv + (layer * w.step.num_slots + slot) * (2 * kKvHeads * kDim) +
                             static_cast<int64_t>(static_cast<int>(head) - kHeads) * kDim;
        float* query = queries + (static_cast<int64_t>(row) * kHeads + head) * kDim;
#pragma unroll
        for (int p = 0; p < kPairs; p++) {
            const uint32_t i = p * 32 + w.lane;
            if (i >= kHalf) continue;
            float low = x[p][0], high = x[p][1];
            if (!is_value) {
                const float turned = low * turn[p].x - high * turn[p].y;
                high = high * turn[p].x + low * turn[p].y;
                low = turned;
            }
            if (is_query) {
                constexpr float kScale = inverse_sqrt(kDim);
                ptx::store_global(query + i, low * kScale);
                ptx::store_global(query + i + kHalf, high * kScale);
            } else {
                ptx::store_global(appended + i, ptx::float_to_half(low));
                ptx::store_global(appended + i + kHalf, ptx::float_to_half(high));
            }
        }
    }
};

// Sums of K-tiles, ascending, of columns [n0, n0 + kColumns) of an op.
template <int kRows, int kColumns, class Sink>
__device__ __forceinline__ void reduce_tile(const Worker w, const float* parts, int num_parts, int out_features, uint32_t n0,
                                         const Sink sink) {
    constexpr int kGroups = (kColumns + kColumnGroup - 1) / kColumnGroup;
    const int64_t row_columns = static_cast<int64_t>(num_parts) * out_features;
    const int row = w.thread / kColumnGroup, lane_column = w.thread % kColumnGroup;
    for (int r0 = 0; r0 < kRows && r0 < w.step.num_rows; r0 += kRowChunk) {
        const int count = w.step.num_rows - r0 < kRowChunk ? w.step.num_rows - r0 : kRowChunk;
#pragma unroll 1
        for (int pair = 0; pair < kGroups; pair += 2) {
            const Place at{r0, row, row < count, pair * kColumnGroup + lane_column};
            const typename Sink::Held held = sink.fetch(at);
            float total[2] = {0, 0};
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int own = at.column + half * kColumnGroup;
                if (row < count && own < kColumns) {
                    const float* from = parts + (r0 + row) * row_columns + n0 + own;
#pragma unroll 4
                    for (int part = 0; part < num_parts; part++)
                        total[half] += ptx::load_global(from + static_cast<int64_t>(part) * out_features);
                }
            }
            sink.put(w, at, total[0], total[1], held);
        }
        sink.end(w, r0, count);
    }
    report_progress(w);
}

}  // namespace headrace
