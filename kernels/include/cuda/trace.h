// When an SM's instructions did what, in kernels built with HEADRACE_TRACE; in others nothing of this is there.
#pragma once

#include "cuda/machine.h"

#ifndef HEADRACE_TRACE
#define HEADRACE_TRACE 0
#endif

namespace headrace {

constexpr bool kIsTraced = HEADRACE_TRACE;
constexpr uint32_t kTraceEvents = 8;

// Of an instruction; of several that run as one, the first has the earlier events and the last the later.
enum TraceEvent : uint32_t {
    kBegun = 0,       // consumers have come to it; of the loader: its pages are free
    kWaited = 1,      // what it waits for is there; of the loader: its copies are under way
    kStaged = 2,      // its input is in shared memory
    kLanded = 3,      // its weights are
    kMultiplied = 4,  // its sums are done
    kSignalled = 5,   // what it wrote is there for others
};

// One thread of a role tells. After its instructions: clocks of cycles and of nanoseconds, when the role began and ended.
__device__ __forceinline__ void trace_word(const Worker& w, uint32_t instruction, uint32_t word, uint32_t value) {
    if (w.lane != 0 || (w.warp != 0 && !w.is_loader())) return;
    const uint32_t role = w.sm * 2 + w.is_loader();
    ptx::store_global(w.step.trace + (role * (w.step.trace_instructions + 1) + instruction) * kTraceEvents + word, value);
}

__device__ __forceinline__ void trace(const Worker& w, TraceEvent event, uint32_t instructions_before = 0) {
    if constexpr (kIsTraced) trace_word(w, w.instruction - instructions_before, event, ptx::cycles());
}

__device__ __forceinline__ void trace_clocks(const Worker& w, bool has_ended) {
    if constexpr (kIsTraced) {
        const uint32_t word = has_ended ? 2 : 0;
        trace_word(w, w.step.trace_instructions, word, ptx::cycles());
        trace_word(w, w.step.trace_instructions, word + 1, static_cast<uint32_t>(ptx::nanoseconds()));
    }
}

}  // namespace headrace
