// A linear op's input rows, as the tensor cores read them: rounded to 16 bits, in shared memory.
//
// RMS norm is split: rows are weighted and rounded here, their sums of products scaled afterwards by what is
// left in kScalesAt. So one pass over a row does, and products need not wait for the mean of its squares.
#pragma once

#include "cuda/tagged.h"

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

// The input as it is.
template <class Rows>
struct Plain {
    static constexpr bool kIsNormed = false;
    Rows rows;
};

// RMS norm but for the scale. Made before the wait for the rows: weights are sent for then, those of the warp's first block
// of K to registers. Not where several tiles are to come: they would be kept there.
template <int kIn, bool kIsOfOneTile, class Rows>
struct Normed {
    static constexpr bool kIsNormed = true, kHasFirst = kIsOfOneTile;
    Rows rows;
    const float* weight;
    float eps;
    Eight first;

    __device__ __forceinline__ Normed(const Worker& w, const Rows& of_rows, const float* of_weight, float epsilon)
        : rows(of_rows), weight(of_weight), eps(epsilon), first{} {
        const uint32_t k = w.warp * kStagedBlock + w.lane * 8;
        if (kHasFirst && k < kIn) {
            const float4* from = reinterpret_cast<const float4*>(weight + k);
            const float4 low = ptx::load_constant_early(from), high = ptx::load_constant_early(from + 1);
            first = {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
        }
        for (uint32_t line = (kHasFirst ? kConsumerWarps * kStagedBlock : 0) + w.thread * 32; line < kIn; line += kConsumers * 32)
            ptx::prefetch(weight + line);
    }

    __device__ __forceinline__ Eight weights(uint32_t k) const {
        const float4 low = ptx::load_constant(reinterpret_cast<const float4*>(weight + k));
        const float4 high = ptx::load_constant(reinterpret_cast<const float4*>(weight + k) + 1);
        return {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
    }
};

template <Format F>
__device__ __forceinline__ float sum_of_pair(uint32_t pair) {
    const uint16_t low = pair & 0xffff, high = pair >> 16;
    return F == Format::kF16 ? ptx::half_to_float(low) + ptx::half_to_float(high)
                             : ptx::bf16_to_float(low) + ptx::bf16_to_float(high);
}

// Rows [r0, r0 + count) over units [u0, u0 + kUnits) into `to`; all consumers. Ends with all of it visible to them, but for
// the scales, which are there after the barrier that follows the last of K. Elements past kIn are zeros.
//
// A warp takes blocks of 256 elements, and leaves the sum of squares of each: what a row's scale is depends on neither how
// much of K is staged at once nor the rows beside it.
template <Format F, int kRows, int kIn, uint32_t kUnits, class Source>
__device__ __forceinline__ void stage_input(const Worker& w, const Source source, int r0, int count, uint32_t u0, SharedAddress to) {
    using Layout = InputLayout<F, kRows>;
    using Rows = decltype(source.rows);
    constexpr uint32_t kBlocks = (kUnits * unit_k(F) + kStagedBlock - 1) / kStagedBlock;  // of a row
    constexpr uint32_t kAllBlocks = (kIn + kStagedBlock - 1) / kStagedBlock;
    static_assert(!Source::kIsNormed || kAllBlocks <= kLanes, "a norm's squares: a lane a block, see kSquaresAt");
    constexpr uint32_t kBlocksOfWarp = (kBlocks + kConsumerWarps - 1) / kConsumerWarps;
    // Loads that are on their way at once.
    constexpr int kMost = sizeof(typename Rows::Raw) > 16 ? 4 : 8;
    constexpr int kRowsAtOnce = Layout::kChunk < kMost ? Layout::kChunk : kMost;
    constexpr uint32_t kMostAtOnce = kMost / kRowsAtOnce;
    constexpr uint32_t kBlocksAtOnce = kBlocksOfWarp < kMostAtOnce ? kBlocksOfWarp : kMostAtOnce;
    const uint32_t first = u0 * unit_k(F);
#pragma unroll 1
    for (uint32_t block0 = w.warp; block0 < kBlocks; block0 += kBlocksAtOnce * kConsumerWarps) {
#pragma unroll 1
        for (int row0 = 0; row0 < count; row0 += kRowsAtOnce) {
            const auto is_in = [&](uint32_t block, uint32_t k, int row) { return block < kBlocks && k < kIn && row < count; };
            typename Rows::Raw x[kBlocksAtOnce][kRowsAtOnce];
#pragma unroll
            for (uint32_t b = 0; b < kBlocksAtOnce; b++)
#pragma unroll
                for (int r = 0; r < kRowsAtOnce; r++) {
                    const uint32_t block = block0 + b * kConsumerWarps, k = first + block * kStagedBlock + w.lane * 8;
                    x[b][r] = {};
                    if (is_in(block, k, row0 + r)) x[b][r] = source.rows.load(w, r0 + row0 + r, k);
                }
#pragma unroll
            for (uint32_t b = 0; b < kBlocksAtOnce; b++) {
                const uint32_t block = block0 + b * kConsumerWarps, in_row = block * kStagedBlock + w.lane * 8, k = first + in_row;
                if (block >= kBlocks) break;
                const bool is_staged = in_row < kUnits * unit_k(F) && k < num_units(F, kIn) * unit_k(F);
                Eight weight{};
                if constexpr (Source::kIsNormed) {
                    if (Source::kHasFirst && k < kConsumerWarps * kStagedBlock && kUnits >= num_units(F, kIn))
                        weight = source.first;
                    else if (k < kIn)
                        weight = source.weights(k);
                }
#pragma unroll
                for (int r = 0; r < kRowsAtOnce; r++) {
                    const int row = row0 + r;
                    if (row >= count) break;
                    if (is_in(block, k, row)) source.rows.settle(w, x[b][r], r0 + row, k);
                    uint4 packed;
                    if constexpr (Source::kIsNormed) {
                        Eight own = Rows::floats(x[b][r]);
                        float squares = 0;
#pragma unroll
                        for (int e = 0; e < 8; e++) {
                            squares = fma_f32(own.x[e], own.x[e], squares);
                            own.x[e] *= weight.x[e];
                        }
#pragma unroll
                        for (uint32_t mask = kLanes / 2; mask; mask /= 2) squares += ptx::shuffle_xor(squares, mask);
                        // The last part of K may have fewer blocks: those past them are other rows' places.
                        if (w.lane == 0 && k < kIn)
                            ptx::store_shared(w.shared + kSquaresAt + (row * kAllBlocks + k / kStagedBlock) * 4, squares);
                        packed = rounded<F>(own);
                    } else {
                        packed = rounded<F>(x[b][r]);
                    }
                    if (is_staged) ptx::store_shared(to + row * Layout::row_bytes(kUnits) + in_row * 2, packed);
                    if constexpr (is_4bit(F)) {
                        float sum = (sum_of_pair<F>(packed.x) + sum_of_pair<F>(packed.y)) +
                                    (sum_of_pair<F>(packed.z) + sum_of_pair<F>(packed.w));
#pragma unroll
                        for (uint32_t mask = 1; mask < scale_group(F) / 8; mask *= 2) sum += ptx::shuffle_xor(sum, mask);
                        if (is_staged && k % scale_group(F) == 0)
                            ptx::store_shared(
                                to + Layout::sums_at(kUnits) + (in_row / scale_group(F) * Layout::kSumsARow + row) * 4, sum);
                    }
                }
            }
        }
    }
    sync_consumers();
    if constexpr (Source::kIsNormed) {
        if (u0 + kUnits < num_units(F, kIn)) return;
        // A warp a row: all wait for the first row's, so that it takes as few instructions as may be.
        for (int row = w.warp; row < count; row += kConsumerWarps) {
            float total = 0;
            if (w.lane < kAllBlocks) total = ptx::load_shared<float>(w.shared + kSquaresAt + (row * kAllBlocks + w.lane) * 4);
#pragma unroll
            for (uint32_t mask = 1; mask < kAllBlocks; mask *= 2) total += ptx::shuffle_xor(total, mask);
            if (w.lane == 0) ptx::store_shared(w.shared + kScalesAt + row * 4, ptx::reciprocal_sqrt_approx(total / kIn + source.eps));
        }
    }
}

}  // namespace headrace
