// A tile of a linear op: rows in shared memory, times weights in shared memory, by the tensor cores.
//
// Weights are the 16-row operand, so that one to eight rows cost one matrix instruction. Each consumer warp takes
// every eighth unit of K, by its number in the whole of K; sums of the warps are added in order. What a row's
// sum is thus depends on neither the tile nor the rows beside it.
#pragma once

#include "cuda/ops/epilogue.h"
#include "cuda/ops/input.h"

namespace headrace {

// Sums that a warp holds at once, by 16 columns and 8 rows: more spill. Which, does not change a row's bits.
template <int kTiles>
__device__ constexpr int most_groups() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
    return kTiles == 1 ? 8 : 2;
#else
    return 8 / kTiles;
#endif
}

template <Format F>
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (F == Format::kF16)
        ptx::mma_f16(c, a[0], a[1], a[2], a[3], b0, b1);
    else
        ptx::mma_bf16(c, a[0], a[1], a[2], a[3], b0, b1);
}

// 128 + q as bfloat16, exactly, for two nibbles of a word: the offset comes off with the sums of the input.
__device__ __forceinline__ void unpack_nibbles(uint32_t word, uint32_t (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = (word >> 4 * i & 0x000f000fu) | 0x43004300u;
}

// q of four bytes q + 128, two bfloat16 a register: 2^23 + byte is a float that holds the byte exactly, and so
// does the upper half of q as a float, which has no more than 8 bits.
__device__ __forceinline__ void unpack_bytes(uint32_t word, uint32_t& first, uint32_t& second) {
    uint32_t q[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        q[i] = float_bits(bits_float(0x4b000000u | (word >> 8 * i & 0xff)) - 8388736.0f);
    first = q[0] >> 16 | (q[1] & 0xffff0000u);
    second = q[2] >> 16 | (q[3] & 0xffff0000u);
}

// Adds units [u0, u1) of a warp's share to c[groups][tiles]: `weights` is the first group's first unit.
template <Format F, int kRows, int kGroups>
__device__ __forceinline__ void accumulate(const Worker& w, float (&c)[kGroups][InputLayout<F, kRows>::kTiles][4],
                                           SharedAddress weights, SharedAddress input, int count, uint32_t u0, uint32_t u1) {
    using Layout = InputLayout<F, kRows>;
    constexpr int kTiles = Layout::kTiles;
    constexpr int kSteps = unit_k(F) / 16;           // matrix instructions a unit
    constexpr int kScaled = scale_group(F) / 16;     // of which so many share scales
    const uint32_t g = w.lane / 4, t = w.lane % 4;
    const uint32_t units = u1 - u0, run = units * unit_bytes(F);
    uint32_t row_at[kTiles];
#pragma unroll
    for (int n = 0; n < kTiles; n++) {  // rows past the last read the last: their sums are not stored
        const uint32_t row = n * 8 + g < static_cast<uint32_t>(count) ? n * 8 + g : count - 1;
        row_at[n] = input + row * Layout::row_bytes(units) + t * 16;
    }
#pragma unroll 1
    for (uint32_t u = u0 + (w.warp - u0) % kConsumerWarps; u < u1; u += kConsumerWarps) {
        const uint32_t at = u - u0;
        uint4 x[kSteps / 2][kTiles];  // two steps each
#pragma unroll
        for (int j = 0; j < kSteps / 2; j++)
#pragma unroll
            for (int n = 0; n < kTiles; n++) x[j][n] = ptx::load_shared<uint4>(row_at[n] + at * unit_k(F) * 2 + j * 64);
#pragma unroll
        for (int group = 0; group < kGroups; group++) {
            const SharedAddress unit = weights + group * run + at * unit_bytes(F);
            uint32_t a[kSteps][4];
            if constexpr (is_4bit(F)) {
#pragma unroll
                for (int half = 0; half < kSteps / 4; half++) {
                    const uint4 words = ptx::load_shared<uint4>(unit + half * 512 + w.lane * 16);
                    unpack_nibbles(words.x, a[half * 4]);
                    unpack_nibbles(words.y, a[half * 4 + 1]);
                    unpack_nibbles(words.z, a[half * 4 + 2]);
                    unpack_nibbles(words.w, a[half * 4 + 3]);
                }
            } else if constexpr (is_8bit(F)) {
#pragma unroll
                for (int pair = 0; pair < kSteps / 2; pair++) {
                    const uint4 words = ptx::load_shared<uint4>(unit + pair * 512 + w.lane * 16);
                    unpack_bytes(words.x, a[pair * 2][0], a[pair * 2][1]);
                    unpack_bytes(words.y, a[pair * 2][2], a[pair * 2][3]);
                    unpack_bytes(words.z, a[pair * 2 + 1][0], a[pair * 2 + 1][1]);
                    unpack_bytes(words.w, a[pair * 2 + 1][2], a[pair * 2 + 1][3]);
                }
            } else {
#pragma unroll
                for (int s = 0; s < kSteps; s++) {
                    const uint4 words = ptx::load_shared<uint4>(unit + s * 512 + w.lane * 16);
                    a[s][0] = words.x, a[s][1] = words.y, a[s][2] = words.z, a[s][3] = words.w;
                }
            }
            if constexpr (is_float(F)) {
#pragma unroll
                for (int s = 0; s < kSteps; s++)
#pragma unroll
                    for (int n = 0; n < kTiles; n++) {
                        const uint4& pair = x[s / 2][n];
                        multiply<F>(c[group][n], a[s], s % 2 ? pair.z : pair.x, s % 2 ? pair.w : pair.y);
                    }
            } else {
#pragma unroll
                for (int j = 0; j < kSteps / kScaled; j++) {
                    const SharedAddress scales = unit + weight_bytes(F) + j * 16 * scale_bytes(F);
                    float d[2], m[2];
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const SharedAddress of_column = scales + (g + 8 * half) * scale_bytes(F);
                        if constexpr (has_minima(F)) {
                            const uint32_t both = ptx::load_shared<uint32_t>(of_column);
                            d[half] = ptx::half_to_float(both & 0xffff);
                            m[half] = fma_f32(-128.0f, d[half], ptx::half_to_float(both >> 16));
                        } else {
                            d[half] = ptx::half_to_float(ptx::load_shared<uint16_t>(of_column));
                            m[half] = -136.0f * d[half];  // Q4_0: of 128 + q, with q - 8 meant
                        }
                    }
#pragma unroll
                    for (int n = 0; n < kTiles; n++) {
                        float part[4] = {0, 0, 0, 0};
#pragma unroll
                        for (int s = j * kScaled; s < (j + 1) * kScaled; s++) {
                            const uint4& pair = x[s / 2][n];
                            multiply<F>(part, a[s], s % 2 ? pair.z : pair.x, s % 2 ? pair.w : pair.y);
                        }
                        float sums[2] = {0, 0};
                        if constexpr (is_4bit(F)) {
                            const uint32_t index = (at * (kSteps / kScaled) + j) * Layout::kSumsARow + n * 8 + 2 * t;
                            const uint32_t most = count - 1;  // as above: what is not there is read elsewhere
                            const uint32_t low = n * 8 + 2 * t < most ? 0 : n * 8 + 2 * t - most;
                            const uint32_t high = n * 8 + 2 * t + 1 < most ? 0 : n * 8 + 2 * t + 1 - most;
                            const SharedAddress from = input + Layout::sums_at(units);
                            sums[0] = ptx::load_shared<float>(from + (index - low) * 4);
                            sums[1] = ptx::load_shared<float>(from + (index + 1 - high) * 4);
                        }
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            float& sum = c[group][n][i];
                            sum = fma_f32(d[i / 2], part[i], sum);
                            if constexpr (is_4bit(F)) sum = fma_f32(m[i / 2], sums[i % 2], sum);
                        }
                    }
                }
            }
        }
    }
}

// Adds up the warps' sums, two column groups at a time, and hands them to the sink: of `row` of the chunk, `low`
// of `column` of the tile and `high` of the one 16 columns on. All lanes of a warp call it together.
template <int kTiles, int kGroups, class Sink>
__device__ __forceinline__ void add_warps(const Worker& w, const float (&c)[kGroups][kTiles][4], int r0, int count,
                                          int group0, const Sink& sink) {
    constexpr int kElements = kTiles * 8 * kColumnGroup;  // of a column group
    const uint32_t g = w.lane / 4, t = w.lane % 4;
    const SharedAddress sums = w.shared + kSumsAt;
#pragma unroll
    for (int pair = 0; pair < kGroups; pair += 2) {
#pragma unroll
        for (int half = 0; half < 2 && pair + half < kGroups; half++)
#pragma unroll
            for (int n = 0; n < kTiles; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const uint32_t row = n * 8 + 2 * t + i % 2, column = g + 8 * (i / 2);
                    ptx::store_shared(sums + ((half * kConsumerWarps + w.warp) * kElements + row * kColumnGroup + column) * 4,
                                      c[pair + half][n][i]);
                }
        sync_consumers();
        if (w.thread < static_cast<uint32_t>(kElements)) {
            const int row = w.thread / kColumnGroup, column = w.thread % kColumnGroup;
            float total[2] = {0, 0};
#pragma unroll
            for (int half = 0; half < 2 && pair + half < kGroups; half++)
                for (uint32_t i = 0; i < kConsumerWarps; i++)
                    total[half] += ptx::load_shared<float>(sums + ((half * kConsumerWarps + i) * kElements + w.thread) * 4);
            sink.put(w, {r0, row, row < count, (group0 + pair) * kColumnGroup + column}, total[0], total[1]);
        }
        sync_consumers();
    }
}

// One tile: kColumns columns from the first group in `weights`, units [u0, u1) of K. `is_new_input`: whether their
// input is yet to be brought to shared memory.
template <Format F, int kRows, int kIn, int kColumns, class Source, class Sink>
__device__ __forceinline__ void linear_tile(const Worker w, const Source source, const Sink sink, uint32_t u0, uint32_t u1,
                                         SharedAddress weights, SharedAddress input, bool is_new_input) {
    using Layout = InputLayout<F, kRows>;
    constexpr int kGroups = (kColumns + kColumnGroup - 1) / kColumnGroup;
    constexpr int kMostGroups = most_groups<Layout::kTiles>();
    constexpr int kPasses = (kGroups + kMostGroups - 1) / kMostGroups;
    const int rows = w.step.num_rows;
    const uint32_t run = (u1 - u0) * unit_bytes(F);
    bool has_landed = false;
    for (int r0 = 0; r0 < kRows && r0 < rows; r0 += kRowChunk) {
        const int count = rows - r0 < Layout::kChunk ? rows - r0 : Layout::kChunk;
        if (kRows > kRowChunk || is_new_input) {
            if (kRows > kRowChunk) sync_consumers();  // the chunk before has been read
            stage_input<F, kRows, kIn>(w, source, r0, count, u0, u1, input);
        }
        if (!has_landed) wait_landed(w);
        has_landed = true;
#pragma unroll 1
        for (int pass = 0; pass < kPasses - 1; pass++) {
            float c[kMostGroups][Layout::kTiles][4] = {};
            accumulate<F, kRows, kMostGroups>(w, c, weights + pass * kMostGroups * run, input, count, u0, u1);
            add_warps<Layout::kTiles, kMostGroups>(w, c, r0, count, pass * kMostGroups, sink);
        }
        constexpr int kLast = kGroups - (kPasses - 1) * kMostGroups;
        float c[kLast][Layout::kTiles][4] = {};
        accumulate<F, kRows, kLast>(w, c, weights + (kPasses - 1) * kMostGroups * run, input, count, u0, u1);
        add_warps<Layout::kTiles, kLast>(w, c, r0, count, (kPasses - 1) * kMostGroups, sink);
        sink.end(w, r0, count);
    }
    if (!has_landed) wait_landed(w);
    report_progress(w);
}

}  // namespace headrace
