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

constexpr uint32_t kStagedBlock = 256;  // elements that a warp stages at once

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

// RMS norm but for the scale. Made before the wait for the rows: weights are sent for then, those of the warp's first block
// of K to registers. Not where several tiles are to come: they would be kept there.
template <int kIn, bool kIsOfOneTile>
struct Normed {
    static constexpr bool kIsNormed = true, kHasFirst = kIsOfOneTile;
    const float* rows;
    const float* weight;
    float eps;
    Eight first;

    __device__ __forceinline__ Normed(const Worker& w, const float* of_rows, const float* of_weight, float epsilon)
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

// Rows [r0, r0 + count) over units [u0, u0 + kUnits) into `to`; all consumers. Ends with all of it visible to them, but for
// the scales, which are there after the barrier that follows the last of K. Elements past kIn are zeros.
//
// A warp takes blocks of 256 elements, and leaves the sum of squares of each: what a row's scale is depends on neither how
// much of K is staged at once nor the rows beside it.
template <Format F, int kRows, int kIn, uint32_t kUnits, class Source>
__device__ __forceinline__ void stage_input(const Worker& w, const Source source, int r0, int count, uint32_t u0, SharedAddress to) {
    using Layout = InputLayout<F, kRows>;
    constexpr uint32_t kBlocks = (kUnits * unit_k(F) + kStagedBlock - 1) / kStagedBlock;  // of a row
    constexpr uint32_t kAllBlocks = (kIn + kStagedBlock - 1) / kStagedBlock;
    static_assert(!Source::kIsNormed || kAllBlocks <= kLanes, "a norm's squares: a lane a block, see kSquaresAt");
    constexpr uint32_t kBlocksOfWarp = (kBlocks + kConsumerWarps - 1) / kConsumerWarps;
    // Loads that are on their way at once.
    constexpr int kRowsAtOnce = Layout::kChunk < 4 ? Layout::kChunk : 4;
    constexpr uint32_t kMostAtOnce = 4 / kRowsAtOnce;
    constexpr uint32_t kBlocksAtOnce = kBlocksOfWarp < kMostAtOnce ? kBlocksOfWarp : kMostAtOnce;
    const uint32_t first = u0 * unit_k(F);
#pragma unroll 1
    for (uint32_t block0 = w.warp; block0 < kBlocks; block0 += kBlocksAtOnce * kConsumerWarps) {
#pragma unroll 1
        for (int row0 = 0; row0 < count; row0 += kRowsAtOnce) {
            Eight x[kBlocksAtOnce][kRowsAtOnce];
#pragma unroll
            for (uint32_t b = 0; b < kBlocksAtOnce; b++)
#pragma unroll
                for (int r = 0; r < kRowsAtOnce; r++) {
                    const uint32_t block = block0 + b * kConsumerWarps, k = first + block * kStagedBlock + w.lane * 8;
                    x[b][r] = {};
                    if (block < kBlocks && k < kIn && row0 + r < count) x[b][r] = source.load(w, r0 + row0 + r, k);
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
                    Eight& own = x[b][r];
                    if constexpr (Source::kIsNormed) {
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
                    }
                    const uint4 rounded = {pack_pair<F>(own.x[0], own.x[1]), pack_pair<F>(own.x[2], own.x[3]),
                                           pack_pair<F>(own.x[4], own.x[5]), pack_pair<F>(own.x[6], own.x[7])};
                    if (is_staged) ptx::store_shared(to + row * Layout::row_bytes(kUnits) + in_row * 2, rounded);
                    if constexpr (is_4bit(F)) {
                        float sum = (sum_of_pair<F>(rounded.x) + sum_of_pair<F>(rounded.y)) +
                                    (sum_of_pair<F>(rounded.z) + sum_of_pair<F>(rounded.w));
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
