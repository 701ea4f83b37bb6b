// Emulated twin of include/cuda/ptx/memory.h.
#pragma once

#include "../../operations.h"

namespace headrace::ptx {

using SharedAddress = uint32_t;

__device__ HEADRACE_ALWAYS_INLINE SharedAddress shared_base() { return emulation::kSharedBase; }

template <class T>
__device__ HEADRACE_ALWAYS_INLINE T* settled_pointer(T* pointer) {
    return pointer;
}

template <class T>
__device__ HEADRACE_ALWAYS_INLINE T load_shared(SharedAddress from) {
    static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    T value;
    memcpy(&value, emulation::shared_to_load<sizeof(T)>(from), sizeof value);
    return value;
}

template <class T>
__device__ HEADRACE_ALWAYS_INLINE void store_shared(SharedAddress to, T value) {
    static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    memcpy(emulation::shared_to_store<sizeof(T)>(to), &value, sizeof value);
}

__device__ HEADRACE_ALWAYS_INLINE uint32_t load_shared_acquire(SharedAddress from) {
    return emulation::load_shared_acquire(from);
}

__device__ HEADRACE_ALWAYS_INLINE void add_shared_release(SharedAddress to, uint32_t value) {
    emulation::add_shared_release(to, value);
}

template <class T>
__device__ HEADRACE_ALWAYS_INLINE T load_global(const T* from) {
    static_assert(sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    T value;
    memcpy(&value, emulation::global_to_load<sizeof(T)>(from), sizeof value);
    return value;
}

__device__ HEADRACE_ALWAYS_INLINE void load_global_if(bool is_wanted, const uint4* from, uint4& to) {
    if (is_wanted) to = load_global(from);
}

__device__ HEADRACE_ALWAYS_INLINE int32_t load_settled(const int32_t* from) { return load_global(from); }

__device__ HEADRACE_ALWAYS_INLINE void prefetch(const void* at) { emulation::prefetch(at); }

template <class T>
__device__ HEADRACE_ALWAYS_INLINE T load_constant(const T* from) {
    static_assert(sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    T value;
    memcpy(&value, emulation::constant_to_load<sizeof(T)>(from), sizeof value);
    return value;
}

__device__ HEADRACE_ALWAYS_INLINE float4 load_constant_early(const float4* from) { return load_constant(from); }

template <class T>
__device__ HEADRACE_ALWAYS_INLINE void store_global(T* to, T value) {
    static_assert(sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    memcpy(emulation::global_to_store<sizeof(T)>(to), &value, sizeof value);
    emulation::keep_store(to, &value, sizeof value);
}

__device__ HEADRACE_ALWAYS_INLINE uint32_t load_acquire(const uint32_t* from) { return emulation::load_acquire(from); }

__device__ HEADRACE_ALWAYS_INLINE void add_release(uint32_t* to, uint32_t value) { emulation::add_release(to, value); }

__device__ HEADRACE_ALWAYS_INLINE uint32_t add_acquire_release(uint32_t* to, uint32_t value) {
    return emulation::add_acquire_release(to, value);
}

__device__ HEADRACE_ALWAYS_INLINE uint32_t compare_exchange(uint32_t* at, uint32_t expected, uint32_t desired) {
    return emulation::compare_exchange(at, expected, desired);
}

__device__ HEADRACE_ALWAYS_INLINE void store_system(uint32_t* to, uint32_t value) { emulation::store_system(to, value); }

__device__ HEADRACE_ALWAYS_INLINE uint32_t load_system(const uint32_t* from) { return load_global(from); }

__device__ HEADRACE_ALWAYS_INLINE void fence_system() {}

}  // namespace headrace::ptx
