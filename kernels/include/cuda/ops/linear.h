// A tile of a linear op: rows in shared memory, times weights in shared memory, by the tensor cores.
//
// Weights are the 16-row operand, so that one to eight rows cost one matrix instruction, of quantized weights one to four. Each
// consumer warp takes every eighth unit of K, by its number in the whole of K; sums of the warps are added in order. What a
// row's sum is thus depends on neither the tile nor the rows beside it.
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

constexpr int unit_loads(Format f) { return unit_k(f) / 64 * (is_4bit(f) ? 1 : is_8bit(f) ? 2 : 4); }

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

// Sums of a lane, for 16 columns and the rows of a matrix instruction: of floats columns g and g + 8 for rows 2t and 2t + 1, of
// quantized weights for row t.
template <Format F>
constexpr int kSumsOfLane = is_quantized(F) ? 2 : 4;

template <Format F, int kRows, int kGroups>
using LaneSums = float[kGroups][InputLayout<F, kRows>::kTiles][kSumsOfLane<F>];

// Adds a warp's share of units [u0, u1) to c: `weights` is the first group's first of these units, `input` where unit `x0` is, of
// `kInputUnits`.
template <Format F, int kRows, int kGroups, uint32_t kInputUnits>
__device__ __forceinline__ void accumulate_floats(const Worker& w, LaneSums<F, kRows, kGroups>& c, SharedAddress weights,
                                                  SharedAddress input, int count, uint32_t u0, uint32_t u1, uint32_t x0) {
    using Layout = InputLayout<F, kRows>;
    constexpr int kTiles = Layout::kTiles;
    constexpr int kSteps = unit_k(F) / 16;  // matrix instructions a unit
    const uint32_t g = w.lane / 4, t = w.lane % 4, most = count - 1;
    const uint32_t run = (u1 - u0) * unit_bytes(F);
    uint32_t row_at[kTiles];
#pragma unroll
    for (int n = 0; n < kTiles; n++) {  // rows past the last read the last: their sums are not stored
        const uint32_t row = n * 8 + g;
        row_at[n] = input + (row < most ? row : most) * Layout::row_bytes(kInputUnits) + t * 16;
    }
#pragma unroll (kGroups == 1 ? 2 : 1)
    for (uint32_t u = u0 + (w.warp - u0) % kConsumerWarps; u < u1; u += kConsumerWarps) {
        uint4 x[kSteps / 2][kTiles];  // two steps each
#pragma unroll
        for (int n = 0; n < kTiles; n++)
#pragma unroll
            for (int i = 0; i < kSteps / 2; i++)
                x[i][n] = ptx::load_shared<uint4>(row_at[n] + (u - x0) * unit_k(F) * 2 + i * 64);
        const SharedAddress first = weights + (u - u0) * unit_bytes(F);
        Unit<F> next(w, first);
#pragma unroll
        for (int group = 0; group < kGroups; group++) {
            const Unit<F> unit = next;  // the one after it is on its way meanwhile
            if (group + 1 < kGroups) next = Unit<F>(w, first + (group + 1) * run);
#pragma unroll
            for (int s = 0; s < kSteps; s++) {
                const uint4& word = unit.words[s];
                const uint32_t a[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
                for (int n = 0; n < kTiles; n++) multiply<F>(c[group][n], a, x[s / 2][n], s);
            }
        }
    }
}

// A lane's weights of 32 elements of K, signed bytes, and what is right of what they are summed to. Of a byte of 4-bit weights
// the lower half is a number of column g, from 0, and the upper one of column g + 8, signed: the whole byte is 16 times the
// one and once the other, which comes off again.
template <Format F>
__device__ __forceinline__ void bytes_of(const Unit<F>& unit, int group, uint32_t (&a)[4]) {
    if constexpr (is_4bit(F)) {
        const uint4& word = unit.words[group / 2];
        a[1] = group % 2 ? word.z : word.x, a[3] = group % 2 ? word.w : word.y;
        a[0] = a[1] & 0x0f0f0f0fu, a[2] = a[3] & 0x0f0f0f0fu;
    } else {
        const uint4& word = unit.words[group];
        a[0] = word.x, a[1] = word.y, a[2] = word.z, a[3] = word.w;
    }
}

// The same for quantized weights. Sums of a scale group's products are integers, exact, and beside kMagic floats without
// being converted: of the inputs' high bytes c[0] and c[2], of their low ones c[1] and c[3].
template <Format F, int kRows, int kGroups, uint32_t kInputUnits>
__device__ __forceinline__ void accumulate_quantized(const Worker& w, LaneSums<F, kRows, kGroups>& c, SharedAddress weights,
                                                     SharedAddress input, int count, uint32_t u0, uint32_t u1, uint32_t x0) {
    using Layout = InputLayout<F, kRows>;
    constexpr int kTiles = Layout::kTiles;
    constexpr int kParts = scale_groups(F), kOfPart = scale_group(F) / 32;  // matrix instructions of a scale group
    const uint32_t g = w.lane / 4, t = w.lane % 4, most = count - 1;
    const uint32_t run = (u1 - u0) * unit_bytes(F);
    uint32_t row_at[kTiles], scale_at[kTiles];
#pragma unroll
    for (int n = 0; n < kTiles; n++) {  // rows past the last read the last: their sums are not stored
        const uint32_t row = n * 4 + g / 2, of_sums = n * 4 + t;
        row_at[n] = input + (row < most ? row : most) * Layout::row_bytes(kInputUnits) + g % 2 * 64 + t * 16;
        scale_at[n] = input + Layout::scales_at(kInputUnits) + (of_sums < most ? of_sums : most) * Layout::kScaleBytes;
    }
#pragma unroll (kGroups == 1 ? 2 : 1)
    for (uint32_t u = u0 + (w.warp - u0) % kConsumerWarps; u < u1; u += kConsumerWarps) {
        const uint32_t at = u - x0;  // of the input
        uint4 x[unit_k(F) / 64][kTiles];
        float2 scales[kParts][kTiles];  // and sums, as the low bytes' has them taken off, or where there are minima as they are
#pragma unroll
        for (int n = 0; n < kTiles; n++) {
#pragma unroll
            for (int i = 0; i < unit_k(F) / 64; i++)
                x[i][n] = ptx::load_shared<uint4>(row_at[n] + at * unit_k(F) * 2 + i * 128);
#pragma unroll
            for (int j = 0; j < kParts; j++) {
                const SharedAddress from = scale_at[n] + (at * kParts + j) * Layout::kGroupBytes;
                if constexpr (is_4bit(F))
                    scales[j][n] = ptx::load_shared<float2>(from);
                else
                    scales[j][n].x = ptx::load_shared<float>(from);
            }
        }
        const SharedAddress first = weights + (u - u0) * unit_bytes(F);
        Unit<F> next(w, first);
#pragma unroll
        for (int group = 0; group < kGroups; group++) {
            const Unit<F> unit = next;  // the one after it is on its way meanwhile
            if (group + 1 < kGroups) next = Unit<F>(w, first + (group + 1) * run);
#pragma unroll
            for (int j = 0; j < kParts; j++) {
                int32_t sums[kTiles][4];
#pragma unroll
                for (int i = 0; i < kOfPart; i++) {
                    const int k32 = j * kOfPart + i;
                    uint32_t a[4];
                    bytes_of<F>(unit, k32, a);
#pragma unroll
                    for (int n = 0; n < kTiles; n++) {
                        const uint4& b = x[k32 / 2][n];
                        constexpr int32_t kFirst[4] = {kMagicBits, kMagicBits, kMagicBits, kMagicBits};
                        if (i == 0)
                            ptx::mma_s8(sums[n], a[0], a[1], a[2], a[3], k32 % 2 ? b.z : b.x, k32 % 2 ? b.w : b.y, kFirst);
                        else
                            ptx::mma_s8(sums[n], a[0], a[1], a[2], a[3], k32 % 2 ? b.z : b.x, k32 % 2 ? b.w : b.y, sums[n]);
                    }
                }
                const float d[2] = {unit.scales.d(j, 0), unit.scales.d(j, 1)};
#pragma unroll
                for (int n = 0; n < kTiles; n++) {
                    float of[4];
#pragma unroll
                    for (int i = 0; i < 4; i++) of[i] = bits_float(sums[n][i]);
                    const float scale = scales[j][n].x;
                    float(&total)[2] = c[group][n];
                    if constexpr (is_4bit(F)) {
                        const float sum = scales[j][n].y;
                        // Numbers from 0 are 8 too many; the others are not, and 16 times what they are.
                        const float first_of = fma_f32(of[0] - kMagic, 256, of[1] - fma_f32(sum, 8, kMagic));
                        const float second_of = fma_f32(of[2] - of[0], 256, of[3] - of[1]);
                        total[0] = fma_f32(d[0] * scale, first_of, total[0]);
                        total[1] = fma_f32(d[1] * (scale * 0.0625f), second_of, total[1]);
                        if constexpr (has_minima(F)) {
                            total[0] = fma_f32(fma_f32(d[0], 8, unit.scales.m(j, 0)), sum * scale, total[0]);
                            total[1] = fma_f32(fma_f32(d[1], 8, unit.scales.m(j, 1)), sum * scale, total[1]);
                        }
                    } else {
                        total[0] = fma_f32(d[0] * scale, fma_f32(of[0] - kMagic, 256, of[1] - kMagic), total[0]);
                        total[1] = fma_f32(d[1] * scale, fma_f32(of[2] - kMagic, 256, of[3] - kMagic), total[1]);
                    }
                }
            }
        }
    }
}

template <Format F, int kRows, int kGroups, uint32_t kInputUnits>
__device__ __forceinline__ void accumulate(const Worker& w, LaneSums<F, kRows, kGroups>& c, SharedAddress weights,
                                           SharedAddress input, int count, uint32_t u0, uint32_t u1, uint32_t x0) {
    if constexpr (is_quantized(F))
        accumulate_quantized<F, kRows, kGroups, kInputUnits>(w, c, weights, input, count, u0, u1, x0);
    else
        accumulate_floats<F, kRows, kGroups, kInputUnits>(w, c, weights, input, count, u0, u1, x0);
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
    constexpr int kTiles = InputLayout<F, kRows>::kTiles;
    constexpr int kAtOnce = Where::kGroupsAtOnce;
    typename Sink::Held held[Where::kBatches];
#pragma unroll
    for (int batch = 0; batch < Where::kBatches; batch++)
        held[batch] = sink.fetch(w, place_of<Where>(w, r0, count, group0 + batch * kAtOnce, group0 + kGroups));
    LaneSums<F, kRows, kGroups> c = {};
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
                for (int i = 0; i < kSumsOfLane<F>; i++) {
                    const uint32_t row = is_quantized(F) ? n * 4 + t : n * 8 + 2 * t + i % 2;
                    const uint32_t element = row * kColumnGroup + g + 8 * (is_quantized(F) ? i : i / 2);
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
    using Layout = InputLayout<F, kRows>;
    constexpr uint32_t kUnits = num_units(F, kIn), kLoads = (kUnits + kLoadUnits - 1) / kLoadUnits;
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
            stage_input<F, kRows, kIn, kInputUnits>(w, source, r_begin, count, 0, input);
        }
        trace(w, kStaged);
        linear_pass<F, kRows, kGroups>(w, sink, r_begin, count, 0, parity, [&](auto& c) {
#pragma unroll 1
            for (uint32_t load = 0; load < kLoads; load++) {
                const uint32_t u0 = load * kLoadUnits, u1 = u0 + kLoadUnits < kUnits ? u0 + kLoadUnits : kUnits;
                const uint32_t x0 = u0 / kInputUnits * kInputUnits;
                if (!kStagesAll && u0 == x0)
                    input = stage_block<F, kRows, kIn, kInputUnits>(w, source, r_begin, count, x0, input_pages);
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
                stage_input<F, kRows, kIn, kUnits>(w, source, r0, count, 0, input);
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
