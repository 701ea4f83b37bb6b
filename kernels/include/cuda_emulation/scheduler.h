// Which lane goes on. A lane runs until it waits, or until chance says so at an operation that others may notice.
//
// Seeds differ in how they treat warps: all alike, or by a rank that is kept for long, so that some starve until
// nobody else can go on: any warps, whole blocks, or one role (the last warp of each block, or all others).
#pragma once

#include "failures.h"

namespace headrace::emulation {

bool complete_some_copy();  // copies.h

inline uint32_t lane_bit(const Lane& lane) { return 1u << lane.identity.lane; }

inline void make_runnable(Lane& lane) {
    Warp& warp = *lane.warp;
    warp.runnable |= lane_bit(lane);
    if (warp.ready_at != kNotReady) return;
    warp.ready_at = machine.num_ready;
    machine.ready[machine.num_ready++] = &warp;
    machine.has_news = true;
}

inline void stop_running(Lane& lane) {
    Warp& warp = *lane.warp;
    warp.runnable &= ~lane_bit(lane);
    if (warp.runnable) return;
    Warp* last = machine.ready[--machine.num_ready];
    machine.ready[warp.ready_at] = last;
    last->ready_at = warp.ready_at;
    warp.ready_at = kNotReady;
}

inline void rank_warps() {
    machine.until_rank = 100 + random_below(4000);
    const bool is_loader_first = random_below(2);
    for (uint32_t block = 0; block < machine.config.num_blocks; block++) {
        const uint32_t of_block = random_below(1 << 15);
        for (uint32_t i = 0; i < machine.warps_a_block; i++) {
            const bool is_loader = i == machine.warps_a_block - 1;
            uint32_t high = 0;
            if (machine.strategy == Strategy::kRankedBlocks) high = of_block;
            if (machine.strategy == Strategy::kRankedRoles) high = is_loader == is_loader_first;
            machine.blocks[block].warps[i].rank = high << 16 | random_below(1 << 16);
        }
    }
}

inline Warp& choose_warp(bool is_fair) {
    machine.has_news = false;
    if (is_fair || machine.strategy == Strategy::kUniform) return *machine.ready[random_below(machine.num_ready)];
    if (--machine.until_rank == 0) rank_warps();
    Warp* chosen = machine.ready[0];
    for (uint32_t i = 1; i < machine.num_ready; i++)
        if (machine.ready[i]->rank > chosen->rank) chosen = machine.ready[i];
    return *chosen;
}

inline Lane& choose_lane(const Warp& warp) {
    return warp.lanes[machine.is_descending ? 31 - __builtin_clz(warp.runnable) : __builtin_ctz(warp.runnable)];
}

// Returns when the lane is chosen again.
inline void hand_over(Lane& next) {
    if (&next == self) return;
    Lane* left = self;
    constexpr int64_t kLeast = 16384;  // bytes of a stack, for what reports a failure
    if (static_cast<const char*>(__builtin_frame_address(0)) - left->stack < kLeast)
        fail(kStack, "the thread's stack is as good as full");
    self = &next;
    machine.switches++;
    switch_fiber(left->fiber, next.fiber);
}

inline uint64_t num_actions() { return machine.operations - machine.polls; }

inline void wake(Waiters& waiters) {
    waiters.version++;
    for (Lane* lane = waiters.first; lane; lane = lane->next_waiter) {
        lane->is_parked = false;
        make_runnable(*lane);
    }
    waiters.first = nullptr;
}

[[noreturn]] void report_deadlock();

inline void unpark(Waiters& waiters) {
    wake(waiters);
    waiters.version--;  // nothing has changed: who looks again and does nothing else is parked again
}

void unpark_all();  // words.h

// Nobody can go on, or those who can do nothing but poll: what has been put off happens now.
inline void break_standstill() {
    if (complete_some_copy()) return;
    const uint64_t actions = num_actions();
    if (actions == machine.idle_actions) {
        constexpr uint32_t kMostExpiries = 4;
        if (!machine.config.expires_waits || machine.expiries++ == kMostExpiries) report_deadlock();
        machine.slept_ns += uint64_t{1} << 42;
    }
    machine.idle_actions = actions;
    unpark_all();
    if (machine.num_ready == 0) report_deadlock();
}

// The lane has stopped: others go on.
inline void leave() {
    if (self->warp->runnable) return hand_over(choose_lane(*self->warp));
    while (machine.num_ready == 0) break_standstill();
    hand_over(choose_lane(choose_warp(false)));
}

inline void give_way(bool is_fair) {
    machine.until_switch = machine.strategy == Strategy::kUniform ? 1 + random_below(machine.switch_interval) : 1;
    Warp& warp = choose_warp(is_fair);
    if (&warp != self->warp) hand_over(choose_lane(warp));
}

// Before an operation that other warps may notice, or by which this one notices others.
inline void switch_point() {
    if (--machine.until_copy == 0) {
        machine.until_copy = 1 + random_below(machine.copy_interval);
        complete_some_copy();
    }
    if (--machine.until_switch) return;
    if (machine.strategy != Strategy::kUniform && !machine.has_news && machine.until_rank > 1) {
        machine.until_switch = 1;
        machine.until_rank--;
        return;
    }
    give_way(false);
}

// Now and then: a lane that loops is made to let others run, and an endless run ends.
__attribute__((noinline)) inline void check_progress() {
    constexpr uint64_t kInterval = 1 << 16;
    if (machine.operations >= machine.config.max_operations)
        fail(kOperations, "the run was ended after %llu operations", static_cast<unsigned long long>(machine.operations));
    machine.check_at = machine.operations + kInterval;
    if (machine.check_at > machine.config.max_operations) machine.check_at = machine.config.max_operations;
    give_way(true);
}

inline void begin(Op op, uint64_t address, uint32_t site) {
    if (++machine.operations >= machine.check_at) check_progress();
    self->op = op;
    self->address = address;
    self->site = site;
    self->polled = nullptr;
}

// Like begin, for an operation by which a lane only looks whether it can go on.
inline void begin_poll(Op op, uint64_t address, uint32_t site) {
    const Waiters* polled = self->polled;
    begin(op, address, site);
    self->polled = polled;
    machine.polls++;
    if (num_actions() != machine.actions_before) {
        machine.actions_before = num_actions();
        machine.idle_polls = 0;
    } else if (++machine.idle_polls % 64 == 0) {
        if (machine.idle_polls > 1000 + 64 * machine.num_lanes) {
            machine.idle_polls = 0;
            break_standstill();
        }
        give_way(true);
    }
}

// Called with what the lane is about to look at. If it has seen that before, and has only looked around since,
// it waits until there is something new.
inline void park_if_seen(Waiters& waiters) {
    if (self->polled == &waiters && self->polled_version == waiters.version) {
        self->is_parked = true;
        self->next_waiter = waiters.first;
        waiters.first = self;
        stop_running(*self);
        leave();
    }
    self->polled = &waiters;
    self->polled_version = waiters.version;
}

}  // namespace headrace::emulation
