// The head: logits of full rows with statistics by span, and of restricted rows by group of columns.
#pragma once

#include <type_traits>

#include "cpu/linear.h"
#include "cpu/step.h"

namespace headrace {

// Maximum (a NaN where there is one), its column (the lowest of equals; the first NaN's), log-sum-exp.
// The last is the maximum itself where it is not asked for or not finite.
template <int kSpan>
inline void span_stats(const float* logits, int count, int first, bool needs_log_sum, float* out) {
    static_assert(kSpan % kLanes == 0);
    float padded[kSpan];
    if (count < kSpan) {
        for (int i = 0; i < kSpan; i++) padded[i] = logits[i < count ? i : 0];
        logits = padded;
    }
    Lanes top = load(logits), strange = zero_lanes();
    for (int i = 0; i < kSpan; i += kLanes) {
        const Lanes x = load(logits + i);
        top = max(top, x);
        strange = strange + (x - x);  // a NaN from the first NaN or infinity on
    }
    float largest = highest(top);
    if (sum(strange) != 0.0f) {
        largest = logits[0];
        for (int i = 1; i < kSpan && largest == largest; i++)
            if (!(logits[i] <= largest)) largest = logits[i];
    }
    int at = 0;
    if (largest == largest)
        while (first_equal(load(logits + at), largest) == kLanes) at += kLanes;
    const bool is_number = largest == largest;
    at += is_number ? first_equal(load(logits + at), largest) : 0;
    while (!is_number && logits[at] == logits[at]) at++;
    out[0] = largest;
    out[1] = static_cast<float>(first + at);
    out[2] = largest;
    if (!needs_log_sum || largest - largest != 0.0f) return;
    for (int i = count; i < kSpan; i++) padded[i] = largest - 100.0f;
    Lanes totals = zero_lanes();
    for (int i = 0; i < kSpan; i += kLanes) totals = totals + exp(load(logits + i) - splat(largest));
    out[2] = largest + std::log(sum(totals));
}

template <int kVocab, int kSpan>
struct PutLogits {
    static constexpr int kColumns = mk::kGroup, kNumGroups = mk::divide_up(kVocab, mk::kGroup);
    const Step& step;
    int r0;

    template <class NumRows>
    void operator()(int n, int r, NumRows num_rows, const float* tile) const {
        for (int i = 0; i < num_rows(); i++) {
            float* to = step.head.rows[r0 + r + i].logits + n;
            if (n + kColumns <= kVocab)
                store(to, load(tile + i * kColumns));
            else
                std::memcpy(to, tile + i * kColumns, sizeof(float) * (kVocab - n));
        }
    }

    // Of a restricted row: the allowed columns of the group at n.
    void put_allowed(const Wish& wish, int n, const float* tile) const {
        const HeadInput& input = step.head.input;
        for (int at = wish.first; at < wish.end; at++) input.allowed_logits[at] = tile[input.allowed_token_ids[at] - n];
    }

    void put_stats(int n0, int n1, int rows) const {
        for (int row = r0; row < r0 + rows; row++) {
            const LogitRow& of = step.head.rows[row];
            for (int n = n0; of.stats && n < std::min(n1, kVocab); n += kSpan)
                span_stats<kSpan>(of.logits + n, std::min(kSpan, kVocab - n), n, step.head.needs_log_sums(),
                                  of.stats + 3 * (n / kSpan));
        }
    }
};

// Of HeadRows::wanted_groups.
struct WantedRange {
    int first, end;
};

// Those in columns [n0, n1).
inline WantedRange wanted_in(const HeadRows& head, int n0, int n1) {
    const std::vector<int32_t>& groups = head.wanted_groups;
    const auto place = [&](int n) {
        return static_cast<int>(std::lower_bound(groups.begin(), groups.end(), n / mk::kGroup) - groups.begin());
    };
    return {place(n0), place(n1)};
}

// As large a share of all of them as columns [n0, n1) are of `num_groups` groups: frequent tokens have low ids, so
// that the worker with the lowest columns would have most of the work.
inline WantedRange wanted_share(const HeadRows& head, int n0, int n1, int num_groups) {
    const auto place = [&](int n) {
        return static_cast<int>(int64_t{n / mk::kGroup} * static_cast<int64_t>(head.wanted_groups.size()) / num_groups);
    };
    return {place(n0), place(n1)};
}

// Which an instruction over columns [n0, n1) computes. Where full rows run too it has just read the weights of its
// own columns, and a K-tile's sums are read by whoever has the columns.
template <class Sink>
inline WantedRange wanted_of(const HeadRows& head, int n0, int n1) {
    if constexpr (requires { Sink::kNumGroups; })
        if (head.num_full == 0) return wanted_share(head, n0, n1, Sink::kNumGroups);
    return wanted_in(head, n0, n1);
}

// How many of the wishes from `at` on a kernel can take at once: 8, 4, 2 or 1 consecutive rows of one panel.
inline int rows_at_once(const std::vector<Wish>& wishes, int at, int end, int r0, int r1) {
    const int first = wishes[at].logit_row;
    int run = 1;
    while (run < mk::kRowGroup && at + run < end && wishes[at + run].logit_row == first + run &&
           first + run < r1 && (first - r0 + run) % mk::kPanel != 0)
        run++;
    return run >= 8 ? 8 : run >= 4 ? 4 : run >= 2 ? 2 : 1;
}

// A restricted row's tile of one group goes to its allowed tokens, or, for a K-tile, where a full row's would.
template <class Sink>
inline void put_wish(const Sink& sink, const Wish& wish, int n, int r, const float* tile) {
    if constexpr (requires { sink.put_allowed(wish, n, tile); })
        sink.put_allowed(wish, n, tile);
    else
        sink(n, r, std::integral_constant<int, 1>{}, tile);
}

// What restricted rows among logit rows [r0, r1) want, as much of it as falls to columns [n0, n1): a group's
// weights once for all of them, the next wanted group's on their way meanwhile.
template <mk::Format F, int K, int K0, int K1, class Sink>
inline void restricted_linear(const Step& step, const uint8_t* packed, int n0, int n1, int r0, int r1,
                              mk::Input<F> x, const Sink& sink) {
    const HeadRows& head = step.head;
    const std::vector<Wish>& wishes = head.wishes;
    const WantedRange wanted = wanted_of<Sink>(head, n0, n1);
    for (int i = wanted.first; i < wanted.end; i++) {
        const bool is_last = i + 1 == static_cast<int>(head.wanted_groups.size());
        const uint8_t* upcoming = packed + (is_last ? 0 : head.wanted_groups[i + 1]) * mk::group_bytes(F, K);
        mk::Stream next_group(upcoming + mk::group_bytes(F, K) * K0 / K, upcoming + mk::group_bytes(F, K), upcoming);
        mk::Stream* stream = is_last ? nullptr : &next_group;
        const int n = head.wanted_groups[i] * mk::kGroup, end = head.wish_starts[i + 1];
        int at = head.wish_starts[i];
        while (at < end && wishes[at].logit_row < r0) at++;
        while (at < end && wishes[at].logit_row < r1) {
            const int r = wishes[at].logit_row - r0, count = rows_at_once(wishes, at, end, r0, r1);
            const auto put = [&](int n, int, auto num_rows, const float* tile) {
                for (int j = 0; j < num_rows(); j++)
                    put_wish(sink, wishes[at + j], n, r + j, tile + j * mk::kGroup);
            };
            const auto run = [&](auto num_rows) {
                mk::detail::row_group<F, K, mk::kGroup, K0, K1, num_rows()>(packed, n, x, r, stream, put);
            };
            switch (count) {
                case 8: if constexpr (mk::kRowGroup >= 8) run(std::integral_constant<int, 8>{}); break;
                case 4: run(std::integral_constant<int, 4>{}); break;
                case 2: run(std::integral_constant<int, 2>{}); break;
                default: run(std::integral_constant<int, 1>{});
            }
            at += count;
            stream = nullptr;
        }
    }
}

}  // namespace headrace
