"""Small kernels, each for what its machine code holds."""

PLAIN = """
extern "C" __global__ void plain(float* out) { out[threadIdx.x] = out[threadIdx.x] * SCALE + 1.0f; }
"""

MATRIX = """
extern "C" __global__ void matrix(float* c, const unsigned* a) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(a[4]), "r"(a[5]));
}
"""

COPIES = """
#include <cstdint>
extern "C" __global__ void copies(float* out, const float* from) {
    __shared__ alignas(16) float held[64];
    const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(held + threadIdx.x * 4));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from + threadIdx.x * 4)
                 : "memory");
    asm volatile("cp.async.wait_all;" ::: "memory");
    out[threadIdx.x] = held[threadIdx.x * 4];
}
"""

BULK_COPIES = """
#include <cstdint>
extern "C" __global__ void bulk(const float* from) {
    extern __shared__ float held[];
    const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(held));
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(1024), "r"(to + 4096)
                 : "memory");
}
"""

JUMPS = """
extern "C" __global__ void jumps(float* x, int which) {
    switch (which) {
        case 0: x[1] = x[7] * 3; break;
        case 1: x[2] = sinf(x[1]); break;
        case 2: x[3] = x[5] / x[4]; break;
        case 3: x[0] = expf(x[9]) * x[3]; break;
        case 4: x[4] = x[2] - x[1] * x[1]; break;
        case 5: x[5] = logf(x[8]); break;
        case 6: x[6] = sqrtf(x[8]); break;
        case 7: x[7] = cosf(x[8]); break;
        default: x[8] = 0;
    }
}
"""

SPILLING = """
extern "C" __global__ void __launch_bounds__(1024, 1) spilling(float* p) {
    __shared__ float kept[2048];
    float v[96];
#pragma unroll
    for (int i = 0; i < 96; i++) v[i] = p[i * threadIdx.x];
    for (int round = 0; round < p[5]; round++)
#pragma unroll
        for (int i = 0; i < 96; i++) v[i] = v[i] * v[(i * 7 + 3) % 96] + p[i];
#pragma unroll
    for (int i = 0; i < 96; i++) kept[(i * threadIdx.x) % 2048] += v[i];
    __syncthreads();
    p[threadIdx.x] = kept[threadIdx.x];
}
"""
