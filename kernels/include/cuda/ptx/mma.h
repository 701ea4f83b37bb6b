// The tensor cores: 16x16 times 16x8, summed in float32.
//
// Lane l, g = l / 4, t = l % 4. a0: row g, k 2t and 2t + 1; a1: row g + 8; a2: row g, k 2t + 8 and 2t + 9; a3: row
// g + 8 of these. b0: k 2t and 2t + 1 of column g; b1: k 2t + 8 and 2t + 9. c[0], c[1]: row g, columns 2t and
// 2t + 1; c[2], c[3]: row g + 8. The lower half of a register is the first of its two elements.
#pragma once

#include "cuda/ptx/memory.h"

namespace headrace::ptx {

__device__ __forceinline__ void mma_bf16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_f16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                        uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Four matrices of eight rows of eight 16-bit elements: lane l names row l % 8 of matrix l / 8, and gets elements
// 2t and 2t + 1 of row g of each.
__device__ __forceinline__ void load_matrix_x4(uint32_t (&r)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}

}  // namespace headrace::ptx
