// After the step: reductions of full rows from their spans' statistics, and allowed logits of full rows.
#pragma once

#include <cmath>

#include "cpu/lanes.h"
#include "cpu/head_rows.h"

namespace headrace {

class HeadResults {
   public:
    HeadResults(int vocab_size, int stats_span)
        : vocab_size_(vocab_size), span_(stats_span), num_spans_((vocab_size + stats_span - 1) / stats_span) {}

    void finish(const HeadRows& head) {
        const HeadInput& input = head.input;
        for (const Wish& wish : head.gathered)
            for (int at = wish.first; at < wish.end; at++)
                input.allowed_logits[at] = head.rows[wish.logit_row].logits[input.allowed_token_ids[at]];
        float* values = input.values;
        int32_t* tokens = input.tokens;
        for (const int32_t row : head.reduced) {
            reduce(head.rows[row], head.needs_log_sums(), input.top_k, values, tokens);
            values += 2 + input.top_k;
            tokens += 1 + input.top_k;
        }
    }

   private:
    struct Candidate {
        float logit;
        int32_t token;
        bool operator<(const Candidate& other) const {
            return logit != other.logit ? logit > other.logit : token < other.token;
        }
    };

    void reduce(const LogitRow& row, bool needs_log_sum, int top_k, float* values, int32_t* tokens) {
        int best = 0;
        for (int i = 1; i < num_spans_ && !std::isnan(row.stats[3 * best]); i++)
            if (!(row.stats[3 * i] <= row.stats[3 * best])) best = i;
        const float largest = row.stats[3 * best];
        values[0] = largest;
        tokens[0] = static_cast<int32_t>(row.stats[3 * best + 1]);
        values[1] = needs_log_sum ? log_sum(row.stats, largest) : std::nanf("");
        if (std::isnan(largest)) {
            std::fill_n(values + 2, top_k, largest);
            std::fill_n(tokens + 1, top_k, tokens[0]);
        } else if (top_k > 0) {
            find_top(row, top_k);
            for (int i = 0; i < top_k; i++) {
                values[2 + i] = candidates_[i].logit;
                tokens[1 + i] = candidates_[i].token;
            }
        }
    }

    float log_sum(const float* stats, float largest) const {
        if (!std::isfinite(largest)) return largest;
        Lanes total = zero_lanes();
        for (int first = 0; first < num_spans_; first += kLanes) {
            float shifted[kLanes];
            for (int i = 0; i < kLanes; i++)
                shifted[i] = first + i < num_spans_ ? stats[3 * (first + i) + 2] - largest : -100.0f;
            total = total + exp(load(shifted));
        }
        return largest + std::log(sum(total));
    }

    // The top_k best become candidates_[0 .. top_k). As many spans' maxima are as large as the k-th largest of
    // them: what is less cannot be in the top, and only spans whose maximum is not less have to be looked at.
    void find_top(const LogitRow& row, int top_k) {
        float floor = -INFINITY;
        if (top_k <= num_spans_) {
            maxima_.resize(num_spans_);
            for (int i = 0; i < num_spans_; i++) maxima_[i] = row.stats[3 * i];
            std::nth_element(maxima_.begin(), maxima_.begin() + (top_k - 1), maxima_.end(), std::greater<float>());
            floor = maxima_[top_k - 1];
        }
        candidates_.clear();
        for (int i = 0; i < num_spans_; i++) {
            if (row.stats[3 * i] < floor) continue;
            for (int token = i * span_; token < std::min((i + 1) * span_, vocab_size_); token++)
                if (row.logits[token] >= floor) candidates_.push_back({row.logits[token], token});
        }
        std::partial_sort(candidates_.begin(), candidates_.begin() + top_k, candidates_.end());
    }

    const int vocab_size_, span_, num_spans_;
    std::vector<float> maxima_;
    std::vector<Candidate> candidates_;
};

}  // namespace headrace
