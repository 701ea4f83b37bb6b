// What the host hands a step's kernel, by value, and what the kernel reports when it gives up. The twin that
// fills these is megakernel/cuda_arguments.py; a test holds the two together.
#pragma once

#include <cstddef>
#include <cstdint>

struct float2;  // of CUDA, or of its emulation

namespace headrace {

// Of row_flags; a row without any asks nothing of the head.
constexpr int32_t kWantsLogits = 1;      // its logits over the whole vocabulary are handed out
constexpr int32_t kWantsReductions = 2;  // values and tokens of the row are handed out
constexpr int32_t kIsRestricted = 4;     // only logits of needed spans are computed, for its allowed tokens

enum FailureCode : uint32_t {
    kNoFailure = 0,
    kCounterWait = 1,
    kWeightsWait = 2,
    kProgressWait = 3,
    kStepWait = 4,
    kReporting = 0xffffffff
};

constexpr uint32_t kNoIndex = 0xffffffff;  // of a failure that has no such thing

// In host memory that the device sees. The first to fail swaps `code` from 0 to kReporting, fills in the rest, then
// `code`, and traps. `instruction` counts on from step to step of a launch; `step` is which of them it was.
struct Failure {
    uint32_t code, block, warp, instruction, counter, expected, actual, step;
};

constexpr uint32_t kLastStep = 0x80000000;  // of words that count steps: there are no more
constexpr uint64_t kEmptyKey = ~uint64_t{0};  // of DraftAutomaton's hash table
constexpr int32_t kNoToken = -1, kNoState = -1;

// Several steps in one launch: what one leaves decides the rows of the next (ops/advance.h). Row i * rows_a_sequence is
// sequence i's pending token; its draft follows, then rows of no use, which write slots of their own.
struct MultiStepArguments {
    int32_t* remaining;      // [sequences] tokens to emit; 0: it has ended
    int32_t* chain_lengths;  // [sequences] the pending token and its draft
    int32_t* draft_states;   // [sequences]
    const int32_t *stop_starts, *stop_token_ids;  // [sequences + 1] into the second

    // DraftAutomaton's arrays; none without drafts.
    const uint64_t* keys;
    const int32_t *next_states, *fallbacks, *best_tokens, *best_states;

    // In host memory: by step the sequences' counts of emitted tokens, then all rows' tokens, maxima, log-sum-exps;
    // how many steps are in there, and kLastStep; how many may run at most, by what the host says at that time.
    uint32_t *ring, *told;
    const uint32_t* allowed;

    // In device memory, zero at first: blocks that have handed out a step's results, summed over steps; steps begun
    // after the first, and kLastStep.
    uint32_t *results, *begun;

    uint32_t key_mask;
    int32_t num_steps, num_sequences, rows_a_sequence, first_unused_slot;
};

// All pointers are of the device. Arrays of rows hold num_rows; outputs are by the step's row, asked for or not.
struct StepArguments {
    const uint8_t* weights;  // packed
    uint8_t* activations;    // buffers between ops, at offsets that the generated source has as literals
    uint16_t* kv;            // float16 [layers][num_slots][2 * kv_heads * head_dim]: K heads, then V heads
    const float2* turns;     // [max_context_tokens][head_dim / 2] (cos, sin)
    uint32_t* counters;      // [the artifact's counters + 64], zeroed once at load; attention's set back, the others never
    Failure* failure;

    // Written between the steps of a launch; with several, path_slots are slots.
    int32_t *token_ids, *positions, *slots;
    int32_t* context_lengths;        // committed tokens of the row's sequence
    const int32_t* path_slots;       // of positions context_length .. position: ancestors first, itself last

    const int32_t* path_starts;      // [rows + 1] into path_slots
    const int32_t* table_rows;       // the row's line of block_tables
    const int32_t* block_tables;     // [sequences][max_blocks]; -1 past a sequence's last block
    const int32_t* row_flags;
    const uint32_t* needed_spans;    // bit i % 32 of word i / 32: whether a row needs span i of the head's columns
    const int32_t *allowed_starts, *allowed_token_ids;  // [rows + 1] into the second; ascending in a row

    float* logits;          // [rows][vocab]
    float* stats;           // [rows][3 * spans]
    float* values;          // [rows][2 + top_k]: maximum, log-sum-exp, the top's logits
    int32_t* tokens;        // [rows][1 + top_k]: the maximum's token, the top's
    float* allowed_logits;  // [allowed]

    int64_t num_slots;
    int32_t num_rows, max_blocks, block_size_tokens, top_k;
    uint32_t epoch;  // steps run before this launch on these counters, modulo 2^32
    uint64_t timeout_ns;

    MultiStepArguments run;

    // Kernels built with HEADRACE_TRACE: [blocks][2 roles][trace_instructions + 1][kTraceEvents]; see trace.h.
    uint32_t* trace;
    uint32_t trace_instructions;
};

static_assert(sizeof(Failure) == 32);
static_assert(sizeof(MultiStepArguments) == 144 && sizeof(StepArguments) == 240 + 144);

}  // namespace headrace
