// Asynchronous copies: what is asked for happens later, as late as can be or by chance before.
//
// From asking to completion nobody may touch what is copied to, or write what is copied from. Once complete, the bytes
// are those of the mbarrier's phase that awaited them: only who has waited for it may use them.
#pragma once

#include "mbarriers.h"

namespace headrace::emulation {

// Copies of 16 bytes are a list, and complete together, with the arrival that was asked for them; a thread's such lists
// one after the other. Those that no arrival was asked for complete when their thread has waited for their group, and not
// before: until then nobody could use them anyway.
struct Copy {
    Lane* lane;
    uint32_t to, num_bytes;
    const char* from;
    const Memory* memory;
    Copy* next;         // of the same list
    uint32_t group;     // of its thread's
    // Of a list's first:
    Copy* next_batch;   // of the same thread
    Mbarrier* mbarrier;
    bool is_bulk;
    uint32_t site;
};

struct Copies {
    Copy* pool = nullptr;
    Copy* free = nullptr;
    uint32_t used = 0;
    Copy** completable = nullptr;  // firsts of lists that may complete next
    uint32_t num_completable = 0;
    uint32_t num_from_writable = 0;
    static constexpr uint32_t kMost = 1 << 22;

    void reset() {
        if (!pool) pool = reinterpret_cast<Copy*>(reserve(kMost * sizeof(Copy)));
        if (!completable) completable = reinterpret_cast<Copy**>(reserve(kMost * sizeof(Copy*)));
        free = nullptr;
        used = num_completable = num_from_writable = 0;
    }

    void release() { give_back(pool, kMost * sizeof(Copy)), give_back(completable, kMost * sizeof(Copy*)); }

    Copy& make() {
        Copy* made = free;
        if (made)
            free = made->next;
        else if (used == kMost)
            fail(kCall, "more than %u copies in flight", kMost);
        else
            made = &pool[used++];
        *made = {};
        return *made;
    }

    void drop(Copy& copy) {
        copy.lane = nullptr;
        copy.next = free;
        free = &copy;
    }
};

inline Copies copies;

// Whether the lane that stored, or the one that copies over it, has fenced in between.
inline bool is_fenced(const Record& store) {
    if (!store.lanes || store.who >= machine.num_warps) return true;
    if (self->fenced_in == self->warp->in_step + 1) return true;
    const Warp& warp = machine.warps[store.who];
    const uint32_t lane = __builtin_ctz(store.lanes), count = warp.num_fences[lane];
    const bool is_own = &warp.lanes[lane] == self;
    for (uint32_t i = 0; i < Warp::kFences && i < count; i++) {
        const uint32_t fence = warp.fences[lane][i];
        const Record after{fence + 1, store.lanes, store.who};
        if (fence >= store.time && (is_own || is_before(after, *self))) return true;
    }
    // Of more fences than are kept, an earlier one may have been right.
    return count > Warp::kFences && warp.fences[lane][count % Warp::kFences] > store.time;
}

inline void check_fenced(const Cell& cell, const void* address) {
    if (is_fenced(cell.write)) return;
    const Place place = place_of(address);
    Text text = begin_message();
    add_place(text, place);
    text.add(": a bulk copy to what was stored by ");
    add_who(text, cell.write.who, __builtin_ctz(cell.write.lanes));
    text.add(" @%x, with no fence_async_shared between", cell.write.site);
    end_run(kRace, place);
}

inline void begin_copy(Copy& copy, uint32_t to, const void* from, uint32_t num_bytes, bool is_bulk) {
    copy.lane = self;
    copy.site = self->site;
    copy.group = self->num_groups;
    copy.to = checked_offset<16>(to);
    copy.num_bytes = num_bytes;
    copy.from = static_cast<const char*>(from);
    copy.is_bulk = is_bulk;
    checked_memory<16>(from);
    Memory& memory = memory_of(from, num_bytes);
    Block& block = *self->block;
    if (num_bytes > machine.config.shared_bytes - copy.to) {
        begin_message().add("shared memory of block %u + %u, %u bytes: there are %u", block.index, copy.to, num_bytes,
                            machine.config.shared_bytes);
        end_run(kBounds, {"shared", static_cast<int>(block.index), copy.to});
    }
    if (memory.shadow) {
        Cell* cells = global_cell(memory, from);
        for (uint32_t i = 0; i < num_bytes / 4; i++) {
            check_cell(cells[i], Kind::kRead, kAllBytes, is_initialised(memory), copy.from + 4 * i);
            if (is_bulk && cells[i].write.lanes)
                fail_at(kRace, copy.from + 4 * i, "a bulk copy of what the launch has stored, with no fence for that");
        }
        copies.num_from_writable++;
        copy.memory = &memory;
    }
    const Record made = record_of(*self, Kind::kWrite, kAllBytes);
    for (uint32_t i = 0; i < num_bytes / 4; i++) {
        Cell& cell = block.shadow[copy.to / 4 + i];
        const char* address = block.shared + copy.to + 4 * i;
        check_cell(cell, Kind::kWrite, kAllBytes, true, address);
        if (is_bulk) check_fenced(cell, address);
        forget(cell, kAllBytes);
        cell.write = made;
        cell.flags = kIsInFlight;
    }
    machine.num_copies++;
    machine.accesses++;
}

inline void check_not_copied(const void* to, uint64_t num_bytes) {
    if (!copies.num_from_writable) return;
    const auto* at = static_cast<const char*>(to);
    for (uint32_t i = 0; i < copies.used; i++) {
        const Copy& copy = copies.pool[i];
        if (!copy.lane || !copy.memory || at >= copy.from + copy.num_bytes || at + num_bytes <= copy.from) continue;
        const Place place = place_of(to);
        Text text = begin_message();
        add_place(text, place);
        text.add(": a store to what is being copied, as asked for by ");
        add_lane(text, *copy.lane);
        text.add(" @%x", copy.site);
        end_run(kRace, place);
    }
}

// `done`: who may use it.
inline void finish_copy(const Copy& copy, const Record& done) {
    Block& block = *copy.lane->block;
    memcpy(block.shared + copy.to, copy.from, copy.num_bytes);
    for (uint32_t i = 0; i < copy.num_bytes / 4; i++) {
        Cell& cell = block.shadow[copy.to / 4 + i];
        cell.write = done;
        cell.flags = 0;
    }
    if (!copy.memory) return;
    copies.num_from_writable--;
    Record read = done;
    read.kind = Kind::kRead;
    Cell* cells = global_cell(*copy.memory, copy.from);
    for (uint32_t i = 0; i < copy.num_bytes / 4; i++) add_record(cells[i], read);
}

inline void finish_copy(const Copy& copy, const Mbarrier& mbarrier) {
    finish_copy(copy, {mbarrier.phase + 1, 1, static_cast<uint16_t>(mbarrier.who), kAllBytes, Kind::kWrite, copy.site});
}

inline void make_completable(Copy& copy) { copies.completable[copies.num_completable++] = &copy; }

inline void complete(Copy& first) {
    Mbarrier& mbarrier = *first.mbarrier;
    Lane& lane = *first.lane;
    if (first.is_bulk) {
        finish_copy(first, mbarrier);
        mbarrier.pending_bytes -= first.num_bytes;
        copies.drop(first);
        complete_if_done(mbarrier);
        return;
    }
    lane.first_batch = first.next_batch;
    if (lane.first_batch)
        make_completable(*lane.first_batch);
    else
        lane.last_batch = nullptr;
    for (Copy* copy = &first; copy;) {
        Copy* next = copy->next;
        if (copy->num_bytes) finish_copy(*copy, mbarrier);
        copies.drop(*copy);
        copy = next;
    }
    if (!arrive(mbarrier)) {
        Text text = message();
        add_lane(text, lane);
        text.add(": copy_async_arrive @%x: one arrival more than the %u of a phase", first.site, mbarrier.arrivals);
        end_run(kBarrierMisuse, {"shared", static_cast<int>(lane.block->index), mbarrier.offset});
    }
}

inline bool complete_some_copy() {
    if (!copies.num_completable) return false;
    const uint32_t index = random_below(copies.num_completable);
    Copy& chosen = *copies.completable[index];
    copies.completable[index] = copies.completable[--copies.num_completable];
    complete(chosen);
    return true;
}

void copy_async(uint32_t to, const void* from) {
    begin(Op::kCopyAsync, to, HEADRACE_SITE());
    switch_point();
    Copy& copy = copies.make();
    begin_copy(copy, to, from, 16, false);
    copy.next = self->unclaimed;
    self->unclaimed = &copy;
}

void copy_async_arrive(uint32_t at) {
    begin(Op::kCopyAsyncArrive, at, HEADRACE_SITE());
    switch_point();
    Mbarrier& mbarrier = checked_mbarrier(at);
    Copy& first = copies.make();
    first.lane = self;
    first.site = self->site;
    first.next = self->unclaimed;
    first.mbarrier = &mbarrier;
    self->unclaimed = nullptr;
    if (self->last_batch) {
        self->last_batch->next_batch = &first;
    } else {
        self->first_batch = &first;
        make_completable(first);
    }
    self->last_batch = &first;
}

void copy_async_commit() {
    begin(Op::kCopyAsyncCommit, 0, HEADRACE_SITE());
    self->num_groups++;
}

void copy_async_wait(uint32_t num_groups) {
    begin(Op::kCopyAsyncWait, num_groups, HEADRACE_SITE());
    switch_point();
    Record done = record_of(*self, Kind::kWrite, kAllBytes);
    touch();
    for (Copy** at = &self->unclaimed; *at;) {
        Copy& copy = **at;
        if (copy.group + num_groups >= self->num_groups) {
            at = &copy.next;
            continue;
        }
        *at = copy.next;
        done.site = copy.site;
        finish_copy(copy, done);
        copies.drop(copy);
    }
}

void copy_bulk(uint32_t to, const void* from, uint32_t num_bytes, uint32_t at) {
    begin(Op::kCopyBulk, to, HEADRACE_SITE());
    switch_point();
    self->operand[0] = num_bytes;
    Mbarrier& mbarrier = checked_mbarrier(at);
    if (!mbarrier.is_fenced)
        fail_at(kBarrierMisuse, self->block->shared + mbarrier.offset, "no fence_mbarrier_init after mbarrier_init");
    if (num_bytes % 16 || !num_bytes) fail(kAlignment, "%u bytes are no multiple of 16", num_bytes);
    Copy& copy = copies.make();
    copy.mbarrier = &mbarrier;
    begin_copy(copy, to, from, num_bytes, true);
    make_completable(copy);
}

// A step in the lane's time: whoever knows of what it does next knows of the fence.
void fence_async_shared() {
    begin(Op::kFenceAsyncShared, 0, HEADRACE_SITE());
    Warp& warp = *self->warp;
    const uint32_t lane = self->identity.lane;
    warp.fences[lane][warp.num_fences[lane]++ % Warp::kFences] = warp.times[lane];
    if (warp.latest < ++warp.times[lane]) warp.latest = warp.times[lane];
    warp.dirty |= lane_bit(*self);
    self->fenced_in = warp.in_step + 1;
}

}  // namespace headrace::emulation
