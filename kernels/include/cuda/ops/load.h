// The loader's side of a linear op: a tile of weights into its pages.
#pragma once

#include "cuda/barrier.h"
#include "cuda/packed.h"

#ifndef HEADRACE_BYTES_IN_FLIGHT
#define HEADRACE_BYTES_IN_FLIGHT 32768
#endif

namespace headrace {

// What a loader lets be under way at once: enough for the memory's bandwidth. Where all SMs ask for all that they have
// room for, counters and activations queue behind it for microseconds.
constexpr uint32_t kBytesInFlight = HEADRACE_BYTES_IN_FLIGHT;
constexpr uint32_t kCopyGroupBytes = 2048;

// Units [u0, u1) of `num_groups` column groups from `group` on, group after group without gaps, once the consumers have ended
// the worker's first `after` instructions.
template <Format F, int kIn>
__device__ __forceinline__ void load_units(const Worker& w, int64_t offset, uint32_t group, uint32_t num_groups, uint32_t u0,
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
#pragma unroll 1
            for (uint32_t base = w.lane * 16; base < run; base += kCopyGroupBytes) {
#pragma unroll
                for (uint32_t j = 0; j < kCopyGroupBytes; j += kLanes * 16)
                    if (base + j < run) ptx::copy_async_16(to + i * run + base + j, from + i * kGroupBytes + base + j);
                ptx::copy_async_commit();
                ptx::copy_async_pace<kBytesInFlight / kCopyGroupBytes - 1>();
            }
        }
        ptx::copy_async_arrive(w.landed());
    }
    trace(w, kWaited);
}

// A tile's weights in loads of kLoadUnits units: load i to page_of(i), as soon as after_of(i) instructions have ended.
template <Format F, int kIn, uint32_t kLoadUnits, class PageOf, class AfterOf>
__device__ __forceinline__ void load_tile(Worker& w, int64_t offset, uint32_t group, uint32_t num_groups, const PageOf& page_of,
                                          const AfterOf& after_of) {
    constexpr uint32_t kUnits = num_units(F, kIn), kLoads = (kUnits + kLoadUnits - 1) / kLoadUnits;
#pragma unroll 1
    for (uint32_t load = 0; load < kLoads; load++) {
        const uint32_t u0 = load * kLoadUnits, u1 = u0 + kLoadUnits < kUnits ? u0 + kLoadUnits : kUnits;
        load_units<F, kIn>(w, offset, group, num_groups, u0, u1, page_of(load), after_of(load));
        w.next(1);
    }
}

// Whether any span of columns [n0, n1) of the head is wanted: the same answer for both roles.
template <int kSpan>
__device__ __forceinline__ bool is_needed(const Worker& w, uint32_t n0, uint32_t n1) {
    bool is_set = false;
#pragma unroll 1
    for (uint32_t span = n0 / kSpan; span < (n1 + kSpan - 1) / kSpan; span++)
        is_set |= ptx::load_constant(w.step.needed_spans + span / 32) >> span % 32 & 1;
    return is_set;
}

}  // namespace headrace
