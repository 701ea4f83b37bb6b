// Vector clocks: who knows of which accesses.
//
// Lanes of a warp share most of what they know, so a component is a warp: every access that any of its lanes did up
// to a time. Where single lanes have released what they did since the warp was last in step, their times are kept
// beside it. Behind the warps follow the mbarriers, whose time is the number of phases they have completed: it stands
// for the copies that these phases awaited.
#pragma once

#include "fiber.h"
#include "syntax.h"

namespace headrace::emulation {

struct LaneTimes {
    LaneTimes* next;
    uint32_t who;
    uint32_t times[32];
};

struct Clock {
    Clock* next_free;
    LaneTimes* lanes;
    uint32_t references;
    alignas(64) uint32_t through[1];  // as many as there are components
};

class Clocks {
  public:
    void reset(uint32_t num_components) {
        width_ = (num_components + 15) / 16 * 16;
        stride_ = (offsetof(Clock, through) + width_ * sizeof(uint32_t) + 63) / 64 * 64;
        if (!clocks_) clocks_ = reserve(kMostBytes), lanes_ = reserve(kMostBytes);
        next_clock_ = clocks_, next_lanes_ = lanes_;
        free_clock_ = nullptr, free_lanes_ = nullptr;
    }

    void release() { give_back(clocks_, kMostBytes), give_back(lanes_, kMostBytes); }

    // Knows nothing, and is held once.
    Clock* make() {
        Clock* clock = take();
        memset(clock->through, 0, width_ * sizeof(uint32_t));
        return clock;
    }

    static Clock* hold(Clock* clock) {
        clock->references++;
        return clock;
    }

    void drop(Clock* clock) {
        if (--clock->references) return;
        while (clock->lanes) drop_first(clock->lanes);
        clock->next_free = free_clock_;
        free_clock_ = clock;
    }

    // The clock itself if nobody else holds it, else a copy that takes its place.
    Clock* own(Clock*& clock) {
        if (clock->references == 1) return clock;
        Clock* copied = take();
        memcpy(copied->through, clock->through, width_ * sizeof(uint32_t));
        for (const LaneTimes* from = clock->lanes; from; from = from->next)
            memcpy(lanes_of(copied, from->who), from->times, sizeof from->times);
        clock->references--;
        return clock = copied;
    }

    void join(Clock* into, const Clock* from) {
        if (into == from) return;
        for (uint32_t i = 0; i < width_; i += 16)
            for (uint32_t j = i; j < i + 16; j++)
                into->through[j] = into->through[j] > from->through[j] ? into->through[j] : from->through[j];
        for (const LaneTimes* known = from->lanes; known; known = known->next) {
            if (is_within(known, into->through[known->who])) continue;
            uint32_t* times = lanes_of(into, known->who);
            for (int i = 0; i < 32; i++) times[i] = times[i] > known->times[i] ? times[i] : known->times[i];
        }
        if (into->lanes) tidy(into);
    }

    void join_lane(Clock* into, uint32_t who, uint32_t lane, uint32_t time) {
        if (time <= into->through[who]) return;
        uint32_t* times = lanes_of(into, who);
        if (times[lane] < time) times[lane] = time;
    }

    static bool covers(const Clock* clock, uint32_t who, uint32_t lane, uint32_t time) {
        if (time <= clock->through[who]) return true;
        for (const LaneTimes* known = clock->lanes; known; known = known->next)
            if (known->who == who) return time <= known->times[lane];
        return false;
    }

  private:
    static constexpr uint64_t kMostBytes = uint64_t{1} << 30;  // of address space

    Clock* take() {
        Clock* clock = free_clock_;
        if (clock) {
            free_clock_ = clock->next_free;
        } else {
            clock = reinterpret_cast<Clock*>(next_clock_);
            next_clock_ += stride_;
            if (next_clock_ > clocks_ + kMostBytes) abort();
        }
        clock->lanes = nullptr;
        clock->references = 1;
        return clock;
    }

    uint32_t* lanes_of(Clock* clock, uint32_t who) {
        for (LaneTimes* known = clock->lanes; known; known = known->next)
            if (known->who == who) return known->times;
        LaneTimes* made = free_lanes_;
        if (made) {
            free_lanes_ = made->next;
        } else {
            made = reinterpret_cast<LaneTimes*>(next_lanes_);
            next_lanes_ += sizeof(LaneTimes);
            if (next_lanes_ > lanes_ + kMostBytes) abort();
        }
        memset(made->times, 0, sizeof made->times);
        made->who = who;
        made->next = clock->lanes;
        clock->lanes = made;
        return made->times;
    }

    void drop_first(LaneTimes*& list) {
        LaneTimes* first = list;
        list = first->next;
        first->next = free_lanes_;
        free_lanes_ = first;
    }

    static bool is_within(const LaneTimes* known, uint32_t time) {
        uint32_t latest = 0;
        for (int i = 0; i < 32; i++) latest = latest > known->times[i] ? latest : known->times[i];
        return latest <= time;
    }

    // What every lane of a warp has released is known of the warp.
    void tidy(Clock* clock) {
        for (LaneTimes** at = &clock->lanes; *at;) {
            LaneTimes* known = *at;
            uint32_t earliest = known->times[0];
            for (int i = 1; i < 32; i++) earliest = earliest < known->times[i] ? earliest : known->times[i];
            uint32_t& through = clock->through[known->who];
            if (earliest > through) through = earliest;
            if (is_within(known, through))
                drop_first(*at);
            else
                at = &known->next;
        }
    }

    uint32_t width_ = 0;
    uint64_t stride_ = 0;
    char *clocks_ = nullptr, *lanes_ = nullptr, *next_clock_ = nullptr, *next_lanes_ = nullptr;
    Clock* free_clock_ = nullptr;
    LaneTimes* free_lanes_ = nullptr;
};

}  // namespace headrace::emulation
