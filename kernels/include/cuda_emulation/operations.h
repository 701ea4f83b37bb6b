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

// Checked accesses: where the bytes are in host memory. num_bytes is a power of two up to 16.
constexpr uint32_t kSharedBase = 1024;  // not 0, as on a device
template <uint32_t num_bytes>
const void* shared_to_load(uint32_t from);
template <uint32_t num_bytes>
void* shared_to_store(uint32_t to);
template <uint32_t num_bytes>
const void* global_to_load(const void* from);
template <uint32_t num_bytes>
const void* constant_to_load(const void* from);
template <uint32_t num_bytes>
void* global_to_store(void* to);
void prefetch(const void* from);

uint32_t load_shared_acquire(uint32_t from);
void add_shared_release(uint32_t to, uint32_t value);
uint32_t load_acquire(const uint32_t* from);
void add_release(uint32_t* to, uint32_t value);
uint32_t compare_exchange(uint32_t* at, uint32_t expected, uint32_t desired);
void store_system(uint32_t* to, uint32_t value);

void copy_async(uint32_t to, const void* from);
void copy_async_arrive(uint32_t mbarrier);
void copy_bulk(uint32_t to, const void* from, uint32_t num_bytes, uint32_t mbarrier);
void fence_async_shared();

void mbarrier_init(uint32_t at, uint32_t arrivals);
void fence_mbarrier_init();
void mbarrier_arrive(uint32_t at, uint32_t expected_bytes);
bool mbarrier_try_wait(uint32_t at, uint32_t parity);

void sync_warp();
void sync_threads(uint32_t id, uint32_t num_threads);
uint32_t shuffle_xor(uint32_t value, uint32_t mask);
uint32_t shuffle(uint32_t value, uint32_t lane);
uint32_t any(bool value);
enum class MmaType { kBf16, kF16 };
void mma(MmaType type, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void load_matrix_x4(uint32_t (&r)[4], uint32_t row);

uint64_t nanoseconds();
void sleep_ns(uint32_t duration);
void trap();

}  // namespace headrace::emulation
