// Activations that carry the number of the op that wrote them, each in one access with itself: who wants an op's output
// reads it until the numbers are right. No counter is raised, looked at and passed on, and nothing has to be there before
// it. Twice the bytes of floats, and no more where pairs of 16 bits do: for steps of few rows.
//
// Who has read an op's whole output comes after all its tiles, as their values depend on what they had read: so much
// as a wait for the op's counter would say of loads. Of other stores it says nothing; those have counters.
#pragma once

#include "cuda/barrier.h"
#include "cuda/packed.h"

namespace headrace {

// An op's number, odd so that it is never that of memory which nobody wrote. It comes back after 2^31 steps, for
// programs of an odd number of ops; what waits for it then must have been overwritten meanwhile, but for a row that no step had.
struct Tag {
    uint32_t num_ops, first, a_layer, layer;  // of the program; of the op in layer 0 of a loop, and from layer to layer

    __device__ __forceinline__ uint32_t of(const Worker& w) const {
        const uint32_t epoch = ptx::load_shared<uint32_t>(w.shared + kEpochAt);
        return (epoch * num_ops + first + layer * a_layer) * 2 + 1;
    }
};

__device__ __forceinline__ void check_time(const Worker& w, uint64_t start, uint32_t expected, uint32_t actual) {
    if (ptx::nanoseconds() - start > w.step.timeout_ns) fail(w, own_instruction(w), kInputWait, kNoIndex, expected, actual);
}

// Until a value that was loaded from `from` carries `tag`.
__device__ __forceinline__ void settle(const Worker& w, uint2& found, const uint2* from, uint32_t tag) {
    if (found.y == tag) return;
    const uint64_t start = ptx::nanoseconds();
    while ((found = ptx::load_tagged(from, tag)).y != tag) check_time(w, start, tag, found.y);
}

// Until all of those do that were loaded from `from` on, two at once.
template <int kCount>
__device__ __forceinline__ void settle(const Worker& w, uint4 (&found)[kCount], const uint2* from, uint32_t tag) {
    const auto missing = [&] {
        uint32_t differs = 0;
#pragma unroll
        for (int i = 0; i < kCount; i++) differs |= (found[i].y ^ tag) | (found[i].w ^ tag);
        return differs;
    };
    if (!missing()) return;
    const uint64_t start = ptx::nanoseconds();
    do {
#pragma unroll
        for (int i = 0; i < kCount; i++) found[i] = ptx::load_tagged_two(from + 2 * i, tag);
        check_time(w, start, tag, found[0].y);
    } while (missing());
}

// Where an op reads rows of kIn elements, eight at a time: load() sends for them, settle() makes sure that they are there.
struct Eight {
    float x[8];
};

template <int kIn>
struct FloatRows {
    using Raw = Eight;
    const float* rows;  // [rows][kIn]

    __device__ __forceinline__ void await(const Worker&) const {}
    __device__ __forceinline__ Raw load(const Worker&, int row, uint32_t k) const {
        const float4* from = reinterpret_cast<const float4*>(rows + static_cast<int64_t>(row) * kIn + k);
        const float4 low = ptx::load_global(from), high = ptx::load_global(from + 1);
        return {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
    }
    __device__ __forceinline__ void settle(const Worker&, Raw&, int, uint32_t) const {}
};

// A warp looks at one value until it is there, as all of them together would keep L2 busy. Begins what wait_counter does for
// other ops, and is followed by the loads.
template <class Rows>
__device__ __forceinline__ void await_first(const Worker& w, const Rows& rows, uint32_t k, uint32_t tag) {
    if (w.lane != 0 || k >= Rows::kElements) return;
    const uint2* from = rows.at(0, k);
    uint2 found{0, ~tag};
    settle(w, found, from, tag);
}

constexpr uint32_t kStagedBlock = 256;  // elements that a warp stages at once

struct EightTagged {
    uint4 found[4];
};

// [rows][kIn] floats.
template <int kIn>
struct TaggedFloats {
    static constexpr uint32_t kElements = kIn;
    using Raw = EightTagged;
    const uint2* rows;
    Tag tag;

    __device__ __forceinline__ const uint2* at(int row, uint32_t k) const { return rows + row * kIn + k; }
    __device__ __forceinline__ void await(const Worker& w) const { await_first(w, *this, w.warp * kStagedBlock, tag.of(w)); }
    __device__ __forceinline__ Raw load(const Worker& w, int row, uint32_t k) const {
        Raw raw;
#pragma unroll
        for (int i = 0; i < 4; i++) raw.found[i] = ptx::load_tagged_two(at(row, k) + 2 * i, tag.of(w));
        return raw;
    }
    __device__ __forceinline__ void settle(const Worker& w, Raw& raw, int row, uint32_t k) const {
        headrace::settle(w, raw.found, at(row, k), tag.of(w));
    }
};

struct FourPairs {
    uint4 found[2];
};

// [rows][kIn / 2] pairs of 16 bits, rounded as the op's products take them.
template <int kIn>
struct TaggedPairs {
    static constexpr uint32_t kElements = kIn;
    using Raw = FourPairs;
    const uint2* rows;
    Tag tag;

    __device__ __forceinline__ const uint2* at(int row, uint32_t k) const { return rows + (row * kIn + k) / 2; }
    __device__ __forceinline__ void await(const Worker& w) const { await_first(w, *this, w.warp * kStagedBlock, tag.of(w)); }
    __device__ __forceinline__ Raw load(const Worker& w, int row, uint32_t k) const {
        return {{ptx::load_tagged_two(at(row, k), tag.of(w)), ptx::load_tagged_two(at(row, k) + 2, tag.of(w))}};
    }
    __device__ __forceinline__ void settle(const Worker& w, Raw& raw, int row, uint32_t k) const {
        headrace::settle(w, raw.found, at(row, k), tag.of(w));
    }
};

// The same without numbers, for many rows.
template <int kIn>
struct PairRows {
    using Raw = uint4;
    const uint32_t* rows;

    __device__ __forceinline__ const uint4* at(int row, uint32_t k) const {
        return reinterpret_cast<const uint4*>(rows + (row * kIn + k) / 2);
    }
    __device__ __forceinline__ void await(const Worker&) const {}
    __device__ __forceinline__ Raw load(const Worker&, int row, uint32_t k) const { return ptx::load_global(at(row, k)); }
    __device__ __forceinline__ void settle(const Worker&, Raw&, int, uint32_t) const {}
};

template <Format F>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
    return F == Format::kF16 ? ptx::pack_f16x2(low, high) : ptx::pack_bf16x2(low, high);
}

template <Format F>
__device__ __forceinline__ uint4 rounded(const Eight& own) {
    return {pack_pair<F>(own.x[0], own.x[1]), pack_pair<F>(own.x[2], own.x[3]), pack_pair<F>(own.x[4], own.x[5]),
            pack_pair<F>(own.x[6], own.x[7])};
}

template <Format>
__device__ __forceinline__ uint4 rounded(const FourPairs& raw) {
    return {raw.found[0].x, raw.found[0].z, raw.found[1].x, raw.found[1].z};
}

template <Format>
__device__ __forceinline__ uint4 rounded(const uint4& pairs) {
    return pairs;
}

// Sums of squares are those of the binary tree over the numbers of their columns, whoever adds up which part of it.
__device__ __forceinline__ float squares_of(const Eight& own) {
    const float(&x)[8] = own.x;
    return ((x[0] * x[0] + x[1] * x[1]) + (x[2] * x[2] + x[3] * x[3])) +
           ((x[4] * x[4] + x[5] * x[5]) + (x[6] * x[6] + x[7] * x[7]));
}

constexpr uint32_t kSquaredColumns = 16;  // that who writes hidden states adds up

__device__ __forceinline__ const Eight& floats(const Eight& own) { return own; }

__device__ __forceinline__ Eight floats(const EightTagged& raw) {
    Eight eight;
#pragma unroll
    for (int i = 0; i < 4; i++) eight.x[2 * i] = bits_float(raw.found[i].x), eight.x[2 * i + 1] = bits_float(raw.found[i].z);
    return eight;
}

// Of pairs for quantized weights: bfloat16.
__device__ __forceinline__ Eight floats(const uint4& pairs) {
    const uint32_t words[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
    Eight eight;
#pragma unroll
    for (int i = 0; i < 4; i++) eight.x[2 * i] = bits_float(words[i] << 16), eight.x[2 * i + 1] = bits_float(words[i] & 0xffff0000u);
    return eight;
}

__device__ __forceinline__ Eight floats(const FourPairs& raw) {
    return floats(uint4{raw.found[0].x, raw.found[0].z, raw.found[1].x, raw.found[1].z});
}

// Where an op writes floats, or pairs that the next one reads: `to`, bytes into the activations or those that are tagged, is where
// element 0 goes.
struct FloatsTo {
    int64_t to;

    __device__ __forceinline__ float* at(const Worker& w, int64_t element) const {
        return reinterpret_cast<float*>(w.step.activations + to) + element;
    }
    __device__ __forceinline__ void store(const Worker& w, int64_t element, float value) const {
        ptx::store_global(at(w, element), value);
    }
    // An even number's element and the one after it.
    __device__ __forceinline__ void store_two(const Worker& w, int64_t element, float low, float high) const {
        ptx::store_global(reinterpret_cast<float2*>(at(w, element)), float2{low, high});
    }
};

// What becomes of hidden states besides, for the op that norms them next and that all SMs read: weighted and rounded, as its
// products take them, and their squares added up.
template <Format F>
struct NormedTo {
    static constexpr bool kIsCopied = true;
    int64_t to, squares;  // bytes into the activations
    int64_t columns;      // of a row
    const float* weight;  // of the norm

    __device__ __forceinline__ float weight_of(uint32_t column) const { return ptx::load_constant(weight + column); }
    // By whole warps, a lane a column, of which sixteen neighbours are there or not.
    __device__ __forceinline__ void put(const Worker& w, int64_t row, uint32_t column, float value, float weighted_by,
                                        bool is_there) const {
        float sum = is_there ? value * value : 0;
#pragma unroll
        for (uint32_t mask = 1; mask < kSquaredColumns; mask *= 2) sum += ptx::shuffle_xor(sum, mask);
        if (!is_there) return;
        const uint16_t half = pack_pair<F>(value * weighted_by, 0) & 0xffff;
        ptx::store_global(reinterpret_cast<uint16_t*>(w.step.activations + to) + row * columns + column, half);
        if (column % kSquaredColumns == 0)
            ptx::store_global(reinterpret_cast<float*>(w.step.activations + squares) + (row * columns + column) / kSquaredColumns,
                              sum);
    }
};

struct NotNormed {
    static constexpr bool kIsCopied = false;
    __device__ __forceinline__ float weight_of(uint32_t) const { return 0; }
    __device__ __forceinline__ void put(const Worker&, int64_t, uint32_t, float, float, bool) const {}
};

template <Format F>
struct PairsTo {
    int64_t to;

    __device__ __forceinline__ void store_two(const Worker& w, int64_t element, float low, float high) const {
        ptx::store_global(reinterpret_cast<uint32_t*>(w.step.activations + to) + element / 2, pack_pair<F>(low, high));
    }
};

struct TaggedFloatsTo {
    int64_t to;
    Tag tag;

    __device__ __forceinline__ uint2* at(const Worker& w, int64_t element) const {
        return reinterpret_cast<uint2*>(w.step.tagged + to) + element;
    }
    __device__ __forceinline__ void store(const Worker& w, int64_t element, float value) const {
        ptx::store_tagged(at(w, element), float_bits(value), tag.of(w));
    }
};

template <Format F>
struct TaggedPairsTo {
    int64_t to;
    Tag tag;

    __device__ __forceinline__ void store_two(const Worker& w, int64_t element, float low, float high) const {
        ptx::store_tagged(reinterpret_cast<uint2*>(w.step.tagged + to) + element / 2, pack_pair<F>(low, high), tag.of(w));
    }
};

}  // namespace headrace
