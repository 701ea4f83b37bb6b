// Ends of a run that is wrong: who did what, where.
#pragma once

#include "machine.h"

namespace headrace::emulation {

// Text that grows to the end of its buffer and no further.
class Text {
  public:
    Text(char* buffer, uint64_t num_bytes) : at_(buffer), end_(buffer + num_bytes) { *at_ = 0; }

    __attribute__((format(printf, 2, 3))) Text& add(const char* format, ...) {
        va_list arguments;
        va_start(arguments, format);
        const int length = vsnprintf(at_, end_ - at_, format, arguments);
        va_end(arguments);
        at_ = length < end_ - at_ ? at_ + length : end_ - 1;
        return *this;
    }

    uint64_t left() const { return end_ - at_; }

  private:
    char *at_, *end_;
};

// Where an address of the host lies in what the kernel sees.
struct Place {
    const char* name;  // null if nowhere
    int block;         // of shared memory, else -1
    int64_t offset;
};

inline Place place_of(const void* address) {
    const auto at = reinterpret_cast<int64_t>(address);
    for (uint32_t i = 0; i < machine.config.num_blocks; i++) {
        const int64_t offset = at - reinterpret_cast<int64_t>(machine.blocks[i].shared);
        if (offset >= 0 && offset < machine.config.shared_bytes) return {"shared", static_cast<int>(i), offset};
    }
    for (uint32_t i = 0; i < machine.num_memories; i++) {
        const Memory& memory = machine.memories[i];
        const int64_t offset = at - reinterpret_cast<int64_t>(memory.region.base);
        if (offset >= 0 && offset < static_cast<int64_t>(memory.region.num_bytes)) return {memory.region.name, -1, offset};
    }
    return {nullptr, -1, at};
}

inline void add_place(Text& text, const Place& place) {
    if (!place.name)
        text.add("address 0x%llx, in no region", static_cast<unsigned long long>(place.offset));
    else if (place.block >= 0)
        text.add("shared memory of block %d + %lld", place.block, static_cast<long long>(place.offset));
    else
        text.add("%s + %lld", place.name, static_cast<long long>(place.offset));
}

inline void add_lane(Text& text, const Lane& lane) {
    text.add("block %u warp %u lane %u", lane.identity.block, lane.identity.warp, lane.identity.lane);
}

// By its component of clocks: a warp's lane, or the copies that an mbarrier awaited.
inline void add_who(Text& text, uint32_t who, uint32_t lane) {
    if (who < machine.num_warps) {
        const Warp& warp = machine.warps[who];
        text.add("block %u warp %u lane %u", warp.block->index, warp.in_block, lane);
        return;
    }
    const uint32_t index = who - machine.num_warps;
    const Block& block = machine.blocks[index / kMostMbarriers];
    text.add("a copy awaited at the mbarrier at shared memory of block %u + %u", block.index,
             block.mbarriers[index % kMostMbarriers].offset);
}

// The report's text; what is added to it before end_run is read by whoever started the run.
inline Text message() { return Text(machine.report->message, sizeof machine.report->message); }

[[noreturn]] inline void end_run(Status status, const Place& place = {nullptr, -1, 0}) {
    EmulationReport& report = *machine.report;
    report.status = status;
    if (self) {
        report.block = self->identity.block;
        report.warp = self->identity.warp;
        report.lane = self->identity.lane;
    }
    snprintf(report.place, sizeof report.place, "%s", place.name ? place.name : "");
    report.offset = place.offset;
    Fiber abandoned;
    switch_fiber(abandoned, machine.host);
    __builtin_unreachable();
}

// "block 0 warp 1 lane 2: load_shared @1a2b: "
inline Text begin_message() {
    Text text = message();
    add_lane(text, *self);
    text.add(": %s @%x: ", name_of(self->op), self->site);
    return text;
}

[[noreturn]] __attribute__((format(printf, 2, 3))) inline void fail(Status status, const char* format, ...) {
    char detail[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(detail, sizeof detail, format, arguments);
    va_end(arguments);
    begin_message().add("%s", detail);
    end_run(status);
}

[[noreturn]] __attribute__((format(printf, 3, 4))) inline void fail_at(Status status, const void* address,
                                                                       const char* format, ...) {
    char detail[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(detail, sizeof detail, format, arguments);
    va_end(arguments);
    const Place place = place_of(address);
    Text text = begin_message();
    add_place(text, place);
    text.add(": %s", detail);
    end_run(status, place);
}

}  // namespace headrace::emulation
