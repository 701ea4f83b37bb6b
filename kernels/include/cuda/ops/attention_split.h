// What the consumer warps make of a split: maximum, sum of exponentials and weighted values of each query head.
#pragma once

#include "cuda/ops/attention_work.h"

namespace headrace {

__device__ __forceinline__ void unpack_halves(const uint4& packed, float (&x)[8]) {
    const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x[2 * i] = ptx::half_to_float(words[i] & 0xffff);
        x[2 * i + 1] = ptx::half_to_float(words[i] >> 16);
    }
}

// Sums of x over the lanes that differ in bits kMask, kMask / 2, .. kLast of their numbers. With each bit, lanes that
// have it are left with the upper half of what there is, others with the lower.
template <uint32_t kMask, uint32_t kLast, int kCount, int kAll>
__device__ __forceinline__ void sum_scattered(uint32_t lane, float (&x)[kAll]) {
    if constexpr (kMask >= kLast) {
        if constexpr (kCount > 1) {
            const bool is_upper = lane & kMask;
#pragma unroll
            for (int i = 0; i < kCount / 2; i++) {
                const float given = is_upper ? x[i] : x[i + kCount / 2];
                const float kept = is_upper ? x[i + kCount / 2] : x[i];
                x[i] = kept + ptx::shuffle_xor(given, kMask);
            }
            sum_scattered<kMask / 2, kLast, kCount / 2>(lane, x);
        } else {
            x[0] += ptx::shuffle_xor(x[0], kMask);
            sum_scattered<kMask / 2, kLast, 1>(lane, x);
        }
    }
}

// 4 bytes each, from shared memory.
template <class T, int kCount>
__device__ __forceinline__ void load_words(SharedAddress from, T (&x)[kCount]) {
    if constexpr (kCount % 4 == 0) {
#pragma unroll
        for (int i = 0; i < kCount; i += 4) {
            const uint4 four = ptx::load_shared<uint4>(from + i * 4);
            memcpy(&x[i], &four, sizeof four);
        }
    } else {
#pragma unroll
        for (int i = 0; i < kCount; i++) x[i] = ptx::load_shared<T>(from + i * 4);
    }
}

// Keys of a KV head in slot 0; its values are kKvHeads heads on.
template <class Shape>
__device__ __forceinline__ const uint8_t* keys_of(const Worker& w, int layer, uint32_t kv_head) {
    return reinterpret_cast<const uint8_t*>(w.step.kv) + static_cast<int64_t>(layer) * w.step.num_slots * Shape::kSlotBytes +
           kv_head * (Shape::kDim * 2);
}

template <class Shape>
__device__ __forceinline__ const uint4* at_slot(const uint8_t* from, uint32_t slot) {
    return reinterpret_cast<const uint4*>(from + static_cast<uint64_t>(slot) * Shape::kSlotBytes);
}

template <class Shape>
__device__ __forceinline__ SharedAddress slots_at(const Worker& w) {
    return w.shared + kSumsAt + Shape::kSlotsAt + w.warp * (Shape::kTokens * 4);
}

// Of the warp's tokens, for all its lanes; before they load.
template <class Shape>
__device__ __forceinline__ void store_slots(const Worker& w, uint32_t own) {
    ptx::sync_warp();
    if (w.lane % 2 == 0) ptx::store_shared(slots_at<Shape>(w) + w.lane / 2 * 4, own);
    ptx::sync_warp();
}

enum class Part { kKeys, kValues };

// A lane's 16 bytes of each of its tokens' keys and values, from when they are asked for until they are used.
//
// In registers they cost no memory, which then takes weights of ops to come. But the hardware counts what a thread waits
// for with few counters, and the compiler takes one for all loads that a loop leaves under way: whatever it waits for,
// it waits for all of them. So they are for where shared memory is short.
template <class Shape, bool kIsStaged = Shape::kIsStaged>
struct HeldTokens {
    uint4 keys[Shape::kTimes], values[Shape::kTimes];

    static __device__ __forceinline__ HeldTokens in(const Worker&, SharedAddress) { return {}; }
    template <Part kPart>
    __device__ __forceinline__ void load(int turn, bool is_wanted, const uint4* from) {
        ptx::load_global_if(is_wanted, from, kPart == Part::kKeys ? keys[turn] : values[turn]);
    }
    __device__ __forceinline__ void end_loads() const {}
    __device__ __forceinline__ void await_all_but_last() const {}
    template <Part kPart>
    __device__ __forceinline__ uint4 of(int turn) const {
        return kPart == Part::kKeys ? keys[turn] : values[turn];
    }
};

// In shared memory, brought by asynchronous copies, of which a thread can wait for the older ones alone. A lane uses
// only what it has itself asked for, so no barrier is needed.
template <class Shape>
struct HeldTokens<Shape, true> {
    SharedAddress own;

    // Behind what the warps make of a split.
    static __device__ __forceinline__ HeldTokens in(const Worker& w, SharedAddress page) {
        return {page + Shape::kPartialBytes + w.warp * (Shape::kTimes * Shape::kTurnBytes) + w.lane * 16};
    }
    template <Part kPart>
    __device__ __forceinline__ SharedAddress at(int turn) const {
        return own + turn * Shape::kTurnBytes + (kPart == Part::kKeys ? 0 : Shape::kPartOfTokens);
    }
    template <Part kPart>
    __device__ __forceinline__ void load(int turn, bool is_wanted, const uint4* from) const {
        if (is_wanted) ptx::copy_async_16(at<kPart>(turn), from);
    }
    __device__ __forceinline__ void end_loads() const { ptx::copy_async_commit(); }
    __device__ __forceinline__ void await_all_but_last() const { ptx::copy_async_wait<1>(); }
    template <Part kPart>
    __device__ __forceinline__ uint4 of(int turn) const {
        return ptx::load_shared<uint4>(at<kPart>(turn));
    }
};

// The lane's 16 bytes of its tokens' keys, or of their values, in those turns that are wanted.
template <class Shape, Part kPart, class IsWanted>
__device__ __forceinline__ void load_tokens(const Worker& w, const uint8_t* from, HeldTokens<Shape>& held,
                                            const IsWanted is_wanted) {
    uint32_t slots[Shape::kTimes];
    load_words(slots_at<Shape>(w) + w.lane / Shape::kLanesAToken * (Shape::kTimes * 4), slots);
    from = ptx::settled_pointer(from + w.lane % Shape::kLanesAToken * 16);
#pragma unroll
    for (int i = 0; i < Shape::kTimes; i++) {
        const uint4* key = at_slot<Shape>(from, slots[i]);
        held.template load<kPart>(i, is_wanted(i), kPart == Part::kKeys ? key : key + Shape::kValuesAt / 16);
    }
    held.end_loads();
}

// A warp's turns, or the first half of them where the others have no tokens.
template <int kTimes, class Turn>
__device__ __forceinline__ void for_turns(bool is_whole, const Turn& turn) {
    constexpr int kFew = (kTimes + 1) / 2;
#pragma unroll
    for (int i = 0; i < kFew; i++) turn(i);
    if (kTimes > 1 && is_whole)
#pragma unroll
        for (int i = kFew; i < kTimes; i++) turn(i);
}

// A warp's weights of its tokens, by head: [head of the group][kTokens]; maximum and sum of each to `extremes`.
template <class Shape>
__device__ __forceinline__ void weigh_tokens(const Worker& w, const HeldTokens<Shape>& held, int num_tokens,
                                             SharedAddress queries, SharedAddress weights, SharedAddress extremes) {
    constexpr int kTimes = Shape::kTimes, kAtOnce = Shape::kHeadsAtOnce;
    const uint32_t chunk = w.lane % Shape::kLanesAToken;
    const bool is_there = Share<Shape>::of_lane(w) < num_tokens, is_whole = num_tokens > Shape::kHalfTokens;
#pragma unroll 1
    for (int head0 = 0; head0 < Shape::kGroup; head0 += kAtOnce) {
        float query[kAtOnce][8], scores[kAtOnce][kTimes] = {};
#pragma unroll
        for (int h = 0; h < kAtOnce; h++) load_words(queries + ((head0 + h) * Shape::kDim + chunk * 8) * 4, query[h]);
        for_turns<kTimes>(is_whole, [&](int i) {
            float key[8];
            unpack_halves(held.template of<Part::kKeys>(i), key);
#pragma unroll
            for (int h = 0; h < kAtOnce; h++)
#pragma unroll
                for (int e = 0; e < 8; e++) scores[h][i] = fma_f32(query[h][e], key[e], scores[h][i]);
        });
#pragma unroll
        for (int h = 0; h < kAtOnce; h++) {
            sum_scattered<Shape::kLanesAToken / 2, 1, kTimes>(w.lane, scores[h]);
            const float score = is_there ? scores[h][0] : -__builtin_huge_valf();
            float largest = score;
#pragma unroll
            for (uint32_t mask = kLanes / 2; mask > 1; mask /= 2) largest = fmaxf(largest, ptx::shuffle_xor(largest, mask));
            const float weight = exp_f32(score - largest);  // NaN for a score of NaN, which fmaxf leaves out
            float sum = weight;
#pragma unroll
            for (uint32_t mask = kLanes / 2; mask > 1; mask /= 2) sum += ptx::shuffle_xor(sum, mask);
            if (w.lane % 2 == 0) ptx::store_shared(weights + ((head0 + h) * Shape::kTokens + w.lane / 2) * 4, weight);
            if (w.lane == 0) ptx::store_shared(extremes + (head0 + h) * 8, float2{largest, sum});
        }
    }
}

// A warp's values, mixed by weight: [head of the group][kDim].
template <class Shape>
__device__ __forceinline__ void mix_tokens(const Worker& w, const HeldTokens<Shape>& held, int num_tokens,
                                           SharedAddress weights, SharedAddress to) {
    constexpr int kTimes = Shape::kTimes, kAtOnce = Shape::kHeadsAtOnce, kTokensATime = Shape::kTokensATime;
    constexpr int kLeft = kTokensATime < 8 ? 8 / kTokensATime : 1;  // elements of a lane once lanes are summed
    const uint32_t of_token = w.lane / Shape::kLanesAToken;
    const bool is_whole = num_tokens > Shape::kHalfTokens;
    uint32_t element = w.lane % Shape::kLanesAToken * 8;
    for (uint32_t mask = kLanes / 2, half = 4; mask >= Shape::kLanesAToken && half; mask /= 2, half /= 2)
        if (w.lane & mask) element += half;
#pragma unroll 1
    for (int head0 = 0; head0 < Shape::kGroup; head0 += kAtOnce) {
        float weight[kAtOnce][kTimes], mixed[kAtOnce][8] = {};
#pragma unroll
        for (int h = 0; h < kAtOnce; h++)
            load_words(weights + ((head0 + h) * Shape::kTokens + of_token * kTimes) * 4, weight[h]);
        for_turns<kTimes>(is_whole, [&](int i) {
            float value[8];
            unpack_halves(held.template of<Part::kValues>(i), value);
#pragma unroll
            for (int h = 0; h < kAtOnce; h++)
#pragma unroll
                for (int e = 0; e < 8; e++) mixed[h][e] = fma_f32(weight[h][i], value[e], mixed[h][e]);
        });
#pragma unroll
        for (int h = 0; h < kAtOnce; h++) {
            sum_scattered<kLanes / 2, Shape::kLanesAToken, 8>(w.lane, mixed[h]);
            const SharedAddress own = to + ((head0 + h) * Shape::kDim + element) * 4;
            if constexpr (kLeft == 1) {
                if (kTokensATime <= 8 || !(w.lane & Shape::kLanesAToken)) ptx::store_shared(own, mixed[h][0]);
            } else {
#pragma unroll
                for (int e = 0; e < kLeft; e += 2) ptx::store_shared(own + e * 4, float2{mixed[h][e], mixed[h][e + 1]});
            }
        }
    }
}

// What a warp without tokens has to say of a split.
template <class Shape>
__device__ __forceinline__ void write_nothing(const Worker& w, SharedAddress to, SharedAddress extremes) {
#pragma unroll 1
    for (uint32_t i = w.lane; i < Shape::kElements; i += kLanes) ptx::store_shared(to + i * 4, 0.0f);
#pragma unroll 1
    for (uint32_t i = w.lane; i < Shape::kGroup; i += kLanes)
        ptx::store_shared(extremes + i * 8, float2{-__builtin_huge_valf(), 0});
}

// The warps' partial results of a split, merged in order, to the row's output of that split; if it is the row's only one also
// to `heads`, from element `first` on. A thread has two neighbouring elements.
template <class Shape, class Heads>
__device__ __forceinline__ void merge_warps(const Worker& w, SharedAddress partial, float* out, bool is_only, const Heads& heads,
                                            uint32_t first) {
    constexpr int kDim = Shape::kDim, kHead = kDim + 2;
#pragma unroll 1
    for (int item = w.thread * 2; item < Shape::kElements; item += kConsumers * 2) {
        const int head = item / kDim, element = item % kDim;
        float2 extremes[kConsumerWarps], values[kConsumerWarps];
#pragma unroll
        for (uint32_t i = 0; i < kConsumerWarps; i++) {
            extremes[i] = ptx::load_shared<float2>(partial + Shape::kExtremesAt + (i * Shape::kGroup + head) * 8);
            values[i] = ptx::load_shared<float2>(partial + (i * Shape::kElements + item) * 4);
        }
        float largest = extremes[0].x, sum = 0;
        float2 mixed{0, 0};
#pragma unroll
        for (uint32_t i = 1; i < kConsumerWarps; i++) largest = fmaxf(largest, extremes[i].x);
#pragma unroll
        for (uint32_t i = 0; i < kConsumerWarps; i++) {
            const float weight = exp_f32(extremes[i].x - largest);
            sum = fma_f32(weight, extremes[i].y, sum);
            mixed.x = fma_f32(weight, values[i].x, mixed.x);
            mixed.y = fma_f32(weight, values[i].y, mixed.y);
        }
        if (is_only) {
            const float scale = divide_f32(1, sum);
            heads.store_two(w, first + item, mixed.x * scale, mixed.y * scale);
        }
        ptx::store_global(reinterpret_cast<float2*>(out + head * kHead + 2 + element), mixed);
        if (element == 0) ptx::store_global(reinterpret_cast<float2*>(out + head * kHead), float2{largest, sum});
    }
}

}  // namespace headrace
