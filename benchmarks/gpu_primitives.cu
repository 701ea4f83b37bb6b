// What a GPU's primitives cost: barriers of all blocks, clocks, copies to shared memory by access pattern.
// One block an SM; each leaves what it measured in `out`, in cycles of its SM or, of streams, nanoseconds.
#include "cuda/ptx/clock.h"
#include "cuda/ptx/copy.h"
#include "cuda/ptx/mbarrier.h"
#include "cuda/ptx/memory.h"
#include "cuda/ptx/warp.h"

struct Arguments {
    const uint8_t* data;  // of all blocks
    uint64_t block_bytes;
    uint32_t* counters;  // zeros
    uint32_t* out;       // [blocks][4]
    uint32_t iterations, chunk_bytes, ring_bytes, mode;
};

using namespace headrace;

__device__ __forceinline__ void put(const Arguments& a, uint32_t i, uint32_t value) { a.out[ptx::block() * 4 + i] = value; }

// mode 0: polls with acquire. 1: so too, and reads nanoseconds before it and at each poll, as a bounded wait does. 2: polls
// relaxed, then one fence.
extern "C" __global__ void __launch_bounds__(288, 1) barriers(const __grid_constant__ Arguments a) {
    const uint32_t start = ptx::cycles();
    for (uint32_t i = 0; i < a.iterations; i++) {
        __syncthreads();
        if (ptx::thread() == 0) {
            ptx::add_release(a.counters, 1);
            const uint32_t wanted = (i + 1) * ptx::num_blocks();
            if (a.mode == 0) {
                while (static_cast<int32_t>(ptx::load_acquire(a.counters) - wanted) < 0) {}
            } else if (a.mode == 1) {
                const uint64_t began = ptx::nanoseconds();
                while (static_cast<int32_t>(ptx::load_acquire(a.counters) - wanted) < 0)
                    if (ptx::nanoseconds() - began > 1000000000) ptx::trap();
            } else {
                uint32_t value;
                do asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(a.counters) : "memory");
                while (static_cast<int32_t>(value - wanted) < 0);
                asm volatile("fence.acq_rel.gpu;" ::: "memory");
            }
        }
        __syncthreads();
    }
    if (ptx::thread() == 0) put(a, 0, (ptx::cycles() - start) / a.iterations);
}

// What thread 0 alone pays for: one arrival with release after a store; one acquiring load; one load of L2; a clock.
extern "C" __global__ void __launch_bounds__(288, 1) pieces(const __grid_constant__ Arguments a) {
    if (ptx::thread() != 0) return;
    uint32_t* own = a.counters + 64 + ptx::block() * 64;
    uint32_t cost[4] = {};
    for (uint32_t i = 0; i < a.iterations; i++) {
        uint32_t start = ptx::cycles();
        ptx::store_global(own + 32, i);
        ptx::add_release(own, 1);
        cost[0] += ptx::cycles() - start;
        start = ptx::cycles();
        uint32_t seen = ptx::load_acquire(own);
        if (seen == 0xffffffff) put(a, 0, seen);
        cost[1] += ptx::cycles() - start;
        start = ptx::cycles();
        seen = ptx::load_global(own + 16);
        if (seen == 0xffffffff) put(a, 0, seen);
        cost[2] += ptx::cycles() - start;
        start = ptx::cycles();
        if (ptx::nanoseconds() == 0) put(a, 0, 1);
        cost[3] += ptx::cycles() - start;
    }
    for (int i = 0; i < 4; i++) put(a, i, cost[i] / a.iterations);
}

// `kWarps` warps copy the block's data to a ring of chunks in shared memory, as many ahead as the ring holds; another
// warp waits for each chunk and frees it. mode 0: cp.async of 16 bytes; 1: bulk copies by one lane of the first.
template <uint32_t kWarps>
__device__ __forceinline__ void stream(const Arguments& a) {
    const ptx::SharedAddress shared = ptx::shared_base();
    constexpr uint32_t kLanded = 0, kFreed = 512, kData = 1024;
    const uint32_t slots = a.ring_bytes / a.chunk_bytes, chunks = a.block_bytes / a.chunk_bytes;
    const bool is_bulk = a.mode == 1;
    if (ptx::thread() == 0) {
        for (uint32_t i = 0; i < slots; i++) {
            ptx::mbarrier_init(shared + kLanded + i * 8, is_bulk ? 1 : 32 * kWarps);
            ptx::mbarrier_init(shared + kFreed + i * 8, 1);
        }
        ptx::fence_mbarrier_init();
    }
    __syncthreads();
    const uint8_t* data = a.data + ptx::block() * a.block_bytes;
    const uint64_t start = ptx::nanoseconds();
    if (ptx::warp() < kWarps) {
        for (uint32_t i = 0; i < chunks; i++) {
            const uint32_t slot = i % slots, round = i / slots;
            if (round > 0)
                while (!ptx::mbarrier_try_wait(shared + kFreed + slot * 8, (round - 1) & 1)) {}
            const ptx::SharedAddress to = shared + kData + slot * a.chunk_bytes;
            const uint8_t* from = data + static_cast<uint64_t>(i) * a.chunk_bytes;
            if (is_bulk) {
                if (ptx::thread() == 0) {
                    ptx::mbarrier_arrive_expect(shared + kLanded + slot * 8, a.chunk_bytes);
                    ptx::copy_bulk(to, from, a.chunk_bytes, shared + kLanded + slot * 8);
                }
                ptx::sync_warp();
            } else {
#pragma unroll 4
                for (uint32_t at = ptx::thread() * 16; at < a.chunk_bytes; at += kWarps * 32 * 16)
                    ptx::copy_async_16(to + at, from + at);
                ptx::copy_async_arrive(shared + kLanded + slot * 8);
            }
        }
    } else if (ptx::warp() == 8) {
        for (uint32_t i = 0; i < chunks; i++) {
            const uint32_t slot = i % slots, round = i / slots;
            while (!ptx::mbarrier_try_wait(shared + kLanded + slot * 8, round & 1)) {}
            if (ptx::lane() == 0) ptx::mbarrier_arrive(shared + kFreed + slot * 8);
            ptx::sync_warp();
        }
        if (ptx::lane() == 0) put(a, 0, static_cast<uint32_t>(ptx::nanoseconds() - start));
    }
}

extern "C" __global__ void __launch_bounds__(288, 1) streams1(const __grid_constant__ Arguments a) { stream<1>(a); }
extern "C" __global__ void __launch_bounds__(288, 1) streams2(const __grid_constant__ Arguments a) { stream<2>(a); }
extern "C" __global__ void __launch_bounds__(288, 1) streams4(const __grid_constant__ Arguments a) { stream<4>(a); }
