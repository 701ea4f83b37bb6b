// What all lanes of a warp do together, and named barriers, which warps do together.
#pragma once

#include "accesses.h"
#include "floats.h"
#include "knowledge.h"
#include "scheduler.h"

namespace headrace::emulation {

[[noreturn]] __attribute__((noinline)) inline void fail_divergence(const Warp& warp) {
    const Lane& other = warp.lanes[warp.first_lane];
    fail(kDivergence, "lane %u is at %s(%u, %u) @%x, this one at %s(%u, %u)", other.identity.lane, name_of(warp.op),
         warp.operand[0], warp.operand[1], warp.site, name_of(self->op), self->operand[0], self->operand[1]);
}

// Returns true to the lane that came last: it does what there is to do, then calls let_go.
inline bool meet(Op op, uint32_t operand0, uint32_t operand1) {
    Warp& warp = *self->warp;
    const uint32_t own = lane_bit(*self);
    self->operand[0] = operand0, self->operand[1] = operand1;
    if (!warp.collected) {
        warp.op = op;
        warp.operand[0] = operand0, warp.operand[1] = operand1;
        warp.site = self->site;
        warp.first_lane = self->identity.lane;
    } else if (warp.op != op || warp.operand[0] != operand0 || warp.operand[1] != operand1) {
        fail_divergence(warp);
    }
    if (warp.exited)
        fail(kDivergence, "lane %u of the warp has ended, and will never be there", __builtin_ctz(warp.exited));
    warp.collected |= own;
    if (warp.collected == kAllLanes) {
        machine.collectives++;
        warp.collected = 0;
        return true;
    }
    stop_running(*self);
    leave();
    return false;
}

// All lanes but the running one, which has not stopped.
inline void let_go(Warp& warp) {
    make_runnable(warp.lanes[0]);
    warp.runnable = kAllLanes;
}

void sync_warp() {
    begin(Op::kSyncWarp, 0, HEADRACE_SITE());
    if (!meet(Op::kSyncWarp, 0, 0)) return;
    put_in_step(*self->warp);
    let_go(*self->warp);
}

void sync_threads(uint32_t id, uint32_t num_threads) {
    begin(Op::kSyncThreads, 0, HEADRACE_SITE());
    if (id >= kNamedBarriers) fail(kBarrierMisuse, "there are barriers 0 .. %u, and no %u", kNamedBarriers - 1, id);
    if (num_threads % kLanes || !num_threads || num_threads > machine.config.threads_per_block)
        fail(kBarrierMisuse, "%u threads are not whole warps of the block", num_threads);
    switch_point();
    if (!meet(Op::kSyncThreads, id, num_threads)) return;
    Warp& warp = *self->warp;
    NamedBarrier& barrier = warp.block->barriers[id];
    if (barrier.arrived && barrier.num_threads != num_threads)
        fail(kBarrierMisuse, "barrier %u is for %u threads here, for %u @%x", id, num_threads, barrier.num_threads,
             barrier.site);
    barrier.num_threads = num_threads;
    barrier.site = self->site;
    barrier.arrived |= 1u << warp.in_block;
    if (static_cast<uint32_t>(__builtin_popcount(barrier.arrived)) * kLanes < num_threads) {
        stop_running(*self);
        leave();
        return;
    }
    const uint32_t arrived = barrier.arrived;
    barrier.arrived = 0;
    put_in_step(*warp.block, arrived);
    for (uint32_t left = arrived; left; left &= left - 1) let_go(warp.block->warps[__builtin_ctz(left)]);
}

uint32_t shuffle_xor(uint32_t value, uint32_t mask) {
    begin(Op::kShuffleXor, 0, HEADRACE_SITE());
    Warp& warp = *self->warp;
    const uint32_t lane = self->identity.lane;
    if (mask >= kLanes) fail(kDivergence, "the lane %u away from lane %u is in no warp", mask, lane);
    warp.inputs[lane] = value;
    if (meet(Op::kShuffleXor, mask, 0)) {
        for (uint32_t i = 0; i < kLanes; i++) warp.results[i] = warp.inputs[i ^ mask];
        let_go(warp);
    }
    return warp.results[lane];
}

uint32_t shuffle(uint32_t value, uint32_t from) {
    begin(Op::kShuffle, 0, HEADRACE_SITE());
    Warp& warp = *self->warp;
    const uint32_t lane = self->identity.lane;
    warp.inputs[lane] = value;
    warp.a[lane][0] = from % kLanes;
    if (meet(Op::kShuffle, 0, 0)) {
        for (uint32_t i = 0; i < kLanes; i++) warp.results[i] = warp.inputs[warp.a[i][0]];
        let_go(warp);
    }
    return warp.results[lane];
}

uint32_t ballot(bool value) {
    begin(Op::kBallot, 0, HEADRACE_SITE());
    Warp& warp = *self->warp;
    const uint32_t lane = self->identity.lane;
    warp.inputs[lane] = value;
    if (meet(Op::kBallot, 0, 0)) {
        uint32_t found = 0;
        for (uint32_t i = 0; i < kLanes; i++) found |= (warp.inputs[i] != 0) << i;
        for (uint32_t& result : warp.results) result = found;
        let_go(warp);
    }
    return warp.results[lane];
}

inline float element_of(MmaType type, uint32_t pair, uint32_t index) {
    const uint16_t bits = pair >> 16 * index;
    return type == MmaType::kBf16 ? bf16_to_float(bits) : half_to_float(bits);
}

// c += a * b of all lanes; layouts as cuda/ptx/mma.h says.
__attribute__((noinline)) inline void multiply(MmaType type, Warp& warp) {
    double a[16][16], sums[16][8];
    alignas(64) double b[16][8];
    for (uint32_t lane = 0; lane < kLanes; lane++) {
        const uint32_t g = lane / 4, t = lane % 4;
        for (uint32_t i = 0; i < 4; i++)
            for (uint32_t e = 0; e < 2; e++)
                a[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + e] = element_of(type, warp.a[lane][i], e);
        for (uint32_t i = 0; i < 2; i++)
            for (uint32_t e = 0; e < 2; e++) b[2 * t + 8 * i + e][g] = element_of(type, warp.b[lane][i], e);
        for (uint32_t i = 0; i < 4; i++) sums[g + 8 * (i / 2)][2 * t + i % 2] = warp.c[lane][i];
    }
    for (uint32_t row = 0; row < 16; row++)
        for (uint32_t k = 0; k < 16; k++)
            for (uint32_t column = 0; column < 8; column++) sums[row][column] += a[row][k] * b[k][column];
    for (uint32_t lane = 0; lane < kLanes; lane++)
        for (uint32_t i = 0; i < 4; i++)
            warp.c[lane][i] = static_cast<float>(sums[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2]);
}

void mma(MmaType type, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const Op op = type == MmaType::kBf16 ? Op::kMmaBf16 : Op::kMmaF16;
    begin(op, 0, HEADRACE_SITE());
    Warp& warp = *self->warp;
    const uint32_t lane = self->identity.lane;
    memcpy(warp.a[lane], a, sizeof a);
    memcpy(warp.b[lane], b, sizeof b);
    memcpy(warp.c[lane], c, sizeof c);
    if (meet(op, 0, 0)) {
        multiply(type, warp);
        let_go(warp);
    }
    memcpy(c, warp.c[lane], sizeof c);
}

void load_matrix_x4(uint32_t (&r)[4], uint32_t row) {
    begin(Op::kLoadMatrix, row, HEADRACE_SITE());
    Warp& warp = *self->warp;
    const uint32_t lane = self->identity.lane;
    memcpy(warp.a[lane], load_checked<16>(*self->block, row), 16);
    if (meet(Op::kLoadMatrix, 0, 0)) {
        uint32_t rows[kLanes][4];
        memcpy(rows, warp.a, sizeof rows);
        for (uint32_t i = 0; i < kLanes; i++)
            for (uint32_t matrix = 0; matrix < 4; matrix++) warp.a[i][matrix] = rows[8 * matrix + i / 4][i % 4];
        let_go(warp);
    }
    memcpy(r, warp.a[lane], sizeof r);
}

}  // namespace headrace::emulation
