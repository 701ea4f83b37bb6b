// What a run is given and what it tells: megakernel/emulation.py has the ctypes twins.
#pragma once

#include <cstdint>

namespace headrace::emulation {

enum Status : uint32_t {
    kOk,
    kRace,           // two accesses of which neither happens before the other
    kBounds,         // outside shared memory, or outside every region
    kAlignment,
    kUninitialised,  // bytes read that were never written
    kReadOnly,       // a write to a region that is not writable
    kConstant,       // load_constant of what is written in the launch
    kInFlight,       // bytes that an asynchronous copy is still writing
    kDeadlock,
    kDivergence,     // lanes of a warp at different collectives
    kBarrierMisuse,  // an mbarrier or a named barrier used as it must not be
    kTrap,
    kOperations,     // more than max_operations
    kStack,          // a thread's stack is full
    kCall,           // no such kernel, or a configuration that makes no sense
};

enum RegionFlags : uint32_t { kWritable = 1, kUninitialisedRegion = 2 };

enum Poison : uint32_t { kZeros, kOnes, kRandom };  // in memory that nobody has written

// Global memory that a kernel may touch. Regions do not overlap.
struct Region {
    const char* name;
    void* base;
    uint64_t num_bytes;
    uint32_t flags, unused;
};

// An entry of a run's journal: what a thread stored to global memory, and where.
struct Store {
    uint64_t address;
    uint32_t num_bytes, unused;
    uint8_t value[16];
};

}  // namespace headrace::emulation

struct EmulationConfig {
    uint32_t num_blocks, threads_per_block, shared_bytes, num_regions;
    const headrace::emulation::Region* regions;
    uint64_t seed, max_operations;
    uint32_t poison;
    uint32_t expires_waits;  // when all wait, time passes before that is called a deadlock
    headrace::emulation::Store* journal;  // in the order in which they run; null: not kept
    uint64_t journal_stores;              // it has room for
};

// Indices are -1 where there is none. Sources are given as @ and an offset into the library, in hexadecimal.
struct EmulationReport {
    uint32_t status;
    int32_t block, warp, lane;  // who failed
    char place[64];             // "shared", or the region's name; empty if no memory is to blame
    int64_t offset;             // into it
    uint64_t operations, switches, collectives, accesses, copies, stores;
    char message[4096];
};

static_assert(sizeof(headrace::emulation::Region) == 32 && sizeof(EmulationConfig) == 64);
static_assert(sizeof(EmulationReport) == 4232 && sizeof(headrace::emulation::Store) == 32);
