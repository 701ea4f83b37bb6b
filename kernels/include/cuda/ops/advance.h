// From a step to the next of the same launch: which tokens are emitted, and the rows that follow from them. The plain
// way to the same is SequenceState of multi_step.py.
#pragma once

#include "cuda/ops/results.h"

namespace headrace {

// As first_slot_of of draft_automaton.py.
__device__ __forceinline__ uint32_t first_slot_of(uint64_t key, uint32_t mask) {
    return static_cast<uint32_t>(key * 0x9e3779b97f4a7c15 >> 32) & mask;
}

__device__ __forceinline__ int32_t find_transition(const MultiStepArguments& run, int32_t state, int32_t token) {
    const uint64_t key = static_cast<uint64_t>(state) << 32 | static_cast<uint32_t>(token);
    for (uint32_t slot = first_slot_of(key, run.key_mask);; slot = (slot + 1) & run.key_mask) {
        const uint64_t held = ptx::load_constant(run.keys + slot);
        if (held == key) return ptx::load_constant(run.next_states + slot);
        if (held == kEmptyKey) return kNoState;
    }
}

// The longest suffix, of what led to `state` and `token`, that the automaton knows.
__device__ __forceinline__ int32_t follow(const MultiStepArguments& run, int32_t state, int32_t token) {
    while (true) {
        const int32_t found = find_transition(run, state, token);
        if (found != kNoState) return found;
        const int32_t fallback = ptx::load_constant(run.fallbacks + state);
        if (fallback == state) return state;
        state = fallback;
    }
}

__device__ __forceinline__ bool is_stop_token(const MultiStepArguments& run, int sequence, int32_t token) {
    const int end = ptx::load_constant(run.stop_starts + sequence + 1);
    for (int i = ptx::load_constant(run.stop_starts + sequence); i < end; i++)
        if (ptx::load_constant(run.stop_token_ids + i) == token) return true;
    return false;
}

struct Sequence {
    int32_t context, remaining, state, pending;
};

// How many of a sequence's answers are emitted: the model's own tokens, for as long as the draft foresaw them.
__device__ __forceinline__ int accept_answers(const StepArguments& step, int index, Sequence& sequence) {
    const MultiStepArguments& run = step.run;
    const int first = index * run.rows_a_sequence, length = ptx::load_global(run.chain_lengths + index);
    int count = 0;
    do {
        const int row = first + count++;
        sequence.pending = ptx::load_global(step.tokens + row);
        sequence.context++;
        sequence.remaining--;
        if (!is_finite(ptx::load_global(step.values + 2 * row)) || is_stop_token(run, index, sequence.pending))
            sequence.remaining = 0;
        else if (run.keys)
            sequence.state = follow(run, sequence.state, sequence.pending);
    } while (sequence.remaining > 0 && count < length &&
             ptx::load_global(step.token_ids + first + count) == sequence.pending);
    return count;
}

// The sequence's rows of the next step. Rows of no use attend to one token, so they cost little.
__device__ __forceinline__ void write_rows(const StepArguments& step, int index, const Sequence& sequence) {
    const MultiStepArguments& run = step.run;
    const int first = index * run.rows_a_sequence;
    const int64_t line = static_cast<int64_t>(index) * step.max_blocks;
    int32_t token = sequence.remaining > 0 ? sequence.pending : kNoToken, state = sequence.state, length = 0;
    for (int i = 0; i < run.rows_a_sequence; i++) {
        const bool is_used = token != kNoToken && i < sequence.remaining;
        const int row = first + i, position = is_used ? sequence.context + i : 0;
        int32_t slot = run.first_unused_slot + row;
        if (is_used) {
            const int block = ptx::load_constant(step.block_tables + line + position / step.block_size_tokens);
            slot = block * step.block_size_tokens + position % step.block_size_tokens;
        }
        ptx::store_global(step.token_ids + row, is_used ? token : 0);
        ptx::store_global(step.positions + row, position);
        ptx::store_global(step.slots + row, slot);
        ptx::store_global(step.context_lengths + row, is_used ? sequence.context : 0);
        length += is_used;
        token = kNoToken;
        if (is_used && run.keys) {
            token = ptx::load_constant(run.best_tokens + state);
            state = ptx::load_constant(run.best_states + state);
        }
    }
    ptx::store_global(run.chain_lengths + index, length);
    ptx::store_global(run.remaining + index, sequence.remaining);
    ptx::store_global(run.draft_states + index, sequence.state);
}

// What the host is told of step `number`: it sees it all once `told` says so.
__device__ __forceinline__ void write_ring(const StepArguments& step, uint32_t number, int index, int count) {
    const MultiStepArguments& run = step.run;
    const int num_rows = step.num_rows, first = index * run.rows_a_sequence;
    uint32_t* to = run.ring + static_cast<int64_t>(number) * (run.num_sequences + 3 * num_rows);
    ptx::store_system(to + index, count);
    to += run.num_sequences;
    for (int row = first; row < first + count; row++) {
        ptx::store_system(to + row, ptx::load_global(step.tokens + row));
        ptx::store_system(to + num_rows + row, float_bits(ptx::load_global(step.values + 2 * row)));
        ptx::store_system(to + 2 * num_rows + row, float_bits(ptx::load_global(step.values + 2 * row + 1)));
    }
}

// By one warp, a lane a sequence, once all results of step `number` are there. Whether another step follows is told to
// all blocks first and to the host then.
__device__ __forceinline__ void advance(const Worker& w, uint32_t number, uint32_t allowed) {
    const StepArguments& step = w.step;
    const MultiStepArguments& run = step.run;
    bool is_live = false;
    for (int index = w.lane; index < run.num_sequences; index += kLanes) {
        Sequence sequence{0, ptx::load_global(run.remaining + index), 0, 0};
        int count = 0;
        if (sequence.remaining > 0) {
            sequence.context = ptx::load_global(step.context_lengths + index * run.rows_a_sequence);
            sequence.state = ptx::load_global(run.draft_states + index);
            count = accept_answers(step, index, sequence);
            write_rows(step, index, sequence);
        }
        is_live |= sequence.remaining > 0;
        write_ring(step, number, index, count);
    }
    const uint32_t done = number + 1;
    const bool is_last = !ptx::ballot(is_live) || done >= static_cast<uint32_t>(run.num_steps) || done >= allowed;
    ptx::sync_warp();
    if (w.lane == 0) {
        ptx::add_release(run.begun, is_last ? kLastStep : 1);
        ptx::fence_system();
        ptx::store_system(run.told, is_last ? done | kLastStep : done);
    }
}

// Consumers, after a step's results: whether the launch has another step.
__device__ __forceinline__ bool begin_next_step(const Worker w) {
    const MultiStepArguments& run = w.step.run;
    if (run.num_steps == 1) return false;
    const uint32_t num_blocks = ptx::num_blocks(), num_rows = w.step.num_rows;
    const uint32_t num_handing_out = num_rows < num_blocks ? num_rows : num_blocks;
    const uint32_t number = ptx::load_shared<uint32_t>(w.shared + kEpochAt) - w.step.epoch;
    sync_consumers();
    if (w.thread == 0 && w.sm < num_handing_out) ptx::add_release(run.results, 1);
    if (w.sm == 0 && w.warp == 0) {
        uint32_t allowed = 0;
        if (w.lane == 0) {
            allowed = ptx::load_system(run.allowed);  // it takes its time: asked for before the wait
            wait_word(w, run.results, (number + 1) * num_handing_out);
        }
        allowed = ptx::shuffle(allowed, 0);
        ptx::sync_warp();
        advance(w, number, allowed);
    }
    if (w.thread == 0) {
        const uint32_t begun = wait_word(w, run.begun, number + 1);
        ptx::store_shared(w.shared + kEpochAt, w.step.epoch + number + 1);
        ptx::add_shared_release(w.shared + kBegunAt, begun & kLastStep ? kLastStep : 1);
    }
    sync_consumers();
    return !(ptx::load_shared<uint32_t>(w.shared + kBegunAt) & kLastStep);
}

// Loader, likewise: `begun` steps after the first. Its block's consumers are done with all pages then.
__device__ __forceinline__ bool wait_next_step(const Worker& w, uint32_t begun) {
    if (w.step.run.num_steps == 1) return false;
    const uint64_t start = ptx::nanoseconds();
    uint32_t actual;
    while ((actual = ptx::load_shared_acquire(w.shared + kBegunAt)) < begun)
        if (ptx::nanoseconds() - start > 2 * w.step.timeout_ns) fail(w, w.instruction, kStepWait, kNoIndex, begun, actual);
    return !(actual & kLastStep);
}

}  // namespace headrace
