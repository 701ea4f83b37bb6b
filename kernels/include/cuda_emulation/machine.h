// The state of a run: blocks of warps of lanes, what each waits for, and what each knows.
#pragma once

#include <cstdarg>
#include <cstdio>

#include "clocks.h"
#include "operations.h"
#include "report.h"

namespace headrace::emulation {

constexpr uint32_t kLanes = 32, kAllLanes = 0xffffffff;
constexpr uint32_t kNamedBarriers = 16;
constexpr uint32_t kMostMbarriers = 16;  // a block
constexpr uint32_t kMostWarps = 32;      // a block
constexpr uint32_t kMostKnown = 4;

struct Cell;
struct Lane;
struct Warp;
struct Block;
struct Copy;

enum class Op : uint8_t {
    kNone, kLoadShared, kStoreShared, kLoadGlobal, kStoreGlobal, kLoadConstant, kPrefetch,
    kLoadSharedAcquire, kAddSharedRelease, kLoadAcquire, kAddRelease, kAddAcquireRelease, kCompareExchange, kStoreSystem,
    kCopyAsync, kCopyAsyncArrive, kCopyAsyncCommit, kCopyAsyncWait, kCopyBulk, kFenceAsyncShared,
    kMbarrierInit, kFenceMbarrierInit, kMbarrierArrive, kMbarrierTryWait,
    kSyncWarp, kSyncThreads, kShuffleXor, kShuffle, kBallot, kMmaBf16, kMmaF16, kLoadMatrix,
    kNanoseconds, kSleep, kTrap,
};
constexpr const char* kOpNames[] = {
    "nothing", "load_shared", "store_shared", "load_global", "store_global", "load_constant", "prefetch",
    "load_shared_acquire", "add_shared_release", "load_acquire", "add_release", "add_acquire_release", "compare_exchange", "store_system",
    "copy_async_16", "copy_async_arrive", "copy_async_commit", "copy_async_wait", "copy_bulk", "fence_async_shared",
    "mbarrier_init", "fence_mbarrier_init", "mbarrier_arrive", "mbarrier_try_wait",
    "sync_warp", "sync_threads", "shuffle_xor", "shuffle", "ballot", "mma_bf16", "mma_f16", "load_matrix_x4",
    "nanoseconds", "sleep_ns", "trap",
};
inline const char* name_of(Op op) { return kOpNames[static_cast<int>(op)]; }

// A list of lanes that poll the same thing, to be woken when it changes.
struct Waiters {
    Lane* first = nullptr;
    uint32_t version = 0;  // changes so far
};

// An integer that lanes add to and poll.
struct Word {
    uint64_t address = 0;
    uint64_t run = 0;  // of an earlier one: empty
    Clock* released = nullptr;
    Waiters waiters;
};

struct Mbarrier {
    uint32_t offset, arrivals, pending, phase;
    int64_t pending_bytes;
    uint32_t who;          // component of clocks
    bool is_fenced;        // bulk copies may use it
    Clock* completed;      // what those who wait get to know
    Clock* arriving;       // of the phase that runs, or none
    Waiters waiters;
};

struct NamedBarrier {
    uint32_t num_threads = 0, arrived = 0;  // bits of warps
    uint32_t site = 0;
};

struct Lane {
    Fiber fiber;
    const char* stack;
    Identity identity;
    Warp* warp;
    Block* block;
    Clock* known[kMostKnown];  // what it alone has acquired since its warp was last in step
    uint32_t num_known;
    // What it polled last without doing anything else since.
    const Waiters* polled;
    uint32_t polled_version;
    bool is_parked;
    uint32_t fenced_in;  // Warp::latest when it last fenced, or 0 if it has acquired something since
    Lane* next_waiter;
    // The last operation, for reports.
    Op op;
    uint32_t site, operand[2];
    uint64_t address;
    // Copies: issued but not yet handed to an mbarrier, latest first; handed over, oldest first.
    Copy *unclaimed, *first_batch, *last_batch;
    uint32_t num_groups;  // of copies that it has ended
};

struct Warp {
    uint32_t index, in_block;
    Block* block;
    Lane* lanes;
    uint32_t runnable, collected, exited, dirty, knowing;  // bits of lanes
    uint32_t ready_at;                                     // in Machine::ready, or kNotReady
    uint32_t rank;
    // An access is named by its lane's time. Those up to in_step come before whatever the warp does now.
    uint32_t in_step, latest;
    uint32_t times[kLanes];
    Clock* base;
    // The collective that lanes wait at.
    Op op;
    uint32_t operand[2], site, first_lane;
    uint32_t inputs[kLanes], results[kLanes];
    uint32_t a[kLanes][4], b[kLanes][2];
    float c[kLanes][4];
    // Times of its lanes' last fences between shared memory and bulk copies.
    static constexpr uint32_t kFences = 8;
    uint32_t fences[kLanes][kFences], num_fences[kLanes];
};

struct Block {
    uint32_t index;
    char* shared;
    Cell* shadow;
    Warp* warps;
    NamedBarrier barriers[kNamedBarriers];
    Mbarrier mbarriers[kMostMbarriers];
    uint32_t num_mbarriers;
};

// A region, and its shadow if it is writable.
struct Memory {
    Region region;
    uint64_t begin, end;
    Cell* shadow;
};

constexpr uint32_t kNotReady = 0xffffffff;
constexpr uint32_t kMostMemories = 256;

enum class Strategy : uint32_t { kUniform, kRankedWarps, kRankedBlocks, kRankedRoles };

struct Machine {
    EmulationConfig config;
    EmulationReport* report;
    void (*call)(const void* kernel, const void* arguments);
    const void* kernel;
    const void* arguments;
    uint64_t run = 0;
    uint64_t random;
    uint32_t num_warps, warps_a_block, num_lanes;
    Lane* lanes;
    Warp* warps;
    Block* blocks;
    Memory memories[kMostMemories];
    uint32_t num_memories;
    Memory* last_memory;
    Fiber host;
    Stacks stacks;
    Clocks clocks;

    Warp** ready;
    uint32_t num_ready, num_exited;
    Strategy strategy;
    bool is_descending, has_news;  // order of lanes; whether a warp became ready since one was chosen
    uint32_t until_switch, switch_interval, until_rank, until_copy, copy_interval;

    uint64_t operations, check_at, switches, collectives, accesses, num_copies, num_stores;
    uint64_t polls, idle_polls, actions_before, idle_actions, slept_ns;
    uint32_t expiries;
};

inline Machine machine;
inline Lane* self;

inline const Identity& identity() { return self->identity; }

inline uint32_t random_below(uint32_t bound) {  // xorshift64*
    uint64_t& state = machine.random;
    state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
    return static_cast<uint32_t>((state * 0x2545f4914f6cdd1d >> 32) * bound >> 32);
}

// Where the kernel's call of an operation stands. Only for functions that are not inlined.
extern "C" __attribute__((visibility("hidden"))) const char __ehdr_start;
#define HEADRACE_SITE() \
    static_cast<uint32_t>(static_cast<const char*>(__builtin_return_address(0)) - 1 - &headrace::emulation::__ehdr_start)

}  // namespace headrace::emulation
