// What the consumer warps make of a split: maximum, sum of exponentials and weighted values of each query head.
#pragma once

#include "cuda/ops/attention_work.h"

namespace headrace {

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
    return w.shared + kSumsAt + w.warp * (Shape::kTokens * 4);
}

// Of the warp's tokens, for all its lanes; before they load, and after they have read the keys before.
template <class Shape>
__device__ __forceinline__ void store_slots(const Worker& w, uint32_t own) {
    ptx::sync_warp();
    if (w.lane % 2 == 0) ptx::store_shared(slots_at<Shape>(w) + w.lane / 2 * 4, own);
    ptx::sync_warp();
}

// By the tensor cores, eight query heads at once: rows are their queries in 16 bits, and below them what these are off by,
// so that 22 bits count; keys and values are in 16 bits as they are. Lane l, g = l / 4, t = l % 4: see ptx/mma.h.
//
// Scores: columns are tokens g, and g + 8 for a second product. Products may take the elements of K in any order: of
// each 32, a lane's are the eight of 16 bytes.
//
// Values: K is the warp's 16 tokens, of which the scores' lanes have 2t, 2t + 1, 2t + 8 and 2t + 9, column g of the
// e-th product is element e of 16 bytes. So what a lane reads are 16 bytes of four tokens, and of each pair of tokens
// one element makes a register.

// What a lane reads of a warp's 16 tokens: keys of tokens g and g + 8, 16 bytes of every 64; values of four tokens, 16
// bytes of every 128.
template <class Shape>
struct LaneLoads {
    static constexpr int kKeys = Shape::kChunks > 4 ? Shape::kChunks / 4 : 1;
    static constexpr int kValues = Shape::kChunks > 8 ? Shape::kChunks / 8 : 1;

    // Of 16 bytes; past the last of a short head's, others stand in: none of their products is used.
    static __device__ __forceinline__ uint32_t key_chunk(uint32_t lane, int i) { return (lane % 4 + 4 * i) % Shape::kChunks; }
    static __device__ __forceinline__ uint32_t value_chunk(uint32_t lane, int i) { return (lane / 4 + 8 * i) % Shape::kChunks; }
    static __device__ __forceinline__ uint32_t value_token(uint32_t lane, int m) { return lane % 4 * 2 + m % 2 + m / 2 * 8; }
};

// A warp's keys and values of a split, from when they are asked for until they are used.
//
// In registers they cost no memory, which then takes weights of ops to come. But the hardware counts what a thread waits
// for with few counters, and the compiler takes one for all loads that a loop leaves under way: whatever it waits for,
// it waits for all of them. So they are for where shared memory is short.
template <class Shape, bool kIsStaged = Shape::kIsStaged>
struct HeldTokens {
    using Lane = LaneLoads<Shape>;
    uint4 keys[2][Lane::kKeys], values[Lane::kValues][4];

    static __device__ __forceinline__ HeldTokens in(const Worker&, SharedAddress) { return {}; }
    // Those tokens of which IsWanted says so, by how far they are after the warp's first. `from`: of the KV head in slot 0;
    // `slots`: of the warp's tokens.
    template <class IsWanted>
    __device__ __forceinline__ void load_keys(const Worker& w, const uint8_t* from, SharedAddress slots, const IsWanted& is_wanted) {
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
            const uint32_t token = w.lane / 4 + tile * 8;
            const uint4* key = at_slot<Shape>(from, ptx::load_shared<uint32_t>(slots + token * 4));
#pragma unroll
            for (int i = 0; i < Lane::kKeys; i++)
                ptx::load_global_if(is_wanted(Share<Shape>::offset_of(token)), key + Lane::key_chunk(w.lane, i), keys[tile][i]);
        }
    }
    template <class IsWanted>
    __device__ __forceinline__ void load_values(const Worker& w, const uint8_t* from, SharedAddress slots, const IsWanted& is_wanted) {
#pragma unroll
        for (int m = 0; m < 4; m++) {
            const uint32_t token = Lane::value_token(w.lane, m);
            const uint4* value = at_slot<Shape>(from, ptx::load_shared<uint32_t>(slots + token * 4)) + Shape::kValuesAt / 16;
#pragma unroll
            for (int i = 0; i < Lane::kValues; i++)
                ptx::load_global_if(is_wanted(Share<Shape>::offset_of(token)), value + Lane::value_chunk(w.lane, i), values[i][m]);
        }
    }
    __device__ __forceinline__ void end_loads() const {}
    __device__ __forceinline__ void await_all_but_last() const {}
    __device__ __forceinline__ uint4 key(const Worker&, int tile, int i) const { return keys[tile][i]; }
    __device__ __forceinline__ uint4 value(const Worker&, int i, int m) const { return values[i][m]; }
};

// In shared memory, brought by asynchronous copies, of which a thread can wait for the older ones alone. A warp uses
// only what its lanes have asked for.
template <class Shape>
struct HeldTokens<Shape, true> {
    using Lane = LaneLoads<Shape>;
    SharedAddress tokens;

    // Behind what the warps make of a split.
    static __device__ __forceinline__ HeldTokens in(const Worker& w, SharedAddress page) {
        return {page + Shape::kPartialBytes + w.warp * (Shape::kTokens * Shape::kTokenBytes)};
    }
    // Of a token's 16 bytes, so that eight lanes read as many of different banks, both of keys and of values.
    __device__ __forceinline__ SharedAddress at(uint32_t token, uint32_t chunk) const {
        const uint32_t turned = (token & 6 ^ token << 2 & 4) & (Shape::kChunks - 1);
        return tokens + token * Shape::kTokenBytes + (chunk ^ turned) * 16;
    }
    template <class IsWanted>
    __device__ __forceinline__ void load_keys(const Worker& w, const uint8_t* from, SharedAddress slots,
                                              const IsWanted& is_wanted) const {
        load(w, from, slots, 0, is_wanted);
    }
    template <class IsWanted>
    __device__ __forceinline__ void load_values(const Worker& w, const uint8_t* from, SharedAddress slots,
                                                const IsWanted& is_wanted) const {
        load(w, from + Shape::kValuesAt, slots, Shape::kPartOfTokens, is_wanted);
    }
    __device__ __forceinline__ void end_loads() const { ptx::copy_async_commit(); }
    __device__ __forceinline__ void await_all_but_last() const {
        ptx::copy_async_wait<1>();
        ptx::sync_warp();
    }
    __device__ __forceinline__ uint4 key(const Worker& w, int tile, int i) const {
        return ptx::load_shared<uint4>(at(w.lane / 4 + tile * 8, Lane::key_chunk(w.lane, i)));
    }
    __device__ __forceinline__ uint4 value(const Worker& w, int i, int m) const {
        return ptx::load_shared<uint4>(at(Lane::value_token(w.lane, m), Lane::value_chunk(w.lane, i)) + Shape::kPartOfTokens);
    }

   private:
    // Whole tokens by neighbouring lanes.
    template <class IsWanted>
    __device__ __forceinline__ void load(const Worker& w, const uint8_t* from, SharedAddress slots, uint32_t to,
                                         const IsWanted& is_wanted) const {
        ptx::sync_warp();  // the tokens before have been read
        const uint32_t chunk = w.lane % Shape::kChunks, token0 = w.lane / Shape::kChunks * Shape::kTimes;
        from = ptx::settled_pointer(from + chunk * 16);
#pragma unroll
        for (int i = 0; i < Shape::kTimes; i++)
            if (is_wanted(Share<Shape>::offset_of(token0 + i)))
                ptx::copy_async_16(to + at(token0 + i, chunk), at_slot<Shape>(from, ptx::load_shared<uint32_t>(slots + (token0 + i) * 4)));
        end_loads();
    }
};

// What eight query heads make of a warp's tokens, as the matrix instruction for values takes it; times kWeightScale, so that
// small weights are numbers of full precision in 16 bits, too, and the largest, 1, is one yet.
using HeadWeights = uint32_t[4];
constexpr float kWeightScale = 32768;

// Two floats, as upper halves and what these are off by; past 131,008 from zero they saturate, as keys do past half of it.
__device__ __forceinline__ void split_halves(float2 x, uint32_t& upper, uint32_t& lower) {
    upper = ptx::pack_f16x2(x.x, x.y);
    lower = ptx::pack_f16x2(x.x - ptx::half_to_float(upper & 0xffff), x.y - ptx::half_to_float(upper >> 16));
}

// A warp's weights of its tokens; maximum and sum of each head to `extremes`.
template <class Shape>
__device__ __forceinline__ void weigh_tokens(const Worker& w, const HeldTokens<Shape>& held, int num_tokens, SharedAddress queries,
                                             HeadWeights (&weights)[Shape::kHeadBlocks], SharedAddress extremes) {
    using Lane = LaneLoads<Shape>;
#pragma unroll
    for (int block = 0; block < Shape::kHeadBlocks; block++) {
        const uint32_t own = block * Shape::kHeadsAtOnce + w.lane / 4;
        const uint32_t head = own < Shape::kGroup ? own : Shape::kGroup - 1;  // rows past the last are not stored
        float c[2][2][4] = {};  // for two tiles of tokens, so that products need not wait for each other
#pragma unroll
        for (int i = 0; i < Lane::kKeys; i++) {
            const SharedAddress query = queries + (head * Shape::kChunks + Lane::key_chunk(w.lane, i)) * 16;
            uint4 upper = ptx::load_shared<uint4>(query), lower = ptx::load_shared<uint4>(query + Shape::kElements * 2);
            if (Shape::kChunks < 4 && w.lane % 4 >= Shape::kChunks) upper = lower = {};
#pragma unroll
            for (int tile = 0; tile < 2; tile++) {
                const uint4 key = held.key(w, tile, i);
                ptx::mma_f16(c[tile][0], upper.x, lower.x, upper.y, lower.y, key.x, key.y);
                ptx::mma_f16(c[tile][1], upper.z, lower.z, upper.w, lower.w, key.z, key.w);
            }
        }
        float score[4], largest = -__builtin_huge_valf(), sum = 0;
#pragma unroll
        for (int m = 0; m < 4; m++) {
            const int e = m % 2, tile = m / 2;
            score[m] = c[tile][0][e] + c[tile][1][e] + (c[tile][0][2 + e] + c[tile][1][2 + e]);
            if (Share<Shape>::offset_of(Lane::value_token(w.lane, m)) >= num_tokens) score[m] = -__builtin_huge_valf();
            largest = fmaxf(largest, score[m]);
        }
        largest = fmaxf(largest, ptx::shuffle_xor(largest, 1));
        largest = fmaxf(largest, ptx::shuffle_xor(largest, 2));
#pragma unroll
        for (int m = 0; m < 4; m++) {
            score[m] = exp_f32(score[m] - largest);  // NaN for a score of NaN, which fmaxf leaves out
            sum += score[m];
        }
        sum += ptx::shuffle_xor(sum, 1);
        sum += ptx::shuffle_xor(sum, 2);
        split_halves({score[0] * kWeightScale, score[1] * kWeightScale}, weights[block][0], weights[block][1]);
        split_halves({score[2] * kWeightScale, score[3] * kWeightScale}, weights[block][2], weights[block][3]);
        if (w.lane % 4 == 0 && own < Shape::kGroup) ptx::store_shared(extremes + own * 8, float2{largest, sum});
    }
}

// A warp's values, mixed by weight, times kWeightScale: [head of the group][kDim].
template <class Shape>
__device__ __forceinline__ void mix_tokens(const Worker& w, const HeldTokens<Shape>& held,
                                           const HeadWeights (&weights)[Shape::kHeadBlocks], SharedAddress to) {
    using Lane = LaneLoads<Shape>;
#pragma unroll
    for (int i = 0; i < Lane::kValues; i++) {
        uint32_t value[4][4];  // of four tokens, eight elements
#pragma unroll
        for (int m = 0; m < 4; m++) {
            const uint4 four = held.value(w, i, m);
            value[m][0] = four.x, value[m][1] = four.y, value[m][2] = four.z, value[m][3] = four.w;
        }
#pragma unroll
        for (int block = 0; block < Shape::kHeadBlocks; block++) {
            const uint32_t(&a)[4] = weights[block];
            const uint32_t head = block * Shape::kHeadsAtOnce + w.lane / 4, element = 64 * i + w.lane % 4 * 16;
            const bool is_there = head < Shape::kGroup && element < Shape::kDim;
#pragma unroll
            for (int quad = 0; quad < 2; quad++) {
                float mixed[2][4];  // of the first 16 bytes and of the second
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int word = quad * 2 + e / 2;
                    const uint32_t selector = e % 2 ? 0x7632u : 0x5410u;
                    float c[4] = {};
                    ptx::mma_f16(c, a[0], a[1], a[2], a[3], ptx::permute_bytes(value[0][word], value[1][word], selector),
                                 ptx::permute_bytes(value[2][word], value[3][word], selector));
                    mixed[0][e] = c[0] + c[2], mixed[1][e] = c[1] + c[3];
                }
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const float(&four)[4] = mixed[half];
                    if (is_there)
                        ptx::store_shared(to + (head * Shape::kDim + element + half * 8 + quad * 4) * 4,
                                          float4{four[0], four[1], four[2], four[3]});
                }
            }
        }
    }
}

// Warps that have tokens of a split, of which the row has so many from the split's first on.
template <class Shape>
__device__ __forceinline__ uint32_t num_warps_of(uint32_t num_tokens) {
    const uint32_t warps = (num_tokens + Shape::kTokensATime - 1) / Shape::kTokensATime;
    return warps < kConsumerWarps ? warps : kConsumerWarps;
}

// The partial results of so many warps of a split, merged in order, to the row's output of that split; if it is the row's only
// one also to `heads`, from element `first` on. A thread has two neighbouring elements.
template <class Shape, class Heads>
__device__ __forceinline__ void merge_warps(const Worker& w, SharedAddress partial, uint32_t num_warps, float* out, bool is_only,
                                            const Heads& heads, uint32_t first) {
    constexpr int kDim = Shape::kDim, kHead = kDim + 2;
#pragma unroll 1
    for (int item = w.thread * 2; item < Shape::kElements; item += kConsumers * 2) {
        const int head = item / kDim, element = item % kDim;
        float2 extremes[kConsumerWarps], values[kConsumerWarps];
#pragma unroll
        for (uint32_t i = 0; i < kConsumerWarps; i++) {
            const uint32_t warp = i < num_warps ? i : 0;  // in place of those without tokens the first again, without weight
            extremes[i] = ptx::load_shared<float2>(partial + Shape::kExtremesAt + (warp * Shape::kGroup + head) * 8);
            values[i] = ptx::load_shared<float2>(partial + (warp * Shape::kElements + item) * 4);
        }
        float largest = extremes[0].x, sum = 0;
        float2 mixed{0, 0};
#pragma unroll
        for (uint32_t i = 1; i < kConsumerWarps; i++) largest = fmaxf(largest, extremes[i].x);
#pragma unroll
        for (uint32_t i = 0; i < kConsumerWarps; i++) {
            const float weight = i < num_warps ? exp_f32(extremes[i].x - largest) : 0;
            sum = fma_f32(weight, extremes[i].y, sum);
            mixed.x = fma_f32(weight / kWeightScale, values[i].x, mixed.x);
            mixed.y = fma_f32(weight / kWeightScale, values[i].y, mixed.y);
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
