// Waits, each bounded by a clock: who waits too long reports itself and ends the kernel.
#pragma once

#include "cuda/trace.h"

namespace headrace {

constexpr uint64_t kReportNanoseconds = 10'000'000;

// Out of line, and without the worker's address: so that it stays in registers. Others that fail meanwhile let the
// first one finish: a trap ends the kernel for all.
__device__ __noinline__ inline void report_failure(Failure* failure, uint32_t instruction, uint32_t code,
                                                   uint32_t counter, uint32_t expected, uint32_t actual,
                                                   uint32_t step) {
    if (ptx::compare_exchange(&failure->code, kNoFailure, kReporting) == kNoFailure) {
        ptx::store_system(&failure->block, ptx::block());
        ptx::store_system(&failure->warp, ptx::warp());
        ptx::store_system(&failure->instruction, instruction);
        ptx::store_system(&failure->counter, counter);
        ptx::store_system(&failure->expected, expected);
        ptx::store_system(&failure->actual, actual);
        ptx::store_system(&failure->step, step);
        ptx::fence_system();
        ptx::store_system(&failure->code, code);
        ptx::fence_system();
    } else {
        const uint64_t start = ptx::nanoseconds();
        while (ptx::compare_exchange(&failure->code, kReporting, kReporting) == kReporting &&
               ptx::nanoseconds() - start < kReportNanoseconds) {}
    }
    ptx::trap();
}

__device__ __forceinline__ void fail(const Worker& w, uint32_t instruction, uint32_t code, uint32_t counter,
                                     uint32_t expected, uint32_t actual) {
    const uint32_t step = ptx::load_shared<uint32_t>(w.shared + kEpochAt) - w.step.epoch;
    report_failure(w.step.failure, instruction, code, counter, expected, actual, step);
}

// Consumers do not count instructions, which would take a register: their progress tells.
__device__ __forceinline__ uint32_t own_instruction(const Worker& w) {
    return ptx::load_shared_acquire(w.shared + kProgressAt + w.warp % kConsumerWarps * 4);
}

__device__ __forceinline__ void sync_consumers() { ptx::sync_threads(kConsumerBarrier, kConsumers); }

// Until `counter` has had `target` of this step's `arrivals`; what was written before them is then visible to all
// consumers. Counters are never reset: earlier steps have brought each of them `arrivals`.
__device__ __forceinline__ void wait_counter(const Worker& w, uint32_t counter, uint32_t target, uint32_t arrivals) {
    if (w.thread == 0) {
        const uint32_t expected = ptx::load_shared<uint32_t>(w.shared + kEpochAt) * arrivals + target;
        const uint32_t* word = w.step.counters + (counter + w.zero());  // what a layer's counters have in common is not kept
        const uint64_t start = ptx::nanoseconds();
        uint32_t actual;
        while (static_cast<int32_t>((actual = ptx::load_acquire(word)) - expected) < 0)
            if (ptx::nanoseconds() - start > w.step.timeout_ns) fail(w, own_instruction(w), kCounterWait, counter, expected, actual);
    }
    sync_consumers();
}

// A thread: until a word of a launch of several steps, or what a code and a counter tell, is at least `expected`; what it is then.
__device__ __forceinline__ uint32_t wait_word(const Worker& w, const uint32_t* word, uint32_t expected, uint32_t code = kStepWait,
                                              uint32_t counter = kNoIndex) {
    const uint64_t start = ptx::nanoseconds();
    uint32_t actual;
    while ((actual = ptx::load_acquire(word)) < expected)
        if (ptx::nanoseconds() - start > w.step.timeout_ns) fail(w, own_instruction(w), code, counter, expected, actual);
    return actual;
}

// One arrival, once all consumers have written what they had to.
__device__ __forceinline__ void signal_counter(const Worker& w, uint32_t counter) {
    sync_consumers();
    if (w.thread == 0) ptx::add_release(w.step.counters + (counter + w.zero()), 1);
}

// Consumers: until the weights of the instruction have landed.
__device__ __forceinline__ void wait_landed(const Worker& w) {
    if (ptx::mbarrier_try_wait(w.landed(), w.landed_parity())) return;  // as a rule
    const uint64_t start = ptx::nanoseconds();
    while (!ptx::mbarrier_try_wait(w.landed(), w.landed_parity()))
        if (ptx::nanoseconds() - start > w.step.timeout_ns) fail(w, own_instruction(w), kWeightsWait, kNoIndex, w.loads, w.loads);
}

// Consumers: the instruction, or so many, are done with their pages.
__device__ __forceinline__ void report_progress(const Worker& w, uint32_t instructions = 1) {
    if (kIsBulkCopy) ptx::fence_async_shared();  // pages written here may be the target of a bulk copy next
    ptx::sync_warp();
    if (w.lane == 0) ptx::add_shared_release(w.shared + kProgressAt + w.warp * 4, instructions);
}

// Loader: until all consumer warps have ended the worker's first `instructions`; they may be apart by several. It gives up
// later than the wait that holds the consumers up, which says more.
__device__ __forceinline__ void wait_progress(const Worker& w, uint32_t instructions) {
    const SharedAddress of_warp = w.shared + kProgressAt + w.lane % kConsumerWarps * 4;
    const uint64_t start = ptx::nanoseconds();
    uint32_t actual;
    while ((actual = ptx::load_shared_acquire(of_warp)) < instructions)
        if (ptx::nanoseconds() - start > 2 * w.step.timeout_ns)
            fail(w, w.instruction, kProgressWait, kNoIndex, instructions, actual);
    ptx::sync_warp();  // what a lane has seen is seen by all
}

// Before either role begins.
__device__ __forceinline__ void begin_block(const Worker& w) {
    if (w.thread == 0) {
        for (uint32_t i = 0; i < kLoadsInFlight; i++)
            ptx::mbarrier_init(w.shared + kLandedAt + 8 * i, kIsBulkCopy ? 1 : kLanes);
        ptx::fence_mbarrier_init();
        for (uint32_t i = 0; i < kConsumerWarps; i++) ptx::store_shared<uint32_t>(w.shared + kProgressAt + 4 * i, 0);
        ptx::store_shared(w.shared + kSmAt, uint2{w.sm, 0});
        ptx::store_shared(w.shared + kEpochAt, uint2{w.step.epoch, 0});
    }
    ptx::sync_threads(0, kThreads);
}

}  // namespace headrace
