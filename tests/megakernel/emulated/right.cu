// Kernels that are right, and one way or another of getting each wrong.
#include "arguments.h"

namespace {

using namespace headrace;
using ptx::SharedAddress;

constexpr uint32_t kConsumers = 256, kThreads = 288, kPageBytes = 4096, kPages = 2;

template <class T>
const T* in(const Arguments& a) {
    return reinterpret_cast<const T*>(a.input);
}
template <class T>
T* out(const Arguments& a) {
    return reinterpret_cast<T*>(a.output);
}

}  // namespace

// out[block] = sum of in[block][288]. Fault 1: no barrier between the warps' sums and who adds them.
KERNEL reduce(const __grid_constant__ Arguments a) {
    float sum = ptx::load_constant(in<float>(a) + ptx::block() * kThreads + ptx::thread());
    for (uint32_t mask = 16; mask; mask /= 2) sum += ptx::shuffle_xor(sum, mask);
    const SharedAddress sums = ptx::shared_base();
    if (ptx::thread() < 9) ptx::store_shared(sums + 4 * ptx::thread(), 0.0f);
    ptx::sync_threads(0, kThreads);
    if (ptx::lane() == 0) ptx::store_shared(sums + 4 * ptx::warp(), sum);
    if (a.fault != 1) ptx::sync_threads(0, kThreads);
    float total = 0;
    for (uint32_t i = 0; i < 9; i++) total += ptx::load_shared<float>(sums + 4 * i);
    if (ptx::thread() == 0) ptx::store_global(out<float>(a) + ptx::block(), total);
}

// Lanes hand their word to a neighbour, by shared memory. Fault 1: no sync_warp; a shuffle instead.
KERNEL exchange(const __grid_constant__ Arguments a) {
    const uint32_t neighbour = ptx::thread() ^ 1;
    const SharedAddress own = ptx::shared_base() + 4 * ptx::thread(), other = ptx::shared_base() + 4 * neighbour;
    for (uint32_t step = 0; step < a.steps; step++) {
        ptx::store_shared(own, ptx::thread() + step);
        if (a.fault == 1)
            ptx::shuffle_xor(step, 1);
        else
            ptx::sync_warp();
        const uint32_t found = ptx::load_shared<uint32_t>(other);
        if (found != neighbour + step) ptx::trap();
        ptx::sync_warp();
    }
}

// Warp 0 of block 0: C [16][8] float = A [16][16] times the transpose of B [8][16], 16-bit; then of A by ldmatrix.
template <bool kIsHalf>
__device__ __forceinline__ void multiply(const Arguments& a) {
    if (ptx::warp() || ptx::block()) return;
    const uint32_t g = ptx::lane() / 4, t = ptx::lane() % 4;
    const uint32_t* rows = in<uint32_t>(a);
    const uint32_t* columns = rows + 16 * 8;
    uint32_t fragment[4], b[2];
    for (uint32_t i = 0; i < 4; i++)
        fragment[i] = ptx::load_constant(rows + (g + 8 * (i % 2)) * 8 + t + 4 * (i / 2));
    for (uint32_t i = 0; i < 2; i++) b[i] = ptx::load_constant(columns + g * 8 + t + 4 * i);
    for (uint32_t i = 0; i < 4; i++)
        ptx::store_shared(ptx::shared_base() + 16 * ptx::lane() + 4 * i, ptx::load_constant(rows + 4 * ptx::lane() + i));
    ptx::sync_warp();
    uint32_t loaded[4];  // matrices: rows 0..7 and 8..15 of columns 0..7, then of 8..15
    ptx::load_matrix_x4(loaded, ptx::shared_base() + (ptx::lane() % 16) * 32 + ptx::lane() / 16 * 16);
    for (uint32_t turn = 0; turn < 2; turn++) {
        uint32_t(&r)[4] = turn ? loaded : fragment;
        float c[4] = {1, 1, 1, 1};
        if (kIsHalf)
            ptx::mma_f16(c, r[0], r[1], r[2], r[3], b[0], b[1]);
        else
            ptx::mma_bf16(c, r[0], r[1], r[2], r[3], b[0], b[1]);
        float* to = out<float>(a) + turn * 128;
        ptx::store_global(reinterpret_cast<float2*>(to + g * 8 + 2 * t), float2{c[0], c[1]});
        ptx::store_global(reinterpret_cast<float2*>(to + (g + 8) * 8 + 2 * t), float2{c[2], c[3]});
    }
}

KERNEL multiply_bf16(const __grid_constant__ Arguments a) { multiply<false>(a); }
KERNEL multiply_f16(const __grid_constant__ Arguments a) { multiply<true>(a); }

namespace {

// Adds the page's floats that are this thread's; steps are checked as they come.
__device__ __forceinline__ float sum_of_page(SharedAddress page) {
    float sum = 0;
    for (uint32_t at = ptx::thread() * 16; at < kPageBytes; at += kConsumers * 16) {
        const float4 four = ptx::load_shared<float4>(page + at);
        sum += four.x + four.y + four.z + four.w;
    }
    return sum;
}

constexpr uint32_t kLandedAt = 0, kProgressAt = 32, kAskedAt = 48, kFreeAt = 64, kPagesAt = 128;

}  // namespace

// out[block][thread] = sum of in[block][step][thread], four floats each, which every thread copies for itself a step ahead.
// Faults: 1 waits that leave the copies to be used under way; 2 copies of no group; 3 a neighbour's copies; 4 the next
// copies go where these are.
KERNEL copy_own(const __grid_constant__ Arguments a) {
    const auto place_of = [&](uint32_t step) {
        return ptx::shared_base() + ((a.fault == 4 ? 0 : step % 2) * kThreads + ptx::thread()) * 16;
    };
    const auto copy = [&](uint32_t step) {
        if (step < a.steps)
            ptx::copy_async_16(place_of(step), in<float4>(a) + (ptx::block() * a.steps + step) * kThreads + ptx::thread());
        if (a.fault != 2) ptx::copy_async_commit();  // of nothing, too
    };
    float sum = 0;
    copy(0);
    for (uint32_t step = 0; step < a.steps; step++) {
        copy(step + 1);
        if (a.fault == 1)
            ptx::copy_async_wait<2>();
        else
            ptx::copy_async_wait<1>();
        const float4 four = ptx::load_shared<float4>(place_of(step) ^ (a.fault == 3 ? 16 : 0));
        sum += four.x + four.y + four.z + four.w;
    }
    ptx::store_global(out<float>(a) + ptx::block() * kThreads + ptx::thread(), sum);
}

// Pages of 4 KB pass through shared memory: a loader warp copies, consumers add up. out[block][256] sums.
// Faults: 1 a page is used again too early; 2 consumers wait until copies are asked for, not until they are complete;
// 3 they tell what they have read by a plain store; 4 arrivals off by one; 5 progress is told before the page is read;
// 6 one lane alone waits for the copy, and nothing brings its warp in step; 7 the loader never waits; 8 warps are not
// kept within a step of each other, as counting them all in one word needs.
KERNEL pipeline_async(const __grid_constant__ Arguments a) {
    const SharedAddress shared = ptx::shared_base();
    if (ptx::thread() == 0) {
        for (uint32_t i = 0; i < kPages; i++) ptx::mbarrier_init(shared + kLandedAt + 8 * i, a.fault == 4 ? 33 : 32);
        ptx::store_shared(shared + kProgressAt, 0u);
        ptx::store_shared(shared + kAskedAt, 0u);
    }
    ptx::sync_threads(0, kThreads);
    const uint8_t* from = a.input + ptx::block() * a.steps * kPageBytes;
    if (ptx::warp() == 8) {
        for (uint32_t step = 0; step < a.steps; step++) {
            if (step >= kPages && a.fault != 7) {
                const uint32_t needed = (step - kPages + (a.fault == 1 ? 0 : 1)) * 8;
                while (ptx::load_shared_acquire(shared + kProgressAt) < needed) {
                }
            }
            const SharedAddress page = shared + kPagesAt + step % kPages * kPageBytes;
            for (uint32_t at = ptx::lane() * 16; at < kPageBytes; at += 512)
                ptx::copy_async_16(page + at, from + step * kPageBytes + at);
            ptx::copy_async_arrive(shared + kLandedAt + step % kPages * 8);
            ptx::add_shared_release(shared + kAskedAt, 1);
        }
        return;
    }
    float sum = 0;
    for (uint32_t step = 0; step < a.steps; step++) {
        if (a.fault == 2)
            while (ptx::load_shared_acquire(shared + kAskedAt) < (step + 1) * 32) {
            }
        else if (a.fault != 6 || ptx::lane() == 0)
            while (!ptx::mbarrier_try_wait(shared + kLandedAt + step % kPages * 8, step / kPages & 1)) {
            }
        if (a.fault != 6 && a.fault != 8) ptx::sync_threads(1, kConsumers);
        if (a.fault == 5 && ptx::lane() == 0) ptx::add_shared_release(shared + kProgressAt, 1);
        sum += sum_of_page(shared + kPagesAt + step % kPages * kPageBytes);
        ptx::sync_warp();
        if (a.fault == 3 && ptx::thread() == 0) ptx::store_shared(shared + kProgressAt, (step + 1) * 8);
        if (a.fault != 3 && a.fault != 5 && ptx::lane() == 0) ptx::add_shared_release(shared + kProgressAt, 1);
    }
    ptx::store_global(out<float>(a) + ptx::block() * kConsumers + ptx::thread(), sum);
}

// The same by bulk copies, and with mbarriers for both directions; consumers scribble over the page they have read.
// Faults: 1 the loader does not wait for free pages; 2 consumers do not wait for the copy; 3 no fence behind the
// scribbling; 4 fewer bytes expected than copied; 5 more; 6 no fence behind the mbarriers; 7 one free page too many is
// announced; 8 the last copy is never awaited.
KERNEL pipeline_bulk(const __grid_constant__ Arguments a) {
    const SharedAddress shared = ptx::shared_base();
    if (ptx::thread() == 0) {
        for (uint32_t i = 0; i < kPages; i++) {
            ptx::mbarrier_init(shared + kLandedAt + 8 * i, 1);
            ptx::mbarrier_init(shared + kFreeAt + 8 * i, kConsumers);
        }
        if (a.fault != 6) ptx::fence_mbarrier_init();
    }
    ptx::sync_threads(0, kThreads);
    const uint8_t* from = a.input + ptx::block() * a.steps * kPageBytes;
    if (ptx::warp() == 8) {
        if (ptx::lane()) return;
        for (uint32_t step = 0; step < a.steps + (a.fault == 8); step++) {
            const uint32_t number = step % kPages;
            const SharedAddress landed = shared + kLandedAt + 8 * number;
            const SharedAddress page = shared + kPagesAt + number * kPageBytes;
            const uint32_t expected = a.fault == 4 ? kPageBytes / 2 : a.fault == 5 ? kPageBytes + 16 : kPageBytes;
            if (a.fault != 1)
                while (!ptx::mbarrier_try_wait(shared + kFreeAt + 8 * number, step / kPages + 1 & 1)) {
                }
            ptx::mbarrier_arrive_expect(landed, expected);
            for (uint32_t half = 0; half < 2; half++)
                ptx::copy_bulk(page + half * kPageBytes / 2, from + step * kPageBytes + half * kPageBytes / 2,
                               kPageBytes / 2, landed);
        }
        return;
    }
    float sum = 0;
    for (uint32_t step = 0; step < a.steps; step++) {
        const uint32_t number = step % kPages;
        const SharedAddress page = shared + kPagesAt + number * kPageBytes;
        if (a.fault != 2)
            while (!ptx::mbarrier_try_wait(shared + kLandedAt + 8 * number, step / kPages & 1)) {
            }
        sum += sum_of_page(page);
        ptx::store_shared(page + 16 * ptx::thread(), step);
        if (a.fault != 3) ptx::fence_async_shared();
        ptx::mbarrier_arrive(shared + kFreeAt + 8 * number);
        if (a.fault == 7 && ptx::thread() == 0) ptx::mbarrier_arrive(shared + kFreeAt + 8 * number);
    }
    ptx::store_global(out<float>(a) + ptx::block() * kConsumers + ptx::thread(), sum);
}

// Block 0 writes 1, each further block what the one before wrote plus 1, and so on for all steps; 288 words a block.
// Faults: 1 no acquire (polled by compare_exchange); 2 no release (likewise); 3 no wait; 4 no barrier before the
// release; 5 no barrier behind the acquire; 6 polled by a plain load; 7 waits for one arrival too many; 8 read by
// load_constant.
KERNEL hand_over(const __grid_constant__ Arguments a) {
    uint32_t* rows = out<uint32_t>(a);
    const uint32_t block = ptx::block(), thread = ptx::thread(), last = ptx::num_blocks() - 1;
    for (uint32_t step = 0; step < a.steps; step++) {
        const uint32_t before = block ? block - 1 : last;
        if ((block || step) && thread == 0 && a.fault != 3) {
            uint32_t* counter = a.counters + before * 4;
            const uint32_t target = (block ? step + 1 : step) + (a.fault == 7 && block == 2);
            if (a.fault == 1)
                while (ptx::compare_exchange(counter, 0xffffffff, 0) < target) {
                }
            else if (a.fault == 6)
                while (ptx::load_global(counter) < target) {
                }
            else
                while (ptx::load_acquire(counter) < target) {
                }
        }
        if (a.fault != 5) ptx::sync_threads(0, kThreads);
        uint32_t found = 0;
        if (block || step) {
            const uint32_t* from = rows + before * kThreads + (thread + 1) % kThreads;
            found = a.fault == 8 ? ptx::load_constant(from) : ptx::load_global(from);
        }
        ptx::store_global(rows + block * kThreads + thread, found + 1);
        if (a.fault != 4) ptx::sync_threads(0, kThreads);
        if (thread == 0) {
            if (a.fault == 2)
                for (uint32_t seen = step; ptx::compare_exchange(a.counters + block * 4, seen, seen + 1) != seen;) {
                }
            else
                ptx::add_release(a.counters + block * 4, 1);
        }
    }
}

// Two groups of four warps write what the other reads, in turn. Fault 1: a barrier of too few threads; 2: of one warp
// too many; 3: only one of two barriers; 4: of 33 threads; 5: of another number than the others say.
KERNEL take_turns(const __grid_constant__ Arguments a) {
    if (ptx::warp() == 8) return;
    const SharedAddress shared = ptx::shared_base();
    const uint32_t group = ptx::warp() / 4, in_group = ptx::thread() % 128;
    uint32_t sum = 0;
    for (uint32_t step = 0; step < a.steps; step++) {
        if (group == step % 2) {
            ptx::store_shared(shared + 4 * in_group, step + in_group);
            ptx::sync_threads(3, 128);
            sum += ptx::load_shared<uint32_t>(shared + 4 * (127 - in_group));
        }
        const uint32_t all = a.fault == 1 ? 128 : a.fault == 2 ? 288 : a.fault == 4 ? 33 : kConsumers;
        ptx::sync_threads(1, a.fault == 5 && ptx::warp() == 2 ? 224 : all);
        if (group != step % 2) sum += ptx::load_shared<uint32_t>(shared + 4 * (in_group ^ 64));
        if (a.fault != 3) ptx::sync_threads(2, kConsumers);
    }
    ptx::store_global(out<uint32_t>(a) + ptx::block() * kConsumers + ptx::thread(), sum);
}

// 1,024 floats to each of the 16-bit formats and back, and functions of float32; 8 words each.
KERNEL convert(const __grid_constant__ Arguments a) {
    for (uint32_t i = ptx::thread(); i < 1024 && ptx::block() == 0; i += kThreads) {
        const float x = ptx::load_constant(in<float>(a) + i), y = ptx::load_constant(in<float>(a) + 1023 - i);
        const uint16_t half = ptx::float_to_half(x);
        const uint32_t bf16 = ptx::pack_bf16x2(x, y), f16 = ptx::pack_f16x2(x, y);
        float* to = out<float>(a) + 8 * i;
        ptx::store_global(reinterpret_cast<uint32_t*>(to), bf16);
        ptx::store_global(reinterpret_cast<uint32_t*>(to) + 1, f16);
        ptx::store_global(reinterpret_cast<uint32_t*>(to) + 2, uint32_t{half});
        ptx::store_global(to + 3, ptx::half_to_float(half));
        ptx::store_global(to + 4, ptx::bf16_to_float(bf16 & 0xffff));
        ptx::store_global(to + 5, ptx::reciprocal_sqrt(fabsf(x)));
        ptx::store_global(to + 6, ptx::fma(x, y, x));
        ptx::store_global(to + 7, ptx::exp_f32(x) + ptx::exp2_approx(x) + ptx::log_f32(fabsf(x)));
    }
}

HEADRACE_KERNELS(reduce, exchange, convert, multiply_bf16, multiply_f16, copy_own, pipeline_async, pipeline_bulk, hand_over,
                 take_turns)
