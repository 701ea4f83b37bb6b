// A linear op's input rows, as the tensor cores read them: rounded to 16 bits, in shared memory.
//
// RMS norm is split: rows are weighted and rounded here, their sums of products scaled afterwards by what is
// left in kScalesAt. So one pass over a row does, and products need not wait for the mean of its squares.
#pragma once

#include "cuda/barrier.h"
#include "cuda/packed.h"

namespace headrace {

// Where one op's input lies in shared memory. Rows are padded by half of a 128-byte line: the eight rows and
// four lanes that read at once then meet all banks. Behind the rows: sums of each scale group, for formats
// whose values have an offset, [groups][row tiles * 8] floats.
template <Format F, int kRows>
struct InputLayout {
    static constexpr int kChunk = kRows < kRowChunk ? kRows : kRowChunk;
    static constexpr int kTiles = (kChunk + 7) / 8;  // of 8 rows
    static constexpr int kSumsARow = kTiles * 8;

    static __device__ __forceinline__ uint32_t row_bytes(uint32_t units) { return units * unit_k(F) * 2 + 64; }
    static __device__ __forceinline__ uint32_t sums_at(uint32_t units) { return kChunk * row_bytes(units); }
};

struct Eight {
    float x[8];
};

__device__ __forceinline__ Eight load_eight(const float* from) {
    const float4 low = ptx::load_global(reinterpret_cast<const float4*>(from));
    const float4 high = ptx::load_global(reinterpret_cast<const float4*>(from) + 1);
    return {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
}

// The input as it is.
template <int kIn>
struct Plain {
    static constexpr bool kIsNormed = false;
    const float* rows;  // [rows][kIn]

    __device__ __forceinline__ Eight load(const Worker&, int row, uint32_t k) const {
        return load_eight(rows + static_cast<int64_t>(row) * kIn + k);
    }
};

// Before a wait: a vector that will be read after it is sent for.
template <int kIn>
__device__ __forceinline__ void prefetch_vector(const Worker& w, const float* vector) {
    for (uint32_t k = w.thread * 32; k < kIn; k += kConsumers * 32) ptx::prefetch(vector + k);
}

// RMS norm but for the scale.
template <int kIn>
struct Normed {
    static constexpr bool kIsNormed = true;
    const float* rows;
    const float* weight;
    float eps;

    __device__ __forceinline__ Eight load(const Worker&, int row, uint32_t k) const {
        return load_eight(rows + static_cast<int64_t>(row) * kIn + k);
    }
    __device__ __forceinline__ Eight weights(uint32_t k) const {
        const float4 low = ptx::load_constant(reinterpret_cast<const float4*>(weight + k));
        const float4 high = ptx::load_constant(reinterpret_cast<const float4*>(weight + k) + 1);
        return {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
    }
};

template <Format F>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
    return F == Format::kF16 ? ptx::pack_f16x2(low, high) : ptx::pack_bf16x2(low, high);
}

template <Format F>
__device__ __forceinline__ float sum_of_pair(uint32_t pair) {
    const uint16_t low = pair & 0xffff, high = pair >> 16;
    return F == Format::kF16 ? ptx::half_to_float(low) + ptx::half_to_float(high)
                             : ptx::bf16_to_float(low) + ptx::bf16_to_float(high);
}

// Rows [r0, r0 + count) over units [u0, u1) into `to`; all consumers. Ends with all of it visible to them, but for
// the scales, which are after the next barrier. Elements past kIn are zeros.
template <Format F, int kRows, int kIn, class Source>
__device__ __forceinline__ void stage_input(const Worker& w, const Source source, int r0, int count, uint32_t u0, uint32_t u1,
                                            SharedAddress to) {
    using Layout = InputLayout<F, kRows>;
    constexpr uint32_t kPadded = num_units(F, kIn) * unit_k(F);
    constexpr uint32_t kStep = kConsumers * 8;
    constexpr int kTimes = (kPadded + kStep - 1) / kStep;
    // Loads that are on their way at once: of some rows, or of a row's parts.
    constexpr int kRowsAtOnce = Layout::kChunk < 4 ? Layout::kChunk : 4;
    constexpr int kTimesAtOnce = kRowsAtOnce >= 4 ? 1 : kTimes < 4 / kRowsAtOnce ? kTimes : 4 / kRowsAtOnce;
    const uint32_t first = u0 * unit_k(F), end = u1 * unit_k(F), units = u1 - u0;
    const uint32_t from = Source::kIsNormed ? 0 : first, until = Source::kIsNormed ? kPadded : end;
#pragma unroll 1
    for (int row0 = 0; row0 < count; row0 += kRowsAtOnce) {
        float squares[kRowsAtOnce] = {};
        // Every lane goes round as often: sums of a scale group are shuffled.
#pragma unroll 1
        for (uint32_t base = from; base < until; base += kTimesAtOnce * kStep) {
            Eight x[kTimesAtOnce][kRowsAtOnce];
#pragma unroll
            for (int i = 0; i < kTimesAtOnce; i++) {
                const uint32_t k = base + i * kStep + w.thread * 8;
#pragma unroll
                for (int r = 0; r < kRowsAtOnce; r++) {
                    x[i][r] = {};
                    if (k < until && k < kIn && row0 + r < count) x[i][r] = source.load(w, r0 + row0 + r, k);
                }
            }
#pragma unroll
            for (int i = 0; i < kTimesAtOnce; i++) {
                const uint32_t k = base + i * kStep + w.thread * 8;
                const bool is_staged = k >= first && k < end;
                Eight weight{};
                if constexpr (Source::kIsNormed)
                    if (k < kIn) weight = source.weights(k);
#pragma unroll
                for (int r = 0; r < kRowsAtOnce; r++) {
                    const int row = row0 + r;
                    if (row >= count) break;
                    Eight& own = x[i][r];
                    if constexpr (Source::kIsNormed)
#pragma unroll
                        for (int e = 0; e < 8; e++) {
                            squares[r] = fma_f32(own.x[e], own.x[e], squares[r]);
                            own.x[e] *= weight.x[e];
                        }
                    const uint4 rounded = {pack_pair<F>(own.x[0], own.x[1]), pack_pair<F>(own.x[2], own.x[3]),
                                           pack_pair<F>(own.x[4], own.x[5]), pack_pair<F>(own.x[6], own.x[7])};
                    if (is_staged) ptx::store_shared(to + row * Layout::row_bytes(units) + (k - first) * 2, rounded);
                    if constexpr (is_4bit(F)) {
                        float sum = (sum_of_pair<F>(rounded.x) + sum_of_pair<F>(rounded.y)) +
                                    (sum_of_pair<F>(rounded.z) + sum_of_pair<F>(rounded.w));
#pragma unroll
                        for (uint32_t mask = 1; mask < scale_group(F) / 8; mask *= 2) sum += ptx::shuffle_xor(sum, mask);
                        if (is_staged && k % scale_group(F) == 0)
                            ptx::store_shared(
                                to + Layout::sums_at(units) + ((k - first) / scale_group(F) * Layout::kSumsARow + row) * 4, sum);
                    }
                }
            }
        }
        if constexpr (Source::kIsNormed)
#pragma unroll
            for (int r = 0; r < kRowsAtOnce; r++) {
                if (row0 + r >= count) break;
#pragma unroll
                for (uint32_t mask = kLanes / 2; mask; mask /= 2) squares[r] += ptx::shuffle_xor(squares[r], mask);
                if (w.lane == 0)
                    ptx::store_shared(w.shared + kSquaresAt + ((row0 + r) * kConsumerWarps + w.warp) * 4, squares[r]);
            }
    }
    sync_consumers();
    if constexpr (Source::kIsNormed) {
        if (w.thread < static_cast<uint32_t>(count)) {
            float total = 0;
#pragma unroll
            for (uint32_t i = 0; i < kConsumerWarps; i++)
                total += ptx::load_shared<float>(w.shared + kSquaresAt + (w.thread * kConsumerWarps + i) * 4);
            const float scale = ptx::reciprocal_sqrt(total / kIn + source.eps);
            ptx::store_shared(w.shared + kScalesAt + w.thread * 4, scale);
        }
    }
}

}  // namespace headrace
