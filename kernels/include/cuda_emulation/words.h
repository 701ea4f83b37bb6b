// Integers that lanes add to and poll, in shared and in global memory: what orders blocks, and roles in a block.
#pragma once

#include "accesses.h"

namespace headrace::emulation {

class Words {
  public:
    void reset() {
        if (!slots_) slots_ = reinterpret_cast<Word*>(reserve(kSlots * sizeof(Word)));
        if (!used_) used_ = reinterpret_cast<uint32_t*>(reserve(kSlots * sizeof(uint32_t)));
        num_used_ = 0;
    }

    void release() { give_back(slots_, kSlots * sizeof(Word)), give_back(used_, kSlots * sizeof(uint32_t)); }

    Word& at(const void* address) {
        const auto key = reinterpret_cast<uint64_t>(address);
        for (uint32_t i = static_cast<uint32_t>(key * 0x9e3779b97f4a7c15 >> 40) % kSlots;; i = (i + 1) % kSlots) {
            Word& word = slots_[i];
            if (word.run != machine.run) {
                if (num_used_ == kSlots / 2) fail(kCall, "more than %u words that are polled", kSlots / 2);
                word = {key, machine.run, nullptr, {}};
                used_[num_used_++] = i;
                return word;
            }
            if (word.address == key) return word;
        }
    }

    template <class Visit>
    void visit(const Visit& visit) {
        for (uint32_t i = 0; i < num_used_; i++) visit(slots_[used_[i]]);
    }

  private:
    static constexpr uint32_t kSlots = 1 << 17;
    Word* slots_ = nullptr;
    uint32_t *used_ = nullptr, num_used_ = 0;
};

inline Words words;

inline void unpark_all() {
    words.visit([](Word& word) {
        if (word.waiters.first) unpark(word.waiters);
    });
    for (uint32_t i = 0; i < machine.config.num_blocks; i++)
        for (uint32_t j = 0; j < machine.blocks[i].num_mbarriers; j++)
            if (Waiters& waiters = machine.blocks[i].mbarriers[j].waiters; waiters.first) unpark(waiters);
}

inline void access_word(Cell& cell, Kind kind, bool is_initialised, const void* address) {
    touch();
    access_any(cell, kind, kAllBytes, is_initialised, address);
}

inline Cell& shared_cell(uint32_t offset) { return self->block->shadow[offset / 4]; }

inline Cell* global_cell(const Memory& memory, const void* address) {
    return memory.shadow ? memory.shadow + (reinterpret_cast<uint64_t>(address) - memory.begin) / 4 : nullptr;
}

inline uint32_t value_at(const void* address) {
    uint32_t value;
    memcpy(&value, address, sizeof value);
    return value;
}

// What it reads is what it acquires: nothing else runs in between.
inline uint32_t look_at(Word& word, Cell* cell, bool is_initialised, const void* address) {
    park_if_seen(word.waiters);
    if (cell) access_word(*cell, Kind::kAtomicRead, is_initialised, address);
    acquire(word.released);
    return self->operand[0] = value_at(address);
}

inline void add_to(Word& word, Cell& cell, bool is_initialised, void* address, uint32_t value) {
    access_word(cell, Kind::kAtomicWrite, is_initialised, address);
    release(word.released);
    const uint32_t sum = value_at(address) + value;
    memcpy(address, &sum, sizeof sum);
    wake(word.waiters);
}

uint32_t load_shared_acquire(uint32_t from) {
    begin_poll(Op::kLoadSharedAcquire, from, HEADRACE_SITE());
    const uint32_t offset = checked_offset<4>(from);
    switch_point();
    const char* address = self->block->shared + offset;
    return look_at(words.at(address), &shared_cell(offset), false, address);
}

void add_shared_release(uint32_t to, uint32_t value) {
    begin(Op::kAddSharedRelease, to, HEADRACE_SITE());
    const uint32_t offset = checked_offset<4>(to);
    switch_point();
    char* address = self->block->shared + offset;
    add_to(words.at(address), shared_cell(offset), false, address, value);
}

uint32_t load_acquire(const uint32_t* from) {
    begin_poll(Op::kLoadAcquire, reinterpret_cast<uint64_t>(from), HEADRACE_SITE());
    const Memory& memory = checked_memory<4>(from);
    switch_point();
    return look_at(words.at(from), global_cell(memory, from), is_initialised(memory), from);
}

void add_release(uint32_t* to, uint32_t value) {
    begin(Op::kAddRelease, reinterpret_cast<uint64_t>(to), HEADRACE_SITE());
    const Memory& memory = checked_memory<4>(to);
    check_writable(memory, to);
    switch_point();
    add_to(words.at(to), *global_cell(memory, to), is_initialised(memory), to, value);
}

uint32_t add_acquire_release(uint32_t* to, uint32_t value) {
    begin(Op::kAddAcquireRelease, reinterpret_cast<uint64_t>(to), HEADRACE_SITE());
    const Memory& memory = checked_memory<4>(to);
    check_writable(memory, to);
    switch_point();
    Word& word = words.at(to);
    const uint32_t previous = value_at(to);
    acquire(word.released);
    add_to(word, *global_cell(memory, to), is_initialised(memory), to, value);
    return previous;
}

uint32_t compare_exchange(uint32_t* at, uint32_t expected, uint32_t desired) {
    begin(Op::kCompareExchange, reinterpret_cast<uint64_t>(at), HEADRACE_SITE());
    const Memory& memory = checked_memory<4>(at);
    check_writable(memory, at);
    switch_point();
    access_word(*global_cell(memory, at), Kind::kAtomicWrite, is_initialised(memory), at);
    const uint32_t previous = value_at(at);
    if (previous == expected) {
        memcpy(at, &desired, sizeof desired);
        wake(words.at(at).waiters);
    }
    return previous;
}

void store_system(uint32_t* to, uint32_t value) {
    begin(Op::kStoreSystem, reinterpret_cast<uint64_t>(to), HEADRACE_SITE());
    const Memory& memory = checked_memory<4>(to);
    check_writable(memory, to);
    switch_point();
    access_word(*global_cell(memory, to), Kind::kAtomicWrite, true, to);
    memcpy(to, &value, sizeof value);
    wake(words.at(to).waiters);
}

}  // namespace headrace::emulation
