// A linear op's input rows, as the tensor cores read them, in shared memory: in 16 bits, as who wrote them has rounded them.
//
// RMS norm is split: rows are weighted before they are rounded, by who writes them, and their sums of products scaled
// afterwards by what is left in kScalesAt. So products need not wait for the mean of a row's squares.
#pragma once

#include "cuda/rows.h"

namespace headrace {

// Where one op's input lies in shared memory. Rows are padded by half of a 128-byte line: the eight rows and four lanes that
// read at once then meet all banks.
template <int kRows>
struct InputLayout {
    static constexpr int kChunk = kRows < kRowChunk ? kRows : kRowChunk;
    static constexpr int kTiles = (kChunk + 7) / 8;  // of eight rows, a matrix instruction's

    static __device__ __forceinline__ uint32_t row_bytes(uint32_t elements) { return elements * 2 + 64; }
    static __device__ __forceinline__ uint32_t num_bytes(uint32_t elements) { return kChunk * row_bytes(elements); }
};

// The input as it is.
template <int kIn>
struct Plain {
    static constexpr bool kHasSquares = false;
    PairRows<kIn> rows;
};

// Rows to be normed, as NormedTo has written them.
template <int kIn>
struct Weighted {
    static constexpr bool kHasSquares = true;
    PairRows<kIn> rows;
    const float* squares;  // [rows][kIn / kSquaredColumns] sums
    float eps;
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

// Elements of rows [r0, r0 + count) from k0 on, kStaged a row or as many as there are, asked for at once: they do not pass through
// registers. Those from kIn on to kPadded, where the last unit ends, are zeros.
template <int kRows, int kIn, uint32_t kPadded, uint32_t kStaged>
__device__ __forceinline__ void copy_input(const Worker& w, const PairRows<kIn>& rows, int r0, int count, uint32_t k0,
                                           SharedAddress to) {
#pragma unroll 1
    for (uint32_t in_row = w.thread * 8; in_row < kStaged; in_row += kConsumers * 8) {
        const uint32_t k = k0 + in_row;
        if (k >= kPadded) break;
#pragma unroll 4
        for (int row = 0; row < count; row++) {
            const SharedAddress at = to + row * InputLayout<kRows>::row_bytes(kStaged) + in_row * 2;
            if (k < kIn)
                ptx::copy_async_16(at, rows.at(r0 + row, k));
            else
                ptx::store_shared(at, uint4{});
        }
    }
    ptx::copy_async_commit();
}

// All of rows [r0, r0 + count) into `to`; all consumers. Ends with it visible to them, but for the scales, which are there
// after the next barrier.
template <int kRows, int kIn, uint32_t kPadded, class Source>
__device__ __forceinline__ void stage_input(const Worker& w, const Source source, int r0, int count, SharedAddress to) {
    using ScalesOfRows = RowScales<kIn, InputLayout<kRows>::kChunk>;
    if constexpr (Source::kHasSquares) ScalesOfRows::send(w, source.squares, r0, count);
    copy_input<kRows, kIn, kPadded, kPadded>(w, source.rows, r0, count, 0, to);
    if constexpr (Source::kHasSquares) ScalesOfRows::template store<1>(w, source.squares, source.eps, r0, count);
    ptx::copy_async_wait<0>();
    sync_consumers();
}

// The block of kStaged elements of rows from k0 on; `input` has room for two. All consumers. Returns where it is. The next one
// is on its way while this one is multiplied.
template <int kRows, int kIn, uint32_t kPadded, uint32_t kStaged, class Source>
__device__ __forceinline__ SharedAddress stage_block(const Worker& w, const Source source, int r0, int count, uint32_t k0,
                                                     SharedAddress input) {
    const SharedAddress second = input + InputLayout<kRows>::num_bytes(kStaged);
    const bool is_odd = k0 / kStaged % 2;
    const SharedAddress here = is_odd ? second : input, other = is_odd ? input : second;
    if (k0 == 0) {
        sync_consumers();  // what this SM's ops before wrote is there; the input before has been read
        copy_input<kRows, kIn, kPadded, kStaged>(w, source.rows, r0, count, 0, input);
        if constexpr (Source::kHasSquares) {
            using ScalesOfRows = RowScales<kIn, InputLayout<kRows>::kChunk>;
            ScalesOfRows::send(w, source.squares, r0, count);
            ScalesOfRows::template store<0>(w, source.squares, source.eps, r0, count);
        }
    }
    ptx::copy_async_wait<0>();
    sync_consumers();  // this block is there, and the one before has been read
    if (k0 + kStaged < kPadded) copy_input<kRows, kIn, kPadded, kStaged>(w, source.rows, r0, count, k0 + kStaged, other);
    return here;
}

}  // namespace headrace
