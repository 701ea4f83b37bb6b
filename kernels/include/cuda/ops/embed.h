// Rows of the embedding, out of the order in which the head multiplies them.
#pragma once

#include "cuda/rows.h"

namespace headrace {

// Element k of output column `column` of a packed matrix.
template <Format F, int kIn>
__device__ __forceinline__ float packed_element(const uint8_t* matrix, int64_t column, uint32_t k) {
    const uint8_t* unit = matrix + column / 16 * group_bytes(F, kIn) + static_cast<int64_t>(k / unit_k(F)) * unit_bytes(F);
    const uint32_t in_unit = k % unit_k(F), in_group = in_unit % 32;
    const uint32_t step = in_unit / 32 * 2 + in_group % 8 / 4;
    const uint32_t lane = column % 8 * 4 + in_group / 8;
    const uint32_t i = (in_group % 4 / 2) * 2 + column % 16 / 8, e = in_group % 2;
    if constexpr (is_float(F)) {
        const uint16_t bits = ptx::load_constant(reinterpret_cast<const uint16_t*>(unit + 512 * step + 16 * lane + 4 * i + 2 * e));
        return F == Format::kF16 ? ptx::half_to_float(bits) : ptx::bf16_to_float(bits);
    } else {
        const uint32_t of_column = (column % 8 * scale_groups(F) + in_unit / scale_group(F)) * 2 + column % 16 / 8;
        const uint8_t* scale = unit + weight_bytes(F) + of_column * scale_bytes(F);
        const float d = ptx::half_to_float(ptx::load_constant(reinterpret_cast<const uint16_t*>(scale)));
        if constexpr (is_8bit(F)) {
            const uint32_t word =
                ptx::load_constant(reinterpret_cast<const uint32_t*>(unit + 512 * (step / 2) + 16 * lane + 8 * (step % 2) + i / 2 * 4));
            return d * (static_cast<float>(word >> 8 * (2 * (i % 2) + e) & 0xff) - 128);
        } else {
            const uint32_t word =
                ptx::load_constant(reinterpret_cast<const uint32_t*>(unit + 512 * (step / 4) + 16 * lane + 4 * (step % 4)));
            const float q = static_cast<float>(word >> (16 * e + 4 * i) & 15);
            if constexpr (!has_minima(F)) return d * (q - 8);
            return d * q + ptx::half_to_float(ptx::load_constant(reinterpret_cast<const uint16_t*>(scale + 2)));
        }
    }
}

// A warp a row.
template <Format F, int kIn, class Normed>
__device__ __forceinline__ void embed_tile(const Worker w, int64_t table, uint32_t n0, uint32_t n1, float* hidden,
                                           const Normed normed) {
    for (int row = w.warp; row < w.step.num_rows; row += kConsumerWarps) {
        const int token = ptx::load_settled(w.step.token_ids + row);
        for (uint32_t k0 = n0; k0 < n1; k0 += kLanes) {
            const uint32_t k = k0 + w.lane;
            const bool is_there = k < n1;
            float value = 0;
            if (is_there) {
                value = packed_element<F, kIn>(w.step.weights + table, token, k);
                ptx::store_global(hidden + static_cast<int64_t>(row) * kIn + k, value);
            }
            normed.put(w, row, k, value, is_there ? normed.weight_of(k) : 0, is_there);
        }
    }
    report_progress(w);
}

}  // namespace headrace
