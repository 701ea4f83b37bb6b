// Does what lists of steps say, one list a thread: tests draw them at random.
#include "arguments.h"

namespace {

using namespace headrace;

struct Step {
    uint32_t kind, at, value, num_bytes;
};

enum Kind : uint32_t {
    kLoadShared, kStoreShared, kLoadGlobal, kStoreGlobal, kSyncWarp, kSyncThreads, kAddShared, kWaitShared, kAddGlobal,
    kWaitGlobal, kArrive, kWaitPhase, kCopy, kArriveCopied, kInitMbarrier,
};

}  // namespace

// Input: for each thread of all blocks the number of its first step, and of the last one's end; then the steps.
KERNEL run_steps(const __grid_constant__ Arguments a) {
    const auto* starts = reinterpret_cast<const uint32_t*>(a.input);
    const auto* steps = reinterpret_cast<const uint4*>(a.input + a.steps);
    const uint32_t number = ptx::block() * a.fault + ptx::thread();  // `fault` threads a block
    const ptx::SharedAddress shared = ptx::shared_base();
    const uint32_t end = ptx::load_constant(starts + number + 1);
    for (uint32_t i = ptx::load_constant(starts + number); i < end; i++) {
        const uint4 packed = ptx::load_constant(steps + i);
        const Step step{packed.x, packed.y, packed.z, packed.w};
        uint8_t* global = a.output + step.at;
        switch (step.kind) {
            case kLoadShared:
                if (step.num_bytes == 2) ptx::load_shared<uint16_t>(shared + step.at);
                if (step.num_bytes == 4) ptx::load_shared<uint32_t>(shared + step.at);
                if (step.num_bytes == 8) ptx::load_shared<uint2>(shared + step.at);
                break;
            case kStoreShared:
                if (step.num_bytes == 2) ptx::store_shared<uint16_t>(shared + step.at, step.value);
                if (step.num_bytes == 4) ptx::store_shared<uint32_t>(shared + step.at, step.value);
                if (step.num_bytes == 8) ptx::store_shared(shared + step.at, uint2{step.value, step.value});
                break;
            case kLoadGlobal:
                if (step.num_bytes == 1) ptx::load_global(static_cast<const uint8_t*>(global));
                if (step.num_bytes == 2) ptx::load_global(reinterpret_cast<const uint16_t*>(global));
                if (step.num_bytes == 4) ptx::load_global(reinterpret_cast<const uint32_t*>(global));
                break;
            case kStoreGlobal:
                if (step.num_bytes == 1) ptx::store_global<uint8_t>(global, step.value);
                if (step.num_bytes == 2) ptx::store_global<uint16_t>(reinterpret_cast<uint16_t*>(global), step.value);
                if (step.num_bytes == 4) ptx::store_global<uint32_t>(reinterpret_cast<uint32_t*>(global), step.value);
                break;
            case kSyncWarp:
                ptx::sync_warp();
                break;
            case kSyncThreads:
                ptx::sync_threads(step.at, step.value);
                break;
            case kAddShared:
                ptx::add_shared_release(shared + step.at, 1);
                break;
            case kWaitShared:
                while (ptx::load_shared_acquire(shared + step.at) < step.value) {
                }
                break;
            case kAddGlobal:
                ptx::add_release(a.counters + step.at, 1);
                break;
            case kWaitGlobal:
                while (ptx::load_acquire(a.counters + step.at) < step.value) {
                }
                break;
            case kArrive:
                ptx::mbarrier_arrive(shared + step.at);
                break;
            case kWaitPhase:
                while (!ptx::mbarrier_try_wait(shared + step.at, 0)) {
                }
                break;
            case kCopy:
                ptx::copy_async_16(shared + step.at, a.output + step.value);
                break;
            case kArriveCopied:
                ptx::copy_async_arrive(shared + step.at);
                break;
            default:
                ptx::mbarrier_init(shared + step.at, step.value);
                break;
        }
    }
}

HEADRACE_KERNELS(run_steps)
