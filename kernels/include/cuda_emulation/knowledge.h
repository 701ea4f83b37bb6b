// What happens before what: lanes learn from what they acquire, and tell by what they release.
#pragma once

#include "machine.h"

namespace headrace::emulation {

// For the running lane alone, until its warp is in step again.
inline void acquire(Clock* clock) {
    if (!clock || clock == self->warp->base) return;
    Lane& lane = *self;
    lane.fenced_in = 0;
    for (uint32_t i = 0; i < lane.num_known; i++)
        if (lane.known[i] == clock) return;
    if (lane.num_known == kMostKnown) {
        Clock* all = machine.clocks.own(lane.known[0]);
        while (lane.num_known > 1) {
            Clock* other = lane.known[--lane.num_known];
            machine.clocks.join(all, other);
            machine.clocks.drop(other);
        }
    }
    lane.known[lane.num_known++] = Clocks::hold(clock);
    lane.warp->knowing |= 1u << lane.identity.lane;
}

// All that the running lane did and knew of, to whoever acquires `clock`.
inline void release(Clock*& clock) {
    Clocks& clocks = machine.clocks;
    Warp& warp = *self->warp;
    if (!clock) clock = clocks.make();
    Clock* into = clocks.own(clock);
    clocks.join(into, warp.base);
    for (uint32_t i = 0; i < self->num_known; i++) clocks.join(into, self->known[i]);
    if (into->through[warp.index] < warp.in_step) into->through[warp.index] = warp.in_step;
    const uint32_t lane = self->identity.lane, own = 1u << lane;
    clocks.join_lane(into, warp.index, lane, warp.dirty & own ? warp.times[lane] : warp.times[lane] - 1);
    if (!(warp.dirty & own)) return;
    warp.dirty &= ~own;  // what it does next is not part of this
    if (warp.latest < ++warp.times[lane]) warp.latest = warp.times[lane];
}

// Every lane gets to know what any of them does.
inline void put_in_step(Warp& warp) {
    Clocks& clocks = machine.clocks;
    const Clock* last = nullptr;
    for (uint32_t knowing = warp.knowing; knowing; knowing &= knowing - 1) {
        Lane& lane = warp.lanes[__builtin_ctz(knowing)];
        while (lane.num_known) {
            Clock* known = lane.known[--lane.num_known];
            if (known != last) clocks.join(clocks.own(warp.base), known);
            last = known;  // only compared: it may be gone
            clocks.drop(known);
        }
    }
    warp.knowing = 0;
    if (!warp.dirty && warp.latest == warp.in_step + 1) return;
    warp.in_step = warp.latest++;
    warp.dirty = 0;
    for (uint32_t& time : warp.times) time = warp.latest;
}

// And of several warps, which are bits of `warps`.
inline void put_in_step(Block& block, uint32_t warps) {
    Clocks& clocks = machine.clocks;
    Clock* joined = nullptr;
    const Clock* last = nullptr;
    for (uint32_t left = warps; left; left &= left - 1) {
        Warp& warp = block.warps[__builtin_ctz(left)];
        put_in_step(warp);
        if (!joined) joined = Clocks::hold(warp.base);
        Clock* into = clocks.own(joined);
        if (warp.base != last) clocks.join(into, warp.base);
        last = warp.base;
        if (into->through[warp.index] < warp.in_step) into->through[warp.index] = warp.in_step;
    }
    for (uint32_t left = warps; left; left &= left - 1) {
        Warp& warp = block.warps[__builtin_ctz(left)];
        clocks.drop(warp.base);
        warp.base = Clocks::hold(joined);
    }
    clocks.drop(joined);
}

}  // namespace headrace::emulation
