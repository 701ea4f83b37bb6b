// The loader's side of a linear op: a tile of weights into its pages.
#pragma once

#include "cuda/barrier.h"
#include "cuda/packed.h"

namespace headrace {

// Units [u0, u1) of `num_groups` column groups from `group` on, group after group without gaps.
template <Format F, int kIn>
__device__ __forceinline__ void load_tile(const Worker w, int64_t offset, uint32_t group, uint32_t num_groups, uint32_t u0,
                                       uint32_t u1, SharedAddress to, uint32_t after) {
    wait_progress(w, after);
    trace(w, kBegun);
    constexpr int64_t kGroupBytes = group_bytes(F, kIn);
    const uint32_t run = (u1 - u0) * unit_bytes(F);
    const uint8_t* from = w.step.weights + offset + group * kGroupBytes + static_cast<int64_t>(u0) * unit_bytes(F);
    if constexpr (kIsBulkCopy) {
        if (w.lane == 0) {
            ptx::mbarrier_arrive_expect(w.landed(), num_groups * run);
            for (uint32_t i = 0; i < num_groups; i++) ptx::copy_bulk(to + i * run, from + i * kGroupBytes, run, w.landed());
        }
        ptx::sync_warp();
    } else {
        for (uint32_t i = 0; i < num_groups; i++) {
#pragma unroll 4
            for (uint32_t at = w.lane * 16; at < run; at += kLanes * 16)
                ptx::copy_async_16(to + i * run + at, from + i * kGroupBytes + at);
        }
        ptx::copy_async_arrive(w.landed());
    }
    trace(w, kWaited);
}

// Whether any span of columns [n0, n1) of the head is wanted: the same answer for both roles.
template <int kSpan>
__device__ __forceinline__ bool is_needed(const Worker& w, uint32_t n0, uint32_t n1) {
    bool is_set = false;
    for (uint32_t span = n0 / kSpan; span < (n1 + kSpan - 1) / kSpan; span++)
        is_set |= ptx::load_constant(w.step.needed_spans + span / 32) >> span % 32 & 1;
    return is_set;
}

}  // namespace headrace
