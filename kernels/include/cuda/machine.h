// A block: its warps' roles, what its shared memory holds, and what a thread knows of itself.
#pragma once

#include "cuda/convert.h"
#include "cuda/ptx/clock.h"
#include "cuda/ptx/copy.h"
#include "cuda/ptx/mbarrier.h"
#include "cuda/ptx/memory.h"
#include "cuda/ptx/mma.h"
#include "cuda/ptx/warp.h"
#include "cuda/step.h"

#ifndef HEADRACE_BULK_COPY
#define HEADRACE_BULK_COPY 0
#endif

namespace headrace {

using ptx::SharedAddress;

constexpr uint32_t kLanes = 32;
constexpr uint32_t kConsumerWarps = 8;  // all compute, and store what they computed
constexpr uint32_t kConsumers = kConsumerWarps * kLanes;
constexpr uint32_t kLoaderWarp = kConsumerWarps;
constexpr uint32_t kThreads = kConsumers + kLanes;
constexpr uint32_t kConsumerBarrier = 1;  // named barrier; 0 is the whole block's
constexpr bool kIsBulkCopy = HEADRACE_BULK_COPY;

constexpr int kRowChunk = 16;   // rows that are in shared memory, as the tensor cores read them, at once
constexpr int kColumnGroup = 16;  // output columns of one matrix instruction
constexpr uint32_t kLoadsInFlight = 8;

// Shared memory before the program's pages, in bytes.
constexpr uint32_t kLandedAt = 0;       // [kLoadsInFlight] mbarriers: a load's weights are there
constexpr uint32_t kProgressAt = 64;    // [kConsumerWarps] instructions that a warp has ended
constexpr uint32_t kSmAt = 96;          // the block's own number, and 0: see Worker::begin_call
constexpr uint32_t kEpochAt = 104;      // the step's: see StepArguments
constexpr uint32_t kBegunAt = 108;      // steps begun after the first, and kLastStep
constexpr uint32_t kScalesAt = 128;     // [kRowChunk] floats: what RMS norm multiplies a row's sums by
constexpr uint32_t kSelectionAt = 192;  // [kConsumerWarps] of 8 bytes and of 4: a step's results; rows to merge; a head to finish
constexpr uint32_t kDealtAt = 288;      // how many splits attention has here, and the first kMostDealt of them
constexpr uint32_t kMostDealt = 55;
constexpr uint32_t kAttendingAt = 512;  // [kLanes] of 16 bytes: attention's rows
constexpr uint32_t kSumsAt = 1024;      // of a linear op's warps: [column groups][kConsumerWarps][rows][kColumnGroup] floats;
                                        // in attention see AttentionShape
constexpr uint32_t kSumsBytes = 16384;
static_assert(kDealtAt + 4 * (1 + kMostDealt) <= kAttendingAt && kAttendingAt + 16 * kLanes <= kSumsAt);
constexpr uint32_t kReservedBytes = kSumsAt + kSumsBytes;

// One thread's view. Both roles count loads alike, as they take the same path; the loader counts instructions, too.
// It is handed to functions by value, so that it stays in registers; paths do the counting.
struct Worker {
    const StepArguments& step;
    SharedAddress shared;
    uint32_t sm, warp, lane, thread;
    uint32_t instruction = 0;  // of the worker's sequence, from 0
    uint32_t loads = 0;        // weight tiles before this instruction's
    uint32_t staged = 0;       // which input is in shared memory, by a number that is never 0; 0: none

    __device__ __forceinline__ explicit Worker(const StepArguments& arguments)
        : step(arguments),
          shared(ptx::shared_base()),
          sm(ptx::block()),
          warp(ptx::warp()),
          lane(ptx::lane()),
          thread(ptx::thread()) {}

    // Before a call. The compiler cannot know that these loads bring what they always bring: it has no reason to
    // hold all calls' literals and addresses in registers through the loop over layers, where most would spill.
    __device__ __forceinline__ void begin_call() {
        renew();
        staged = 0;
    }
    // The same for a tile of a call.
    __device__ __forceinline__ void renew() {
        const uint2 own = ptx::load_shared<uint2>(shared + kSmAt);
        sm = own.x;
        thread = ptx::thread() + own.y;
        warp = thread / kLanes;
        lane = thread % kLanes;
    }
    // A zero that the compiler does not know. What is computed from it is computed where it is used.
    __device__ __forceinline__ uint32_t zero() const { return ptx::load_shared<uint32_t>(shared + kSmAt + 4); }
    // After an instruction, or in its place where a step has no use for it.
    __device__ __forceinline__ void next(uint32_t num_loads, uint32_t instructions = 1) {
        instruction += instructions;
        loads += num_loads;
    }
    // Whether input `number` is yet to be brought to shared memory; from now on it is there.
    __device__ __forceinline__ bool takes(uint32_t number) {
        const bool is_new = staged != number;
        staged = number;
        return is_new;
    }
    __device__ __forceinline__ bool is_loader() const { return warp == kLoaderWarp; }
    __device__ __forceinline__ SharedAddress landed() const {
        return shared + kLandedAt + loads % kLoadsInFlight * 8;
    }
    __device__ __forceinline__ uint32_t landed_parity() const { return loads / kLoadsInFlight & 1; }
    __device__ __forceinline__ SharedAddress page(uint32_t number, uint32_t page_bytes) const {
        return shared + kReservedBytes + number * page_bytes;
    }
};

}  // namespace headrace
