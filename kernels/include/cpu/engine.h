// What a library offers its host: one engine over packed weights and a KV pool, as C functions.
#pragma once

#include <sys/mman.h>

#include <memory>

#include "cpu/head_results.h"
#include "cpu/ops.h"

namespace headrace {

using StepBody = Body<Step>;

// One compiled bucket; `workers` has a body for each worker.
struct Bucket {
    int rows, first_counter, num_counters;
    const StepBody* workers;
};

// Facts of the generated source.
struct LibraryFacts {
    int num_workers, num_buckets, num_counters, num_layers, vocab_size, max_context_tokens, stats_span;
    int64_t scratch_bytes, activation_bytes, weight_bytes;
    const Bucket* buckets;
};

struct EngineConfig {
    const std::byte* weights;
    const double* frequencies;  // [head_dim / 2] radians a position
    int32_t num_blocks, block_size_tokens, spins;
    int64_t wait_limit_ns;
};

// Zeroed memory in whole pages, large ones where the system has them.
class Pages {
   public:
    explicit Pages(size_t num_bytes) : num_bytes_(std::max<size_t>(num_bytes, 1)) {
        data_ = mmap(nullptr, num_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (is_there()) madvise(data_, num_bytes_, MADV_HUGEPAGE);
    }
    ~Pages() {
        if (is_there()) munmap(data_, num_bytes_);
    }
    Pages(const Pages&) = delete;
    Pages& operator=(const Pages&) = delete;
    bool is_there() const { return data_ != MAP_FAILED; }
    std::byte* data() const { return static_cast<std::byte*>(data_); }

   private:
    size_t num_bytes_;
    void* data_;
};

template <class Shape>
class Engine {
   public:
    using Kv = typename Shape::Kv;

    Engine(const LibraryFacts& facts, const EngineConfig& config)
        : facts_(facts),
          limits_{facts.vocab_size, Shape::kDim, facts.max_context_tokens, config.block_size_tokens, config.num_blocks},
          frequencies_(config.frequencies, config.frequencies + Shape::kDim / 2),
          keys_(pool_bytes()),
          values_(pool_bytes()),
          activations_(facts.activation_bytes),
          logits_(sizeof(float) * kMaxRows * facts.vocab_size),
          stats_(sizeof(float) * kMaxRows * 3 * num_spans()),
          step_(new Step),
          reader_(limits_, frequencies_.data(), *step_),
          head_reader_(facts.vocab_size, facts.stats_span, floats(logits_), floats(stats_), step_->head),
          head_results_(facts.vocab_size, facts.stats_span),
          crew_(facts.num_workers, facts.scratch_bytes, facts.num_counters, {config.spins, config.wait_limit_ns}),
          epochs_(facts.num_buckets) {
        step_->weights = config.weights;
        step_->keys = keys_.data();
        step_->values = values_.data();
        step_->activations = activations_.data();
        step_->num_small_blocks = limits_.num_small_blocks();
        for (const Pages* pages : {&keys_, &values_, &activations_, &logits_, &stats_})
            if (!pages->is_there()) crew_.failure.set("no memory for a KV pool of %d blocks", config.num_blocks);
    }

    // Null, or what went wrong. `stamps` is [workers] arrays of one Stamp an instruction, or null.
    const char* run(const StepInput& input, Stamp* const* stamps) {
        if (const char* problem = reader_.read(input)) return problem;
        if (const char* problem = head_reader_.read(input.head, input.num_rows)) return problem;
        int bucket = 0;
        while (bucket < facts_.num_buckets && facts_.buckets[bucket].rows < input.num_rows) bucket++;
        if (bucket == facts_.num_buckets) return "more rows than the largest bucket";
        const Bucket& chosen = facts_.buckets[bucket];
        const bool is_done = crew_.run(*step_, chosen.workers, chosen.first_counter, epochs_[bucket]++, stamps);
        if (!is_done) return crew_.failure.message();
        head_results_.finish(step_->head);
        return nullptr;
    }

    const char* copy_slots(const int32_t* source, const int32_t* destination, int count) {
        if (!are_slots(source, count) || !are_slots(destination, count)) return "a slot is not in the pool";
        constexpr int kToken = 2 * Shape::kDim;
        std::vector<Kv> held(size_t(count) * kToken);
        for (int at = 0; at < facts_.num_layers * Shape::kKvHeads; at++) {
            for (int i = 0; i < count; i++) take(at, source[i], &held[i * kToken], &held[i * kToken + Shape::kDim]);
            for (int i = 0; i < count; i++) put(at, destination[i], &held[i * kToken], &held[i * kToken + Shape::kDim]);
        }
        return nullptr;
    }

    // `wire` is K, then V, each [count, kv heads, dim].
    const char* write_kv(int layer, const int32_t* slots, int count, const void* wire) {
        if (!are_slots(slots, count)) return "a slot is not in the pool";
        if (layer < 0 || layer >= facts_.num_layers) return "no such layer";
        const Kv* keys = static_cast<const Kv*>(wire);
        const Kv* values = keys + int64_t{count} * Shape::kKvHeads * Shape::kDim;
        for (int i = 0; i < count; i++)
            for (int head = 0; head < Shape::kKvHeads; head++) {
                const int64_t from = (int64_t{i} * Shape::kKvHeads + head) * Shape::kDim;
                put(layer * Shape::kKvHeads + head, slots[i], keys + from, values + from);
            }
        return nullptr;
    }

    const char* read_kv(int layer, const int32_t* slots, int count, void* wire) {
        if (!are_slots(slots, count)) return "a slot is not in the pool";
        if (layer < 0 || layer >= facts_.num_layers) return "no such layer";
        Kv* keys = static_cast<Kv*>(wire);
        Kv* values = keys + int64_t{count} * Shape::kKvHeads * Shape::kDim;
        for (int i = 0; i < count; i++)
            for (int head = 0; head < Shape::kKvHeads; head++) {
                const int64_t to = (int64_t{i} * Shape::kKvHeads + head) * Shape::kDim;
                take(layer * Shape::kKvHeads + head, slots[i], keys + to, values + to);
            }
        return nullptr;
    }

    float* activations() const { return floats(activations_); }
    const char* error() const { return crew_.failure.message(); }
    bool close() { return crew_.close(); }

   private:
    static float* floats(const Pages& pages) { return reinterpret_cast<float*>(pages.data()); }
    size_t num_spans() const { return (facts_.vocab_size + facts_.stats_span - 1) / facts_.stats_span; }

    size_t pool_bytes() const {
        return size_t(facts_.num_layers) * Shape::kKvHeads * limits_.num_slots() * Shape::kDim * sizeof(Kv);
    }

    bool are_slots(const int32_t* slots, int count) const {
        return std::all_of(slots, slots + count, [&](int32_t slot) { return slot >= 0 && slot < limits_.num_slots(); });
    }

    int64_t block(int layer_head, int32_t slot) const {
        return (layer_head * limits_.num_small_blocks() + slot / kTokensABlock) * Shape::kBlockElements;
    }

    void take(int layer_head, int32_t slot, Kv* key, Kv* value) const {
        const Kv* from = reinterpret_cast<const Kv*>(keys_.data()) + block(layer_head, slot) + slot % kTokensABlock;
        for (int d = 0; d < Shape::kDim; d++) key[d] = from[d * kTokensABlock];
        std::memcpy(value, reinterpret_cast<const Kv*>(values_.data()) + block(layer_head, slot) + slot % kTokensABlock * Shape::kDim,
                    Shape::kDim * sizeof(Kv));
    }

    void put(int layer_head, int32_t slot, const Kv* key, const Kv* value) const {
        Kv* to = reinterpret_cast<Kv*>(keys_.data()) + block(layer_head, slot) + slot % kTokensABlock;
        for (int d = 0; d < Shape::kDim; d++) to[d * kTokensABlock] = key[d];
        std::memcpy(reinterpret_cast<Kv*>(values_.data()) + block(layer_head, slot) + slot % kTokensABlock * Shape::kDim, value,
                    Shape::kDim * sizeof(Kv));
    }

    const LibraryFacts facts_;
    const Limits limits_;
    const std::vector<double> frequencies_;
    Pages keys_, values_, activations_;
    Pages logits_, stats_;  // of full rows whose host does not take them
    const std::unique_ptr<Step> step_;
    StepReader reader_;
    HeadReader head_reader_;
    HeadResults head_results_;
    Crew<Step> crew_;
    std::vector<uint32_t> epochs_;
};

}  // namespace headrace

// Every function returns null, or what went wrong, valid until the next call.
#define HEADRACE_LIBRARY(SHAPE, FACTS)                                                                               \
    using LibraryEngine = headrace::Engine<SHAPE>;                                                                   \
    extern "C" {                                                                                                     \
    void* headrace_open(const headrace::EngineConfig* config) { return new LibraryEngine(FACTS, *config); }          \
    const char* headrace_run(void* engine, const headrace::StepInput* input, headrace::Stamp* const* stamps) {       \
        return static_cast<LibraryEngine*>(engine)->run(*input, stamps);                                             \
    }                                                                                                                \
    const char* headrace_copy_slots(void* engine, const int32_t* source, const int32_t* destination, int32_t n) {    \
        return static_cast<LibraryEngine*>(engine)->copy_slots(source, destination, n);                              \
    }                                                                                                                \
    const char* headrace_write_kv(void* engine, int32_t layer, const int32_t* slots, int32_t n, const void* wire) {  \
        return static_cast<LibraryEngine*>(engine)->write_kv(layer, slots, n, wire);                                 \
    }                                                                                                                \
    const char* headrace_read_kv(void* engine, int32_t layer, const int32_t* slots, int32_t n, void* wire) {         \
        return static_cast<LibraryEngine*>(engine)->read_kv(layer, slots, n, wire);                                  \
    }                                                                                                                \
    const char* headrace_error(void* engine) { return static_cast<LibraryEngine*>(engine)->error(); }                \
    float* headrace_activations(void* engine) { return static_cast<LibraryEngine*>(engine)->activations(); }         \
    void headrace_close(void* engine) {                                                                              \
        LibraryEngine* closing = static_cast<LibraryEngine*>(engine);                                                \
        if (closing->close()) delete closing;                                                                        \
    }                                                                                                                \
    }
