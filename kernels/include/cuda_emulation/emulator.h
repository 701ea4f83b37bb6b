// A launch of a kernel, from the first thread's start to the last one's end.
//
// Threads are fibers of one core (fiber.h), lanes of warps of blocks (machine.h). Each runs until it waits for others or
// the seed makes it give way (scheduler.h). What they do together is in collectives.h; what orders them in knowledge.h,
// words.h, mbarriers.h and copies.h; accesses.h checks each load and store against what shadow.h has kept of earlier
// ones. What is found wrong ends the run (failures.h). Not emulated: caches, so a race is found by what orders its two
// sides and never by a stale value; and endless loops without any operation of cuda/ptx/.
#pragma once

#include "collectives.h"
#include "copies.h"

namespace headrace::emulation {

uint64_t nanoseconds() {
    begin_poll(Op::kNanoseconds, 0, HEADRACE_SITE());
    return machine.operations + machine.slept_ns;
}

void sleep_ns(uint32_t duration) {
    begin_poll(Op::kSleep, duration, HEADRACE_SITE());
    machine.slept_ns += duration;
    switch_point();
}

void trap() {
    begin(Op::kTrap, 0, HEADRACE_SITE());
    fail(kTrap, "the kernel ended itself");
}

// What a lane that has stopped is waiting for.
inline void add_wait(Text& text, const Lane& lane) {
    const Warp& warp = *lane.warp;
    text.add("%s", name_of(lane.op));
    switch (lane.op) {
        case Op::kLoadAcquire:
            text.add(" of "), add_place(text, place_of(reinterpret_cast<const void*>(lane.address)));
            text.add(", which is %u", lane.operand[0]);
            break;
        case Op::kLoadSharedAcquire:
            text.add(" of shared memory + %u, which is %u", static_cast<uint32_t>(lane.address) - kSharedBase,
                     lane.operand[0]);
            break;
        case Op::kMbarrierTryWait: {
            const uint32_t offset = static_cast<uint32_t>(lane.address) - kSharedBase;
            text.add("(parity %u) of shared memory + %u", lane.operand[0], offset);
            if (const Mbarrier* mbarrier = find_mbarrier(*lane.block, offset))
                text.add(", whose phase %u misses %u of %u arrivals and %lld bytes", mbarrier->phase, mbarrier->pending,
                         mbarrier->arrivals, static_cast<long long>(mbarrier->pending_bytes));
            break;
        }
        case Op::kSyncThreads:
            if (warp.collected & lane_bit(lane)) {
                text.add("(%u, %u), without the other lanes", lane.operand[0], lane.operand[1]);
            } else {
                const uint32_t arrived = lane.block->barriers[lane.operand[0]].arrived;
                text.add("(%u, %u), which misses %u threads", lane.operand[0], lane.operand[1],
                         lane.operand[1] - __builtin_popcount(arrived) * kLanes);
            }
            break;
        default:
            if (warp.collected & lane_bit(lane)) text.add(", without the other lanes");
            break;
    }
    text.add(" @%x", lane.site);
}

inline bool is_same_wait(const Lane& a, const Lane& b) {
    return a.op == b.op && a.site == b.site && a.address == b.address && a.operand[0] == b.operand[0] &&
           a.operand[1] == b.operand[1];
}

// Lanes of a warp among `lanes` that wait for the same as its first.
inline uint32_t alike(const Warp& warp, const Lane& first, uint32_t lanes) {
    uint32_t found = 0;
    for (uint32_t rest = lanes; rest; rest &= rest - 1)
        if (is_same_wait(first, warp.lanes[__builtin_ctz(rest)])) found |= rest & -rest;
    return found;
}

// All of whose lanes wait for the same as `first`.
inline bool is_whole(const Warp& warp, const Lane& first) {
    return !warp.exited && alike(warp, first, kAllLanes) == kAllLanes;
}

// A line for each thing that lanes of a block wait for.
inline void add_waits(Text& text, const Block& block) {
    uint32_t told = 0;  // bits of warps
    for (uint32_t i = 0; i < machine.warps_a_block; i++) {
        const Warp& warp = block.warps[i];
        if (told >> i & 1) continue;
        for (uint32_t left = ~warp.exited; left;) {
            const Lane& lane = warp.lanes[__builtin_ctz(left)];
            const uint32_t lanes = alike(warp, lane, left);
            left &= ~lanes;
            constexpr uint64_t kLine = 300;
            if (text.left() < kLine) return;
            text.add("\nblock %u warp %u", block.index, i);
            if (lanes == kAllLanes) {
                for (uint32_t other = i + 1; other < machine.warps_a_block; other++)
                    if (is_whole(block.warps[other], lane)) text.add(" %u", other), told |= 1u << other;
                text.add(": ");
            } else if (lanes == lane_bit(lane)) {
                text.add(" lane %u: ", lane.identity.lane);
            } else {
                text.add(" lanes %08x: ", lanes);
            }
            add_wait(text, lane);
        }
    }
}

[[noreturn]] __attribute__((noinline)) inline void report_deadlock() {
    Text text = message();
    text.add("no thread can go on:");
    for (uint32_t i = 0; i < machine.config.num_blocks; i++) add_waits(text, machine.blocks[i]);
    // The first that polls is to blame, or else the first of all.
    const Lane* blamed = nullptr;
    for (uint32_t i = 0; i < machine.num_lanes; i++) {
        Lane& lane = machine.lanes[i];
        if (lane.warp->exited & lane_bit(lane) || (blamed && !(lane.is_parked && !blamed->is_parked))) continue;
        blamed = self = &lane;
    }
    const bool is_global = blamed->op == Op::kLoadAcquire;
    end_run(kDeadlock, is_global ? place_of(reinterpret_cast<const void*>(blamed->address)) : Place{nullptr, -1, 0});
}

[[noreturn]] inline void end_lane() {
    Warp& warp = *self->warp;
    if (warp.collected) {
        const Lane& other = warp.lanes[warp.first_lane];
        Text text = message();
        add_lane(text, *self);
        text.add(": ends, while lane %u waits for it at %s @%x", other.identity.lane, name_of(warp.op), warp.site);
        end_run(kDivergence);
    }
    warp.exited |= lane_bit(*self);
    stop_running(*self);
    if (++machine.num_exited < machine.num_lanes) leave();
    for (uint32_t i = 0; i < copies.num_completable; i++) {
        const Copy& copy = *copies.completable[i];
        if (!copy.is_bulk) continue;
        Text text = message();
        add_lane(text, *copy.lane);
        text.add(": copy_bulk @%x: still in flight when its block ends", copy.site);
        end_run(kInFlight, {"shared", static_cast<int>(copy.lane->block->index), copy.to});
    }
    end_run(kOk);
}

inline void run_lane() {
    machine.call(machine.kernel, machine.arguments);
    self->op = Op::kNone;
    self->operand[0] = self->operand[1] = 0;
    end_lane();
}

// Memory of a run, kept for the next.
class Arena {
  public:
    void reset(uint64_t num_bytes) {
        if (num_bytes > size_) {
            release();
            base_ = reserve(num_bytes);
            size_ = num_bytes;
        } else {
            memset(base_, 0, used_);
        }
        used_ = 0;
    }

    void release() {
        give_back(base_, size_);
        size_ = used_ = 0;
    }

    template <class T>
    T* take(uint64_t count) {
        char* at = base_ + used_;
        used_ += padded(count * sizeof(T));
        return reinterpret_cast<T*>(at);
    }

    static uint64_t padded(uint64_t num_bytes) { return (num_bytes + 127) / 128 * 128; }

  private:
    char* base_ = nullptr;
    uint64_t size_ = 0, used_ = 0;
};

inline Arena arena;

inline uint64_t num_cells(uint64_t num_bytes) { return (num_bytes + 3) / 4; }

inline uint64_t arena_bytes() {
    const EmulationConfig& config = machine.config;
    uint64_t total = Arena::padded(config.num_blocks * sizeof(Block)) + Arena::padded(machine.num_warps * sizeof(Warp)) +
                     Arena::padded(machine.num_lanes * sizeof(Lane)) + Arena::padded(machine.num_warps * sizeof(Warp*));
    total += config.num_blocks *
             (Arena::padded(config.shared_bytes) + Arena::padded(num_cells(config.shared_bytes) * sizeof(Cell)));
    for (uint32_t i = 0; i < config.num_regions; i++)
        if (config.regions[i].flags & kWritable)
            total += Arena::padded(num_cells(config.regions[i].num_bytes) * sizeof(Cell));
    return total;
}

inline void fill(void* at, uint64_t num_bytes) {
    if (machine.config.poison == kRandom) {
        auto* bytes = static_cast<uint8_t*>(at);
        for (uint64_t i = 0; i < num_bytes; i++) bytes[i] = random_below(256);
    } else {
        memset(at, machine.config.poison == kOnes ? 0xff : 0, num_bytes);
    }
}

inline void set_up_memories() {
    machine.num_memories = machine.config.num_regions;
    machine.last_memory = nullptr;
    for (uint32_t i = 0; i < machine.num_memories; i++) {
        Memory& memory = machine.memories[i];
        memory.region = machine.config.regions[i];
        memory.begin = reinterpret_cast<uint64_t>(memory.region.base);
        memory.end = memory.begin + memory.region.num_bytes;
        memory.shadow = nullptr;
        if (!(memory.region.flags & kWritable)) continue;
        memory.shadow = arena.take<Cell>(num_cells(memory.region.num_bytes));
        if (memory.region.flags & kUninitialisedRegion) fill(memory.region.base, memory.region.num_bytes);
    }
}

inline void set_up_warp(Warp& warp, Block& block, uint32_t in_block, Clock* nothing) {
    const uint32_t index = block.index * machine.warps_a_block + in_block;
    warp.index = index;
    warp.in_block = in_block;
    warp.block = &block;
    warp.lanes = machine.lanes + index * kLanes;
    warp.ready_at = kNotReady;
    warp.latest = 1;
    for (uint32_t& time : warp.times) time = 1;
    warp.base = Clocks::hold(nothing);
    for (uint32_t i = 0; i < kLanes; i++) {
        Lane& lane = warp.lanes[i];
        const uint32_t number = index * kLanes + i;
        lane.identity = {in_block * kLanes + i, i, in_block, block.index, machine.config.num_blocks};
        lane.warp = &warp;
        lane.block = &block;
        lane.stack = machine.stacks.bottom(number);
        prepare_fiber(lane.fiber, machine.stacks.bottom(number), machine.stacks.num_bytes(number), run_lane);
        make_runnable(lane);
    }
}

inline void set_up_schedule() {
    const uint64_t seed = machine.config.seed;
    machine.random = (seed + 1) * 0x9e3779b97f4a7c15;
    for (int i = 0; i < 8; i++) random_below(2);
    machine.strategy = static_cast<Strategy>(seed % 4);
    machine.is_descending = random_below(2);
    constexpr uint32_t kNever = 0xffffffff;
    constexpr uint32_t kSwitchIntervals[] = {1, 4, 32}, kCopyIntervals[] = {kNever, kNever, 6, 64};
    machine.switch_interval = kSwitchIntervals[random_below(3)];
    machine.copy_interval = kCopyIntervals[random_below(4)];
    machine.until_copy = machine.copy_interval;
    machine.until_switch = 1;
    machine.idle_actions = ~uint64_t{0};
}

// Returns why not, or null.
inline const char* find_fault(const EmulationConfig& config) {
    if (!config.num_blocks || config.threads_per_block % kLanes || !config.threads_per_block ||
        config.threads_per_block > kLanes * kMostWarps)
        return "a launch needs blocks of 1 to 32 whole warps";
    if (uint64_t{config.num_blocks} * (config.threads_per_block / kLanes + kMostMbarriers) >= kNobody)
        return "too many blocks";
    if (config.num_regions > kMostMemories) return "too many regions";
    for (uint32_t i = 0; i < config.num_regions; i++)
        if (reinterpret_cast<uint64_t>(config.regions[i].base) % 16) return "a region that is not aligned to 16 bytes";
    return nullptr;
}

inline void run(const EmulationConfig& config, EmulationReport& report) {
    machine.config = config;
    machine.report = &report;
    machine.run++;
    machine.warps_a_block = config.threads_per_block / kLanes;
    machine.num_warps = config.num_blocks * machine.warps_a_block;
    machine.num_lanes = machine.num_warps * kLanes;
    machine.num_ready = machine.num_exited = machine.expiries = 0;
    machine.operations = machine.switches = machine.collectives = machine.accesses = machine.num_copies = machine.num_stores = 0;
    machine.polls = machine.idle_polls = machine.actions_before = machine.slept_ns = 0;
    machine.check_at = config.max_operations < 1 << 16 ? config.max_operations : 1 << 16;
    self = nullptr;
    set_up_schedule();
    machine.stacks.make(machine.num_lanes);
    machine.clocks.reset(machine.num_warps + config.num_blocks * kMostMbarriers);
    nodes.reset();
    words.reset();
    copies.reset();
    arena.reset(arena_bytes());
    machine.blocks = arena.take<Block>(config.num_blocks);
    machine.warps = arena.take<Warp>(machine.num_warps);
    machine.lanes = arena.take<Lane>(machine.num_lanes);
    machine.ready = arena.take<Warp*>(machine.num_warps);
    set_up_memories();
    Clock* nothing = machine.clocks.make();
    for (uint32_t i = 0; i < config.num_blocks; i++) {
        Block& block = machine.blocks[i];
        block.index = i;
        block.warps = machine.warps + i * machine.warps_a_block;
        block.shared = arena.take<char>(config.shared_bytes);
        block.shadow = arena.take<Cell>(num_cells(config.shared_bytes));
        if (config.poison != kZeros) fill(block.shared, config.shared_bytes);
        for (uint32_t j = 0; j < machine.warps_a_block; j++) set_up_warp(block.warps[j], block, j, nothing);
    }
    rank_warps();
    self = &choose_lane(choose_warp(false));
    switch_fiber(machine.host, self->fiber);
    report.operations = machine.operations;
    report.switches = machine.switches;
    report.collectives = machine.collectives;
    report.accesses = machine.accesses;
    report.copies = machine.num_copies;
    report.stores = machine.num_stores;
}

// Memory that is kept from run to run.
inline void release_memory() {
    machine.stacks.release();
    machine.clocks.release();
    nodes.release();
    words.release();
    copies.release();
    arena.release();
}

}  // namespace headrace::emulation
