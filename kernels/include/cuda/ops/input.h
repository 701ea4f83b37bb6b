// A linear op's input rows, as the tensor cores read them, in shared memory: rounded to 16 bits, or for quantized weights
// as numbers n of 15 bits, by scale group, times a power of two: 256 * high + low, each a signed byte.
//
// RMS norm is split: rows are weighted and rounded before they are multiplied, here or in steps of many rows by who wrote
// them, and their sums of products scaled afterwards by what is left in kScalesAt. So one pass over a row does, and products
// need not wait for the mean of its squares.
#pragma once

#include "cuda/tagged.h"

namespace headrace {

// Where one op's input lies in shared memory. Rows are padded by half of a 128-byte line: the eight rows and
// four lanes that read floats at once then meet all banks. For quantized weights every 64 elements of a row have their high
// bytes, then their low ones; eight elements of each of the two groups of 32 lie side by side, as a lane takes them. Behind
// the rows: for each scale group and row its scale, and where weights have an offset the sum of n.
template <Format F, int kRows>
struct InputLayout {
    static constexpr int kChunk = kRows < kRowChunk ? kRows : kRowChunk;
    static constexpr int kTileRows = is_quantized(F) ? 4 : 8;  // of a matrix instruction: two bytes are two columns
    static constexpr int kTiles = (kChunk + kTileRows - 1) / kTileRows;
    static constexpr int kScaleBytes = is_4bit(F) ? 8 : 4;
    static constexpr int kGroupBytes = kTiles * kTileRows * kScaleBytes;

    static __device__ __forceinline__ uint32_t row_bytes(uint32_t units) { return units * unit_k(F) * 2 + 64; }
    static __device__ __forceinline__ uint32_t scales_at(uint32_t units) { return kChunk * row_bytes(units); }
    static __device__ __forceinline__ uint32_t num_bytes(uint32_t units) {
        return scales_at(units) + (is_quantized(F) ? units * unit_k(F) / scale_group(F) * kGroupBytes : 0);
    }
};

constexpr float kMagic = 12582912;  // 1.5 * 2^23: floats next to it are 1 apart, and their last bits an integer
constexpr uint32_t kMagicBits = 0x4b400000;

// Of eight elements, by two words each: high bytes, low bytes; and what n is to be multiplied by, and their sum.
struct Quantized {
    uint32_t high[2], low[2];
    float scale;
    uint32_t sum;
};

// `largest`: bits of the greatest absolute value of the scale group; of what is no number or infinite there, too. Scales are
// powers of two by which |n| stays at most 2^14.
__device__ __forceinline__ Quantized quantized(const Eight& own, uint32_t largest) {
    const uint32_t exponent = largest >> 23 > 14 ? largest >> 23 : 14;
    const float inverse = bits_float((267 - exponent) << 23);
    uint32_t n[8], sum = 0;
#pragma unroll
    for (int e = 0; e < 8; e++) {
        n[e] = float_bits(fma_f32(own.x[e], inverse, kMagic));
        sum += n[e] - kMagicBits;
    }
    Quantized made;
    made.scale = exponent == 255 ? bits_float(0x7fc00000u) : bits_float((exponent - 13) << 23);
    made.sum = sum;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint32_t* of = n + 4 * i;
        made.low[i] = ptx::permute_bytes(ptx::permute_bytes(of[0], of[1], 0x0040u), ptx::permute_bytes(of[2], of[3], 0x0040u), 0x5410u);
        made.high[i] = ptx::permute_bytes(ptx::permute_bytes(of[0] + 128, of[1] + 128, 0x0051u),
                                          ptx::permute_bytes(of[2] + 128, of[3] + 128, 0x0051u), 0x5410u);
    }
    return made;
}

__device__ __forceinline__ uint32_t greater(uint32_t a, uint32_t b) { return a > b ? a : b; }

// The greatest over the lanes that share a scale group, and the sum.
template <Format F>
__device__ __forceinline__ uint32_t largest_of_group(const Eight& own) {
    uint32_t largest = 0;
#pragma unroll
    for (int e = 0; e < 8; e++) largest = greater(largest, float_bits(own.x[e]) & 0x7fffffffu);
#pragma unroll
    for (uint32_t mask = 1; mask < scale_group(F) / 8; mask *= 2) largest = greater(largest, ptx::shuffle_xor(largest, mask));
    return largest;
}

template <Format F>
__device__ __forceinline__ float sum_of_group(uint32_t sum) {
#pragma unroll
    for (uint32_t mask = 1; mask < scale_group(F) / 8; mask *= 2) sum += ptx::shuffle_xor(sum, mask);
    return bits_float(kMagicBits + sum) - kMagic;
}

// The input as it is.
template <class Rows>
struct Plain {
    static constexpr bool kIsNormed = false, kHasSquares = false;
    Rows rows;
};

// Rows to be normed that NormedTo has written, for products of floats.
template <int kIn, class Rows>
struct Weighted {
    static constexpr bool kIsNormed = false, kHasSquares = true;
    Rows rows;
    const float* squares;  // [rows][kIn / kSquaredColumns] sums
    float eps;
};

// RMS norm but for the scale. Made before the wait for the rows: weights are sent for then, those of the warp's first block
// of K to registers. Not where several tiles are to come: they would be kept there.
template <int kIn, bool kIsOfOneTile, class Rows>
struct Normed {
    static constexpr bool kIsNormed = true, kHasFirst = kIsOfOneTile, kHasSquares = false;
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

// What the sums of rows' products are scaled by, from sums of squares: a warp a row. They are sent for before rows are, to where
// sums of products will be, as registers are few: a lane uses only what it has itself asked for.
template <int kIn, int kRows>
struct RowScales {
    static constexpr int kAtOnce = (kRows + kConsumerWarps - 1) / kConsumerWarps;
    static constexpr uint32_t kSums = kIn / kSquaredColumns;

    static constexpr uint32_t sums_a_lane() {
        uint32_t found = 1;
        while (found * kLanes < kSums) found *= 2;
        return found;
    }
    static constexpr uint32_t kOfLane = sums_a_lane();
    static constexpr bool kIsCopied = kOfLane % 4 == 0 && kSums % 4 == 0 && kAtOnce * kConsumerWarps * kSums * 4 <= kSumsBytes;

    static __device__ __forceinline__ SharedAddress copied(const Worker& w, int row, uint32_t at) {
        return w.shared + kSumsAt + (row * kSums + at) * 4;
    }
    static __device__ __forceinline__ void send(const Worker& w, const float* squares, int r0, int count) {
        if constexpr (!kIsCopied) return;
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
            const int row = w.warp + i * kConsumerWarps;
#pragma unroll
            for (uint32_t j = 0; j < kOfLane; j += 4) {
                const uint32_t at = w.lane * kOfLane + j;
                if (row < count && at < kSums) ptx::copy_async_16(copied(w, row, at), squares + (r0 + row) * kSums + at);
            }
        }
        ptx::copy_async_commit();
    }
    // kGroups of copies may have been sent since.
    template <int kGroups>
    static __device__ __forceinline__ void store(const Worker& w, const float* squares, float eps, int r0, int count) {
        if constexpr (kIsCopied) ptx::copy_async_wait<kGroups>();
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
            const int row = w.warp + i * kConsumerWarps;
            if (row >= count) return;
            float sums[kOfLane];
#pragma unroll
            for (uint32_t j = 0; j < kOfLane; j++) {
                const uint32_t at = w.lane * kOfLane + j;
                if constexpr (kIsCopied)
                    sums[j] = at < kSums ? ptx::load_shared<float>(copied(w, row, at)) : 0;
                else
                    sums[j] = at < kSums ? ptx::load_global(squares + (r0 + row) * kSums + at) : 0;
            }
#pragma unroll
            for (uint32_t width = 1; width < kOfLane; width *= 2)
#pragma unroll
                for (uint32_t j = 0; j < kOfLane; j += 2 * width) sums[j] += sums[j + width];
            float total = sums[0];
#pragma unroll
            for (uint32_t mask = 1; mask < kLanes; mask *= 2) total += ptx::shuffle_xor(total, mask);
            if (w.lane == 0) ptx::store_shared(w.shared + kScalesAt + row * 4, ptx::reciprocal_sqrt_approx(total / kIn + eps));
        }
    }
};

// Rows of 16 bits, multiplied as they are, come without passing through registers, all at once.
template <Format F, int kRows, int kIn, uint32_t kUnits>
__device__ __forceinline__ void copy_input(const Worker& w, const PairRows<kIn>& rows, int r0, int count, uint32_t u0, SharedAddress to) {
    using Layout = InputLayout<F, kRows>;
    constexpr uint32_t kStaged = kUnits * unit_k(F), kAll = num_units(F, kIn) * unit_k(F);
#pragma unroll 1
    for (uint32_t in_row = w.warp * kStagedBlock + w.lane * 8; in_row < kStaged; in_row += kConsumerWarps * kStagedBlock) {
        const uint32_t k = u0 * unit_k(F) + in_row;
        if (k >= kAll) break;
#pragma unroll (is_quantized(F) ? 1 : 4)
        for (int row = 0; row < count; row++) {
            const SharedAddress at = to + row * Layout::row_bytes(kUnits) + in_row * 2;
            if (k < kIn)
                ptx::copy_async_16(at, rows.at(r0 + row, k));
            else
                ptx::store_shared(at, uint4{});
        }
    }
    ptx::copy_async_commit();
}

// Where copy_input has brought rows to, eight elements for the lane that asked for them.
template <class Layout, uint32_t kUnits, Format F>
struct CopiedRows {
    using Raw = uint4;
    SharedAddress at;  // of rows from r0 on and units from u0 on
    int r0;
    uint32_t u0;

    __device__ __forceinline__ Raw load(const Worker&, int row, uint32_t k) const {
        return ptx::load_shared<uint4>(at + (row - r0) * Layout::row_bytes(kUnits) + (k - u0 * unit_k(F)) * 2);
    }
    __device__ __forceinline__ void settle(const Worker&, Raw&, int, uint32_t) const {}
};

template <class Rows>
constexpr bool is_near = false;
template <class Layout, uint32_t kUnits, Format F>
constexpr bool is_near<CopiedRows<Layout, kUnits, F>> = true;
template <class Rows>
constexpr bool is_pairs = false;
template <int kIn>
constexpr bool is_pairs<PairRows<kIn>> = true;

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
    static_assert(!Source::kHasSquares || !is_quantized(F));
    static_assert(!Source::kIsNormed || kAllBlocks <= kLanes, "a norm's squares: a lane a block, see kSquaresAt");
    constexpr uint32_t kBlocksOfWarp = (kBlocks + kConsumerWarps - 1) / kConsumerWarps;
    // Loads that are on their way at once.
    constexpr int kMost = is_near<Rows> ? 2 : sizeof(typename Rows::Raw) > 16 ? 4 : 8;
    constexpr int kRowsAtOnce = Layout::kChunk < kMost ? Layout::kChunk : kMost;
    constexpr uint32_t kMostAtOnce = kMost / kRowsAtOnce;
    constexpr uint32_t kBlocksAtOnce = kBlocksOfWarp < kMostAtOnce ? kBlocksOfWarp : kMostAtOnce;
    const uint32_t first = u0 * unit_k(F);
    if constexpr (is_pairs<Rows> && !is_quantized(F)) {
        using ScalesOfRows = RowScales<kIn, Layout::kChunk>;
        if constexpr (Source::kHasSquares) ScalesOfRows::send(w, source.squares, r0, count);
        copy_input<F, kRows, kIn, kUnits>(w, source.rows, r0, count, u0, to);
        if constexpr (Source::kHasSquares) ScalesOfRows::template store<1>(w, source.squares, source.eps, r0, count);
        ptx::copy_async_wait<0>();
        sync_consumers();
        return;
    }
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
                    const uint32_t to_row = to + row * Layout::row_bytes(kUnits);
                    if constexpr (!Source::kIsNormed && !is_quantized(F)) {
                        if (is_staged) ptx::store_shared(to_row + in_row * 2, rounded<F>(x[b][r]));
                        continue;
                    }
                    Eight own;
                    if constexpr (Source::kIsNormed)
                        own = floats(x[b][r]);
                    else
                        own = floats(rounded<F>(x[b][r]));  // in 16 bits, whatever it is stored in
                    if constexpr (Source::kIsNormed) {
                        float squares = squares_of(own);
#pragma unroll
                        for (int e = 0; e < 8; e++) own.x[e] *= weight.x[e];
#pragma unroll
                        for (uint32_t mask = 1; mask < kLanes; mask *= 2) squares += ptx::shuffle_xor(squares, mask);
                        // The last part of K may have fewer blocks: those past them are other rows' places.
                        if (w.lane == 0 && k < kIn)
                            ptx::store_shared(w.shared + kSquaresAt + (row * kAllBlocks + k / kStagedBlock) * 4, squares);
                    }
                    if constexpr (is_quantized(F)) {
                        if constexpr (Source::kIsNormed) own = floats(rounded<F>(own));
                        const Quantized n = quantized(own, largest_of_group<F>(own));
                        const uint32_t at = to_row + in_row / 64 * 128 + in_row / 8 % 4 * 16 + in_row / 32 % 2 * 8;
                        if (is_staged) ptx::store_shared(at, uint2{n.high[0], n.high[1]});
                        if (is_staged) ptx::store_shared(at + 64, uint2{n.low[0], n.low[1]});
                        const uint32_t scales = to + Layout::scales_at(kUnits) + in_row / scale_group(F) * Layout::kGroupBytes +
                                                row * Layout::kScaleBytes;
                        const bool is_first = is_staged && k % scale_group(F) == 0;
                        if constexpr (is_4bit(F)) {
                            const float sum = sum_of_group<F>(n.sum);
                            if (is_first) ptx::store_shared(scales, float2{n.scale, sum});
                        } else {
                            if (is_first) ptx::store_shared(scales, n.scale);
                        }
                    } else {
                        if (is_staged) ptx::store_shared(to_row + in_row * 2, rounded<F>(own));
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

// The block of rows' units from u0 on, of those of kUnits that `input` has room for twice; all consumers. Returns where it
// is. Pairs of the next one are on their way while this one is multiplied.
template <Format F, int kRows, int kIn, uint32_t kUnits, class Source>
__device__ __forceinline__ SharedAddress stage_block(const Worker& w, const Source source, int r0, int count, uint32_t u0,
                                                     SharedAddress input) {
    using Layout = InputLayout<F, kRows>;
    const SharedAddress second = input + Layout::num_bytes(kUnits);
    // After a barrier: what this SM's ops before wrote is there; the block before has been read.
    if constexpr (!is_pairs<decltype(source.rows)>) {
        sync_consumers();
        stage_input<F, kRows, kIn, kUnits>(w, source, r0, count, u0, input);
        return input;
    } else {
        const bool has_next = u0 + kUnits < num_units(F, kIn);
        const bool is_odd = !is_quantized(F) && u0 / kUnits % 2;
        const SharedAddress here = is_odd ? second : input, other = is_odd ? input : second;
        const auto copy = [&](uint32_t from, SharedAddress to) {
            copy_input<F, kRows, kIn, kUnits>(w, source.rows, r0, count, from, to);
        };
        if (u0 == 0) {
            sync_consumers();
            copy(0, is_quantized(F) ? second : input);
        }
        if constexpr (is_quantized(F)) {
            ptx::copy_async_wait<0>();
            sync_consumers();
            const CopiedRows<Layout, kUnits, F> copied{second, r0, u0};
            stage_input<F, kRows, kIn, kUnits>(w, Plain<CopiedRows<Layout, kUnits, F>>{copied}, r0, count, u0, input);
            if (has_next) copy(u0 + kUnits, second);  // where each lane has read what it had asked for
        } else {
            if constexpr (Source::kHasSquares) {
                using ScalesOfRows = RowScales<kIn, Layout::kChunk>;
                if (u0 == 0) {
                    ScalesOfRows::send(w, source.squares, r0, count);
                    ScalesOfRows::template store<0>(w, source.squares, source.eps, r0, count);
                }
            }
            ptx::copy_async_wait<0>();
            sync_consumers();
            if (has_next) copy(u0 + kUnits, other);
        }
        return here;
    }
}

}  // namespace headrace
