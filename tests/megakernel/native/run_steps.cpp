// Runs steps of a generated source (GENERATED) by itself, for sanitizers: chains, trees, copies, failures.
#include GENERATED

#include <fstream>
#include <iterator>

namespace {

constexpr int kBlockSize = 16, kBlocks = 12;

bool is_finite(const std::vector<float>& values) {
    return std::all_of(values.begin(), values.end(), [](float value) { return std::isfinite(value); });
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
    const headrace::StepInput input{count,          1,       kBlocks,  tokens.data(), positions.data(), slots.data(),
                                    parents.data(), starts,  contexts, table.data(),  wanted.data(),    logits.data(),
                                    stats.data()};
    const char* problem = headrace_run(engine, &input, nullptr);
    return problem ? problem : is_finite(logits) ? nullptr : "a logit is not finite";
}

const char* all_steps(void* engine) {
    int context = 0;
    for (const int count : {8, 1, 1, 3, 8}) {
        if (const char* problem = step(engine, context, count, false)) return problem;
        context += count;
    }
    for (const int count : {7, 5})
        if (const char* problem = step(engine, context, count, true)) return problem;
    const int32_t from[] = {3, 4, 5}, to[] = {4, 5, 6};
    return headrace_copy_slots(engine, from, to, 3);
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
    const char* problem = all_steps(engine);
    if (problem) fprintf(stderr, "%s\n", problem);
    headrace_close(engine);
    free(weights);
    return problem ? 1 : 0;
}
