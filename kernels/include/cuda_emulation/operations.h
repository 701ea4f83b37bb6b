// What the emulated `cuda/ptx/` calls, each on behalf of the lane that runs. Any of these may let other lanes run
// before it returns, and never returns if the run ends.
#pragma once

#include "syntax.h"

namespace headrace::emulation {

// Who runs.
struct Identity {
    uint32_t thread, lane, warp, block, num_blocks;
};
const Identity& identity();

// Not inlined: where it returns to tells reports which line of the kernel asked for it.
#define HEADRACE_OPERATION __attribute__((noinline))

// Checked accesses: where the bytes are in host memory. num_bytes is a power of two up to 16.
constexpr uint32_t kSharedBase = 1024;  // not 0, as on a device
template <uint32_t num_bytes>
HEADRACE_OPERATION const void* shared_to_load(uint32_t from);
template <uint32_t num_bytes>
HEADRACE_OPERATION void* shared_to_store(uint32_t to);
template <uint32_t num_bytes>
HEADRACE_OPERATION const void* global_to_load(const void* from);
template <uint32_t num_bytes>
HEADRACE_OPERATION const void* constant_to_load(const void* from);
template <uint32_t num_bytes>
HEADRACE_OPERATION void* global_to_store(void* to);
HEADRACE_OPERATION void prefetch(const void* from);
void keep_store(const void* to, const void* value, uint32_t num_bytes);  // to the journal; lets nobody else run

HEADRACE_OPERATION uint32_t load_shared_acquire(uint32_t from);
HEADRACE_OPERATION void add_shared_release(uint32_t to, uint32_t value);
HEADRACE_OPERATION uint32_t load_acquire(const uint32_t* from);
HEADRACE_OPERATION void add_release(uint32_t* to, uint32_t value);
HEADRACE_OPERATION uint32_t add_acquire_release(uint32_t* to, uint32_t value);
HEADRACE_OPERATION uint32_t compare_exchange(uint32_t* at, uint32_t expected, uint32_t desired);
HEADRACE_OPERATION void store_system(uint32_t* to, uint32_t value);

HEADRACE_OPERATION void copy_async(uint32_t to, const void* from);
HEADRACE_OPERATION void copy_async_arrive(uint32_t mbarrier);
HEADRACE_OPERATION void copy_async_commit();
HEADRACE_OPERATION void copy_async_wait(uint32_t num_groups);
HEADRACE_OPERATION void copy_bulk(uint32_t to, const void* from, uint32_t num_bytes, uint32_t mbarrier);
HEADRACE_OPERATION void fence_async_shared();

HEADRACE_OPERATION void mbarrier_init(uint32_t at, uint32_t arrivals);
HEADRACE_OPERATION void fence_mbarrier_init();
HEADRACE_OPERATION void mbarrier_arrive(uint32_t at, uint32_t expected_bytes);
HEADRACE_OPERATION bool mbarrier_try_wait(uint32_t at, uint32_t parity);

HEADRACE_OPERATION void sync_warp();
HEADRACE_OPERATION void sync_threads(uint32_t id, uint32_t num_threads);
HEADRACE_OPERATION uint32_t shuffle_xor(uint32_t value, uint32_t mask);
HEADRACE_OPERATION uint32_t shuffle(uint32_t value, uint32_t lane);
HEADRACE_OPERATION uint32_t ballot(bool value);
enum class MmaType { kBf16, kF16 };
HEADRACE_OPERATION void mma(MmaType type, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
HEADRACE_OPERATION void load_matrix_x4(uint32_t (&r)[4], uint32_t row);

HEADRACE_OPERATION uint64_t nanoseconds();
HEADRACE_OPERATION void sleep_ns(uint32_t duration);
HEADRACE_OPERATION void trap();

}  // namespace headrace::emulation
