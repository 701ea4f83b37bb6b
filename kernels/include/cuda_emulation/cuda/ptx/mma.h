// Emulated twin of include/cuda/ptx/mma.h: products are exact, and sums of 16 of them are rounded once.
#pragma once

#include "memory.h"

namespace headrace::ptx {

__device__ HEADRACE_ALWAYS_INLINE void mma_bf16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1) {
    emulation::mma(emulation::MmaType::kBf16, c, {a0, a1, a2, a3}, {b0, b1});
}

__device__ HEADRACE_ALWAYS_INLINE void mma_f16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                        uint32_t b1) {
    emulation::mma(emulation::MmaType::kF16, c, {a0, a1, a2, a3}, {b0, b1});
}

__device__ HEADRACE_ALWAYS_INLINE void load_matrix_x4(uint32_t (&r)[4], SharedAddress row) {
    emulation::load_matrix_x4(r, row);
}

}  // namespace headrace::ptx
