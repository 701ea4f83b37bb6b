// A libcuda.so.1 without a device: memory is the host's, launches are printed, and one of 1,000 rows fails.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "../../../kernels/include/cuda/step.h"

namespace {

using Address = unsigned long long;
constexpr int kSuccess = 0, kNotFound = 500, kLaunchFailed = 719;

size_t whole(size_t bytes) { return (bytes + 255) / 256 * 256; }

struct Copy2d {
    size_t source_x, source_y;
    int source_type;
    const void* source_host;
    Address source;
    void* source_array;
    size_t source_pitch, to_x, to_y;
    int to_type;
    void* to_host;
    Address to;
    void* to_array;
    size_t to_pitch, line_bytes, num_lines;
};

int attribute(int which) {
    switch (which) {
        case 11: return 2147483647;  // MAX_PITCH
        case 16: return 132;         // MULTIPROCESSOR_COUNT
        case 75: return 9;           // COMPUTE_CAPABILITY_MAJOR
        case 76: return 0;           // COMPUTE_CAPABILITY_MINOR
        case 95: return 1;           // COOPERATIVE_LAUNCH
        case 97: return 232448;      // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        default: return -1;
    }
}

}  // namespace

// `fake_cuX` stands for cuX.
#define CALL(name) extern "C" __attribute__((visibility("default"))) int fake_##name
#define NOTHING(name, ...) \
    CALL(name)(__VA_ARGS__) { return kSuccess; }
#define HANDLE(name, ...)            \
    CALL(name)(__VA_ARGS__) {        \
        *out = (void*)(uintptr_t)64; \
        return kSuccess;             \
    }

NOTHING(cuInit, unsigned)
NOTHING(cuCtxSetCurrent, void*)
NOTHING(cuCtxSynchronize)
NOTHING(cuModuleUnload, void*)
NOTHING(cuFuncSetAttribute, void*, int, int)
NOTHING(cuStreamDestroy, void*)
NOTHING(cuStreamSynchronize, void*)
NOTHING(cuEventDestroy, void*)
NOTHING(cuEventRecord, void*, void*)
HANDLE(cuDevicePrimaryCtxRetain, void** out, int)
HANDLE(cuModuleGetFunction, void** out, void*, const char*)
HANDLE(cuStreamCreate, void** out, unsigned)
HANDLE(cuEventCreate, void** out, unsigned)

CALL(cuDriverGetVersion)(int* version) { return *version = 13000, kSuccess; }
CALL(cuDeviceGet)(int* device, int ordinal) { return *device = ordinal, kSuccess; }
CALL(cuDevicePrimaryCtxRelease)(int) { return puts("release"), kSuccess; }
CALL(cuDeviceGetAttribute)(int* value, int which, int) { return *value = attribute(which), kSuccess; }
CALL(cuDeviceGetName)(char* name, int length, int) { return strncpy(name, "none", length), kSuccess; }
CALL(cuDeviceTotalMem)(size_t* bytes, int) { return *bytes = size_t{1} << 36, kSuccess; }
CALL(cuModuleLoadData)(void** module, const char* image) { return *module = (void*)32, printf("load %.4s\n", image), kSuccess; }
CALL(cuOccupancyMaxActiveBlocksPerMultiprocessor)(int* blocks, void*, int, size_t) { return *blocks = 1, kSuccess; }
CALL(cuMemAlloc)(Address* at, size_t bytes) { return *at = (Address)aligned_alloc(256, whole(bytes)), kSuccess; }
CALL(cuMemFree)(Address at) { return free((void*)at), kSuccess; }
CALL(cuMemHostAlloc)(void** at, size_t bytes, unsigned) { return *at = aligned_alloc(256, whole(bytes)), kSuccess; }
CALL(cuMemHostGetDevicePointer)(Address* at, void* host, unsigned) { return *at = (Address)host, kSuccess; }
CALL(cuMemFreeHost)(void* at) { return free(at), kSuccess; }
CALL(cuMemsetD8)(Address at, unsigned char value, size_t bytes) { return memset((void*)at, value, bytes), kSuccess; }
CALL(cuEventElapsedTime)(float* ms, void*, void*) { return *ms = 1.5f, kSuccess; }
CALL(cuMemcpyHtoDAsync)(Address to, const void* from, size_t bytes, void*) { return memcpy((void*)to, from, bytes), kSuccess; }
CALL(cuMemcpyDtoHAsync)(void* to, Address from, size_t bytes, void*) { return memcpy(to, (void*)from, bytes), kSuccess; }
CALL(cuGetErrorName)(int, const char** name) { return *name = "CUDA_ERROR_LAUNCH_FAILED", kSuccess; }
CALL(cuGetErrorString)(int, const char** text) { return *text = "in words", kSuccess; }

CALL(cuMemcpy2DAsync)(const Copy2d* copy, void*) {
    if (copy->source_type != 2 || copy->to_type != 2) return kNotFound;
    for (size_t i = 0; i < copy->num_lines; i++)
        memcpy((char*)copy->to + i * copy->to_pitch, (char*)copy->source + i * copy->source_pitch, copy->line_bytes);
    return kSuccess;
}

CALL(cuLaunchCooperativeKernel)
(void*, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void*, void** parameters) {
    const auto& step = *static_cast<const headrace::StepArguments*>(parameters[0]);
    printf("grid %u %u %u block %u %u %u shared %u rows %d epoch %u timeout %llu\n", gx, gy, gz, bx, by, bz, shared,
           step.num_rows, step.epoch, (unsigned long long)step.timeout_ns);
    return step.num_rows == 1000 ? kLaunchFailed : kSuccess;
}

CALL(cuLaunchKernel)
(void*, unsigned gx, unsigned, unsigned, unsigned bx, unsigned, unsigned, unsigned shared, void* stream, void** parameters,
 void** extra) {
    const auto& step = *static_cast<const headrace::StepArguments*>(parameters[0]);
    printf("%u blocks of %u shared %u stream %p rows %d extra %d\n", gx, bx, shared, stream, step.num_rows, extra != nullptr);
    return kSuccess;
}

extern "C" __attribute__((visibility("default"))) int cuGetProcAddress_v2(const char* name, void** function, int, uint64_t, int* status) {
    char own[128];
    snprintf(own, sizeof own, "fake_%s", name);
    void* self = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    *function = self ? dlsym(self, own) : nullptr;
    if (status) *status = *function ? 0 : 1;
    return *function ? kSuccess : kNotFound;
}

extern "C" __attribute__((visibility("default"))) int cuGetProcAddress(const char* name, void** function, int version, uint64_t flags) {
    return cuGetProcAddress_v2(name, function, version, flags, nullptr);
}
