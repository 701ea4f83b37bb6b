// One step's run-time data: what the host hands over, checked, and what instructions read of it.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/head_rows.h"
#include "cpu/lanes.h"
#include "cpu/worker.h"

namespace headrace {

constexpr int kMaxRows = 256;
constexpr int kTokensABlock = kLanes;  // of the pool's own small blocks, in which K is stored transposed
constexpr int kNoParent = -1;
// A row's path past the committed tokens spans at most kMaxRows positions, with a part of a small block on either side.
constexpr int kMaxTailBlocks = kMaxRows / kTokensABlock + 2;

// As the host passes it: see StepBatch (decode_workers/step_batch.py) for what the arrays hold.
struct StepInput {
    int32_t num_rows, num_sequences, max_blocks;
    const int32_t *token_ids, *positions, *slots, *parents, *sequence_starts, *context_lengths, *block_tables;
    const int32_t *held_starts, *held_slots;  // null: no row has held ancestors
    HeadInput head;
};

// What a program and its pool fix for all steps.
struct Limits {
    int32_t vocab_size, head_dim, max_context_tokens, block_size_tokens, num_blocks;

    int64_t num_slots() const { return int64_t{num_blocks} * block_size_tokens; }
    int64_t num_small_blocks() const { return num_slots() / kTokensABlock; }
};

struct Row {
    int32_t token, position, slot;
    // Positions [0, tail_start) lie in whole small blocks of the pool, in order: `blocks`, shared by the rows
    // of a sequence. Positions [tail_start, position] have a slot each: `tail_slots`.
    int32_t tail_start;
    const int32_t* blocks;
    int32_t tail_slots[kMaxTailBlocks * kTokensABlock];
    // Leading tokens that this row and the one before it read from the same small blocks, whole ones.
    int32_t shared_tokens;

    int num_tokens() const { return position + 1; }
    int tokens_in_blocks() const { return std::min(num_tokens(), tail_start) / kTokensABlock * kTokensABlock; }
};

struct Step {
    int num_rows = 0, num_sequences = 0;
    Row rows[kMaxRows];
    int32_t sequence_starts[kMaxRows + 1];
    float* turns = nullptr;  // [rows, head_dim]: cosines of each row's position, then sines
    HeadRows head;

    const std::byte* weights = nullptr;
    const std::byte* embedding = nullptr;
    std::byte* activations = nullptr;
    std::byte *keys = nullptr, *values = nullptr;  // [layer][kv head][small block]
    int64_t num_small_blocks = 0;
};

// Derives a Step from its input; keeps the memory that a Step points to.
class StepReader {
   public:
    StepReader(const Limits& limits, const double* frequencies, Step& step)
        : limits_(limits),
          frequencies_(frequencies),
          step_(step),
          blocks_(kMaxRows),
          turns_(size_t{kMaxRows} * limits.head_dim) {
        step_.turns = turns_.data();
    }

    // Null, or what is wrong with the input; then the step must not run.
    const char* read(const StepInput& input) {
        if (input.num_rows < 1 || input.num_rows > kMaxRows) return say("a step has 1 to %d rows, not %d", kMaxRows, input.num_rows);
        if (input.num_sequences < 1 || input.num_sequences > input.num_rows)
            return say("%d rows cannot be of %d sequences", input.num_rows, input.num_sequences);
        if (input.sequence_starts[0] != 0 || input.sequence_starts[input.num_sequences] != input.num_rows)
            return say("sequence starts do not cover the %d rows", input.num_rows);
        if (const char* problem = check_held(input)) return problem;
        step_.num_rows = input.num_rows;
        step_.num_sequences = input.num_sequences;
        for (int i = 0; i <= input.num_sequences; i++) step_.sequence_starts[i] = input.sequence_starts[i];
        for (int i = 0; i < input.num_sequences; i++)
            if (const char* problem = read_sequence(input, i)) return problem;
        find_shared();
        return nullptr;
    }

   private:
    template <class... Parts>
    const char* say(const char* format, Parts... parts) {
        snprintf(problem_, sizeof problem_, format, parts...);
        return problem_;
    }

    const char* check_held(const StepInput& input) {
        if (!input.held_starts) return nullptr;
        if (input.held_starts[0] != 0) return say("held_starts begin at %d", input.held_starts[0]);
        for (int row = 0; row < input.num_rows; row++) {
            const int begin = input.held_starts[row], end = input.held_starts[row + 1];
            if (begin > end) return say("row %d: its held slots are [%d, %d)", row, begin, end);
            if (begin < end && input.parents[row] != kNoParent)
                return say("row %d: its parent is row %d, so it has no held slots of its own", row, input.parents[row]);
        }
        // The host says that the last start is the number of slots: none of those that ascend is past it.
        for (int row = 0; row < input.num_rows; row++)
            for (int at = input.held_starts[row]; at < input.held_starts[row + 1]; at++)
                if (input.held_slots[at] < 0 || input.held_slots[at] >= limits_.num_slots())
                    return say("row %d: held slot %d is not in a pool of %lld", row, input.held_slots[at],
                               static_cast<long long>(limits_.num_slots()));
        return nullptr;
    }

    static int num_held(const StepInput& input, int row) {
        return input.held_starts ? input.held_starts[row + 1] - input.held_starts[row] : 0;
    }

    const char* read_sequence(const StepInput& input, int sequence) {
        const int first = input.sequence_starts[sequence], end = input.sequence_starts[sequence + 1];
        if (first < 0 || first >= end || end > input.num_rows) return say("sequence %d has no rows", sequence);
        const int32_t* table = input.block_tables + int64_t{sequence} * input.max_blocks;
        const int context = input.context_lengths[sequence];
        const int committed_blocks = (context + limits_.block_size_tokens - 1) / limits_.block_size_tokens;
        if (context < 0 || committed_blocks > input.max_blocks)
            return say("sequence %d: %d committed tokens do not fit its block table of %d blocks", sequence, context,
                       input.max_blocks);
        int num_blocks = 0;
        while (num_blocks < input.max_blocks && table[num_blocks] >= 0 && table[num_blocks] < limits_.num_blocks)
            num_blocks++;
        if (num_blocks < committed_blocks)
            return say("sequence %d: block table entry %d is %d; the pool has %d blocks", sequence, num_blocks,
                       table[num_blocks], limits_.num_blocks);
        int most_held = 0;
        if (input.held_starts)
            for (int row = first; row < end; row++) most_held = std::max(most_held, num_held(input, row));
        const int highest = context + std::min(most_held, kMaxRows) + (end - first);
        spell_out(blocks_[sequence], table, num_blocks, highest);
        for (int row = first; row < end; row++)
            if (const char* problem = read_row(input, row, sequence, context, blocks_[sequence])) return problem;
        return nullptr;
    }

    // The small blocks of positions [0, tokens), as far as the table has them.
    void spell_out(std::vector<int32_t>& blocks, const int32_t* table, int num_blocks, int tokens) {
        const int each = limits_.block_size_tokens / kTokensABlock;
        const int count = std::min(num_blocks * each, (tokens + kTokensABlock - 1) / kTokensABlock);
        blocks.resize(count);
        for (int i = 0; i < count; i++) blocks[i] = table[i / each] * each + i % each;
    }

    const char* read_row(const StepInput& input, int index, int sequence, int context, const std::vector<int32_t>& blocks) {
        Row& row = step_.rows[index];
        row.token = input.token_ids[index];
        row.position = input.positions[index];
        row.slot = input.slots[index];
        row.blocks = blocks.data();
        if (row.token < 0 || row.token >= limits_.vocab_size)
            return say("row %d: token %d is not in a vocabulary of %d", index, row.token, limits_.vocab_size);
        if (row.slot < 0 || row.slot >= limits_.num_slots())
            return say("row %d: slot %d is not in a pool of %lld", index, row.slot, static_cast<long long>(limits_.num_slots()));
        if (row.position < context || row.position >= limits_.max_context_tokens)
            return say("row %d: position %d is not in [%d, %d)", index, row.position, context, limits_.max_context_tokens);
        const int first = input.sequence_starts[sequence];
        int32_t path[kMaxRows];  // slots of positions context, ..., position: held ones, then rows of the step
        const int depth = row.position - context;
        if (depth >= kMaxRows && input.held_starts)
            return say("row %d: %d of its ancestors are not committed; at most %d may be", index, depth, kMaxRows - 1);
        int ancestor = index, root = index, at = depth;
        for (; at >= 0 && ancestor != kNoParent; at--) {
            if (ancestor < first || ancestor > index || at >= kMaxRows)
                return say("row %d: its position is %d, but it has not %d ancestors", index, row.position, depth);
            path[at] = input.slots[ancestor];
            const int parent = input.parents[ancestor];
            if (parent >= ancestor) return say("row %d: its parent %d is not before it", ancestor, parent);
            root = ancestor;
            ancestor = parent;
        }
        const int held = ancestor == kNoParent ? num_held(input, root) : 0, rest = at + 1;
        if (held < rest) return say("row %d: its position is %d, but it has not %d ancestors", index, row.position, depth);
        if (ancestor != kNoParent || held > rest) return say("row %d: it has more than %d ancestors", index, depth);
        if (held > 0) std::copy_n(input.held_slots + input.held_starts[root], held, path);
        find_tail(row, path, context, blocks);
        turn(row.position, step_.turns + int64_t{index} * limits_.head_dim);
        return nullptr;
    }

    int64_t table_slot(const std::vector<int32_t>& blocks, int position) const {
        const size_t block = position / kTokensABlock;
        if (block >= blocks.size()) return -1;
        return int64_t{blocks[block]} * kTokensABlock + position % kTokensABlock;
    }

    // A row whose path lies where its block table would have it reads the pool as if all were committed.
    void find_tail(Row& row, const int32_t* path, int context, const std::vector<int32_t>& blocks) {
        int position = context;
        while (position <= row.position && path[position - context] == table_slot(blocks, position)) position++;
        if (position > row.position) {
            row.tail_start = row.num_tokens();
            return;
        }
        row.tail_start = position / kTokensABlock * kTokensABlock;
        for (int at = row.tail_start; at <= row.position; at++)
            row.tail_slots[at - row.tail_start] =
                at < context ? static_cast<int32_t>(table_slot(blocks, at)) : path[at - context];
    }

    // Of neighbours: rows of one sequence, and sequences that have a cached prefix in common.
    void find_shared() {
        step_.rows[0].shared_tokens = 0;
        for (int sequence = 0; sequence < step_.num_sequences; sequence++) {
            const int first = step_.sequence_starts[sequence], end = step_.sequence_starts[sequence + 1];
            for (int row = std::max(first, 1); row < end; row++) {
                const Row& before = step_.rows[row - 1];
                Row& own = step_.rows[row];
                const int most = std::min(own.tokens_in_blocks(), before.tokens_in_blocks());
                own.shared_tokens = row > first ? most : std::min(most, common_tokens(sequence - 1, sequence));
            }
        }
    }

    int common_tokens(int one, int other) const {
        const std::vector<int32_t>&a = blocks_[one], &b = blocks_[other];
        const auto differing = std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first;
        return static_cast<int>(differing - a.begin()) * kTokensABlock;
    }

    void turn(int position, float* out) const {
        const int half = limits_.head_dim / 2;
        for (int i = 0; i < half; i++) {
            const double angle = position * frequencies_[i];
            out[i] = static_cast<float>(std::cos(angle));
            out[half + i] = static_cast<float>(std::sin(angle));
        }
    }

    const Limits limits_;
    const double* frequencies_;
    Step& step_;
    std::vector<std::vector<int32_t>> blocks_;
    std::vector<float> turns_;
    char problem_[kErrorBytes] = "";
};

}  // namespace headrace
