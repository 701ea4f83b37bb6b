// Loads and stores: bounds, alignment, what was written, and races.
#pragma once

#include "knowledge.h"
#include "scheduler.h"
#include "shadow.h"

namespace headrace::emulation {

inline void touch() {
    self->warp->dirty |= lane_bit(*self);
    machine.accesses++;
}

// Calls visit(cell, bytes of it, its host address) for every cell of `num_bytes` at `offset` behind `base`.
template <uint32_t num_bytes, class Visit>
inline void visit_cells(Cell* shadow, char* base, uint64_t offset, const Visit& visit) {
    Cell* cell = shadow + offset / 4;
    if constexpr (num_bytes < 4)
        return visit(*cell, ((1u << num_bytes) - 1) << offset % 4, base + offset);
    else
        for (uint32_t i = 0; i < num_bytes / 4; i++) visit(cell[i], kAllBytes, base + offset + 4 * i);
}

template <uint32_t num_bytes>
inline uint32_t checked_offset(uint32_t address) {
    const uint32_t offset = address - kSharedBase;
    if (offset > machine.config.shared_bytes || machine.config.shared_bytes - offset < num_bytes) {
        const auto block = static_cast<int>(self->identity.block), signed_offset = static_cast<int>(offset);
        begin_message().add("shared memory of block %d + %d, %u bytes: there are %u", block, signed_offset, num_bytes,
                            machine.config.shared_bytes);
        end_run(kBounds, {"shared", block, signed_offset});
    }
    if (offset % num_bytes)
        fail_at(kAlignment, self->block->shared + offset, "%u bytes at an address that is no multiple", num_bytes);
    return offset;
}

[[noreturn]] __attribute__((noinline)) inline void fail_outside(const void* address, uint64_t num_bytes) {
    const auto at = reinterpret_cast<uint64_t>(address);
    const Memory* nearest = nullptr;
    uint64_t distance = ~uint64_t{0};
    for (uint32_t i = 0; i < machine.num_memories; i++) {
        const Memory& memory = machine.memories[i];
        const uint64_t away = at >= memory.end ? at - memory.end : at + num_bytes > memory.begin ? 0 : memory.begin - at;
        if (away < distance) nearest = &memory, distance = away;
    }
    Text text = begin_message();
    constexpr uint64_t kNear = 1 << 20;
    if (!nearest || distance > kNear) {
        text.add("%llu bytes at an address in no region", static_cast<unsigned long long>(num_bytes));
        end_run(kBounds);
    }
    const auto offset = static_cast<long long>(at - nearest->begin);
    text.add("%s + %lld, %llu bytes: the region has %llu", nearest->region.name, offset,
             static_cast<unsigned long long>(num_bytes), static_cast<unsigned long long>(nearest->region.num_bytes));
    end_run(kBounds, {nearest->region.name, -1, offset});
}

inline Memory& memory_of(const void* address, uint64_t num_bytes) {
    const auto at = reinterpret_cast<uint64_t>(address);
    Memory* memory = machine.last_memory;
    if (memory && at >= memory->begin && at + num_bytes <= memory->end) return *memory;
    for (uint32_t i = 0; i < machine.num_memories; i++) {
        memory = &machine.memories[i];
        if (at >= memory->begin && at + num_bytes <= memory->end) return *(machine.last_memory = memory);
    }
    fail_outside(address, num_bytes);
}

template <uint32_t num_bytes>
inline Memory& checked_memory(const void* address) {
    Memory& memory = memory_of(address, num_bytes);
    if (reinterpret_cast<uint64_t>(address) % num_bytes)
        fail_at(kAlignment, address, "%u bytes at an address that is no multiple", num_bytes);
    return memory;
}

inline bool is_initialised(const Memory& memory) { return !(memory.region.flags & kUninitialisedRegion); }

// Calls visit as above for every cell of a writable region; others need no watching.
template <uint32_t num_bytes, class Visit>
inline void visit_memory(const Memory& memory, const void* address, const Visit& visit) {
    if (!memory.shadow) return;
    visit_cells<num_bytes>(memory.shadow, reinterpret_cast<char*>(memory.begin),
                           reinterpret_cast<uint64_t>(address) - memory.begin, visit);
}

template <uint32_t num_bytes>
inline const void* load_checked(Block& block, uint32_t from) {
    touch();
    const uint32_t offset = checked_offset<num_bytes>(from);
    visit_cells<num_bytes>(block.shadow, block.shared, offset, [](Cell& cell, uint32_t bytes, const char* address) {
        access_load(cell, bytes, false, address);
    });
    return block.shared + offset;
}

template <uint32_t num_bytes>
const void* shared_to_load(uint32_t from) {
    begin(Op::kLoadShared, from, HEADRACE_SITE());
    return load_checked<num_bytes>(*self->block, from);
}

template <uint32_t num_bytes>
void* shared_to_store(uint32_t to) {
    begin(Op::kStoreShared, to, HEADRACE_SITE());
    touch();
    const uint32_t offset = checked_offset<num_bytes>(to);
    Block& block = *self->block;
    visit_cells<num_bytes>(block.shadow, block.shared, offset,
                           [](Cell& cell, uint32_t bytes, const char* address) { access_store(cell, bytes, address); });
    return block.shared + offset;
}

template <uint32_t num_bytes>
const void* global_to_load(const void* from) {
    begin(Op::kLoadGlobal, reinterpret_cast<uint64_t>(from), HEADRACE_SITE());
    touch();
    const Memory& memory = checked_memory<num_bytes>(from);
    const bool is_ready = is_initialised(memory);
    visit_memory<num_bytes>(memory, from, [is_ready](Cell& cell, uint32_t bytes, const char* address) {
        access_load(cell, bytes, is_ready, address);
    });
    return from;
}

template <uint32_t num_bytes>
const void* constant_to_load(const void* from) {
    begin(Op::kLoadConstant, reinterpret_cast<uint64_t>(from), HEADRACE_SITE());
    machine.accesses++;
    const Memory& memory = checked_memory<num_bytes>(from);
    const bool is_ready = is_initialised(memory);
    visit_memory<num_bytes>(memory, from, [is_ready](Cell& cell, uint32_t bytes, const char* address) {
        const Record& read = cell.read;
        const bool is_known = read.kind == Kind::kConstantRead && read.lanes && !(bytes & ~read.bytes);
        if (!is_known) access_any(cell, Kind::kConstantRead, bytes, is_ready, address);
    });
    return from;
}

void check_not_copied(const void* to, uint64_t num_bytes);  // copies.h

inline void check_writable(const Memory& memory, const void* to) {
    if (!(memory.region.flags & kWritable)) fail_at(kReadOnly, to, "a store to what is only read");
}

template <uint32_t num_bytes>
void* global_to_store(void* to) {
    begin(Op::kStoreGlobal, reinterpret_cast<uint64_t>(to), HEADRACE_SITE());
    touch();
    const Memory& memory = checked_memory<num_bytes>(to);
    check_writable(memory, to);
    check_not_copied(to, num_bytes);
    visit_memory<num_bytes>(memory, to,
                            [](Cell& cell, uint32_t bytes, const char* address) { access_store(cell, bytes, address); });
    return to;
}

// After global_to_store. A journal that is full loses what follows: the count of stores tells.
void keep_store(const void* to, const void* value, uint32_t num_bytes) {
    const uint64_t number = machine.num_stores++;
    if (number >= machine.config.journal_stores) return;
    Store& store = machine.config.journal[number];
    store = {reinterpret_cast<uint64_t>(to), num_bytes, 0, {}};
    memcpy(store.value, value, num_bytes);
}

void prefetch(const void* from) {
    begin(Op::kPrefetch, reinterpret_cast<uint64_t>(from), HEADRACE_SITE());
    memory_of(from, 1);
}

}  // namespace headrace::emulation
