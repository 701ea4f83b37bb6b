// The C interface of a library of emulated kernels: HEADRACE_KERNELS(names...) at the end of its source.
#pragma once

#include "emulator.h"

namespace headrace::emulation {

// A function of one argument, by value.
struct Kernel {
    const void* function;
    void (*call)(const void* function, const void* argument);
    uint64_t argument_bytes;

    template <class Argument>
    Kernel(void (*kernel)(Argument))
        : function(reinterpret_cast<const void*>(kernel)), argument_bytes(sizeof(Argument)) {
        call = [](const void* function, const void* argument) {
            reinterpret_cast<void (*)(Argument)>(const_cast<void*>(function))(*static_cast<const Argument*>(argument));
        };
    }
};

// Index of a name in "one, two, three", or -1.
inline int find_name(const char* names, const char* name) {
    const size_t length = strlen(name);
    for (int index = 0;; index++) {
        while (*names == ' ') names++;
        const size_t here = strcspn(names, ", ");
        if (here == length && !strncmp(names, name, length)) return index;
        names = strchr(names, ',');
        if (!names++) return -1;
    }
}

inline void emulate(const Kernel* kernels, const char* names, const char* name, const void* argument,
                    uint64_t argument_bytes, const EmulationConfig& config, EmulationReport& report) {
    report = {};
    report.block = report.warp = report.lane = -1;
    report.status = kCall;
    const int index = find_name(names, name);
    if (index < 0) {
        snprintf(report.message, sizeof report.message, "no kernel %s among %s", name, names);
        return;
    }
    const Kernel& kernel = kernels[index];
    if (argument_bytes != kernel.argument_bytes) {
        snprintf(report.message, sizeof report.message, "%s takes %llu bytes, not %llu", name,
                 static_cast<unsigned long long>(kernel.argument_bytes), static_cast<unsigned long long>(argument_bytes));
        return;
    }
    if (const char* fault = find_fault(config)) {
        snprintf(report.message, sizeof report.message, "%s", fault);
        return;
    }
    machine.call = kernel.call;
    machine.kernel = kernel.function;
    machine.arguments = argument;
    run(config, report);
}

}  // namespace headrace::emulation

#define HEADRACE_KERNELS(...)                                                                                         \
    extern "C" __attribute__((visibility("default"))) int headrace_emulate(                                           \
        const char* name, const void* argument, uint64_t argument_bytes, const EmulationConfig* config,               \
        EmulationReport* report) {                                                                                    \
        const headrace::emulation::Kernel kernels[] = {__VA_ARGS__};                                                  \
        headrace::emulation::emulate(kernels, #__VA_ARGS__, name, argument, argument_bytes, *config, *report);        \
        return report->status;                                                                                        \
    }                                                                                                                 \
    extern "C" __attribute__((visibility("default"))) void headrace_release() {                                       \
        headrace::emulation::release_memory();                                                                        \
    }
