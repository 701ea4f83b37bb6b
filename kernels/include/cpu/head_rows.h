// What a step asks of the head: whole rows of logits, reductions of them, or the logits of allowed tokens alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <utility>
#include <vector>

#include "cpu/packed.h"
#include "cpu/worker.h"

namespace headrace {

constexpr int kMaxTopK = 64;

// As the host passes it. A row that needs either is a logit row; it is restricted where it has allowed tokens
// and no reductions are needed: then the head computes only the groups of columns that hold one.
struct HeadInput {
    const uint8_t *needs_logits, *needs_best;  // [rows]; the second may be null: no row
    const int32_t *allowed_starts, *allowed_token_ids;  // [logit rows + 1], ascending in a row; null: none
    float* logits;          // [rows that need them and have no allowed tokens, vocab]
    float* stats;           // [full rows, 3 * spans], or null
    float* allowed_logits;  // [allowed tokens]
    float* values;          // [rows that need the best, 2 + top_k]: maximum, log-sum-exp, the top's logits
    int32_t* tokens;        // [rows that need the best, 1 + top_k]: the maximum's token, the top's
    int32_t top_k, needs_log_sums;
};

struct LogitRow {
    int32_t row;    // of the step
    float* logits;  // [vocab]; null: restricted
    float* stats;   // [3 * spans]; null: nobody reads them
};

// A row's allowed tokens [first, end) of the input, all in one group of columns.
struct Wish {
    int32_t logit_row, first, end;
};

struct HeadRows {
    std::vector<LogitRow> rows;  // the full ones, then the restricted ones
    int num_full = 0;
    // Groups of columns that restricted rows want, ascending: wishes [wish_starts[i], wish_starts[i + 1]) are those
    // of wanted_groups[i], rows ascending.
    std::vector<int32_t> wanted_groups, wish_starts;
    std::vector<Wish> wishes;
    std::vector<int32_t> reduced;  // logit rows that need the best, in order of the step's rows
    std::vector<Wish> gathered;    // allowed tokens of full rows
    HeadInput input{};

    int num_rows() const { return static_cast<int>(rows.size()); }
    bool needs_log_sums() const { return input.stats || input.needs_log_sums; }
};

// Derives HeadRows from its input; `logits` and `stats` are for rows whose host wants neither.
class HeadReader {
   public:
    HeadReader(int vocab_size, int stats_span, float* logits, float* stats, HeadRows& head)
        : vocab_size_(vocab_size),
          stats_columns_(int64_t{3} * ((vocab_size + stats_span - 1) / stats_span)),
          logits_(logits),
          stats_(stats),
          head_(head) {}

    // Null, or what is wrong with the input; then the step must not run.
    const char* read(const HeadInput& input, int num_rows) {
        if (input.top_k < 0 || input.top_k > std::min(kMaxTopK, vocab_size_))
            return say("top_k is %d; it is at most %d", input.top_k, std::min(kMaxTopK, vocab_size_));
        head_.input = input;
        if (const char* problem = check_starts(num_rows)) return problem;
        head_.rows.clear();
        head_.wanted_groups.clear();
        head_.wish_starts.clear();
        head_.wishes.clear();
        head_.reduced.clear();
        head_.gathered.clear();
        restricted_.clear();
        int logit_row = 0, num_handed_out = 0;
        for (int row = 0; row < num_rows; row++) {
            if (!needs_best(row) && !input.needs_logits[row]) continue;
            const Wish allowed = allowed_of(logit_row++);
            if (const char* problem = check_tokens(row, allowed)) return problem;
            const bool has_allowed = allowed.first < allowed.end;
            if (has_allowed && !needs_best(row)) {
                restricted_.push_back({row, allowed.first, allowed.end});
            } else {
                const bool is_handed_out = input.needs_logits[row] && !has_allowed;
                add_full(row, is_handed_out ? num_handed_out++ : -1, needs_best(row));
                if (has_allowed) head_.gathered.push_back({head_.num_rows() - 1, allowed.first, allowed.end});
            }
        }
        head_.num_full = head_.num_rows();
        if (!restricted_.empty()) sort_by_group();
        return nullptr;
    }

   private:
    template <class... Parts>
    const char* say(const char* format, Parts... parts) {
        snprintf(problem_, sizeof problem_, format, parts...);
        return problem_;
    }

    bool needs_best(int row) const { return head_.input.needs_best && head_.input.needs_best[row]; }

    Wish allowed_of(int logit_row) const {
        const int32_t* starts = head_.input.allowed_starts;
        return starts ? Wish{logit_row, starts[logit_row], starts[logit_row + 1]} : Wish{logit_row, 0, 0};
    }

    // Ascending starts lie within the tokens: the host has checked the last.
    const char* check_starts(int num_rows) {
        const int32_t* starts = head_.input.allowed_starts;
        if (!starts) return nullptr;
        if (starts[0] != 0) return say("allowed_starts begin at %d", starts[0]);
        int logit_row = 0;
        for (int row = 0; row < num_rows; row++) {
            if (!needs_best(row) && !head_.input.needs_logits[row]) continue;
            if (starts[logit_row] > starts[logit_row + 1])
                return say("row %d: its allowed tokens are [%d, %d)", row, starts[logit_row], starts[logit_row + 1]);
            logit_row++;
        }
        return nullptr;
    }

    const char* check_tokens(int row, const Wish& allowed) {
        int32_t last = -1;
        for (int at = allowed.first; at < allowed.end; at++) {
            const int32_t token = head_.input.allowed_token_ids[at];
            if (token <= last || token >= vocab_size_)
                return say("row %d: allowed token %d after %d, in a vocabulary of %d", row, token, last, vocab_size_);
            last = token;
        }
        return nullptr;
    }

    void add_full(int row, int place, bool needs_best) {
        const int at = head_.num_rows();
        const bool is_handed_out = place >= 0;
        float* logits = is_handed_out ? head_.input.logits + int64_t{place} * vocab_size_
                                      : logits_ + int64_t{at} * vocab_size_;
        float* stats = head_.input.stats ? head_.input.stats : needs_best ? stats_ : nullptr;
        head_.rows.push_back({row, logits, stats ? stats + at * stats_columns_ : nullptr});
        if (needs_best) head_.reduced.push_back(at);
    }

    // A counting sort: rows come ascending, so they stay so within a group.
    void sort_by_group() {
        const int num_groups = static_cast<int>(mk::divide_up(vocab_size_, mk::kGroup));
        places_.assign(num_groups, 0);
        for_each_wish([&](int group, Wish) { places_[group]++; });
        int32_t num_wishes = 0;
        for (int group = 0; group < num_groups; group++) {
            if (places_[group] == 0) continue;
            head_.wanted_groups.push_back(group);
            head_.wish_starts.push_back(num_wishes);
            num_wishes += std::exchange(places_[group], num_wishes);
        }
        head_.wish_starts.push_back(num_wishes);
        head_.wishes.resize(num_wishes);
        for_each_wish([&](int group, Wish wish) { head_.wishes[places_[group]++] = wish; });
        for (const Wish& row : restricted_) head_.rows.push_back({row.logit_row, nullptr, nullptr});
    }

    template <class Visit>
    void for_each_wish(Visit visit) const {
        const int32_t* tokens = head_.input.allowed_token_ids;
        for (size_t i = 0; i < restricted_.size(); i++)
            for (int first = restricted_[i].first, end; first < restricted_[i].end; first = end) {
                const int group = tokens[first] / mk::kGroup;
                for (end = first + 1; end < restricted_[i].end && tokens[end] / mk::kGroup == group;) end++;
                visit(group, Wish{head_.num_full + static_cast<int32_t>(i), first, end});
            }
    }

    const int vocab_size_;
    const int64_t stats_columns_;
    float *const logits_, *const stats_;
    HeadRows& head_;
    std::vector<Wish> restricted_;  // with the step's row in place of a logit row
    std::vector<int32_t> places_;   // by group: how many wishes, then where the next goes
    char problem_[kErrorBytes] = "";
};

}  // namespace headrace
