// Waits, each bounded by a clock: who waits too long reports itself and ends the kernel.
#pragma once

#include "cuda/machine.h"

namespace headrace {

// Out of line, and without the worker's address: so that it stays in registers.
__device__ __noinline__ inline void report_failure(Failure* failure, uint32_t instruction, uint32_t code,
                                                   uint32_t counter, uint32_t expected, uint32_t actual) {
    if (ptx::compare_exchange(&failure->code, kNoFailure, code) == kNoFailure) {
        ptx::store_system(&failure->block, ptx::block());
        ptx::store_system(&failure->warp, ptx::warp());
        ptx::store_system(&failure->instruction, instruction);
        ptx::store_system(&failure->counter, counter);
        ptx::store_system(&failure->expected, expected);
        ptx::store_system(&failure->actual, actual);
        ptx::store_system(&failure->op, kNoIndex);
        ptx::fence_system();
    }
    ptx::trap();
}

__device__ __forceinline__ void fail(const Worker& w, uint32_t code, uint32_t counter, uint32_t expected,
                                     uint32_t actual) {
    report_failure(w.step.failure, w.instruction, code, counter, expected, actual);
}

__device__ __forceinline__ void sync_consumers() { ptx::sync_threads(kConsumerBarrier, kConsumers); }

// Until `counter` has had `target` of this step's `arrivals`; what was written before them is then visible to all
// consumers. Counters are never reset: earlier steps have brought each of them `arrivals`.
__device__ __forceinline__ void wait_counter(const Worker& w, uint32_t counter, uint32_t target, uint32_t arrivals) {
    if (w.thread == 0) {
        const uint32_t expected = w.step.epoch * arrivals + target;
        const uint64_t start = ptx::nanoseconds();
        uint32_t actual;
        while (static_cast<int32_t>((actual = ptx::load_acquire(w.step.counters + counter)) - expected) < 0)
            if (ptx::nanoseconds() - start > w.step.timeout_ns) fail(w, kCounterWait, counter, expected, actual);
    }
    sync_consumers();
}

// One arrival, once all consumers have written what they had to.
__device__ __forceinline__ void signal_counter(const Worker& w, uint32_t counter) {
    sync_consumers();
    if (w.thread == 0) ptx::add_release(w.step.counters + counter, 1);
}

// Consumers: until the weights of the instruction have landed.
__device__ __forceinline__ void wait_landed(const Worker& w) {
    const uint64_t start = ptx::nanoseconds();
    while (!ptx::mbarrier_try_wait(w.landed(), w.landed_parity()))
        if (ptx::nanoseconds() - start > w.step.timeout_ns) fail(w, kWeightsWait, kNoIndex, w.loads, w.loads);
}

// Consumers: the instruction is done with its pages.
__device__ __forceinline__ void report_progress(const Worker& w) {
    if (kIsBulkCopy) ptx::fence_async_shared();  // pages written here may be the target of a bulk copy next
    ptx::sync_warp();
    if (w.lane == 0) ptx::add_shared_release(w.shared + kProgressAt, 1);
}

// Loader: until the consumers have ended the worker's first `instructions`.
__device__ __forceinline__ void wait_progress(const Worker& w, uint32_t instructions) {
    const uint32_t expected = instructions * kConsumerWarps;
    const uint64_t start = ptx::nanoseconds();
    uint32_t actual;
    while ((actual = ptx::load_shared_acquire(w.shared + kProgressAt)) < expected)
        if (ptx::nanoseconds() - start > w.step.timeout_ns) fail(w, kProgressWait, kNoIndex, expected, actual);
}

// Before either role begins.
__device__ __forceinline__ void begin_block(const Worker& w) {
    if (w.thread == 0) {
        for (uint32_t i = 0; i < kLoadsInFlight; i++)
            ptx::mbarrier_init(w.shared + kLandedAt + 8 * i, kIsBulkCopy ? 1 : kLanes);
        ptx::fence_mbarrier_init();
        ptx::store_shared<uint32_t>(w.shared + kProgressAt, 0);
        ptx::store_shared(w.shared + kSmAt, uint2{w.sm, 0});
    }
    ptx::sync_threads(0, kThreads);
}

}  // namespace headrace
