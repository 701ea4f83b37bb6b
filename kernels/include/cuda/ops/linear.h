// A tile of a linear op: rows in shared memory, times weights in shared memory, by the tensor cores.
//
// Weights are the 16-row operand, so that one to eight rows cost one matrix instruction. Quantized ones are
// unpacked to bfloat16, exactly; a scale group's products are summed, and then scaled. Each consumer warp takes every eighth
// unit of K, by its number in the whole of K; sums of the warps are added in order. What a row's sum is thus depends on
// neither the tile nor the rows beside it.
#pragma once

#include "cuda/ops/epilogue.h"
#include "cuda/ops/input.h"

namespace headrace {

// Column groups of a tile that comes in one load whose sums a warp holds at once: the more, the more products are under way
// beside one another, as far as registers go. Tiles of several loads take all in one pass (most_columns of k_blocks.py).
constexpr int most_groups(Format f, int rows) { return is_float(f) ? 4 : rows <= 8 ? 6 : 2; }

// Where the warps' sums of `kGroups` column groups meet: so many at once as there is room for. Sinks take pairs of
// groups, a thread a row and column of each.
template <int kRows, int kGroups>
struct Sums {
    static constexpr int kRowsOfChunk = kRows < kRowChunk ? kRows : kRowChunk;
    static constexpr int kElements = kRowsOfChunk * kColumnGroup;  // of a column group
    static constexpr uint32_t kGroupBytes = kConsumerWarps * kElements * 4;
    static constexpr int kRoom = kSumsBytes / kGroupBytes;
    static constexpr int kGroupsAtOnce = kGroups <= kRoom ? kGroups : kRoom;
    static constexpr int kPairs = (kGroupsAtOnce + 1) / 2;
    static constexpr uint32_t kThreadsOfPairs = kPairs * kElements;
    static constexpr int kBatches = (kGroups + kGroupsAtOnce - 1) / kGroupsAtOnce;
    // Whether there is room for two passes: then they alternate, and one barrier a pass does.
    static constexpr bool kAlternates = 2 * kGroups <= kRoom;
    static_assert(kRoom >= 2 && kRoom % 2 == 0 && kThreadsOfPairs <= kConsumers);
};

// c += a b; b: of step `s` of the two that `pair` holds.
template <Format F>
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], const uint4& pair, int s) {
    const uint32_t b0 = s % 2 ? pair.z : pair.x, b1 = s % 2 ? pair.w : pair.y;
    if constexpr (F == Format::kF16)
        ptx::mma_f16(c, a[0], a[1], a[2], a[3], b0, b1);
    else
        ptx::mma_bf16(c, a[0], a[1], a[2], a[3], b0, b1);
}

// 128 + q as bfloat16, exactly, for two nibbles of a word: the offset comes off with the sums of the input.
__device__ __forceinline__ void unpack_nibbles(uint32_t word, uint32_t (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = ptx::and_or(word >> 4 * i, 0x000f000fu, 0x43004300u);
}

// q of four bytes q + 128, two bfloat16 a register: 2^23 + byte is a float that holds the byte exactly, and so
// does the upper half of q as a float, which has no more than 8 bits.
__device__ __forceinline__ void unpack_bytes(uint32_t word, uint32_t& first, uint32_t& second) {
    uint32_t q[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        q[i] = float_bits(bits_float(ptx::permute_bytes(word, 0x4b000000u, 0x7650u + i)) - 8388736.0f);
    first = ptx::permute_bytes(q[0], q[1], 0x7632u);
    second = ptx::permute_bytes(q[2], q[3], 0x7632u);
}

constexpr int unit_loads(Format f) { return unit_k(f) / 64 * (is_4bit(f) ? 1 : is_8bit(f) ? 2 : 4); }

// A lane's numbers of a unit of 16 columns, by step, as the tensor cores take them.
template <Format F>
__device__ __forceinline__ void unpack_unit(const uint4 (&words)[unit_loads(F)], uint32_t (&a)[unit_k(F) / 16][4]) {
    constexpr int kLoads = unit_loads(F);
    if constexpr (is_4bit(F)) {
#pragma unroll
        for (int i = 0; i < kLoads; i++) {
            unpack_nibbles(words[i].x, a[i * 4]);
            unpack_nibbles(words[i].y, a[i * 4 + 1]);
            unpack_nibbles(words[i].z, a[i * 4 + 2]);
            unpack_nibbles(words[i].w, a[i * 4 + 3]);
        }
    } else if constexpr (is_8bit(F)) {
#pragma unroll
        for (int i = 0; i < kLoads; i++) {
            unpack_bytes(words[i].x, a[i * 2][0], a[i * 2][1]);
            unpack_bytes(words[i].y, a[i * 2][2], a[i * 2][3]);
            unpack_bytes(words[i].z, a[i * 2 + 1][0], a[i * 2 + 1][1]);
            unpack_bytes(words[i].w, a[i * 2 + 1][2], a[i * 2 + 1][3]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < kLoads; i++) a[i][0] = words[i].x, a[i][1] = words[i].y, a[i][2] = words[i].z, a[i][3] = words[i].w;
    }
}

// Of a lane's two columns, by scale group: d, and where there is a minimum m.
template <Format F>
struct Scales {
    static constexpr int kGroups = scale_groups(F), kHalves = kGroups * scale_bytes(F);  // of two columns
    uint32_t words[is_float(F) ? 1 : kHalves / 2];

    __device__ __forceinline__ explicit Scales(SharedAddress from) {
        if constexpr (is_float(F)) return;
        if constexpr (kHalves == 8) {
            const uint4 all = ptx::load_shared<uint4>(from);
            words[0] = all.x, words[1] = all.y, words[2] = all.z, words[3] = all.w;
        } else if constexpr (kHalves == 4) {
            const uint2 all = ptx::load_shared<uint2>(from);
            words[0] = all.x, words[1] = all.y;
        } else if constexpr (kHalves == 2) {
            words[0] = ptx::load_shared<uint32_t>(from);
        }
    }
    __device__ __forceinline__ float d(int j, int half) const {
        return has_minima(F) ? low(words[2 * j + half]) : half ? high(words[j]) : low(words[j]);
    }
    __device__ __forceinline__ float m(int j, int half) const { return high(words[2 * j + half]); }

   private:
    static __device__ __forceinline__ float low(uint32_t word) { return ptx::half_to_float(word & 0xffff); }
    static __device__ __forceinline__ float high(uint32_t word) { return ptx::half_to_float(word >> 16); }
};

// What a lane reads of a unit of 16 columns.
template <Format F>
struct Unit {
    uint4 words[unit_loads(F)];
    Scales<F> scales;

    __device__ __forceinline__ Unit(const Worker& w, SharedAddress at)
        : scales(at + weight_bytes(F) + w.lane / 4 * (scale_groups(F) * 2 * scale_bytes(F))) {
#pragma unroll
        for (int i = 0; i < unit_loads(F); i++) words[i] = ptx::load_shared<uint4>(at + i * 512 + w.lane * 16);
    }
};

// A warp's sums: of a lane, columns g and g + 8 of each column group, for rows 2t and 2t + 1 of each matrix instruction.
template <int kRows, int kGroups>
using LaneSums = float[kGroups][InputLayout<kRows>::kTiles][4];

// What 4-bit numbers are off by as they are unpacked; of Q4_0 q - 8 is meant.
template <Format F>
constexpr float kOffset = !is_4bit(F) ? 0 : has_minima(F) ? 128 : 136;

// Adds a warp's share of units [u0, u1) to c: `weights` is the first group's first of these units, `input` where unit `x0` is, of
// `kInputUnits`.
template <Format F, int kRows, int kGroups, uint32_t kInputUnits>
__device__ __forceinline__ void accumulate(const Worker& w, LaneSums<kRows, kGroups>& c, SharedAddress weights, SharedAddress input,
                                           int count, uint32_t u0, uint32_t u1, uint32_t x0) {
    using Layout = InputLayout<kRows>;
    constexpr int kTiles = Layout::kTiles;
    constexpr int kSteps = unit_k(F) / 16;                     // matrix instructions a unit
    constexpr int kParts = is_float(F) ? 1 : scale_groups(F);  // of which each have scales of their own
    constexpr int kStepsAPart = kSteps / kParts;
    const uint32_t g = w.lane / 4, t = w.lane % 4, most = count - 1;
    const uint32_t run = (u1 - u0) * unit_bytes(F);
    uint32_t row_at[kTiles];
#pragma unroll
    for (int n = 0; n < kTiles; n++) {  // rows past the last read the last: their sums are not stored
        const uint32_t row = n * 8 + g;
        row_at[n] = input + (row < most ? row : most) * Layout::row_bytes(kInputUnits * unit_k(F)) + t * 16;
    }
    // Of one column group two units are under way, where registers allow it.
#pragma unroll (kGroups == 1 && !(has_minima(F) && kTiles > 1) ? 2 : 1)
    for (uint32_t u = u0 + (w.warp - u0) % kConsumerWarps; u < u1; u += kConsumerWarps) {
        uint4 x[kSteps / 2][kTiles];    // two steps each
        float sums[kParts][kTiles][2];  // of x, by row: the tensor cores add them up, too
#pragma unroll
        for (int n = 0; n < kTiles; n++) {
#pragma unroll
            for (int i = 0; i < kSteps / 2; i++)
                x[i][n] = ptx::load_shared<uint4>(row_at[n] + (u - x0) * unit_k(F) * 2 + i * 64);
            if constexpr (is_4bit(F)) {
                constexpr uint32_t kOnes[4] = {0x3f803f80u, 0x3f803f80u, 0x3f803f80u, 0x3f803f80u};
#pragma unroll
                for (int j = 0; j < kParts; j++) {
                    float sum[4] = {};
#pragma unroll
                    for (int s = j * kStepsAPart; s < (j + 1) * kStepsAPart; s++) multiply<F>(sum, kOnes, x[s / 2][n], s);
                    sums[j][n][0] = sum[0], sums[j][n][1] = sum[1];
                }
            }
        }
        const SharedAddress first = weights + (u - u0) * unit_bytes(F);
        Unit<F> next(w, first);
#pragma unroll
        for (int group = 0; group < kGroups; group++) {
            const Unit<F> unit = next;  // the one after it is on its way meanwhile
            if (group + 1 < kGroups) next = Unit<F>(w, first + (group + 1) * run);
            uint32_t a[kSteps][4];
            unpack_unit<F>(unit.words, a);
#pragma unroll
            for (int j = 0; j < kParts; j++)
#pragma unroll
                for (int n = 0; n < kTiles; n++) {
                    float(&total)[4] = c[group][n];
                    if constexpr (is_float(F)) {
#pragma unroll
                        for (int s = 0; s < kSteps; s++) multiply<F>(total, a[s], x[s / 2][n], s);
                        continue;
                    }
                    const float low = is_4bit(F) ? -kOffset<F> * sums[j][n][0] : 0;
                    const float high = is_4bit(F) ? -kOffset<F> * sums[j][n][1] : 0;
                    float part[4] = {low, high, low, high};
#pragma unroll
                    for (int s = j * kStepsAPart; s < (j + 1) * kStepsAPart; s++) multiply<F>(part, a[s], x[s / 2][n], s);
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        total[i] = fma_f32(unit.scales.d(j, i / 2), part[i], total[i]);
                        if constexpr (has_minima(F)) total[i] = fma_f32(unit.scales.m(j, i / 2), sums[j][n][i % 2], total[i]);
                    }
                }
        }
    }
}

// Where a thread stands among the sums of the column groups from `group0` on; which threads have none.
template <class Where>
__device__ __forceinline__ Place place_of(const Worker& w, int r0, int count, int group0, int end_group) {
    const int pair = w.thread / Where::kElements, of_pair = w.thread % Where::kElements;
    const int row = of_pair / kColumnGroup, group = group0 + 2 * pair;
    return {r0, row, pair < Where::kPairs && group < end_group && row < count,
            group * kColumnGroup + static_cast<int>(w.thread % kColumnGroup)};
}

// Column groups [group0, group0 + kGroups) of a tile: products, the warps' sums added up, and handed to the sink.
template <Format F, int kRows, int kGroups, class Sink, class Products>
__device__ __forceinline__ void linear_pass(const Worker& w, const Sink& sink, int r0, int count, int group0, uint32_t parity,
                                            const Products& add_products) {
    using Where = Sums<kRows, kGroups>;
    constexpr int kTiles = InputLayout<kRows>::kTiles;
    constexpr int kAtOnce = Where::kGroupsAtOnce;
    typename Sink::Held held[Where::kBatches];
#pragma unroll
    for (int batch = 0; batch < Where::kBatches; batch++)
        held[batch] = sink.fetch(place_of<Where>(w, r0, count, group0 + batch * kAtOnce, group0 + kGroups));
    LaneSums<kRows, kGroups> c = {};
    add_products(c);

    const uint32_t g = w.lane / 4, t = w.lane % 4;
    const SharedAddress sums = w.shared + kSumsAt + (Where::kAlternates ? parity % 2 * (kSumsBytes / 2) : 0);
#pragma unroll
    for (int batch = 0; batch < Where::kBatches; batch++) {
        if (batch > 0) sync_consumers();  // the sums before have been read
#pragma unroll
        for (int group = 0; group < kAtOnce && batch * kAtOnce + group < kGroups; group++)
#pragma unroll
            for (int n = 0; n < kTiles; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const uint32_t row = n * 8 + 2 * t + i % 2, element = row * kColumnGroup + g + 8 * (i / 2);
                    if (row < Where::kRowsOfChunk)
                        ptx::store_shared(sums + ((group * kConsumerWarps + w.warp) * Where::kElements + element) * 4,
                                          c[batch * kAtOnce + group][n][i]);
                }
        sync_consumers();
        const Place at = place_of<Where>(w, r0, count, group0 + batch * kAtOnce, group0 + kGroups);
        // Whole warps: sinks shuffle.
        if (w.thread < (Where::kThreadsOfPairs + kLanes - 1) / kLanes * kLanes) {
            float total[2] = {0, 0};
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int group = w.thread / Where::kElements * 2 + half;
                if (group < kAtOnce && batch * kAtOnce + group < kGroups && w.thread < Where::kThreadsOfPairs) {
                    const SharedAddress from =
                        sums + (group * kConsumerWarps * Where::kElements + w.thread % Where::kElements) * 4;
#pragma unroll
                    for (uint32_t i = 0; i < kConsumerWarps; i++)
                        total[half] += ptx::load_shared<float>(from + i * Where::kElements * 4);
                }
            }
            sink.put(w, at, total[0], total[1], held[batch]);
        }
    }
    if (!Where::kAlternates) sync_consumers();
}

// One tile: kColumns columns, the whole of K, rows [r_begin, r_end) of the step. Its weights come in loads of kLoadUnits
// units, load i to page_of(i), its input is staged in blocks of kInputUnits, whole loads. `is_new_input`: whether it is yet
// to be. Where there are several loads, rows are at most kRowChunk and all column groups go in one pass.
template <Format F, int kRows, int kIn, int kColumns, uint32_t kLoadUnits, uint32_t kInputUnits, class Source, class Sink, class PageOf>
__device__ __forceinline__ void linear_tile(Worker w, const Source source, const Sink sink, int r_begin, int r_end,
                                            const PageOf& page_of, SharedAddress input_pages, bool is_new_input) {
    using Layout = InputLayout<kRows>;
    constexpr uint32_t kUnits = num_units(F, kIn), kLoads = (kUnits + kLoadUnits - 1) / kLoadUnits;
    constexpr uint32_t kPadded = kUnits * unit_k(F);
    constexpr int kGroups = (kColumns + kColumnGroup - 1) / kColumnGroup;
    constexpr int kMost = kLoads > 1 ? kGroups : most_groups(F, Layout::kChunk);
    constexpr int kAtOnce = kGroups < kMost ? kGroups : kMost, kRest = kGroups % kAtOnce;
    constexpr int kPasses = (kGroups + kAtOnce - 1) / kAtOnce;
    const int rows = w.step.num_rows < r_end ? w.step.num_rows : r_end;
    // One more with each tile that is computed, and not with those that are left out. A call's first tile stages its input,
    // after a barrier, so that calls may begin with either.
    const uint32_t parity = w.loads / kLoads;
    SharedAddress input = input_pages;
    if constexpr (kLoads > 1) {
        const int count = rows - r_begin;
        constexpr bool kStagesAll = kInputUnits >= kUnits;
        if (kStagesAll && is_new_input) {
            sync_consumers();  // what this SM's ops before wrote is there; the input before has been read
            stage_input<kRows, kIn, kPadded>(w, source, r_begin, count, input);
        }
        trace(w, kStaged);
        linear_pass<F, kRows, kGroups>(w, sink, r_begin, count, 0, parity, [&](auto& c) {
#pragma unroll 1
            for (uint32_t load = 0; load < kLoads; load++) {
                const uint32_t u0 = load * kLoadUnits, u1 = u0 + kLoadUnits < kUnits ? u0 + kLoadUnits : kUnits;
                const uint32_t x0 = u0 / kInputUnits * kInputUnits;
                if (!kStagesAll && u0 == x0)
                    input = stage_block<kRows, kIn, kPadded, kInputUnits * unit_k(F)>(w, source, r_begin, count, u0 * unit_k(F), input_pages);
                wait_landed(w);
                if (load == 0) trace(w, kLanded);
                accumulate<F, kRows, kGroups, kInputUnits>(w, c, page_of(load), input, count, u0, u1, x0);
                if (load + 1 == kLoads) continue;  // the tile's output keeps the last one's pages
                report_progress(w);
                w.next(1);
            }
        });
        trace(w, kMultiplied);
        sink.end(w, r_begin, count);
    } else {
        static_assert(kInputUnits >= kUnits);
        bool has_landed = false;
        for (int r0 = r_begin; r0 < rows; r0 += kRowChunk) {
            const int count = rows - r0 < Layout::kChunk ? rows - r0 : Layout::kChunk;
            if (kRows > kRowChunk || is_new_input) {
                sync_consumers();  // what this SM's ops before wrote is there; the chunk before has been read
                stage_input<kRows, kIn, kPadded>(w, source, r0, count, input);
            }
            trace(w, kStaged);
            if (!has_landed) wait_landed(w);
            has_landed = true;
            trace(w, kLanded);
            const SharedAddress weights = page_of(0);
#pragma unroll 1
            for (int pass = 0; pass < kGroups / kAtOnce; pass++)
                linear_pass<F, kRows, kAtOnce>(w, sink, r0, count, pass * kAtOnce, parity + pass, [&](auto& c) {
                    accumulate<F, kRows, kAtOnce, kUnits>(w, c, weights + pass * kAtOnce * kUnits * unit_bytes(F), input, count,
                                                          0, kUnits, 0);
                });
            if constexpr (kRest > 0)
                linear_pass<F, kRows, kRest>(w, sink, r0, count, kGroups - kRest, parity + kPasses - 1, [&](auto& c) {
                    accumulate<F, kRows, kRest, kUnits>(w, c, weights + (kGroups - kRest) * kUnits * unit_bytes(F), input, count,
                                                        0, kUnits, 0);
                });
            trace(w, kMultiplied);
            sink.end(w, r0, count);
            // The next tile's first pass may have the parity of the last: those sums must have been read.
            if (kPasses > 1) sync_consumers();
        }
        if (!has_landed) wait_landed(w);
    }
    report_progress(w);
}

}  // namespace headrace
