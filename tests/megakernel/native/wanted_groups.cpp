// Which groups of columns each instruction of a head computes for restricted rows, behind a C interface.
#include "cpu/head.h"

namespace {

struct WholeK {
    static constexpr int kNumGroups = NUM_GROUPS;
};

}  // namespace

// Of `num_tiles` instructions over columns [bounds[i], bounds[i + 1]): ends[i] is where the groups of the i-th end
// in `groups`, which holds at least as many as there are tokens. All rows need logits.
extern "C" void wanted_groups(const int32_t* starts, const int32_t* tokens, int num_rows, const int32_t* bounds,
                              int num_tiles, int32_t* groups, int32_t* ends) {
    const std::vector<uint8_t> needs_logits(num_rows, 1);
    headrace::HeadRows head;
    headrace::HeadInput input{};
    input.needs_logits = needs_logits.data();
    input.allowed_starts = starts;
    input.allowed_token_ids = tokens;
    headrace::HeadReader(NUM_GROUPS * mk::kGroup, mk::kGroup, nullptr, nullptr, head).read(input, num_rows);
    int end = 0;
    for (int tile = 0; tile < num_tiles; tile++) {
        const headrace::WantedRange wanted = headrace::wanted_of<WholeK>(head, bounds[tile], bounds[tile + 1]);
        for (int i = wanted.first; i < wanted.end; i++) groups[end++] = head.wanted_groups[i];
        ends[tile] = end;
    }
}
