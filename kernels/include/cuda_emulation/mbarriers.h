// Barriers in shared memory that count arrivals and copied bytes, phase after phase.
#pragma once

#include "words.h"

namespace headrace::emulation {

inline Mbarrier* find_mbarrier(Block& block, uint32_t offset) {
    for (uint32_t i = 0; i < block.num_mbarriers; i++)
        if (block.mbarriers[i].offset == offset) return &block.mbarriers[i];
    return nullptr;
}

// Fails unless it was initialised before what the lane does now.
inline Mbarrier& checked_mbarrier(uint32_t at) {
    const uint32_t offset = checked_offset<8>(at);
    Mbarrier* mbarrier = find_mbarrier(*self->block, offset);
    if (!mbarrier) fail_at(kBarrierMisuse, self->block->shared + offset, "no mbarrier was initialised here");
    const Cell& cell = shared_cell(offset);
    if (!is_before(cell.write, *self))
        fail_conflict(cell.write, Kind::kAtomicWrite, self->block->shared + offset);
    return *mbarrier;
}

void mbarrier_init(uint32_t at, uint32_t arrivals) {
    begin(Op::kMbarrierInit, at, HEADRACE_SITE());
    const uint32_t offset = checked_offset<8>(at);
    Block& block = *self->block;
    const char* address = block.shared + offset;
    constexpr uint32_t kMostArrivals = (1 << 20) - 1;
    if (!arrivals || arrivals > kMostArrivals) fail_at(kBarrierMisuse, address, "%u arrivals", arrivals);
    if (find_mbarrier(block, offset)) fail_at(kBarrierMisuse, address, "an mbarrier is initialised a second time");
    if (block.num_mbarriers == kMostMbarriers) fail_at(kCall, address, "more than %u mbarriers a block", kMostMbarriers);
    touch();
    for (uint32_t i = 0; i < 2; i++) {
        Cell& cell = block.shadow[offset / 4 + i];
        access_any(cell, Kind::kWrite, kAllBytes, true, address + 4 * i);
        cell.flags = kIsMbarrier;
    }
    Mbarrier& made = block.mbarriers[block.num_mbarriers];
    made = {};
    made.offset = offset;
    made.arrivals = made.pending = arrivals;
    made.who = machine.num_warps + block.index * kMostMbarriers + block.num_mbarriers++;
}

// By the thread that initialised them.
void fence_mbarrier_init() {
    begin(Op::kFenceMbarrierInit, 0, HEADRACE_SITE());
    Block& block = *self->block;
    for (uint32_t i = 0; i < block.num_mbarriers; i++) {
        const Record& made = block.shadow[block.mbarriers[i].offset / 4].write;
        if (made.who == self->warp->index && made.lanes == lane_bit(*self)) block.mbarriers[i].is_fenced = true;
    }
}

inline void complete_phase(Mbarrier& mbarrier) {
    Clocks& clocks = machine.clocks;
    mbarrier.phase++;
    mbarrier.pending = mbarrier.arrivals;
    if (!mbarrier.completed) mbarrier.completed = clocks.make();
    Clock* completed = clocks.own(mbarrier.completed);
    if (mbarrier.arriving) {
        clocks.join(completed, mbarrier.arriving);
        clocks.drop(mbarrier.arriving);
        mbarrier.arriving = nullptr;
    }
    completed->through[mbarrier.who] = mbarrier.phase;
    wake(mbarrier.waiters);
}

inline void complete_if_done(Mbarrier& mbarrier) {
    if (mbarrier.pending == 0 && mbarrier.pending_bytes == 0) complete_phase(mbarrier);
}

// Returns false if the phase has had all its arrivals.
inline bool arrive(Mbarrier& mbarrier) {
    if (mbarrier.pending == 0) return false;
    mbarrier.pending--;
    complete_if_done(mbarrier);
    return true;
}

void mbarrier_arrive(uint32_t at, uint32_t expected_bytes) {
    begin(Op::kMbarrierArrive, at, HEADRACE_SITE());
    switch_point();
    Mbarrier& mbarrier = checked_mbarrier(at);
    self->operand[0] = expected_bytes;
    mbarrier.pending_bytes += expected_bytes;
    release(mbarrier.arriving);
    if (!arrive(mbarrier))
        fail_at(kBarrierMisuse, self->block->shared + mbarrier.offset, "one arrival more than the %u of a phase",
                mbarrier.arrivals);
}

bool mbarrier_try_wait(uint32_t at, uint32_t parity) {
    begin_poll(Op::kMbarrierTryWait, at, HEADRACE_SITE());
    switch_point();
    Mbarrier& mbarrier = checked_mbarrier(at);
    self->operand[0] = parity & 1;
    if ((mbarrier.phase & 1) == (parity & 1)) park_if_seen(mbarrier.waiters);
    if ((mbarrier.phase & 1) == (parity & 1)) return false;
    self->polled = nullptr;
    acquire(mbarrier.completed);
    return true;
}

}  // namespace headrace::emulation
