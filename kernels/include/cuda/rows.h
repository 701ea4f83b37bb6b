// Rows of activations, as linear ops read them: where they do, and where other ops write them.
#pragma once

#include "cuda/barrier.h"
#include "cuda/packed.h"

namespace headrace {

// Pairs of neighbours in 16 bits, rounded as the products of the op that reads them take them.
template <int kIn>
struct PairRows {
    const uint32_t* rows;

    // Eight elements.
    __device__ __forceinline__ const uint4* at(int row, uint32_t k) const {
        return reinterpret_cast<const uint4*>(rows + (row * kIn + k) / 2);
    }
};

template <Format F>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
    return F == Format::kF16 ? ptx::pack_f16x2(low, high) : ptx::pack_bf16x2(low, high);
}

// Where an op writes such, two at a time: `to`, bytes into the activations, is where element 0 goes, `element` even.
template <Format F>
struct PairsTo {
    int64_t to;

    __device__ __forceinline__ void store_two(const Worker& w, int64_t element, float low, float high) const {
        ptx::store_global(reinterpret_cast<uint32_t*>(w.step.activations + to) + element / 2, pack_pair<F>(low, high));
    }
};

constexpr uint32_t kSquaredColumns = 16;  // squares are added up by so many

// What becomes of hidden states besides, for the op that norms them next and that all SMs read: weighted and rounded, as its
// products take them, and their squares added up.
template <Format F>
struct NormedTo {
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
        uint8_t* activations = w.step.activations + w.zero();
        ptx::store_global(reinterpret_cast<uint16_t*>(activations + to) + row * columns + column, half);
        if (column % kSquaredColumns == 0)
            ptx::store_global(reinterpret_cast<float*>(activations + squares) + (row * columns + column) / kSquaredColumns, sum);
    }
};

}  // namespace headrace
