// The instructions of a program: each a function of a step and literals. Rows past the step's are not computed.
#pragma once

#include <array>
#include <type_traits>
#include <utility>

#include "cpu/attention.h"
#include "cpu/head.h"
#include "cpu/linear.h"
#include "cpu/norm.h"
#include "cpu/rope.h"

namespace headrace {

using mk::Format;

// A buffer of activations: [bucket, columns] float32 at a fixed place.
struct Floats2d {
    int64_t offset_bytes;
    int64_t columns;

    float* row(const Step& step, int64_t row) const {
        return reinterpret_cast<float*>(step.activations + offset_bytes) + row * columns;
    }
};

inline const float* vector_at(const Step& step, int64_t offset_bytes) {
    return reinterpret_cast<const float*>(step.weights + offset_bytes);
}

inline const uint8_t* packed_at(const Step& step, int64_t offset_bytes) {
    return reinterpret_cast<const uint8_t*>(step.weights + offset_bytes);
}

// A worker's copy of an op's input rows, as the op's weights want them.
template <Format F, int K>
struct PreparedInput {
    static constexpr size_t kBytes =
        mk::is_quantized(F) ? (kMaxRows / mk::kPanel) * (K / mk::kBlock) * sizeof(mk::Q8Block)
                            : size_t{kMaxRows} * K * sizeof(float);
    std::byte* scratch;

    mk::Input<F> rows() const {
        if constexpr (mk::is_quantized(F))
            return reinterpret_cast<const mk::Q8Block*>(scratch);
        else
            return {reinterpret_cast<const float*>(scratch), K};
    }

    // Row `row` becomes `x`, [K].
    void set(int row, const float* x) const {
        if constexpr (mk::is_quantized(F)) {
            constexpr int kBlocks = K / mk::kBlock;
            mk::Q8Block* panel = reinterpret_cast<mk::Q8Block*>(scratch) + row / mk::kPanel * kBlocks;
            for (int b = 0; b < kBlocks; b++) mk::quantize_block(x + b * mk::kBlock, panel[b], row % mk::kPanel);
        } else {
            std::memcpy(reinterpret_cast<float*>(scratch) + int64_t{row} * K, x, K * sizeof(float));
        }
    }
};

// Which rows an instruction computes: `Every` those of the step, `Wanted` those whose logits are wanted, the
// first `num_full` of them over all columns.
struct Every {
    static int count(const Step& step) { return step.num_rows; }
    static int num_full(const Step& step) { return step.num_rows; }
    static int index(const Step&, int row) { return row; }
};
struct Wanted {
    static int count(const Step& step) { return step.head.num_rows(); }
    static int num_full(const Step& step) { return step.head.num_full; }
    static int index(const Step& step, int row) { return step.head.rows[row].row; }
};

template <class Rows>
inline int rows_in(const Step& step, int r0, int r1) {
    return std::max(0, std::min(r1, Rows::count(step)) - r0);
}

template <class Rows>
inline int full_rows_in(const Step& step, int r0, int r1) {
    return std::max(0, std::min(r1, Rows::num_full(step)) - r0);
}

// Prologues. Columns [K0, K1) of rows [r0, r1) of the input, [K], become rows 0, 1, ... of `out`.

template <Format F, int K, int K0, int K1, class Rows>
__attribute__((noinline)) void prepare_normed(const Step& step, Floats2d x, int64_t norm, float eps, int r0, int r1,
                                              std::byte* out) {
    alignas(64) float normed[K];
    for (int i = 0; i < rows_in<Rows>(step, r0, r1); i++) {
        rms_norm<K>(x.row(step, Rows::index(step, r0 + i)), vector_at(step, norm), eps, normed);
        PreparedInput<F, K1 - K0>{out}.set(i, normed + K0);
    }
}

template <Format F, int K0, int K1>
__attribute__((noinline)) void prepare_plain(const Step& step, Floats2d x, int r0, int r1, std::byte* out) {
    for (int i = 0; i < rows_in<Every>(step, r0, r1); i++)
        PreparedInput<F, K1 - K0>{out}.set(i, x.row(step, r0 + i) + K0);
}

template <Format F, class Shape, int K0, int K1>
__attribute__((noinline)) void prepare_combined(const Step& step, Floats2d x, int r0, int r1, std::byte* out) {
    constexpr int K = Shape::kHeads * Shape::kDim;
    alignas(64) float combined[K];
    for (int i = 0; i < rows_in<Every>(step, r0, r1); i++) {
        combine<Shape>(x.row(step, r0 + i), step.rows[r0 + i].num_tokens(), combined);
        PreparedInput<F, K1 - K0>{out}.set(i, combined + K0);
    }
}

// Epilogues: what takes W finished columns from n on, of `num_rows` rows from r on.

struct Store {
    static constexpr int kColumns = mk::kGroup;
    const Step& step;
    Floats2d out;
    int r0;
    int64_t first_column = 0;

    template <class NumRows>
    void operator()(int n, int r, NumRows num_rows, const float* tile) const {
        for (int i = 0; i < num_rows(); i++)
            store(out.row(step, r0 + r + i) + first_column + n, load(tile + i * kColumns));
    }
};

struct AddToResidual {
    static constexpr int kColumns = mk::kGroup;
    const Step& step;
    Floats2d hidden;
    int r0;

    template <class NumRows>
    void operator()(int n, int r, NumRows num_rows, const float* tile) const {
        for (int i = 0; i < num_rows(); i++) {
            float* to = hidden.row(step, r0 + r + i) + n;
            store(to, load(to) + load(tile + i * kColumns));
        }
    }
};

// silu(gate) * up of groups of kGroupColumns gate columns, then as many up columns.
template <int kGroupColumns>
struct GateUp {
    static constexpr int kColumns = 2 * kGroupColumns;
    const Step& step;
    Floats2d out;
    int r0;

    template <class NumRows>
    void operator()(int n, int r, NumRows num_rows, const float* tile) const {
        for (int i = 0; i < num_rows(); i++)
            for (int c = 0; c < kGroupColumns; c += kLanes) {
                const Lanes gate = load(tile + i * kColumns + c), up = load(tile + i * kColumns + kGroupColumns + c);
                const Lanes silu = gate / (splat(1.0f) + exp(zero_lanes() - gate));
                store(out.row(step, r0 + r + i) + n / 2 + c, silu * up);
            }
    }
};

// Where a model has neither biases nor head norms their offsets are negative.
struct HeadWeights {
    int64_t bias, q_norm, k_norm;
    float eps;
};

// One head at a time: Q rotated, scaled, to the queries; K rotated and V as they are, to the row's slot.
template <class Shape>
struct RotateAppend {
    static constexpr int kColumns = Shape::kDim;
    const Step& step;
    Floats2d queries;
    int layer;
    HeadWeights weights;
    float scale;
    int r0;

    template <class NumRows>
    void operator()(int n, int r, NumRows num_rows, const float* tile) const {
        for (int i = 0; i < num_rows(); i++) {
            alignas(64) float head[Shape::kDim];
            std::memcpy(head, tile + i * kColumns, sizeof head);
            if (weights.bias >= 0) add_bias<Shape::kDim>(head, vector_at(step, weights.bias) + n);
            finish(n / Shape::kDim, r0 + r + i, head);
        }
    }

    void finish(int head_index, int row, float* head) const {
        constexpr int kQ = Shape::kHeads, kK = kQ + Shape::kKvHeads;
        const float* turn = step.turns + int64_t{row} * Shape::kDim;
        if (head_index < kQ) {
            norm(head, weights.q_norm);
            rotate<Shape::kDim>(head, turn, scale);
            std::memcpy(queries.row(step, row) + head_index * Shape::kDim, head, sizeof(float) * Shape::kDim);
        } else if (head_index < kK) {
            norm(head, weights.k_norm);
            rotate<Shape::kDim>(head, turn, 1.0f);
            append_key(head_index - kQ, step.rows[row].slot, head);
        } else {
            append_value(head_index - kK, step.rows[row].slot, head);
        }
    }

    void norm(float* head, int64_t weight) const {
        if (weight >= 0) rms_norm<Shape::kDim>(head, vector_at(step, weight), weights.eps, head);
    }

    using Kv = typename Shape::Kv;

    static int64_t block_offset(const Step& step, int layer, int kv_head, int32_t slot) {
        return HeadPool<Shape>::offset(step, layer, kv_head) + int64_t{slot / kTokensABlock} * Shape::kBlockElements;
    }

    void append_key(int kv_head, int32_t slot, const float* head) const {
        Kv narrowed[Shape::kDim];
        narrow(head, narrowed, Shape::kDim);
        Kv* to = reinterpret_cast<Kv*>(step.keys) + block_offset(step, layer, kv_head, slot) + slot % kTokensABlock;
        for (int d = 0; d < Shape::kDim; d++) to[d * kTokensABlock] = narrowed[d];
    }

    void append_value(int kv_head, int32_t slot, const float* head) const {
        Kv* to = reinterpret_cast<Kv*>(step.values) + block_offset(step, layer, kv_head, slot) +
                 slot % kTokensABlock * Shape::kDim;
        narrow(head, to, Shape::kDim);
    }
};

// Columns [n0, n1) of the prepared rows, over [K0, K1) of K, into the epilogue. `then`: the worker's next weights.
template <Format F, int K, int K0, int K1, class Rows, class Sink>
__attribute__((noinline)) void linear(const Step& step, int64_t weights, int n0, int n1, int r0, int r1,
                                      std::byte* prepared, int64_t then, const Sink& sink) {
    const int rows = full_rows_in<Rows>(step, r0, r1);
    const mk::Input<F> x = PreparedInput<F, K1 - K0>{prepared}.rows();
    const uint8_t* packed = packed_at(step, weights);
    mk::linear_tile<F, K, Sink::kColumns, K0, K1>(packed, n0, n1, x, rows, packed_at(step, then), sink);
    if constexpr (requires { sink.put_stats(n0, n1, rows); }) sink.put_stats(n0, n1, rows);
    if constexpr (std::is_same_v<Rows, Wanted>)
        if (rows_in<Rows>(step, r0, r1) > rows)
            restricted_linear<F, K, K0, K1>(step, packed, n0, n1, r0, r1, x, sink);
}

// Columns [n, n + kColumns) of row `row`: K-tiles `out_columns` apart, summed ascending.
template <int kColumns>
inline void sum_parts(const float* parts, int num_parts, int64_t out_columns, float* tile) {
    for (int c = 0; c < kColumns; c += kLanes) {
        Lanes total = load(parts + c);
        for (int part = 1; part < num_parts; part++) total = total + load(parts + c + part * out_columns);
        store(tile + c, total);
    }
}

// Sums the K-tiles of columns [n0, n1) ascending, into the epilogue. `out_columns` lie between two parts.
template <class Rows, class Sink>
__attribute__((noinline)) void reduce(const Step& step, Floats2d parts, int num_parts, int64_t out_columns, int n0,
                                      int n1, int r0, int r1, const Sink& sink) {
    const int rows = full_rows_in<Rows>(step, r0, r1);
    alignas(64) float tile[Sink::kColumns];
    for (int r = 0; r < rows; r++)
        for (int n = n0; n < n1; n += Sink::kColumns) {
            sum_parts<Sink::kColumns>(parts.row(step, r0 + r) + n, num_parts, out_columns, tile);
            sink(n, r, std::integral_constant<int, 1>{}, static_cast<const float*>(tile));
        }
    if constexpr (requires { sink.put_stats(n0, n1, rows); }) sink.put_stats(n0, n1, rows);
    if constexpr (std::is_same_v<Rows, Wanted>) {
        if (rows_in<Rows>(step, r0, r1) == rows) return;
        const HeadRows& head = step.head;
        const WantedRange wanted = wanted_in(head, n0, n1);
        for (int i = wanted.first; i < wanted.end; i++)
            for (int at = head.wish_starts[i]; at < head.wish_starts[i + 1]; at++) {
                const Wish& wish = head.wishes[at];
                if (wish.logit_row < r0 || wish.logit_row >= r1) continue;
                const int n = head.wanted_groups[i] * mk::kGroup;
                sum_parts<mk::kGroup>(parts.row(step, wish.logit_row) + n, num_parts, out_columns, tile);
                sink.put_allowed(wish, n, tile);
            }
    }
}

// Weight k of output row `row`, exactly as the format defines it.
template <Format F, int K>
inline float packed_weight(const uint8_t* group, int column, int k) {
    const auto half = [](const uint8_t* from) {
        Half halves[kLanes] = {};
        std::memcpy(halves, from, sizeof(Half));
        float wide[kLanes];
        store(wide, load(halves));
        return wide[0];
    };
    if constexpr (mk::is_quantized(F)) {
        const int block = k / mk::kBlock, within = k % mk::kBlock;
        const uint8_t* header = group + block * mk::block_header_bytes(F) + 2 * column;
        const uint8_t* body = group + mk::group_header_bytes(F, K) + int64_t{block} * mk::step_bytes(F) + 4 * column;
        const float d = half(header);
        if constexpr (F == Format::kQ8_0) {
            return d * static_cast<float>(body[within / 4 * 64 + within % 4] - 128);
        } else {
            const int byte = body[within % 16 / 4 * 64 + within % 4];
            const int nibble = within < 16 ? byte & 15 : byte >> 4;
            if constexpr (F == Format::kQ4_0) return d * static_cast<float>(nibble - 8);
            const float scaled = d * static_cast<float>(nibble);
            return scaled + half(header + 32);
        }
    } else {
        const uint8_t* from = group + int64_t{k} * mk::step_bytes(F) + mk::step_bytes(F) / mk::kGroup * column;
        if constexpr (F == Format::kF16) return half(from);
        uint32_t bits = 0;
        if constexpr (F == Format::kF32) {
            std::memcpy(&bits, from, 4);
        } else {
            uint16_t upper;
            std::memcpy(&upper, from, 2);
            bits = uint32_t{upper} << 16;
        }
        float value;
        std::memcpy(&value, &bits, 4);
        return value;
    }
}

template <Format F, int K>
__attribute__((noinline)) void embed(const Step& step, int64_t weights, int n0, int n1, int r0, int r1, Floats2d out) {
    for (int row = r0; row < r0 + rows_in<Every>(step, r0, r1); row++) {
        const int token = step.rows[row].token;
        const uint8_t* group = mk::group_of<F, K>(packed_at(step, weights), token);
        float* to = out.row(step, row);
        for (int k = n0; k < n1; k++) to[k] = packed_weight<F, K>(group, token % mk::kGroup, k);
    }
}

}  // namespace headrace
