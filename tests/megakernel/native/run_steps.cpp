// Runs steps of a generated source (GENERATED) by itself, for sanitizers: chains, trees, copies, refused steps, and
// all the while another thread writes KV to slots that no step reads.
#include GENERATED

#include <fstream>
#include <iterator>
#include <thread>

namespace {

constexpr int kBlockSize = 16, kBlocks = 12;
#ifndef HANDED_OVER_BLOCK
#define HANDED_OVER_BLOCK 11  // the fifth of the steps' table, which they do not reach
#endif
constexpr int kHandedOverBlock = HANDED_OVER_BLOCK;
constexpr int kMaxInstructions = 4096;

bool is_finite(const std::vector<float>& values) {
    return std::all_of(values.begin(), values.end(), [](float value) { return std::isfinite(value); });
}

// The same step for the best of even rows, if anyone's, and for the first and the last token alone of every third row.
const char* ask_less(void* engine, headrace::StepInput input, const std::vector<float>& logits, bool has_best) {
    constexpr int kTop = 3;
    const int vocab = kFacts.vocab_size, count = input.num_rows;
    std::vector<uint8_t> needs_logits(count), needs_best(count);
    std::vector<int32_t> starts{0}, allowed, rows;
    for (int row = 0; row < count; row++) {
        needs_best[row] = has_best && row % 2 == 0;
        needs_logits[row] = row % 3 == 0;
        if (!needs_best[row] && !needs_logits[row]) continue;
        if (needs_logits[row]) allowed.insert(allowed.end(), {0, vocab - 1});
        for (size_t at = starts.back(); at < allowed.size(); at++) rows.push_back(row);
        starts.push_back(static_cast<int32_t>(allowed.size()));
    }
    std::vector<float> allowed_logits(allowed.size()), values(size_t(count) * (2 + kTop));
    std::vector<int32_t> tokens(size_t(count) * (1 + kTop));
    input.head = {needs_logits.data(), needs_best.data(),     starts.data(), allowed.data(), nullptr, nullptr,
                  allowed_logits.data(), values.data(), tokens.data(), kTop, 1};
    if (const char* problem = headrace_run(engine, &input, nullptr)) return problem;
    for (size_t at = 0; at < allowed.size(); at++)
        if (allowed_logits[at] != logits[size_t(rows[at]) * vocab + allowed[at]]) return "an allowed logit differs";
    for (int row = 0, at = 0; has_best && row < count; row += 2, at++) {
        const float* of = &logits[size_t(row) * vocab];
        if (tokens[at * (1 + kTop)] != std::max_element(of, of + vocab) - of) return "the best token differs";
    }
    return nullptr;
}

// `count` rows after `context` committed tokens: a chain, or every row a child of the row before its parent.
const char* step(void* engine, int context, int count, bool is_tree) {
    std::vector<int32_t> tokens(count), positions(count), slots(count), parents(count), table(kBlocks);
    for (int i = 0; i < kBlocks; i++) table[i] = (i * 5 + 3) % kBlocks;
    for (int i = 0; i < count; i++) {
        tokens[i] = i % 7;
        parents[i] = is_tree && i > 0 ? (i - 1) / 2 : i - 1;
        positions[i] = parents[i] < 0 ? context : positions[parents[i]] + 1;
        const int at = context + i;
        slots[i] = table[at / kBlockSize] * kBlockSize + at % kBlockSize;
    }
    const int32_t starts[] = {0, count}, contexts[] = {context};
    const std::vector<uint8_t> wanted(count, 1);
    std::vector<float> logits(size_t(count) * kFacts.vocab_size), stats(size_t(count) * kFacts.vocab_size);
    const headrace::HeadInput head{wanted.data(), nullptr, nullptr, nullptr, logits.data(), stats.data()};
    const headrace::StepInput input{count,          1,      kBlocks,  tokens.data(), positions.data(), slots.data(),
                                    parents.data(), starts, contexts, table.data(),  nullptr, nullptr, head};
    std::vector<headrace::Stamp> stamps(size_t(kFacts.num_workers) * kMaxInstructions);
    std::vector<headrace::Stamp*> stamps_by_worker;
    for (int i = 0; i < kFacts.num_workers; i++) stamps_by_worker.push_back(&stamps[size_t(i) * kMaxInstructions]);
    const char* problem = headrace_run(engine, &input, count % 2 ? stamps_by_worker.data() : nullptr);
    if (problem) return problem;
    if (!is_finite(logits)) return "a logit is not finite";
    if (const char* asked = ask_less(engine, input, logits, true)) return asked;
    return ask_less(engine, input, logits, false);
}

// A row behind rows 0, 1 and 4 of the tree of 5 that the step before it ran, and another behind row 0 alone.
const char* held_step(void* engine, int context) {
    std::vector<int32_t> slots(7), table(kBlocks);
    for (int i = 0; i < kBlocks; i++) table[i] = (i * 5 + 3) % kBlocks;
    for (int i = 0; i < 7; i++) slots[i] = table[(context + i) / kBlockSize] * kBlockSize + (context + i) % kBlockSize;
    const int32_t tokens[] = {1, 2}, positions[] = {context + 3, context + 1}, parents[] = {-1, -1}, starts[] = {0, 2};
    const int32_t held_starts[] = {0, 3, 4}, held[] = {slots[0], slots[1], slots[4], slots[0]};
    const uint8_t wanted[] = {1, 1};
    std::vector<float> logits(size_t(2) * kFacts.vocab_size);
    const headrace::HeadInput head{wanted, nullptr, nullptr, nullptr, logits.data(), nullptr};
    const headrace::StepInput input{2,       1,      kBlocks,  tokens,       positions,   &slots[5],
                                    parents, starts, &context, table.data(), held_starts, held,      head};
    if (const char* problem = headrace_run(engine, &input, nullptr)) return problem;
    return is_finite(logits) ? nullptr : "a logit behind held rows is not finite";
}

// Rows of a token that does not exist: refused, and the next step runs.
const char* refused_step(void* engine) {
    const int32_t token = kFacts.vocab_size, zero = 0, none = -1, starts[] = {0, 1};
    const uint8_t wanted = 1;
    std::vector<float> logits(kFacts.vocab_size);
    const headrace::HeadInput head{&wanted, nullptr, nullptr, nullptr, logits.data(), nullptr};
    const headrace::StepInput input{1, 1, 1, &token, &zero, &zero, &none, starts, &zero, &zero, nullptr, nullptr, head};
    return headrace_run(engine, &input, nullptr) ? nullptr : "a token outside the vocabulary was taken";
}

// A hand-off: layer after layer, again and again, until told to stop; what comes back is what was written.
const char* hand_over(void* engine, const std::atomic<bool>& is_over) {
    constexpr int kElements = 2 * kBlockSize * Shape::kKvHeads * Shape::kDim;
    std::vector<Shape::Kv> written(kElements), read(kElements);
    std::vector<int32_t> slots(kBlockSize);
    for (int i = 0; i < kBlockSize; i++) slots[i] = kHandedOverBlock * kBlockSize + (i * 7) % kBlockSize;
    for (int round = 1; !is_over || round == 1; round++)
        for (int layer = 0; layer < kFacts.num_layers; layer++) {
            std::memset(written.data(), round % 64, written.size() * sizeof(Shape::Kv));
            if (const char* problem = headrace_write_kv(engine, layer, slots.data(), kBlockSize, written.data()))
                return problem;
            if (const char* problem = headrace_read_kv(engine, layer, slots.data(), kBlockSize, read.data()))
                return problem;
            if (std::memcmp(written.data(), read.data(), written.size() * sizeof(Shape::Kv)))
                return "KV came back otherwise than it was written";
        }
    return nullptr;
}

const char* all_steps(void* engine) {
    int context = 0;
    for (const int count : {8, 1, 1, 3, 8}) {
        if (const char* problem = step(engine, context, count, false)) return problem;
        context += count;
    }
    for (const int count : {7, 5})
        if (const char* problem = step(engine, context, count, true)) return problem;
    if (const char* problem = held_step(engine, context)) return problem;
    const int32_t from[] = {3, 4, 5}, to[] = {4, 5, 6};
    if (const char* problem = headrace_copy_slots(engine, from, to, 3)) return problem;
    if (const char* problem = refused_step(engine)) return problem;
    for (int i = 0; i < 12; i++)
        if (const char* problem = step(engine, context++, 1, false)) return problem;
    return nullptr;
}

}  // namespace

// Arguments: a file with the packed weights.
int main(int, char** arguments) {
    std::ifstream file(arguments[1], std::ios::binary);
    std::vector<char> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    void* weights = aligned_alloc(4096, (bytes.size() + 4095) / 4096 * 4096);
    std::memcpy(weights, bytes.data(), bytes.size());
    const std::vector<double> frequencies(Shape::kDim / 2, 0.5);
    const headrace::EngineConfig config{static_cast<const std::byte*>(weights), frequencies.data(), kBlocks, kBlockSize,
                                        200, int64_t{20000000000}};
    void* engine = headrace_open(&config);
    std::atomic<bool> is_over{false};
    const char* handed_over = nullptr;
    std::thread other([&] { handed_over = hand_over(engine, is_over); });
    const char* problem = all_steps(engine);
    is_over = true;
    other.join();
    if (!problem) problem = handed_over;
    if (problem) fprintf(stderr, "%s\n", problem);
    headrace_close(engine);
    free(weights);
    return problem ? 1 : 0;
}
