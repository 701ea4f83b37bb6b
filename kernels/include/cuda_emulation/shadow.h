// What happened to each 4 bytes of memory in the launch, and whether an access is ordered after it.
//
// As in FastTrack (Flanagan and Freund, 2009): the last write, and reads since then, each by who did it and when. A
// record is of some bytes of a cell, so that neighbours do not conflict; more records than two form a list.
#pragma once

#include "failures.h"

namespace headrace::emulation {

enum class Kind : uint8_t { kRead, kWrite, kConstantRead, kAtomicRead, kAtomicWrite };
constexpr const char* kKindNames[] = {"a load", "a store", "a load_constant", "a polling load", "an atomic store"};

constexpr uint32_t bit(Kind kind) { return 1u << static_cast<int>(kind); }
constexpr uint32_t kStores = bit(Kind::kWrite) | bit(Kind::kAtomicWrite);
// By kind: kinds of earlier accesses that must have happened before. For load_constant, none may have.
constexpr uint32_t kConflicts[] = {
    kStores,
    kStores | bit(Kind::kRead) | bit(Kind::kConstantRead) | bit(Kind::kAtomicRead),
    kStores,
    bit(Kind::kWrite),
    bit(Kind::kWrite) | bit(Kind::kRead) | bit(Kind::kConstantRead),
};

constexpr uint32_t kAllBytes = 15;
constexpr uint16_t kNobody = 0xffff;

struct Record {
    uint32_t time = 0, lanes = 0;  // no lanes: no record
    uint16_t who = 0;
    uint8_t bytes = 0;  // bits of the cell's
    Kind kind = Kind::kRead;
    uint32_t site = 0;
};

struct Node {
    Record record;
    uint32_t next;
};

enum CellFlags : uint32_t { kIsInFlight = 1, kIsMbarrier = 2, kIsMixed = 4 };  // mixed: not only loads in the list

struct Cell {
    Record write, read;  // the latest store; a load or load_constant
    uint32_t more : 28, flags : 4;
};

class Nodes {
  public:
    void reset() {
        if (!nodes_) nodes_ = reinterpret_cast<Node*>(reserve(kMost * sizeof(Node)));
        used_ = 1, free_ = 0;
    }

    void release() { give_back(nodes_, kMost * sizeof(Node)); }

    Node& operator[](uint32_t number) { return nodes_[number]; }

    uint32_t make(const Record& record, uint32_t next) {
        uint32_t number = free_;
        if (number)
            free_ = nodes_[number].next;
        else if ((number = used_++) == kMost)
            abort();
        nodes_[number] = {record, next};
        return number;
    }

    // What follows it.
    uint32_t drop(uint32_t number) {
        const uint32_t next = nodes_[number].next;
        nodes_[number].next = free_;
        free_ = number;
        return next;
    }

  private:
    static constexpr uint32_t kMost = 1u << 25;
    Node* nodes_ = nullptr;
    uint32_t used_ = 1, free_ = 0;
};

inline Nodes nodes;

inline bool knows(const Lane& lane, uint32_t who, uint32_t of_lane, uint32_t time) {
    if (Clocks::covers(lane.warp->base, who, of_lane, time)) return true;
    for (uint32_t i = 0; i < lane.num_known; i++)
        if (Clocks::covers(lane.known[i], who, of_lane, time)) return true;
    return false;
}

__attribute__((noinline)) inline bool knows_all(const Lane& lane, const Record& record, uint32_t lanes) {
    for (; lanes; lanes &= lanes - 1)
        if (!knows(lane, record.who, __builtin_ctz(lanes), record.time)) return false;
    return true;
}

// Whether what is recorded happened before whatever the lane does next.
inline bool is_before(const Record& record, const Lane& lane) {
    const Warp& warp = *lane.warp;
    uint32_t lanes = record.lanes;
    if (record.who == warp.index) {
        if (record.time <= warp.in_step) return true;
        lanes &= ~(1u << lane.identity.lane);
        if (!lanes) return true;
    } else {
        if (record.time <= warp.base->through[record.who]) return true;
        for (uint32_t i = 0; i < lane.num_known; i++)
            if (record.time <= lane.known[i]->through[record.who]) return true;
    }
    return knows_all(lane, record, lanes);
}

inline Record record_of(const Lane& lane, Kind kind, uint32_t bytes) {
    const uint32_t own = lane.identity.lane;
    return {lane.warp->times[own],          1u << own, static_cast<uint16_t>(lane.warp->index),
            static_cast<uint8_t>(bytes), kind,      lane.site};
}

[[noreturn]] __attribute__((noinline)) inline void fail_conflict(const Record& earlier, Kind kind, const void* address) {
    const Place place = place_of(address);
    Text text = begin_message();
    add_place(text, place);
    if (earlier.kind == Kind::kConstantRead || kind == Kind::kConstantRead) {
        text.add(": %s of what the launch touches otherwise: %s", kKindNames[static_cast<int>(kind)],
                 kKindNames[static_cast<int>(earlier.kind)]);
        if (earlier.who != kNobody) text.add(" by "), add_who(text, earlier.who, __builtin_ctz(earlier.lanes));
        text.add(" @%x", earlier.site);
        end_run(kConstant, place);
    }
    uint32_t lane = 0;
    for (uint32_t lanes = earlier.lanes; lanes; lanes &= lanes - 1) {
        lane = __builtin_ctz(lanes);
        const bool is_self = earlier.who == self->warp->index && lane == self->identity.lane;
        if (!is_self && !knows(*self, earlier.who, lane, earlier.time)) break;
    }
    text.add(": %s not ordered after ", kKindNames[static_cast<int>(kind)]);
    if (earlier.who < machine.num_warps) text.add("%s by ", kKindNames[static_cast<int>(earlier.kind)]);
    add_who(text, earlier.who, lane);
    text.add(" @%x", earlier.site);
    if (earlier.who == self->warp->index) text.add(", with no sync_warp between the two lanes");
    end_run(kRace, place);
}

[[noreturn]] __attribute__((noinline)) inline void fail_flagged(const Cell& cell, const void* address) {
    if (cell.flags & kIsMbarrier) fail_at(kBarrierMisuse, address, "an access to the bytes of an mbarrier");
    const Place place = place_of(address);
    Text text = begin_message();
    add_place(text, place);
    text.add(": still being copied to, as asked for by ");
    add_who(text, cell.write.who, __builtin_ctz(cell.write.lanes));
    text.add(" @%x", cell.write.site);
    end_run(kInFlight, place);
}

inline void check_conflict(const Record& earlier, Kind kind, uint32_t bytes, const void* address) {
    if (!earlier.lanes || !(earlier.bytes & bytes)) return;
    if (!(kConflicts[static_cast<int>(kind)] & bit(earlier.kind))) return;
    if (kind == Kind::kConstantRead || earlier.kind == Kind::kConstantRead || !is_before(earlier, *self))
        fail_conflict(earlier, kind, address);
}

// Without recording it.
inline void check_cell(Cell& cell, Kind kind, uint32_t bytes, bool is_initialised, const void* address) {
    if (cell.flags & ~kIsMixed) fail_flagged(cell, address);
    uint32_t written = cell.write.bytes;
    check_conflict(cell.write, kind, bytes, address);
    check_conflict(cell.read, kind, bytes, address);
    for (uint32_t at = cell.more; at; at = nodes[at].next) {
        const Record& record = nodes[at].record;
        check_conflict(record, kind, bytes, address);
        if (bit(record.kind) & kStores) written |= record.bytes;
    }
    if (kind != Kind::kWrite && !is_initialised && (written & bytes) != bytes)
        fail_at(kUninitialised, address, "bytes that were never written");
}

// A store takes the place of all that is known of its bytes.
inline void forget(Cell& cell, uint32_t bytes) {
    for (Record* record : {&cell.write, &cell.read})
        if (!(record->bytes &= ~bytes)) record->lanes = 0;
    uint32_t kept = 0, flags = 0;
    for (uint32_t at = cell.more; at;) {
        nodes[at].record.bytes &= ~bytes;
        if (!nodes[at].record.bytes) {
            at = nodes.drop(at);
            continue;
        }
        if (nodes[at].record.kind != Kind::kRead) flags = kIsMixed;
        const uint32_t next = nodes[at].next;
        nodes[at].next = kept;
        kept = at;
        at = next;
    }
    cell.more = kept;
    cell.flags = flags;
}

inline void add_record(Cell& cell, const Record& made) {
    cell.more = nodes.make(made, cell.more);
    if (made.kind != Kind::kRead) cell.flags |= kIsMixed;
}

inline void record_store(Cell& cell, const Record& made) {
    forget(cell, made.bytes);
    Record& last = cell.write;
    if (last.lanes == made.lanes && last.who == made.who && last.time == made.time) {
        last.bytes |= made.bytes;
        return;
    }
    if (last.lanes) add_record(cell, last);
    last = made;
}

// Whether `made` can take the place of `earlier`: what is ordered after it is ordered after both.
inline bool is_replaced(Record& earlier, const Record& made) {
    if (earlier.kind != made.kind || earlier.bytes & ~made.bytes) return false;
    if (made.who == kNobody || is_before(earlier, *self)) return true;
    if (earlier.who == made.who) earlier.lanes &= ~made.lanes;
    return false;
}

inline bool is_merged(Record& earlier, const Record& made) {
    if (earlier.who != made.who || earlier.time != made.time || earlier.bytes != made.bytes || earlier.kind != made.kind)
        return false;
    earlier.lanes |= made.lanes;
    earlier.site = made.site;
    return true;
}

// One that is not there yet. It goes in front, where the next lanes of the warp look first.
inline void insert(Cell& cell, const Record& made) {
    uint32_t kept = 0;
    for (uint32_t at = cell.more; at;) {
        if (is_replaced(nodes[at].record, made)) {
            at = nodes.drop(at);
            continue;
        }
        const uint32_t next = nodes[at].next;
        nodes[at].next = kept;
        kept = at;
        at = next;
    }
    cell.more = kept;
    if (made.kind != Kind::kRead && made.kind != Kind::kConstantRead) return add_record(cell, made);
    if (cell.read.lanes && !is_replaced(cell.read, made)) add_record(cell, cell.read);
    cell.read = made;
}

inline void record_other(Cell& cell, const Record& made) {
    if (cell.read.lanes && is_merged(cell.read, made)) return;
    for (uint32_t at = cell.more; at; at = nodes[at].next)
        if (is_merged(nodes[at].record, made)) return;
    insert(cell, made);
}

__attribute__((noinline)) inline void access_any(Cell& cell, Kind kind, uint32_t bytes, bool is_initialised,
                                                 const void* address) {
    check_cell(cell, kind, bytes, is_initialised, address);
    Record made = record_of(*self, kind, bytes);
    if (kind == Kind::kConstantRead) made.who = kNobody, made.time = 1, made.lanes = 1;
    if (kind == Kind::kWrite)
        record_store(cell, made);
    else
        record_other(cell, made);
}

// Of a cell that more than one warp reads: the own warp's record comes to the front.
__attribute__((noinline)) inline void record_load(Cell& cell, const Record& made) {
    for (uint32_t at = cell.more; at; at = nodes[at].next) {
        Record& record = nodes[at].record;
        if (record.who != made.who || record.bytes != made.bytes) continue;
        if (record.time != made.time) {
            if (record.time > self->warp->in_step) break;
            record = made;
        }
        record.lanes |= made.lanes;
        record.site = made.site;
        std::swap(record, cell.read);
        return;
    }
    insert(cell, made);
}

// The usual ones: of cells that were stored as a whole, or never.
inline void access_load(Cell& cell, uint32_t bytes, bool is_initialised, const void* address) {
    const Record& write = cell.write;
    Record& read = cell.read;
    const bool is_written = write.bytes == kAllBytes;
    if (cell.flags || !(is_written || (is_initialised && !write.bytes)) || read.kind != Kind::kRead ||
        (is_written && !is_before(write, *self)))
        return access_any(cell, Kind::kRead, bytes, is_initialised, address);
    const Record made = record_of(*self, Kind::kRead, bytes);
    if (read.lanes && read.who == made.who && read.time == made.time && read.bytes == made.bytes)
        read.lanes |= made.lanes;
    else if (!read.lanes || (!cell.more && !(read.bytes & ~bytes) && is_before(read, *self)))
        read = made;
    else
        record_load(cell, made);
}

inline void access_store(Cell& cell, uint32_t bytes, const void* address) {
    if (cell.flags || bytes != kAllBytes || (cell.write.lanes && !is_before(cell.write, *self)) ||
        (cell.read.lanes && (cell.read.kind != Kind::kRead || !is_before(cell.read, *self))))
        return access_any(cell, Kind::kWrite, bytes, true, address);
    for (uint32_t at = cell.more; at; at = nodes[at].next)
        if (!is_before(nodes[at].record, *self)) return access_any(cell, Kind::kWrite, bytes, true, address);
    for (uint32_t at = cell.more; at;) at = nodes.drop(at);
    cell.more = 0;
    cell.read.lanes = 0;
    cell.write = record_of(*self, Kind::kWrite, bytes);
}

}  // namespace headrace::emulation
