// One thing at a time that a kernel must not do, or must be allowed to. Cases are told apart by `fault`, a case's number
// in the list below; the line that a report names ends in the case's name.
#include "arguments.h"

namespace {

using namespace headrace;

enum Case : uint32_t {
    kSharedPastEnd, kSharedBefore, kGlobalPastEnd, kGlobalBefore, kConstantPastEnd, kPrefetchPastEnd, kNowhere,
    kCopyPastEnd, kSharedMisaligned, kGlobalMisaligned, kCopyMisaligned, kSharedUninitialised, kGlobalUninitialised,
    kHalfUninitialised, kReadOnly, kConstantThenStored, kStoredThenConstant, kDivergentCollectives, kDivergentBarriers,
    kLaneEndsBefore, kLaneEndsAfter, kNeighbourHalves, kSameHalf, kHalfOfWord, kNeighbourBytes, kTwoLanesStore,
    kCopySourceStored, kCopyTwice, kStoreInFlight, kLoadInFlight, kMbarrierMissing, kMbarrierTwice, kMbarrierLoaded,
    kMbarrierUnseen, kBarrierNumber, kPollsTwoWords, kEndless, kTrap, kTimesOut, kBulkOfStored, kReleaseOfOtherLane,
    kAcquireByOtherLane, kLoadOfOtherLane, kCumulative, kUnorderedAdds, kStoreOverAdd, kStackDeep, kAllRight, kNumCases,
};

__device__ __noinline__ void fill_stack() {
    volatile uint8_t much[118 * 1024];
    for (uint32_t i = 0; i < sizeof much; i += 512) much[i] = 1;
    ptx::sync_warp();  // kStackDeep
    much[0] = 2;
}

}  // namespace

KERNEL wrong(const __grid_constant__ Arguments a) {
    const ptx::SharedAddress shared = ptx::shared_base();
    const uint32_t block = ptx::block(), warp = ptx::warp(), lane = ptx::lane(), thread = ptx::thread();
    const bool is_first = block == 0 && thread == 0;
    auto* output = reinterpret_cast<uint32_t*>(a.output);           // 1,024 words
    const auto* input = reinterpret_cast<const uint32_t*>(a.input);  // 1,024 words
    uint32_t* fresh = a.counters + 64;                               // a region that nobody has written
    switch (a.fault) {
        case kSharedPastEnd:
            if (is_first) ptx::store_shared(shared + 16384, 1u);  // kSharedPastEnd
            break;
        case kSharedBefore:
            if (is_first) ptx::load_shared<uint32_t>(shared - 4);  // kSharedBefore
            break;
        case kGlobalPastEnd:
            if (is_first) ptx::load_global(output + 1024);  // kGlobalPastEnd
            break;
        case kGlobalBefore:
            if (is_first) ptx::store_global(output - 1, 1u);  // kGlobalBefore
            break;
        case kConstantPastEnd:
            if (is_first) ptx::load_constant(reinterpret_cast<const uint4*>(input) + 256);  // kConstantPastEnd
            break;
        case kPrefetchPastEnd:
            if (is_first) ptx::prefetch(input + 1024);  // kPrefetchPastEnd
            break;
        case kNowhere:
            if (is_first) ptx::load_global(reinterpret_cast<const uint32_t*>(64));  // kNowhere
            break;
        case kCopyPastEnd:
            if (is_first) ptx::copy_async_16(shared + 16384 - 8, input);  // kCopyPastEnd
            break;
        case kSharedMisaligned:
            if (is_first) ptx::store_shared(shared + 8, float4{1, 2, 3, 4});  // kSharedMisaligned
            break;
        case kGlobalMisaligned:
            if (is_first) ptx::load_global(reinterpret_cast<const uint2*>(input + 1));  // kGlobalMisaligned
            break;
        case kCopyMisaligned:
            if (is_first) ptx::copy_async_16(shared, input + 2);  // kCopyMisaligned
            break;
        case kSharedUninitialised:
            if (is_first) ptx::load_shared<uint32_t>(shared + 64);  // kSharedUninitialised
            break;
        case kGlobalUninitialised:
            if (is_first) ptx::store_global(fresh, 1u);
            if (is_first) ptx::load_global(reinterpret_cast<const uint2*>(fresh));  // kGlobalUninitialised
            break;
        case kHalfUninitialised:
            if (is_first) ptx::store_shared<uint16_t>(shared + 2, 1);
            if (is_first) ptx::load_shared<uint32_t>(shared);  // kHalfUninitialised
            break;
        case kReadOnly:
            if (is_first) ptx::store_global(const_cast<uint32_t*>(input) + 3, 1u);  // kReadOnly
            break;
        case kConstantThenStored:
            if (is_first) ptx::load_constant(output + 5);
            if (is_first) ptx::store_global(output + 5, 1u);  // kConstantThenStored
            break;
        case kStoredThenConstant:
            if (is_first) ptx::store_global(reinterpret_cast<uint16_t*>(output + 5), uint16_t{1});
            if (is_first) ptx::load_constant(reinterpret_cast<const uint16_t*>(output + 5) + 1);
            if (is_first) ptx::load_constant(reinterpret_cast<const uint16_t*>(output + 5));  // kStoredThenConstant
            break;
        case kDivergentCollectives:
            if (lane < 16)
                ptx::sync_warp();  // kDivergentCollectives
            else
                ptx::ballot(true);  // kDivergentCollectives
            break;
        case kDivergentBarriers:
            ptx::sync_threads(lane == 5 ? 2 : 1, 288);  // kDivergentBarriers
            break;
        case kLaneEndsBefore:
            if (lane == 0) return;
            ptx::sync_warp();  // kLaneEndsBefore
            break;
        case kLaneEndsAfter:
            if (lane == 31) return;
            ptx::sync_warp();  // kLaneEndsAfter
            break;
        case kNeighbourHalves:
            for (uint32_t i = 0; i < 16; i++)
                if (lane == 0) ptx::store_shared<uint16_t>(shared + warp * 2 + 18 * i, i);
            if (thread == 0) ptx::store_shared<uint16_t>(shared + 18 * 16, 0);
            ptx::sync_threads(0, 288);
            for (uint32_t i = 0; i < 16; i++) ptx::load_shared<uint32_t>(shared + 4 * lane);
            ptx::sync_threads(0, 288);
            if (lane == 0) ptx::store_shared<uint16_t>(shared + warp * 2, 5);
            if (lane == 0 && ptx::load_shared<uint16_t>(shared + warp * 2) != 5) ptx::trap();
            break;
        case kSameHalf:
            if (lane == 0 && warp < 3) ptx::store_shared<uint16_t>(shared + 4 + warp / 2 * 2, 1);  // kSameHalf
            break;
        case kHalfOfWord:
            if (thread == 0) ptx::store_shared(shared, 0u);
            ptx::sync_threads(0, 288);
            if (thread == 0) ptx::store_shared<uint16_t>(shared + 2, 1);  // kHalfOfWord
            if (thread == 32) ptx::load_shared<uint16_t>(shared);
            if (thread == 64) ptx::load_shared<uint32_t>(shared);  // kHalfOfWord
            break;
        case kNeighbourBytes:
            ptx::store_global(a.output + block * 288 + thread, static_cast<uint8_t>(thread));
            if (ptx::load_global(a.output + block * 288 + thread) != thread % 256) ptx::trap();
            break;
        case kTwoLanesStore:
            if (is_first || (block == 0 && thread == 3)) ptx::store_shared(shared, 1u);  // kTwoLanesStore
            break;
        case kCopySourceStored:
            if (is_first) {
                ptx::copy_async_16(shared + 64, output);
                ptx::store_global(output + 3, 1u);  // kCopySourceStored
            }
            break;
        case kCopyTwice:
            if (is_first) {
                ptx::copy_async_16(shared + 64, input);
                ptx::copy_async_16(shared + 64, input + 4);  // kCopyTwice
            }
            break;
        case kStoreInFlight:
            if (is_first) {
                ptx::copy_async_16(shared + 64, input);
                ptx::store_shared<uint16_t>(shared + 78, 1);  // kStoreInFlight
            }
            break;
        case kLoadInFlight:
            if (is_first) {
                ptx::copy_async_16(shared + 64, input);
                ptx::load_shared<float>(shared + 76);  // kLoadInFlight
            }
            break;
        case kMbarrierMissing:
            if (is_first) ptx::mbarrier_arrive(shared + 8);  // kMbarrierMissing
            break;
        case kMbarrierTwice:
            if (is_first) {
                ptx::mbarrier_init(shared, 1);
                ptx::mbarrier_init(shared, 1);  // kMbarrierTwice
            }
            break;
        case kMbarrierLoaded:
            if (is_first) {
                ptx::mbarrier_init(shared, 1);
                ptx::load_shared<uint32_t>(shared + 4);  // kMbarrierLoaded
            }
            break;
        case kMbarrierUnseen:
            if (thread == 0) ptx::mbarrier_init(shared, 1);
            if (lane == 1) ptx::mbarrier_try_wait(shared, 1);  // kMbarrierUnseen
            break;
        case kBarrierNumber:
            ptx::sync_threads(16, 288);  // kBarrierNumber
            break;
        case kPollsTwoWords:
            if (thread == 0)
                while (!ptx::load_acquire(a.counters) && !ptx::load_acquire(a.counters + 1)) {  // kPollsTwoWords
                }
            break;
        case kEndless:
            for (uint32_t i = 0; is_first; i++) ptx::store_global(output, i);  // kEndless
            break;
        case kTrap:
            if (is_first) ptx::trap();  // kTrap
            break;
        case kTimesOut: {
            const uint64_t start = ptx::nanoseconds();
            if (thread == 32)
                while (!ptx::load_acquire(a.counters))
                    if (ptx::nanoseconds() - start > 1000000000000) {
                        if (ptx::compare_exchange(a.counters + 4, 0, 7) == 0) ptx::store_system(a.counters + 5, block);
                        ptx::fence_system();
                        ptx::trap();  // kTimesOut
                    }
            ptx::sync_threads(0, 288);
            break;
        }
        case kBulkOfStored:
            if (is_first) {
                ptx::mbarrier_init(shared, 1);
                ptx::fence_mbarrier_init();
                ptx::store_global(output + 2, 1u);
                ptx::mbarrier_arrive_expect(shared, 16);
                ptx::copy_bulk(shared + 16, output, 16, shared);  // kBulkOfStored
            }
            break;
        case kReleaseOfOtherLane:
            if (block == 0 && thread == 1) ptx::store_global(output + 1, 1u);  // kReleaseOfOtherLane
            if (block == 0 && thread == 0) ptx::add_release(a.counters, 1);
            if (block == 1 && thread == 0) {
                while (!ptx::load_acquire(a.counters)) {
                }
                ptx::load_global(output + 1);  // kReleaseOfOtherLane
            }
            break;
        case kAcquireByOtherLane:
            if (is_first) ptx::store_global(output + 1, 1u);  // kAcquireByOtherLane
            if (is_first) ptx::add_release(a.counters, 1);
            if (block == 1 && thread == 0)
                while (!ptx::load_acquire(a.counters)) {
                }
            if (block == 1 && warp == 0) {
                ptx::ballot(true);  // a collective, but one that orders nothing
                if (lane == 1) ptx::load_global(output + 1);  // kAcquireByOtherLane
            }
            break;
        case kLoadOfOtherLane:  // lane 0 tells of both its loads, lane 1 of none
            if (block == 0 && warp == 0) {
                if (lane < 2) ptx::load_global(output + 1);  // kLoadOfOtherLane
                ptx::ballot(true);
                if (lane == 0) {
                    ptx::add_release(a.counters, 1);
                    while (!ptx::load_acquire(a.counters + 1)) {
                    }
                    ptx::load_global(output + 1);
                    ptx::add_release(a.counters + 2, 1);
                }
            }
            if (block == 0 && thread == 64) {
                while (!ptx::load_acquire(a.counters)) {
                }
                ptx::load_global(output + 1);
                ptx::add_release(a.counters + 1, 1);
            }
            if (block == 1 && thread == 0) {
                while (!ptx::load_acquire(a.counters + 2)) {
                }
                ptx::store_global(output + 1, 1u);  // kLoadOfOtherLane
            }
            break;
        case kCumulative:
            if (thread == 0) ptx::store_shared(shared, 0u);
            ptx::sync_threads(0, 288);
            if (is_first) {
                ptx::store_global(output + 1, 1u);
                ptx::add_release(a.counters, 1);
            }
            if (block == 1 && thread == 64) {
                while (!ptx::load_acquire(a.counters)) {
                }
                ptx::add_shared_release(shared, 1);
            }
            if (block == 1 && thread == 0) {
                while (!ptx::load_shared_acquire(shared)) {
                }
                if (ptx::load_global(output + 1) != 1) ptx::trap();
            }
            break;
        case kUnorderedAdds:
            ptx::add_release(a.counters, 1);
            break;
        case kStoreOverAdd:
            if (block < 2 && thread == 0) {
                if (block == 0)
                    ptx::add_release(a.counters, 1);  // kStoreOverAdd
                else
                    ptx::store_global(a.counters, 1u);  // kStoreOverAdd
            }
            break;
        case kStackDeep:
            fill_stack();
            break;
        default:
            break;
    }
}

HEADRACE_KERNELS(wrong)
